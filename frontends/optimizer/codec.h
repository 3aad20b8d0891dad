// SPDX-License-Identifier: Apache-2.0
//
// How the options and the state of one class of LibTorch optimizers are named
// in a state dict. LibTorch has no reflection for them, so each class has a
// codec; README.md says how to write one for a class of your own.

#ifndef DSD_FRONTENDS_OPTIMIZER_CODEC_H_
#define DSD_FRONTENDS_OPTIMIZER_CODEC_H_

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
#include "dsd/core/state_dict/state_dict.h"

namespace torch::optim {
class Optimizer;
class OptimizerOptions;
class OptimizerParamGroup;
class OptimizerParamState;
}  // namespace torch::optim

namespace dsd {

// Stateless and thread-safe. Groups, options and states passed in are those of
// an optimizer that the codec matches.
class OptimizerCodec {
 public:
  virtual ~OptimizerCodec() = default;

  // Stable: "AdamW".
  virtual absl::string_view name() const = 0;

  // Whether `optimizer` is of this class or one derived from it.
  virtual bool Matches(const torch::optim::Optimizer& optimizer) const = 0;

  // See OptimizerSource for the meaning of the next five.
  virtual absl::StatusOr<ObjectDict> Hyperparameters(
      const torch::optim::OptimizerOptions& options) const = 0;
  virtual absl::Status CheckHyperparameters(
      const torch::optim::OptimizerOptions& options, const ObjectDict& values,
      bool strict) const = 0;
  virtual absl::Status SetHyperparameters(
      torch::optim::OptimizerParamGroup& group,
      const ObjectDict& values) const = 0;
  virtual absl::StatusOr<std::vector<StateField>> StateFields(
      const ObjectDict& hyperparameters) const = 0;

  virtual bool has_group_state() const { return false; }

  // The entries of `state`; tensors are shared.
  virtual absl::StatusOr<StateDict> GetState(
      const torch::optim::OptimizerParamState& state) const = 0;

  // See OptimizerSource.
  virtual absl::Status LiveTensors(
      const torch::optim::OptimizerParamState& state,
      absl::Span<const StateField> fields, absl::Span<at::Tensor> out) const;

  // Asks for the memory of a state's tensors, which are needed soon.
  virtual void Prefetch(
      const torch::optim::OptimizerParamState& /*state*/) const {}

  // Marks tell cheaply whether a state is as it was: num_marks() words, which
  // are equal for two states only if GetState gives the same tensors, told
  // apart by address, and equal values. MarkState returns false for a state
  // that it has no marks of. Without marks each get reads all states anew.
  virtual size_t num_marks() const { return 0; }
  virtual bool MarkState(const torch::optim::OptimizerParamState& /*state*/,
                         absl::Span<uint64_t> /*marks*/) const {
    return false;
  }

  // What a parameter's state is before its first step, in new tensors; empty if
  // the class has none then.
  virtual absl::StatusOr<StateDict> InertState(
      const torch::optim::OptimizerOptions& options,
      const at::Tensor& param) const = 0;

  // Whether MakeState would take these entries; see OptimizerSource.
  virtual absl::Status CheckState(absl::Span<const at::Tensor> /*params*/,
                                  const ObjectDict& /*hyperparameters*/,
                                  const StateDict& /*entries*/) const {
    return absl::OkStatus();
  }

  // A state with these entries, which are as StateFields says and have passed
  // CheckState. Keeps the tensors.
  virtual absl::StatusOr<std::unique_ptr<torch::optim::OptimizerParamState>>
  MakeState(const StateDict& entries) const = 0;

  // Makes `state` what MakeState would return. False, and unchanged, if it is
  // of another class, or the codec only makes new ones.
  virtual absl::StatusOr<bool> UpdateState(
      const StateDict& /*entries*/,
      torch::optim::OptimizerParamState& /*state*/) const {
    return false;
  }
};

// Adds a codec for the rest of the process. Of several that match an optimizer
// the one registered last is used. Thread-safe.
void RegisterOptimizerCodec(std::unique_ptr<const OptimizerCodec> codec);

// The codec for an optimizer; it lives for ever. NotFound names the class and
// the codecs there are. Thread-safe.
absl::StatusOr<const OptimizerCodec*> FindOptimizerCodec(
    const torch::optim::Optimizer& optimizer);

}  // namespace dsd

#endif  // DSD_FRONTENDS_OPTIMIZER_CODEC_H_
