// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/pickle_reader.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "absl/base/attributes.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/dcp/little_endian.h"

namespace dsd::dcp {
namespace {

constexpr int64_t kMaxWords = int64_t{1} << kPicklePayloadBits;
constexpr size_t kMaxShortTuple = 64;

using Kind = PickleValue::Kind;
using Tag = PickleTag;

// Bytes from a ReadFn, in pieces, with a position.
class Input {
 public:
  Input(int64_t size, Pickle::ReadFn read) : size_(size), read_(read) {}

  int64_t position() const { return end_position_ - (end_ - next_); }
  bool ok() const { return status_.ok(); }
  const absl::Status& status() const { return status_; }

  // The next `count` bytes, or null at the end of the input or on an error.
  const uint8_t* Take(int64_t count) {
    if (count > end_ - next_ && !Fill(count)) return nullptr;
    const uint8_t* const taken = next_;
    next_ += count;
    return taken;
  }

  // Up to and with the next newline, which is left out; nullopt if there is
  // none within `max` bytes.
  std::optional<absl::string_view> TakeLine(int64_t max) {
    for (int64_t length = 0; length < max; ++length) {
      if (length >= end_ - next_ && !Fill(length + 1)) return std::nullopt;
      if (next_[length] == '\n') {
        const absl::string_view line(reinterpret_cast<const char*>(next_),
                                     length);
        next_ += length + 1;
        return line;
      }
    }
    return std::nullopt;
  }

 private:
  static constexpr int64_t kPieceBytes = int64_t{256} << 10;

  // Reads on, so that `count` bytes are there.
  ABSL_ATTRIBUTE_NOINLINE bool Fill(int64_t count) {
    const int64_t left = end_ - next_;
    if (!status_.ok() || count - left > size_ - end_position_) return false;
    const int64_t want =
        std::min(std::max(count, kPieceBytes), left + size_ - end_position_);
    // What is left comes to the front.
    std::copy(next_, end_, buffer_.data());
    if (static_cast<int64_t>(buffer_.size()) < want) buffer_.resize(want);
    next_ = buffer_.data();
    end_ = next_ + left;
    status_ = read_(
        end_position_,
        absl::MakeSpan(reinterpret_cast<std::byte*>(buffer_.data()) + left,
                       want - left));
    if (!status_.ok()) return false;
    end_ = next_ + want;
    end_position_ += want - left;
    return true;
  }

  const int64_t size_;
  Pickle::ReadFn read_;
  std::vector<uint8_t> buffer_;
  const uint8_t* next_ = nullptr;  // in the buffer
  const uint8_t* end_ = nullptr;   // of what was read into it
  int64_t end_position_ = 0;       // in the input
  absl::Status status_;
};

// The stack machine that a pickle is a program for.
class Machine {
 public:
  Machine(int64_t size_bytes, Pickle::ReadFn read, const PickleLimits& limits)
      : limits_(limits),
        max_words_(std::min(kMaxWords - 1, limits.max_memory_bytes / 4)),
        input_(size_bytes, read) {}

  absl::StatusOr<PickleMemory> Run() {
    if (!RunToStop()) return input_.ok() ? error_ : input_.status();
    if (stack_.size() != 1 || marks_.size() != 0) {
      Bad("the stack holds ", stack_.size(), " values at the end, expected 1");
      return error_;
    }
    memory_.root = stack_[0];
    return std::move(memory_);
  }

 private:
  // One op after another; false with error_ set.
  bool RunToStop() {
    while (true) {
      op_at_ = input_.position();
      const uint8_t* op = input_.Take(1);
      if (op == nullptr) return Truncated();
      op_ = *op;
      if (op_ == '.') return true;
      if (!Step()) return false;
      if (static_cast<int64_t>(words().size() + stack_.size() + memo_.size() +
                               marks_.size()) > max_words_) {
        return TooBig("the decoded form");
      }
    }
  }

  PickleWords& words() { return memory_.words; }

