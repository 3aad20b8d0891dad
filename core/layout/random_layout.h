// SPDX-License-Identifier: Apache-2.0
//
// Random layouts for property tests.

#ifndef DSD_CORE_LAYOUT_RANDOM_LAYOUT_H_
#define DSD_CORE_LAYOUT_RANDOM_LAYOUT_H_

#include <cstdint>
#include <random>
#include <vector>

#include "absl/status/statusor.h"
#include "dsd/core/layout/element_map.h"
#include "dsd/core/layout/layout.h"
#include "dsd/testing/harness/test_seed.h"  // for who includes this

namespace dsd::test {

using Random = std::mt19937_64;

// Uniform in [low, high].
int64_t Uniform(Random& random, int64_t low, int64_t high);

// 0 to 4 dimensions with at most `max_elements` elements; now and then with
// none.
std::vector<int64_t> RandomShape(Random& random, int64_t max_elements);

struct RandomLayoutOptions {
  std::vector<int64_t> holders;  // to choose from; not empty
  bool any = false;              // may use kAnyHolder
  bool holes = false;            // may leave elements without a holder
};

// Any kind: meshes of up to 3 dimensions, strided shards, histories, flat
// intervals, ragged boxes with replicas and partial overlaps.
LayoutSpec RandomLayoutSpec(Random& random, std::vector<int64_t> shape,
                            const RandomLayoutOptions& options);

// The layout that `spec` describes.
absl::StatusOr<Layout> BuildLayout(const LayoutSpec& spec);

}  // namespace dsd::test

#endif  // DSD_CORE_LAYOUT_RANDOM_LAYOUT_H_
