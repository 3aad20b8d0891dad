// SPDX-License-Identifier: Apache-2.0
//
// A step counter as Python has it: a 0-dim tensor in host memory.

#ifndef DSD_FRONTENDS_OPTIMIZER_COUNT_TENSOR_H_
#define DSD_FRONTENDS_OPTIMIZER_COUNT_TENSOR_H_

#include <cstdint>

#include "ATen/core/Tensor.h"
#include "absl/status/statusor.h"

namespace dsd {

// float32, or float64 for a count that float32 would round. ResourceExhausted
// if there is no memory.
absl::StatusOr<at::Tensor> CountTensor(int64_t count);

}  // namespace dsd

#endif  // DSD_FRONTENDS_OPTIMIZER_COUNT_TENSOR_H_
