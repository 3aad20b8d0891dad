// SPDX-License-Identifier: Apache-2.0
//
// A codec made of tables: which accessor of the options and of the state class
// has which name in Python. Enough for optimizers whose state is a step counter
// and tensors of the parameter's shape.

#ifndef DSD_FRONTENDS_OPTIMIZER_TYPED_CODEC_H_
#define DSD_FRONTENDS_OPTIMIZER_TYPED_CODEC_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/scalar_tensor.h"
#include "ATen/ops/zeros_like.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/optimizer/codec.h"
#include "torch/optim/optimizer.h"

namespace dsd {

// A hyperparameter that the C++ class has.
template <class Options>
struct NativeField {
  using Pair = std::tuple<double, double>;
  std::string name;
  std::variant<double& (*)(Options&), bool& (*)(Options&), Pair& (*)(Options&)>
      access;
};

// A hyperparameter that only Python's class has.
struct PythonField {
  std::string name;
  Object default_value;
  // Whether another value means another algorithm, not just another way to run
  // it.
  bool changes_training = false;
};

// A state tensor of the parameter's shape.
template <class Options, class State>
struct TensorField {
  std::string name;
  at::Tensor& (*access)(State&);
  // Whether a parameter that has state has this one. It is zeros before the
  // first step. A tensor that never is required may be absent at any time.
  bool (*required)(const Options&);
};

template <class Options, class State>
struct CodecTables {
  std::string name;
  std::vector<NativeField<Options>> native;  // in Python's order
  std::vector<PythonField> python;           // they follow the native ones
  int64_t& (*step)(State&) = nullptr;        // null: the class does not count
  std::vector<TensorField<Options, State>> tensors;
};

// Options that carry what only Python knows, from a loaded dict to the next one
// that is written. They live and die with the group.
template <class Options>
struct OptionsWithExtras : public Options {
  explicit OptionsWithExtras(const Options& options) : Options(options) {}

  std::unique_ptr<torch::optim::OptimizerOptions> clone() const override {
    return std::make_unique<OptionsWithExtras>(*this);
  }

  ObjectDict extras;
};

template <class Optimizer, class Options, class State>
class TypedCodec : public OptimizerCodec {
 public:
  explicit TypedCodec(CodecTables<Options, State> tables)
      : tables_(std::move(tables)) {}

  absl::string_view name() const override { return tables_.name; }

  bool Matches(const torch::optim::Optimizer& optimizer) const override {
    return dynamic_cast<const Optimizer*>(&optimizer) != nullptr;
  }

  absl::StatusOr<ObjectDict> Hyperparameters(
      const torch::optim::OptimizerOptions& base) const override {
    DSD_ASSIGN_OR_RETURN(const Options* const options, Typed(base));
    Options copy(*options);
    ObjectDict values;
    for (const NativeField<Options>& field : tables_.native) {
      values.Set(field.name, Read(field, copy));
    }
    for (const PythonField& field : tables_.python) {
      values.Set(field.name, field.default_value);
    }
    const auto* with_extras =
        dynamic_cast<const OptionsWithExtras<Options>*>(options);
    for (size_t i = 0; with_extras != nullptr && i < with_extras->extras.size();
         ++i) {
      values.Set(with_extras->extras.key(i), with_extras->extras.value(i));
    }
    return values;
  }

