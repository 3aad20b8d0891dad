// SPDX-License-Identifier: Apache-2.0
//
// The tree that a state dict is: dicts, lists and tuples over tensors and plain
// objects, with Python's meaning. The tensor leaf is a type parameter, so that
// files and tools can use the tree without LibTorch.

#ifndef DSD_CORE_VALUE_VALUE_H_
#define DSD_CORE_VALUE_VALUE_H_

#include <complex>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/string_view.h"
#include "dsd/core/base/dtype.h"

namespace dsd {

// A dict key or list index on the way to a value: text or integer.
using PathSegment = std::variant<std::string, int64_t>;
using Path = std::vector<PathSegment>;

template <class TensorT>
class BasicValue;

// An ordered map, as Python's dict. Keys are text or integers. Copyable if
// TensorT is. Lookup is O(1). Thread-compatible.
template <class TensorT>
class BasicDict {
 public:
  using Value = BasicValue<TensorT>;

  BasicDict() = default;
  BasicDict(const BasicDict& other);
  BasicDict(BasicDict&& other) noexcept : rep_(other.rep_) {
    other.rep_ = nullptr;
  }
  BasicDict& operator=(const BasicDict& other);
  BasicDict& operator=(BasicDict&& other) noexcept;
  ~BasicDict() { Release(); }

  size_t size() const;
  bool empty() const { return size() == 0; }
  const PathSegment& key(size_t i) const;
  // The key as text, integers in decimal.
  std::string key_text(size_t i) const;
  const Value& value(size_t i) const;
  Value& value(size_t i);

  // Null if absent.
  const Value* Find(const PathSegment& key) const;
  Value* Find(const PathSegment& key);
  const Value* Find(absl::string_view key) const;
  Value* Find(absl::string_view key);
  const Value* Find(const std::string& key) const {
    return Find(absl::string_view(key));
  }
  Value* Find(const std::string& key) { return Find(absl::string_view(key)); }
  const Value* Find(const char* key) const {
    return Find(absl::string_view(key));
  }
  Value* Find(const char* key) { return Find(absl::string_view(key)); }
  bool contains(absl::string_view key) const { return Find(key) != nullptr; }

  // Find of keys that mostly come in this dict's order: looks first at
  // *position, which becomes the one behind the key.
  const Value* FindNear(absl::string_view key, size_t* position) const;

  // Ask for the memory of a small dict, or of a key (none if there is no such
  // position), which is needed soon.
  void Prefetch() const;
  void PrefetchKey(size_t i) const;

  // Adds at the end, or replaces the value in its place. Returns the new value.
  Value& Set(PathSegment key, Value value);

  // Set of a key that is known to be absent: without looking for it.
  void Append(PathSegment key, Value value);

  // For `size` keys in all.
  void Reserve(size_t size);

  // Removes the key and keeps the order of the others; O(size). Returns whether
  // it was there.
  bool Erase(const PathSegment& key);

  // Makes copies of this dict, and of the dicts directly in it, O(1) from now
  // on: they are one object until one of them is changed, which makes it a dict
  // of its own. References to values that were taken before must not be written
  // through any more.
  void Share();

  // Whether the two are one object: equal without comparing.
  bool IsSharedWith(const BasicDict& other) const { return rep_ == other.rep_; }

  friend bool operator==(const BasicDict& a, const BasicDict& b) {
    return a.Equals(b);
  }

 private:
  struct Rep;

  // Makes *rep_ exist and be of this dict alone.
  Rep& Own();
  void Release();
  bool Equals(const BasicDict& other) const;
  // Position of the key; -1 if absent.
  template <class Key>
  int64_t PositionOf(const Key& key) const;

  // Null: empty. One block for a small dict: state dicts have one for every
  // parameter.
  Rep* rep_ = nullptr;
};

struct None {
  friend bool operator==(None, None) { return true; }
};

struct Bytes {
  std::string data;
  friend bool operator==(const Bytes& a, const Bytes& b) {
    return a.data == b.data;
  }
};

using Complex = std::complex<double>;

// An integer that int64_t does not hold.
struct WideInt {
  // Two's complement, little-endian, the shortest: 9 to 255 bytes.
  std::string bytes;
  friend bool operator==(const WideInt& a, const WideInt& b) {
    return a.bytes == b.bytes;
  }
};

// An object of a class that is not known here. Inert: never constructed, never
// called; kept so that it can be named and copied through.
struct Opaque {
  std::string type_name;  // "module.Class"
  friend bool operator==(const Opaque& a, const Opaque& b) {
    return a.type_name == b.type_name;
  }
};

template <class TensorT>
class BasicValue {
 public:
  using Dict = BasicDict<TensorT>;
  using List = std::vector<BasicValue>;
  struct Tuple {
    std::vector<BasicValue> items;
    friend bool operator==(const Tuple& a, const Tuple& b) {
      return a.items == b.items;
    }
  };
  // Python's set or frozenset: no tensors, and nothing twice. What is read from
  // files has its items in one order, whatever the program that wrote them.
  struct Set {
    std::vector<BasicValue> items;
    bool is_frozen = false;
    friend bool operator==(const Set& a, const Set& b) {
      return a.is_frozen == b.is_frozen && a.items == b.items;
    }
  };

