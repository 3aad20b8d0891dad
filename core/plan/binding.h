// SPDX-License-Identifier: Apache-2.0
//
// Where the holders of a catalog's layouts are: on which ranks of a
// communicator, and on which hosts.

#ifndef DSD_CORE_PLAN_BINDING_H_
#define DSD_CORE_PLAN_BINDING_H_

#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/layout/mesh.h"

namespace dsd {

// Places holders on the ranks of the communicator that executes the plan.
// Immutable and cheap to copy. Thread-safe.
class Binding {
 public:
  // Holder r is rank r, for r < world_size; all on one host.
  explicit Binding(int world_size);

  // Holder r is rank r; host_of_rank as in Create, but one per rank.
  explicit Binding(absl::Span<const int> host_of_rank);

  // rank_of[h] is the rank of holder h; host_of_rank[r] names the host of rank
  // r (equal numbers, equal host; empty: all on one). Several holders may be on
  // one rank. InvalidArgument for world_size < 1, a rank outside [0,
  // world_size), a negative holder, or a list of hosts that is not empty and
  // has not world_size entries.
  static absl::StatusOr<Binding> Create(
      int world_size, const absl::flat_hash_map<Holder, int>& rank_of,
      const std::vector<int>& host_of_rank = {});

  int world_size() const { return impl_->world_size; }

  // -1 if the holder is on no rank; kAnyHolder is on none.
  int RankOf(Holder holder) const;

  // All holders on `rank`, ascending.
  std::vector<Holder> HoldersOn(int rank) const;
  // The lowest of them; -1 if there is none.
  Holder FirstHolderOn(int rank) const;

  // True only if every holder in [low, high] is on a rank. O(1): false where
  // only looking at each would show it.
  bool PlacesAll(Holder low, Holder high) const {
    return low >= impl_->low && high <= impl_->high;
  }
  // True if no rank has two holders.
  bool OneToOne() const { return impl_->one_to_one; }

  bool SingleHost() const { return impl_->host_of_rank.empty(); }
  int HostOf(int rank) const {
    return SingleHost() ? 0 : impl_->host_of_rank[rank];
  }
  // The ranks on the host of `rank`, ascending. Not to be called if
  // SingleHost().
  absl::Span<const int> RanksOnHostOf(int rank) const;
  // The worlds have the same size, and the same ranks share a host.
  bool SameHosts(const Binding& other) const;

  void AddTo(DigestBuilder& digest) const;
  friend bool operator==(const Binding& a, const Binding& b) {
    return a.impl_ == b.impl_ || a.impl_->digest == b.impl_->digest;
  }

 private:
  struct Impl {
    int world_size = 1;
    bool identity = true;
    bool one_to_one = true;
    // All holders in [low, high] are on ranks; more only if the numbers of the
    // bound holders have gaps.
    Holder low = 0;
    Holder high = -1;
    absl::flat_hash_map<Holder, int> rank_of;     // empty if identity
    std::vector<std::vector<Holder>> holders_on;  // by rank; empty if identity
    std::vector<int> host_of_rank;  // numbered by first appearance
    std::vector<std::vector<int>> ranks_on_host;
    Digest digest;
  };

  explicit Binding(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  static void SetHosts(Impl& impl, absl::Span<const int> host_of_rank);
  static void Seal(Impl& impl);

  std::shared_ptr<const Impl> impl_;
};

}  // namespace dsd

#endif  // DSD_CORE_PLAN_BINDING_H_
