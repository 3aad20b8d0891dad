// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"

#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "dsd/frontends/checkpoint/dcp/little_endian.h"

namespace dsd::dcp {
bool IsUtf8(absl::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const uint8_t lead = static_cast<uint8_t>(text[i]);
    const int more = lead < 0x80             ? 0
                     : (lead & 0xE0) == 0xC0 ? 1
                     : (lead & 0xF0) == 0xE0 ? 2
                     : (lead & 0xF8) == 0xF0 ? 3
                                             : -1;
    if (more < 0 || i + more >= text.size()) return false;
    uint32_t code = more == 0 ? lead : lead & (0x3F >> more);
    for (int k = 1; k <= more; ++k) {
      const uint8_t next = static_cast<uint8_t>(text[i + k]);
      if ((next & 0xC0) != 0x80) return false;
      code = code << 6 | (next & 0x3F);
    }
    constexpr uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    if (code < kLeast[more] || code > 0x10FFFF ||
        (code >= 0xD800 && code <= 0xDFFF)) {
      return false;
    }
    i += 1 + more;
  }
  return true;
}

PickleWriter::PickleWriter(int protocol, std::string* out)
    : protocol_(protocol), out_(out) {
  Op('\x80');
  Op(static_cast<char>(protocol));
}

void PickleWriter::Int(int64_t value) {
  if (value >= 0 && value <= 0xFF) {
    Op('K');
    Op(static_cast<char>(value));
  } else if (value >= 0 && value <= 0xFFFF) {
    Op('M');
    AppendLittleEndian(out_, static_cast<uint16_t>(value));
  } else if (value >= std::numeric_limits<int32_t>::min() &&
             value <= std::numeric_limits<int32_t>::max()) {
    Op('J');
    AppendLittleEndian(out_, static_cast<int32_t>(value));
  } else {
    // The shortest form that keeps the sign.
    int count = 8;
    while (count > 1) {
      const int64_t shifted = value >> (8 * (count - 1) - 1);
      if (shifted != 0 && shifted != -1) break;
      --count;
    }
    WideInt(
        {reinterpret_cast<const char*>(&value), static_cast<size_t>(count)});
  }
}

void PickleWriter::WideInt(absl::string_view bytes) {
  Op('\x8a');
  Op(static_cast<char>(bytes.size()));
  out_->append(bytes.data(), bytes.size());
}

void PickleWriter::Float(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  Op('G');
  AppendLittleEndian(out_, __builtin_bswap64(bits));  // big-endian, alone
}

void PickleWriter::Text(absl::string_view text) {
  if (protocol_ >= 4 && text.size() <= 0xFF) {
    Op('\x8c');
    Op(static_cast<char>(text.size()));
  } else {
    Op('X');
    AppendLittleEndian(out_, static_cast<uint32_t>(text.size()));
  }
  out_->append(text.data(), text.size());
}

void PickleWriter::Bytes(absl::string_view bytes) {
  if (protocol_ >= 4) {
    Op('B');
    AppendLittleEndian(out_, static_cast<uint32_t>(bytes.size()));
    out_->append(bytes.data(), bytes.size());
    return;
  }
  // As Python's own pickler: _codecs.encode(latin-1 text, "latin1").
  std::string text;
  for (const char c : bytes) {
    const uint8_t byte = static_cast<uint8_t>(c);
    if (byte < 0x80) {
      text.push_back(c);
    } else {
      text.push_back(static_cast<char>(0xC0 | byte >> 6));
      text.push_back(static_cast<char>(0x80 | (byte & 0x3F)));
    }
  }
  Global("_codecs", "encode");
  Text(text);
  Text("latin1");
  Tuple(2);
  Reduce();
}

void PickleWriter::Complex(double real, double imaginary) {
  Global("__builtin__", "complex");
  Float(real);
  Float(imaginary);
  Tuple(2);
  Reduce();
}

void PickleWriter::Global(absl::string_view module, absl::string_view name) {
  if (protocol_ < 4) {
    absl::StrAppend(out_, "c", module, "\n", name, "\n");
    return;
  }
  const auto [it, is_new] =
      globals_.try_emplace(absl::StrCat(module, "\n", name), 0);
  if (!is_new) {
    Recall(it->second);
    return;
  }
  SharedText(module);
  SharedText(name);
  Op('\x93');
  it->second = memo_size_;
  Memoize();
}

void PickleWriter::SharedText(absl::string_view text) {
  const auto [it, is_new] = texts_.try_emplace(text, memo_size_);
  if (!is_new) {
    Recall(it->second);
    return;
  }
  Text(text);
  Memoize();
}

void PickleWriter::Tuple(int64_t count) {
  switch (count) {
    case 0:
      return Op(')');
    case 1:
      return Op('\x85');
    case 2:
      return Op('\x86');
    case 3:
      return Op('\x87');
    default:
      return Op('t');
  }
}

void PickleWriter::Recall(uint32_t index) {
  if (index <= 0xFF) {
    Op('h');
    Op(static_cast<char>(index));
  } else {
    Op('j');
    AppendLittleEndian(out_, index);
  }
}

}  // namespace dsd::dcp