  absl::Status CheckHyperparameters(const torch::optim::OptimizerOptions& base,
                                    const ObjectDict& values,
                                    bool strict) const override {
    DSD_ASSIGN_OR_RETURN(const Options* const options, Typed(base));
    Options copy(*options);
    DSD_RETURN_IF_ERROR(WriteAll(values, copy));
    if (!strict) return absl::OkStatus();
    for (const PythonField& field : tables_.python) {
      const Object* value = values.Find(field.name);
      if (field.changes_training && value != nullptr &&
          *value != field.default_value) {
        return absl::InvalidArgumentError(absl::StrCat(
            "\"", field.name, "\" has a value in the dict that LibTorch's ",
            tables_.name,
            " cannot follow; set strict = false to keep it without effect"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status SetHyperparameters(torch::optim::OptimizerParamGroup& group,
                                  const ObjectDict& values) const override {
    DSD_ASSIGN_OR_RETURN(Options * options, Typed(group.options()));
    DSD_RETURN_IF_ERROR(WriteAll(values, *options));
    auto* with_extras = dynamic_cast<OptionsWithExtras<Options>*>(options);
    for (size_t i = 0; i < values.size(); ++i) {
      const std::string key = values.key_text(i);
      if (IsNative(key)) continue;
      if (with_extras == nullptr) {
        // The options object stays the same as long as it can say everything:
        // callers may hold references to it.
        if (IsDefault(key, values.value(i))) continue;
        auto replacement =
            std::make_unique<OptionsWithExtras<Options>>(*options);
        with_extras = replacement.get();
        group.set_options(std::move(replacement));
      }
      with_extras->extras.Set(key, values.value(i));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<StateField>> StateFields(
      const ObjectDict& hyperparameters) const override {
    Options options(/*lr=*/0.0);
    DSD_RETURN_IF_ERROR(WriteAll(hyperparameters, options));
    std::vector<StateField> fields;
    if (tables_.step != nullptr) {
      fields.push_back(
          {kStep, StateField::Shape::kCount, AnyRequired(options)});
    }
    for (const TensorField<Options, State>& field : tables_.tensors) {
      fields.push_back({field.name, StateField::Shape::kLikeParameter,
                        field.required(options)});
    }
    return fields;
  }

  absl::StatusOr<StateDict> GetState(
      const torch::optim::OptimizerParamState& base) const override {
    State state(static_cast<const State&>(base));
    StateDict entries;
    if (tables_.step != nullptr) {
      DSD_ASSIGN_OR_RETURN(entries, StepEntry(tables_.step(state)));
    }
    for (const TensorField<Options, State>& field : tables_.tensors) {
      const at::Tensor& tensor = field.access(state);
      if (tensor.defined()) entries.Set(field.name, Value(TensorValue(tensor)));
    }
    return entries;
  }

  absl::StatusOr<StateDict> InertState(
      const torch::optim::OptimizerOptions& base,
      const at::Tensor& param) const override {
    DSD_ASSIGN_OR_RETURN(const Options* const options, Typed(base));
    StateDict entries;
    if (!AnyRequired(*options)) return entries;
    if (tables_.step != nullptr) {
      DSD_ASSIGN_OR_RETURN(entries, StepEntry(0));
    }
    for (const TensorField<Options, State>& field : tables_.tensors) {
      if (!field.required(*options)) continue;
      DSD_ASSIGN_OR_RETURN(at::Tensor zeros, TorchToStatus([&] {
                             return at::zeros_like(param.detach());
                           }));
      entries.Set(field.name, Value(TensorValue(std::move(zeros))));
    }
    return entries;
  }

  absl::StatusOr<std::unique_ptr<torch::optim::OptimizerParamState>> MakeState(
      const StateDict& entries) const override {
    auto state = std::make_unique<State>();
    if (const Value* step = entries.Find(kStep)) {
      if (const auto* count = step->get_if<int64_t>()) {
        tables_.step(*state) = *count;
      }
    }
    for (const TensorField<Options, State>& field : tables_.tensors) {
      const Value* value = entries.Find(field.name);
      if (value == nullptr) continue;
      DSD_ASSIGN_OR_RETURN(field.access(*state),
                           value->template get_if<TensorValue>()->Local());
    }
    return std::unique_ptr<torch::optim::OptimizerParamState>(std::move(state));
  }

 private:
  static constexpr char kStep[] = "step";

  template <class Base>
  absl::StatusOr<
      std::conditional_t<std::is_const_v<Base>, const Options*, Options*>>
  Typed(Base& base) const {
    auto* const typed = dynamic_cast<
        std::conditional_t<std::is_const_v<Base>, const Options*, Options*>>(
        &base);
    if (typed == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the group has options of another class than ", tables_.name, "'s"));
    }
    return typed;
  }

  bool IsNative(absl::string_view key) const {
    for (const NativeField<Options>& field : tables_.native) {
      if (field.name == key) return true;
    }
    return false;
  }

  bool IsDefault(absl::string_view key, const Object& value) const {
    for (const PythonField& field : tables_.python) {
      if (field.name == key) return field.default_value == value;
    }
    return false;
  }

  bool AnyRequired(const Options& options) const {
    for (const TensorField<Options, State>& field : tables_.tensors) {
      if (field.required(options)) return true;
    }
    return false;
  }

  // Python has a float32 tensor; counts that it cannot hold get a float64 one.
  static absl::StatusOr<StateDict> StepEntry(int64_t step) {
    const bool fits = static_cast<int64_t>(static_cast<float>(step)) == step;
    DSD_ASSIGN_OR_RETURN(at::Tensor tensor, TorchToStatus([&] {
                           return at::scalar_tensor(
                               step, fits ? at::kFloat : at::kDouble);
                         }));
    StateDict entries;
    entries.Set(kStep, Value(TensorValue(std::move(tensor))));
    return entries;
  }

  static Object Read(const NativeField<Options>& field, Options& options) {
    using Pair = typename NativeField<Options>::Pair;
    if (const auto* number =
            std::get_if<double& (*)(Options&)>(&field.access)) {
      return Object((*number)(options));
    }
    if (const auto* flag = std::get_if<bool& (*)(Options&)>(&field.access)) {
      return Object((*flag)(options));
    }
    const Pair pair = std::get<Pair& (*)(Options&)>(field.access)(options);
    return Object(Object::Tuple{{std::get<0>(pair), std::get<1>(pair)}});
  }

  static std::optional<double> ToDouble(const Object& value) {
    if (const auto* v = value.get_if<double>()) return *v;
    if (const auto* v = value.get_if<int64_t>()) return *v;
    return std::nullopt;
  }

  static bool Write(const NativeField<Options>& field, const Object& value,
                    Options& options) {
    using Pair = typename NativeField<Options>::Pair;
    if (const auto* number =
            std::get_if<double& (*)(Options&)>(&field.access)) {
      const std::optional<double> v = ToDouble(value);
      if (v.has_value()) (*number)(options) = *v;
      return v.has_value();
    }
    if (const auto* flag = std::get_if<bool& (*)(Options&)>(&field.access)) {
      const bool* v = value.get_if<bool>();
      if (v != nullptr) (*flag)(options) = *v;
      return v != nullptr;
    }
    // A tuple that went through a list-only format comes back as a list.
    const std::vector<Object>* items = value.get_if<Object::List>();
    if (const auto* tuple = value.get_if<Object::Tuple>()) {
      items = &tuple->items;
    }
    if (items == nullptr || items->size() != 2) return false;
    const std::optional<double> first = ToDouble((*items)[0]);
    const std::optional<double> second = ToDouble((*items)[1]);
    if (!first.has_value() || !second.has_value()) return false;
    std::get<Pair& (*)(Options&)>(field.access)(options) = {*first, *second};
    return true;
  }

  absl::Status WriteAll(const ObjectDict& values, Options& options) const {
    constexpr const char* kKinds[] = {"a number", "a bool",
                                      "a tuple of two numbers"};
    for (const NativeField<Options>& field : tables_.native) {
      const Object* value = values.Find(field.name);
      if (value == nullptr || Write(field, *value, options)) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          "\"", field.name, "\": expected ", kKinds[field.access.index()],
          ", found ", value->kind_name()));
    }
    return absl::OkStatus();
  }

  const CodecTables<Options, State> tables_;
};

}  // namespace dsd

#endif  // DSD_FRONTENDS_OPTIMIZER_TYPED_CODEC_H_
