// SPDX-License-Identifier: Apache-2.0
//
// The options of a class of LibTorch optimizers as hyperparameters under
// Python's names, made of a table of accessors.

#ifndef DSD_FRONTENDS_OPTIMIZER_HYPERPARAMETER_TABLE_H_
#define DSD_FRONTENDS_OPTIMIZER_HYPERPARAMETER_TABLE_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/state_dict.h"
#include "torch/optim/optimizer.h"

namespace dsd {

// A hyperparameter that the C++ class has.
template <class Options>
struct NativeField {
  using Pair = std::tuple<double, double>;
  using OptionalInt = std::optional<int64_t>;
  using OptionalText = std::optional<std::string>;
  std::string name;
  std::variant<double& (*)(Options&), bool& (*)(Options&), Pair& (*)(Options&),
               int64_t& (*)(Options&), OptionalInt& (*)(Options&),
               OptionalText& (*)(Options&)>
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

namespace internal {

inline Object ToHyperparameter(double value) { return Object(value); }
inline Object ToHyperparameter(bool value) { return Object(value); }
inline Object ToHyperparameter(int64_t value) { return Object(value); }
inline Object ToHyperparameter(const std::tuple<double, double>& value) {
  return Object(Object::Tuple{{std::get<0>(value), std::get<1>(value)}});
}
template <class T>
Object ToHyperparameter(const std::optional<T>& value) {
  return value.has_value() ? Object(*value) : Object();
}

// Whether `value` is of the kind; then it is in `out`.
inline bool FromHyperparameter(const Object& value, double& out) {
  if (const auto* v = value.get_if<double>()) {
    out = *v;
  } else if (const auto* n = value.get_if<int64_t>()) {
    out = static_cast<double>(*n);
  } else {
    return false;
  }
  return true;
}
inline bool FromHyperparameter(const Object& value, bool& out) {
  if (const auto* v = value.get_if<bool>()) {
    out = *v;
    return true;
  }
  // Python's optimizers take any number for a truth.
  const auto* number = value.get_if<int64_t>();
  if (number == nullptr || (*number != 0 && *number != 1)) return false;
  out = *number == 1;
  return true;
}
inline bool FromHyperparameter(const Object& value, int64_t& out) {
  constexpr double kMax = int64_t{1} << 53;
  if (const auto* v = value.get_if<int64_t>()) {
    out = *v;
    return true;
  }
  // A tensor of one element comes as a float.
  const auto* v = value.get_if<double>();
  if (v == nullptr || *v != std::floor(*v) || std::abs(*v) > kMax) return false;
  out = static_cast<int64_t>(*v);
  return true;
}
inline bool FromHyperparameter(const Object& value, std::string& out) {
  const auto* v = value.get_if<std::string>();
  if (v != nullptr) out = *v;
  return v != nullptr;
}
inline bool FromHyperparameter(const Object& value,
                               std::tuple<double, double>& out) {
  // A tuple that went through a list-only format comes back as a list.
  const std::vector<Object>* items = value.get_if<Object::List>();
  if (const auto* tuple = value.get_if<Object::Tuple>()) items = &tuple->items;
  return items != nullptr && items->size() == 2 &&
         FromHyperparameter((*items)[0], std::get<0>(out)) &&
         FromHyperparameter((*items)[1], std::get<1>(out));
}
template <class T>
bool FromHyperparameter(const Object& value, std::optional<T>& out) {
  if (value.is<None>()) {
    out.reset();
    return true;
  }
  T inner{};
  if (!FromHyperparameter(value, inner)) return false;
  out = std::move(inner);
  return true;
}

}  // namespace internal

// Immutable. Thread-safe. Options objects passed in may be of any class; those
// that are not of `Options` give FailedPrecondition.
template <class Options>
class HyperparameterTable {
 public:
  // `name`: the optimizer's class, for messages. `native` in Python's order;
  // those of `python` follow them.
  HyperparameterTable(std::string name,
                      std::vector<NativeField<Options>> native,
                      std::vector<PythonField> python)
      : name_(std::move(name)),
        native_(std::move(native)),
        python_(std::move(python)) {}

  absl::string_view name() const { return name_; }

  // The next three are those of OptimizerSource.
  absl::StatusOr<ObjectDict> Get(
      const torch::optim::OptimizerOptions& base) const {
    DSD_ASSIGN_OR_RETURN(const Options* const options, Typed(base));
    Options copy(*options);
    ObjectDict values;
    for (const NativeField<Options>& field : native_) {
      values.Set(field.name,
                 std::visit(
                     [&](auto access) {
                       return internal::ToHyperparameter(access(copy));
                     },
                     field.access));
    }
    for (const PythonField& field : python_) {
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

  absl::Status Check(const torch::optim::OptimizerOptions& base,
                     const ObjectDict& values, bool strict) const {
    DSD_ASSIGN_OR_RETURN(const Options* const options, Typed(base));
    Options copy(*options);
    DSD_RETURN_IF_ERROR(Write(values, copy));
    if (!strict) return absl::OkStatus();
    for (const PythonField& field : python_) {
      const Object* value = values.Find(field.name);
      if (field.changes_training && value != nullptr &&
          *value != field.default_value) {
        return absl::InvalidArgumentError(absl::StrCat(
            "\"", field.name, "\" has a value in the dict that LibTorch's ",
            name_,
            " cannot follow; set strict = false to keep it without effect"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Set(torch::optim::OptimizerParamGroup& group,
                   const ObjectDict& values) const {
    DSD_ASSIGN_OR_RETURN(Options * options, Typed(group.options()));
    DSD_RETURN_IF_ERROR(Write(values, *options));
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

  // Writes those of `values` that `options` has. InvalidArgument names one that
  // is of the wrong kind.
  absl::Status Write(const ObjectDict& values, Options& options) const {
    constexpr const char* kKinds[] = {"a number",
                                      "a bool",
                                      "a tuple of two numbers",
                                      "a whole number",
                                      "a whole number or None",
                                      "a text or None"};
    for (const NativeField<Options>& field : native_) {
      const Object* value = values.Find(field.name);
      if (value == nullptr) continue;
      const bool fits = std::visit(
          [&](auto access) {
            return internal::FromHyperparameter(*value, access(options));
          },
          field.access);
      if (fits) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          "\"", field.name, "\": expected ", kKinds[field.access.index()],
          ", found ", value->kind_name()));
    }
    return absl::OkStatus();
  }

  // InvalidArgument if the group's options are of another class.
  template <class Base>
  absl::StatusOr<
      std::conditional_t<std::is_const_v<Base>, const Options*, Options*>>
  Typed(Base& base) const {
    auto* const typed = dynamic_cast<
        std::conditional_t<std::is_const_v<Base>, const Options*, Options*>>(
        &base);
    if (typed == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the group has options of another class than ", name_, "'s"));
    }
    return typed;
  }

 private:
  bool IsNative(absl::string_view key) const {
    for (const NativeField<Options>& field : native_) {
      if (field.name == key) return true;
    }
    return false;
  }

  bool IsDefault(absl::string_view key, const Object& value) const {
    for (const PythonField& field : python_) {
      if (field.name == key) return field.default_value == value;
    }
    return false;
  }

  const std::string name_;
  const std::vector<NativeField<Options>> native_;
  const std::vector<PythonField> python_;
};

}  // namespace dsd

#endif  // DSD_FRONTENDS_OPTIMIZER_HYPERPARAMETER_TABLE_H_
