// SPDX-License-Identifier: Apache-2.0
//
// A state dict that only some ranks have, made known to all: objects and
// tensors of one element by value, all other tensors by shape and type.

#ifndef DSD_CORE_STATE_DICT_OUTLINE_H_
#define DSD_CORE_STATE_DICT_OUTLINE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// What other ranks have to know of `value`.
// Errors: InvalidArgument for a distributed or undefined tensor, naming the
// path; Unimplemented for its element type.
absl::StatusOr<std::string> EncodeOutline(const Value& value);

// The inverse. Tensors that were not sent by value become distributed ones,
// whole on each of `holders` and absent here. Errors: DataLoss for bytes that
// EncodeOutline did not make.
absl::StatusOr<Value> DecodeOutline(absl::string_view bytes,
                                    const DeviceMesh& holders);

// The `value` of the ranks `holders` (ascending, at least one) on every rank:
// on the holders with their own tensors, on the others as from DecodeOutline;
// objects and tensors of one element are those of the first holder. Collective,
// one message. The value of other ranks is not looked at. Errors: of
// EncodeOutline, on all ranks; of comm; FailedPrecondition, on that holder
// only, if its value has other paths, types or shapes than that of the first
// one.
absl::StatusOr<Value> ShareOutline(const Value& value,
                                   const std::vector<int>& holders,
                                   Communicator& comm, const CallOptions& call);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_OUTLINE_H_
