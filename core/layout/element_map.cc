// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/layout/element_map.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <sstream>
#include <utility>

namespace dsd::test {
namespace {

using Ints = std::vector<int64_t>;

// torch.chunk, with the missing trailing chunks added as empty ones.
std::vector<Ints> TorchChunk(const Ints& list, int64_t count) {
  const int64_t size = list.size();
  const int64_t chunk = std::max<int64_t>(1, (size + count - 1) / count);
  std::vector<Ints> chunks(count);
  for (int64_t i = 0; i < size; ++i) chunks[i / chunk].push_back(list[i]);
  return chunks;
}

// _StridedShard._split_tensor, on the indices of one dimension.
Ints StridedChunk(const Ints& list, int64_t split_factor, int64_t count,
                  int64_t i) {
  Ints out;
  for (const Ints& piece : TorchChunk(list, split_factor)) {
    const Ints part = TorchChunk(piece, count)[i];
    out.insert(out.end(), part.begin(), part.end());
  }
  return out;
}

Ints Coordinates(const Ints& shape, int64_t index) {
  Ints at(shape.size());
  for (size_t d = shape.size(); d-- > 0;) {
    at[d] = index % shape[d];
    index /= shape[d];
  }
  return at;
}

// Row-major indices of the elements whose coordinates are in `lists`.
Ints Product(const Ints& shape, const std::vector<Ints>& lists) {
  Ints out = {0};
  for (size_t d = 0; d < shape.size(); ++d) {
    Ints next;
    for (int64_t prefix : out) {
      for (int64_t x : lists[d]) next.push_back(prefix * shape[d] + x);
    }
    out = std::move(next);
  }
  return out;
}

Ints Range(int64_t begin, int64_t end) {
  Ints out(end - begin);
  std::iota(out.begin(), out.end(), begin);
  return out;
}

std::string Text(const Ints& values) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < values.size(); ++i) {
    out << (i == 0 ? "" : ",") << values[i];
  }
  out << "]";
  return out.str();
}

}  // namespace

std::string LayoutSpec::ToString() const {
  std::ostringstream out;
  out << Text(shape);
  switch (kind) {
    case Kind::kPlacements:
      out << " mesh" << Text(mesh_shape) << " of " << Text(mesh_holders);
      for (const Place& place : placements) {
        out << " " << place.kind;
        if (place.kind != 'R') out << "(" << place.dim << ")";
        if (place.kind == 'T') out << "/" << place.split_factor;
      }
      break;
    case Kind::kHistory:
      out << " mesh" << Text(mesh_shape) << " of " << Text(mesh_holders)
          << " history";
      for (const Step& step : history) {
        out << " S(" << step.tensor_dim << ")@" << step.mesh_dim;
      }
      break;
    case Kind::kFlat:
      out << " flat";
      for (const Interval& one : intervals) {
        out << " " << one.holder << ":" << one.begin << "-" << one.end;
      }
      break;
    case Kind::kBoxes:
      out << " boxes";
      for (const HeldBox& one : boxes) {
        out << " " << one.holder << ":" << Text(one.lo) << "-" << Text(one.hi);
      }
      break;
    case Kind::kReplicated:
      out << " replicated on " << Text(holders);
      break;
    case Kind::kAny:
      out << " any";
      break;
  }
  return out.str();
}

int64_t NumElements(const LayoutSpec& spec) {
  int64_t count = 1;
  for (int64_t extent : spec.shape) count *= extent;
  return count;
}

std::vector<int64_t> HoldersOf(const LayoutSpec& spec) {
  std::set<int64_t> all(spec.holders.begin(), spec.holders.end());
  all.insert(spec.mesh_holders.begin(), spec.mesh_holders.end());
  for (const auto& one : spec.intervals) all.insert(one.holder);
  for (const auto& one : spec.boxes) all.insert(one.holder);
  if (spec.kind == LayoutSpec::Kind::kAny) all.insert(-1);
  return {all.begin(), all.end()};
}

std::vector<std::vector<int64_t>> LocalIndices(const LayoutSpec& spec,
                                               int64_t holder) {
  const int64_t position =
      std::find(spec.mesh_holders.begin(), spec.mesh_holders.end(), holder) -
      spec.mesh_holders.begin();
  const Ints coords = Coordinates(spec.mesh_shape, position);
  std::vector<Ints> lists;
  for (int64_t extent : spec.shape) lists.push_back(Range(0, extent));
  if (spec.kind == LayoutSpec::Kind::kHistory) {
    for (const LayoutSpec::Step& step : spec.history) {
      Ints& list = lists[step.tensor_dim];
      list = TorchChunk(list,
                        spec.mesh_shape[step.mesh_dim])[coords[step.mesh_dim]];
    }
    return lists;
  }
  for (size_t m = 0; m < spec.placements.size(); ++m) {
    const LayoutSpec::Place& place = spec.placements[m];
    if (place.kind == 'R') continue;
    const int dim =
        place.dim < 0 ? place.dim + static_cast<int>(lists.size()) : place.dim;
    const int64_t split = place.kind == 'T' ? place.split_factor : 1;
    lists[dim] = StridedChunk(lists[dim], split, spec.mesh_shape[m], coords[m]);
  }
  return lists;
}

std::vector<int64_t> LocalElements(const LayoutSpec& spec, int64_t holder) {
  Ints out;
  switch (spec.kind) {
    case LayoutSpec::Kind::kPlacements:
    case LayoutSpec::Kind::kHistory:
      return Product(spec.shape, LocalIndices(spec, holder));
    case LayoutSpec::Kind::kFlat:
      for (const auto& one : spec.intervals) {
        if (one.holder == holder) out = Range(one.begin, one.end);
      }
      return out;
    case LayoutSpec::Kind::kBoxes: {
      std::vector<Ints> parts;
      for (const auto& one : spec.boxes) {
        if (one.holder != holder) continue;
        std::vector<Ints> lists;
        bool empty = false;
        for (size_t d = 0; d < one.lo.size(); ++d) {
          empty |= one.hi[d] <= one.lo[d];
          lists.push_back(Range(one.lo[d], std::max(one.lo[d], one.hi[d])));
        }
        if (!empty) parts.push_back(Product(spec.shape, lists));
      }
      std::sort(parts.begin(), parts.end());
      for (const Ints& part : parts) {
        out.insert(out.end(), part.begin(), part.end());
      }
      return out;
    }
    case LayoutSpec::Kind::kReplicated:
    case LayoutSpec::Kind::kAny:
      return Range(0, NumElements(spec));
  }
  return out;
}

std::vector<std::vector<int64_t>> HoldersByElement(const LayoutSpec& spec) {
  std::vector<Ints> holders(NumElements(spec));
  for (int64_t holder : HoldersOf(spec)) {
    for (int64_t element : LocalElements(spec, holder)) {
      holders[element].push_back(holder);
    }
  }
  return holders;
}

}  // namespace dsd::test
