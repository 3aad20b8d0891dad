// SPDX-License-Identifier: Apache-2.0
//
// The last step of a get: from aliases of live tensors to what the options ask
// for.

#ifndef DSD_CORE_STATE_DICT_DELIVER_H_
#define DSD_CORE_STATE_DICT_DELIVER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/state_dict/mover.h"
#include "dsd/core/state_dict/state_dict.h"
#include "dsd/core/value/value.h"

namespace dsd {

// Replaces the tensors of `root` according to `options`:
//   none:          nothing changes, no message;
//   cpu_offload:   tensors that are not in host memory by copies there, sharded
//                  as they are, no message;
//   full:          all by whole contiguous ones on their own device, with
//                  cpu_offload in host memory, on the ranks of Destinations();
//                  `root` becomes an empty dict on the others. Collective.
// Tensors that share memory in `root` are moved once and share it afterwards.
// `local` is an error this rank brings; in the collective cases it becomes
// everybody's.
absl::Status Deliver(absl::Status local, const StateDictOptions& options,
                     Mover& mover, const CallClock& clock, StateDict& root);

// The holders that receive a full get, ascending. InvalidArgument for ranks
// that are not there, or none.
absl::StatusOr<std::vector<Holder>> Destinations(
    const StateDictOptions& options, const Mover& mover);

// A tensor or object on its way out of a stream.
struct StreamedValue {
  Path path;          // in the dict that a get returns
  std::string key;    // the path joined by dots
  Value value;        // a plain contiguous tensor of its own, or an object
  Dims shape;         // of the whole tensor
  int64_t begin = 0;  // `value` has elements [begin, end), counted row-major
  int64_t end = 0;

  // False: `value` is a 1-dimensional part of a tensor that is larger than a
  // batch; its parts come one after another.
  bool is_whole = true;
};
using StreamVisitor = absl::FunctionRef<absl::Status(StreamedValue&)>;

struct StreamOptions {
  // Tensors that are held for `visit` at a time. Memory is at most this, four
  // chunks of TransferOptions, and what `visit` keeps.
  int64_t batch_bytes = int64_t{64} << 20;
};

// Calls `visit` for everything in `root`, in order, with whole tensors as a
// full get delivers them, on the ranks of Destinations(). Collective. The first
// error of `visit` on a rank ends the stream on all of them.
absl::Status Stream(absl::Status local, const StateDictOptions& options,
                    const StreamOptions& stream, Mover& mover,
                    const CallClock& clock, const StateDict& root,
                    StreamVisitor visit);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_DELIVER_H_
