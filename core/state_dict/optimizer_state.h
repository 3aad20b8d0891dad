// SPDX-License-Identifier: Apache-2.0
//
// Optimizer state as a dict keyed by FQN, nested or flat, and back.

#ifndef DSD_CORE_STATE_DICT_OPTIMIZER_STATE_H_
#define DSD_CORE_STATE_DICT_OPTIMIZER_STATE_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/state_dict/mismatch_report.h"
#include "dsd/core/state_dict/sources.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// A tensor of a dict and the live one that it is to fill.
struct TensorPair {
  std::string name;
  TensorValue source;
  TensorValue target;
};

// The nested dict of all `optimizers`: aliases of live state, inert state in
// tensors of its own for trainable parameters that have none. Changes nothing.
// Errors: NotFound if an optimizer has a tensor that is not in the model.
absl::StatusOr<StateDict> GetOptimizerState(
    const LiveModel& model, absl::Span<OptimizerSource* const> optimizers);

// The flat form of a nested dict.
// Errors: InvalidArgument for state that the flat form cannot express (lists,
// text), naming the key.
absl::StatusOr<StateDict> FlattenOptimizerState(const StateDict& nested);

// A dict on its way into optimizers: parse and check, allocate, fill (by the
// caller), commit. Borrows everything. Thread-compatible.
class OptimizerLoad {
 public:
  OptimizerLoad(const LiveModel& model,
                absl::Span<OptimizerSource* const> optimizers, bool strict)
      : model_(model), optimizers_(optimizers), strict_(strict) {}

  // Reads the dict of either form and adds what does not fit to `report`.
  // Errors: InvalidArgument if it is not an optimizer dict.
  absl::Status Parse(const StateDict& dict, MismatchReport& report);

  // Makes the tensors that will be the new state and adds them to `pairs` with
  // their sources.
  absl::Status Prepare(std::vector<TensorPair>& pairs);

  // Gives the filled tensors and the hyperparameters to the optimizers.
  absl::Status Commit();

 private:
  // What a dict says about parameters, by the names it uses.
  struct Loaded {
    absl::flat_hash_map<std::string, const StateDict*> state;
    absl::flat_hash_map<std::string, size_t> group;
    std::vector<ObjectDict> groups;
    std::list<StateDict> owned;  // of `state`, if made here
  };

  struct ParamLoad {
    size_t param;
    size_t model_group;
    const StateDict* loaded;  // null: nothing saved, state is cleared
    StateDict result;
  };

  struct GroupLoad {
    OptimizerSource* optimizer;
    size_t group;
    ObjectDict values;  // loaded
    std::vector<StateField> fields;
    std::vector<ParamLoad> params;
  };

  static absl::StatusOr<Loaded> ReadNested(const StateDict& dict);
  absl::StatusOr<Loaded> ReadFlat(const StateDict& dict) const;
  absl::Status ParseGroup(OptimizerSource* optimizer, size_t group,
                          MismatchReport& report);
  // The names under which a dict may know the tensor, canonical first.
  std::vector<absl::string_view> NamesOf(size_t model_group) const;
  void CheckState(const GroupLoad& group, const ParamLoad& param,
                  MismatchReport& report) const;
  absl::Status PrepareParam(const GroupLoad& group, ParamLoad& param,
                            std::vector<TensorPair>& pairs);
  std::string UniqueName(std::string name);

  const LiveModel& model_;
  absl::Span<OptimizerSource* const> optimizers_;
  const bool strict_;
  Loaded loaded_;
  std::vector<GroupLoad> groups_;
  absl::flat_hash_set<std::string> names_;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_OPTIMIZER_STATE_H_
