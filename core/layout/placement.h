// SPDX-License-Identifier: Apache-2.0
//
// What one mesh dimension does to a tensor, after
// torch.distributed.tensor.placement_types.

#ifndef DSD_CORE_LAYOUT_PLACEMENT_H_
#define DSD_CORE_LAYOUT_PLACEMENT_H_

#include <cstdint>
#include <string>

namespace dsd {

struct Placement {
  enum class Kind : uint8_t { kReplicate, kShard, kStridedShard, kPartial };

  Kind kind = Kind::kReplicate;
  int dim = 0;               // tensor dimension of a shard; may be negative
  int64_t split_factor = 1;  // of kStridedShard

  friend bool operator==(const Placement& a, const Placement& b) {
    return a.kind == b.kind && a.dim == b.dim &&
           a.split_factor == b.split_factor;
  }

  // "R", "S(0)", "SS(0, 2)", "P".
  std::string ToString() const;
};

inline Placement Replicate() { return {}; }

// Chunks of ceil(size / n), as torch.chunk: trailing ones may be short or
// empty.
inline Placement Shard(int dim) { return {Placement::Kind::kShard, dim, 1}; }

// Python's _StridedShard(dim, split_factor): `dim` is cut into split_factor
// chunks, each of them into n; a holder has the concatenation of its parts.
inline Placement StridedShard(int dim, int64_t split_factor) {
  return {Placement::Kind::kStridedShard, dim, split_factor};
}

// A pending reduction. Not a layout: Layout::FromPlacements refuses it.
inline Placement Partial() { return {Placement::Kind::kPartial, 0, 1}; }

}  // namespace dsd

#endif  // DSD_CORE_LAYOUT_PLACEMENT_H_
