// SPDX-License-Identifier: Apache-2.0
//
// Elements of one floating-point dtype as those of another, where there is no
// LibTorch.

#ifndef DSD_CORE_BASE_FLOAT_CAST_H_
#define DSD_CORE_BASE_FLOAT_CAST_H_

#include <cstddef>
#include <vector>

#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"

namespace dsd {

// Whether CastFloats has the dtype: all floating-point types but complex ones
// and that of 4 bits.
bool IsCastable(DType dtype);
std::vector<DType> CastableDTypes();

// As Tensor::copy_: rounds to nearest, ties to even; from float64 to smaller
// types by way of float32. NaN stays NaN, its other bits may differ. What is
// beyond the largest number is what the type has for it: infinity or NaN. Both
// spans have the same number of elements, of castable dtypes, at any alignment.
void CastFloats(DType from, absl::Span<const std::byte> in, DType to,
                absl::Span<std::byte> out);

}  // namespace dsd

#endif  // DSD_CORE_BASE_FLOAT_CAST_H_
