// SPDX-License-Identifier: Apache-2.0
//
// A state dict as files see it: tensors under flat keys, and all other values.

#ifndef DSD_CORE_STATE_DICT_FLAT_STATE_H_
#define DSD_CORE_STATE_DICT_FLAT_STATE_H_

#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/state_dict/state_dict.h"
#include "dsd/core/tensor/tensor_endpoint.h"
#include "dsd/core/value/value.h"

namespace dsd {

// Keys by the grammar of dsd/core/value/flatten.h. The tensors share the memory
// of the dict's.
struct FlatState {
  struct ObjectEntry {
    Path path;
    Object value;
  };

  TensorEndpoint tensors;
  std::vector<Path> tensor_paths;  // by index in tensors.catalog()
  std::vector<ObjectEntry> objects;
};

// `comm`: the ranks that have the shards, null for a world of one. Sends
// nothing. Errors: AlreadyExists if two values get one key; InvalidArgument for
// a tensor inside a tuple (files have no place for it) or an undefined one;
// FailedPrecondition for a shard of another rank. Each names the key.
absl::StatusOr<FlatState> Flatten(const StateDict& dict, Communicator* comm);

// Puts `objects` into `dict` at their paths. InvalidArgument if something of
// another kind is in the way; the dict is then partly changed.
absl::Status PutObjects(const std::vector<FlatState::ObjectEntry>& objects,
                        StateDict& dict);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_FLAT_STATE_H_
