// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/mover.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/transfer/agree_on_catalogs.h"

namespace dsd {
namespace {

// A session alternates between a few operations: get, set, and a set from each
// of some kinds of dicts.
constexpr size_t kPlansKept = 8;

}  // namespace

Mover::Mover(Communicator* comm)
    : comm_(comm),
      self_(rank()),
      replicas_(DeviceMesh::Iota({world_size()})),
      binding_(BindRanks(comm)) {}

void Mover::set_self(Holder self) {
  if (comm_ != nullptr || self == self_) return;
  self_ = self;
  replicas_ = DeviceMesh::Iota({1}, self);
  binding_ = *Binding::Create(1, {{self, 0}});
  plans_.clear();
}

absl::StatusOr<const Plan*> Mover::PlanFor(const Catalog& source,
                                           const Digest& source_digest,
                                           const Catalog& target,
                                           const Digest& target_digest) {
  const auto found =
      std::find_if(plans_.begin(), plans_.end(), [&](const CachedPlan& cached) {
        return cached.source == source_digest && cached.target == target_digest;
      });
  if (found != plans_.end()) {
    std::rotate(plans_.begin(), found, found + 1);
    return &plans_.front().plan;
  }
  DSD_ASSIGN_OR_RETURN(
      Plan plan, PlanForRank(rank(), source, target,
                             MatchByName(source, target), binding_, binding_));
  ++plans_made_;
  plans_.push_front({source_digest, target_digest, std::move(plan)});
  if (plans_.size() > kPlansKept) plans_.pop_back();
  return &plans_.front().plan;
}

Digest Mover::Prepared::Fingerprint(const Digest& parameters) const {
  return DigestBuilder()
      .Add(parameters)
      .Add(source_digest)
      .Add(target_digest)
      .Finish();
}

Mover::Prepared Mover::Prepare(TensorEndpoint& source, TensorEndpoint& target,
                               const absl::Status& local) {
  Prepared prepared{&source, &target, source.catalog().Fingerprint(),
                    target.catalog().Fingerprint(), local};
  if (local.ok()) {
    prepared.status = PlanFor(source.catalog(), prepared.source_digest,
                              target.catalog(), prepared.target_digest)
                          .status();
  }
  return prepared;
}

absl::Status Mover::AgreeOn(absl::string_view what, const Prepared& prepared,
                            const Digest& parameters,
                            absl::FunctionRef<std::string()> describe,
                            const CallClock& clock) {
  return AgreeOnCatalogs(
      comm_, what, {&prepared.source->catalog(), &prepared.target->catalog()},
      prepared.Fingerprint(parameters), prepared.status, describe,
      clock.Left());
}

absl::Status Mover::MoveAgreed(const Prepared& prepared,
                               const CallClock& clock) {
  DSD_ASSIGN_OR_RETURN(
      const Plan* const plan,
      PlanFor(prepared.source->catalog(), prepared.source_digest,
              prepared.target->catalog(), prepared.target_digest));
  TransferOptions options;
  options.call = clock.Left();
  DSD_ASSIGN_OR_RETURN(
      last_transfer_,
      Transfer(*plan, *prepared.source, *prepared.target, comm_, options));
  return absl::OkStatus();
}

absl::Status Mover::Move(absl::string_view what, TensorEndpoint& source,
                         TensorEndpoint& target, const Digest& parameters,
                         absl::FunctionRef<std::string()> describe,
                         const absl::Status& local, const CallClock& clock,
                         bool* changed) {
  const Prepared prepared = Prepare(source, target, local);
  DSD_RETURN_IF_ERROR(AgreeOn(what, prepared, parameters, describe, clock));
  *changed = true;
  return MoveAgreed(prepared, clock);
}

void Mover::ForgetPlan() {
  if (!plans_.empty()) plans_.pop_front();
}

absl::Status Mover::MoveLocally(TensorEndpoint& source, TensorEndpoint& target,
                                const CallClock& clock) {
  DSD_ASSIGN_OR_RETURN(
      const Plan plan,
      PlanForRank(rank(), source.catalog(), target.catalog(),
                  MatchByName(source.catalog(), target.catalog()), binding_,
                  binding_));
  TransferOptions options;
  options.call = clock.Left();
  DSD_ASSIGN_OR_RETURN(last_transfer_, Transfer(plan, source, target,
                                                /*comm=*/nullptr, options));
  return absl::OkStatus();
}

}  // namespace dsd
