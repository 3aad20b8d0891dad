// SPDX-License-Identifier: Apache-2.0
//
// A codec made of tables: which accessor of the options and of the state class
// has which name in Python. Enough for optimizers whose state is a step counter
// and tensors of the parameter's shape.

#ifndef DSD_FRONTENDS_OPTIMIZER_TYPED_CODEC_H_
#define DSD_FRONTENDS_OPTIMIZER_TYPED_CODEC_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/full_like.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/sources.h"
#include "dsd/core/tensor/tensor_memory.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/optimizer/codec.h"
#include "dsd/frontends/optimizer/count_tensor.h"
#include "dsd/frontends/optimizer/hyperparameter_table.h"
#include "torch/optim/optimizer.h"

namespace dsd {

// A state tensor of the parameter's shape.
template <class Options, class State>
struct TensorField {
  std::string name;
  at::Tensor& (*access)(State&);
  // Whether a parameter that has state has this one. A tensor that never is
  // required may be absent at any time.
  bool (*required)(const Options&);
  // What all elements are before the first step. Null: 0.
  double (*initial)(const Options&) = nullptr;
};

template <class Options, class State>
struct CodecTables {
  std::string name;
  std::vector<NativeField<Options>> native;  // in Python's order
  std::vector<PythonField> python;           // they follow the native ones
  int64_t& (*step)(State&) = nullptr;        // null: the class does not count
  std::vector<TensorField<Options, State>> tensors;
};

// The half of a codec that is about the class and its options.
template <class Optimizer, class Options>
class OptionsCodec : public OptimizerCodec {
 public:
  explicit OptionsCodec(HyperparameterTable<Options> table)
      : table_(std::move(table)) {}

  absl::string_view name() const override { return table_.name(); }

  bool Matches(const torch::optim::Optimizer& optimizer) const override {
    return dynamic_cast<const Optimizer*>(&optimizer) != nullptr;
  }

  absl::StatusOr<ObjectDict> Hyperparameters(
      const torch::optim::OptimizerOptions& options) const override {
    return table_.Get(options);
  }

  absl::Status CheckHyperparameters(
      const torch::optim::OptimizerOptions& options, const ObjectDict& values,
      bool strict) const override {
    return table_.Check(options, values, strict);
  }

  absl::Status SetHyperparameters(torch::optim::OptimizerParamGroup& group,
                                  const ObjectDict& values) const override {
    return table_.Set(group, values);
  }

 protected:
  const HyperparameterTable<Options>& table() const { return table_; }

  // The state as an object of its class. FailedPrecondition otherwise.
  // Accessors return references that are not const; nothing is written.
  template <class State>
  absl::StatusOr<State*> TypedState(
      const torch::optim::OptimizerParamState& state) const {
    auto& base = const_cast<torch::optim::OptimizerParamState&>(state);
    if (typeid(base) == typeid(State)) return static_cast<State*>(&base);
    if (auto* derived = dynamic_cast<State*>(&base)) return derived;
    return absl::FailedPreconditionError(absl::StrCat(
        "the parameter has state of another class than ", name(), "'s"));
  }

 private:
  const HyperparameterTable<Options> table_;
};

template <class Optimizer, class Options, class State>
class TypedCodec : public OptionsCodec<Optimizer, Options> {
 public:
  explicit TypedCodec(CodecTables<Options, State> tables)
      : OptionsCodec<Optimizer, Options>(HyperparameterTable<Options>(
            std::move(tables.name), std::move(tables.native),
            std::move(tables.python))),
        step_(tables.step),
        tensors_(std::move(tables.tensors)) {}

  absl::StatusOr<std::vector<StateField>> StateFields(
      const ObjectDict& hyperparameters) const override {
    Options options(/*lr=*/0.0);
    DSD_RETURN_IF_ERROR(this->table().Write(hyperparameters, options));
    std::vector<StateField> fields;
    if (step_ != nullptr) {
      fields.push_back(
          {kStep, StateField::Shape::kCount, AnyRequired(options)});
    }
    for (const TensorField<Options, State>& field : tensors_) {
      fields.push_back({field.name, StateField::Shape::kLikeParameter,
                        field.required(options)});
    }
    return fields;
  }

  absl::StatusOr<StateDict> GetState(
      const torch::optim::OptimizerParamState& base) const override {
    DSD_ASSIGN_OR_RETURN(State* const state,
                         this->template TypedState<State>(base));
    StateDict entries;
    if (step_ != nullptr) {
      DSD_ASSIGN_OR_RETURN(at::Tensor step, CountTensor(step_(*state)));
      entries.Append(kStep, Value(TensorValue(std::move(step))));
    }
    for (const TensorField<Options, State>& field : tensors_) {
      const at::Tensor& tensor = field.access(*state);
      if (tensor.defined()) {
        entries.Append(field.name, Value(TensorValue(tensor)));
      }
    }
    return entries;
  }

