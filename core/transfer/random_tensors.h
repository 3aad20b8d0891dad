// SPDX-License-Identifier: Apache-2.0
//
// Random redistributions for tests, with brute force for what must arrive.

#ifndef DSD_CORE_TRANSFER_RANDOM_TENSORS_H_
#define DSD_CORE_TRANSFER_RANDOM_TENSORS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
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

// A float32 tensor of 64 x 64 from rows over `size` ranks to columns.
TensorCase RowsToColumns(int size);

// A float32 tensor of `elements` that rank 0 has and all of `size` ranks need.
TensorCase OneToAll(int size, int64_t elements);

// The local tensor of one rank on one side: the source has its bytes, the
// target others.
std::vector<std::byte> LocalBytes(const std::vector<TensorCase>& tensors,
                                  size_t tensor, int rank, bool source);

// Internal, naming tensor and element, if the local tensor of a target has not
// become what it must.
absl::Status CheckBytes(const std::vector<TensorCase>& tensors, size_t tensor,
                        int rank, absl::Span<const std::byte> bytes);

// Storage of all tensors that every rank can read; counts what is read.
class StorageEndpoint : public Endpoint {
 public:
  // `bytes_read` is borrowed and may be null.
  explicit StorageEndpoint(const std::vector<TensorCase>& tensors,
                           std::atomic<int64_t>* bytes_read = nullptr);
  const Catalog& catalog() const override { return catalog_; }
  absl::Status Read(size_t tensor, const Box& box, int64_t begin, int64_t end,
                    DType dtype, absl::Span<std::byte> out) override;
  absl::Status Write(size_t tensor, const Box& box, int64_t begin, int64_t end,
                     DType dtype, absl::Span<const std::byte> in) override;

 private:
  Catalog catalog_;
  std::atomic<int64_t>* const bytes_read_;
};

// One rank's memory of one side.
struct Side {
  MemoryEndpoint endpoint;
  std::vector<std::vector<std::byte>> buffers;
};

// Adds the tensors, with LocalBytes, to an empty side.
absl::Status FillSide(const std::vector<TensorCase>& tensors, int rank,
                      bool source, Side& side);

// CheckBytes of all tensors.
absl::Status CheckSide(const std::vector<TensorCase>& tensors, int rank,
                       const Side& side);

// What rank `rank` must get from others: bytes it needs and does not hold.
int64_t MissingBytes(const std::vector<TensorCase>& tensors, int64_t rank);

}  // namespace dsd::test

#endif  // DSD_CORE_TRANSFER_RANDOM_TENSORS_H_
