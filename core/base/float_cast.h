// SPDX-License-Identifier: Apache-2.0
//
// Elements of one floating-point dtype as those of another, where there is no
// LibTorch.

#ifndef DSD_CORE_BASE_FLOAT_CAST_H_
#define DSD_CORE_BASE_FLOAT_CAST_H_

#include <cstddef>

#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"

namespace dsd {

// Whether CastFloats has the dtype: float64, float32, float16, bfloat16.
bool IsCastable(DType dtype);

// As Tensor::copy_: rounds to nearest, ties to even; from float64 to the half
// types by way of float32. Both spans have the same number of elements, of
// castable dtypes, at any alignment.
void CastFloats(DType from, absl::Span<const std::byte> in, DType to,
                absl::Span<std::byte> out);

}  // namespace dsd

#endif  // DSD_CORE_BASE_FLOAT_CAST_H_
