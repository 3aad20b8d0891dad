// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/pickle_reader.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/dcp/little_endian.h"

namespace dsd::dcp {
namespace {

// A reference: three bits say what the other 29 are.
enum Tag : uint32_t {
  kConstant = 0,  // None, False, True, empty tuple
  kSmallInt = 1,  // the value, biased
  kWideInt = 2,   // position of two words
  kDouble = 3,    // position of two words
  kText = 4,      // position of a length and the bytes
  kBlob = 5,      // the same
  kLongInt = 6,   // the same
  kNode = 7,      // position of a node
};
constexpr uint32_t kPayloadBits = 29;
constexpr uint32_t kPayloadMask = (uint32_t{1} << kPayloadBits) - 1;
constexpr int64_t kSmallIntBias = int64_t{1} << (kPayloadBits - 1);
constexpr int64_t kMaxWords = int64_t{1} << kPayloadBits;

constexpr uint32_t MakeRef(Tag tag, uint32_t payload) {
  return (static_cast<uint32_t>(tag) << kPayloadBits) | payload;
}
constexpr Tag TagOf(uint32_t ref) {
  return static_cast<Tag>(ref >> kPayloadBits);
}
constexpr uint32_t PayloadOf(uint32_t ref) { return ref & kPayloadMask; }

constexpr uint32_t kNoneRef = MakeRef(kConstant, 0);
constexpr uint32_t kFalseRef = MakeRef(kConstant, 1);
constexpr uint32_t kTrueRef = MakeRef(kConstant, 2);
constexpr uint32_t kEmptyTupleRef = MakeRef(kConstant, 3);

// Nodes. The first word is the kind and, for short tuples, the number of items
// that follow it. Lists, dicts and sets are chains of segments, each a count,
// the position of the next one and the items.
//   tuple     {kind | count << 8, items...}      or a chain, if count is
//   kChained list ...  {kind, first segment, last segment} global    {kind,
//   module, name} call      {kind, function, args} instance  {kind, class,
//   args, state} persid    {kind, id}
constexpr uint32_t kChained = 0xFFFFFF;
constexpr size_t kMaxShortTuple = 64;
// No state yet. It is not a value: a reference to a node at the last position.
constexpr uint32_t kAbsent = 0xFFFFFFFF;

using Kind = PickleValue::Kind;

bool IsChain(uint32_t head) {
  switch (static_cast<Kind>(head & 0xFF)) {
    case Kind::kList:
    case Kind::kDict:
    case Kind::kSet:
    case Kind::kFrozenSet:
      return true;
    case Kind::kTuple:
      return (head >> 8) == kChained;
    default:
      return false;
  }
}

// Bytes from a ReadFn, in pieces, with a position.
class Input {
 public:
  Input(int64_t size, Pickle::ReadFn read) : size_(size), read_(read) {}

  int64_t position() const { return base_ + at_; }
  bool ok() const { return status_.ok(); }
  const absl::Status& status() const { return status_; }

  // The next `count` bytes, or null at the end of the input or on an error.
  const uint8_t* Take(int64_t count) {
    if (count > end_ - at_ && !Fill(count)) return nullptr;
    const uint8_t* out = buffer_.data() + at_;
    at_ += count;
    return out;
  }

  // Up to and with the next newline, which is left out; nullopt if there is
  // none within `max` bytes.
  std::optional<absl::string_view> TakeLine(int64_t max) {
    for (int64_t length = 0; length < max; ++length) {
      if (length >= end_ - at_ && !Fill(length + 1)) return std::nullopt;
      if (buffer_[at_ + length] == '\n') {
        const absl::string_view line(
            reinterpret_cast<const char*>(buffer_.data() + at_), length);
        at_ += length + 1;
        return line;
      }
    }
    return std::nullopt;
  }

 private:
  static constexpr int64_t kPieceBytes = int64_t{256} << 10;

  bool Fill(int64_t count) {
    if (!status_.ok() || count > size_ - base_ - at_) return false;
    // Keep what is left, at the front.
    std::copy(buffer_.begin() + at_, buffer_.begin() + end_, buffer_.begin());
    base_ += at_;
    end_ -= at_;
    at_ = 0;
    const int64_t want = std::min(std::max(count, kPieceBytes), size_ - base_);
    if (static_cast<int64_t>(buffer_.size()) < want) buffer_.resize(want);
    status_ = read_(
        base_ + end_,
        absl::MakeSpan(reinterpret_cast<std::byte*>(buffer_.data()) + end_,
                       want - end_));
    if (!status_.ok()) return false;
    end_ = want;
    return true;
  }