  // What is done for an op says whether it could be. Errors are made apart: ops
  // take a few instructions each.
  template <class... What>
  ABSL_ATTRIBUTE_NOINLINE bool Bad(const What&... what) {
    error_ = absl::DataLossError(
        absl::StrFormat("pickle: opcode 0x%02x at byte %d: %s", op_, op_at_,
                        absl::StrCat(what...)));
    return false;
  }
  template <class... What>
  ABSL_ATTRIBUTE_NOINLINE bool TooBig(const What&... what) {
    error_ = absl::ResourceExhaustedError(
        absl::StrFormat("pickle: at byte %d: %s exceeds the limit", op_at_,
                        absl::StrCat(what...)));
    return false;
  }
  ABSL_ATTRIBUTE_NOINLINE bool Truncated() {
    error_ = absl::DataLossError(absl::StrFormat(
        "pickle: ends inside the opcode at byte %d (truncated)", op_at_));
    return false;
  }

  bool Step() {
    switch (op_) {
      case 0x80: {  // PROTO
        const uint8_t* version = input_.Take(1);
        if (version == nullptr) return Truncated();
        if (*version < 2 || *version > 5) {
          return Bad("protocol ", *version, ", expected 2 to 5");
        }
        return true;
      }
      case 0x95:  // FRAME
        return input_.Take(8) == nullptr ? Truncated() : true;
      case '(':
        marks_.Push(static_cast<uint32_t>(stack_.size()));
        return true;
      case 'N':
        return Push(kNoneRef);
      case 0x88:
        return Push(kTrueRef);
      case 0x89:
        return Push(kFalseRef);
      case ')':
        return Push(kEmptyTupleRef);
      case 'K':
        return PushUnsigned(1);
      case 'M':
        return PushUnsigned(2);
      case 'J': {  // BININT, signed
        const uint8_t* bytes = input_.Take(4);
        if (bytes == nullptr) return Truncated();
        return Push(
            IntRef(static_cast<int32_t>(LoadLittleEndian<uint32_t>(bytes))));
      }
      case 0x8A:
        return PushLong();
      case 'G': {  // BINFLOAT, big-endian
        const uint8_t* bytes = input_.Take(8);
        if (bytes == nullptr) return Truncated();
        return Push(
            WideRef(Tag::kDouble,
                    __builtin_bswap64(LoadLittleEndian<uint64_t>(bytes))));
      }
      case 0x8C:
        return PushBytes(Tag::kText, 1);
      case 'X':
        return PushBytes(Tag::kText, 4);
      case 0x8D:
        return PushBytes(Tag::kText, 8);
      case 'U':
        return PushBytes(Tag::kText, 1);  // SHORT_BINSTRING, Python 2's
      case 'C':
        return PushBytes(Tag::kBlob, 1);
      case 'B':
        return PushBytes(Tag::kBlob, 4);
      case ']':
        return Push(NewNode(Kind::kList, 0, 0));
      case '}':
        return Push(NewNode(Kind::kDict, 0, 0));
      case 0x8F:
        return Push(NewNode(Kind::kSet, 0, 0));
      case 0x85:
        return PushTuple(1);
      case 0x86:
        return PushTuple(2);
      case 0x87:
        return PushTuple(3);
      case 't': {
        size_t count;
        if (!PopMark(&count)) return false;
        return PushTuple(count);
      }
      case 0x91: {  // FROZENSET
        size_t count;
        if (!PopMark(&count)) return false;
        const uint32_t set = NewNode(Kind::kFrozenSet, 0, 0);
        AppendSegment(PayloadOf(set), count);
        return Push(set);
      }
      case 'a':
        return AddItems(Kind::kList, 1);
      case 'e': {
        size_t count;
        if (!PopMark(&count)) return false;
        return AddItems(Kind::kList, count);
      }
      case 0x90: {  // ADDITEMS
        size_t count;
        if (!PopMark(&count)) return false;
        return AddItems(Kind::kSet, count);
      }
      case 's':
        return AddItems(Kind::kDict, 2);
      case 'u': {
        size_t count;
        if (!PopMark(&count)) return false;
        if (count % 2 != 0) return Bad("a key without a value");
        return AddItems(Kind::kDict, count);
      }
      case 0x94:  // MEMOIZE
        return Memoize(memo_.size());
      case 'q': {
        const uint8_t* index = input_.Take(1);
        if (index == nullptr) return Truncated();
        return Memoize(*index);
      }
      case 'r': {
        const uint8_t* index = input_.Take(4);
        if (index == nullptr) return Truncated();
        return Memoize(LoadLittleEndian<uint32_t>(index));
      }
      case 'h': {
        const uint8_t* index = input_.Take(1);
        if (index == nullptr) return Truncated();
        return Recall(*index);
      }
      case 'j': {
        const uint8_t* index = input_.Take(4);
        if (index == nullptr) return Truncated();
        return Recall(LoadLittleEndian<uint32_t>(index));
      }
      case 'c':
        return PushGlobalLines();
      case 0x93: {  // STACK_GLOBAL
        if (!Need(2)) return false;
        const uint32_t name = Pop();
        const uint32_t module = Pop();
        if (TagOf(name) != Tag::kText || TagOf(module) != Tag::kText) {
          return Bad("the names of a global are not strings");
        }
        return Push(NewNode(Kind::kGlobal, module, name));
      }
      case 'R': {
        if (!Need(2)) return false;
        const uint32_t args = Pop();
        const uint32_t function = Pop();
        return Push(NewNode(Kind::kCall, function, args));
      }
      case 0x81: {  // NEWOBJ
        if (!Need(2)) return false;
        const uint32_t args = Pop();
        const uint32_t type = Pop();
        return Push(NewNode(Kind::kInstance, type, args, kAbsentRef));
      }
      case 'b':
        return Build();
      case 'Q': {  // BINPERSID
        if (!limits_.allow_persistent_ids) {
          return Bad("a persistent id is not allowed here");
        }
        if (!Need(1)) return false;
        const uint32_t id = Pop();
        return Push(NewNode(Kind::kPersistentId, id));
      }
      default:
        return Bad("not an opcode that is read here");
    }
  }

