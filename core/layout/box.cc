// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/layout/box.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace dsd {
namespace {

// Appends the boxes of the flat interval [begin, end) of the sub-tensor that
// the first `dim` coordinates of `at` select.
void AppendLowered(absl::Span<const int64_t> shape, const Dims& strides,
                   int dim, int64_t begin, int64_t end, Dims& at,
                   std::vector<Box>& out) {
  const int64_t stride = strides[dim];
  int64_t first = begin / stride;
  const int64_t last = end / stride;
  const int64_t head = begin % stride;
  const int64_t tail = end % stride;
  if (first == last) {
    at[dim] = first;
    AppendLowered(shape, strides, dim + 1, head, tail, at, out);
    return;
  }
  if (head != 0) {
    at[dim] = first++;
    AppendLowered(shape, strides, dim + 1, head, stride, at, out);
  }
  if (first < last) {
    Box box{at, at};
    for (int d = 0; d < dim; ++d) box.hi[d] = at[d] + 1;
    box.lo[dim] = first;
    box.hi[dim] = last;
    for (size_t d = dim + 1; d < shape.size(); ++d) {
      box.lo[d] = 0;
      box.hi[d] = shape[d];
    }
    out.push_back(std::move(box));
  }
  if (tail != 0) {
    at[dim] = last;
    AppendLowered(shape, strides, dim + 1, 0, tail, at, out);
  }
}

// The outermost dimension along which `count` parts are nearly even; -1 if
// there is none.
int EvenDim(const Box& box, int64_t count) {
  for (int d = 0; d < box.ndim(); ++d) {
    const int64_t each = box.extent(d) / count;
    const bool longer = box.extent(d) % count != 0;
    if (each >= (longer ? 16 : 1)) return d;
  }
  return -1;
}

}  // namespace

std::string DimsToString(absl::Span<const int64_t> dims) {
  return absl::StrCat("[", absl::StrJoin(dims, ", "), "]");
}

Box Box::Whole(absl::Span<const int64_t> shape) {
  return {Dims(shape.size(), 0), Dims(shape.begin(), shape.end())};
}

Dims Box::extents() const {
  Dims out(lo.size());
  for (int d = 0; d < ndim(); ++d) out[d] = extent(d);
  return out;
}

int64_t Box::num_elements() const {
  if (empty()) return 0;
  int64_t count = 1;
  for (int d = 0; d < ndim(); ++d) count *= extent(d);
  return count;
}

bool Box::empty() const {
  for (int d = 0; d < ndim(); ++d) {
    if (hi[d] <= lo[d]) return true;
  }
  return false;
}

bool Box::Contains(const Box& other) const {
  if (other.empty()) return true;
  for (int d = 0; d < ndim(); ++d) {
    if (other.lo[d] < lo[d] || other.hi[d] > hi[d]) return false;
  }
  return true;
}

bool Box::ContainsPoint(absl::Span<const int64_t> point) const {
  for (int d = 0; d < ndim(); ++d) {
    if (point[d] < lo[d] || point[d] >= hi[d]) return false;
  }
  return true;
}

std::string Box::ToString() const {
  std::string out = "[";
  for (int d = 0; d < ndim(); ++d) {
    absl::StrAppend(&out, d == 0 ? "" : ", ", lo[d], ":", hi[d]);
  }
  out += "]";
  return out;
}

std::optional<Box> Intersect(const Box& a, const Box& b) {
  Box out = a;
  for (int d = 0; d < a.ndim(); ++d) {
    out.lo[d] = std::max(a.lo[d], b.lo[d]);
    out.hi[d] = std::min(a.hi[d], b.hi[d]);
    if (out.hi[d] <= out.lo[d]) return std::nullopt;
  }
  return out;
}

int64_t FlatIndex(absl::Span<const int64_t> shape,
                  absl::Span<const int64_t> point) {
  int64_t index = 0;
  for (size_t d = 0; d < shape.size(); ++d) index = index * shape[d] + point[d];
  return index;
}

Dims RowMajorStrides(absl::Span<const int64_t> shape) {
  Dims strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  }
  return strides;
}

std::vector<Box> LowerFlatInterval(absl::Span<const int64_t> shape,
                                   int64_t begin, int64_t end) {
  std::vector<Box> out;
  if (begin >= end) return out;
  if (shape.empty()) {
    out.emplace_back();
    return out;
  }
  Dims at(shape.size(), 0);
  AppendLowered(shape, RowMajorStrides(shape), 0, begin, end, at, out);
  return out;
}

Box SplitBox(const Box& box, int64_t index, int64_t count) {
  Box part = box;
  while (count > 1 && !part.empty() && part.ndim() > 0) {
    const int dim = EvenDim(part, count);
    if (dim >= 0) {
      const int64_t each = part.extent(dim) / count;
      const int64_t longer = part.extent(dim) % count;  // so many have one more
      part.lo[dim] += index * each + std::min(index, longer);
      part.hi[dim] = part.lo[dim] + each + (index < longer ? 1 : 0);
      break;
    }
    int longest = 0;
    for (int d = 1; d < part.ndim(); ++d) {
      if (part.extent(d) > part.extent(longest)) longest = d;
    }
    // Both sides get elements in proportion to their parts.
    const int64_t low_count = count - count / 2;
    const int64_t extent = part.extent(longest);
    const int64_t low_extent = extent / count * low_count +
                               (extent % count * low_count + count / 2) / count;
    if (index < low_count) {
      part.hi[longest] = part.lo[longest] + low_extent;
      count = low_count;
    } else {
      part.lo[longest] += low_extent;
      index -= low_count;
      count -= low_count;
    }
  }
  return part;
}

std::vector<Box> Subtract(const Box& a, const Box& b) {
  std::vector<Box> out;
  if (a.empty()) return out;
  const std::optional<Box> common = Intersect(a, b);
  if (!common.has_value()) {
    out.push_back(a);
    return out;
  }
  Box rest = a;
  for (int d = 0; d < a.ndim(); ++d) {
    if (rest.lo[d] < common->lo[d]) {
      out.push_back(rest);
      out.back().hi[d] = common->lo[d];
    }
    if (common->hi[d] < rest.hi[d]) {
      out.push_back(rest);
      out.back().lo[d] = common->hi[d];
    }
    rest.lo[d] = common->lo[d];
    rest.hi[d] = common->hi[d];
  }
  return out;
}

}  // namespace dsd
