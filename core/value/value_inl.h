// SPDX-License-Identifier: Apache-2.0
//
// Definitions of value.h's templates.

#ifndef DSD_CORE_VALUE_VALUE_INL_H_
#define DSD_CORE_VALUE_VALUE_INL_H_

#include <atomic>
#include <memory>

#include "absl/container/flat_hash_set.h"
#include "absl/container/inlined_vector.h"
#include "absl/hash/hash.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/prefetch.h"
#include "dsd/core/value/value.h"

namespace dsd {
namespace internal {

inline size_t HashOfKey(absl::string_view key) { return absl::HashOf(key); }
inline size_t HashOfKey(int64_t key) { return absl::HashOf(key); }
inline size_t HashOfKey(const PathSegment& key) {
  const auto* text = std::get_if<std::string>(&key);
  return text != nullptr ? HashOfKey(absl::string_view(*text))
                         : HashOfKey(std::get<int64_t>(key));
}

inline bool IsKey(const PathSegment& segment, absl::string_view key) {
  const auto* text = std::get_if<std::string>(&segment);
  return text != nullptr && *text == key;
}
inline bool IsKey(const PathSegment& segment, const PathSegment& key) {
  return segment == key;
}

// A dict up to this size is searched from its beginning.
constexpr size_t kUnindexed = 8;

}  // namespace internal

template <class TensorT>
struct BasicDict<TensorT>::Rep {
  struct Item {
    Item(PathSegment&& k, Value&& v) : key(std::move(k)), value(std::move(v)) {}
    PathSegment key;
    Value value;
  };

  // The index is a set of positions that hashes and compares the keys there.
  struct Hash {
    using is_transparent = void;
    size_t operator()(uint32_t position) const {
      return internal::HashOfKey(rep->items[position].key);
    }
    template <class Key>
    size_t operator()(const Key& key) const {
      return internal::HashOfKey(key);
    }
    const Rep* rep;
  };
  struct Equal {
    using is_transparent = void;
    bool operator()(uint32_t a, uint32_t b) const { return a == b; }
    template <class Key>
    bool operator()(uint32_t position, const Key& key) const {
      return internal::IsKey(rep->items[position].key, key);
    }
    template <class Key>
    bool operator()(const Key& key, uint32_t position) const {
      return (*this)(position, key);
    }
    const Rep* rep;
  };
  using Index = absl::flat_hash_set<uint32_t, Hash, Equal>;

  Rep() = default;
  explicit Rep(const Rep& other) : items(other.items) {}
  ~Rep() { delete index.load(std::memory_order_relaxed); }

  void DropIndex() {
    delete index.exchange(nullptr, std::memory_order_relaxed);
  }

  // Made when first needed; readers of one dict may need it at the same time.
  const Index& GetIndex() const {
    const Index* known = index.load(std::memory_order_acquire);
    if (known != nullptr) return *known;
    auto made = std::make_unique<Index>(items.size(), Hash{this}, Equal{this});
    for (size_t i = 0; i < items.size(); ++i) {
      made->insert(static_cast<uint32_t>(i));
    }
    Index* expected = nullptr;
    if (index.compare_exchange_strong(expected, made.get(),
                                      std::memory_order_acq_rel)) {
      return *made.release();
    }
    return *expected;
  }

