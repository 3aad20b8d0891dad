// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/plan/rank_set.h"

#include <algorithm>

namespace dsd {
namespace {

bool IsDirect(const HolderSet& holders, const Binding& binding) {
  if (!binding.OneToOne() || holders.size() == 0) return false;
  const auto [low, high] = holders.bounds();
  return binding.PlacesAll(low, high);
}

}  // namespace

RankSet::RankSet(const HolderSet& holders, const Binding& binding)
    : holders_(holders),
      binding_(binding),
      direct_(IsDirect(holders, binding)) {
  if (direct_) return;
  ranks_.reserve(holders.size());
  for (int64_t i = 0; i < holders.size(); ++i) {
    const int rank = binding.RankOf(holders.At(i));
    if (rank >= 0) ranks_.push_back(rank);
  }
  std::sort(ranks_.begin(), ranks_.end());
  ranks_.erase(std::unique(ranks_.begin(), ranks_.end()), ranks_.end());
}

int RankSet::At(int64_t position) const {
  return direct_ ? binding_.RankOf(holders_.At(position)) : ranks_[position];
}

std::optional<int64_t> RankSet::PositionOf(int rank) const {
  if (direct_) {
    const Holder holder = binding_.FirstHolderOn(rank);
    if (holder < 0) return std::nullopt;
    return holders_.PositionOf(holder);
  }
  const auto it = std::lower_bound(ranks_.begin(), ranks_.end(), rank);
  if (it == ranks_.end() || *it != rank) return std::nullopt;
  return it - ranks_.begin();
}

bool RankSet::IsKnownSubsetOf(const RankSet& other) const {
  if (size() > other.size()) return false;
  if (direct_ && other.direct_) {
    return binding_ == other.binding_ &&
           holders_.IsKnownSubsetOf(other.holders_);
  }
  for (int64_t i = 0; i < size(); ++i) {
    if (!other.Contains(At(i))) return false;
  }
  return true;
}

std::optional<HolderSet::Key> RankSet::key() const {
  if (!direct_) return std::nullopt;
  return holders_.key();
}

}  // namespace dsd
