// SPDX-License-Identifier: Apache-2.0
//
// An n-dimensional arrangement of holders, after torch.distributed.DeviceMesh.

#ifndef DSD_CORE_LAYOUT_MESH_H_
#define DSD_CORE_LAYOUT_MESH_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/layout/box.h"

namespace dsd {

// Who has a part of a tensor: a rank of the job that the layout describes, or a
// file. A Binding (core/plan) maps holders to ranks of a communicator.
using Holder = int64_t;

// As a source: every rank can read it (a file on shared storage). As a target:
// exactly one rank, which the planner picks, must take it.
inline constexpr Holder kAnyHolder = -1;

// Immutable and cheap to copy. Thread-safe.
class DeviceMesh {
 public:
  // Holders 0 .. size-1 (plus `first`) in row-major order. Costs nothing per
  // holder. Each extent of `shape` is >= 1 (Layout checks it), first >= 0; one
  // name per dimension or none.
  static DeviceMesh Iota(Dims shape, Holder first = 0,
                         std::vector<std::string> dim_names = {});

  // `holders` in row-major order, distinct, >= 0. InvalidArgument otherwise, or
  // if their number is not the product of `shape`, an extent is < 1 or the
  // names are neither none nor one per dimension.
  static absl::StatusOr<DeviceMesh> Create(
      Dims shape, std::vector<Holder> holders,
      std::vector<std::string> dim_names = {});

  int ndim() const { return static_cast<int>(shape_.size()); }
  const Dims& shape() const { return shape_; }
  int64_t size() const { return size_; }
  const std::vector<std::string>& dim_names() const { return *dim_names_; }

  Holder At(absl::Span<const int64_t> coords) const;

  // nullopt if the holder is not in the mesh.
  std::optional<Dims> CoordsOf(Holder holder) const;

  // Numbers that no holder is below and above; for a mesh of one the holder.
  std::pair<Holder, Holder> bounds() const;

  // True for holders first .. first + size - 1 in order, however created.
  bool is_iota() const { return explicit_ == nullptr; }

  // Names of dimensions are labels: neither digests nor == look at them.
  void AddTo(DigestBuilder& digest) const;
  friend bool operator==(const DeviceMesh& a, const DeviceMesh& b);
  friend bool operator!=(const DeviceMesh& a, const DeviceMesh& b) {
    return !(a == b);
  }

  std::string ToString() const;  // "mesh[2, 4](dp, tp)"

 private:
  struct Explicit;  // holders in order and their index
  friend class HolderSet;
  DeviceMesh() = default;

  Dims shape_;
  int64_t size_ = 1;
  Holder first_ = 0;
  std::shared_ptr<const Explicit> explicit_;  // null for Iota
  std::shared_ptr<const std::vector<std::string>> dim_names_;
};

}  // namespace dsd

#endif  // DSD_CORE_LAYOUT_MESH_H_
