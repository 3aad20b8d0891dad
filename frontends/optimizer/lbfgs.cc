// SPDX-License-Identifier: Apache-2.0
//
// LBFGS has one state for all parameters, in flat vectors over them, under the
// first one.

#include "torch/optim/lbfgs.h"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/scalar_tensor.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/optimizer/builtin_codecs.h"
#include "dsd/frontends/optimizer/typed_codec.h"

namespace dsd {
namespace {

using Options = torch::optim::LBFGSOptions;
using State = torch::optim::LBFGSParamState;

constexpr char kFuncEvals[] = "func_evals";
constexpr char kIterations[] = "n_iter";
constexpr char kAlphas[] = "al";
constexpr char kDirection[] = "d";
constexpr char kStepSize[] = "t";
constexpr char kOldDirections[] = "old_dirs";
constexpr char kOldSteps[] = "old_stps";
constexpr char kRo[] = "ro";
constexpr char kHessian[] = "H_diag";
constexpr char kGradient[] = "prev_flat_grad";
constexpr char kLoss[] = "prev_loss";
constexpr char kLineSearch[] = "line_search_fn";
constexpr char kHistorySize[] = "history_size";

// Made with the direction, at the end of the first step that moved.
constexpr const char* kMadeByAStep[] = {kDirection, kStepSize, kOldDirections,
                                        kOldSteps,  kRo,       kHessian,
                                        kGradient,  kLoss};

const Value* FindSet(const StateDict& entries, const char* key) {
  const Value* value = entries.Find(key);
  return value == nullptr || value->is<None>() ? nullptr : value;
}

// The items of a list or tuple; null for anything else.
const std::vector<Value>* ItemsOf(const Value& value) {
  if (const auto* tuple = value.get_if<Value::Tuple>()) return &tuple->items;
  return value.get_if<Value::List>();
}

absl::StatusOr<const std::vector<Value>*> ListAt(const Value& value,
                                                 absl::string_view key) {
  const std::vector<Value>* const items = ItemsOf(value);
  if (items == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", key, "\": expected a list, found ", value.kind_name()));
  }
  return items;
}

template <class Tensors>
Value ListOf(const Tensors& tensors) {
  Value::List list;
  for (const at::Tensor& tensor : tensors) {
    list.push_back(tensor.defined() ? Value(TensorValue(tensor)) : Value());
  }
  return Value(std::move(list));
}

absl::StatusOr<double> NumberAt(const StateDict& entries, const char* key) {
  const Value* value = FindSet(entries, key);
  if (value == nullptr) return 0.0;
  const absl::StatusOr<Object> object = ToObject(*value);
  DSD_RETURN_IF_ERROR(object) << "\"" << key << "\"";
  double number = 0;
  if (!internal::FromHyperparameter(*object, number)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", key, "\": expected a number, found ", object->kind_name()));
  }
  return number;
}

absl::StatusOr<int64_t> CountAt(const StateDict& entries, const char* key) {
  DSD_ASSIGN_OR_RETURN(const double number, NumberAt(entries, key));
  int64_t count = 0;
  if (!internal::FromHyperparameter(Object(number), count) || count < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", key, "\": expected a count, found ", number));
  }
  return count;
}

// A tensor; 0-dim from a number, if that is what there is.
absl::StatusOr<at::Tensor> TensorOf(const Value& value) {
  if (const auto* tensor = value.get_if<TensorValue>()) return tensor->Local();
  return TorchToStatus([&]() -> absl::StatusOr<at::Tensor> {
    if (const auto* v = value.get_if<int64_t>()) {
      return at::scalar_tensor(*v, c10::kLong);
    }
    if (const auto* v = value.get_if<double>()) {
      return at::scalar_tensor(*v, c10::kDouble);
    }
    return absl::InvalidArgumentError(absl::StrCat(
        "expected a number or a tensor, found ", value.kind_name()));
  });
}

absl::Status CheckTensor(absl::string_view name, const Value& value,
                         const Dims& shape) {
  const auto* tensor = value.get_if<TensorValue>();
  const std::string found =
      tensor == nullptr ? std::string(value.kind_name())
      : !tensor->defined()
          ? "an undefined tensor"
          : absl::StrCat(tensor->is_plain() ? "a tensor of shape "
                                            : "a sharded tensor of shape ",
                         DimsToString(tensor->shape()));
  if (tensor != nullptr && tensor->defined() && tensor->shape() == shape) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("\"", name, "\": expected a tensor of shape ",
                   DimsToString(shape), ", found ", found));
}

