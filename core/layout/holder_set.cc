// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "dsd/core/layout/layout.h"

namespace dsd {
namespace {

// First element of a key: what the second one means.
enum KeyKind : int64_t { kIotaMesh, kExplicitMesh, kBorrowed, kOwned };

int64_t AddressOf(const void* pointer) {
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(pointer));
}

}  // namespace

HolderSet::HolderSet(absl::InlinedVector<Holder, 4> holders)
    : owned_(std::move(holders)) {
  std::sort(owned_.begin(), owned_.end());
  owned_.erase(std::unique(owned_.begin(), owned_.end()), owned_.end());
  size_ = owned_.size();
}

HolderSet HolderSet::Borrow(absl::Span<const Holder> holders) {
  HolderSet set;
  set.borrowed_ = holders;
  set.size_ = holders.size();
  return set;
}

HolderSet::HolderSet(const DeviceMesh* mesh, Dims coords, Dims free)
    : mesh_(mesh),
      coords_(std::move(coords)),
      free_(std::move(free)),
      size_(1) {
  for (int d = 0; d < mesh_->ndim(); ++d) {
    if (mesh_->shape()[d] == 1) free_[d] = 0;
    if (free_[d] == 0) continue;
    coords_[d] = 0;
    size_ *= mesh_->shape()[d];
  }
}

Holder HolderSet::At(int64_t position) const {
  if (mesh_ == nullptr) return list()[position];
  Dims coords = coords_;
  for (int d = mesh_->ndim(); d-- > 0;) {
    if (free_[d] == 0) continue;
    coords[d] = position % mesh_->shape()[d];
    position /= mesh_->shape()[d];
  }
  return mesh_->At(coords);
}

std::optional<int64_t> HolderSet::PositionOf(Holder holder) const {
  if (mesh_ == nullptr) {
    const absl::Span<const Holder> all = list();
    const auto it = std::lower_bound(all.begin(), all.end(), holder);
    if (it == all.end() || *it != holder) return std::nullopt;
    return it - all.begin();
  }
  const std::optional<Dims> coords = mesh_->CoordsOf(holder);
  if (!coords.has_value()) return std::nullopt;
  int64_t position = 0;
  for (int d = 0; d < mesh_->ndim(); ++d) {
    if (free_[d] != 0) {
      position = position * mesh_->shape()[d] + (*coords)[d];
    } else if ((*coords)[d] != coords_[d]) {
      return std::nullopt;
    }
  }
  return position;
}

std::pair<Holder, Holder> HolderSet::bounds() const {
  if (mesh_ != nullptr && !mesh_->is_iota()) return mesh_->bounds();
  return {At(0), At(size_ - 1)};
}

HolderSet::Runs HolderSet::runs() const {
  Runs runs;
  int64_t stride = 1;
  for (int d = mesh_->ndim(); d-- > 0;) {  // innermost first
    const int64_t extent = mesh_->shape()[d];
    if (free_[d] != 0) {
      if (!runs.empty() && stride == runs.back().count * runs.back().stride) {
        runs.back().count *= extent;
      } else {
        runs.push_back({extent, stride});
      }
    }
    stride *= extent;
  }
  return runs;
}

bool HolderSet::IsKnownSubsetOf(const HolderSet& other) const {
  if (size_ > other.size_) return false;
  if (size_ == 0) return true;
  if (size_ == 1) return other.Contains(At(0));
  if (other.mesh_ == nullptr) {
    if (mesh_ != nullptr) return false;
    const absl::Span<const Holder> a = list();
    const absl::Span<const Holder> b = other.list();
    if (a.data() == b.data() && a.size() == b.size()) return true;
    return std::includes(b.begin(), b.end(), a.begin(), a.end());
  }
  const auto [low, high] = bounds();
  if (other.IsKnownToHave(low, high)) return true;
  if (mesh_ == nullptr) return false;
  if (*mesh_ == *other.mesh_) {
    for (int d = 0; d < mesh_->ndim(); ++d) {
      if (other.free_[d] != 0) continue;
      if (free_[d] != 0 || coords_[d] != other.coords_[d]) return false;
    }
    return true;
  }
  const bool same_order = mesh_->is_iota()
                              ? other.mesh_->is_iota()
                              : mesh_->explicit_ == other.mesh_->explicit_;
  return same_order && At(0) == other.At(0) && runs() == other.runs();
}

bool HolderSet::IsKnownToHave(Holder low, Holder high) const {
  if (low > high) return true;
  if (mesh_ != nullptr) {
    if (!mesh_->is_iota()) return false;
    const Runs runs = this->runs();
    const bool is_range =
        size_ == 1 || (runs.size() == 1 && runs[0].stride == 1);
    return is_range && low >= At(0) && high <= At(size_ - 1);
  }
  const std::optional<int64_t> first = PositionOf(low);
  const std::optional<int64_t> last = PositionOf(high);
  return first.has_value() && last.has_value() && *last - *first == high - low;
}

HolderSet::Key HolderSet::key() const {
  Key key;
  if (mesh_ == nullptr) {
    if (borrowed_.data() != nullptr) {
      key = {kBorrowed, AddressOf(borrowed_.data()), size_};
    } else {
      key = {kOwned};
      key.insert(key.end(), owned_.begin(), owned_.end());
    }
    return key;
  }
  key = {mesh_->is_iota() ? kIotaMesh : kExplicitMesh,
         AddressOf(mesh_->explicit_.get()), At(0)};
  for (const Run& run : runs()) {
    key.push_back(run.count);
    key.push_back(run.stride);
  }
  return key;
}

}  // namespace dsd
