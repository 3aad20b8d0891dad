// SPDX-License-Identifier: Apache-2.0
//
// Mesh layouts: per tensor dimension, the ordered steps that cut it.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout_impl.h"

namespace dsd {
namespace {

// One mesh dimension of extent `n` cuts what the steps before it left: into
// `split_factor` pieces, each of them into n parts. Coordinate i keeps the i-th
// part of every piece, in order. A plain Shard has one piece.
struct Step {
  int mesh_dim;
  int64_t n;
  int64_t split_factor;

  // With pieces of one element, coordinate 0 keeps everything.
  bool KeepsAll(int64_t piece) const { return n == 1 || piece <= 1; }
};
using Steps = absl::InlinedVector<Step, 2>;

struct Interval {
  int64_t begin;
  int64_t end;
};
using Intervals = absl::InlinedVector<Interval, 2>;

int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

// The i-th of n chunks of `length` elements, as torch.chunk.
Interval Chunk(int64_t length, int64_t n, int64_t i) {
  const int64_t chunk = CeilDiv(length, n);
  if (chunk == 0 || i >= CeilDiv(length, chunk)) return {length, length};
  return {i * chunk, std::min((i + 1) * chunk, length)};
}

void AppendMerged(Intervals& out, Interval next) {
  if (!out.empty() && out.back().end == next.begin) {
    out.back().end = next.end;
  } else {
    out.push_back(next);
  }
}

// The indices, ascending, that the holder with mesh coordinates `coords` has of
// a dimension of extent `size`.
Intervals IntervalsOf(const Steps& steps, int64_t size,
                      absl::Span<const int64_t> coords) {
  Intervals held;
  if (size > 0) held.push_back({0, size});
  int64_t length = size;  // of `held`
  for (const Step& step : steps) {
    if (length == 0) break;
    const int64_t piece = CeilDiv(length, step.split_factor);
    const int64_t i = coords[step.mesh_dim];
    if (step.KeepsAll(piece)) {
      if (i > 0) return {};
      continue;
    }
    Intervals kept;
    int64_t kept_length = 0;
    size_t k = 0;         // the interval of `held` with the next position
    int64_t k_begin = 0;  // its first position
    for (int64_t begin = 0; begin < length; begin += piece) {
      const Interval part = Chunk(std::min(piece, length - begin), step.n, i);
      int64_t position = begin + part.begin;
      const int64_t end = begin + part.end;
      kept_length += end - position;
      while (position < end) {
        const int64_t k_length = held[k].end - held[k].begin;
        if (position >= k_begin + k_length) {
          k_begin += k_length;
          ++k;
          continue;
        }
        const int64_t stop = std::min(end, k_begin + k_length);
        AppendMerged(kept, {held[k].begin + position - k_begin,
                            held[k].begin + stop - k_begin});
        position = stop;
      }
    }
    held = std::move(kept);
    length = kept_length;
  }
  return held;
}

// Sets the coordinates of the holders of index `x`, for the mesh dimensions of
// `steps`. Returns how many indices from x on have the same: the whole rest of
// the run, since the coordinate of the step that ends it changes there.
int64_t Locate(const Steps& steps, int64_t size, int64_t x, Dims& coords) {
  int64_t length = size;   // of the index list after the steps so far
  int64_t position = x;    // of x in that list
  int64_t run = size - x;  // from x on, consecutive in it
  for (const Step& step : steps) {
    coords[step.mesh_dim] = 0;
    const int64_t piece = CeilDiv(length, step.split_factor);
    if (step.KeepsAll(piece)) continue;
    const int64_t pieces_before = position / piece;
    const int64_t piece_begin = pieces_before * piece;
    const int64_t piece_length = std::min(piece, length - piece_begin);
    const int64_t in_piece = position - piece_begin;
    const int64_t i = in_piece / CeilDiv(piece_length, step.n);
    const Interval part = Chunk(piece_length, step.n, i);
    const Interval full_part = Chunk(piece, step.n, i);
    const Interval last_part = Chunk(length % piece, step.n, i);
    const int64_t per_piece = full_part.end - full_part.begin;
    run = std::min(run, part.end - in_piece);
    position = pieces_before * per_piece + in_piece - part.begin;
    length = (length / piece) * per_piece + last_part.end - last_part.begin;
    coords[step.mesh_dim] = i;
  }
  return run;
}

absl::Status CheckMesh(const DeviceMesh& mesh) {
  if (mesh.size() < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(mesh.ToString(),
                     ": extents must be >= 1 and their product "
                     "at most 2^63 - 1"));
  }
  return absl::OkStatus();
}

// `dim` counted from the front.
absl::StatusOr<int> NormalDim(int dim, int ndim) {
  const int normal = dim < 0 ? dim + ndim : dim;
  if (normal < 0 || normal >= ndim) {
    return absl::InvalidArgumentError(absl::StrCat("tensor dimension ", dim,
                                                   " is out of range for ",
                                                   ndim, " dimensions"));
  }
  return normal;
}

}  // namespace

