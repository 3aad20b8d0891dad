// SPDX-License-Identifier: Apache-2.0
//
// A state dict that only rank 0 has, made known to all ranks: objects and
// tensors of one element by value, all other tensors by shape and type.

#ifndef DSD_CORE_STATE_DICT_BROADCAST_H_
#define DSD_CORE_STATE_DICT_BROADCAST_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// What other ranks have to know of `value`.
// Errors: InvalidArgument for a distributed or undefined tensor, naming the
// path; Unimplemented for its element type.
absl::StatusOr<std::string> EncodeOutline(const Value& value);

// The inverse. Tensors that were not sent by value become distributed ones,
// whole on holder 0 and absent here. Errors: DataLoss for bytes that
// EncodeOutline did not make.
absl::StatusOr<Value> DecodeOutline(absl::string_view bytes);

// Rank 0's `value` on every rank: on rank 0 its own tensors, on the others as
// from DecodeOutline. Collective, one message. `value` of the other ranks is
// not looked at. Errors: of EncodeOutline, on all ranks; of comm.
absl::StatusOr<Value> ShareOutline(const Value& value, Communicator& comm,
                                   const CallOptions& call);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_BROADCAST_H_
