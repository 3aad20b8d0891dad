// SPDX-License-Identifier: Apache-2.0
//
// float16 and bfloat16, as bit patterns, to and from float32. Equal to what
// LibTorch does: round to nearest, ties to even; NaN stays NaN.

#ifndef DSD_CORE_BASE_HALF_H_
#define DSD_CORE_BASE_HALF_H_

#include <cstdint>
#include <cstring>

namespace dsd {
namespace internal {

inline uint32_t FloatBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace internal

inline float BFloat16ToFloat(uint16_t bits) {
  return internal::FloatFromBits(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t FloatToBFloat16(float value) {
  if (value != value) return 0x7fc0;
  const uint32_t bits = internal::FloatBits(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float Float16ToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinity, NaN
    return internal::FloatFromBits(sign | 0x7f800000 |
                                   ((magnitude & 0x3ff) << 13));
  }
  if (magnitude < 0x400) {  // zero, subnormal: magnitude * 2^-24 is exact
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return internal::FloatFromBits(sign | internal::FloatBits(value));
  }
  return internal::FloatFromBits(sign | ((magnitude << 13) + (112u << 23)));
}

inline uint16_t FloatToFloat16(float value) {
  const uint32_t bits = internal::FloatBits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 2^16 and above
  if (magnitude < 0x38800000) {                       // below 2^-14: subnormal
    // Adding 0.5 puts the unit of float16's subnormals into the last bit, so
    // the addition itself rounds.
    const float rounded = internal::FloatFromBits(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(internal::FloatBits(rounded) -
                                        internal::FloatBits(0.5f));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return sign |
         static_cast<uint16_t>((magnitude - (112u << 23) + 0xfff + odd) >> 13);
}

}  // namespace dsd

#endif  // DSD_CORE_BASE_HALF_H_
