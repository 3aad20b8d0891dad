// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/tensor/tensor_memory.h"

#include "ATen/EmptyTensor.h"
#include "ATen/ops/empty.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {

absl::StatusOr<at::Tensor> NewTensor(absl::Span<const int64_t> shape,
                                     const c10::TensorOptions& options) {
  return TorchToStatus([&] {
    const c10::IntArrayRef sizes = ToIntArrayRef(shape);
    if (options.device().is_cpu() && !options.pinned_memory()) {
      return at::Tensor(at::detail::empty_cpu(
          sizes, c10::typeMetaToScalarType(options.dtype())));
    }
    return at::empty(sizes, options);
  });
}

}  // namespace dsd
