// SPDX-License-Identifier: Apache-2.0
//
// The forms of an optimizer state dict: nested and flat, keyed by FQN, and
// nested with parameters by number, as torch.optim's state_dict() in Python.

#ifndef DSD_CORE_STATE_DICT_OPTIMIZER_DICT_H_
#define DSD_CORE_STATE_DICT_OPTIMIZER_DICT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/state_dict/sources.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

inline constexpr char kStateKey[] = "state";
inline constexpr char kGroupsKey[] = "param_groups";
inline constexpr char kParamsKey[] = "params";
// In groups of optimizers that were made from named parameters.
inline constexpr char kParamNamesKey[] = "param_names";

// The flat form of a nested dict.
// Errors: InvalidArgument for state that the flat form cannot express (lists,
// text), naming the key.
absl::StatusOr<StateDict> FlattenOptimizerState(const StateDict& nested);

// What a dict of any form says about parameters. Borrows the dict and the
// model's names. Thread-compatible.
class OptimizerDict {
 public:
  struct Group {
    ObjectDict values;  // without "params" and "param_names"
    // As listed. Of the flat form: in no order, and one parameter per group.
    std::vector<absl::string_view> params;
  };

  // `optimizers` give the parameters their numbers, if the dict has those.
  // Errors: InvalidArgument if it is not an optimizer dict, or if numbers do
  // not fit.
  static absl::StatusOr<OptimizerDict> Read(
      const StateDict& dict, const LiveModel& model,
      absl::Span<OptimizerSource* const> optimizers);

  OptimizerDict(OptimizerDict&&) = default;
  OptimizerDict& operator=(OptimizerDict&&) = default;

  // Where the last of them was found, for parameters that are looked up mostly
  // in the dict's order.
  struct Position {
    size_t state = 0;
    size_t group = 0;
    size_t param = 0;
  };

  // The state of a parameter; null if there is none. Keys below it may have
  // become texts on the way through a flat form.
  const StateDict* FindState(absl::string_view fqn, Position& position) const;
  const StateDict* FindState(absl::string_view fqn) const {
    Position anywhere;
    return FindState(fqn, anywhere);
  }

  // Asks for the memory of the state some parameters behind `position`.
  void PrefetchNear(const Position& position) const {
    if (state_ != nullptr) state_->PrefetchKey(position.state + 8);
  }

  // The index in groups() of the group that lists the parameter; -1: none.
  int64_t FindGroup(absl::string_view fqn, Position& position) const;
  int64_t FindGroup(absl::string_view fqn) const {
    Position anywhere;
    return FindGroup(fqn, anywhere);
  }

  // Under which name the optimizer was given it; null: none.
  const std::string* FindParamName(absl::string_view fqn) const;

  const std::vector<Group>& groups() const { return groups_; }
  bool is_flat() const { return is_flat_; }

 private:
  OptimizerDict() = default;

  absl::Status ReadNested(const StateDict& dict, const LiveModel& model,
                          absl::Span<OptimizerSource* const> optimizers);
  absl::Status ReadFlat(const StateDict& dict, const LiveModel& model);
  absl::Status ReadGroup(size_t index, const StateDict& group,
                         const std::vector<Value>& params,
                         absl::Span<const absl::string_view> names);

  // FQN -> dict; points to the dict that was read or to own_state_.
  const StateDict* state_ = nullptr;
  std::unique_ptr<StateDict> own_state_;
  std::vector<Group> groups_;
  struct Place {  // in groups_
    uint32_t group;
    uint32_t param;
  };
  absl::flat_hash_map<absl::string_view, Place> group_of_;
  absl::flat_hash_map<absl::string_view, std::string> param_names_;
  bool is_flat_ = false;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_OPTIMIZER_DICT_H_
