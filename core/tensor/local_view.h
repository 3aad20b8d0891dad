// SPDX-License-Identifier: Apache-2.0
//
// Where a box of a layout lies in the local tensors that hold it.

#ifndef DSD_CORE_TENSOR_LOCAL_VIEW_H_
#define DSD_CORE_TENSOR_LOCAL_VIEW_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/types/span.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/layout/layout.h"

namespace dsd {

// A box as a strided part of a local tensor. In the unit of the strides that it
// was made of.
struct LocalView {
  int64_t offset;  // from the local tensor's first element
  Dims strides;    // of the box's dimensions
};

// The index of the local tensor that has the holder's box `index`: box layouts
// have one for each, others one for all.
inline size_t LocalOf(const Layout& layout, size_t index) {
  return layout.kind() == Layout::Kind::kBoxes ? index : 0;
}

// `box` lies inside `outer`, a box that a holder of `layout` has in a local
// tensor of these strides.
LocalView LocateBox(const Layout& layout,
                    absl::Span<const int64_t> local_strides,
                    const LocalBox& outer, const Box& box);

// `box`, inside boxes[index], as a tensor that shares the memory. `boxes` are
// the holder's boxes of `layout` and `locals` its tensors. May throw
// c10::Error.
at::Tensor ViewOfBox(const Layout& layout, absl::Span<const at::Tensor> locals,
                     absl::Span<const LocalBox> boxes, size_t index,
                     const Box& box);

// The index of the box that contains `box`; nullopt if none does.
std::optional<size_t> FindBox(absl::Span<const LocalBox> boxes, const Box& box);

}  // namespace dsd

#endif  // DSD_CORE_TENSOR_LOCAL_VIEW_H_
