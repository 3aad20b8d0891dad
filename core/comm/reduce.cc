// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/reduce.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "absl/log/log.h"
#include "dsd/core/base/half.h"

namespace dsd {
namespace {

constexpr int64_t kBlock = 512;  // elements held in registers and first cache

// What is stored, what is computed with, and the way between.
template <class T>
struct Plain {
  using Stored = T;
  using Value = T;
  static T Load(T stored) { return stored; }
  static T Store(T value) { return value; }
};
struct Half {
  using Stored = uint16_t;
  using Value = float;
  static float Load(uint16_t stored) { return Float16ToFloat(stored); }
  static uint16_t Store(float value) { return FloatToFloat16(value); }
};
struct BFloat16 {
  using Stored = uint16_t;
  using Value = float;
  static float Load(uint16_t stored) { return BFloat16ToFloat(stored); }
  static uint16_t Store(float value) { return FloatToBFloat16(value); }
};

template <ReduceOp op, class T>
T Combine(T a, T b) {
  if constexpr (op == ReduceOp::kSum) {
    if constexpr (std::is_integral_v<T>) {
      using Wide = std::conditional_t<(sizeof(T) < 4), uint32_t,
                                      std::make_unsigned_t<T>>;
      return static_cast<T>(static_cast<Wide>(a) + static_cast<Wide>(b));
    } else {
      return a + b;
    }
  } else {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a) return a;
      if (b != b) return b;
    }
    return op == ReduceOp::kMin ? (b < a ? b : a) : (a < b ? b : a);
  }
}

template <class Type, ReduceOp op>
void ReduceAs(absl::Span<const std::byte* const> parts, int64_t count,
              std::byte* out) {
  using Stored = typename Type::Stored;
  using Value = typename Type::Value;
  Stored stored[kBlock];
  Value sum[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = std::min(kBlock, count - begin);
    const size_t bytes = n * sizeof(Stored);
    const int64_t offset = begin * static_cast<int64_t>(sizeof(Stored));
    std::memcpy(stored, parts[0] + offset, bytes);
    for (int64_t i = 0; i < n; ++i) sum[i] = Type::Load(stored[i]);
    for (size_t part = 1; part < parts.size(); ++part) {
      std::memcpy(stored, parts[part] + offset, bytes);
      for (int64_t i = 0; i < n; ++i) {
        sum[i] = Combine<op, Value>(sum[i], Type::Load(stored[i]));
      }
    }
    for (int64_t i = 0; i < n; ++i) stored[i] = Type::Store(sum[i]);
    std::memcpy(out + offset, stored, bytes);
  }
}

template <class Type>
void ReduceWith(absl::Span<const std::byte* const> parts, int64_t count,
                ReduceOp op, std::byte* out) {
  switch (op) {
    case ReduceOp::kSum:
      return ReduceAs<Type, ReduceOp::kSum>(parts, count, out);
    case ReduceOp::kMin:
      return ReduceAs<Type, ReduceOp::kMin>(parts, count, out);
    case ReduceOp::kMax:
      return ReduceAs<Type, ReduceOp::kMax>(parts, count, out);
  }
}

}  // namespace

bool CanReduce(DType dtype, ReduceOp op) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kFloat64:
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kInt8:
    case DType::kInt16:
    case DType::kInt32:
    case DType::kInt64:
    case DType::kUInt8:
    case DType::kUInt16:
    case DType::kUInt32:
    case DType::kUInt64:
      return true;
    case DType::kBool:
      return op != ReduceOp::kSum;
    default:
      return false;
  }
}

void Reduce(absl::Span<const std::byte* const> parts, int64_t count,
            DType dtype, ReduceOp op, std::byte* out) {
  if (count == 0) return;
  switch (dtype) {
    case DType::kFloat32:
      return ReduceWith<Plain<float>>(parts, count, op, out);
    case DType::kFloat64:
      return ReduceWith<Plain<double>>(parts, count, op, out);
    case DType::kFloat16:
      return ReduceWith<Half>(parts, count, op, out);
    case DType::kBFloat16:
      return ReduceWith<BFloat16>(parts, count, op, out);
    case DType::kInt8:
      return ReduceWith<Plain<int8_t>>(parts, count, op, out);
    case DType::kInt16:
      return ReduceWith<Plain<int16_t>>(parts, count, op, out);
    case DType::kInt32:
      return ReduceWith<Plain<int32_t>>(parts, count, op, out);
    case DType::kInt64:
      return ReduceWith<Plain<int64_t>>(parts, count, op, out);
    case DType::kUInt8:
    case DType::kBool:
      return ReduceWith<Plain<uint8_t>>(parts, count, op, out);
    case DType::kUInt16:
      return ReduceWith<Plain<uint16_t>>(parts, count, op, out);
    case DType::kUInt32:
      return ReduceWith<Plain<uint32_t>>(parts, count, op, out);
    case DType::kUInt64:
      return ReduceWith<Plain<uint64_t>>(parts, count, op, out);
    default:
      LOG(FATAL) << "Reduce of " << DTypeName(dtype);  // see CanReduce
  }
}

}  // namespace dsd