  std::atomic<int64_t> references{1};
  bool shared = false;  // set before there is a second reference
  absl::InlinedVector<Item, 3> items;
  mutable std::atomic<Index*> index{nullptr};
};

template <class TensorT>
BasicDict<TensorT>::BasicDict(const BasicDict& other) {
  if (other.rep_ == nullptr) return;
  if (other.rep_->shared) {
    rep_ = other.rep_;
    rep_->references.fetch_add(1, std::memory_order_relaxed);
  } else {
    rep_ = new Rep(*other.rep_);
  }
}

template <class TensorT>
BasicDict<TensorT>& BasicDict<TensorT>::operator=(const BasicDict& other) {
  return *this = BasicDict(other);
}

template <class TensorT>
BasicDict<TensorT>& BasicDict<TensorT>::operator=(BasicDict&& other) noexcept {
  // By way of a third: `other` may be inside what is released here.
  Rep* const rep = other.rep_;
  other.rep_ = nullptr;
  Release();
  rep_ = rep;
  return *this;
}

template <class TensorT>
void BasicDict<TensorT>::Release() {
  Rep* const rep = rep_;
  rep_ = nullptr;
  if (rep != nullptr &&
      rep->references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    delete rep;
  }
}

template <class TensorT>
typename BasicDict<TensorT>::Rep& BasicDict<TensorT>::Own() {
  if (rep_ == nullptr) {
    rep_ = new Rep;
  } else if (rep_->shared) {
    if (rep_->references.load(std::memory_order_acquire) == 1) {
      rep_->shared = false;
    } else {
      Rep* const own = new Rep(*rep_);
      Release();
      rep_ = own;
    }
  }
  return *rep_;
}

template <class TensorT>
size_t BasicDict<TensorT>::size() const {
  return rep_ == nullptr ? 0 : rep_->items.size();
}

template <class TensorT>
const PathSegment& BasicDict<TensorT>::key(size_t i) const {
  return rep_->items[i].key;
}

template <class TensorT>
std::string BasicDict<TensorT>::key_text(size_t i) const {
  if (const auto* text = std::get_if<std::string>(&key(i))) return *text;
  return absl::StrCat(std::get<int64_t>(key(i)));
}

template <class TensorT>
const BasicValue<TensorT>& BasicDict<TensorT>::value(size_t i) const {
  return rep_->items[i].value;
}

template <class TensorT>
BasicValue<TensorT>& BasicDict<TensorT>::value(size_t i) {
  return Own().items[i].value;
}

template <class TensorT>
template <class Key>
int64_t BasicDict<TensorT>::PositionOf(const Key& key) const {
  if (rep_ == nullptr) return -1;
  if (rep_->items.size() <= internal::kUnindexed) {
    for (size_t i = 0; i < rep_->items.size(); ++i) {
      if (internal::IsKey(rep_->items[i].key, key)) return i;
    }
    return -1;
  }
  const auto& index = rep_->GetIndex();
  const auto it = index.find(key);
  return it == index.end() ? -1 : static_cast<int64_t>(*it);
}

template <class TensorT>
const BasicValue<TensorT>* BasicDict<TensorT>::FindNear(
    absl::string_view key, size_t* position) const {
  if (*position >= size() ||
      !internal::IsKey(rep_->items[*position].key, key)) {
    const int64_t found = PositionOf(key);
    if (found < 0) return nullptr;
    *position = static_cast<size_t>(found);
  }
  return &value((*position)++);
}

template <class TensorT>
void BasicDict<TensorT>::PrefetchKey(size_t i) const {
  if (i >= size()) return;
  const auto* const text = std::get_if<std::string>(&rep_->items[i].key);
  if (text != nullptr) PrefetchBytes(text->data(), text->size());
}

template <class TensorT>
void BasicDict<TensorT>::Prefetch() const {
  PrefetchBytes(rep_, sizeof(Rep));
}

template <class TensorT>
const BasicValue<TensorT>* BasicDict<TensorT>::Find(
    const PathSegment& key) const {
  const int64_t position = PositionOf(key);
  return position < 0 ? nullptr : &value(position);
}

template <class TensorT>
BasicValue<TensorT>* BasicDict<TensorT>::Find(const PathSegment& key) {
  const int64_t position = PositionOf(key);
  return position < 0 ? nullptr : &value(position);
}

template <class TensorT>
const BasicValue<TensorT>* BasicDict<TensorT>::Find(
    absl::string_view key) const {
  const int64_t position = PositionOf(key);
  return position < 0 ? nullptr : &value(position);
}

template <class TensorT>
BasicValue<TensorT>* BasicDict<TensorT>::Find(absl::string_view key) {
  const int64_t position = PositionOf(key);
  return position < 0 ? nullptr : &value(position);
}

template <class TensorT>
BasicValue<TensorT>& BasicDict<TensorT>::Set(PathSegment key, Value value) {
  const int64_t position = PositionOf(key);
  if (position >= 0) {
    Value& place = this->value(position);
    place = std::move(value);
    return place;
  }
  Append(std::move(key), std::move(value));
  return rep_->items.back().value;
}

template <class TensorT>
void BasicDict<TensorT>::Append(PathSegment key, Value value) {
  Rep& rep = Own();
  rep.items.emplace_back(std::move(key), std::move(value));
  if (auto* index = rep.index.load(std::memory_order_relaxed)) {
    index->insert(static_cast<uint32_t>(rep.items.size() - 1));
  }
}

template <class TensorT>
void BasicDict<TensorT>::Reserve(size_t size) {
  Own().items.reserve(size);
}

template <class TensorT>
bool BasicDict<TensorT>::Erase(const PathSegment& key) {
  const int64_t position = PositionOf(key);
  if (position < 0) return false;
  Rep& rep = Own();
  rep.DropIndex();
  rep.items.erase(rep.items.begin() + position);
  return true;
}

template <class TensorT>
void BasicDict<TensorT>::Share() {
  if (rep_ == nullptr || rep_->shared) return;
  for (auto& item : rep_->items) {
    if (auto* dict = item.value.template get_if<BasicDict>()) dict->Share();
  }
  rep_->shared = true;
}

template <class TensorT>
bool BasicDict<TensorT>::Equals(const BasicDict& other) const {
  if (rep_ == other.rep_) return true;
  if (size() != other.size()) return false;
  for (size_t i = 0; i < size(); ++i) {
    if (key(i) != other.key(i) || !(value(i) == other.value(i))) return false;
  }
  return true;
}

template <class TensorT>
absl::string_view BasicValue<TensorT>::kind_name() const {
  if (is<None>()) return "None";
  if (is<bool>()) return "bool";
  if (is<int64_t>() || is<WideInt>()) return "int";
  if (is<double>()) return "float";
  if (is<std::string>()) return "str";
  if (is<Bytes>()) return "bytes";
  if (is<Complex>()) return "complex";
  if (is<List>()) return "list";
  if (is<Tuple>()) return "tuple";
  if (is<Dict>() || is<Map>()) return "dict";
  if (const Set* set = get_if<Set>())
    return set->is_frozen ? "frozenset" : "set";
  if (const Opaque* opaque = get_if<Opaque>()) return opaque->type_name;
  return "tensor";
}

}  // namespace dsd

#endif  // DSD_CORE_VALUE_VALUE_INL_H_
