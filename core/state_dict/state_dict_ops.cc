// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/state_dict_ops.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "ATen/Functions.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "c10/core/GradMode.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/core/value/flatten.h"
#include "dsd/core/value/tree.h"
#include "dsd/core/value/value_text.h"

namespace dsd {
namespace {

std::string TypeText(const TensorValue& value) {
  const absl::StatusOr<DType> dtype = ToDType(value.scalar_type());
  return dtype.ok() ? std::string(DTypeName(*dtype))
                    : c10::toString(value.scalar_type());
}

std::string ShapeText(const TensorValue& value) {
  return DimsToString(value.shape());
}

std::string LayoutText(const TensorValue& value) {
  return value.is_plain() ? "whole" : value.layout().ToString();
}

std::string Join(const std::string& prefix, absl::string_view key) {
  return prefix.empty() ? std::string(key) : absl::StrCat(prefix, ".", key);
}

// Whether the value takes lines of its own in a tree: as in the keys of files.
bool IsBranch(const Value& value) {
  return IsDescended(value) &&
         !(value.is<StateDict>() && value.get_if<StateDict>()->empty());
}

// Of a list or tuple; null for anything else.
const Value::List* ItemsOf(const Value& value) {
  const auto* tuple = value.get_if<Value::Tuple>();
  return tuple != nullptr ? &tuple->items : value.get_if<Value::List>();
}
Value::List* MutableItemsOf(Value& value) {
  return const_cast<Value::List*>(ItemsOf(value));
}

bool HasElements(const at::Tensor& tensor) {
  return tensor.defined() && !tensor.is_meta();
}

// The only element as text.
std::string ElementText(const at::Tensor& tensor) {
  const c10::Scalar element = tensor.item();
  if (element.isBoolean()) return element.toBool() ? "True" : "False";
  if (element.isIntegral(/*includeBool=*/false)) {
    return absl::StrCat(element.toLong());
  }
  if (element.isComplex()) {
    const c10::complex<double> number = element.toComplexDouble();
    return absl::StrCat("(", FloatText(number.real()), ", ",
                        FloatText(number.imag()), ")");
  }
  return FloatText(element.toDouble());
}

// "float32 [3, 4] mesh[2] S(0), cuda:0".
std::string TensorText(const TensorValue& value) {
  if (!value.defined()) return "undefined";
  std::string text = absl::StrCat(
      TypeText(value), " ",
      value.is_plain() ? ShapeText(value) : value.layout().ToString());
  if (value.locals().empty()) return absl::StrCat(text, ", none of it here");
  const at::Tensor& local = value.locals()[0];
  if (!local.device().is_cpu()) {
    absl::StrAppend(&text, ", ", local.device().str());
  }
  if (value.is_plain() && local.numel() == 1 && HasElements(local)) {
    const absl::StatusOr<std::string> element =
        TorchToStatus([&] { return ElementText(local); });
    if (element.ok()) absl::StrAppend(&text, " = ", *element);
  }
  return text;
}

// Copies `value` leaf by leaf; `copy` makes the memory.
absl::StatusOr<StateDict> CopyTensors(
    const StateDict& from,
    absl::FunctionRef<absl::StatusOr<at::Tensor>(const at::Tensor&)> copy) {
  StateDict to = from;
  absl::flat_hash_map<const void*, TensorValue> copies;
  absl::Status status;
  ForEachTensor(to, "", [&](const std::string& name, TensorValue& leaf) {
    if (!status.ok() || !leaf.defined()) return;
    const auto known = copies.find(leaf.id());
    if (known != copies.end()) {
      leaf = known->second;
      return;
    }
    const void* const id = leaf.id();
    absl::StatusOr<TensorValue> copied = MapLocalTensors(leaf, copy);
    if (!copied.ok()) {
      status =
          Annotate(copied.status(), absl::StrCat("copy of \"", name, "\""));
      return;
    }
    leaf = *std::move(copied);
    copies.emplace(id, leaf);
  });
  DSD_RETURN_IF_ERROR(status);
  return to;
}

// "" or how the tensors differ apart from their elements.
std::string FormDifference(const TensorValue& a, const TensorValue& b) {
  const auto differ = [](absl::string_view what, absl::string_view in_a,
                         absl::string_view in_b) {
    return absl::StrCat(what, " ", in_a, " and ", in_b);
  };
  if (!a.defined() || !b.defined()) {
    if (a.defined() == b.defined()) return "";
    return differ("a tensor that is", a.defined() ? "defined" : "undefined",
                  b.defined() ? "defined" : "undefined");
  }
  if (a.scalar_type() != b.scalar_type()) {
    return differ("type", TypeText(a), TypeText(b));
  }
  if (a.shape() != b.shape())
    return differ("shape", ShapeText(a), ShapeText(b));
  if (a.is_plain() != b.is_plain() ||
      (!a.is_plain() && a.layout().symbols() != b.layout().symbols())) {
    return differ("layout", LayoutText(a), LayoutText(b));
  }
  if (!a.is_plain() && a.holder() != b.holder()) {
    return differ("the part of holder", absl::StrCat(a.holder()),
                  absl::StrCat(b.holder()));
  }
  return "";
}

// "" or how the elements of two tensors of equal type and shape differ.
std::string ElementDifference(const at::Tensor& first, const at::Tensor& second,
                              const DiffOptions& options) {
  if (!HasElements(first) || !HasElements(second) || first.numel() == 0) {
    return "";
  }
  const at::Tensor a = first.cpu().resolve_conj().resolve_neg().contiguous();
  const at::Tensor b = second.cpu().resolve_conj().resolve_neg().contiguous();
  if (a.data_ptr() == b.data_ptr() ||
      std::memcmp(a.data_ptr(), b.data_ptr(), a.nbytes()) == 0) {
    return "";
  }
  const int64_t item_size = a.element_size();
  const auto* const bytes_a = static_cast<const std::byte*>(a.data_ptr());
  const auto* const bytes_b = static_cast<const std::byte*>(b.data_ptr());
  at::Tensor close;  // empty: elements are compared by their bytes
  const bool is_inexact = a.is_floating_point() || a.is_complex();
  if (is_inexact && (options.rtol != 0 || options.atol != 0)) {
    const c10::ScalarType wide =
        a.is_complex() ? at::kComplexDouble : at::kDouble;
    close = at::isclose(a.to(wide), b.to(wide), options.rtol, options.atol,
                        /*equal_nan=*/true)
                .contiguous();
  }
  int64_t count = 0;
  int64_t at = -1;
  for (int64_t i = 0; i < a.numel(); ++i) {
    const bool equal =
        close.defined() ? close.const_data_ptr<bool>()[i]
                        : std::memcmp(bytes_a + i * item_size,
                                      bytes_b + i * item_size, item_size) == 0;
    if (equal) continue;
    if (count == 0) at = i;
    ++count;
  }
  if (count == 0) return "";
  const Dims shape = ToDims(a.sizes());
  Dims index(shape.size());
  int64_t rest = at;
  for (int d = static_cast<int>(shape.size()) - 1; d >= 0; --d) {
    index[d] = rest % shape[d];
    rest /= shape[d];
  }
  return absl::StrCat(count, " of ", a.numel(), " elements, the first at ",
                      DimsToString(index), ": ",
                      ElementText(a.reshape({-1})[at]), " and ",
                      ElementText(b.reshape({-1})[at]));
}

// Compares two trees and stops when enough differences are known.
class Differ {
 public:
  // `structure_only`: elements and values that are no tensors are not compared.
  explicit Differ(const DiffOptions& options, bool structure_only = false)
      : options_(options), structure_only_(structure_only) {}

