// SPDX-License-Identifier: Apache-2.0
//
// Element types and devices of dsd to and from LibTorch's.

#ifndef DSD_CORE_TENSOR_TORCH_TYPES_H_
#define DSD_CORE_TENSOR_TORCH_TYPES_H_

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "c10/core/Device.h"
#include "c10/core/ScalarType.h"
#include "c10/util/ArrayRef.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/box.h"

namespace dsd {

// Unimplemented for types without an element layout of their own (quantized,
// sub-byte), naming the type.
absl::StatusOr<DType> ToDType(c10::ScalarType type);
c10::ScalarType ToScalarType(DType dtype);

// A type that every device has, of items of this size (1, 2, 4, 8, else 16
// bytes): as it, values are copied bit for bit.
c10::ScalarType BitsOf(int64_t item_size);

// Unimplemented for devices other than CPU and CUDA.
absl::StatusOr<Device> ToDevice(c10::Device device);
c10::Device ToTorchDevice(Device device);

inline Dims ToDims(c10::IntArrayRef sizes) {
  return Dims(sizes.begin(), sizes.end());
}
inline c10::IntArrayRef ToIntArrayRef(absl::Span<const int64_t> dims) {
  return c10::IntArrayRef(dims.data(), dims.size());
}

}  // namespace dsd

#endif  // DSD_CORE_TENSOR_TORCH_TYPES_H_
