// SPDX-License-Identifier: Apache-2.0
//
// A set of holders seen as ranks. Only core/plan includes this.

#ifndef DSD_CORE_PLAN_RANK_SET_H_
#define DSD_CORE_PLAN_RANK_SET_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "dsd/core/layout/layout.h"
#include "dsd/core/plan/binding.h"

namespace dsd {

// The distinct ranks that `holders` are on, in a fixed order. Costs nothing per
// holder where the binding puts each on a rank of its own; otherwise they are
// written out. Both arguments must outlive this.
class RankSet {
 public:
  RankSet(const HolderSet& holders, const Binding& binding);

  bool empty() const { return size() == 0; }
  int64_t size() const {
    return direct_ ? holders_.size() : static_cast<int64_t>(ranks_.size());
  }
  int At(int64_t position) const;
  std::optional<int64_t> PositionOf(int rank) const;
  bool Contains(int rank) const { return PositionOf(rank).has_value(); }

  // True only if every rank is in `other`; false where only looking at very
  // many would show it.
  bool IsKnownSubsetOf(const RankSet& other) const;

  // Sets of one binding with equal keys are equal; nullopt if written out.
  std::optional<HolderSet::Key> key() const;

 private:
  const HolderSet& holders_;
  const Binding& binding_;
  const bool direct_;       // position i is the rank of holders_.At(i)
  std::vector<int> ranks_;  // ascending; if not direct_
};

}  // namespace dsd

#endif  // DSD_CORE_PLAN_RANK_SET_H_
