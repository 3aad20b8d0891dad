// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/optimizer/count_tensor.h"

#include <cstdint>

#include "ATen/EmptyTensor.h"
#include "ATen/core/Tensor.h"
#include "dsd/core/tensor/torch_boundary.h"

namespace dsd {
namespace {

c10::ScalarType TypeFor(int64_t count) {
  const bool fits = static_cast<int64_t>(static_cast<float>(count)) == count;
  return fits ? c10::kFloat : c10::kDouble;
}

}  // namespace

absl::StatusOr<at::Tensor> CountTensor(int64_t count) {
  // Models have as many of them as parameters: past the dispatcher it takes a
  // third of the time of at::scalar_tensor.
  return TorchToStatus([&] {
    const c10::ScalarType type = TypeFor(count);
    at::Tensor tensor = at::detail::empty_cpu(at::IntArrayRef(), type);
    if (type == c10::kFloat) {
      *tensor.mutable_data_ptr<float>() = static_cast<float>(count);
    } else {
      *tensor.mutable_data_ptr<double>() = static_cast<double>(count);
    }
    return tensor;
  });
}

bool IsCountTensor(const at::Tensor& tensor, int64_t count) {
  if (!tensor.defined() || tensor.dim() != 0 || !tensor.is_cpu() ||
      tensor.scalar_type() != TypeFor(count)) {
    return false;
  }
  return tensor.scalar_type() == c10::kFloat
             ? *tensor.const_data_ptr<float>() == static_cast<float>(count)
             : *tensor.const_data_ptr<double>() == static_cast<double>(count);
}

}  // namespace dsd
