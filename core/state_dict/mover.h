// SPDX-License-Identifier: Apache-2.0
//
// The one way in which a session's tensors move: agreement, plan, transfer.

#ifndef DSD_CORE_STATE_DICT_MOVER_H_
#define DSD_CORE_STATE_DICT_MOVER_H_

#include <cstdint>
#include <deque>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/call_clock.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/plan/plan.h"
#include "dsd/core/tensor/tensor_endpoint.h"
#include "dsd/core/transfer/transfer.h"

namespace dsd {

// One rank's place among the ranks, and the plans it has made.
// Thread-compatible.
class Mover {
 public:
  // `comm` may be null: a world of one. It is borrowed.
  explicit Mover(Communicator* comm);

  Communicator* comm() const { return comm_; }
  // Another communicator of the same rank among as many; plans stay good.
  void set_comm(Communicator* comm) { comm_ = comm; }
  int rank() const { return comm_ == nullptr ? 0 : comm_->rank(); }
  int world_size() const { return comm_ == nullptr ? 1 : comm_->size(); }
  Env* env() const { return comm_ == nullptr ? Env::Real() : comm_->env(); }

  // This rank's name in layouts. Without a communicator it is whatever the live
  // shards say: then each of them is moved locally or not at all.
  Holder self() const { return self_; }
  void set_self(Holder self);

  // All ranks that move together, as holders.
  const DeviceMesh& replicas() const { return replicas_; }

  TensorEndpoint NewEndpoint() const { return {replicas_, self_}; }

  // Two sides of a movement that may come about.
  struct Prepared {
    TensorEndpoint* source;
    TensorEndpoint* target;
    Digest source_digest;
    Digest target_digest;
    absl::Status status;  // whether this rank can do it

    // What all ranks must agree on.
    Digest Fingerprint(const Digest& parameters) const;
  };

  // Makes and keeps the plan that moves all tensors of equal names. Sends
  // nothing. Status: `local` if it is an error, else of PlanForRank. The
  // endpoints are borrowed and do not change any more.
  Prepared Prepare(TensorEndpoint& source, TensorEndpoint& target,
                   const absl::Status& local);

  // Agrees on `prepared` and on `parameters`, which `describe` puts into words.
  // Collective. Errors: of prepared.status on any rank, and of AgreeOnCatalogs.
  absl::Status AgreeOn(absl::string_view what, const Prepared& prepared,
                       const Digest& parameters,
                       absl::FunctionRef<std::string()> describe,
                       const CallClock& clock);

  // Moves. Collective; all ranks have agreed on Fingerprint(). Errors: of
  // PlanForRank and Transfer.
  absl::Status MoveAgreed(const Prepared& prepared, const CallClock& clock);

  // Prepare and MoveAgreed, after all ranks agree on both catalogs and on
  // `parameters` and none brings an error in `local`. Errors: of AgreeOn also.
  // *changed is set to true when the agreement is done and target memory may
  // have been written.
  absl::Status Move(absl::string_view what, TensorEndpoint& source,
                    TensorEndpoint& target, const Digest& parameters,
                    absl::FunctionRef<std::string()> describe,
                    const absl::Status& local, const CallClock& clock,
                    bool* changed);

  // Drops the newest plan: it will not be used again.
  void ForgetPlan();

  // The same between memory of this rank only; no message.
  absl::Status MoveLocally(TensorEndpoint& source, TensorEndpoint& target,
                           const CallClock& clock);

  const TransferStats& last_transfer() const { return last_transfer_; }
  // Of a movement that needed no plan.
  void set_last_transfer(const TransferStats& stats) { last_transfer_ = stats; }
  int64_t plans_made() const { return plans_made_; }

 private:
  struct CachedPlan {
    Digest source;
    Digest target;
    Plan plan;
  };

  // The plan for the pair; valid until the next call.
  absl::StatusOr<const Plan*> PlanFor(const Catalog& source,
                                      const Digest& source_digest,
                                      const Catalog& target,
                                      const Digest& target_digest);

  Communicator* comm_;
  Holder self_;
  DeviceMesh replicas_;
  Binding binding_;
  std::deque<CachedPlan> plans_;  // newest first
  int64_t plans_made_ = 0;
  TransferStats last_transfer_;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_MOVER_H_
