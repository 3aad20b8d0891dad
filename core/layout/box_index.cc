// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/layout/box_index.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace dsd {

void BoxIndex::Add(const Box& box) {
  corners_.insert(corners_.end(), box.lo.begin(), box.lo.end());
  corners_.insert(corners_.end(), box.hi.begin(), box.hi.end());
  ++size_;
}

void BoxIndex::Build() {
  order_.resize(size_);
  std::iota(order_.begin(), order_.end(), 0);
  if (ndim_ == 0) return;  // every box is the whole tensor
  Arrange(0, size_);

  const size_t width = 2 * ndim_;
  size_t below = size_;
  while (below > kFanOut) {
    const bool leaves = levels_.empty();
    std::vector<int64_t> level;
    level.reserve((below / kFanOut + 1) * width);
    for (size_t begin = 0; begin < below; begin += kFanOut) {
      const size_t end = std::min(begin + kFanOut, below);
      for (size_t i = begin; i < end; ++i) {
        const int64_t* child =
            leaves ? corners(order_[i]) : &levels_.back()[i * width];
        if (i == begin) {
          level.insert(level.end(), child, child + width);
          continue;
        }
        int64_t* bounds = &level[level.size() - width];
        for (int d = 0; d < ndim_; ++d) {
          bounds[d] = std::min(bounds[d], child[d]);
          bounds[ndim_ + d] = std::max(bounds[ndim_ + d], child[ndim_ + d]);
        }
      }
    }
    below = level.size() / width;
    levels_.push_back(std::move(level));
  }
}

// Orders [begin, end) of order_ so that each aligned group of kFanOut is
// compact: halves at the median of the dimension in which the lower corners
// spread most.
void BoxIndex::Arrange(size_t begin, size_t end) {
  if (end - begin <= kFanOut) return;
  int widest = 0;
  int64_t widest_spread = -1;
  for (int d = 0; d < ndim_; ++d) {
    int64_t low = std::numeric_limits<int64_t>::max();
    int64_t high = 0;
    for (size_t i = begin; i < end; ++i) {
      const int64_t at = corners(order_[i])[d];
      low = std::min(low, at);
      high = std::max(high, at);
    }
    if (high - low > widest_spread) {
      widest = d;
      widest_spread = high - low;
    }
  }
  const size_t half = (end - begin) / 2;
  const size_t middle = begin + (half + kFanOut - 1) / kFanOut * kFanOut;
  std::nth_element(order_.begin() + begin, order_.begin() + middle,
                   order_.begin() + end, [&](uint32_t a, uint32_t b) {
                     const int64_t x = corners(a)[widest];
                     const int64_t y = corners(b)[widest];
                     return x != y ? x < y : a < b;
                   });
  Arrange(begin, middle);
  Arrange(middle, end);
}

Box BoxIndex::box(size_t i) const {
  const int64_t* at = corners(i);
  return {Dims(at, at + ndim_), Dims(at + ndim_, at + 2 * ndim_)};
}

int64_t BoxIndex::num_elements(size_t i) const {
  const int64_t* at = corners(i);
  int64_t count = 1;
  for (int d = 0; d < ndim_; ++d) count *= at[ndim_ + d] - at[d];
  return count;
}

bool BoxIndex::Overlap(const int64_t* corners, const Box& query) {
  const int ndim = query.ndim();
  for (int d = 0; d < ndim; ++d) {
    if (corners[d] >= query.hi[d] || corners[ndim + d] <= query.lo[d]) {
      return false;
    }
  }
  return true;
}

void BoxIndex::FindOverlapping(const Box& query,
                               std::vector<uint32_t>& out) const {
  out.clear();
  if (levels_.empty()) {
    for (uint32_t i : order_) {
      if (Overlap(corners(i), query)) out.push_back(i);
    }
  } else {
    const size_t top = levels_.size() - 1;
    const size_t nodes = levels_[top].size() / (2 * ndim_);
    for (size_t node = 0; node < nodes; ++node) Visit(top, node, query, out);
  }
  std::sort(out.begin(), out.end());
}

void BoxIndex::Visit(size_t level, size_t node, const Box& query,
                     std::vector<uint32_t>& out) const {
  if (!Overlap(&levels_[level][node * 2 * ndim_], query)) return;
  const size_t begin = node * kFanOut;
  if (level == 0) {
    const size_t end = std::min(begin + kFanOut, size_);
    for (size_t i = begin; i < end; ++i) {
      if (Overlap(corners(order_[i]), query)) out.push_back(order_[i]);
    }
    return;
  }
  const size_t children = levels_[level - 1].size() / (2 * ndim_);
  const size_t end = std::min(begin + kFanOut, children);
  for (size_t child = begin; child < end; ++child) {
    Visit(level - 1, child, query, out);
  }
}

}  // namespace dsd
