// SPDX-License-Identifier: Apache-2.0
//
// Which holder has which part of one tensor: global geometry only, kept in
// symbols, so that questions about one holder do not cost anything per other
// holder.

#ifndef DSD_CORE_LAYOUT_LAYOUT_H_
#define DSD_CORE_LAYOUT_LAYOUT_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/layout/placement.h"

namespace dsd {

// The holders that have the same box: a list, or a coset of a mesh that is
// never written out. Distinct and ordered; positions are stable. Valid while
// the Layout it came from lives. Thread-safe.
class HolderSet {
 public:
  // Puts `holders` in ascending order, each once.
  explicit HolderSet(absl::InlinedVector<Holder, 4> holders);

  // Of `holders`, ascending and distinct, which must outlive this.
  static HolderSet Borrow(absl::Span<const Holder> holders);

  // The holders of `mesh` whose coordinates equal `coords` in every dimension
  // whose `free` flag is 0, in row-major order of their coordinates. `mesh`
  // must outlive this.
  HolderSet(const DeviceMesh* mesh, Dims coords, Dims free);

  int64_t size() const { return size_; }
  Holder At(int64_t position) const;
  std::optional<int64_t> PositionOf(Holder holder) const;
  bool Contains(Holder holder) const { return PositionOf(holder).has_value(); }
  // Size 1 and that one is kAnyHolder.
  bool IsAny() const {
    return mesh_ == nullptr && size_ == 1 && list()[0] == kAnyHolder;
  }

  // Numbers that no holder is below and above. The set must not be empty.
  std::pair<Holder, Holder> bounds() const;

  // True only if every holder is in `other`. Does not walk a coset, and answers
  // false where only that would show it.
  bool IsKnownSubsetOf(const HolderSet& other) const;

  // True only if every number in [low, high] is a holder of this set. Does not
  // walk a coset.
  bool IsKnownToHave(Holder low, Holder high) const;

  // Sets with equal keys are equal, positions included, while their layouts
  // live.
  using Key = absl::InlinedVector<int64_t, 8>;
  Key key() const;

 private:
  struct Run {  // `count` positions of the mesh, `stride` apart
    int64_t count;
    int64_t stride;
    friend bool operator==(const Run& a, const Run& b) {
      return a.count == b.count && a.stride == b.stride;
    }
  };
  // A coset is its first position in the mesh plus any sum of one offset from
  // each run. Neighbouring dimensions that form one run are joined, so that
  // equal cosets of meshes of other shapes look equal.
  using Runs = absl::InlinedVector<Run, 4>;

  HolderSet() = default;
  absl::Span<const Holder> list() const {
    return borrowed_.data() != nullptr ? borrowed_
                                       : absl::MakeConstSpan(owned_);
  }
  Runs runs() const;

  absl::InlinedVector<Holder, 4> owned_;
  absl::Span<const Holder> borrowed_;
  const DeviceMesh* mesh_ = nullptr;
  Dims coords_;
  Dims free_;
  int64_t size_ = 0;
};

// A box on which the set of holders is constant: a maximal one for mesh
// layouts, and for box layouts whose boxes are equal or disjoint.
struct Cell {
  Box box;
  HolderSet holders;
};

// One box of a holder and where it lies in the holder's local tensor.
struct LocalBox {
  Box box;
  // Mesh layouts: coordinates of box.lo in the local tensor (of LocalShape).
  // Flat layouts: one number, the index in the local 1-dim tensor.
  // Box layouts: zeros; each box is a tensor of its own.
  Dims local_lo;
};

// One step of a sharding history: mesh dimension `mesh_dim` cut what was left
// of `tensor_dim`, after the steps before it.
struct ShardStep {
  int mesh_dim;
  int tensor_dim;
};

struct FlatInterval {  // of the row-major tensor, in elements
  Holder holder;
  int64_t begin;
  int64_t end;
};

struct HolderBox {
  Holder holder;
  Box box;
};

// Immutable and cheap to copy. Thread-safe.
//
// Invariants: boxes of one holder are disjoint and inside the tensor. An
// element may have several holders (replicas) or, for flat and box layouts,
// none. An element on kAnyHolder has no other holder.
class Layout {
 public:
  enum class Kind : uint8_t { kMesh = 0, kFlat = 1, kBoxes = 2 };

  // One placement per mesh dimension, applied left to right by Python's formula
  // (compute_local_shape_and_global_offset, _StridedShard included). Negative
  // dims count from the back.
  // Errors: InvalidArgument for a wrong count, a dim out of range, a negative
  // extent, more than 2^63 - 1 elements, split_factor < 1, or Partial ("reduce
  // it first").
  static absl::StatusOr<Layout> FromPlacements(
      Dims shape, DeviceMesh mesh, absl::Span<const Placement> placements);

