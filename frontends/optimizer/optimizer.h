// SPDX-License-Identifier: Apache-2.0
//
// torch::optim::Optimizer as the source of a state dict.

#ifndef DSD_FRONTENDS_OPTIMIZER_OPTIMIZER_H_
#define DSD_FRONTENDS_OPTIMIZER_OPTIMIZER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/state_dict/sources.h"
#include "dsd/frontends/optimizer/codec.h"

namespace torch::optim {
class Optimizer;
}  // namespace torch::optim

namespace dsd {

// An optimizer whose class has a codec. Thread-compatible.
class TorchOptimizerSource : public OptimizerSource {
 public:
  // `optimizer` is borrowed. NotFound if its class has no codec.
  static absl::StatusOr<std::unique_ptr<TorchOptimizerSource>> Create(
      torch::optim::Optimizer* optimizer);

  absl::string_view type_name() const override { return codec_->name(); }
  size_t num_groups() const override;
  absl::Span<const at::Tensor> params(size_t group) const override;
  absl::StatusOr<ObjectDict> Hyperparameters(size_t group) const override;
  absl::Status CheckHyperparameters(size_t group, const ObjectDict& values,
                                    bool strict) const override;
  absl::Status SetHyperparameters(size_t group,
                                  const ObjectDict& values) override;
  absl::StatusOr<std::vector<StateField>> StateFields(
      const ObjectDict& hyperparameters) const override;
  bool has_group_state() const override { return codec_->has_group_state(); }
  void PrefetchStates(size_t group, size_t begin, size_t end) const override;
  absl::StatusOr<StateDict> State(size_t group, size_t param) const override;
  absl::Status LiveTensors(size_t group, size_t param,
                           absl::Span<const StateField> fields,
                           absl::Span<at::Tensor> out) const override;
  void FindChangedStates(size_t group, std::vector<uint64_t>& marks,
                         std::vector<size_t>& changed) const override;
  absl::StatusOr<StateDict> InertState(size_t group,
                                       size_t param) const override;
  absl::Status CheckState(size_t group, const ObjectDict& hyperparameters,
                          const StateDict& entries) const override;
  absl::Status SetState(size_t group, size_t param, StateDict state) override;

 private:
  TorchOptimizerSource(torch::optim::Optimizer* optimizer,
                       const OptimizerCodec* codec)
      : optimizer_(optimizer), codec_(codec) {}

  // Null if the parameter has none.
  torch::optim::OptimizerParamState* FindState(size_t group,
                                               size_t param) const;

  torch::optim::Optimizer* optimizer_;
  const OptimizerCodec* codec_;
};

}  // namespace dsd

#endif  // DSD_FRONTENDS_OPTIMIZER_OPTIMIZER_H_
