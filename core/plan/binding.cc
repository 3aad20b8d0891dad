// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/plan/binding.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace dsd {

void Binding::Seal(Impl& impl) {
  DigestBuilder digest;
  digest.Add(int64_t{impl.world_size}).Add(int64_t{impl.identity});
  for (const std::vector<Holder>& holders : impl.holders_on) {
    digest.Add(absl::MakeConstSpan(holders));
  }
  for (int host : impl.host_of_rank) digest.Add(int64_t{host});
  impl.digest = digest.Finish();
}

Binding::Binding(int world_size) {
  auto impl = std::make_shared<Impl>();
  impl->world_size = world_size;
  impl->high = world_size - 1;
  Seal(*impl);
  impl_ = std::move(impl);
}

Binding::Binding(absl::Span<const int> host_of_rank)
    : Binding(static_cast<int>(host_of_rank.size())) {
  auto impl = std::make_shared<Impl>(*impl_);
  SetHosts(*impl, host_of_rank);
  Seal(*impl);
  impl_ = std::move(impl);
}

// Hosts are numbered by first appearance; one host is the same as none named.
void Binding::SetHosts(Impl& impl, absl::Span<const int> host_of_rank) {
  absl::flat_hash_map<int, int> number;
  for (const int host : host_of_rank) {
    impl.host_of_rank.push_back(
        number.try_emplace(host, static_cast<int>(number.size()))
            .first->second);
  }
  if (number.size() <= 1) {
    impl.host_of_rank.clear();
    return;
  }
  impl.ranks_on_host.resize(number.size());
  for (size_t rank = 0; rank < impl.host_of_rank.size(); ++rank) {
    impl.ranks_on_host[impl.host_of_rank[rank]].push_back(
        static_cast<int>(rank));
  }
}

absl::StatusOr<Binding> Binding::Create(
    int world_size, const absl::flat_hash_map<Holder, int>& rank_of,
    const std::vector<int>& host_of_rank) {
  if (world_size < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("binding: world size ", world_size, ", expected >= 1"));
  }
  if (!host_of_rank.empty() &&
      host_of_rank.size() != static_cast<size_t>(world_size)) {
    return absl::InvalidArgumentError(
        absl::StrCat("binding: hosts of ", host_of_rank.size(),
                     " ranks given, expected ", world_size));
  }
  auto impl = std::make_shared<Impl>();
  impl->world_size = world_size;
  impl->holders_on.resize(world_size);
  std::vector<Holder> holders;
  for (const auto& [holder, rank] : rank_of) {
    if (holder < 0 || rank < 0 || rank >= world_size) {
      return absl::InvalidArgumentError(absl::StrCat(
          "binding: holder ", holder, " on rank ", rank,
          ", expected a holder >= 0 on a rank in [0, ", world_size, ")"));
    }
    impl->holders_on[rank].push_back(holder);
    holders.push_back(holder);
  }
  impl->identity = rank_of.size() == static_cast<size_t>(world_size);
  for (int rank = 0; rank < world_size; ++rank) {
    std::vector<Holder>& here = impl->holders_on[rank];
    std::sort(here.begin(), here.end());
    impl->one_to_one &= here.size() <= 1;
    impl->identity &= here.size() == 1 && here[0] == rank;
  }
  if (impl->identity) {
    impl->holders_on.clear();
    impl->high = world_size - 1;
  } else {
    impl->rank_of = rank_of;
    std::sort(holders.begin(), holders.end());
    if (!holders.empty()) {
      impl->low = impl->high = holders.front();
      for (size_t i = 1; i < holders.size(); ++i) {
        if (holders[i] != impl->high + 1) break;
        ++impl->high;
      }
    }
  }
  SetHosts(*impl, host_of_rank);
  Seal(*impl);
  return Binding(std::shared_ptr<const Impl>(std::move(impl)));
}

int Binding::RankOf(Holder holder) const {
  if (impl_->identity) {
    return holder >= 0 && holder < impl_->world_size ? static_cast<int>(holder)
                                                     : -1;
  }
  const auto it = impl_->rank_of.find(holder);
  return it == impl_->rank_of.end() ? -1 : it->second;
}

std::vector<Holder> Binding::HoldersOn(int rank) const {
  if (impl_->identity) return {rank};
  return impl_->holders_on[rank];
}

Holder Binding::FirstHolderOn(int rank) const {
  if (impl_->identity) return rank;
  return impl_->holders_on[rank].empty() ? -1 : impl_->holders_on[rank][0];
}

absl::Span<const int> Binding::RanksOnHostOf(int rank) const {
  return impl_->ranks_on_host[impl_->host_of_rank[rank]];
}

bool Binding::SameHosts(const Binding& other) const {
  return impl_->world_size == other.impl_->world_size &&
         impl_->host_of_rank == other.impl_->host_of_rank;
}

void Binding::AddTo(DigestBuilder& digest) const { digest.Add(impl_->digest); }

}  // namespace dsd
