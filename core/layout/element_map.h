// SPDX-License-Identifier: Apache-2.0
//
// Brute force for tests: who has each element, one element at a time, from the
// description of a layout and by torch.chunk's rule. Shares no code with
// Layout.

#ifndef DSD_CORE_LAYOUT_ELEMENT_MAP_H_
#define DSD_CORE_LAYOUT_ELEMENT_MAP_H_

#include <cstdint>
#include <string>
#include <vector>

namespace dsd::test {

// A layout in plain numbers.
struct LayoutSpec {
  enum class Kind { kPlacements, kHistory, kFlat, kBoxes, kReplicated, kAny };
  struct Place {
    char kind = 'R';  // 'R' replicate, 'S' shard, 'T' strided shard
    int dim = 0;
    int64_t split_factor = 1;
  };
  struct Step {
    int mesh_dim;
    int tensor_dim;
  };
  struct Interval {
    int64_t holder;
    int64_t begin;
    int64_t end;
  };
  struct HeldBox {
    int64_t holder;
    std::vector<int64_t> lo;
    std::vector<int64_t> hi;
  };

  Kind kind = Kind::kReplicated;
  std::vector<int64_t> shape;

  // Of kPlacements and kHistory; holders in row-major order.
  std::vector<int64_t> mesh_shape;
  std::vector<int64_t> mesh_holders;
  std::vector<Place> placements;  // one per mesh dimension
  std::vector<Step> history;

  std::vector<Interval> intervals;  // of kFlat
  std::vector<HeldBox> boxes;       // of kBoxes
  std::vector<int64_t> holders;     // of kReplicated

  // All of it, for messages.
  std::string ToString() const;
};

// Elements by their row-major index. Holder -1 is "any".
int64_t NumElements(const LayoutSpec& spec);

// Every holder named by the spec, ascending.
std::vector<int64_t> HoldersOf(const LayoutSpec& spec);

// [i]: the holders of element i, ascending.
std::vector<std::vector<int64_t>> HoldersByElement(const LayoutSpec& spec);

// The elements of `holder` in the order of its local memory. Mesh layouts and
// kReplicated: the row-major local tensor. Flat: the interval. Boxes: box after
// box, each row-major, ordered by the first element.
std::vector<int64_t> LocalElements(const LayoutSpec& spec, int64_t holder);

// Mesh layouts: per tensor dimension the indices that `holder` has, ascending.
// `holder` is in the mesh.
std::vector<std::vector<int64_t>> LocalIndices(const LayoutSpec& spec,
                                               int64_t holder);

}  // namespace dsd::test

#endif  // DSD_CORE_LAYOUT_ELEMENT_MAP_H_
