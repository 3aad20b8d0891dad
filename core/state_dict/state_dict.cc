// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/state_dict.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/empty.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {
namespace {

// Rebuilds a tree with another tensor type; `leaf` makes the node of a tensor.
template <class From, class To, class Leaf>
absl::StatusOr<BasicValue<To>> Convert(const BasicValue<From>& from,
                                       const Leaf& leaf) {
  using In = BasicValue<From>;
  using Out = BasicValue<To>;
  const auto convert_items = [&](const std::vector<In>& items,
                                 std::vector<Out>& out) -> absl::Status {
    out.reserve(items.size());
    for (const In& item : items) {
      absl::StatusOr<Out> converted = Convert<From, To>(item, leaf);
      DSD_RETURN_IF_ERROR(converted);
      out.push_back(*std::move(converted));
    }
    return absl::OkStatus();
  };
  if (const auto* v = from.template get_if<bool>()) return Out(*v);
  if (const auto* v = from.template get_if<int64_t>()) return Out(*v);
  if (const auto* v = from.template get_if<double>()) return Out(*v);
  if (const auto* v = from.template get_if<std::string>()) return Out(*v);
  if (const auto* v = from.template get_if<Bytes>()) return Out(*v);
  if (const auto* v = from.template get_if<Complex>()) return Out(*v);
  if (const auto* v = from.template get_if<WideInt>()) return Out(*v);
  if (const auto* v = from.template get_if<Opaque>()) return Out(*v);
  if (const auto* v = from.template get_if<From>()) return leaf(*v);
  if (const auto* v = from.template get_if<typename In::List>()) {
    typename Out::List list;
    DSD_RETURN_IF_ERROR(convert_items(*v, list));
    return Out(std::move(list));
  }
  if (const auto* v = from.template get_if<typename In::Tuple>()) {
    typename Out::Tuple tuple;
    DSD_RETURN_IF_ERROR(convert_items(v->items, tuple.items));
    return Out(std::move(tuple));
  }
  if (const auto* v = from.template get_if<typename In::Set>()) {
    typename Out::Set set;
    set.is_frozen = v->is_frozen;
    DSD_RETURN_IF_ERROR(convert_items(v->items, set.items));
    return Out(std::move(set));
  }
  if (const auto* v = from.template get_if<typename In::Map>()) {
    typename Out::Map map;
    DSD_RETURN_IF_ERROR(convert_items(v->keys, map.keys));
    DSD_RETURN_IF_ERROR(convert_items(v->values, map.values));
    return Out(std::move(map));
  }
  if (const auto* v = from.template get_if<typename In::Dict>()) {
    typename Out::Dict dict;
    for (size_t i = 0; i < v->size(); ++i) {
      absl::StatusOr<Out> converted = Convert<From, To>(v->value(i), leaf);
      DSD_RETURN_IF_ERROR(converted) << "key \"" << v->key_text(i) << "\"";
      dict.Set(v->key(i), *std::move(converted));
    }
    return Out(std::move(dict));
  }
  return Out();
}

absl::StatusOr<Object> ScalarToObject(const TensorValue& value) {
  if (!value.is_plain() || !value.defined() ||
      Box::Whole(value.shape()).num_elements() != 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "expected a number or a tensor of one element, found a tensor ",
        value.defined() ? absl::StrCat("of shape ", DimsToString(value.shape()))
                        : "that is undefined"));
  }
  return TorchToStatus([&]() -> absl::StatusOr<Object> {
    const at::Tensor& tensor = value.locals()[0];
    const c10::ScalarType type = tensor.scalar_type();
    if (c10::isComplexType(type)) {
      return absl::InvalidArgumentError(
          "expected a real number, found a complex one");
    }
    // A step of every parameter: without the dispatcher.
    if (tensor.is_cpu() && !tensor.is_neg()) {
      if (type == c10::kFloat) {
        return Object(static_cast<double>(*tensor.const_data_ptr<float>()));
      }
      if (type == c10::kDouble) return Object(*tensor.const_data_ptr<double>());
      if (type == c10::kLong) return Object(*tensor.const_data_ptr<int64_t>());
    }
    if (type == c10::ScalarType::Bool) return Object(tensor.item().toBool());
    if (c10::isIntegralType(type, /*includeBool=*/false)) {
      return Object(tensor.item().toLong());
    }
    return Object(tensor.item().toDouble());
  });
}

