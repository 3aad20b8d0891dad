// SPDX-License-Identifier: Apache-2.0
//
// Which of many boxes overlap a given one. Only core/layout includes this.

#ifndef DSD_CORE_LAYOUT_BOX_INDEX_H_
#define DSD_CORE_LAYOUT_BOX_INDEX_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "dsd/core/layout/box.h"

namespace dsd {

// A packed tree of bounding boxes. Immutable after Build(). Thread-safe.
class BoxIndex {
 public:
  explicit BoxIndex(int ndim) : ndim_(ndim) {}

  // Before Build(). `box` is not empty and has `ndim` dimensions.
  void Add(const Box& box);
  void Reserve(size_t count) { corners_.reserve(2 * ndim_ * count); }

  // O(n log n).
  void Build();

  size_t size() const { return size_; }
  Box box(size_t i) const;
  int64_t num_elements(size_t i) const;

  // Sets `out` to the boxes that share an element with `query` (not empty),
  // ascending. Costs O(result) and a logarithm for boxes that are disjoint.
  void FindOverlapping(const Box& query, std::vector<uint32_t>& out) const;

 private:
  // A node's children, or a leaf's boxes, are kFanOut neighbours.
  static constexpr size_t kFanOut = 8;

  // Lower corner, then upper corner.
  const int64_t* corners(size_t i) const {
    return corners_.data() + 2 * ndim_ * i;
  }
  static bool Overlap(const int64_t* corners, const Box& query);
  void Arrange(size_t begin, size_t end);
  void Visit(size_t level, size_t node, const Box& query,
             std::vector<uint32_t>& out) const;

  int ndim_;
  size_t size_ = 0;
  std::vector<int64_t> corners_;
  std::vector<uint32_t> order_;  // neighbours in space are neighbours here
  // levels_[0]: bounds of each kFanOut of order_; levels_[k]: of levels_[k -
  // 1].
  std::vector<std::vector<int64_t>> levels_;
};

}  // namespace dsd

#endif  // DSD_CORE_LAYOUT_BOX_INDEX_H_