  absl::Status Compare(const std::string& name, const Value& a,
                       const Value& b) {
    if (IsFull()) return absl::OkStatus();
    const auto* dict_a = a.get_if<StateDict>();
    const auto* dict_b = b.get_if<StateDict>();
    if (dict_a != nullptr && dict_b != nullptr) {
      return CompareDicts(name, *dict_a, *dict_b);
    }
    const auto* tensor_a = a.get_if<TensorValue>();
    const auto* tensor_b = b.get_if<TensorValue>();
    if (tensor_a != nullptr && tensor_b != nullptr) {
      return CompareTensors(name, *tensor_a, *tensor_b);
    }
    const bool may_differ = structure_only_ && !a.is_container() &&
                            !b.is_container() && tensor_a == nullptr &&
                            tensor_b == nullptr;
    if (may_differ) return absl::OkStatus();
    if (a.kind_name() != b.kind_name()) {
      Add(name, absl::StrCat(a.kind_name(), " and ", b.kind_name()));
      return absl::OkStatus();
    }
    const auto* items_a = ItemsOf(a);
    const auto* items_b = ItemsOf(b);
    if (items_a == nullptr || items_b == nullptr) {
      return CompareObjects(name, a, b);
    }
    if (items_a->size() != items_b->size()) {
      Add(name,
          absl::StrCat(items_a->size(), " and ", items_b->size(), " items"));
      return absl::OkStatus();
    }
    for (size_t i = 0; i < items_a->size(); ++i) {
      DSD_RETURN_IF_ERROR(
          Compare(Join(name, absl::StrCat(i)), (*items_a)[i], (*items_b)[i]));
    }
    return absl::OkStatus();
  }

