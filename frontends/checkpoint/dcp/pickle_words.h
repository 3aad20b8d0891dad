// SPDX-License-Identifier: Apache-2.0
//
// How the values of a Pickle lie in memory: its machine writes them, its values
// read them.

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_PICKLE_WORDS_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_PICKLE_WORDS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "absl/base/attributes.h"
#include "absl/container/flat_hash_map.h"

namespace dsd::dcp {

// An array that grows at its end. New words are not set, and large arrays grow
// without being copied: the system moves their pages.
class PickleWords {
 public:
  size_t size() const { return size_; }
  const uint32_t* data() const { return words_.get(); }
  uint32_t& operator[](size_t at) { return words_.get()[at]; }
  uint32_t operator[](size_t at) const { return words_.get()[at]; }
  uint32_t back() const { return words_.get()[size_ - 1]; }

  // Where `count` more words are, for the caller to set.
  uint32_t* Append(size_t count) {
    if (count > capacity_ - size_) Grow(count);
    uint32_t* const at = words_.get() + size_;
    size_ += count;
    return at;
  }
  void Push(uint32_t word) { *Append(1) = word; }
  void Drop(size_t count) { size_ -= count; }

 private:
  struct Free {
    void operator()(uint32_t* words) const { std::free(words); }
  };

  ABSL_ATTRIBUTE_NOINLINE void Grow(size_t count) {
    constexpr size_t kLeast = 128;
    capacity_ = std::max({kLeast, 2 * capacity_, size_ + count});
    void* const grown =
        std::realloc(words_.get(), capacity_ * sizeof(uint32_t));
    if (grown == nullptr) throw std::bad_alloc();
    (void)words_.release();
    words_.reset(static_cast<uint32_t*>(grown));
  }

  std::unique_ptr<uint32_t, Free> words_;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

// A reference: three bits say what the other 29 are.
enum class PickleTag : uint32_t {
  kConstant,  // None, False, True, empty tuple
  kSmallInt,  // the value, biased
  kWideInt,   // position of two words
  kDouble,    // position of two words
  kText,      // position of a length and the bytes
  kBlob,      // the same
  kLongInt,   // the same
  kNode,      // position of a node
};

inline constexpr uint32_t kPicklePayloadBits = 29;
inline constexpr int64_t kPickleIntBias = int64_t{1}
                                          << (kPicklePayloadBits - 1);

constexpr uint32_t PickleRef(PickleTag tag, uint32_t payload) {
  return static_cast<uint32_t>(tag) << kPicklePayloadBits | payload;
}
constexpr PickleTag TagOf(uint32_t ref) {
  return static_cast<PickleTag>(ref >> kPicklePayloadBits);
}
constexpr uint32_t PayloadOf(uint32_t ref) {
  return ref & ((uint32_t{1} << kPicklePayloadBits) - 1);
}

inline constexpr uint32_t kNoneRef = PickleRef(PickleTag::kConstant, 0);
inline constexpr uint32_t kFalseRef = PickleRef(PickleTag::kConstant, 1);
inline constexpr uint32_t kTrueRef = PickleRef(PickleTag::kConstant, 2);
inline constexpr uint32_t kEmptyTupleRef = PickleRef(PickleTag::kConstant, 3);
// No value: it would be a node at the last position, which is never used.
inline constexpr uint32_t kAbsentRef = 0xFFFFFFFF;

enum class PickleKind : uint8_t {
  kNone,
  kBool,
  kInt,     // fits int64
  kBigInt,  // does not
  kFloat,
  kString,
  kBytes,
  kTuple,
  kList,
  kDict,
  kSet,
  kFrozenSet,
  kGlobal,        // module and name
  kCall,          // function and arguments (REDUCE)
  kInstance,      // class and arguments (NEWOBJ)
  kPersistentId,  // BINPERSID
};

// The first word of a node is its kind and a count. Lists, dicts and sets, and
// tuples whose count is kChainedCount, are chains of segments, each a count,
// the position of the next one (0: none) and the items.
//   tuple           items...
//   chain           first segment, last segment
//   global          module, name
//   call            function, args
//   instance        class, args, state
//   persistent id   id
inline constexpr uint32_t kChainedCount = 0xFFFFFF;

constexpr uint32_t PickleHead(PickleKind kind, uint32_t count = 0) {
  return static_cast<uint32_t>(kind) | count << 8;
}
constexpr PickleKind KindOfHead(uint32_t head) {
  return static_cast<PickleKind>(head & 0xFF);
}
constexpr uint32_t CountOfHead(uint32_t head) { return head >> 8; }

constexpr bool IsChain(uint32_t head) {
  switch (KindOfHead(head)) {
    case PickleKind::kList:
    case PickleKind::kDict:
    case PickleKind::kSet:
    case PickleKind::kFrozenSet:
      return true;
    default:
      return CountOfHead(head) == kChainedCount;
  }
}

struct PickleMemory {
  PickleWords words;
  // Positions of nodes. State of calls, and contents of calls and instances:
  // both are rare.
  absl::flat_hash_map<uint32_t, uint32_t> call_state;  // -> a reference
  absl::flat_hash_map<uint32_t, uint32_t> appended;    // -> a list
  absl::flat_hash_map<uint32_t, uint32_t> entries;     // -> a dict
  uint32_t root = 0;
};

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_PICKLE_WORDS_H_
