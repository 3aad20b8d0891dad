// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/tensor/local_view.h"

#include <cstddef>
#include <cstdint>
#include <optional>

#include "ATen/core/Tensor.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {

LocalView LocateBox(const Layout& layout,
                    absl::Span<const int64_t> local_strides,
                    const LocalBox& outer, const Box& box) {
  LocalView view;
  if (layout.kind() == Layout::Kind::kFlat) {
    // A lowered box is a run of the row-major tensor, so its elements are as
    // far from each other as they are in the whole tensor.
    const int64_t stride = local_strides[0];
    view.strides = RowMajorStrides(layout.shape());
    view.offset = outer.local_lo[0] * stride;
    for (int d = 0; d < box.ndim(); ++d) {
      view.strides[d] *= stride;
      view.offset += (box.lo[d] - outer.box.lo[d]) * view.strides[d];
    }
    return view;
  }
  view.strides.assign(local_strides.begin(), local_strides.end());
  view.offset = 0;
  for (int d = 0; d < box.ndim(); ++d) {
    view.offset +=
        (outer.local_lo[d] + box.lo[d] - outer.box.lo[d]) * view.strides[d];
  }
  return view;
}

at::Tensor ViewOfBox(const Layout& layout, absl::Span<const at::Tensor> locals,
                     absl::Span<const LocalBox> boxes, size_t index,
                     const Box& box) {
  const at::Tensor& local = locals[LocalOf(layout, index)];
  const LocalView view = LocateBox(
      layout, absl::MakeConstSpan(local.strides().data(), local.dim()),
      boxes[index], box);
  return local.as_strided(ToIntArrayRef(box.extents()),
                          ToIntArrayRef(view.strides),
                          local.storage_offset() + view.offset);
}

std::optional<size_t> FindBox(absl::Span<const LocalBox> boxes,
                              const Box& box) {
  for (size_t i = 0; i < boxes.size(); ++i) {
    if (boxes[i].box.Contains(box)) return i;
  }
  return std::nullopt;
}

}  // namespace dsd