using TensorVisitor = absl::FunctionRef<void(const std::string&, TensorValue&)>;

void VisitTensors(StateDict& dict, std::string& path, TensorVisitor visit);

// Those of `value`, which is at `path`. A path is one text that grows and
// shrinks.
void VisitTensors(Value& value, std::string& path, TensorVisitor visit) {
  if (auto* tensor = value.get_if<TensorValue>()) {
    visit(path, *tensor);
  } else if (auto* dict = value.get_if<StateDict>()) {
    VisitTensors(*dict, path, visit);
  } else {
    std::vector<Value>* items = value.get_if<Value::List>();
    if (auto* tuple = value.get_if<Value::Tuple>()) items = &tuple->items;
    for (size_t i = 0; items != nullptr && i < items->size(); ++i) {
      if ((*items)[i].is<TensorValue>() || (*items)[i].is_container()) {
        const size_t size = path.size();
        absl::StrAppend(&path, path.empty() ? "" : ".", i);
        VisitTensors((*items)[i], path, visit);
        path.resize(size);
      }
    }
  }
}

void VisitTensors(StateDict& dict, std::string& path, TensorVisitor visit) {
  for (size_t i = 0; i < dict.size(); ++i) {
    const Value& value = std::as_const(dict).value(i);
    if (!value.is<TensorValue>() && !value.is_container()) continue;
    const size_t size = path.size();
    if (!path.empty()) path.push_back('.');
    std::visit([&](const auto& key) { absl::StrAppend(&path, key); },
               dict.key(i));
    VisitTensors(dict.value(i), path, visit);
    path.resize(size);
  }
}

size_t CountIn(const Value& value) {
  if (value.is<TensorValue>()) return 1;
  if (const auto* dict = value.get_if<StateDict>()) return CountTensors(*dict);
  const std::vector<Value>* items = value.get_if<Value::List>();
  if (const auto* tuple = value.get_if<Value::Tuple>()) items = &tuple->items;
  size_t count = 0;
  for (size_t i = 0; items != nullptr && i < items->size(); ++i) {
    count += CountIn((*items)[i]);
  }
  return count;
}

}  // namespace

void ForEachTensor(
    Value& value, const std::string& name,
    absl::FunctionRef<void(const std::string&, TensorValue&)> visit) {
  std::string path = name;
  VisitTensors(value, path, visit);
}

void ForEachTensor(
    StateDict& dict, const std::string& name,
    absl::FunctionRef<void(const std::string&, TensorValue&)> visit) {
  std::string path = name;
  VisitTensors(dict, path, visit);
}

size_t CountTensors(const StateDict& dict) {
  size_t count = 0;
  for (size_t i = 0; i < dict.size(); ++i) count += CountIn(dict.value(i));
  return count;
}

absl::StatusOr<Object> ToObject(const Value& value) {
  return Convert<TensorValue, HostTensor>(value, ScalarToObject);
}

Value FromObject(const Object& object) {
  return *Convert<HostTensor, TensorValue>(
      object, [](const HostTensor& from) -> absl::StatusOr<Value> {
        absl::StatusOr<Value> tensor =
            TorchToStatus([&]() -> absl::StatusOr<Value> {
              at::Tensor to = at::empty(
                  from.shape(), at::TensorOptions(ToScalarType(from.dtype())));
              std::memcpy(to.data_ptr(), from.bytes().data(),
                          from.bytes().size());
              return Value(TensorValue(std::move(to)));
            });
        // Only for want of memory.
        return tensor.ok() ? *std::move(tensor) : Value();
      });
}

}  // namespace dsd
