// SPDX-License-Identifier: Apache-2.0
//
// Whether what several ranks hold alike is alike: `verify_replicas`.

#ifndef DSD_CORE_STATE_DICT_VERIFY_REPLICAS_H_
#define DSD_CORE_STATE_DICT_VERIFY_REPLICAS_H_

#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "dsd/core/state_dict/mover.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// Compares content digests of everything in `root` that more than one rank has:
// plain tensors and objects of one path, and the cells of sharded tensors that
// have several holders. Objects and tensors of one element are compared among
// the ranks that give the same `replica_ranks` (empty: all). Collective; 32
// bytes per tensor or object are sent.
// Errors, the same on every rank: `local` of any rank; FailedPrecondition that
// names what differs and the ranks.
absl::Status VerifyReplicas(absl::string_view what, absl::Status local,
                            const StateDict& root,
                            std::vector<int> replica_ranks, const Mover& mover,
                            const CallClock& clock);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_VERIFY_REPLICAS_H_
