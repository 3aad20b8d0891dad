// SPDX-License-Identifier: Apache-2.0
//
// Tensors as Python's print() shows them.

#ifndef DSD_FRONTENDS_CLI_TENSOR_TEXT_H_
#define DSD_FRONTENDS_CLI_TENSOR_TEXT_H_

#include <cstddef>
#include <ostream>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/frontends/cli/selection.h"
#include "nlohmann/json.hpp"

namespace dsd::cli {

// A slice of more elements is summarized: three at each end of a dimension.
inline constexpr int64_t kPrintThreshold = 1000;

// Writes the slice as torch does with its default options, or, with `full`, all
// of its elements. Reads twice; in bounded memory. Errors: InvalidArgument for
// a tensor of so many dimensions that the summary is too long; of the endpoint,
// after which `out` may have a part.
absl::Status WriteTensor(Endpoint& endpoint, size_t tensor, const Slice& slice,
                         bool full, std::ostream& out);

// All elements of the slice, nested as its dimensions are; complex numbers, and
// the two numbers of a float4_e2m1fn_x2, are lists of two.
absl::StatusOr<nlohmann::ordered_json> TensorJson(Endpoint& endpoint,
                                                  size_t tensor,
                                                  const Slice& slice);

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_TENSOR_TEXT_H_
