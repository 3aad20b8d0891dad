// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/tensor/torch_types.h"

#include <array>
#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace dsd {
namespace {

// Indexed by DType.
constexpr std::array<c10::ScalarType, kNumDTypes> kScalarTypes = {
    c10::ScalarType::Float,
    c10::ScalarType::Double,
    c10::ScalarType::Half,
    c10::ScalarType::BFloat16,
    c10::ScalarType::ComplexHalf,
    c10::ScalarType::ComplexFloat,
    c10::ScalarType::ComplexDouble,
    c10::ScalarType::Char,
    c10::ScalarType::Short,
    c10::ScalarType::Int,
    c10::ScalarType::Long,
    c10::ScalarType::Byte,
    c10::ScalarType::UInt16,
    c10::ScalarType::UInt32,
    c10::ScalarType::UInt64,
    c10::ScalarType::Bool,
    c10::ScalarType::Float8_e4m3fn,
    c10::ScalarType::Float8_e5m2,
    c10::ScalarType::Float8_e4m3fnuz,
    c10::ScalarType::Float8_e5m2fnuz,
    c10::ScalarType::Float8_e8m0fnu,
    c10::ScalarType::Float4_e2m1fn_x2,
};

}  // namespace

absl::StatusOr<DType> ToDType(c10::ScalarType type) {
  for (size_t i = 0; i < kScalarTypes.size(); ++i) {
    if (kScalarTypes[i] == type) return static_cast<DType>(i);
  }
  return absl::UnimplementedError(
      absl::StrCat("element type ", c10::toString(type),
                   " cannot be moved or stored; convert the tensor first"));
}

c10::ScalarType ToScalarType(DType dtype) {
  return kScalarTypes[static_cast<size_t>(dtype)];
}

c10::ScalarType BitsOf(int64_t item_size) {
  switch (item_size) {
    case 1:
      return c10::kByte;
    case 2:
      return c10::kShort;
    case 4:
      return c10::kInt;
    case 8:
      return c10::kLong;
    default:
      return c10::kComplexDouble;
  }
}

absl::StatusOr<Device> ToDevice(c10::Device device) {
  if (device.is_cpu()) return Device{DeviceType::kCpu, -1};
  if (device.is_cuda()) return Device{DeviceType::kCuda, device.index()};
  return absl::UnimplementedError(
      absl::StrCat("tensors on device \"", device.str(),
                   "\" are not supported; use cpu or cuda"));
}

c10::Device ToTorchDevice(Device device) {
  return c10::Device(device.type == DeviceType::kCuda ? c10::kCUDA : c10::kCPU,
                     static_cast<c10::DeviceIndex>(device.index));
}

}  // namespace dsd