struct Layout::MeshImpl final : Layout::Impl {
  MeshImpl(Dims shape, DeviceMesh mesh, std::vector<Steps> steps,
           std::string symbols)
      : Impl(Kind::kMesh, std::move(shape)),
        mesh(std::move(mesh)),
        steps(std::move(steps)),
        symbols(std::move(symbols)),
        free(this->mesh.ndim(), 1) {
    for (const Steps& dim_steps : this->steps) {
      for (const Step& step : dim_steps) free[step.mesh_dim] = 0;
    }
  }

  // What `holder` has, per tensor dimension; nullopt if it is not in the mesh.
  std::optional<absl::InlinedVector<Intervals, 4>> Held(Holder holder) const {
    const std::optional<Dims> coords = mesh.CoordsOf(holder);
    if (!coords.has_value()) return std::nullopt;
    absl::InlinedVector<Intervals, 4> held;
    for (size_t d = 0; d < shape.size(); ++d) {
      held.push_back(IntervalsOf(steps[d], shape[d], *coords));
    }
    return held;
  }

  std::vector<LocalBox> BoxesOf(Holder holder) const override {
    std::vector<LocalBox> boxes;
    const auto held = Held(holder);
    if (!held.has_value()) return boxes;
    size_t count = 1;
    for (const Intervals& intervals : *held) count *= intervals.size();
    if (count == 0) return boxes;
    boxes.reserve(count);
    LocalBox at{whole, Dims(shape.size(), 0)};
    AppendBoxes(*held, 0, at, boxes);
    return boxes;
  }

  static void AppendBoxes(const absl::InlinedVector<Intervals, 4>& held,
                          size_t dim, LocalBox& at,
                          std::vector<LocalBox>& out) {
    if (dim == held.size()) {
      out.push_back(at);
      return;
    }
    at.local_lo[dim] = 0;
    for (const Interval& interval : held[dim]) {
      at.box.lo[dim] = interval.begin;
      at.box.hi[dim] = interval.end;
      AppendBoxes(held, dim + 1, at, out);
      at.local_lo[dim] += interval.end - interval.begin;
    }
  }

  std::optional<Dims> LocalShape(Holder holder) const override {
    const auto held = Held(holder);
    if (!held.has_value()) return std::nullopt;
    Dims local(shape.size(), 0);
    for (size_t d = 0; d < shape.size(); ++d) {
      for (const Interval& interval : (*held)[d]) {
        local[d] += interval.end - interval.begin;
      }
    }
    return local;
  }

  void ForEachCell(const Box& query, absl::FunctionRef<void(const Cell&)> visit,
                   int64_t& operations) const override {
    Box box = query;
    Dims coords(mesh.ndim(), 0);
    VisitCells(query, 0, box, coords, visit, operations);
  }

  // Walks the runs of dimension `dim`, the earlier ones being fixed.
  void VisitCells(const Box& query, int dim, Box& box, Dims& coords,
                  absl::FunctionRef<void(const Cell&)> visit,
                  int64_t& operations) const {
    if (dim == query.ndim()) {
      ++operations;
      visit(Cell{box, HolderSet(&mesh, coords, free)});
      return;
    }
    for (int64_t x = query.lo[dim]; x < query.hi[dim]; x = box.hi[dim]) {
      const int64_t run = Locate(steps[dim], shape[dim], x, coords);
      box.lo[dim] = x;
      box.hi[dim] = std::min(x + run, query.hi[dim]);
      VisitCells(query, dim + 1, box, coords, visit, operations);
    }
  }

  int64_t NumUncovered() const override { return 0; }

  bool HasAnyHolder() const override { return false; }

  std::optional<std::pair<Holder, Holder>> HolderBounds() const override {
    return mesh.bounds();
  }

  void ForEachHolder(absl::FunctionRef<void(Holder)> visit) const override {
    Dims coords(mesh.ndim(), 0);
    const HolderSet all(&mesh, coords, Dims(mesh.ndim(), 1));
    for (int64_t i = 0; i < all.size(); ++i) visit(all.At(i));
  }

  void AddTo(DigestBuilder& digest) const override {
    mesh.AddTo(digest);
    for (const Steps& dim_steps : steps) {
      digest.Add(static_cast<int64_t>(dim_steps.size()));
      for (const Step& step : dim_steps) {
        digest.Add(int64_t{step.mesh_dim}).Add(step.split_factor);
      }
    }
  }

  absl::StatusOr<Layout> MapHolders(
      absl::FunctionRef<Holder(Holder)> map) const override {
    std::vector<Holder> mapped;
    mapped.reserve(mesh.size());
    ForEachHolder([&](Holder holder) { mapped.push_back(map(holder)); });
    absl::StatusOr<DeviceMesh> to =
        DeviceMesh::Create(mesh.shape(), std::move(mapped), mesh.dim_names());
    DSD_RETURN_IF_ERROR(to) << "map holders";
    return Layout(
        std::make_shared<MeshImpl>(shape, *std::move(to), steps, symbols));
  }