  const int64_t size_;
  Pickle::ReadFn read_;
  std::vector<uint8_t> buffer_;
  int64_t base_ = 0;  // of the buffer in the input
  int64_t at_ = 0;    // in the buffer
  int64_t end_ = 0;
  absl::Status status_;
};

}  // namespace

// The stack machine that a pickle is a program for.
class PickleMachine {
 public:
  PickleMachine(int64_t size_bytes, Pickle::ReadFn read,
                const PickleLimits& limits)
      : limits_(limits),
        max_words_(std::min(kMaxWords - 1, limits.max_memory_bytes / 4)),
        input_(size_bytes, read) {
    // Only what is touched takes memory.
    words().reserve(std::min<int64_t>(size_bytes / 2 + 64, max_words_));
  }

  absl::StatusOr<Pickle> Run() {
    while (true) {
      op_at_ = input_.position();
      const uint8_t* op = input_.Take(1);
      if (op == nullptr) return Truncated();
      op_ = *op;
      if (op_ == '.') {
        if (stack_.size() != 1 || !marks_.empty()) {
          return Bad(absl::StrCat("the stack holds ", stack_.size(),
                                  " values at the end, expected 1"));
        }
        pickle_.root_ = stack_[0];
        return std::move(pickle_);
      }
      DSD_RETURN_IF_ERROR(Step());
      if (static_cast<int64_t>(words().size() + stack_.size() + memo_.size() +
                               marks_.size()) > max_words_) {
        return TooBig("the decoded form");
      }
    }
  }

 private:
  std::vector<uint32_t>& words() { return pickle_.words_; }

