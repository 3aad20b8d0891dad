// SPDX-License-Identifier: Apache-2.0
//
// Sums, minima and maxima in a fixed order.

#ifndef DSD_CORE_COMM_REDUCE_H_
#define DSD_CORE_COMM_REDUCE_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/comm/communicator.h"

namespace dsd {

// Whether Reduce has this combination.
bool CanReduce(DType dtype, ReduceOp op);

// out[i] = ((parts[0][i] op parts[1][i]) op parts[2][i]) ... for `count`
// elements. float16 and bfloat16 in float32, rounded once. Integer sums wrap
// around. A NaN in any part gives NaN. Pointers need no alignment. `out` may be
// one of `parts`, else there is no overlap.
void Reduce(absl::Span<const std::byte* const> parts, int64_t count,
            DType dtype, ReduceOp op, std::byte* out);

}  // namespace dsd

#endif  // DSD_CORE_COMM_REDUCE_H_
