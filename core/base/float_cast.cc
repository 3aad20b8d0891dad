// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/float_cast.h"

#include <cstdint>
#include <cstring>

#include "dsd/core/base/half.h"

namespace dsd {
namespace {

struct Float64 {
  using Stored = double;
  static double Load(double value) { return value; }
  static double Store(double value) { return value; }
};
struct Float32 {
  using Stored = float;
  static float Load(float value) { return value; }
  static float Store(double value) { return static_cast<float>(value); }
};
struct Float16 {
  using Stored = uint16_t;
  static float Load(uint16_t value) { return Float16ToFloat(value); }
  static uint16_t Store(double value) {
    return FloatToFloat16(static_cast<float>(value));
  }
};
struct BFloat16 {
  using Stored = uint16_t;
  static float Load(uint16_t value) { return BFloat16ToFloat(value); }
  static uint16_t Store(double value) {
    return FloatToBFloat16(static_cast<float>(value));
  }
};

template <class From, class To>
void Cast(absl::Span<const std::byte> in, absl::Span<std::byte> out) {
  const size_t count = out.size() / sizeof(typename To::Stored);
  for (size_t i = 0; i < count; ++i) {
    typename From::Stored value;
    std::memcpy(&value, in.data() + i * sizeof(value), sizeof(value));
    const typename To::Stored result = To::Store(From::Load(value));
    std::memcpy(out.data() + i * sizeof(result), &result, sizeof(result));
  }
}

template <class From>
void CastFrom(absl::Span<const std::byte> in, DType to,
              absl::Span<std::byte> out) {
  switch (to) {
    case DType::kFloat64:
      return Cast<From, Float64>(in, out);
    case DType::kFloat32:
      return Cast<From, Float32>(in, out);
    case DType::kFloat16:
      return Cast<From, Float16>(in, out);
    default:
      return Cast<From, BFloat16>(in, out);
  }
}

}  // namespace

bool IsCastable(DType dtype) {
  return dtype == DType::kFloat64 || dtype == DType::kFloat32 ||
         dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

void CastFloats(DType from, absl::Span<const std::byte> in, DType to,
                absl::Span<std::byte> out) {
  switch (from) {
    case DType::kFloat64:
      return CastFrom<Float64>(in, to, out);
    case DType::kFloat32:
      return CastFrom<Float32>(in, to, out);
    case DType::kFloat16:
      return CastFrom<Float16>(in, to, out);
    default:
      return CastFrom<BFloat16>(in, to, out);
  }
}

}  // namespace dsd
