// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/layout/random_layout.h"

#include <algorithm>
#include <string>
#include <utility>

namespace dsd::test {
namespace {

using Ints = std::vector<int64_t>;

bool OneIn(Random& random, int64_t n) { return Uniform(random, 1, n) == 1; }

int64_t Product(const Ints& values) {
  int64_t product = 1;
  for (int64_t value : values) product *= value;
  return product;
}

Ints RandomSubset(Random& random, Ints values, int64_t count) {
  std::shuffle(values.begin(), values.end(), random);
  values.resize(count);
  return values;
}

void ChooseMesh(Random& random, const Ints& holders, LayoutSpec& spec) {
  const int64_t ndim = Uniform(random, 1, 3);
  int64_t left = holders.size();
  for (int64_t d = 0; d < ndim; ++d) {
    spec.mesh_shape.push_back(Uniform(random, 1, std::min<int64_t>(left, 5)));
    left /= spec.mesh_shape.back();
  }
  std::shuffle(spec.mesh_shape.begin(), spec.mesh_shape.end(), random);
  const int64_t size = Product(spec.mesh_shape);
  if (OneIn(random, 3)) {
    spec.mesh_holders = RandomSubset(random, holders, size);
  } else {
    const int64_t first = Uniform(random, 0, holders.size() - size);
    spec.mesh_holders.assign(holders.begin() + first,
                             holders.begin() + first + size);
  }
}

void ChoosePlacements(Random& random, LayoutSpec& spec) {
  const int ndim = spec.shape.size();
  for (size_t m = 0; m < spec.mesh_shape.size(); ++m) {
    LayoutSpec::Place place;
    if (ndim > 0 && !OneIn(random, 4)) {
      place.kind = OneIn(random, 3) ? 'T' : 'S';
      // Often the same dimension, so that shards nest.
      place.dim = OneIn(random, 2) ? 0 : Uniform(random, -ndim, ndim - 1);
      if (place.kind == 'T') {
        place.split_factor =
            OneIn(random, 8) ? Uniform(random, 1, 1000) : Uniform(random, 1, 5);
      }
    }
    spec.placements.push_back(place);
  }
}

void ChooseHistory(Random& random, LayoutSpec& spec) {
  const int ndim = spec.shape.size();
  if (ndim == 0) return;
  Ints mesh_dims;
  for (size_t m = 0; m < spec.mesh_shape.size(); ++m) mesh_dims.push_back(m);
  for (int64_t m :
       RandomSubset(random, mesh_dims, Uniform(random, 0, mesh_dims.size()))) {
    const int64_t dim = OneIn(random, 2) ? 0 : Uniform(random, 0, ndim - 1);
    spec.history.push_back({static_cast<int>(m), static_cast<int>(dim)});
  }
}

void ChooseIntervals(Random& random, const RandomLayoutOptions& options,
                     LayoutSpec& spec) {
  const int64_t size = NumElements(spec);
  const int64_t count = Uniform(random, 1, options.holders.size());
  const Ints holders = RandomSubset(random, options.holders, count);
  const int64_t parts = Uniform(random, 1, count);
  Ints cuts = {0, size};
  for (int64_t i = 1; i < parts; ++i) cuts.push_back(Uniform(random, 0, size));
  std::sort(cuts.begin(), cuts.end());
  for (int64_t i = 0; i < count; ++i) {
    if (i < parts) {
      if (options.holes && OneIn(random, 4)) continue;
      spec.intervals.push_back({holders[i], cuts[i], cuts[i + 1]});
    } else if (OneIn(random, 2)) {  // a replica
      const int64_t like = Uniform(random, 0, parts - 1);
      spec.intervals.push_back({holders[i], cuts[like], cuts[like + 1]});
    } else {  // across the others
      const int64_t begin = Uniform(random, 0, size);
      spec.intervals.push_back(
          {holders[i], begin, Uniform(random, begin, size)});
    }
  }
  if (options.any && parts == count && !spec.intervals.empty() &&
      OneIn(random, 3)) {
    spec.intervals.back().holder = -1;
  }
}

// Cuts the box into ragged ones.
void CutBox(Random& random, const Ints& lo, const Ints& hi, int depth,
            std::vector<std::pair<Ints, Ints>>& out) {
  const int ndim = lo.size();
  if (depth > 0 && ndim > 0) {
    const int64_t dim = Uniform(random, 0, ndim - 1);
    if (hi[dim] - lo[dim] >= 2 && !OneIn(random, 5)) {
      Ints middle_hi = hi;
      Ints middle_lo = lo;
      middle_hi[dim] = middle_lo[dim] =
          Uniform(random, lo[dim] + 1, hi[dim] - 1);
      CutBox(random, lo, middle_hi, depth - 1, out);
      CutBox(random, middle_lo, hi, depth - 1, out);
      return;
    }
  }
  out.push_back({lo, hi});
}

void ChooseBoxes(Random& random, const RandomLayoutOptions& options,
                 LayoutSpec& spec) {
  Ints holders = options.holders;
  std::shuffle(holders.begin(), holders.end(), random);
  // The last ones get boxes across those of the others.
  const int64_t across =
      holders.size() > 1 && OneIn(random, 3)
          ? Uniform(random, 1, std::min<int64_t>(3, holders.size() - 1))
          : 0;
  const int64_t regular = holders.size() - across;
  const bool any = options.any && across == 0 && OneIn(random, 2);

  std::vector<std::pair<Ints, Ints>> leaves;
  CutBox(random, Ints(spec.shape.size(), 0), spec.shape, Uniform(random, 0, 4),
         leaves);
  for (const auto& [lo, hi] : leaves) {
    if (options.holes && OneIn(random, 5)) continue;
    if (any && OneIn(random, 2)) {
      spec.boxes.push_back({-1, lo, hi});
      continue;
    }
    const int64_t copies =
        OneIn(random, 3) ? Uniform(random, 1, std::min<int64_t>(3, regular))
                         : 1;
    Ints owners(holders.begin(), holders.begin() + regular);
    for (int64_t owner : RandomSubset(random, owners, copies)) {
      spec.boxes.push_back({owner, lo, hi});
    }
  }
  for (int64_t i = regular; i < static_cast<int64_t>(holders.size()); ++i) {
    LayoutSpec::HeldBox box{holders[i], {}, {}};
    for (int64_t extent : spec.shape) {
      box.lo.push_back(Uniform(random, 0, extent));
      box.hi.push_back(Uniform(random, box.lo.back(), extent));
    }
    spec.boxes.push_back(box);
  }
  std::shuffle(spec.boxes.begin(), spec.boxes.end(), random);
}

Dims ToDims(const Ints& values) { return Dims(values.begin(), values.end()); }

}  // namespace

int64_t Uniform(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

std::vector<int64_t> RandomShape(Random& random, int64_t max_elements) {
  Ints shape;
  const int64_t ndim = OneIn(random, 12) ? 0 : Uniform(random, 1, 4);
  int64_t left = max_elements;
  for (int64_t d = 0; d < ndim; ++d) {
    shape.push_back(Uniform(random, 1, std::min<int64_t>(left, 40)));
    left /= shape.back();
  }
  std::shuffle(shape.begin(), shape.end(), random);
  if (ndim > 0 && OneIn(random, 25)) shape[Uniform(random, 0, ndim - 1)] = 0;
  return shape;
}

LayoutSpec RandomLayoutSpec(Random& random, std::vector<int64_t> shape,
                            const RandomLayoutOptions& options) {
  LayoutSpec spec;
  spec.shape = std::move(shape);
  switch (Uniform(random, 0, options.any ? 10 : 9)) {
    case 0:
    case 1:
    case 2:
    case 3:
      spec.kind = LayoutSpec::Kind::kPlacements;
      ChooseMesh(random, options.holders, spec);
      ChoosePlacements(random, spec);
      break;
    case 4:
      spec.kind = LayoutSpec::Kind::kHistory;
      ChooseMesh(random, options.holders, spec);
      ChooseHistory(random, spec);
      break;
    case 5:
    case 6:
      spec.kind = LayoutSpec::Kind::kFlat;
      ChooseIntervals(random, options, spec);
      break;
    case 7:
    case 8:
      spec.kind = LayoutSpec::Kind::kBoxes;
      ChooseBoxes(random, options, spec);
      break;
    case 9:
      spec.kind = LayoutSpec::Kind::kReplicated;
      spec.holders = RandomSubset(random, options.holders,
                                  Uniform(random, 1, options.holders.size()));
      break;
    default:
      spec.kind = LayoutSpec::Kind::kAny;
  }
  return spec;
}

absl::StatusOr<Layout> BuildLayout(const LayoutSpec& spec) {
  const Dims shape = ToDims(spec.shape);
  switch (spec.kind) {
    case LayoutSpec::Kind::kPlacements:
    case LayoutSpec::Kind::kHistory: {
      absl::StatusOr<DeviceMesh> mesh =
          DeviceMesh::Create(ToDims(spec.mesh_shape), spec.mesh_holders);
      if (!mesh.ok()) return mesh.status();
      if (spec.kind == LayoutSpec::Kind::kHistory) {
        std::vector<ShardStep> history;
        for (const auto& step : spec.history) {
          history.push_back({step.mesh_dim, step.tensor_dim});
        }
        return Layout::FromHistory(shape, *mesh, history);
      }
      std::vector<Placement> placements;
      for (const LayoutSpec::Place& place : spec.placements) {
        placements.push_back(place.kind == 'R' ? Replicate()
                             : place.kind == 'S'
                                 ? Shard(place.dim)
                                 : StridedShard(place.dim, place.split_factor));
      }
      return Layout::FromPlacements(shape, *mesh, placements);
    }
    case LayoutSpec::Kind::kFlat: {
      std::vector<FlatInterval> intervals;
      for (const auto& one : spec.intervals) {
        intervals.push_back({one.holder, one.begin, one.end});
      }
      return Layout::FromFlatIntervals(shape, std::move(intervals));
    }
    case LayoutSpec::Kind::kBoxes: {
      std::vector<HolderBox> boxes;
      for (const auto& one : spec.boxes) {
        boxes.push_back({one.holder, {ToDims(one.lo), ToDims(one.hi)}});
      }
      return Layout::FromBoxes(shape, std::move(boxes));
    }
    case LayoutSpec::Kind::kReplicated:
      return Layout::Replicated(shape, spec.holders);
    case LayoutSpec::Kind::kAny:
      return Layout::Anywhere(shape);
  }
  return absl::InvalidArgumentError("unknown kind of layout");
}

}  // namespace dsd::test
