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
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace dsd::dcp {

struct PickleLimits {
  int64_t max_string_bytes = int64_t{1} << 30;  // of one string or bytes object
  // Bytes of one integer. 9 hold what fits 64 bits, signed or not.
  int max_int_bytes = 9;
  bool allow_persistent_ids = false;
  // Of the decoded form; at most 2 GiB.
  int64_t max_memory_bytes = int64_t{2} << 30;
};

class Pickle;

// A handle to one value of a Pickle, which must outlive it. Cheap to copy.
// Values may be shared and may contain themselves.
class PickleValue {
 public:
  enum class Kind : uint8_t {
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

  Kind kind() const;
  bool IsNone() const { return kind() == Kind::kNone; }

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
  // Whether size() <= max, without counting further.
  bool HasAtMost(size_t max) const;
  // Calls `visit` for each item until it returns false. Tuples, lists, sets;
  // for calls and instances what was appended.
  void ForEachItem(absl::FunctionRef<bool(PickleValue)> visit) const;
  // The same for dicts; for calls and instances what was set.
  void ForEachEntry(
      absl::FunctionRef<bool(PickleValue key, PickleValue value)> visit) const;
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

  // Equal for two handles of one object, and for equal small integers.
  uint32_t id() const { return ref_; }

 private:
  friend class Pickle;
  friend class PickleMachine;
  PickleValue(const Pickle* pickle, uint32_t ref)
      : pickle_(pickle), ref_(ref) {}
  void ForEachRef(
      uint32_t head,
      absl::FunctionRef<bool(const uint32_t*, uint32_t)> visit) const;

  const Pickle* pickle_;
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

  PickleValue root() const { return {this, root_}; }

 private:
  friend class PickleValue;
  friend class PickleMachine;
  Pickle() = default;

  std::vector<uint32_t> words_;
  // State of calls, and contents of calls and instances; both are rare.
  absl::flat_hash_map<uint32_t, uint32_t> call_state_;
  absl::flat_hash_map<uint32_t, uint32_t> appended_;  // -> a list
  absl::flat_hash_map<uint32_t, uint32_t> entries_;   // -> a dict
  uint32_t root_ = 0;
};

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_PICKLE_READER_H_
