// SPDX-License-Identifier: Apache-2.0
//
// Random redistributions for property tests, with their brute-force answer.

#ifndef DSD_CORE_PLAN_RANDOM_PLAN_CASE_H_
#define DSD_CORE_PLAN_RANDOM_PLAN_CASE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/element_map.h"
#include "dsd/core/plan/binding.h"
#include "dsd/core/plan/catalog.h"

namespace dsd::test {

struct TensorCase {
  LayoutSpec source;
  LayoutSpec target;
  DType source_dtype = DType::kFloat32;
  DType target_dtype = DType::kFloat32;
};

struct PlanCase {
  int world_size = 1;
  absl::flat_hash_map<int64_t, int> source_rank_of;  // of holders
  absl::flat_hash_map<int64_t, int> target_rank_of;
  std::vector<int> host_of_rank;    // empty: one host
  std::vector<TensorCase> tensors;  // named "t0", "t1", ...

  std::string ToString() const;
};

struct PlanCaseOptions {
  int max_world_size = 8;
  // Holder r is rank r, on one host, and every needed element is somewhere.
  bool simple = false;
  bool any = true;  // may use kAnyHolder
};

// The same for the same seed and options.
PlanCase RandomPlanCase(uint64_t seed, const PlanCaseOptions& options = {});

// The case as the planner takes it.
struct PlanInputs {
  Catalog source;
  Catalog target;
  Binding source_binding;
  Binding target_binding;
};
absl::StatusOr<PlanInputs> BuildPlanCase(const PlanCase& plan_case);

// One tensor element by element (row-major), from the specs alone.
struct ElementMap {
  struct Element {
    std::vector<int> source_ranks;  // ascending
    bool source_any = false;        // every rank can read it
    std::vector<int> target_ranks;  // ascending; that need it
    bool target_any = false;        // one rank must take it
    // Bytes that must cross the network for it.
    int64_t wire_bytes = 0;

    bool needed() const { return target_any || !target_ranks.empty(); }
    bool available() const { return source_any || !source_ranks.empty(); }
  };
  std::vector<Element> elements;
};
ElementMap MapElements(const PlanCase& plan_case, const TensorCase& tensor);

}  // namespace dsd::test

#endif  // DSD_CORE_PLAN_RANDOM_PLAN_CASE_H_