  absl::Status CompareDicts(const std::string& name, const StateDict& a,
                            const StateDict& b) {
    for (size_t i = 0; i < a.size() && !IsFull(); ++i) {
      const std::string below = Join(name, a.key_text(i));
      const Value* const other = b.Find(a.key(i));
      if (other == nullptr) {
        Add(below, "only in the first");
        continue;
      }
      DSD_RETURN_IF_ERROR(Compare(below, a.value(i), *other));
    }
    bool same_keys = a.size() == b.size();
    for (size_t i = 0; i < b.size(); ++i) {
      if (a.Find(b.key(i)) != nullptr) continue;
      same_keys = false;
      Add(Join(name, b.key_text(i)), "only in the second");
    }
    for (size_t i = 0; same_keys && options_.compare_key_order && i < a.size();
         ++i) {
      if (a.key(i) == b.key(i)) continue;
      Add(name, absl::StrCat("key ", i, " is \"", a.key_text(i), "\" and \"",
                             b.key_text(i), "\""));
      break;
    }
    return absl::OkStatus();
  }

  std::vector<std::string> Finish() && { return std::move(differences_); }

 private:
  // Of one kind, neither of them a tensor or a container.
  absl::Status CompareObjects(const std::string& name, const Value& a,
                              const Value& b) {
    DSD_ASSIGN_OR_RETURN(const Object object_a, ToObject(a));
    DSD_ASSIGN_OR_RETURN(const Object object_b, ToObject(b));
    const auto* const number = object_a.get_if<double>();
    const bool both_nan = number != nullptr && std::isnan(*number) &&
                          std::isnan(*object_b.get_if<double>());
    if (object_a != object_b && !both_nan) {
      Add(name, absl::StrCat(Text(a), " and ", Text(b)));
    }
    return absl::OkStatus();
  }

  static std::string Text(const Value& value) {
    ValueTextOptions text_options;
    text_options.max_size = kMaxTextBytes;
    return ValueText<TensorValue>(value, TensorText, text_options);
  }

  absl::Status CompareTensors(const std::string& name, const TensorValue& a,
                              const TensorValue& b) {
    std::string difference = FormDifference(a, b);
    if (difference.empty() && a.defined() && !structure_only_) {
      for (size_t i = 0; i < a.locals().size() && difference.empty(); ++i) {
        DSD_ASSIGN_OR_RETURN(difference, TorchToStatus([&] {
                               return ElementDifference(
                                   a.locals()[i], b.locals()[i], options_);
                             }));
      }
    }
    if (!difference.empty()) Add(name, difference);
    return absl::OkStatus();
  }

  bool IsFull() const {
    return differences_.size() >= options_.max_differences;
  }

  void Add(const std::string& name, absl::string_view what) {
    if (IsFull()) return;
    differences_.push_back(
        absl::StrCat(name.empty() ? "the dict" : name, ": ", what));
  }

  static constexpr size_t kMaxTextBytes = 60;

