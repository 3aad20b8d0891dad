// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/optimizer/optimizer.h"

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "absl/memory/memory.h"
#include "absl/status/status.h"
#include "dsd/core/base/status_macros.h"
#include "torch/optim/optimizer.h"

namespace dsd {

absl::StatusOr<std::unique_ptr<TorchOptimizerSource>>
TorchOptimizerSource::Create(torch::optim::Optimizer* optimizer) {
  DSD_ASSIGN_OR_RETURN(const OptimizerCodec* const codec,
                       FindOptimizerCodec(*optimizer));
  return absl::WrapUnique(new TorchOptimizerSource(optimizer, codec));
}

size_t TorchOptimizerSource::num_groups() const {
  return optimizer_->param_groups().size();
}

absl::Span<const at::Tensor> TorchOptimizerSource::params(size_t group) const {
  return optimizer_->param_groups()[group].params();
}

absl::StatusOr<ObjectDict> TorchOptimizerSource::Hyperparameters(
    size_t group) const {
  return codec_->Hyperparameters(optimizer_->param_groups()[group].options());
}

absl::Status TorchOptimizerSource::CheckHyperparameters(
    size_t group, const ObjectDict& values, bool strict) const {
  return codec_->CheckHyperparameters(
      optimizer_->param_groups()[group].options(), values, strict);
}

absl::Status TorchOptimizerSource::SetHyperparameters(
    size_t group, const ObjectDict& values) {
  return codec_->SetHyperparameters(optimizer_->param_groups()[group], values);
}

absl::StatusOr<std::vector<StateField>> TorchOptimizerSource::StateFields(
    const ObjectDict& hyperparameters) const {
  return codec_->StateFields(hyperparameters);
}

absl::StatusOr<StateDict> TorchOptimizerSource::State(size_t group,
                                                      size_t param) const {
  const auto& states = optimizer_->state();
  const auto state = states.find(params(group)[param].unsafeGetTensorImpl());
  if (state == states.end()) return StateDict();
  return codec_->GetState(*state->second);
}

bool TorchOptimizerSource::HasState(size_t group, size_t param,
                                    const StateDict& entries) const {
  const auto& states = optimizer_->state();
  const auto state = states.find(params(group)[param].unsafeGetTensorImpl());
  return state == states.end() ? entries.empty()
                               : codec_->HasState(*state->second, entries);
}

absl::StatusOr<StateDict> TorchOptimizerSource::InertState(size_t group,
                                                           size_t param) const {
  return codec_->InertState(optimizer_->param_groups()[group].options(),
                            params(group)[param]);
}

absl::Status TorchOptimizerSource::CheckState(size_t group,
                                              const ObjectDict& hyperparameters,
                                              const StateDict& entries) const {
  return codec_->CheckState(params(group), hyperparameters, entries);
}

absl::Status TorchOptimizerSource::SetState(size_t group, size_t param,
                                            StateDict state) {
  auto& states = optimizer_->state();
  void* const key = params(group)[param].unsafeGetTensorImpl();
  if (state.empty()) {
    states.erase(key);
    return absl::OkStatus();
  }
  DSD_ASSIGN_OR_RETURN(states[key], codec_->MakeState(state));
  return absl::OkStatus();
}

}  // namespace dsd
