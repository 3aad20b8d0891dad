// SPDX-License-Identifier: Apache-2.0
//
// Element types and devices, free of LibTorch. `core/tensor` maps them to and
// from c10::ScalarType; checkpoint formats map them to their own names.

#ifndef DSD_CORE_BASE_DTYPE_H_
#define DSD_CORE_BASE_DTYPE_H_

#include <cstdint>
#include <optional>

#include "absl/strings/string_view.h"

namespace dsd {

// The values are part of digests and of the wire: append only.
enum class DType : uint8_t {
  kFloat32 = 0,
  kFloat64 = 1,
  kFloat16 = 2,
  kBFloat16 = 3,
  kComplex32 = 4,
  kComplex64 = 5,
  kComplex128 = 6,
  kInt8 = 7,
  kInt16 = 8,
  kInt32 = 9,
  kInt64 = 10,
  kUInt8 = 11,
  kUInt16 = 12,
  kUInt32 = 13,
  kUInt64 = 14,
  kBool = 15,
  kFloat8E4M3FN = 16,
  kFloat8E5M2 = 17,
  kFloat8E4M3FNUZ = 18,
  kFloat8E5M2FNUZ = 19,
  kFloat8E8M0FNU = 20,
  kFloat4E2M1FNX2 = 21,  // two values in one byte; one element is one byte
};
inline constexpr int kNumDTypes = 22;

// Bytes of one element.
int64_t ItemSize(DType dtype);

// Python's name without "torch.": "float32", "bfloat16", "float8_e4m3fn".
absl::string_view DTypeName(DType dtype);

// The inverse of DTypeName; nullopt for an unknown name.
std::optional<DType> ParseDType(absl::string_view name);

// What happens to a tensor that is given with another element type than that
// of the live one.
enum class DTypePolicy : uint8_t {
  kDefault,  // a set into a model: kCast; into an optimizer's state: kKeep; a
             // load of a checkpoint: kError
  kCast,     // it is converted to the live type
  kKeep,     // the live tensor takes the type that is given; for a model that
             // needs `assign`, for a load of a checkpoint it cannot be
  kError,    // it does not fit
};

enum class DeviceType : uint8_t { kCpu = 0, kCuda = 1 };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = -1;  // -1: the current one

  friend bool operator==(const Device& a, const Device& b) {
    return a.type == b.type && a.index == b.index;
  }
  friend bool operator!=(const Device& a, const Device& b) { return !(a == b); }
};

}  // namespace dsd

#endif  // DSD_CORE_BASE_DTYPE_H_
