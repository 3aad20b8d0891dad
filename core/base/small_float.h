// SPDX-License-Identifier: Apache-2.0
//
// The floating-point types of 8 and 4 bits, as bit patterns, to float32, which
// has all of their values.

#ifndef DSD_CORE_BASE_SMALL_FLOAT_H_
#define DSD_CORE_BASE_SMALL_FLOAT_H_

#include <cmath>
#include <cstdint>
#include <limits>

#include "dsd/core/base/half.h"

namespace dsd {
namespace internal {

// Sign, exponent, fraction; of the lowest bits of `bits`. No special values.
template <int kExponentBits, int kFractionBits, int kBias>
float SmallFloat(uint8_t bits) {
  constexpr int kFractionMask = (1 << kFractionBits) - 1;
  constexpr int kExponentMask = (1 << kExponentBits) - 1;
  const uint32_t exponent = (bits >> kFractionBits) & kExponentMask;
  const uint32_t fraction = bits & kFractionMask;
  const float magnitude = exponent == 0
                              ? static_cast<float>(fraction) *
                                    std::ldexp(1.0f, 1 - kBias - kFractionBits)
                              : FloatFromBits((exponent + 127 - kBias) << 23 |
                                              fraction << (23 - kFractionBits));
  return ((bits >> (kExponentBits + kFractionBits)) & 1) != 0 ? -magnitude
                                                              : magnitude;
}

}  // namespace internal

// Two NaN, no infinity.
inline float Float8E4M3FNToFloat(uint8_t bits) {
  if ((bits & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  return internal::SmallFloat<4, 3, 7>(bits);
}

// As IEEE's types.
inline float Float8E5M2ToFloat(uint8_t bits) {
  if ((bits & 0x7f) > 0x7c) return std::numeric_limits<float>::quiet_NaN();
  if (bits == 0x7c) return std::numeric_limits<float>::infinity();
  if (bits == 0xfc) return -std::numeric_limits<float>::infinity();
  return internal::SmallFloat<5, 2, 15>(bits);
}

// One NaN, in the place of -0; no infinity.
inline float Float8E4M3FNUZToFloat(uint8_t bits) {
  if (bits == 0x80) return std::numeric_limits<float>::quiet_NaN();
  return internal::SmallFloat<4, 3, 8>(bits);
}
inline float Float8E5M2FNUZToFloat(uint8_t bits) {
  if (bits == 0x80) return std::numeric_limits<float>::quiet_NaN();
  return internal::SmallFloat<5, 2, 16>(bits);
}

// A power of two; one NaN, no zero.
inline float Float8E8M0FNUToFloat(uint8_t bits) {
  if (bits == 0xff) return std::numeric_limits<float>::quiet_NaN();
  return internal::FloatFromBits(bits == 0 ? 0x00400000
                                           : static_cast<uint32_t>(bits) << 23);
}

// The lowest 4 bits. No NaN, no infinity.
inline float Float4E2M1FNToFloat(uint8_t bits) {
  return internal::SmallFloat<2, 1, 1>(bits & 0xf);
}

}  // namespace dsd

#endif  // DSD_CORE_BASE_SMALL_FLOAT_H_
