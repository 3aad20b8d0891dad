// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/float_cast.h"

#include <cstdint>
#include <cstring>

#include "dsd/core/base/half.h"
#include "dsd/core/base/small_float.h"

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

// What has its conversions from and to float32.
template <class StoredT, float (*kToFloat)(StoredT),
          StoredT (*kFromFloat)(float)>
struct SmallerFloat {
  using Stored = StoredT;
  static float Load(StoredT value) { return kToFloat(value); }
  static StoredT Store(double value) {
    return kFromFloat(static_cast<float>(value));
  }
};

// Calls `visit` with the type that stands for a castable dtype.
template <class Visit>
void VisitType(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat64:
      return visit(Float64());
    case DType::kFloat32:
      return visit(Float32());
    case DType::kFloat16:
      return visit(SmallerFloat<uint16_t, Float16ToFloat, FloatToFloat16>());
    case DType::kBFloat16:
      return visit(SmallerFloat<uint16_t, BFloat16ToFloat, FloatToBFloat16>());
    case DType::kFloat8E4M3FN:
      return visit(
          SmallerFloat<uint8_t, Float8E4M3FNToFloat, FloatToFloat8E4M3FN>());
    case DType::kFloat8E5M2:
      return visit(
          SmallerFloat<uint8_t, Float8E5M2ToFloat, FloatToFloat8E5M2>());
    case DType::kFloat8E4M3FNUZ:
      return visit(SmallerFloat<uint8_t, Float8E4M3FNUZToFloat,
                                FloatToFloat8E4M3FNUZ>());
    case DType::kFloat8E5M2FNUZ:
      return visit(SmallerFloat<uint8_t, Float8E5M2FNUZToFloat,
                                FloatToFloat8E5M2FNUZ>());
    default:
      return visit(
          SmallerFloat<uint8_t, Float8E8M0FNUToFloat, FloatToFloat8E8M0FNU>());
  }
}

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

}  // namespace

bool IsCastable(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kFloat32:
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kFloat8E4M3FN:
    case DType::kFloat8E5M2:
    case DType::kFloat8E4M3FNUZ:
    case DType::kFloat8E5M2FNUZ:
    case DType::kFloat8E8M0FNU:
      return true;
    default:
      return false;
  }
}

std::vector<DType> CastableDTypes() {
  std::vector<DType> dtypes;
  for (int i = 0; i < kNumDTypes; ++i) {
    const DType dtype = static_cast<DType>(i);
    if (IsCastable(dtype)) dtypes.push_back(dtype);
  }
  return dtypes;
}

void CastFloats(DType from, absl::Span<const std::byte> in, DType to,
                absl::Span<std::byte> out) {
  VisitType(from, [&](auto source) {
    VisitType(to, [&](auto target) {
      Cast<decltype(source), decltype(target)>(in, out);
    });
  });
}

}  // namespace dsd