  std::string ToString() const override {
    return absl::StrCat(mesh.ToString(), " ", symbols);
  }

  const DeviceMesh mesh;
  const std::vector<Steps> steps;  // per tensor dimension
  const std::string symbols;       // for people
  Dims free;                       // per mesh dimension: 1 if it cuts nothing
};

absl::StatusOr<Layout> Layout::FromPlacements(
    Dims shape, DeviceMesh mesh, absl::Span<const Placement> placements) {
  DSD_RETURN_IF_ERROR(CheckShape(shape));
  DSD_RETURN_IF_ERROR(CheckMesh(mesh));
  if (placements.size() != mesh.shape().size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        mesh.ToString(), " needs ", mesh.ndim(), " placements, one per mesh ",
        "dimension; found ", placements.size()));
  }
  std::vector<Steps> steps(shape.size());
  std::string symbols;
  for (int m = 0; m < mesh.ndim(); ++m) {
    Placement placement = placements[m];
    const auto where = [&] {
      return absl::StrCat("placement ", placements[m].ToString(), " of mesh ",
                          "dimension ", m, ", tensor ", DimsToString(shape));
    };
    switch (placement.kind) {
      case Placement::Kind::kReplicate:
        break;
      case Placement::Kind::kShard:
      case Placement::Kind::kStridedShard: {
        absl::StatusOr<int> dim = NormalDim(placement.dim, shape.size());
        DSD_RETURN_IF_ERROR(dim) << where();
        placement.dim = *dim;
        const bool strided = placement.kind == Placement::Kind::kStridedShard;
        if (strided && placement.split_factor < 1) {
          return absl::InvalidArgumentError(
              absl::StrCat(where(), ": split_factor must be >= 1"));
        }
        steps[*dim].push_back(
            {m, mesh.shape()[m], strided ? placement.split_factor : 1});
        break;
      }
      case Placement::Kind::kPartial:
        return absl::InvalidArgumentError(
            absl::StrCat(where(), ": a pending reduction is not a layout; ",
                         "reduce it first"));
      default:
        return absl::InvalidArgumentError(
            absl::StrCat(where(), ": unknown kind"));
    }
    absl::StrAppend(&symbols, m == 0 ? "" : ",", placement.ToString());
  }
  return Layout(std::make_shared<MeshImpl>(
      std::move(shape), std::move(mesh), std::move(steps), std::move(symbols)));
}

absl::StatusOr<Layout> Layout::FromHistory(
    Dims shape, DeviceMesh mesh, absl::Span<const ShardStep> history) {
  DSD_RETURN_IF_ERROR(CheckShape(shape));
  DSD_RETURN_IF_ERROR(CheckMesh(mesh));
  std::vector<Steps> steps(shape.size());
  std::string symbols = "history ";
  absl::InlinedVector<bool, 4> used(mesh.ndim(), false);
  for (size_t i = 0; i < history.size(); ++i) {
    const int m = history[i].mesh_dim;
    const auto where = [&] {
      return absl::StrCat("step ", i, " of the sharding history, tensor ",
                          DimsToString(shape), " on ", mesh.ToString());
    };
    if (m < 0 || m >= mesh.ndim()) {
      return absl::InvalidArgumentError(
          absl::StrCat(where(), ": mesh dimension ", m, " is out of range"));
    }
    if (used[m]) {
      return absl::InvalidArgumentError(absl::StrCat(
          where(), ": mesh dimension ", m, " is named a second time"));
    }
    used[m] = true;
    absl::StatusOr<int> dim = NormalDim(history[i].tensor_dim, shape.size());
    DSD_RETURN_IF_ERROR(dim) << where();
    steps[*dim].push_back({m, mesh.shape()[m], 1});
    absl::StrAppend(&symbols, i == 0 ? "" : ",", "S(", *dim, ")@", m);
  }
  return Layout(std::make_shared<MeshImpl>(
      std::move(shape), std::move(mesh), std::move(steps), std::move(symbols)));
}

Layout Layout::Replicated(Dims shape, std::vector<Holder> holders) {
  std::sort(holders.begin(), holders.end());
  holders.erase(std::unique(holders.begin(), holders.end()), holders.end());
  const int64_t count = holders.size();
  absl::StatusOr<DeviceMesh> mesh = DeviceMesh::Create({count}, holders);
  if (holders.empty()) return WholeBoxes(std::move(shape), {});
  if (!mesh.ok()) return Anywhere(std::move(shape));  // a negative holder
  std::vector<Steps> steps(shape.size());
  return Layout(std::make_shared<MeshImpl>(std::move(shape), *std::move(mesh),
                                           std::move(steps), "R"));
}

}  // namespace dsd
