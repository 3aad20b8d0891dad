// SPDX-License-Identifier: Apache-2.0
//
// Shapes and boxes in the global element coordinates of one tensor.

#ifndef DSD_CORE_LAYOUT_BOX_H_
#define DSD_CORE_LAYOUT_BOX_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/types/span.h"

namespace dsd {

// Extents or coordinates, outermost dimension first. Empty for a 0-dim tensor.
using Dims = absl::InlinedVector<int64_t, 4>;

// "[2, 3]".
std::string DimsToString(absl::Span<const int64_t> dims);

// A half-open hyper-rectangle [lo, hi). A 0-dim box has one element. A box with
// some hi <= lo is empty.
struct Box {
  Dims lo;
  Dims hi;

  // The whole tensor of `shape`.
  static Box Whole(absl::Span<const int64_t> shape);

  int ndim() const { return static_cast<int>(lo.size()); }
  int64_t extent(int dim) const { return hi[dim] - lo[dim]; }
  Dims extents() const;
  int64_t num_elements() const;  // 0 if empty
  bool empty() const;
  bool Contains(const Box& other) const;  // true for an empty `other`
  bool ContainsPoint(absl::Span<const int64_t> point) const;

  // "[0:2, 3:5]"; "[]" for 0-dim.
  std::string ToString() const;

  friend bool operator==(const Box& a, const Box& b) {
    return a.lo == b.lo && a.hi == b.hi;
  }
  friend bool operator!=(const Box& a, const Box& b) { return !(a == b); }
  template <class H>
  friend H AbslHashValue(H h, const Box& b) {
    return H::combine(std::move(h), b.lo, b.hi);
  }
};

// The common part; nullopt if empty. Both have the same ndim.
std::optional<Box> Intersect(const Box& a, const Box& b);

// Row-major index of `point` in a tensor of `shape`.
int64_t FlatIndex(absl::Span<const int64_t> shape,
                  absl::Span<const int64_t> point);

// Row-major strides of `shape`, in elements.
Dims RowMajorStrides(absl::Span<const int64_t> shape);

// The flat (row-major) interval [begin, end) of a tensor of `shape` as disjoint
// boxes in flat order: at most max(1, 2 * ndim - 1). Empty if begin >= end.
// 0 <= begin, end <= the number of elements.
std::vector<Box> LowerFlatInterval(absl::Span<const int64_t> shape,
                                   int64_t begin, int64_t end);

// Part `index` of `count` parts of `box` that are as even as they can be: cut
// along the outermost dimension whose largest part is at most 1/16 over the
// mean; if there is none, halved along the longest until there is. Parts are
// empty if there are fewer elements than parts. They cover the box once.
// `count` >= 1; for a 0-dim box, which cannot be cut, 1.
Box SplitBox(const Box& box, int64_t index, int64_t count);

// `a` without `b` as at most 2 * ndim disjoint boxes, none of them empty. Both
// have the same ndim.
std::vector<Box> Subtract(const Box& a, const Box& b);

}  // namespace dsd

#endif  // DSD_CORE_LAYOUT_BOX_H_
