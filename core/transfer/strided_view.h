// SPDX-License-Identifier: Apache-2.0
//
// Boxes in memory, and copies between them.

#ifndef DSD_CORE_TRANSFER_STRIDED_VIEW_H_
#define DSD_CORE_TRANSFER_STRIDED_VIEW_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "dsd/core/layout/box.h"

namespace dsd {

// A box in memory. Element i of dimension d is strides_bytes[d] after element
// i-1; any stride, also negative or 0. Does not own.
struct StridedView {
  std::byte* base = nullptr;
  Dims strides_bytes;
};

// Whether the elements of a box of `extents` lie back to back, row-major.
bool IsContiguous(const StridedView& view, absl::Span<const int64_t> extents,
                  int64_t item_size);

// In host memory: copies elements [begin, end) of a box of `extents`, counted
// row-major, from strided memory to packed memory, and back.
void PackRange(const StridedView& view, absl::Span<const int64_t> extents,
               int64_t item_size, int64_t begin, int64_t end, std::byte* out);
void UnpackRange(const StridedView& view, absl::Span<const int64_t> extents,
                 int64_t item_size, int64_t begin, int64_t end,
                 const std::byte* in);

// In host memory: copies a whole box between two strided views.
void CopyBox(const StridedView& from, const StridedView& to,
             absl::Span<const int64_t> extents, int64_t item_size);

}  // namespace dsd

#endif  // DSD_CORE_TRANSFER_STRIDED_VIEW_H_