  absl::Status Bad(absl::string_view what) const {
    return absl::DataLossError(absl::StrFormat(
        "pickle: opcode 0x%02x at byte %d: %s", op_, op_at_, what));
  }
  absl::Status TooBig(absl::string_view what) const {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "pickle: at byte %d: %s exceeds the limit", op_at_, what));
  }
  absl::Status Truncated() const {
    if (!input_.ok()) return input_.status();
    return absl::DataLossError(absl::StrFormat(
        "pickle: ends inside the opcode at byte %d (truncated)", op_at_));
  }

  absl::Status Step() {
    switch (op_) {
      case 0x80: {  // PROTO
        const uint8_t* version = input_.Take(1);
        if (version == nullptr) return Truncated();
        if (*version < 2 || *version > 5) {
          return Bad(absl::StrCat("protocol ", *version, ", expected 2 to 5"));
        }
        return absl::OkStatus();
      }
      case 0x95:  // FRAME
        return input_.Take(8) == nullptr ? Truncated() : absl::OkStatus();
      case '(':
        marks_.push_back(stack_.size());
        return absl::OkStatus();
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
        return Push(WideRef(
            kDouble, __builtin_bswap64(LoadLittleEndian<uint64_t>(bytes))));
      }
      case 0x8C:
        return PushBytes(kText, 1);
      case 'X':
        return PushBytes(kText, 4);
      case 0x8D:
        return PushBytes(kText, 8);
      case 'U':
        return PushBytes(kText, 1);  // SHORT_BINSTRING, Python 2's
      case 'C':
        return PushBytes(kBlob, 1);
      case 'B':
        return PushBytes(kBlob, 4);
      case ']':
        return Push(NewNode({Word(Kind::kList), 0, 0}));
      case '}':
        return Push(NewNode({Word(Kind::kDict), 0, 0}));
      case 0x8F:
        return Push(NewNode({Word(Kind::kSet), 0, 0}));
      case 0x85:
        return PushTuple(1);
      case 0x86:
        return PushTuple(2);
      case 0x87:
        return PushTuple(3);
      case 't': {
        size_t count;
        DSD_RETURN_IF_ERROR(PopMark(&count));
        return PushTuple(count);
      }
      case 0x91: {  // FROZENSET
        size_t count;
        DSD_RETURN_IF_ERROR(PopMark(&count));
        const uint32_t set = NewNode({Word(Kind::kFrozenSet), 0, 0});
        AppendSegment(PayloadOf(set), count);
        return Push(set);
      }
      case 'a':
        return AddItems(Kind::kList, 1);
      case 'e': {
        size_t count;
        DSD_RETURN_IF_ERROR(PopMark(&count));
        return AddItems(Kind::kList, count);
      }
      case 0x90: {  // ADDITEMS
        size_t count;
        DSD_RETURN_IF_ERROR(PopMark(&count));
        return AddItems(Kind::kSet, count);
      }
      case 's':
        return AddItems(Kind::kDict, 2);
      case 'u': {
        size_t count;
        DSD_RETURN_IF_ERROR(PopMark(&count));
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
        DSD_RETURN_IF_ERROR(Need(2));
        const uint32_t name = Pop();
        const uint32_t module = Pop();
        if (TagOf(name) != kText || TagOf(module) != kText) {
          return Bad("the names of a global are not strings");
        }
        return Push(NewNode({Word(Kind::kGlobal), module, name}));
      }
      case 'R': {
        DSD_RETURN_IF_ERROR(Need(2));
        const uint32_t args = Pop();
        const uint32_t function = Pop();
        return Push(NewNode({Word(Kind::kCall), function, args}));
      }
      case 0x81: {  // NEWOBJ
        DSD_RETURN_IF_ERROR(Need(2));
        const uint32_t args = Pop();
        const uint32_t type = Pop();
        return Push(NewNode({Word(Kind::kInstance), type, args, kAbsent}));
      }
      case 'b':
        return Build();
      case 'Q': {  // BINPERSID
        if (!limits_.allow_persistent_ids) {
          return Bad("a persistent id is not allowed here");
        }
        DSD_RETURN_IF_ERROR(Need(1));
        const uint32_t id = Pop();
        return Push(NewNode({Word(Kind::kPersistentId), id}));
      }
      default:
        return Bad("not an opcode that is read here");
    }
  }

  static uint32_t Word(Kind kind) { return static_cast<uint32_t>(kind); }

  absl::Status Push(uint32_t ref) {
    stack_.push_back(ref);
    return absl::OkStatus();
  }
  uint32_t Pop() {
    const uint32_t ref = stack_.back();
    stack_.pop_back();
    return ref;
  }
  // Values above the last mark.
  size_t Available() const {
    return stack_.size() - (marks_.empty() ? 0 : marks_.back());
  }
  absl::Status Need(size_t count) const {
    if (Available() < count) return Bad("the stack holds too few values");
    return absl::OkStatus();
  }
  absl::Status PopMark(size_t* count) {
    if (marks_.empty()) return Bad("no mark on the stack");
    *count = stack_.size() - marks_.back();
    marks_.pop_back();
    return absl::OkStatus();
  }

  uint32_t NewNode(std::initializer_list<uint32_t> content) {
    const uint32_t at = static_cast<uint32_t>(words().size());
    words().insert(words().end(), content);
    return MakeRef(kNode, at & kPayloadMask);
  }
  uint32_t WideRef(Tag tag, uint64_t bits) {
    const uint32_t at = static_cast<uint32_t>(words().size());
    words().push_back(static_cast<uint32_t>(bits));
    words().push_back(static_cast<uint32_t>(bits >> 32));
    return MakeRef(tag, at & kPayloadMask);
  }
  uint32_t IntRef(int64_t value) {
    const int64_t biased = value + kSmallIntBias;
    if (value < kSmallIntBias && biased >= 0) {
      return MakeRef(kSmallInt, static_cast<uint32_t>(biased));
    }
    return WideRef(kWideInt, static_cast<uint64_t>(value));
  }
  uint32_t TextRef(Tag tag, absl::string_view text) {
    const size_t at = words().size();
    words().push_back(static_cast<uint32_t>(text.size()));
    words().resize(at + 1 + (text.size() + 3) / 4);
    std::memcpy(words().data() + at + 1, text.data(), text.size());
    return MakeRef(tag, static_cast<uint32_t>(at) & kPayloadMask);
  }

  absl::Status PushUnsigned(int bytes) {
    const uint8_t* in = input_.Take(bytes);
    if (in == nullptr) return Truncated();
    return Push(IntRef(bytes == 1 ? in[0] : LoadLittleEndian<uint16_t>(in)));
  }

  absl::Status PushLong() {
    const uint8_t* size = input_.Take(1);
    if (size == nullptr) return Truncated();
    const int count = *size;
    if (count > limits_.max_int_bytes) {
      return Bad(absl::StrCat("an integer of ", count, " bytes"));
    }
    const uint8_t* bytes = input_.Take(count);
    if (bytes == nullptr) return Truncated();
    if (count > 8) {
      return Push(TextRef(
          kLongInt,
          absl::string_view(reinterpret_cast<const char*>(bytes), count)));
    }
    uint64_t value = count > 0 && (bytes[count - 1] & 0x80) ? ~uint64_t{0} : 0;
    for (int i = count - 1; i >= 0; --i) value = (value << 8) | bytes[i];
    return Push(IntRef(static_cast<int64_t>(value)));
  }

  absl::Status PushBytes(Tag tag, int size_bytes) {
    const uint8_t* size = input_.Take(size_bytes);
    if (size == nullptr) return Truncated();
    const uint64_t length = size_bytes == 1 ? size[0]
                            : size_bytes == 4
                                ? LoadLittleEndian<uint32_t>(size)
                                : LoadLittleEndian<uint64_t>(size);
    if (length > static_cast<uint64_t>(limits_.max_string_bytes) ||
        length > std::numeric_limits<uint32_t>::max()) {
      return TooBig(absl::StrCat("a string of ", length, " bytes"));
    }
    const uint8_t* bytes = input_.Take(static_cast<int64_t>(length));
    if (bytes == nullptr) return Truncated();
    if (static_cast<int64_t>(words().size() + length / 4) > max_words_) {
      return TooBig("the decoded form");
    }
    return Push(TextRef(
        tag, absl::string_view(reinterpret_cast<const char*>(bytes), length)));
  }

  absl::Status PushTuple(size_t count) {
    DSD_RETURN_IF_ERROR(Need(count));
    uint32_t tuple;
    if (count == 0) {
      tuple = kEmptyTupleRef;
    } else if (count <= kMaxShortTuple) {
      tuple = NewNode({Word(Kind::kTuple) | static_cast<uint32_t>(count) << 8});
      PopToWords(count);
    } else {
      tuple = NewNode({Word(Kind::kTuple) | kChained << 8, 0, 0});
      AppendSegment(PayloadOf(tuple), count);
    }
    return Push(tuple);
  }

  void PopToWords(size_t count) {
    const size_t at = words().size();
    words().resize(at + count);
    std::memcpy(words().data() + at, stack_.data() + stack_.size() - count,
                count * sizeof(uint32_t));
    stack_.resize(stack_.size() - count);
  }

  // Moves the top `count` values of the stack to the end of a chain.
  void AppendSegment(uint32_t node, size_t count) {
    if (count == 0) return;
    const uint32_t segment = static_cast<uint32_t>(words().size());
    words().push_back(static_cast<uint32_t>(count));
    words().push_back(0);
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
  absl::Status AddItems(Kind kind, size_t count) {
    DSD_RETURN_IF_ERROR(Need(count + 1));
    const uint32_t target = stack_[stack_.size() - count - 1];
    if (TagOf(target) != kNode) return Bad("the target is not a container");
    uint32_t node = PayloadOf(target);
    const Kind found = static_cast<Kind>(words()[node] & 0xFF);
    if (found != kind) {
      if ((found != Kind::kCall && found != Kind::kInstance) ||
          kind == Kind::kSet) {
        return Bad("the target is a container of another kind");
      }
      auto& contents =
          kind == Kind::kDict ? pickle_.entries_ : pickle_.appended_;
      const auto [it, is_new] = contents.try_emplace(node, 0);
      if (is_new) it->second = PayloadOf(NewNode({Word(kind), 0, 0}));
      node = it->second;
    }
    AppendSegment(node, count);
    return absl::OkStatus();
  }

  absl::Status Build() {
    DSD_RETURN_IF_ERROR(Need(2));
    const uint32_t state = Pop();
    const uint32_t target = stack_.back();
    if (TagOf(target) == kNode) {
      const uint32_t node = PayloadOf(target);
      const Kind kind = static_cast<Kind>(words()[node] & 0xFF);
      if (kind == Kind::kInstance) {
        if (words()[node + 3] != kAbsent) return Bad("a second state");
        words()[node + 3] = state;
        return absl::OkStatus();
      }
      if (kind == Kind::kCall) {
        if (!pickle_.call_state_.emplace(node, state).second) {
          return Bad("a second state");
        }
        return absl::OkStatus();
      }
    }
    return Bad("state for something that is not an object");
  }

  absl::Status Memoize(size_t index) {
    DSD_RETURN_IF_ERROR(Need(1));
    if (index > memo_.size()) {
      return Bad(absl::StrCat("memo index ", index, ", expected at most ",
                              memo_.size()));
    }
    if (index == memo_.size()) {
      memo_.push_back(stack_.back());
    } else {
      memo_[index] = stack_.back();
    }
    return absl::OkStatus();
  }

  absl::Status Recall(size_t index) {
    if (index >= memo_.size()) {
      return Bad(absl::StrCat("memo index ", index, " of ", memo_.size()));
    }
    return Push(memo_[index]);
  }

  absl::Status PushGlobalLines() {
    constexpr int64_t kMaxName = 64 << 10;
    const auto module = input_.TakeLine(kMaxName);
    if (!module.has_value()) return Truncated();
    const uint32_t module_ref = TextRef(kText, *module);
    const auto name = input_.TakeLine(kMaxName);
    if (!name.has_value()) return Truncated();
    const uint32_t name_ref = TextRef(kText, *name);
    return Push(NewNode({Word(Kind::kGlobal), module_ref, name_ref}));
  }

  const PickleLimits limits_;
  const int64_t max_words_;
  Input input_;
  Pickle pickle_;
  std::vector<uint32_t> stack_;
  std::vector<size_t> marks_;
  std::vector<uint32_t> memo_;
  uint8_t op_ = 0;
  int64_t op_at_ = 0;
};

