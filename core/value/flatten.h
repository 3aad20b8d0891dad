// SPDX-License-Identifier: Apache-2.0
//
// Nested dicts as flat keys and back, by the grammar of
// torch.distributed.checkpoint (torch >= 2.4): dicts are always descended into;
// a list if it has a tensor, a dict or a descended list in it; tuples never.
// The flat key is the path joined by dots; an empty dict leaves no key.

#ifndef DSD_CORE_VALUE_FLATTEN_H_
#define DSD_CORE_VALUE_FLATTEN_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/value/value.h"

namespace dsd {

// Path components joined by dots.
inline std::string JoinPath(const Path& path) {
  return absl::StrJoin(path, ".", [](std::string* out, const PathSegment& s) {
    std::visit([out](const auto& v) { absl::StrAppend(out, v); }, s);
  });
}

// The number that a key in decimal is.
inline std::optional<int64_t> ToNumberKey(absl::string_view key) {
  int64_t number;
  if (!absl::SimpleAtoi(key, &number) || absl::StrCat(number) != key) {
    return std::nullopt;
  }
  return number;
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

// What flat keys do not say of the dicts and lists above them.
struct Nesting {
  // Dicts whose keys are numbers; those of them that look like one.
  std::vector<Path> number_keyed;
  // Dicts with nothing in them, but for the root.
  std::vector<Path> empty;
  // Lists that are tuples, where a format descends into these.
  std::vector<Path> tuples;
};

// The keys of one dict, for what a Nesting says of it.
class DictKeys {
 public:
  void Add(const PathSegment& key) {
    const auto* text = std::get_if<std::string>(&key);
    empty_ = false;
    has_number_ |= text == nullptr;
    has_text_like_one_ |= text != nullptr && ToNumberKey(*text).has_value();
  }

  // Mentions the dict at `path` if there is something to say.
  void AddTo(const Path& path, Nesting& nesting) const {
    if (empty_ && !path.empty()) nesting.empty.push_back(path);
    if (has_number_ && !has_text_like_one_) {
      nesting.number_keyed.push_back(path);
    }
  }

 private:
  bool empty_ = true;
  bool has_number_ = false;
  bool has_text_like_one_ = false;
};

namespace internal {

template <class TensorT>
void FindNesting(const BasicValue<TensorT>& value, Path& path,
                 Nesting& nesting) {
  if (!IsDescended<TensorT>(value)) return;
  if (const auto* dict = value.template get_if<BasicDict<TensorT>>()) {
    DictKeys keys;
    for (size_t i = 0; i < dict->size(); ++i) keys.Add(dict->key(i));
    keys.AddTo(path, nesting);
    for (size_t i = 0; i < dict->size(); ++i) {
      path.push_back(dict->key_text(i));
      FindNesting<TensorT>(dict->value(i), path, nesting);
      path.pop_back();
    }
    return;
  }
  const auto& list =
      *value.template get_if<typename BasicValue<TensorT>::List>();
  for (size_t i = 0; i < list.size(); ++i) {
    path.push_back(static_cast<int64_t>(i));
    FindNesting<TensorT>(list[i], path, nesting);
    path.pop_back();
  }
}

}  // namespace internal

// Of the dicts that the flat form of `root` descends into.
template <class TensorT>
Nesting NestingOf(const BasicValue<TensorT>& root) {
  Nesting nesting;
  Path path;
  internal::FindNesting<TensorT>(root, path, nesting);
  return nesting;
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

namespace internal {

// Null if nothing is there.
template <class TensorT>
BasicValue<TensorT>* FindAtPath(BasicValue<TensorT>& root, const Path& path) {
  using Value = BasicValue<TensorT>;
  Value* at = &root;
  for (const PathSegment& segment : path) {
    const auto* index = std::get_if<int64_t>(&segment);
    if (auto* dict = at->template get_if<typename Value::Dict>()) {
      at = dict->Find(segment);
    } else if (auto* list = at->template get_if<typename Value::List>();
               list != nullptr && index != nullptr && *index >= 0 &&
               static_cast<size_t>(*index) < list->size()) {
      at = &(*list)[*index];
    } else {
      return nullptr;
    }
    if (at == nullptr) return nullptr;
  }
  return at;
}

}  // namespace internal

// Makes true what `nesting` says of a tree that SetAtPath has made of flat
// keys. What does not fit is passed over.
template <class TensorT>
void RestoreNesting(const Nesting& nesting, BasicValue<TensorT>& root) {
  using Value = BasicValue<TensorT>;
  for (const Path& path : nesting.empty) {
    const Value* const there = internal::FindAtPath<TensorT>(root, path);
    if (there != nullptr && !there->template is<None>()) continue;
    SetAtPath<TensorT>(root, path, Value(typename Value::Dict())).IgnoreError();
  }
  // The deeper ones first: until then their keys are texts.
  std::vector<const Path*> paths;
  for (const Path& path : nesting.number_keyed) paths.push_back(&path);
  for (const Path& path : nesting.tuples) paths.push_back(&path);
  std::stable_sort(
      paths.begin(), paths.end(),
      [](const Path* a, const Path* b) { return a->size() > b->size(); });
  for (const Path* path : paths) {
    Value* const at = internal::FindAtPath<TensorT>(root, *path);
    if (at == nullptr) continue;
    if (auto* dict = at->template get_if<typename Value::Dict>()) {
      typename Value::Dict numbered;
      numbered.Reserve(dict->size());
      for (size_t i = 0; i < dict->size(); ++i) {
        const std::optional<int64_t> number = ToNumberKey(dict->key_text(i));
        numbered.Set(number.has_value() ? PathSegment(*number) : dict->key(i),
                     std::move(dict->value(i)));
      }
      *at = Value(std::move(numbered));
    } else if (auto* list = at->template get_if<typename Value::List>()) {
      *at = Value(typename Value::Tuple{std::move(*list)});
    }
  }
}

}  // namespace dsd

#endif  // DSD_CORE_VALUE_FLATTEN_H_