  // Python's dict with a key that is neither text nor an integer, in its order.
  // An object: no path leads into it.
  struct Map {
    std::vector<BasicValue> keys;
    std::vector<BasicValue> values;  // one for each key
    friend bool operator==(const Map& a, const Map& b) {
      return a.keys == b.keys && a.values == b.values;
    }
  };

  BasicValue() = default;                                     // None
  BasicValue(None) {}                                         // NOLINT
  BasicValue(bool v) : node_(v) {}                            // NOLINT
  BasicValue(int v) : node_(static_cast<int64_t>(v)) {}       // NOLINT
  BasicValue(int64_t v) : node_(v) {}                         // NOLINT
  BasicValue(double v) : node_(v) {}                          // NOLINT
  BasicValue(std::string v) : node_(std::move(v)) {}          // NOLINT
  BasicValue(absl::string_view v) : node_(std::string(v)) {}  // NOLINT
  BasicValue(const char* v) : node_(std::string(v)) {}        // NOLINT
  BasicValue(Bytes v) : node_(std::move(v)) {}                // NOLINT
  BasicValue(Complex v) : node_(v) {}                         // NOLINT
  BasicValue(WideInt v) : node_(std::move(v)) {}              // NOLINT
  BasicValue(Opaque v) : node_(std::move(v)) {}               // NOLINT
  BasicValue(TensorT v) : node_(std::move(v)) {}              // NOLINT
  BasicValue(List v) : node_(std::move(v)) {}                 // NOLINT
  BasicValue(Tuple v) : node_(std::move(v)) {}                // NOLINT
  BasicValue(Set v) : node_(std::move(v)) {}                  // NOLINT
  BasicValue(Map v) : node_(std::move(v)) {}                  // NOLINT
  BasicValue(Dict v) : node_(std::move(v)) {}                 // NOLINT

  // Null if the value is of another kind. T is one of None, bool, int64_t,
  // double, std::string, Bytes, Complex, WideInt, Opaque, TensorT, List, Tuple,
  // Dict, Set, Map.
  template <class T>
  const T* get_if() const {
    return std::get_if<T>(&node_);
  }
  template <class T>
  T* get_if() {
    return std::get_if<T>(&node_);
  }
  template <class T>
  bool is() const {
    return std::holds_alternative<T>(node_);
  }
  // What paths lead into.
  bool is_container() const { return is<List>() || is<Tuple>() || is<Dict>(); }

  // "int", "str", "tensor", ...: Python's name of the kind, for messages.
  absl::string_view kind_name() const;

  friend bool operator==(const BasicValue& a, const BasicValue& b) {
    return a.node_ == b.node_;
  }
  friend bool operator!=(const BasicValue& a, const BasicValue& b) {
    return !(a == b);
  }

 private:
  std::variant<None, bool, int64_t, double, std::string, Bytes, Complex,
               WideInt, Opaque, TensorT, List, Tuple, Dict, Set, Map>
      node_;
};

// A tensor as plain data, such as one that lies inside an object in a file: all
// of it, in host memory. Immutable, cheap to copy.
class HostTensor {
 public:
  HostTensor() = default;  // float32 of shape [0]
  // `bytes`: the elements, row-major.
  HostTensor(DType dtype, std::vector<int64_t> shape, std::string bytes)
      : rep_(std::make_shared<const Rep>(
            Rep{dtype, std::move(shape), std::move(bytes)})) {}

  DType dtype() const { return rep_ ? rep_->dtype : DType::kFloat32; }
  std::vector<int64_t> shape() const {
    return rep_ ? rep_->shape : std::vector<int64_t>{0};
  }
  absl::string_view bytes() const {
    return rep_ ? absl::string_view(rep_->bytes) : absl::string_view();
  }

  friend bool operator==(const HostTensor& a, const HostTensor& b) {
    return a.rep_ == b.rep_ ||
           (a.dtype() == b.dtype() && a.shape() == b.shape() &&
            a.bytes() == b.bytes());
  }

 private:
  struct Rep {
    DType dtype;
    std::vector<int64_t> shape;
    std::string bytes;
  };
  std::shared_ptr<const Rep> rep_;
};

// A tree as files have it.
using Object = BasicValue<HostTensor>;

}  // namespace dsd

#include "dsd/core/value/value_inl.h"  // IWYU pragma: export

#endif  // DSD_CORE_VALUE_VALUE_H_
