// SPDX-License-Identifier: Apache-2.0
//
// A model's tensors and extra states as a dict keyed by FQN, and back.

#ifndef DSD_CORE_STATE_DICT_MODEL_STATE_H_
#define DSD_CORE_STATE_DICT_MODEL_STATE_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/fqn/fqn_table.h"
#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/state_dict/mismatch_report.h"
#include "dsd/core/state_dict/optimizer_state.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// Which entries of a table a dict has, and under which keys: `submodules` and
// `keep_submodule_prefixes`.
class KeyScope {
 public:
  // Every entry, under its FQN.
  KeyScope() = default;

  // InvalidArgument for a submodule that is not in the model, or null.
  static absl::StatusOr<KeyScope> Create(const FqnTable& table,
                                         const StateDictOptions& options);

  bool is_everything() const { return everything_; }

  // Calls `visit` for each key of the entry: none if it is outside or in no
  // state dict, several if it is in several submodules without prefixes.
  void ForEachKey(const FqnTable::Entry& entry,
                  absl::FunctionRef<void(const std::string&)> visit) const;

 private:
  bool everything_ = true;
  bool keep_prefixes_ = true;
  std::vector<std::string> prefixes_;  // "" or "a.b.", distinct
};

// The dict of the model as `options` want it: aliases of live tensors, and
// extra states. Changes nothing. Errors: of KeyScope and ExtraState;
// InvalidArgument if two entries get one key.
absl::StatusOr<StateDict> GetModelState(const LiveModel& model,
                                        const StateDictOptions& options);

// A dict on its way into the model: match and check, allocate, fill (by the
// caller), commit. Borrows everything. Thread-compatible.
class ModelLoad {
 public:
  ModelLoad(LiveModel& model, const StateDictOptions& options)
      : model_(model), options_(options) {}

  // Adds what does not fit to `report`; keys in `elsewhere` (null: none) are
  // those of other ranks' models. Borrows the dict until Prepare. Errors: as
  // GetModelState.
  absl::Status Match(const StateDict& dict, const StateDict* elsewhere,
                     MismatchReport& report);

  // Adds the live tensors, or what will replace them, with their sources. The
  // tensors in extra states are replaced by new ones that are filled too.
  absl::Status Prepare(std::vector<TensorPair>& pairs);

  // Gives the filled tensors and the extra states to the model.
  absl::Status Commit();

 private:
  struct TensorLoad {
    size_t group;
    const TensorValue* source;  // in the dict
    TensorValue new_memory;     // if assigned
  };
  struct ExtraLoad {
    size_t group;
    std::string key;
    Value value;
  };

  std::string MisfitOf(const std::string& key, const Value& value,
                       size_t group) const;
  void CheckOverlap(MismatchReport& report);
  c10::ScalarType TargetType(const TensorLoad& load) const;
  absl::StatusOr<TensorValue> NewTarget(const TensorLoad& load) const;

  LiveModel& model_;
  const StateDictOptions& options_;
  std::vector<TensorLoad> tensors_;
  std::vector<ExtraLoad> extras_;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_MODEL_STATE_H_
