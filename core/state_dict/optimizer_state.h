// SPDX-License-Identifier: Apache-2.0
//
// An optimizer state dict on its way into live optimizers.

#ifndef DSD_CORE_STATE_DICT_OPTIMIZER_STATE_H_
#define DSD_CORE_STATE_DICT_OPTIMIZER_STATE_H_

#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"
#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/state_dict/local_copy.h"
#include "dsd/core/state_dict/mismatch_report.h"
#include "dsd/core/state_dict/optimizer_dict.h"
#include "dsd/core/state_dict/optimizer_reader.h"
#include "dsd/core/state_dict/sources.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// Parse and check, allocate, fill (by the caller), commit. Borrows everything,
// the dicts of Parse too. Thread-compatible.
class OptimizerLoad {
 public:
  // `policy`: of tensors of the state; kDefault is kKeep.
  OptimizerLoad(const LiveModel& model,
                absl::Span<OptimizerSource* const> optimizers, bool strict,
                DTypePolicy policy = DTypePolicy::kDefault)
      : model_(model),
        optimizers_(optimizers),
        strict_(strict),
        policy_(policy) {}

  // Reads the dict of any form and adds what does not fit to `report`. In up to
  // `threads` threads.
  // `model_dict`: of the same state, or null. A parameter that was tied to
  // another one there gets that one's state if it has none of its own.
  // Errors: InvalidArgument if it is not an optimizer dict, or if two groups
  // have one parameter; FailedPrecondition for an optimizer with one state for
  // all of its parameters if they are sharded.
  absl::Status Parse(Env* env, int threads, const StateDict& dict,
                     MismatchReport& report,
                     const StateDict* model_dict = nullptr);

  // Makes the tensors that will be the new state and adds them to `pairs` with
  // their sources. In up to `threads` threads.
  absl::Status Prepare(Env* env, int threads, std::vector<TensorPair>& pairs);

  // Gives the filled tensors and the hyperparameters to the optimizers.
  absl::Status Commit();

 private:
  struct ParamLoad {
    size_t param;
    size_t model_group;
    const StateDict* loaded;  // null: nothing saved
    StateDict result;
    bool is_used = true;
  };

  struct GroupLoad {
    OptimizerSource* optimizer;
    size_t group;
    ObjectDict values;  // loaded
    std::vector<StateField> fields;
    std::vector<ParamLoad> params;
  };

  // For a walk that is at `current`: asks for the memory of what was loaded for
  // those that follow.
  static void PrefetchLoaded(absl::Span<const ParamLoad> params,
                             size_t current);
  absl::Status ParseGroup(Env* env, int threads, OptimizerSource* optimizer,
                          size_t group, ParameterOwners& owners,
                          MismatchReport& report);
  // What the dict knows the tensor by: the first of its names, canonical first,
  // for which `find` does not give `none`.
  template <class Find, class Result>
  Result FindByName(size_t model_group, Find find, Result none) const;
  // The state of a parameter that was tied to this one; null if there is none.
  const StateDict* StateOfTied(size_t model_group);
  void MergeHyperparameters(GroupLoad& load, MismatchReport& report) const;
  std::string ContradictionOf(const GroupLoad& load,
                              const PathSegment& key) const;
  void CheckState(const GroupLoad& group, const ObjectDict& hyperparameters,
                  const ParamLoad& param, MismatchReport& report) const;
  void CheckOrder(const GroupLoad& group, MismatchReport& report) const;
  absl::Status PrepareParam(const GroupLoad& group, ParamLoad& param,
                            std::vector<TensorPair>& pairs,
                            std::vector<TensorPair>& free_form);

  const LiveModel& model_;
  absl::Span<OptimizerSource* const> optimizers_;
  const bool strict_;
  const DTypePolicy policy_;
  std::optional<OptimizerDict> dict_;
  const StateDict* model_dict_ = nullptr;
  // Names of model_dict_ by tensor; made when first needed.
  std::optional<absl::flat_hash_map<const void*, std::vector<std::string>>>
      tied_;
  std::vector<GroupLoad> groups_;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_OPTIMIZER_STATE_H_