  // Nested chunks in the order of `history`, which may differ from the mesh
  // order (FSDP over TP: tp first, then dp). Mesh dims not named replicate;
  // each is named at most once. For some uneven sizes this differs from the
  // placements that Python records for it. Errors as for FromPlacements.
  static absl::StatusOr<Layout> FromHistory(
      Dims shape, DeviceMesh mesh, absl::Span<const ShardStep> history);

  // Parts of the row-major tensor (flat parameters), in any order. At most one
  // per holder; it may be empty. InvalidArgument for a second one, or for an
  // interval outside the tensor.
  static absl::StatusOr<Layout> FromFlatIntervals(
      Dims shape, std::vector<FlatInterval> intervals);

  // Explicit boxes in any order, several per holder allowed. Empty boxes are
  // dropped. InvalidArgument for a box outside the tensor or of another ndim,
  // and for two boxes of one holder that overlap (both named). O(n log n) for n
  // boxes that are equal or disjoint.
  static absl::StatusOr<Layout> FromBoxes(Dims shape,
                                          std::vector<HolderBox> boxes);

  // Every one of `holders` (each >= 0) has the whole tensor. Extents are >= 0.
  static Layout Replicated(Dims shape, std::vector<Holder> holders);

  // The whole tensor on kAnyHolder. Extents are >= 0.
  static Layout Anywhere(Dims shape);

  Kind kind() const;
  const Dims& shape() const;
  const Box& whole() const;

  // The holder's non-empty boxes, ordered by flat index of their first element.
  // Costs O(its boxes).
  std::vector<LocalBox> BoxesOf(Holder holder) const;

  // Mesh layouts: the shape of the holder's local tensor, as Python's local
  // shape; nullopt if it is not in the mesh. Flat: {length}. Boxes: nullopt.
  std::optional<Dims> LocalShape(Holder holder) const;

  // Calls `visit` for the cells that cover `query` (clipped to it), in
  // lexicographic order of their lower corners for mesh layouts, and in a fixed
  // order for the others. Which cells there are does not depend on `query`.
  // Elements without a holder are in no cell. Adds the number of elementary
  // steps (a search in a sorted index is one) to *operations if not null: it
  // depends on the cells and gaps found, not on the number of holders.
  void ForEachCell(const Box& query, absl::FunctionRef<void(const Cell&)> visit,
                   int64_t* operations = nullptr) const;

  // Elements of the tensor without a holder, 0 if it is complete. O(1).
  int64_t NumUncovered() const;

  // True if some element is on kAnyHolder. O(1).
  bool HasAnyHolder() const;

  // Numbers that no holder but kAnyHolder is below and above; nullopt if there
  // is none. O(1).
  std::optional<std::pair<Holder, Holder>> HolderBounds() const;

  // Calls `visit` for each holder once, kAnyHolder included, also for those
  // without an element.
  void ForEachHolder(absl::FunctionRef<void(Holder)> visit) const;

  // Flat layouts only: the holder's interval; nullopt if it has none.
  std::optional<FlatInterval> IntervalOf(Holder holder) const;
  // Flat layouts only: maximal intervals of constant holder set within
  // [begin, end), in order.
  void ForEachFlatCell(
      int64_t begin, int64_t end,
      absl::FunctionRef<void(int64_t begin, int64_t end, const HolderSet&)>
          visit,
      int64_t* operations = nullptr) const;

  // Covers shape and symbols: two layouts of the same geometry but other
  // symbols differ; compare geometry with SameGeometry. Computed once for a
  // layout and its copies.
  const Digest& symbols() const;

  // True if the shapes are equal and every holder has the same elements in
  // both, however they are cut into boxes. Costs O(all boxes), nothing if the
  // symbols are equal.
  static bool SameGeometry(const Layout& a, const Layout& b);

  // Replaces holder h by map(h), for instance to move a layout from one job's
  // ranks to another's. kAnyHolder stays. InvalidArgument if `map` is not
  // one-to-one or gives a negative number.
  absl::StatusOr<Layout> MapHolders(
      absl::FunctionRef<Holder(Holder)> map) const;

  // "[8, 4] mesh[2, 2](dp, tp) R,S(0)"; "[8, 4] flat 0:[0:9] 1:[9:32]". Long
  // lists are cut with a count.
  std::string ToString() const;

 private:
  struct Impl;
  struct MeshImpl;
  struct FlatImpl;
  struct BoxesImpl;
  explicit Layout(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

  // The whole tensor on each of `holders`, ascending and distinct, as boxes.
  static Layout WholeBoxes(Dims shape, const std::vector<Holder>& holders);

  std::shared_ptr<const Impl> impl_;
};

}  // namespace dsd

#endif  // DSD_CORE_LAYOUT_LAYOUT_H_
