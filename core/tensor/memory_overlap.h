// SPDX-License-Identifier: Apache-2.0
//
// Tensors that share elements: filling one changes the other.

#ifndef DSD_CORE_TENSOR_MEMORY_OVERLAP_H_
#define DSD_CORE_TENSOR_MEMORY_OVERLAP_H_

#include <cstddef>
#include <optional>
#include <utility>

#include "ATen/core/Tensor.h"
#include "absl/types/span.h"

namespace dsd {

// Whether two elements of `tensor` are at one place (expanded, unfolded).
bool OverlapsItself(const at::Tensor& tensor);

// The first pair of tensors (by index, the smaller one first) of which an
// element of one is an element of the other; nullopt if there is none. Exact
// for any strides. Linear in the number of tensors; views whose ranges of
// memory are interleaved are compared element by element, with one bit per byte
// of one of them. Undefined tensors and those without memory are in no pair.
std::optional<std::pair<size_t, size_t>> FindOverlap(
    absl::Span<const at::Tensor> tensors);

}  // namespace dsd

#endif  // DSD_CORE_TENSOR_MEMORY_OVERLAP_H_