absl::StatusOr<Pickle> Pickle::Parse(int64_t size_bytes, ReadFn read,
                                     const PickleLimits& limits) {
  return PickleMachine(size_bytes, read, limits).Run();
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

Kind PickleValue::kind() const {
  switch (TagOf(ref_)) {
    case kConstant:
      return ref_ == kNoneRef         ? Kind::kNone
             : ref_ == kEmptyTupleRef ? Kind::kTuple
                                      : Kind::kBool;
    case kSmallInt:
    case kWideInt:
      return Kind::kInt;
    case kDouble:
      return Kind::kFloat;
    case kText:
      return Kind::kString;
    case kBlob:
      return Kind::kBytes;
    case kLongInt:
      return Kind::kBigInt;
    case kNode:
      break;
  }
  return static_cast<Kind>(pickle_->words_[PayloadOf(ref_)] & 0xFF);
}

std::optional<bool> PickleValue::AsBool() const {
  if (ref_ == kTrueRef) return true;
  if (ref_ == kFalseRef) return false;
  return std::nullopt;
}

std::optional<int64_t> PickleValue::AsInt() const {
  if (TagOf(ref_) == kSmallInt) {
    return static_cast<int64_t>(PayloadOf(ref_)) - kSmallIntBias;
  }
  if (TagOf(ref_) != kWideInt) return std::nullopt;
  const uint32_t* words = pickle_->words_.data() + PayloadOf(ref_);
  return static_cast<int64_t>(words[0] | static_cast<uint64_t>(words[1]) << 32);
}

std::optional<double> PickleValue::AsFloat() const {
  if (TagOf(ref_) != kDouble) return std::nullopt;
  const uint32_t* words = pickle_->words_.data() + PayloadOf(ref_);
  const uint64_t bits = words[0] | static_cast<uint64_t>(words[1]) << 32;
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

namespace {

absl::string_view TextAt(const std::vector<uint32_t>& words, uint32_t ref) {
  const uint32_t* at = words.data() + PayloadOf(ref);
  return {reinterpret_cast<const char*>(at + 1), *at};
}

}  // namespace

std::optional<absl::string_view> PickleValue::AsString() const {
  if (TagOf(ref_) != kText) return std::nullopt;
  return TextAt(pickle_->words_, ref_);
}

std::optional<absl::string_view> PickleValue::AsBytes() const {
  if (TagOf(ref_) != kBlob) return std::nullopt;
  return TextAt(pickle_->words_, ref_);
}

std::optional<absl::string_view> PickleValue::AsBigInt() const {
  if (TagOf(ref_) != kLongInt) return std::nullopt;
  return TextAt(pickle_->words_, ref_);
}

absl::string_view PickleValue::module() const {
  if (kind() != Kind::kGlobal) return "";
  return TextAt(pickle_->words_, pickle_->words_[PayloadOf(ref_) + 1]);
}

absl::string_view PickleValue::name() const {
  if (kind() != Kind::kGlobal) return "";
  return TextAt(pickle_->words_, pickle_->words_[PayloadOf(ref_) + 2]);
}

bool PickleValue::IsGlobal(absl::string_view module,
                           absl::string_view name) const {
  return kind() == Kind::kGlobal && this->name() == name &&
         this->module() == module;
}

void PickleValue::ForEachRef(
    uint32_t head,
    absl::FunctionRef<bool(const uint32_t*, uint32_t)> visit) const {
  const std::vector<uint32_t>& words = pickle_->words_;
  if (!IsChain(words[head])) {
    visit(words.data() + head + 1, words[head] >> 8);
    return;
  }
  for (uint32_t at = words[head + 1]; at != 0; at = words[at + 1]) {
    if (!visit(words.data() + at + 2, words[at])) return;
  }
}

namespace {

// The node that holds the items of a value; nullopt if it holds none.
std::optional<uint32_t> ContentsOf(
    Kind kind, uint32_t ref,
    const absl::flat_hash_map<uint32_t, uint32_t>& attached, bool entries) {
  switch (kind) {
    case Kind::kTuple:
      if (ref == kEmptyTupleRef) return std::nullopt;
      [[fallthrough]];
    case Kind::kList:
    case Kind::kSet:
    case Kind::kFrozenSet:
      if (entries) return std::nullopt;
      return PayloadOf(ref);
    case Kind::kDict:
      if (!entries) return std::nullopt;
      return PayloadOf(ref);
    case Kind::kCall:
    case Kind::kInstance: {
      const auto it = attached.find(PayloadOf(ref));
      if (it == attached.end()) return std::nullopt;
      return it->second;
    }
    default:
      return std::nullopt;
  }
}

}  // namespace

size_t PickleValue::size() const {
  size_t size = 0;
  const auto count = [&](const uint32_t*, uint32_t items) {
    size += items;
    return true;
  };
  const Kind kind = this->kind();
  if (const auto items = ContentsOf(kind, ref_, pickle_->appended_, false)) {
    ForEachRef(*items, count);
    return size;
  }
  if (const auto items = ContentsOf(kind, ref_, pickle_->entries_, true)) {
    ForEachRef(*items, count);
  }
  return size / 2;
}

bool PickleValue::HasAtMost(size_t max) const {
  const Kind kind = this->kind();
  const auto items = ContentsOf(kind, ref_, pickle_->appended_, false);
  const auto entries = items.has_value()
                           ? std::nullopt
                           : ContentsOf(kind, ref_, pickle_->entries_, true);
  if (!items.has_value() && !entries.has_value()) return true;
  const size_t limit = items.has_value() ? max : 2 * max;
  size_t size = 0;
  ForEachRef(items.has_value() ? *items : *entries,
             [&](const uint32_t*, uint32_t count) {
               size += count;
               return size <= limit;
             });
  return size <= limit;
}

void PickleValue::ForEachItem(
    absl::FunctionRef<bool(PickleValue)> visit) const {
  const auto contents = ContentsOf(kind(), ref_, pickle_->appended_, false);
  if (!contents.has_value()) return;
  ForEachRef(*contents, [&](const uint32_t* items, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) {
      if (!visit(PickleValue(pickle_, items[i]))) return false;
    }
    return true;
  });
}

void PickleValue::ForEachEntry(
    absl::FunctionRef<bool(PickleValue, PickleValue)> visit) const {
  const auto contents = ContentsOf(kind(), ref_, pickle_->entries_, true);
  if (!contents.has_value()) return;
  ForEachRef(*contents, [&](const uint32_t* items, uint32_t count) {
    for (uint32_t i = 0; i + 1 < count; i += 2) {
      if (!visit(PickleValue(pickle_, items[i]),
                 PickleValue(pickle_, items[i + 1]))) {
        return false;
      }
    }
    return true;
  });
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

PickleValue PickleValue::callee() const {
  switch (kind()) {
    case Kind::kCall:
    case Kind::kInstance:
    case Kind::kPersistentId:
      return {pickle_, pickle_->words_[PayloadOf(ref_) + 1]};
    default:
      return {pickle_, kNoneRef};
  }
}

PickleValue PickleValue::args() const {
  switch (kind()) {
    case Kind::kCall:
    case Kind::kInstance:
      return {pickle_, pickle_->words_[PayloadOf(ref_) + 2]};
    default:
      return {pickle_, kEmptyTupleRef};
  }
}

std::optional<PickleValue> PickleValue::state() const {
  uint32_t state = kAbsent;
  if (kind() == Kind::kInstance) {
    state = pickle_->words_[PayloadOf(ref_) + 3];
  } else if (kind() == Kind::kCall) {
    const auto it = pickle_->call_state_.find(PayloadOf(ref_));
    if (it != pickle_->call_state_.end()) state = it->second;
  }
  if (state == kAbsent) return std::nullopt;
  return PickleValue(pickle_, state);
}

}  // namespace dsd::dcp
