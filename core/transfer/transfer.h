// SPDX-License-Identifier: Apache-2.0
//
// The executor: carries out one rank's plan in bounded memory, over one
// communicator.

#ifndef DSD_CORE_TRANSFER_TRANSFER_H_
#define DSD_CORE_TRANSFER_TRANSFER_H_

#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/plan/binding.h"
#include "dsd/core/plan/plan.h"
#include "dsd/core/transfer/endpoint.h"

namespace dsd {

// What the executor did, counted where the bytes moved.
struct TransferStats {
  int64_t bytes_sent = 0;  // payload, without headers
  int64_t bytes_received = 0;
  int64_t bytes_local = 0;
  int64_t messages_sent = 0;
  int64_t bytes_staged_peak = 0;  // staging memory, that of devices too
};

struct TransferOptions {
  // Staging memory is at most 2 * 2 * chunk_bytes, whatever is transferred, and
  // one more for local copies that convert; with tensors on a device twice the
  // former and one more, the half of it there.
  // Must be equal on all ranks.
  int64_t chunk_bytes = int64_t{4} << 20;
  CallOptions call;
};

// Holder r is rank r of `comm`, on its host; null: a world of one.
Binding BindRanks(const Communicator* comm);

// Carries out `plan` of this rank. Collective: all ranks of `comm` must call it
// with plans of the same catalogs, pairs and bindings; `comm` may be null if
// the plan has no other rank. Peer by peer in rotated order: one byte stream
// per ordered pair of ranks, in plan order, cut into chunks, of which four each
// way are under way at once, and then the same for what is relayed; local copies
// meanwhile. Small boxes share chunks; 256
// KiB and more of one box do not, and are sent from and received into its
// memory where that has them in order. Boxes of a source kAnyHolder are read
// once, into the target, and sent on from there.
//
// Work on a device follows what the caller has enqueued there and precedes what
// it enqueues after the call; host memory is complete on return. Messages are
// in device memory where the communicator moves it and both ranks have most of
// what they exchange there, else in page-locked host memory.
//
// Errors: of comm and of the endpoints, annotated with rank and FQN. After an
// error targets are unspecified, and an error of an endpoint aborts `comm`, so
// that no rank waits for this one.
absl::StatusOr<TransferStats> Transfer(const Plan& plan, Endpoint& source,
                                       Endpoint& target, Communicator* comm,
                                       const TransferOptions& options = {});

// Agreement: compares `fingerprint` on all ranks before a byte moves.
// Collective. Every rank gets the same verdict: OK, or FailedPrecondition that
// lists the ranks that differ and, from `describe` (called only then, at most
// 64 KiB are used), in what. An error of `local`, on any rank, is everybody's
// error: pass what was found wrong locally instead of returning early. If
// `disagree` is not null it says whether the fingerprints differ, no rank has
// an error, and all ranks passed it: then all can go on to find out in what.
absl::Status Agree(Communicator* comm, absl::string_view what,
                   const Digest& fingerprint, const absl::Status& local,
                   absl::FunctionRef<std::string()> describe,
                   const CallOptions& options = {}, bool* disagree = nullptr);

// Plan and transfer of all tensors that have equal names in both, after
// agreement on both catalogs: the one operation everything is made of.
// Collective. Bound by BindRanks.
absl::StatusOr<TransferStats> Redistribute(Endpoint& source, Endpoint& target,
                                           Communicator* comm,
                                           const TransferOptions& options = {});

}  // namespace dsd

#endif  // DSD_CORE_TRANSFER_TRANSFER_H_
