// SPDX-License-Identifier: Apache-2.0
//
// Random redistributions for tests, with brute force for what must arrive.

#ifndef DSD_CORE_TRANSFER_RANDOM_TENSORS_H_
#define DSD_CORE_TRANSFER_RANDOM_TENSORS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/element_map.h"
#include "dsd/core/layout/random_layout.h"
#include "dsd/core/transfer/endpoint.h"

namespace dsd::test {

// One tensor with its two layouts.
struct TensorCase {
  std::string fqn;
  DType dtype;
  LayoutSpec from;
  LayoutSpec to;
};

// One to four tensors of at most 300 elements; the holders are the ranks of
// `size`.
std::vector<TensorCase> RandomTensors(Random& random, int size);

// The bytes of element `index`, counted row-major, of tensor `tensor`.
void FillElement(size_t tensor, int64_t index, int64_t item_size,
                 std::byte* out);

// One rank's memory of one side.
struct Side {
  MemoryEndpoint endpoint;
  std::vector<std::vector<std::byte>> buffers;
};

// Adds the tensors to an empty side: a source has its bytes, a target others.
absl::Status FillSide(const std::vector<TensorCase>& tensors, int rank,
                      bool source, Side& side);

// Internal, naming tensor and element, if a target has not become what it must.
absl::Status CheckSide(const std::vector<TensorCase>& tensors, int rank,
                       const Side& side);

// What rank `rank` must get from others: bytes it needs and does not hold.
int64_t MissingBytes(const std::vector<TensorCase>& tensors, int64_t rank);

}  // namespace dsd::test

#endif  // DSD_CORE_TRANSFER_RANDOM_TENSORS_H_
