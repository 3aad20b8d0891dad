// SPDX-License-Identifier: Apache-2.0
//
// Objects of a job beside model and optimizers: learning rate schedules, the
// position in the data, random generators.
//
//   const std::vector<dsd::StatefulEntry> extras = {
//       {"scheduler", &scheduler},
//       {"data", &loader, dsd::StatefulEntry::kPerRank}};
//   DSD_RETURN_IF_ERROR(dsd::GetStateful(extras, comm, state));
//   DSD_RETURN_IF_ERROR(dsd::SaveCheckpoint(directory, state, comm));
//   ...
//   DSD_RETURN_IF_ERROR(dsd::GetStateful(extras, comm, state));  // the keys
//   DSD_RETURN_IF_ERROR(dsd::LoadCheckpoint(directory, &state, comm));
//   DSD_RETURN_IF_ERROR(dsd::SetStateful(extras, state, comm));

#ifndef DSD_CORE_STATE_DICT_STATEFUL_H_
#define DSD_CORE_STATE_DICT_STATEFUL_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// After torch.distributed.checkpoint.stateful.Stateful.
class Stateful {
 public:
  virtual ~Stateful() = default;

  // A dict of anything. Tensors in it are plain.
  virtual absl::StatusOr<StateDict> GetState() = 0;

  // `state`: as from GetState of an object of this class; its tensors are plain
  // and may be kept.
  virtual absl::Status SetState(const StateDict& state) = 0;
};

// An object and its key in a job's dict.
struct StatefulEntry {
  enum Scope : uint8_t {
    kJob,      // the same on every rank; key "<key>"
    kPerRank,  // each rank has its own; keys "<key>@rank<r>"
  };

  std::string key;
  Stateful* object;  // borrowed
  Scope scope = kJob;
};

// Puts the states into `root`. All ranks get all keys, so that the dict can be
// saved: of another rank's state objects and tensors of one element are there,
// larger tensors stay with their rank. Collective. `comm`: null for a world of
// one. Errors, the same on all ranks, with `root` as it was: of GetState,
// naming the key; AlreadyExists if a key is in `root` or twice in `entries`;
// FailedPrecondition if ranks have other entries.
absl::Status GetStateful(absl::Span<const StatefulEntry> entries,
                         Communicator* comm, StateDict& root,
                         const CallOptions& call = {});

// Gives the states in `root` to the objects, after all ranks have found all
// theirs: otherwise NotFound lists what is missing and on which rank, and
// nothing has been set. A dict saved by fewer ranks lacks the states of the
// others: if not `strict`, objects without a state are left alone. Other keys
// are not looked at. Collective; all errors are everybody's. Those of SetState
// name the key; some objects have been set then.
absl::Status SetStateful(absl::Span<const StatefulEntry> entries,
                         const StateDict& root, Communicator* comm,
                         bool strict = true, const CallOptions& call = {});

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_STATEFUL_H_
