// SPDX-License-Identifier: Apache-2.0
//
// State dicts: an ordered tree of tensors and plain objects with Python's
// structure, and the options of getting and setting them.

#ifndef DSD_CORE_STATE_DICT_STATE_DICT_H_
#define DSD_CORE_STATE_DICT_STATE_DICT_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
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

// The module whose part of a state is meant: by FQN ("" is the model itself) or
// as an object.
class Submodule {
 public:
  Submodule(std::string fqn) : fqn_(std::move(fqn)) {}  // NOLINT
  Submodule(const char* fqn)                            // NOLINT
      : fqn_(fqn == nullptr ? "" : fqn), is_null_(fqn == nullptr) {}
  // Only its address is used.
  template <class Module,
            std::enable_if_t<std::is_polymorphic_v<Module>>* = nullptr>
  Submodule(const Module* module)  // NOLINT
      : object_(dynamic_cast<const void*>(module)),
        is_null_(module == nullptr) {}

  const std::string& fqn() const { return fqn_; }
  // Null: named by fqn().
  const void* object() const { return object_; }
  // A null pointer was given: an error where it is used.
  bool is_null() const { return is_null_; }

 private:
  std::string fqn_;
  const void* object_ = nullptr;
  bool is_null_ = false;
};

// The name in the model for a name in a dict; "": the key is left out.
using KeyMap = std::function<std::string(absl::string_view saved_fqn)>;

// After torch.distributed.checkpoint.state_dict.StateDictOptions; what Python
// does not have comes last. What each is for: get, set or both. Options for the
// other direction are not looked at, so that one struct can serve both.
struct StateDictOptions {
  // Get: whole tensors instead of this rank's shards, owned and contiguous.
  // Set: needs no telling; the dict's values say what they are.
  bool full_state_dict = false;

  // Get: values in host memory (those that are there already stay aliases).
  // Together with full_state_dict and a communicator: only rank 0 receives
  // anything, all others get empty dicts, unless full_state_dict_ranks says
  // something else.
  bool cpu_offload = false;

  // Get: leave parameters with requires_grad = false out of the model's dict,
  // under all their names.
  bool ignore_frozen_params = false;

  // Model, get and set: only the tensors of these modules and what is below
  // them; empty: all. The optimizer part is not affected.
  std::vector<Submodule> submodules;

  // Without it the keys start at the submodule. InvalidArgument if two tensors
  // then have one key.
  bool keep_submodule_prefixes = true;

  // Set: a missing or unexpected key, or missing optimizer state, is an error.
  bool strict = true;

  // Set: the dicts of rank 0 (whole tensors) are used on all ranks; those of
  // the others are ignored and may be empty. Needs full_state_dict. The same as
  // source_rank = 0. A set whose dicts are empty on some ranks takes them from
  // the others also without it.
  bool broadcast_from_rank0 = false;

  // Get: optimizer dicts in the flat form. Set takes both forms.
  bool flatten_optimizer_state_dict = false;

  // Both: what modules that inherit FqnModifiers are asked for.
  std::string dsd_fqn_modifiers = "_fqn_modifiers";

  // Full get: the ranks that receive the dict, in any order; all others get
  // empty dicts and no bytes. nullopt: all, with cpu_offload rank 0.
  std::optional<std::vector<int>> full_state_dict_ranks;

  // Set: the dicts of this rank are used on all ranks. nullopt: of all ranks
  // that have one; they must agree on keys, types and shapes.
  std::optional<int> source_rank;

  // Full get and set, for jobs whose ranks have different keys (pipeline
  // stages, experts): the ranks on which this rank's plain (not sharded)
  // tensors are the same, this rank included. A key has to be on all of these
  // ranks, and need not be on others; a full get gives the keys of all ranks, a
  // set takes values from whatever rank has them and reports the missing keys
  // of this rank. Either all ranks give some (which may differ) or none does:
  // all keys are on all ranks.
  std::vector<int> replica_ranks;

  // Set: applied to the FQNs of both dicts before anything else. Null: none.
  // Ranks whose maps give the dicts' keys other names disagree.
  KeyMap key_map;

  // Set: live tensors of the model get new memory (of this device; of host
  // memory, if they are on the meta device) instead of being filled in place.
  // The at::Tensor objects stay the same, so ties and optimizers hold.
  bool assign = false;

  // Set.
  DTypePolicy dtype_policy = DTypePolicy::kDefault;

  // Full get and set: what several ranks hold alike (plain tensors, replicated
  // shards, objects; in a set those of the dicts, but for unexpected keys) is
  // compared before anything moves; FailedPrecondition names what differs and
  // where. Reads all of it. Without it any holder is believed.
  bool verify_replicas = false;

  // Set: values go into memory of their own, and from there into the live
  // tensors when all ranks have all of them: an error before that, such as the
  // death of a rank, changes nothing. Costs the memory once more.
  bool staged = false;

  // Get, with cpu_offload: copies of tensors on a device in page-locked memory,
  // which is several times as fast to copy to and from; it is scarce, and slow
  // to get the first time.
  bool pin_memory = false;
};

// What a set did not match. Canonical FQNs; the same on every rank, except with
// replica_ranks: there each rank reports what its own model lacks.
struct IncompatibleKeys {
  std::vector<std::string> missing_keys;
  std::vector<std::string> unexpected_keys;
  // Live tensors, buffers that are not persistent included, that are still on
  // the meta device: without values. Not an error, not counted by empty().
  std::vector<std::string> unmaterialized_keys;
  // Of a set of both dicts that is not strict: optimizer state that the dict
  // lacks, and that no live optimizer has a place for, as "<FQN>" or
  // "<FQN>.<name>".
  std::vector<std::string> missing_optimizer_state;
  std::vector<std::string> unexpected_optimizer_state;

  bool empty() const {
    return missing_keys.empty() && unexpected_keys.empty() &&
           missing_optimizer_state.empty() &&
           unexpected_optimizer_state.empty();
  }
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

// How many tensors ForEachTensor would visit.
size_t CountTensors(const StateDict& dict);

// The value without tensors: a plain tensor of one element becomes a number.
// InvalidArgument for any other tensor.
absl::StatusOr<Object> ToObject(const Value& value);

// The inverse for trees without tensors.
Value FromObject(const Object& object);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_STATE_DICT_H_
