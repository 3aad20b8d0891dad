// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/plan/random_plan_case.h"

#include <algorithm>
#include <set>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "dsd/core/layout/random_layout.h"

namespace dsd::test {
namespace {

// Numbers of holders from `first` on, placed on ranks.
absl::flat_hash_map<int64_t, int> RandomPlaces(Random& random, int world_size,
                                               int64_t first, bool simple) {
  absl::flat_hash_map<int64_t, int> rank_of;
  if (simple || Uniform(random, 0, 1) == 0) {
    for (int rank = 0; rank < world_size; ++rank) rank_of[rank] = rank;
    return rank_of;
  }
  std::vector<int> ranks;
  for (int rank = 0; rank < world_size; ++rank) ranks.push_back(rank);
  std::shuffle(ranks.begin(), ranks.end(), random);
  const bool one_to_one = Uniform(random, 0, 1) == 0;
  const bool gaps = Uniform(random, 0, 3) == 0;
  const int64_t count = one_to_one ? Uniform(random, 1, world_size)
                                   : Uniform(random, 1, 2 * world_size);
  for (int64_t i = 0; i < count; ++i) {
    rank_of[first + (gaps ? 3 * i : i)] =
        one_to_one ? ranks[i]
                   : static_cast<int>(Uniform(random, 0, world_size - 1));
  }
  return rank_of;
}

std::vector<int64_t> Keys(const absl::flat_hash_map<int64_t, int>& map) {
  std::vector<int64_t> keys;
  for (const auto& [key, value] : map) keys.push_back(key);
  std::sort(keys.begin(), keys.end());
  return keys;
}

DType RandomDType(Random& random) {
  constexpr DType kTypes[] = {DType::kUInt8, DType::kBFloat16, DType::kFloat32,
                              DType::kFloat64};
  return kTypes[Uniform(random, 0, 3)];
}

std::vector<int> RanksOf(const std::vector<int64_t>& holders,
                         const absl::flat_hash_map<int64_t, int>& rank_of) {
  std::set<int> ranks;
  for (int64_t holder : holders) {
    const auto it = rank_of.find(holder);
    if (it != rank_of.end()) ranks.insert(it->second);
  }
  return {ranks.begin(), ranks.end()};
}

LayoutSpec ReplicatedSpec(const std::vector<int64_t>& shape,
                          const std::vector<int64_t>& holders) {
  LayoutSpec spec;
  spec.kind = LayoutSpec::Kind::kReplicated;
  spec.shape = shape;
  spec.holders = holders;
  return spec;
}

bool IsAny(const std::vector<int64_t>& holders) {
  return holders == std::vector<int64_t>{-1};
}

void Print(std::ostream& out, const char* name,
           const absl::flat_hash_map<int64_t, int>& rank_of) {
  out << "; " << name;
  for (int64_t holder : Keys(rank_of)) {
    out << " " << holder << "@" << rank_of.at(holder);
  }
}

}  // namespace

std::string PlanCase::ToString() const {
  std::ostringstream out;
  out << world_size << " ranks";
  Print(out, "source", source_rank_of);
  Print(out, "target", target_rank_of);
  out << "; hosts";
  for (int host : host_of_rank) out << " " << host;
  for (const TensorCase& tensor : tensors) {
    out << "\n  " << tensor.source.ToString() << " "
        << DTypeName(tensor.source_dtype) << "\n  -> "
        << tensor.target.ToString() << " " << DTypeName(tensor.target_dtype);
  }
  return out.str();
}

PlanCase RandomPlanCase(uint64_t seed, const PlanCaseOptions& options) {
  Random random(seed);
  PlanCase out;
  out.world_size = Uniform(random, 1, options.max_world_size);
  out.source_rank_of = RandomPlaces(random, out.world_size, 0, options.simple);
  out.target_rank_of =
      RandomPlaces(random, out.world_size, 1000, options.simple);
  if (!options.simple && Uniform(random, 0, 1) == 0) {
    for (int rank = 0; rank < out.world_size; ++rank) {
      out.host_of_rank.push_back(10 * Uniform(random, 0, 2));
    }
  }
  RandomLayoutOptions source;
  source.holders = Keys(out.source_rank_of);
  source.any = options.any;
  RandomLayoutOptions target;
  target.holders = Keys(out.target_rank_of);
  target.any = options.any;
  target.holes = true;
  if (!options.simple) {
    if (Uniform(random, 0, 5) == 0) target.holders.push_back(500);  // unbound
    if (Uniform(random, 0, 9) == 0) source.holders.push_back(501);
    source.holes = Uniform(random, 0, 9) == 0;
  }
  const int64_t count = Uniform(random, 1, 3);
  for (int64_t i = 0; i < count; ++i) {
    // Now and then with joint cells of more than kSplitBytes; in some of these
    // cases one holder has what all need.
    const int64_t sort = Uniform(random, 0, 49);
    const bool large = sort < 2;
    const bool to_all = sort == 1;
    std::vector<int64_t> shape = RandomShape(random, large ? 20000 : 120);
    if (large && Uniform(random, 0, 1) == 0) {
      shape = {Uniform(random, 1, 7), Uniform(random, 4000, 8000)};
    }
    if (to_all) shape = {Uniform(random, 1, 3), Uniform(random, 4100, 5000)};
    TensorCase tensor;
    tensor.source = RandomLayoutSpec(random, shape, source);
    tensor.target = RandomLayoutSpec(random, shape, target);
    if (to_all) {
      tensor.source = ReplicatedSpec(shape, {source.holders[0]});
      tensor.target = ReplicatedSpec(shape, target.holders);
    }
    tensor.source_dtype = large ? DType::kComplex128 : RandomDType(random);
    tensor.target_dtype = large || Uniform(random, 0, 1) == 0
                              ? tensor.source_dtype
                              : RandomDType(random);
    out.tensors.push_back(std::move(tensor));
  }
  return out;
}

absl::StatusOr<PlanInputs> BuildPlanCase(const PlanCase& plan_case) {
  absl::StatusOr<Binding> source = Binding::Create(
      plan_case.world_size, plan_case.source_rank_of, plan_case.host_of_rank);
  if (!source.ok()) return source.status();
  absl::StatusOr<Binding> target = Binding::Create(
      plan_case.world_size, plan_case.target_rank_of, plan_case.host_of_rank);
  if (!target.ok()) return target.status();
  PlanInputs out{{}, {}, *std::move(source), *std::move(target)};
  for (size_t i = 0; i < plan_case.tensors.size(); ++i) {
    const TensorCase& tensor = plan_case.tensors[i];
    absl::StatusOr<Layout> from = BuildLayout(tensor.source);
    if (!from.ok()) return from.status();
    absl::StatusOr<Layout> to = BuildLayout(tensor.target);
    if (!to.ok()) return to.status();
    const std::string name = absl::StrCat("t", i);
    absl::Status added = out.source.Add({name, tensor.source_dtype, *from});
    if (!added.ok()) return added;
    added = out.target.Add({name, tensor.target_dtype, *to});
    if (!added.ok()) return added;
  }
  return out;
}

ElementMap MapElements(const PlanCase& plan_case, const TensorCase& tensor) {
  const auto from = HoldersByElement(tensor.source);
  const auto to = HoldersByElement(tensor.target);
  ElementMap map;
  map.elements.resize(from.size());
  for (size_t e = 0; e < from.size(); ++e) {
    ElementMap::Element& element = map.elements[e];
    element.source_any = IsAny(from[e]);
    element.source_ranks = RanksOf(from[e], plan_case.source_rank_of);
    element.target_any = IsAny(to[e]);
    element.target_ranks = RanksOf(to[e], plan_case.target_rank_of);
    const int64_t source_item = ItemSize(tensor.source_dtype);
    const int64_t target_item = ItemSize(tensor.target_dtype);
    if (element.source_any) {
      // One reads it and sends it to the others.
      const int64_t readers = element.target_ranks.size();
      element.wire_bytes = std::max<int64_t>(0, readers - 1) * target_item;
      continue;
    }
    for (int rank : element.target_ranks) {
      const bool has = std::binary_search(element.source_ranks.begin(),
                                          element.source_ranks.end(), rank);
      if (!has) element.wire_bytes += std::min(source_item, target_item);
    }
  }
  return map;
}

}  // namespace dsd::test
