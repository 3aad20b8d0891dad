// SPDX-License-Identifier: Apache-2.0
//
// Other names for the keys of a dict on its way into a model.

#ifndef DSD_CORE_STATE_DICT_KEY_MAP_H_
#define DSD_CORE_STATE_DICT_KEY_MAP_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "dsd/core/fqn/fqn_table.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// The map that replaces the first of each pair by the second and leaves other
// names alone.
KeyMap RenameKeys(std::vector<std::pair<std::string, std::string>> renames);

// The map that leaves out the segments of PyTorch's wrappers ("module",
// "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"), for dicts
// that state_dict() of a wrapped model made. A model that has a child of such a
// name of its own needs another map.
KeyMap StripWrapperSegments();

// A copy of a model's dict with other keys, in the same order; the tensors are
// shared. InvalidArgument if two keys get one name (all three named).
absl::StatusOr<StateDict> MapModelKeys(const StateDict& dict,
                                       const KeyMap& map);

// The same for the FQNs in an optimizer's dict, nested or flat. In flat keys
// the FQN is the longest beginning whose new name is in `table`.
absl::StatusOr<StateDict> MapOptimizerKeys(const StateDict& dict,
                                           const KeyMap& map,
                                           const FqnTable& table);

// What the map makes of the FQNs in both dicts (null: none), as texts
// "\"old\" to \"new\"", ascending: of names that it changes and for whose new
// name `counts` holds. Equal for two maps that do the same to these dicts.
std::vector<std::string> RenamesOf(
    const StateDict* model, const StateDict* optimizer, const KeyMap& map,
    absl::FunctionRef<bool(const std::string& name, bool of_optimizer)> counts);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_KEY_MAP_H_