  const DiffOptions& options_;
  const bool structure_only_;
  std::vector<std::string> differences_;
};

// Replaces the tensors of `into` by those of `tensors`, a tree of the same
// structure, and adds the pairs (before, after).
void PutTensors(Value& into, const Value& tensors,
                std::vector<std::pair<TensorValue, TensorValue>>& pairs) {
  if (auto* tensor = into.get_if<TensorValue>()) {
    const TensorValue& other = *tensors.get_if<TensorValue>();
    pairs.emplace_back(*tensor, other);
    *tensor = other;
  } else if (auto* dict = into.get_if<StateDict>()) {
    for (size_t i = 0; i < dict->size(); ++i) {
      PutTensors(dict->value(i),
                 *tensors.get_if<StateDict>()->Find(dict->key(i)), pairs);
    }
  } else if (Value::List* items = MutableItemsOf(into)) {
    for (size_t i = 0; i < items->size(); ++i) {
      PutTensors((*items)[i], (*ItemsOf(tensors))[i], pairs);
    }
  }
}

// The lines of `value` below a key that is indented by `indent`.
void AppendTree(const Value& value, int indent, std::string& out) {
  std::vector<std::pair<std::string, const Value*>> entries;
  if (const auto* dict = value.get_if<StateDict>()) {
    for (size_t i = 0; i < dict->size(); ++i) {
      entries.emplace_back(absl::Utf8SafeCEscape(dict->key_text(i)),
                           &dict->value(i));
    }
  } else if (const auto* list = value.get_if<Value::List>()) {
    for (size_t i = 0; i < list->size(); ++i) {
      entries.emplace_back(absl::StrCat(i), &(*list)[i]);
    }
  }
  constexpr size_t kMaxWidth = 40;
  constexpr size_t kMaxTextBytes = 100;
  size_t width = 0;
  for (const auto& [key, item] : entries) {
    if (!IsBranch(*item)) width = std::max(width, key.size());
  }
  width = std::min(width, kMaxWidth);
  for (const auto& [key, item] : entries) {
    absl::StrAppend(&out, std::string(indent, ' '), key);
    if (IsBranch(*item)) {
      out.push_back('\n');
      AppendTree(*item, indent + 2, out);
      continue;
    }
    ValueTextOptions text_options;
    text_options.max_size = kMaxTextBytes;
    absl::StrAppend(
        &out, std::string(width > key.size() ? width - key.size() : 0, ' '),
        "  ", ValueText<TensorValue>(*item, TensorText, text_options), "\n");
  }
}

// Calls add(flat key, tensor) for every leaf.
absl::Status ForEachPlainTensor(
    const StateDict& dict,
    absl::FunctionRef<void(const std::string&, const at::Tensor&)> add) {
  absl::flat_hash_set<std::string> keys;
  absl::Status status;
  VisitTree<TensorValue>(
      Value(dict), [&](const TreePath& path, const Value& value) {
        if (!status.ok() || (value.is<StateDict>() && path.empty())) return;
        const std::string key = TreePathText(path);
        const auto* tensor = value.get_if<TensorValue>();
        if (tensor == nullptr) {
          status = absl::InvalidArgumentError(absl::StrCat(
              "\"", key, "\" is of type ", value.kind_name(),
              ", expected a tensor; leave it out or keep it apart"));
          return;
        }
        if (!keys.insert(key).second) {
          status = absl::InvalidArgumentError(
              absl::StrCat("two values have the flat key \"", key, "\""));
          return;
        }
        const absl::StatusOr<at::Tensor> local = tensor->Local();
        if (!local.ok()) {
          status = absl::InvalidArgumentError(
              absl::StrCat("\"", key, "\": ", local.status().message()));
          return;
        }
        add(key, *local);
      });
  return status;
}

}  // namespace

absl::StatusOr<TensorValue> MapLocalTensors(
    const TensorValue& value,
    absl::FunctionRef<absl::StatusOr<at::Tensor>(const at::Tensor&)> map) {
  std::vector<at::Tensor> mapped;
  for (const at::Tensor& local : value.locals()) {
    if (!local.defined()) return value;
    DSD_ASSIGN_OR_RETURN(at::Tensor one, map(local));
    mapped.push_back(std::move(one));
  }
  if (value.is_plain()) return TensorValue(std::move(mapped[0]));
  if (mapped.empty()) return value;
  Sharding sharding{value.layout(), value.holder()};
  if (value.layout().kind() == Layout::Kind::kBoxes) {
    return TensorValue::FromBoxes(std::move(sharding), value.scalar_type(),
                                  std::move(mapped));
  }
  return TensorValue::Sharded(std::move(sharding), std::move(mapped[0]));
}

absl::StatusOr<StateDict> CloneStateDict(const StateDict& from) {
  return CopyTensors(from, [](const at::Tensor& tensor) {
    return TorchToStatus([&] { return tensor.detach().clone(); });
  });
}

absl::StatusOr<StateDict> CopyToHost(const StateDict& from) {
  return CopyTensors(from, [](const at::Tensor& tensor) {
    return TorchToStatus([&] {
      return at::empty(tensor.sizes(), tensor.options().device(at::kCPU))
          .copy_(tensor.detach());
    });
  });
}

absl::Status CopyStateDictInto(const StateDict& from, StateDict& to) {
  DiffOptions options;
  options.max_differences = 1;
  Differ differ(options, /*structure_only=*/true);
  DSD_RETURN_IF_ERROR(differ.CompareDicts("", from, to));
  const std::vector<std::string> differences = std::move(differ).Finish();
  if (!differences.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "copy into a state dict of another structure: ", differences[0]));
  }
  Value result(from);
  std::vector<std::pair<TensorValue, TensorValue>> pairs;
  PutTensors(result, Value(to), pairs);
  DSD_RETURN_IF_ERROR(TorchToStatus([&] {
    const c10::NoGradGuard no_grad;
    for (const auto& [source, target] : pairs) {
      for (size_t i = 0; i < source.locals().size(); ++i) {
        if (!source.locals()[i].defined()) continue;
        at::Tensor memory = target.locals()[i];
        memory.copy_(source.locals()[i]);
      }
    }
  }));
  to = std::move(*result.get_if<StateDict>());
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> DiffStateDicts(
    const StateDict& a, const StateDict& b, const DiffOptions& options) {
  Differ differ(options);
  DSD_RETURN_IF_ERROR(differ.CompareDicts("", a, b));
  return std::move(differ).Finish();
}