  bool Push(uint32_t ref) {
    stack_.Push(ref);
    return true;
  }
  uint32_t Pop() {
    const uint32_t ref = stack_.back();
    stack_.Drop(1);
    return ref;
  }
  // Values above the last mark.
  size_t Available() const {
    return stack_.size() - (marks_.size() == 0 ? 0 : marks_.back());
  }
  bool Need(size_t count) {
    if (Available() < count) return Bad("the stack holds too few values");
    return true;
  }
  bool PopMark(size_t* count) {
    if (marks_.size() == 0) return Bad("no mark on the stack");
    *count = stack_.size() - marks_.back();
    marks_.Drop(1);
    return true;
  }

  // Of what is appended next.
  uint32_t RefHere(Tag tag) {
    return PickleRef(tag, static_cast<uint32_t>(words().size()));
  }
  template <class... Words>
  uint32_t NewNode(Kind kind, Words... content) {
    const uint32_t ref = RefHere(Tag::kNode);
    uint32_t* at = words().Append(1 + sizeof...(content));
    *at = PickleHead(kind);
    ((*++at = content), ...);
    return ref;
  }
  uint32_t WideRef(Tag tag, uint64_t bits) {
    const uint32_t ref = RefHere(tag);
    std::memcpy(words().Append(2), &bits, sizeof(bits));
    return ref;
  }
  uint32_t IntRef(int64_t value) {
    const int64_t biased = value + kPickleIntBias;
    if (value < kPickleIntBias && biased >= 0) {
      return PickleRef(Tag::kSmallInt, static_cast<uint32_t>(biased));
    }
    return WideRef(Tag::kWideInt, static_cast<uint64_t>(value));
  }
  uint32_t TextRef(Tag tag, absl::string_view text) {
    const uint32_t ref = RefHere(tag);
    uint32_t* const at = words().Append(1 + (text.size() + 3) / 4);
    *at = static_cast<uint32_t>(text.size());
    std::memcpy(at + 1, text.data(), text.size());
    return ref;
  }

  bool PushUnsigned(int bytes) {
    const uint8_t* in = input_.Take(bytes);
    if (in == nullptr) return Truncated();
    return Push(IntRef(bytes == 1 ? in[0] : LoadLittleEndian<uint16_t>(in)));
  }

  bool PushLong() {
    const uint8_t* size = input_.Take(1);
    if (size == nullptr) return Truncated();
    const int count = *size;
    if (count > limits_.max_int_bytes) {
      return Bad("an integer of ", count, " bytes");
    }
    const uint8_t* bytes = input_.Take(count);
    if (bytes == nullptr) return Truncated();
    if (count > 8) {
      return Push(TextRef(
          Tag::kLongInt,
          absl::string_view(reinterpret_cast<const char*>(bytes), count)));
    }
    uint64_t value = count > 0 && (bytes[count - 1] & 0x80) ? ~uint64_t{0} : 0;
    for (int i = count - 1; i >= 0; --i) value = (value << 8) | bytes[i];
    return Push(IntRef(static_cast<int64_t>(value)));
  }