  absl::Status LiveTensors(const torch::optim::OptimizerParamState& base,
                           absl::Span<const StateField> fields,
                           absl::Span<at::Tensor> out) const override {
    DSD_ASSIGN_OR_RETURN(State* const state,
                         this->template TypedState<State>(base));
    for (size_t i = 0; i < fields.size(); ++i) {
      const auto field = std::find_if(
          tensors_.begin(), tensors_.end(),
          [&](const auto& own) { return own.name == fields[i].name; });
      out[i] = field == tensors_.end() ? at::Tensor() : field->access(*state);
    }
    return absl::OkStatus();
  }

  void Prefetch(const torch::optim::OptimizerParamState& base) const override {
    if (typeid(base) != typeid(State)) return;
    auto& state =
        const_cast<State&>(static_cast<const State&>(base));  // not written
    for (const TensorField<Options, State>& field : tensors_) {
      PrefetchTensor(field.access(state));
    }
  }

  size_t num_marks() const override { return 1 + tensors_.size(); }

  bool MarkState(const torch::optim::OptimizerParamState& base,
                 absl::Span<uint64_t> marks) const override {
    if (typeid(base) != typeid(State)) return false;
    auto& state =
        const_cast<State&>(static_cast<const State&>(base));  // not written
    size_t i = 0;
    marks[i++] = step_ == nullptr ? 0 : static_cast<uint64_t>(step_(state));
    for (const TensorField<Options, State>& field : tensors_) {
      marks[i++] = reinterpret_cast<uintptr_t>(
          field.access(state).unsafeGetTensorImpl());
    }
    return true;
  }

  absl::StatusOr<StateDict> InertState(
      const torch::optim::OptimizerOptions& base,
      const at::Tensor& param) const override {
    DSD_ASSIGN_OR_RETURN(const Options* const options,
                         this->table().Typed(base));
    StateDict entries;
    if (!AnyRequired(*options)) return entries;
    if (step_ != nullptr) {
      DSD_ASSIGN_OR_RETURN(at::Tensor step, CountTensor(0));
      entries.Append(kStep, Value(TensorValue(std::move(step))));
    }
    for (const TensorField<Options, State>& field : tensors_) {
      if (!field.required(*options)) continue;
      const double initial =
          field.initial == nullptr ? 0 : field.initial(*options);
      DSD_ASSIGN_OR_RETURN(at::Tensor tensor, TorchToStatus([&] {
                             return at::full_like(param.detach(), initial);
                           }));
      entries.Append(field.name, Value(TensorValue(std::move(tensor))));
    }
    return entries;
  }

  absl::StatusOr<std::unique_ptr<torch::optim::OptimizerParamState>> MakeState(
      const StateDict& entries) const override {
    auto state = std::make_unique<State>();
    DSD_RETURN_IF_ERROR(Fill(entries, *state));
    return std::unique_ptr<torch::optim::OptimizerParamState>(std::move(state));
  }

  absl::StatusOr<bool> UpdateState(
      const StateDict& entries,
      torch::optim::OptimizerParamState& base) const override {
    if (typeid(base) != typeid(State)) return false;
    DSD_RETURN_IF_ERROR(Fill(entries, static_cast<State&>(base)));
    return true;
  }

 private:
  static constexpr char kStep[] = "step";

  absl::Status Fill(const StateDict& entries, State& state) const {
    if (step_ != nullptr) {
      const Value* step = entries.Find(kStep);
      const auto* count = step == nullptr ? nullptr : step->get_if<int64_t>();
      step_(state) = count == nullptr ? 0 : *count;
    }
    for (const TensorField<Options, State>& field : tensors_) {
      const Value* value = entries.Find(field.name);
      at::Tensor& tensor = field.access(state);
      if (value == nullptr) {
        tensor = at::Tensor();
        continue;
      }
      DSD_ASSIGN_OR_RETURN(tensor,
                           value->template get_if<TensorValue>()->Local());
    }
    return absl::OkStatus();
  }

  bool AnyRequired(const Options& options) const {
    for (const TensorField<Options, State>& field : tensors_) {
      if (field.required(options)) return true;
    }
    return false;
  }

  int64_t& (*const step_)(State&);
  const std::vector<TensorField<Options, State>> tensors_;
};

}  // namespace dsd

#endif  // DSD_FRONTENDS_OPTIMIZER_TYPED_CODEC_H_
