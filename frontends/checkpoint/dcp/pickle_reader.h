// SPDX-License-Identifier: Apache-2.0
//
// Reads a Python pickle (protocols 2 to 5) as data. Nothing is executed and no
// name is resolved: a global is its two names, a call is its function and
// arguments, an instance is its class, arguments and state. What they mean is
// decided by the codecs, from tables.

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_PICKLE_READER_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_PICKLE_READER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/frontends/checkpoint/dcp/pickle_words.h"

namespace dsd::dcp {

struct PickleLimits {
  int64_t max_string_bytes = int64_t{1} << 30;  // of one string or bytes object
  // Bytes of one integer. 9 hold what fits 64 bits, signed or not.
  int max_int_bytes = 9;
  bool allow_persistent_ids = false;
  // Of the decoded form; at most 2 GiB.
  int64_t max_memory_bytes = int64_t{2} << 30;
};

// A handle to one value of a Pickle, which must outlive it. Cheap to copy.
// Values may be shared and may contain themselves.
class PickleValue {
 public:
  using Kind = PickleKind;

  Kind kind() const;
  bool IsNone() const { return ref_ == kNoneRef; }

  // The value, or nullopt if it is of another kind.
  std::optional<bool> AsBool() const;
  std::optional<int64_t> AsInt() const;
  std::optional<double> AsFloat() const;
  // UTF-8 as stored, not checked. Valid while the Pickle lives.
  std::optional<absl::string_view> AsString() const;
  std::optional<absl::string_view> AsBytes() const;
  // Little-endian two's complement.
  std::optional<absl::string_view> AsBigInt() const;

  // kGlobal: "module", "name". Python 2 names of builtins as they are.
  absl::string_view module() const;
  absl::string_view name() const;
  bool IsGlobal(absl::string_view module, absl::string_view name) const;

  // Items of a tuple, list or set; number of entries of a dict; of a call or
  // instance: of what was appended to or set in it (a list or dict subclass).
  size_t size() const;
  // Calls visit(item) for each item until it returns false. Tuples, lists,
  // sets; for calls and instances what was appended.
  template <class Visit>
  void ForEachItem(Visit visit) const;
  // The same for dicts, with visit(key, value); for calls and instances what
  // was set.
  template <class Visit>
  void ForEachEntry(Visit visit) const;
  // The items of a tuple of at most `max` items; nullopt otherwise.
  std::optional<std::vector<PickleValue>> AsTuple(size_t max) const;
  // A dict's value of a string key (the last one set), or nullopt.
  std::optional<PickleValue> Find(absl::string_view key) const;

  // kCall: the function. kInstance: the class. kPersistentId: the id.
  PickleValue callee() const;
  // kCall, kInstance.
  PickleValue args() const;
  // kCall, kInstance: what BUILD gave; nullopt if nothing.
  std::optional<PickleValue> state() const;

  // Equal for two handles of one object, and for equal small integers; never
  // kAbsentRef.
  uint32_t id() const { return ref_; }

 private:
  friend class Pickle;
  PickleValue(const PickleMemory* memory, uint32_t ref)
      : memory_(memory), ref_(ref) {}
  const uint32_t* At() const;  // what ref_ is the position of
  // The node with the items or entries of a value; kAbsentRef if it has none.
  uint32_t ItemsNode() const;
  uint32_t EntriesNode() const;
  // Calls visit(references, how many) for stretches of a node's content.
  template <class Visit>
  void ForEachStretch(uint32_t node, Visit visit) const;
  absl::string_view TextAt(uint32_t ref) const;

  const PickleMemory* memory_;
  uint32_t ref_;
};

// A decoded pickle. Immutable, movable, thread-safe.
//
// Values lie in one array of 32-bit words and refer to each other by position;
// small integers lie in the reference itself. An index of 350,000 chunks takes
// some 300 bytes per chunk.
class Pickle {
 public:
  // Where bytes come from: fills `out` from `offset`.
  using ReadFn = absl::FunctionRef<absl::Status(int64_t offset,
                                                absl::Span<std::byte> out)>;

  // Decodes the pickle at [0, size_bytes); what follows STOP is ignored. Reads
  // in order, in pieces. Errors: DataLoss naming the offset, for bytes that are
  // not a pickle or use what is refused; ResourceExhausted for what exceeds a
  // limit; of `read`.
  static absl::StatusOr<Pickle> Parse(int64_t size_bytes, ReadFn read,
                                      const PickleLimits& limits);
  static absl::StatusOr<Pickle> Parse(absl::string_view bytes,
                                      const PickleLimits& limits);

  Pickle(Pickle&&) = default;
  Pickle& operator=(Pickle&&) = default;

  PickleValue root() const { return {&memory_, memory_.root}; }

 private:
  explicit Pickle(PickleMemory memory) : memory_(std::move(memory)) {}

