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

// A float of its own in memory for as many of them as LibTorch aligns to:
// optimizers have as many counts as parameters, and an allocation for each
// takes most of the time of a get.
at::Tensor NextFloat() {
  constexpr int kCounts = 16;
  thread_local c10::Storage memory;
  thread_local int used = kCounts;
  if (used == kCounts) {
    memory = at::detail::empty_cpu({kCounts}, c10::kFloat).storage();
    used = 0;
  }
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(memory), c10::DispatchKeySet(c10::DispatchKey::CPU),
      caffe2::TypeMeta::Make<float>());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(
      c10::IntArrayRef(), c10::IntArrayRef(), used++);
  // The last one keeps the memory.
  if (used == kCounts) memory = c10::Storage();
  return tensor;
}

}  // namespace

absl::StatusOr<at::Tensor> CountTensor(int64_t count) {
  return TorchToStatus([&] {
    if (TypeFor(count) == c10::kFloat) {
      at::Tensor tensor = NextFloat();
      *tensor.mutable_data_ptr<float>() = static_cast<float>(count);
      return tensor;
    }
    at::Tensor tensor = at::detail::empty_cpu(at::IntArrayRef(), c10::kDouble);
    *tensor.mutable_data_ptr<double>() = static_cast<double>(count);
    return tensor;
  });
}

}  // namespace dsd
