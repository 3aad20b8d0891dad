// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/optimizer/optimizer.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/memory/memory.h"
#include "absl/status/status.h"
#include "dsd/core/base/prefetch.h"
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

torch::optim::OptimizerParamState* TorchOptimizerSource::FindState(
    size_t group, size_t param) const {
  const auto& states = optimizer_->state();
  const auto state = states.find(params(group)[param].unsafeGetTensorImpl());
  return state == states.end() ? nullptr : state->second.get();
}

void TorchOptimizerSource::PrefetchStates(size_t group, size_t begin,
                                          size_t end) const {
  std::vector<const torch::optim::OptimizerParamState*> found;
  for (size_t i = begin; i < end; ++i) {
    found.push_back(FindState(group, i));
    PrefetchBytes(found.back(), 1);
  }
  for (const torch::optim::OptimizerParamState* const state : found) {
    if (state != nullptr) codec_->Prefetch(*state);
  }
}

absl::StatusOr<StateDict> TorchOptimizerSource::State(size_t group,
                                                      size_t param) const {
  const auto* const state = FindState(group, param);
  if (state == nullptr) return StateDict();
  return codec_->GetState(*state);
}

absl::Status TorchOptimizerSource::LiveTensors(
    size_t group, size_t param, absl::Span<const StateField> fields,
    absl::Span<at::Tensor> out) const {
  const auto* const state = FindState(group, param);
  if (state != nullptr) return codec_->LiveTensors(*state, fields, out);
  std::fill(out.begin(), out.end(), at::Tensor());
  return absl::OkStatus();
}

void TorchOptimizerSource::FindChangedStates(
    size_t group, std::vector<uint64_t>& marks,
    std::vector<size_t>& changed) const {
  // Whether a parameter has state, in front of the codec's.
  enum : uint64_t { kNew, kNoState, kMarked, kUnknown };
  const absl::Span<const at::Tensor> all = params(group);
  const size_t words = 1 + codec_->num_marks();
  if (marks.size() != all.size() * words)
    marks.assign(all.size() * words, kNew);
  std::vector<uint64_t> now(words);
  // Some states ahead of what is looked at are asked for from memory.
  constexpr size_t kAhead = 16;
  std::array<const torch::optim::OptimizerParamState*, kAhead> found;
  for (size_t begin = 0; begin < all.size(); begin += kAhead) {
    const size_t end = std::min(begin + kAhead, all.size());
    for (size_t i = begin; i < end; ++i) {
      found[i - begin] = FindState(group, i);
      PrefetchBytes(found[i - begin], 1);
    }
    for (size_t i = begin; i < end; ++i) {
      std::fill(now.begin(), now.end(), 0);
      if (found[i - begin] == nullptr) {
        now[0] = kNoState;
      } else {
        now[0] =
            codec_->MarkState(*found[i - begin], absl::MakeSpan(now).subspan(1))
                ? kMarked
                : kUnknown;
      }
      uint64_t* const before = &marks[i * words];
      if (now[0] != kUnknown && std::equal(now.begin(), now.end(), before)) {
        continue;
      }
      std::copy(now.begin(), now.end(), before);
      changed.push_back(i);
    }
  }
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
  if (const auto own = states.find(key); own != states.end()) {
    DSD_ASSIGN_OR_RETURN(const bool updated,
                         codec_->UpdateState(state, *own->second));
    if (updated) return absl::OkStatus();
  }
  DSD_ASSIGN_OR_RETURN(states[key], codec_->MakeState(state));
  return absl::OkStatus();
}

}  // namespace dsd
