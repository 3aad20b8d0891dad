// SPDX-License-Identifier: Apache-2.0
//
// The state of live optimizers as a nested dict keyed by FQN.

#ifndef DSD_CORE_STATE_DICT_OPTIMIZER_READER_H_
#define DSD_CORE_STATE_DICT_OPTIMIZER_READER_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"
#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/state_dict/sources.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// Which group of which optimizer has each parameter of a model.
class ParameterOwners {
 public:
  explicit ParameterOwners(const LiveModel& model);

  // Enters parameter `param` of the group. False if the group has it already:
  // tied weights are in LibTorch's parameters() under each of their names.
  // Errors: NotFound for a tensor that is not in the model; InvalidArgument if
  // another group has it, naming both.
  absl::StatusOr<bool> Add(const OptimizerSource& optimizer, size_t group,
                           size_t param);

  // The group of the model's table, of the parameter that was added last.
  size_t model_group() const { return model_group_; }

 private:
  struct Owner {
    const OptimizerSource* optimizer = nullptr;
    size_t group = 0;
    const c10::TensorImpl* tensor = nullptr;
  };

  const LiveModel& model_;
  std::vector<Owner> owners_;  // by group of the model's table
  size_t model_group_ = 0;
};

// "AdamW group 1".
std::string GroupName(const OptimizerSource& optimizer, size_t group);

// A tensor like the parameter is sharded as it is, unless ShardingTable says
// something else about it.
absl::StatusOr<TensorValue> WithShardingOf(const TensorValue& param,
                                           const at::Tensor& tensor);

// FailedPrecondition if one of the group's parameters is a shard but the
// optimizer has one state for all of them.
absl::Status CheckGroupState(const LiveModel& model,
                             const OptimizerSource& optimizer, size_t group);

// For a walk over the parameters of a group that is at `current`: ask for the
// memory of those that follow, and of their states.
void PrefetchParams(const LiveModel& model, absl::Span<const at::Tensor> params,
                    size_t current);
void PrefetchStates(const OptimizerSource& optimizer, size_t group,
                    size_t current);

// Reads optimizers again and again, and again only what has changed.
// Thread-compatible.
class OptimizerReader {
 public:
  // The half of Read that needs no model: what the optimizers have now. It may
  // run at the same time as what changes neither them nor this. What it finds,
  // errors too, is for the next Read, which otherwise looks itself.
  // Both walk in up to `threads` threads.
  void Look(Env* env, int threads,
            absl::Span<OptimizerSource* const> optimizers);

  // The nested dict of all `optimizers`: aliases of live state, and in tensors
  // of its own what a parameter's state would be before the first step, where
  // it is missing (for parameters that are not trained only where a part of it
  // is missing). The optimizers are not changed.
  // Errors: of ParameterOwners::Add and CheckGroupState; of the sources.
  absl::StatusOr<StateDict> Read(Env* env, int threads, const LiveModel& model,
                                 absl::Span<OptimizerSource* const> optimizers);

 private:
  static constexpr uint32_t kNoEntry = ~uint32_t{0};

  struct Param {
    const c10::TensorImpl* tensor;
    uint32_t model_group;  // of the model's table
    uint32_t entry;        // index in the dict's "state"
    bool duplicate;        // a tied parameter's second place in the group
    bool trainable;
    // Whether all that the entry says is live state, or `count`.
    bool live;
    // What the entry has as the number of steps, a copy, which a caller who has
    // the dict may write to; and the bytes that it had. Null: nothing.
    uint32_t count_bytes;
    const c10::TensorImpl* count;
    uint64_t count_was;

    bool IsCountAsItWas() const {
      return count == nullptr ||
             (count->numel() == 1 && count->itemsize() == count_bytes &&
              std::memcmp(&count_was, count->data(), count_bytes) == 0);
    }
  };
  struct Group {
    OptimizerSource* optimizer;
    size_t index;
    ObjectDict hyperparameters;
    std::vector<StateField> fields;
    std::vector<Param> params;
    std::vector<uint64_t> marks;  // see OptimizerSource::FindChangedStates
    // What Look has found, by parameter: states, or which are to be read again.
    std::vector<StateDict> states;
    std::vector<size_t> changed;
  };
  enum class Looked { kNot, kForChanges, kAtAll };

  absl::Status LookAtAll(Env* env, int threads,
                         absl::Span<OptimizerSource* const> optimizers);
  // False if it must be all.
  absl::StatusOr<bool> LookForChanges(
      absl::Span<OptimizerSource* const> optimizers);
  absl::Status ReadAll(Env* env, int threads, const LiveModel& model);
  // Sets *all if that is not enough.
  absl::Status ReadChanges(Env* env, int threads, const LiveModel& model,
                           bool* all);
  bool HasSameParameters(absl::Span<OptimizerSource* const> optimizers) const;
  // Sets `count`, or takes back `live` if that cannot say it.
  static void KeepCount(const std::vector<StateField>& fields,
                        const StateDict& entries, Param& param);
  // The state of a parameter, of which `entries` is what there is; sets `live`.
  static absl::StatusOr<StateDict> ReadParam(const LiveModel& model,
                                             const Group& group, size_t index,
                                             StateDict entries, Param& param);

  StateDict dict_;  // shared with the dicts that Read has returned
  std::vector<Group> groups_;
  bool is_current_ = false;  // dict_, as of the last look
  Looked looked_ = Looked::kNot;
  absl::Status look_status_;
  int64_t tables_built_ = -1;
  uint64_t shardings_ = 0;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_OPTIMIZER_READER_H_
