// SPDX-License-Identifier: Apache-2.0
//
// Definitions of value.h's templates.

#ifndef DSD_CORE_VALUE_VALUE_INL_H_
#define DSD_CORE_VALUE_VALUE_INL_H_

#include "absl/strings/str_cat.h"
#include "dsd/core/value/value.h"

namespace dsd {

template <class TensorT>
std::string BasicDict<TensorT>::key_text(size_t i) const {
  if (const auto* text = std::get_if<std::string>(&keys_[i])) return *text;
  return absl::StrCat(std::get<int64_t>(keys_[i]));
}

template <class TensorT>
const BasicValue<TensorT>* BasicDict<TensorT>::Find(
    const PathSegment& key) const {
  const auto it = index_.find(key);
  return it == index_.end() ? nullptr : &values_[it->second];
}

template <class TensorT>
BasicValue<TensorT>* BasicDict<TensorT>::Find(const PathSegment& key) {
  const auto it = index_.find(key);
  return it == index_.end() ? nullptr : &values_[it->second];
}

template <class TensorT>
BasicValue<TensorT>& BasicDict<TensorT>::Set(PathSegment key, Value value) {
  const auto [it, is_new] = index_.try_emplace(key, keys_.size());
  if (is_new) {
    keys_.push_back(std::move(key));
    values_.push_back(std::move(value));
  } else {
    values_[it->second] = std::move(value);
  }
  return values_[it->second];
}

template <class TensorT>
bool BasicDict<TensorT>::Erase(const PathSegment& key) {
  const auto it = index_.find(key);
  if (it == index_.end()) return false;
  const size_t position = it->second;
  index_.erase(it);
  keys_.erase(keys_.begin() + position);
  values_.erase(values_.begin() + position);
  for (size_t i = position; i < keys_.size(); ++i) index_[keys_[i]] = i;
  return true;
}

template <class TensorT>
absl::string_view BasicValue<TensorT>::kind_name() const {
  if (is<None>()) return "None";
  if (is<bool>()) return "bool";
  if (is<int64_t>()) return "int";
  if (is<double>()) return "float";
  if (is<std::string>()) return "str";
  if (is<Bytes>()) return "bytes";
  if (is<List>()) return "list";
  if (is<Tuple>()) return "tuple";
  if (is<Dict>()) return "dict";
  if (const Opaque* opaque = get_if<Opaque>()) return opaque->type_name;
  return "tensor";
}

}  // namespace dsd

#endif  // DSD_CORE_VALUE_VALUE_INL_H_
