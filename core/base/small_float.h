// SPDX-License-Identifier: Apache-2.0
//
// The floating-point types of 8 and 4 bits, as bit patterns, to float32, which
// has all of their values; those of 8 bits also from it. Equal to what LibTorch
// does: round to nearest, ties to even; NaN stays NaN.

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

// The bits of a finite magnitude, given by its bits as a float; beyond the
// largest one of the type, what lies above that.
template <int kExponentBits, int kFractionBits, int kBias>
uint32_t RoundToSmallFloat(uint32_t magnitude) {
  constexpr int kDropped = 23 - kFractionBits;
  constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(128 - kBias) << 23;
  if (magnitude < kSmallestNormal) {
    // Adding this puts the unit of the subnormals into the last bit, so the
    // addition itself rounds.
    constexpr uint32_t kUnit = static_cast<uint32_t>(128 - kBias + kDropped)
                               << 23;
    return FloatBits(FloatFromBits(magnitude) + FloatFromBits(kUnit)) - kUnit;
  }
  const uint32_t odd = (magnitude >> kDropped) & 1;
  return (magnitude - (static_cast<uint32_t>(127 - kBias) << 23) +
          (1u << (kDropped - 1)) - 1 + odd) >>
         kDropped;
}

// The sign, in the highest bit of 8.
inline uint32_t SignBit(float value) { return FloatBits(value) >> 31 << 7; }

constexpr uint32_t kFloatInfinity = 0x7f800000;

// One NaN, in the place of -0; `kBound`: a power of two that is beyond all.
template <int kExponentBits, int kFractionBits, int kBias, uint32_t kBound>
uint8_t FloatToFnuz(float value) {
  const uint32_t magnitude = FloatBits(value) & 0x7fffffff;
  if (magnitude >= kBound) return 0x80;
  const uint32_t bits =
      RoundToSmallFloat<kExponentBits, kFractionBits, kBias>(magnitude);
  if (bits == 0) return 0;
  return static_cast<uint8_t>(bits | SignBit(value));
}

}  // namespace internal

// Two NaN, no infinity.
inline float Float8E4M3FNToFloat(uint8_t bits) {
  if ((bits & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  return internal::SmallFloat<4, 3, 7>(bits);
}

inline uint8_t FloatToFloat8E4M3FN(float value) {
  const uint32_t magnitude = internal::FloatBits(value) & 0x7fffffff;
  const uint32_t bits = magnitude >= internal::FloatBits(480.0f)
                            ? 0x7f
                            : internal::RoundToSmallFloat<4, 3, 7>(magnitude);
  return static_cast<uint8_t>(bits | internal::SignBit(value));
}

// As IEEE's types.
inline float Float8E5M2ToFloat(uint8_t bits) {
  if ((bits & 0x7f) > 0x7c) return std::numeric_limits<float>::quiet_NaN();
  if (bits == 0x7c) return std::numeric_limits<float>::infinity();
  if (bits == 0xfc) return -std::numeric_limits<float>::infinity();
  return internal::SmallFloat<5, 2, 15>(bits);
}

inline uint8_t FloatToFloat8E5M2(float value) {
  const uint32_t magnitude = internal::FloatBits(value) & 0x7fffffff;
  const uint32_t bits = magnitude > internal::kFloatInfinity ? 0x7f
                        : magnitude >= internal::FloatBits(0x1p16f)
                            ? 0x7c
                            : internal::RoundToSmallFloat<5, 2, 15>(magnitude);
  return static_cast<uint8_t>(bits | internal::SignBit(value));
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

inline uint8_t FloatToFloat8E4M3FNUZ(float value) {
  return internal::FloatToFnuz<4, 3, 8, 0x43800000>(value);  // 2^8
}
inline uint8_t FloatToFloat8E5M2FNUZ(float value) {
  return internal::FloatToFnuz<5, 2, 16, 0x47800000>(value);  // 2^16
}

// A power of two; one NaN, no zero, no sign.
inline float Float8E8M0FNUToFloat(uint8_t bits) {
  if (bits == 0xff) return std::numeric_limits<float>::quiet_NaN();
  return internal::FloatFromBits(bits == 0 ? 0x00400000
                                           : static_cast<uint32_t>(bits) << 23);
}

inline uint8_t FloatToFloat8E8M0FNU(float value) {
  const uint32_t bits = internal::FloatBits(value);
  const uint32_t exponent = bits >> 23 & 0xff;
  if (exponent == 0xff) return 0xff;
  // The fraction rounds the exponent; half of it goes up, or, below the normal
  // numbers, down.
  const uint32_t fraction = bits & 0x7fffff;
  const uint32_t half = 0x400000;
  return static_cast<uint8_t>(
      exponent + (fraction > half || (fraction == half && exponent > 0)));
}

// The lowest 4 bits. No NaN, no infinity.
inline float Float4E2M1FNToFloat(uint8_t bits) {
  return internal::SmallFloat<2, 1, 1>(bits & 0xf);
}

}  // namespace dsd

#endif  // DSD_CORE_BASE_SMALL_FLOAT_H_
