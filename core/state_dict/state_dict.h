// SPDX-License-Identifier: Apache-2.0
//
// State dicts: an ordered tree of tensors and plain objects with Python's
// structure, and the options of getting and setting them.

#ifndef DSD_CORE_STATE_DICT_STATE_DICT_H_
#define DSD_CORE_STATE_DICT_STATE_DICT_H_

#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "dsd/core/tensor/tensor_value.h"
#include "dsd/core/value/value.h"

namespace dsd {

using Value = BasicValue<TensorValue>;

// A model: FQN -> tensor. Optimizers: {"state": {FQN: {name: value}},
// "param_groups": [{name: value, ..., "params": [FQN, ...]}, ...]}, or the flat
// form with keys "state.<FQN>.<name>" and "param_groups.<FQN>.<name>".
using StateDict = BasicDict<TensorValue>;

// A dict without tensors: the hyperparameters of a group.
using ObjectDict = Object::Dict;

// After torch.distributed.checkpoint.state_dict.StateDictOptions.
struct StateDictOptions {
  // Get: whole tensors instead of this rank's shards, owned and contiguous.
  // Set: needs no telling; the dict's values say what they are.
  bool full_state_dict = false;

  // Get: values in host memory (those that are there already stay aliases).
  // Together with full_state_dict and a communicator: only rank 0 receives
  // anything, all others get empty dicts.
  bool cpu_offload = false;

  // Get: leave parameters with requires_grad = false out of the model's dict.
  bool ignore_frozen_params = false;

  // Set: a missing or unexpected key, or missing optimizer state, is an error.
  bool strict = true;

  // Set: the dicts of rank 0 (whole tensors) are used on all ranks; those of
  // the others are ignored and may be empty. Needs full_state_dict.
  bool broadcast_from_rank0 = false;

  // Get: optimizer dicts in the flat form. Set takes both forms.
  bool flatten_optimizer_state_dict = false;
};

// What a set did not match. Canonical FQNs; the same on every rank.
struct IncompatibleKeys {
  std::vector<std::string> missing_keys;
  std::vector<std::string> unexpected_keys;

  bool empty() const { return missing_keys.empty() && unexpected_keys.empty(); }
};

struct ModelAndOptimizerStateDict {
  StateDict model;
  StateDict optimizer;
};

// Calls `visit` for every tensor below `value`, through dicts, lists and
// tuples, in order, with the path joined by dots.
void ForEachTensor(Value& value, const std::string& name,
                   absl::FunctionRef<void(const std::string&, TensorValue&)>);
void ForEachTensor(StateDict& dict, const std::string& name,
                   absl::FunctionRef<void(const std::string&, TensorValue&)>);

// The value without tensors: a plain tensor of one element becomes a number.
// InvalidArgument for any other tensor.
absl::StatusOr<Object> ToObject(const Value& value);

// The inverse for trees without tensors.
Value FromObject(const Object& object);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_STATE_DICT_H_