  bool PushBytes(Tag tag, int size_bytes) {
    const uint8_t* size = input_.Take(size_bytes);
    if (size == nullptr) return Truncated();
    const uint64_t length = size_bytes == 1 ? size[0]
                            : size_bytes == 4
                                ? LoadLittleEndian<uint32_t>(size)
                                : LoadLittleEndian<uint64_t>(size);
    if (length > static_cast<uint64_t>(limits_.max_string_bytes) ||
        length > std::numeric_limits<uint32_t>::max()) {
      return TooBig("a string of ", length, " bytes");
    }
    const uint8_t* bytes = input_.Take(static_cast<int64_t>(length));
    if (bytes == nullptr) return Truncated();
    if (static_cast<int64_t>(words().size() + length / 4) > max_words_) {
      return TooBig("the decoded form");
    }
    return Push(TextRef(
        tag, absl::string_view(reinterpret_cast<const char*>(bytes), length)));
  }

  bool PushTuple(size_t count) {
    if (!Need(count)) return false;
    uint32_t tuple;
    if (count == 0) {
      tuple = kEmptyTupleRef;
    } else if (count <= kMaxShortTuple) {
      tuple = RefHere(Tag::kNode);
      words().Push(PickleHead(Kind::kTuple, static_cast<uint32_t>(count)));
      PopToWords(count);
    } else {
      tuple = NewNode(Kind::kTuple, 0, 0);
      words()[PayloadOf(tuple)] = PickleHead(Kind::kTuple, kChainedCount);
      AppendSegment(PayloadOf(tuple), count);
    }
    return Push(tuple);
  }

  void PopToWords(size_t count) {
    stack_.Drop(count);
    std::copy_n(stack_.data() + stack_.size(), count, words().Append(count));
  }

  // Moves the top `count` values of the stack to the end of a chain.
  void AppendSegment(uint32_t node, size_t count) {
    if (count == 0) return;
    const uint32_t segment = static_cast<uint32_t>(words().size());
    words().Push(static_cast<uint32_t>(count));
    words().Push(0);
    PopToWords(count);
    // Position 0 is never a segment: a node comes before it.
    const uint32_t last = words()[node + 2];
    if (last == 0) {
      words()[node + 1] = segment;
    } else {
      words()[last + 1] = segment;
    }
    words()[node + 2] = segment;
  }

  // Adds the top `count` values to the container below them: one of `kind`, or
  // an object of a class that may be one.
  bool AddItems(Kind kind, size_t count) {
    if (!Need(count + 1)) return false;
    const uint32_t target = stack_[stack_.size() - count - 1];
    if (TagOf(target) != Tag::kNode)
      return Bad("the target is not a container");
    uint32_t node = PayloadOf(target);
    const Kind found = KindOfHead(words()[node]);
    if (found != kind) {
      if ((found != Kind::kCall && found != Kind::kInstance) ||
          kind == Kind::kSet) {
        return Bad("the target is a container of another kind");
      }
      auto& contents = kind == Kind::kDict ? memory_.entries : memory_.appended;
      const auto [it, is_new] = contents.try_emplace(node, 0);
      if (is_new) it->second = PayloadOf(NewNode(kind, 0, 0));
      node = it->second;
    }
    AppendSegment(node, count);
    return true;
  }

  bool Build() {
    if (!Need(2)) return false;
    const uint32_t state = Pop();
    const uint32_t target = stack_.back();
    if (TagOf(target) == Tag::kNode) {
      const uint32_t node = PayloadOf(target);
      const Kind kind = KindOfHead(words()[node]);
      if (kind == Kind::kInstance) {
        if (words()[node + 3] != kAbsentRef) return Bad("a second state");
        words()[node + 3] = state;
        return true;
      }
      if (kind == Kind::kCall) {
        if (!memory_.call_state.emplace(node, state).second) {
          return Bad("a second state");
        }
        return true;
      }
    }
    return Bad("state for something that is not an object");
  }

