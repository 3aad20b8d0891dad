// SPDX-License-Identifier: Apache-2.0
//
// Ranks that have different keys (pipeline stages, experts) seen as one job:
// the union of what each of them declares.

#ifndef DSD_CORE_STATE_DICT_JOINT_H_
#define DSD_CORE_STATE_DICT_JOINT_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/state_dict/mover.h"
#include "dsd/core/state_dict/optimizer_state.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// The union of all ranks' `mine`: the keys of rank 0, then those that only rank
// 1 has, and so on; lists "param_groups" are joined, other values are those of
// the first rank that has them. Tensors become distributed ones with equal
// layouts on all ranks: plain ones are whole on each of `replica_ranks` of the
// rank that declares them (null: on whatever ranks declare them); those of one
// element are sent by value. This rank's memory is used where it has the
// tensor. Counts and hyperparameters are wherever their parameter is.
//
// Collective. Costs messages and time in the number of all ranks' tensors.
// Errors, the same on every rank: `local` of any rank; InvalidArgument for
// replica_ranks without the rank itself or with one that is not there;
// FailedPrecondition that lists every key that ranks declare differently, or
// that a rank lacks although its layout or replica_ranks give it a part.
absl::StatusOr<StateDict> JoinDicts(absl::string_view what,
                                    const absl::Status& local,
                                    const StateDict& mine,
                                    const std::vector<int>* replica_ranks,
                                    const Mover& mover, const CallClock& clock);

// The dicts of ranks that have different keys (pipeline stages, experts) as one
// dict of equal keys on all ranks, for SaveCheckpoint and LoadCheckpoint: as
// JoinDicts, and what lies in this rank's memory still does. A tensor that is
// plain is whole on each of `replica_ranks` of this rank; empty: on whatever
// ranks have the key. Collective. `comm` null: `mine`. Errors: as JoinDicts.
absl::StatusOr<StateDict> JoinStateDicts(
    const StateDict& mine, Communicator* comm,
    const std::vector<int>& replica_ranks = {}, const CallOptions& call = {});

// The union of all ranks' pairs, for endpoints that all ranks build alike.
// Sources are tensors below `sources`, a dict made by JoinDicts. Collective.
// Errors: as JoinDicts.
absl::StatusOr<std::vector<TensorPair>> JoinPairs(
    absl::string_view what, const absl::Status& local,
    const std::vector<TensorPair>& mine, StateDict& sources,
    const std::vector<int>* replica_ranks, const Mover& mover,
    const CallClock& clock);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_JOINT_H_
