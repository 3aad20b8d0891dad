// SPDX-License-Identifier: Apache-2.0
//
// Tensors as memory: of results, and what is needed soon.

#ifndef DSD_CORE_TENSOR_NEW_TENSOR_H_
#define DSD_CORE_TENSOR_NEW_TENSOR_H_

#include "ATen/core/Tensor.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "c10/core/TensorOptions.h"
#include "dsd/core/base/prefetch.h"

namespace dsd {

// A contiguous tensor of `shape` whose values are unspecified: at::empty, but
// in host memory without LibTorch's dispatcher, which for small tensors takes
// longer than all else. ResourceExhausted; what LibTorch reports.
absl::StatusOr<at::Tensor> NewTensor(absl::Span<const int64_t> shape,
                                     const c10::TensorOptions& options);

// A tensor is three objects apart from each other, of which each is found
// through the one before: prefetch them some steps after one another.
inline void PrefetchTensor(const at::Tensor& tensor) {
  PrefetchBytes(tensor.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
}
inline void PrefetchTensors(absl::Span<const at::Tensor> tensors) {
  for (const at::Tensor& tensor : tensors) PrefetchTensor(tensor);
}
inline void PrefetchStorage(const at::Tensor& tensor) {
  PrefetchBytes(
      tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl(),
      sizeof(c10::StorageImpl));
}

inline void PrefetchMemory(const at::Tensor& tensor) {
  c10::StorageImpl* const storage =
      tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  if (storage != nullptr) {
    PrefetchBytes(storage->_mutable_data_ptr_no_checks().get(), 1);
  }
}

}  // namespace dsd

#endif  // DSD_CORE_TENSOR_NEW_TENSOR_H_