  PickleMemory memory_;
};

// An index has a million values: what they are asked most is inline.

inline const uint32_t* PickleValue::At() const {
  return memory_->words.data() + PayloadOf(ref_);
}

inline PickleValue::Kind PickleValue::kind() const {
  switch (TagOf(ref_)) {
    case PickleTag::kConstant:
      return ref_ == kNoneRef         ? Kind::kNone
             : ref_ == kEmptyTupleRef ? Kind::kTuple
                                      : Kind::kBool;
    case PickleTag::kSmallInt:
    case PickleTag::kWideInt:
      return Kind::kInt;
    case PickleTag::kDouble:
      return Kind::kFloat;
    case PickleTag::kText:
      return Kind::kString;
    case PickleTag::kBlob:
      return Kind::kBytes;
    case PickleTag::kLongInt:
      return Kind::kBigInt;
    case PickleTag::kNode:
      break;
  }
  return KindOfHead(*At());
}

inline std::optional<int64_t> PickleValue::AsInt() const {
  if (TagOf(ref_) == PickleTag::kSmallInt) {
    return static_cast<int64_t>(PayloadOf(ref_)) - kPickleIntBias;
  }
  if (TagOf(ref_) != PickleTag::kWideInt) return std::nullopt;
  return static_cast<int64_t>(At()[0] | static_cast<uint64_t>(At()[1]) << 32);
}

inline absl::string_view PickleValue::TextAt(uint32_t ref) const {
  const uint32_t* const at = memory_->words.data() + PayloadOf(ref);
  return {reinterpret_cast<const char*>(at + 1), *at};
}

inline std::optional<absl::string_view> PickleValue::AsString() const {
  if (TagOf(ref_) != PickleTag::kText) return std::nullopt;
  return TextAt(ref_);
}

inline PickleValue PickleValue::callee() const {
  switch (kind()) {
    case Kind::kCall:
    case Kind::kInstance:
    case Kind::kPersistentId:
      return {memory_, At()[1]};
    default:
      return {memory_, kNoneRef};
  }
}

inline PickleValue PickleValue::args() const {
  switch (kind()) {
    case Kind::kCall:
    case Kind::kInstance:
      return {memory_, At()[2]};
    default:
      return {memory_, kEmptyTupleRef};
  }
}

inline std::optional<PickleValue> PickleValue::state() const {
  uint32_t state = kAbsentRef;
  if (kind() == Kind::kInstance) {
    state = At()[3];
  } else if (kind() == Kind::kCall) {
    const auto it = memory_->call_state.find(PayloadOf(ref_));
    if (it != memory_->call_state.end()) state = it->second;
  }
  if (state == kAbsentRef) return std::nullopt;
  return PickleValue(memory_, state);
}

inline uint32_t PickleValue::ItemsNode() const {
  switch (kind()) {
    case Kind::kTuple:
      return ref_ == kEmptyTupleRef ? kAbsentRef : PayloadOf(ref_);
    case Kind::kList:
    case Kind::kSet:
    case Kind::kFrozenSet:
      return PayloadOf(ref_);
    case Kind::kCall:
    case Kind::kInstance: {
      const auto it = memory_->appended.find(PayloadOf(ref_));
      return it == memory_->appended.end() ? kAbsentRef : it->second;
    }
    default:
      return kAbsentRef;
  }
}

inline uint32_t PickleValue::EntriesNode() const {
  switch (kind()) {
    case Kind::kDict:
      return PayloadOf(ref_);
    case Kind::kCall:
    case Kind::kInstance: {
      const auto it = memory_->entries.find(PayloadOf(ref_));
      return it == memory_->entries.end() ? kAbsentRef : it->second;
    }
    default:
      return kAbsentRef;
  }
}

template <class Visit>
void PickleValue::ForEachStretch(uint32_t node, Visit visit) const {
  if (node == kAbsentRef) return;
  const uint32_t* const words = memory_->words.data();
  if (!IsChain(words[node])) {
    visit(words + node + 1, CountOfHead(words[node]));
    return;
  }
  for (uint32_t at = words[node + 1]; at != 0; at = words[at + 1]) {
    if (!visit(words + at + 2, words[at])) return;
  }
}

template <class Visit>
void PickleValue::ForEachItem(Visit visit) const {
  ForEachStretch(ItemsNode(), [&](const uint32_t* items, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) {
      if (!visit(PickleValue(memory_, items[i]))) return false;
    }
    return true;
  });
}

template <class Visit>
void PickleValue::ForEachEntry(Visit visit) const {
  ForEachStretch(EntriesNode(), [&](const uint32_t* items, uint32_t count) {
    for (uint32_t i = 0; i + 1 < count; i += 2) {
      if (!visit(PickleValue(memory_, items[i]),
                 PickleValue(memory_, items[i + 1]))) {
        return false;
      }
    }
    return true;
  });
}

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_PICKLE_READER_H_