std::string StateDictText(const StateDict& dict) {
  std::string out;
  AppendTree(Value(dict), 0, out);
  return out;
}

absl::StatusOr<std::unordered_map<std::string, at::Tensor>> ToTensorMap(
    const StateDict& dict) {
  std::unordered_map<std::string, at::Tensor> out;
  DSD_RETURN_IF_ERROR(ForEachPlainTensor(
      dict, [&](const std::string& key, const at::Tensor& tensor) {
        out.emplace(key, tensor);
      }));
  return out;
}

absl::StatusOr<torch::OrderedDict<std::string, at::Tensor>> ToOrderedDict(
    const StateDict& dict) {
  torch::OrderedDict<std::string, at::Tensor> out("tensor");
  DSD_RETURN_IF_ERROR(ForEachPlainTensor(
      dict, [&](const std::string& key, const at::Tensor& tensor) {
        out.insert(key, tensor);
      }));
  return out;
}

absl::StatusOr<c10::Dict<std::string, at::Tensor>> ToC10Dict(
    const StateDict& dict) {
  c10::Dict<std::string, at::Tensor> out;
  DSD_RETURN_IF_ERROR(ForEachPlainTensor(
      dict, [&](const std::string& key, const at::Tensor& tensor) {
        out.insert(key, tensor);
      }));
  return out;
}

StateDict FromTensorMap(
    const std::unordered_map<std::string, at::Tensor>& tensors) {
  std::vector<std::string> keys;
  for (const auto& [key, tensor] : tensors) keys.push_back(key);
  std::sort(keys.begin(), keys.end());
  StateDict dict;
  for (std::string& key : keys) {
    const at::Tensor& tensor = tensors.at(key);
    dict.Set(std::move(key), Value(tensor));
  }
  return dict;
}

StateDict FromOrderedDict(
    const torch::OrderedDict<std::string, at::Tensor>& tensors) {
  StateDict dict;
  for (const auto& item : tensors) dict.Set(item.key(), Value(item.value()));
  return dict;
}

StateDict FromC10Dict(const c10::Dict<std::string, at::Tensor>& tensors) {
  StateDict dict;
  for (const auto& item : tensors) dict.Set(item.key(), Value(item.value()));
  return dict;
}

}  // namespace dsd
