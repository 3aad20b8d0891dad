// SPDX-License-Identifier: Apache-2.0
//
// Nested dicts as flat keys and back, by the grammar of
// torch.distributed.checkpoint (torch >= 2.4): dicts are always descended into;
// a list if it has a tensor, a dict or a descended list in it; tuples never.
// The flat key is the path joined by dots; an empty dict leaves no key.

#ifndef DSD_CORE_VALUE_FLATTEN_H_
#define DSD_CORE_VALUE_FLATTEN_H_

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/value/value.h"

namespace dsd {

// Path components joined by dots.
inline std::string JoinPath(const Path& path) {
  return absl::StrJoin(path, ".", [](std::string* out, const PathSegment& s) {
    std::visit([out](const auto& v) { absl::StrAppend(out, v); }, s);
  });
}

// Whether the flat form goes on below `value`.
template <class TensorT>
bool IsDescended(const BasicValue<TensorT>& value) {
  if (value.template is<BasicDict<TensorT>>()) return true;
  const auto* list =
      value.template get_if<typename BasicValue<TensorT>::List>();
  if (list == nullptr) return false;
  for (const BasicValue<TensorT>& item : *list) {
    if (item.template is<TensorT>() || IsDescended(item)) return true;
  }
  return false;
}

namespace internal {

template <class ValueT, class TensorT>
void VisitLeaves(ValueT& value, Path& path,
                 absl::FunctionRef<void(const Path&, ValueT&)> visit) {
  if (!IsDescended<TensorT>(value)) {
    visit(path, value);
    return;
  }
  if (auto* dict = value.template get_if<BasicDict<TensorT>>()) {
    for (size_t i = 0; i < dict->size(); ++i) {
      path.push_back(dict->key_text(i));
      VisitLeaves<ValueT, TensorT>(dict->value(i), path, visit);
      path.pop_back();
    }
    return;
  }
  auto& list = *value.template get_if<typename BasicValue<TensorT>::List>();
  for (size_t i = 0; i < list.size(); ++i) {
    path.push_back(static_cast<int64_t>(i));
    VisitLeaves<ValueT, TensorT>(list[i], path, visit);
    path.pop_back();
  }
}

}  // namespace internal

// Calls `visit` for each leaf of the flat form, in order.
template <class TensorT>
void VisitLeaves(
    const BasicValue<TensorT>& root,
    absl::FunctionRef<void(const Path&, const BasicValue<TensorT>&)> visit) {
  Path path;
  internal::VisitLeaves<const BasicValue<TensorT>, TensorT>(root, path, visit);
}
template <class TensorT>
void VisitLeaves(
    BasicValue<TensorT>& root,
    absl::FunctionRef<void(const Path&, BasicValue<TensorT>&)> visit) {
  Path path;
  internal::VisitLeaves<BasicValue<TensorT>, TensorT>(root, path, visit);
}

// Puts `value` at `path` under `root`, making dicts (before a text segment) and
// lists padded with None (before an integer) on the way. InvalidArgument if
// something of another kind is in the way, or for a list index over
// `max_index`.
template <class TensorT>
absl::Status SetAtPath(BasicValue<TensorT>& root, const Path& path,
                       BasicValue<TensorT> value,
                       int64_t max_index = 1'000'000) {
  using Value = BasicValue<TensorT>;
  Value* at = &root;
  for (const PathSegment& segment : path) {
    if (const auto* key = std::get_if<std::string>(&segment)) {
      if (at->template is<None>()) *at = typename Value::Dict();
      auto* dict = at->template get_if<typename Value::Dict>();
      if (dict == nullptr) {
        return absl::InvalidArgumentError(absl::StrCat(
            "key \"", JoinPath(path), "\": expected a dict above \"", *key,
            "\", found ", at->kind_name()));
      }
      Value* next = dict->Find(segment);
      at = next != nullptr ? next : &dict->Set(segment, Value());
    } else {
      const int64_t index = std::get<int64_t>(segment);
      if (at->template is<None>()) *at = typename Value::List();
      auto* list = at->template get_if<typename Value::List>();
      if (list == nullptr || index < 0 || index > max_index) {
        return absl::InvalidArgumentError(
            absl::StrCat("key \"", JoinPath(path), "\": expected a list above ",
                         index, ", found ", at->kind_name()));
      }
      if (static_cast<size_t>(index) >= list->size()) list->resize(index + 1);
      at = &(*list)[index];
    }
  }
  *at = std::move(value);
  return absl::OkStatus();
}

}  // namespace dsd

#endif  // DSD_CORE_VALUE_FLATTEN_H_
