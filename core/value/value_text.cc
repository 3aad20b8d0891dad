// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/value/value_text.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace dsd {

std::string FloatText(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  // Python writes exponents from -4 to 15 as digits.
  char buffer[64];
  const auto scientific = std::to_chars(buffer, buffer + sizeof(buffer), value,
                                        std::chars_format::scientific);
  std::string text(buffer, scientific.ptr);
  const int exponent = std::atoi(text.c_str() + text.find('e') + 1);
  if (exponent < -4 || exponent >= 16) return text;
  const auto fixed = std::to_chars(buffer, buffer + sizeof(buffer), value,
                                   std::chars_format::fixed);
  text.assign(buffer, fixed.ptr);
  return text.find('.') == std::string::npos ? text + ".0" : text;
}

std::string ComplexText(Complex value) {
  // A part is written without ".0".
  const auto part = [](double number) {
    std::string text = FloatText(number);
    if (absl::EndsWith(text, ".0")) text.resize(text.size() - 2);
    return text;
  };
  const std::string imaginary = part(value.imag());
  if (value.real() == 0 && !std::signbit(value.real())) {
    return imaginary + "j";
  }
  return absl::StrCat("(", part(value.real()), imaginary[0] == '-' ? "" : "+",
                      imaginary, "j)");
}

std::string WideIntText(const WideInt& value) {
  // The magnitude, in digits of 2^32, the highest first.
  const bool is_negative = !value.bytes.empty() && (value.bytes.back() & 0x80);
  std::vector<uint32_t> digits((value.bytes.size() + 3) / 4);
  uint64_t carry = is_negative;
  for (size_t i = 0; i < digits.size(); ++i) {
    uint32_t digit = 0;
    for (size_t b = 0; b < 4; ++b) {
      const size_t at = 4 * i + b;
      const uint8_t byte = at < value.bytes.size()
                               ? static_cast<uint8_t>(value.bytes[at])
                               : (is_negative ? 0xFF : 0);
      digit |= uint32_t{byte} << (8 * b);
    }
    if (is_negative) {
      carry += static_cast<uint32_t>(~digit);
      digit = static_cast<uint32_t>(carry);
      carry >>= 32;
    }
    digits[i] = digit;
  }
  std::reverse(digits.begin(), digits.end());
  std::string text;
  while (std::any_of(digits.begin(), digits.end(),
                     [](uint32_t digit) { return digit != 0; })) {
    uint64_t rest = 0;
    for (uint32_t& digit : digits) {
      rest = rest << 32 | digit;
      digit = static_cast<uint32_t>(rest / 1'000'000'000);
      rest %= 1'000'000'000;
    }
    text = absl::StrFormat("%09d", rest) + text;
  }
  text.erase(0, std::min(text.find_first_not_of('0'), text.size()));
  if (text.empty()) return "0";
  return is_negative ? "-" + text : text;
}

namespace internal {

std::string CutText(std::string text, size_t max_size) {
  if (text.size() <= max_size) return text;
  size_t end = max_size;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) {
    --end;
  }
  text.resize(end);
  return text + "...";
}

}  // namespace internal
}  // namespace dsd
