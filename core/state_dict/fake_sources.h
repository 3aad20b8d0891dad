// SPDX-License-Identifier: Apache-2.0
//
// A model and an optimizer without torch::nn and torch::optim, for tests.

#ifndef DSD_CORE_STATE_DICT_FAKE_SOURCES_H_
#define DSD_CORE_STATE_DICT_FAKE_SOURCES_H_

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/state_dict/sources.h"

namespace dsd::test {

// A module with one level: names may have dots.
class FakeModel : public ModelSource {
 public:
  void Add(std::string name, at::Tensor tensor,
           EntryKind kind = EntryKind::kParameter);

  // Adds this rank's shard of `whole` and enters it into
  // ShardingTable::Global(). Returns the shard.
  at::Tensor AddShard(std::string name, const at::Tensor& whole,
                      const Layout& layout, Holder holder);

  at::Tensor& tensor(size_t i) { return tensors_[i].second; }
  size_t size() const { return tensors_.size(); }
  int describe_calls() const { return describe_calls_; }

  absl::Status ForEachTensor(
      absl::FunctionRef<void(const at::Tensor&)> visit) override;
  absl::StatusOr<ModuleNode> Describe() override;

 private:
  std::vector<std::pair<std::string, at::Tensor>> tensors_;
  std::vector<EntryKind> kinds_;
  int describe_calls_ = 0;
};

// State: "step" (a count), "moment" (like the parameter), "history" (anything,
// optional). Hyperparameters: whatever is in the groups.
class FakeOptimizer : public OptimizerSource {
 public:
  struct Group {
    std::vector<at::Tensor> params;
    ObjectDict hyperparameters;
  };

  std::vector<Group> groups;
  absl::flat_hash_map<const void*, StateDict> state;  // by TensorImpl
  bool stateless = false;
  absl::Status set_state_error;

  StateDict& StateOf(const at::Tensor& param) {
    return state[param.unsafeGetTensorImpl()];
  }

  absl::string_view type_name() const override { return "Fake"; }
  size_t num_groups() const override { return groups.size(); }
  absl::Span<const at::Tensor> params(size_t group) const override {
    return groups[group].params;
  }
  absl::StatusOr<ObjectDict> Hyperparameters(size_t group) const override {
    return groups[group].hyperparameters;
  }
  absl::Status CheckHyperparameters(size_t group, const ObjectDict& values,
                                    bool strict) const override;
  absl::Status SetHyperparameters(size_t group,
                                  const ObjectDict& values) override;
  absl::StatusOr<std::vector<StateField>> StateFields(
      const ObjectDict& hyperparameters) const override;
  absl::StatusOr<StateDict> State(size_t group, size_t param) const override;
  absl::StatusOr<StateDict> InertState(size_t group,
                                       size_t param) const override;
  absl::Status SetState(size_t group, size_t param,
                        StateDict new_state) override;
};

// The numbers from `start` on, as a tensor of this shape.
at::Tensor Numbers(const Dims& shape, double start = 0,
                   c10::ScalarType type = c10::kFloat);

// `whole`'s part of `holder`, in memory of its own.
at::Tensor ShardOf(const at::Tensor& whole, const Layout& layout,
                   Holder holder);

}  // namespace dsd::test

#endif  // DSD_CORE_STATE_DICT_FAKE_SOURCES_H_