  bool Memoize(size_t index) {
    if (!Need(1)) return false;
    if (index > memo_.size()) {
      return Bad("memo index ", index, ", expected at most ", memo_.size());
    }
    if (index == memo_.size()) {
      memo_.Push(stack_.back());
    } else {
      memo_[index] = stack_.back();
    }
    return true;
  }

  bool Recall(size_t index) {
    if (index >= memo_.size()) {
      return Bad("memo index ", index, " of ", memo_.size());
    }
    return Push(memo_[index]);
  }

  bool PushGlobalLines() {
    constexpr int64_t kMaxName = 64 << 10;
    const auto module = input_.TakeLine(kMaxName);
    if (!module.has_value()) return Truncated();
    const uint32_t module_ref = TextRef(Tag::kText, *module);
    const auto name = input_.TakeLine(kMaxName);
    if (!name.has_value()) return Truncated();
    const uint32_t name_ref = TextRef(Tag::kText, *name);
    return Push(NewNode(Kind::kGlobal, module_ref, name_ref));
  }

  const PickleLimits limits_;
  const int64_t max_words_;
  Input input_;
  PickleMemory memory_;
  absl::Status error_;
  PickleWords stack_;
  PickleWords marks_;  // sizes of the stack
  PickleWords memo_;
  uint8_t op_ = 0;
  int64_t op_at_ = 0;
};

}  // namespace

absl::StatusOr<Pickle> Pickle::Parse(int64_t size_bytes, ReadFn read,
                                     const PickleLimits& limits) {
  DSD_ASSIGN_OR_RETURN(PickleMemory memory,
                       Machine(size_bytes, read, limits).Run());
  return Pickle(std::move(memory));
}

absl::StatusOr<Pickle> Pickle::Parse(absl::string_view bytes,
                                     const PickleLimits& limits) {
  return Parse(
      static_cast<int64_t>(bytes.size()),
      [bytes](int64_t offset, absl::Span<std::byte> out) {
        std::memcpy(out.data(), bytes.data() + offset, out.size());
        return absl::OkStatus();
      },
      limits);
}

std::optional<bool> PickleValue::AsBool() const {
  if (ref_ == kTrueRef) return true;
  if (ref_ == kFalseRef) return false;
  return std::nullopt;
}

std::optional<double> PickleValue::AsFloat() const {
  if (TagOf(ref_) != Tag::kDouble) return std::nullopt;
  double value;
  std::memcpy(&value, At(), sizeof(value));
  return value;
}

std::optional<absl::string_view> PickleValue::AsBytes() const {
  if (TagOf(ref_) != Tag::kBlob) return std::nullopt;
  return TextAt(ref_);
}

std::optional<absl::string_view> PickleValue::AsBigInt() const {
  if (TagOf(ref_) != Tag::kLongInt) return std::nullopt;
  return TextAt(ref_);
}

absl::string_view PickleValue::module() const {
  return kind() == Kind::kGlobal ? TextAt(At()[1]) : "";
}

absl::string_view PickleValue::name() const {
  return kind() == Kind::kGlobal ? TextAt(At()[2]) : "";
}

bool PickleValue::IsGlobal(absl::string_view module,
                           absl::string_view name) const {
  return kind() == Kind::kGlobal && this->name() == name &&
         this->module() == module;
}

size_t PickleValue::size() const {
  size_t size = 0;
  const auto count = [&size](const uint32_t*, uint32_t items) {
    size += items;
    return true;
  };
  const uint32_t items = ItemsNode();
  if (items != kAbsentRef) {
    ForEachStretch(items, count);
    return size;
  }
  ForEachStretch(EntriesNode(), count);
  return size / 2;
}

std::optional<std::vector<PickleValue>> PickleValue::AsTuple(size_t max) const {
  if (kind() != Kind::kTuple || size() > max) return std::nullopt;
  std::vector<PickleValue> items;
  ForEachItem([&](PickleValue item) {
    items.push_back(item);
    return true;
  });
  return items;
}

std::optional<PickleValue> PickleValue::Find(absl::string_view key) const {
  std::optional<PickleValue> found;
  ForEachEntry([&](PickleValue k, PickleValue value) {
    if (k.AsString() == key) found = value;
    return true;
  });
  return found;
}

}  // namespace dsd::dcp
