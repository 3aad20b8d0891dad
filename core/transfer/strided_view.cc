// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/strided_view.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace dsd {
namespace {

// Dimensions from outermost to innermost with those merged that lie back to
// back in all of kViews views, so that walks have long inner runs.
template <int kViews>
struct Walk {
  Dims extents;
  std::array<Dims, kViews> strides;  // in bytes
};

template <int kViews>
Walk<kViews> MergeDims(const std::array<const StridedView*, kViews>& views,
                       absl::Span<const int64_t> extents) {
  Walk<kViews> walk;
  for (size_t d = 0; d < extents.size(); ++d) {
    if (extents[d] == 1) continue;
    bool merges = !walk.extents.empty();
    for (int v = 0; v < kViews && merges; ++v) {
      merges =
          walk.strides[v].back() == views[v]->strides_bytes[d] * extents[d];
    }
    if (merges) {
      walk.extents.back() *= extents[d];
    } else {
      walk.extents.push_back(extents[d]);
    }
    for (int v = 0; v < kViews; ++v) {
      if (!merges) walk.strides[v].push_back(0);
      walk.strides[v].back() = views[v]->strides_bytes[d];
    }
  }
  if (walk.extents.empty()) {
    walk.extents.push_back(1);
    for (Dims& strides : walk.strides) strides.push_back(0);
  }
  return walk;
}

// Calls run(pointer, count, stride) for stretches of the innermost dimension
// that cover elements [begin, end) in row-major order.
template <class Run>
void ForEachRun(const StridedView& view, absl::Span<const int64_t> extents,
                int64_t begin, int64_t end, Run run) {
  if (begin >= end) return;
  const Walk<1> walk = MergeDims<1>({&view}, extents);
  const Dims& strides = walk.strides[0];
  const int last = static_cast<int>(walk.extents.size()) - 1;
  Dims at(walk.extents.size(), 0);
  int64_t rest = begin;
  std::byte* base = view.base;
  for (int d = last; d >= 0; --d) {
    at[d] = rest % walk.extents[d];
    rest /= walk.extents[d];
    base += at[d] * strides[d];
  }
  for (int64_t left = end - begin; left > 0;) {
    const int64_t count = std::min(walk.extents[last] - at[last], left);
    run(base, count, strides[last]);
    left -= count;
    base -= at[last] * strides[last];
    at[last] = 0;
    for (int d = last - 1; d >= 0; --d) {
      base += strides[d];
      if (++at[d] < walk.extents[d]) break;
      base -= at[d] * strides[d];
      at[d] = 0;
    }
  }
}

template <int64_t kSize>
void CopyItems(std::byte* to, int64_t to_stride, const std::byte* from,
               int64_t from_stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to, from, kSize);
    to += to_stride;
    from += from_stride;
  }
}

void CopyRun(std::byte* to, int64_t to_stride, const std::byte* from,
             int64_t from_stride, int64_t count, int64_t item_size) {
  if (count == 1 || (to_stride == item_size && from_stride == item_size)) {
    std::memcpy(to, from, count * item_size);
    return;
  }
  switch (item_size) {
    case 1:
      return CopyItems<1>(to, to_stride, from, from_stride, count);
    case 2:
      return CopyItems<2>(to, to_stride, from, from_stride, count);
    case 4:
      return CopyItems<4>(to, to_stride, from, from_stride, count);
    case 8:
      return CopyItems<8>(to, to_stride, from, from_stride, count);
    default:
      return CopyItems<16>(to, to_stride, from, from_stride, count);
  }
}

}  // namespace

bool IsContiguous(const StridedView& view, absl::Span<const int64_t> extents,
                  int64_t item_size) {
  for (int d = static_cast<int>(extents.size()) - 1; d >= 0; --d) {
    if (extents[d] != 1 && view.strides_bytes[d] != item_size) return false;
    item_size *= extents[d];
  }
  return true;
}

void PackRange(const StridedView& view, absl::Span<const int64_t> extents,
               int64_t item_size, int64_t begin, int64_t end, std::byte* out) {
  ForEachRun(view, extents, begin, end,
             [&](const std::byte* from, int64_t count, int64_t stride) {
               CopyRun(out, item_size, from, stride, count, item_size);
               out += count * item_size;
             });
}

void UnpackRange(const StridedView& view, absl::Span<const int64_t> extents,
                 int64_t item_size, int64_t begin, int64_t end,
                 const std::byte* in) {
  ForEachRun(view, extents, begin, end,
             [&](std::byte* to, int64_t count, int64_t stride) {
               CopyRun(to, stride, in, item_size, count, item_size);
               in += count * item_size;
             });
}

void CopyBox(const StridedView& from, const StridedView& to,
             absl::Span<const int64_t> extents, int64_t item_size) {
  int64_t elements = 1;
  for (int64_t extent : extents) elements *= extent;
  if (elements <= 0 ||
      (from.base == to.base && from.strides_bytes == to.strides_bytes)) {
    return;
  }
  // The last dimension runs in one loop.
  const Walk<2> walk = MergeDims<2>({&to, &from}, extents);
  const auto& [to_strides, from_strides] = walk.strides;
  const int last = static_cast<int>(walk.extents.size()) - 1;
  const int64_t inner = walk.extents[last];
  Dims at(walk.extents.size(), 0);
  std::byte* to_row = to.base;
  const std::byte* from_row = from.base;
  for (int64_t row = 0; row < elements / inner; ++row) {
    CopyRun(to_row, to_strides[last], from_row, from_strides[last], inner,
            item_size);
    for (int d = last - 1; d >= 0; --d) {
      to_row += to_strides[d];
      from_row += from_strides[d];
      if (++at[d] < walk.extents[d]) break;
      to_row -= walk.extents[d] * to_strides[d];
      from_row -= walk.extents[d] * from_strides[d];
      at[d] = 0;
    }
  }
}

}  // namespace dsd
