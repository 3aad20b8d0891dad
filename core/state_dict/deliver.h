// SPDX-License-Identifier: Apache-2.0
//
// The last step of a get: from aliases of live tensors to what the options ask
// for.

#ifndef DSD_CORE_STATE_DICT_DELIVER_H_
#define DSD_CORE_STATE_DICT_DELIVER_H_

#include "absl/status/status.h"
#include "dsd/core/state_dict/mover.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// Replaces the tensors of `root` according to `options`:
//   none:          nothing changes, no message;
//   cpu_offload:   tensors that are not in host memory by copies there, sharded
//                  as they are, no message;
//   full:          all by whole contiguous ones on their own device.
//   Collective. full, offload: the same in host memory, on rank 0 only: `root`
//   becomes an
//                  empty dict on the others. Collective.
// Tensors that share memory in `root` are moved once and share it afterwards.
// `local` is an error this rank brings; in the collective cases it becomes
// everybody's.
absl::Status Deliver(absl::Status local, const StateDictOptions& options,
                     Mover& mover, const CallClock& clock, StateDict& root);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_DELIVER_H_
