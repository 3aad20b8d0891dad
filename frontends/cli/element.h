// SPDX-License-Identifier: Apache-2.0
//
// The elements of tensors as numbers of C++, for every dtype.

#ifndef DSD_FRONTENDS_CLI_ELEMENT_H_
#define DSD_FRONTENDS_CLI_ELEMENT_H_

#include <complex>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dsd/core/base/dtype.h"
#include "dsd/core/base/half.h"
#include "dsd/core/base/small_float.h"

namespace dsd::cli {

// Reads one number. Each type below has
//   Value: double, int64_t, uint64_t, bool or std::complex<double>: exact
//   kSize: bytes of a number
//   Load:  the number at `p`
// One element of float4_e2m1fn_x2 is two numbers, given as one of two parts.
namespace element {

template <class Raw>
Raw LoadRaw(const std::byte* p) {
  Raw raw;
  std::memcpy(&raw, p, sizeof(raw));
  return raw;
}

template <class Raw, class V>
struct Plain {
  using Value = V;
  static constexpr int64_t kSize = sizeof(Raw);
  static Value Load(const std::byte* p) {
    return static_cast<Value>(LoadRaw<Raw>(p));
  }
};

struct Bool {
  using Value = bool;
  static constexpr int64_t kSize = 1;
  static Value Load(const std::byte* p) { return *p != std::byte{0}; }
};

template <class Raw, float (*kToFloat)(Raw)>
struct Converted {
  using Value = double;
  static constexpr int64_t kSize = sizeof(Raw);
  static Value Load(const std::byte* p) {
    return static_cast<double>(kToFloat(LoadRaw<Raw>(p)));
  }
};

template <class Part>
struct Complex {
  using Value = std::complex<double>;
  static constexpr int64_t kSize = 2 * Part::kSize;
  static Value Load(const std::byte* p) {
    return {Part::Load(p), Part::Load(p + Part::kSize)};
  }
};

struct Float4Pair {
  using Value = std::complex<double>;
  static constexpr int64_t kSize = 1;
  static Value Load(const std::byte* p) {
    const uint8_t bits = LoadRaw<uint8_t>(p);
    return {Float4E2M1FNToFloat(bits), Float4E2M1FNToFloat(bits >> 4)};
  }
};

using Half = Converted<uint16_t, &Float16ToFloat>;

template <class V>
inline constexpr bool kIsComplex = std::is_same_v<V, std::complex<double>>;

}  // namespace element

// Calls visit(E()) with the type of `dtype` from above.
template <class Visit>
decltype(auto) VisitElementType(DType dtype, Visit visit) {
  using namespace element;  // NOLINT
  switch (dtype) {
    case DType::kFloat32:
      return visit(Plain<float, double>());
    case DType::kFloat64:
      return visit(Plain<double, double>());
    case DType::kFloat16:
      return visit(Half());
    case DType::kBFloat16:
      return visit(Converted<uint16_t, &BFloat16ToFloat>());
    case DType::kComplex32:
      return visit(Complex<Half>());
    case DType::kComplex64:
      return visit(Complex<Plain<float, double>>());
    case DType::kComplex128:
      return visit(Complex<Plain<double, double>>());
    case DType::kInt8:
      return visit(Plain<int8_t, int64_t>());
    case DType::kInt16:
      return visit(Plain<int16_t, int64_t>());
    case DType::kInt32:
      return visit(Plain<int32_t, int64_t>());
    case DType::kInt64:
      return visit(Plain<int64_t, int64_t>());
    case DType::kUInt8:
      return visit(Plain<uint8_t, uint64_t>());
    case DType::kUInt16:
      return visit(Plain<uint16_t, uint64_t>());
    case DType::kUInt32:
      return visit(Plain<uint32_t, uint64_t>());
    case DType::kUInt64:
      return visit(Plain<uint64_t, uint64_t>());
    case DType::kBool:
      return visit(Bool());
    case DType::kFloat8E4M3FN:
      return visit(Converted<uint8_t, &Float8E4M3FNToFloat>());
    case DType::kFloat8E5M2:
      return visit(Converted<uint8_t, &Float8E5M2ToFloat>());
    case DType::kFloat8E4M3FNUZ:
      return visit(Converted<uint8_t, &Float8E4M3FNUZToFloat>());
    case DType::kFloat8E5M2FNUZ:
      return visit(Converted<uint8_t, &Float8E5M2FNUZToFloat>());
    case DType::kFloat8E8M0FNU:
      return visit(Converted<uint8_t, &Float8E8M0FNUToFloat>());
    case DType::kFloat4E2M1FNX2:
      break;
  }
  return visit(Float4Pair());
}

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_ELEMENT_H_