absl::Status CheckScalar(absl::string_view name, const Value& value) {
  if (value.is<int64_t>() || value.is<double>()) return absl::OkStatus();
  return CheckTensor(name, value, {});
}

class LbfgsCodec : public OptionsCodec<torch::optim::LBFGS, Options> {
 public:
  using OptionsCodec::OptionsCodec;

  absl::Status CheckHyperparameters(
      const torch::optim::OptimizerOptions& options, const ObjectDict& values,
      bool strict) const override {
    DSD_RETURN_IF_ERROR(
        OptionsCodec::CheckHyperparameters(options, values, strict));
    const Object* search = values.Find(kLineSearch);
    const auto* name =
        search == nullptr ? nullptr : search->get_if<std::string>();
    if (name != nullptr && *name != "strong_wolfe") {
      return absl::InvalidArgumentError(absl::StrCat(
          "\"", kLineSearch, "\": expected \"strong_wolfe\" or None, found \"",
          *name, "\""));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<StateField>> StateFields(
      const ObjectDict& /*hyperparameters*/) const override {
    std::vector<StateField> fields;
    for (const char* name :
         {kFuncEvals, kIterations, kAlphas, kDirection, kStepSize,
          kOldDirections, kOldSteps, kRo, kHessian, kGradient, kLoss}) {
      fields.push_back({name, StateField::Shape::kAny, /*required=*/false});
    }
    return fields;
  }

  bool has_group_state() const override { return true; }

  absl::StatusOr<StateDict> GetState(
      const torch::optim::OptimizerParamState& base) const override {
    DSD_ASSIGN_OR_RETURN(State* const state, TypedState<State>(base));
    StateDict entries;
    entries.Set(kFuncEvals, Value(state->func_evals()));
    entries.Set(kIterations, Value(state->n_iter()));
    if (state->al().has_value()) entries.Set(kAlphas, ListOf(*state->al()));
    if (!state->d().defined()) return entries;
    entries.Set(kDirection, Value(TensorValue(state->d())));
    entries.Set(kStepSize, Value(state->t()));
    entries.Set(kOldDirections, ListOf(state->old_dirs()));
    entries.Set(kOldSteps, ListOf(state->old_stps()));
    entries.Set(kRo, ListOf(state->ro()));
    entries.Set(kHessian, Value(TensorValue(state->H_diag())));
    entries.Set(kGradient, Value(TensorValue(state->prev_flat_grad())));
    entries.Set(kLoss, Value(state->prev_loss()));
    return entries;
  }

  absl::StatusOr<StateDict> InertState(
      const torch::optim::OptimizerOptions& /*options*/,
      const at::Tensor& /*param*/) const override {
    return StateDict();
  }

  absl::Status CheckState(absl::Span<const at::Tensor> params,
                          const ObjectDict& hyperparameters,
                          const StateDict& entries) const override {
    for (const char* key : {kFuncEvals, kIterations}) {
      DSD_RETURN_IF_ERROR(CountAt(entries, key));
    }
    const bool has_moved = FindSet(entries, kDirection) != nullptr;
    for (const char* key : kMadeByAStep) {
      if ((FindSet(entries, key) != nullptr) != has_moved) {
        return absl::InvalidArgumentError(absl::StrCat(
            "\"", key, "\" is ", has_moved ? "missing" : "there", " but \"",
            kDirection, "\" is ", has_moved ? "there" : "missing",
            "; the state of LBFGS is loaded as a whole"));
      }
    }
    Options options;
    DSD_RETURN_IF_ERROR(table().Write(hyperparameters, options));
    if (const Value* alphas = FindSet(entries, kAlphas)) {
      DSD_ASSIGN_OR_RETURN(const std::vector<Value>* const items,
                           ListAt(*alphas, kAlphas));
      // Scratch, but LibTorch writes all of the history there.
      if (static_cast<int64_t>(items->size()) != options.history_size()) {
        return absl::InvalidArgumentError(absl::StrCat(
            "\"", kAlphas, "\" has ", items->size(), " entries, but \"",
            kHistorySize, "\" is ", options.history_size(), "; leave it out"));
      }
      for (size_t i = 0; i < items->size(); ++i) {
        if ((*items)[i].is<None>()) continue;
        DSD_RETURN_IF_ERROR(
            CheckScalar(absl::StrCat(kAlphas, ".", i), (*items)[i]));
      }
    }
    if (!has_moved) return absl::OkStatus();

    int64_t elements = 0;
    for (const at::Tensor& param : params) elements += param.numel();
    const Dims flat = {elements};
    for (const char* key : {kDirection, kGradient}) {
      DSD_RETURN_IF_ERROR(CheckTensor(key, *entries.Find(key), flat));
    }
    for (const char* key : {kStepSize, kLoss}) {
      DSD_RETURN_IF_ERROR(NumberAt(entries, key));
    }
    DSD_RETURN_IF_ERROR(CheckScalar(kHessian, *entries.Find(kHessian)));
    std::optional<size_t> length;
    for (const absl::string_view key : {kOldDirections, kOldSteps, kRo}) {
      DSD_ASSIGN_OR_RETURN(const std::vector<Value>* const items,
                           ListAt(*entries.Find(key), key));
      if (static_cast<int64_t>(items->size()) > options.history_size()) {
        return absl::InvalidArgumentError(absl::StrCat(
            "\"", key, "\" has ", items->size(), " entries, more than \"",
            kHistorySize, "\", which is ", options.history_size()));
      }
      if (length.value_or(items->size()) != items->size()) {
        return absl::InvalidArgumentError(absl::StrCat(
            "\"", key, "\" has ", items->size(), " entries, but \"",
            kOldDirections, "\" has ", *length));
      }
      length = items->size();
      for (size_t i = 0; i < items->size(); ++i) {
        const std::string name = absl::StrCat(key, ".", i);
        DSD_RETURN_IF_ERROR(key == kRo ? CheckScalar(name, (*items)[i])
                                       : CheckTensor(name, (*items)[i], flat));
      }
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<torch::optim::OptimizerParamState>> MakeState(
      const StateDict& entries) const override {
    auto state = std::make_unique<State>();
    DSD_ASSIGN_OR_RETURN(state->func_evals(), CountAt(entries, kFuncEvals));
    DSD_ASSIGN_OR_RETURN(state->n_iter(), CountAt(entries, kIterations));
    if (const Value* alphas = FindSet(entries, kAlphas)) {
      DSD_ASSIGN_OR_RETURN(state->al(),
                           Tensors<std::vector<at::Tensor>>(*alphas));
    }
    if (FindSet(entries, kDirection) != nullptr) {
      DSD_ASSIGN_OR_RETURN(state->d(), TensorOf(*entries.Find(kDirection)));
      DSD_ASSIGN_OR_RETURN(state->t(), NumberAt(entries, kStepSize));
      DSD_ASSIGN_OR_RETURN(state->old_dirs(),
                           Tensors<Deque>(*entries.Find(kOldDirections)));
      DSD_ASSIGN_OR_RETURN(state->old_stps(),
                           Tensors<Deque>(*entries.Find(kOldSteps)));
      DSD_ASSIGN_OR_RETURN(state->ro(), Tensors<Deque>(*entries.Find(kRo)));
      DSD_ASSIGN_OR_RETURN(state->H_diag(), TensorOf(*entries.Find(kHessian)));
      DSD_ASSIGN_OR_RETURN(state->prev_flat_grad(),
                           TensorOf(*entries.Find(kGradient)));
      DSD_ASSIGN_OR_RETURN(state->prev_loss(), NumberAt(entries, kLoss));
    }
    return std::unique_ptr<torch::optim::OptimizerParamState>(std::move(state));
  }

 private:
  using Deque = std::deque<at::Tensor>;

  // Precondition: a list. None becomes an undefined tensor.
  template <class Container>
  static absl::StatusOr<Container> Tensors(const Value& list) {
    Container tensors;
    for (const Value& item : *ItemsOf(list)) {
      at::Tensor tensor;
      if (!item.is<None>()) {
        DSD_ASSIGN_OR_RETURN(tensor, TensorOf(item));
      }
      tensors.push_back(std::move(tensor));
    }
    return tensors;
  }
};

}  // namespace

std::unique_ptr<const OptimizerCodec> MakeLbfgsCodec() {
  std::vector<NativeField<Options>> native = {
      {"lr", +[](Options& o) -> double& { return o.lr(); }},
      {"max_iter", +[](Options& o) -> int64_t& { return o.max_iter(); }},
      {"max_eval",
       +[](Options& o) -> std::optional<int64_t>& { return o.max_eval(); }},
      {"tolerance_grad",
       +[](Options& o) -> double& { return o.tolerance_grad(); }},
      {"tolerance_change",
       +[](Options& o) -> double& { return o.tolerance_change(); }},
      {kHistorySize, +[](Options& o) -> int64_t& { return o.history_size(); }},
      {kLineSearch,
       +[](Options& o) -> std::optional<std::string>& {
         return o.line_search_fn();
       }},
  };
  return std::make_unique<LbfgsCodec>(
      HyperparameterTable<Options>("LBFGS", std::move(native), {}));
}

}  // namespace dsd
