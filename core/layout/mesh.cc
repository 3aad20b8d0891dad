// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/layout/mesh.h"

#include <algorithm>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/checked_int.h"

namespace dsd {

struct DeviceMesh::Explicit {
  std::vector<Holder> holders;
  absl::flat_hash_map<Holder, int64_t> index;
  std::pair<Holder, Holder> bounds;
  Digest digest;
};

DeviceMesh DeviceMesh::Iota(Dims shape, Holder first,
                            std::vector<std::string> dim_names) {
  DeviceMesh mesh;
  mesh.size_ = CheckedProduct(shape).value_or(0);
  mesh.shape_ = std::move(shape);
  mesh.first_ = first;
  mesh.dim_names_ =
      std::make_shared<const std::vector<std::string>>(std::move(dim_names));
  return mesh;
}

absl::StatusOr<DeviceMesh> DeviceMesh::Create(
    Dims shape, std::vector<Holder> holders,
    std::vector<std::string> dim_names) {
  for (int64_t extent : shape) {
    if (extent < 1) {
      return absl::InvalidArgumentError(absl::StrCat(
          "mesh of shape ", DimsToString(shape), ": extents must be >= 1"));
    }
  }
  const std::optional<int64_t> size = CheckedProduct(shape);
  if (!size.has_value() || *size != holders.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("mesh of shape ", DimsToString(shape), " needs ",
                     size.has_value() ? absl::StrCat(*size) : "more than 2^63",
                     " holders, found ", holders.size()));
  }
  if (!dim_names.empty() && dim_names.size() != shape.size()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "mesh of shape ", DimsToString(shape), ": found ", dim_names.size(),
        " dimension names, expected ", shape.size(), " or none"));
  }
  bool consecutive = true;
  for (size_t i = 0; i < holders.size(); ++i) {
    if (holders[i] < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("mesh of shape ", DimsToString(shape), ": holder ",
                       holders[i], " at position ", i, " is negative"));
    }
    consecutive &= holders[i] == holders[0] + static_cast<int64_t>(i);
  }
  if (consecutive) return Iota(std::move(shape), holders[0], dim_names);

  auto list = std::make_shared<Explicit>();
  list->index.reserve(holders.size());
  for (size_t i = 0; i < holders.size(); ++i) {
    const auto [at, inserted] = list->index.try_emplace(holders[i], i);
    if (!inserted) {
      return absl::InvalidArgumentError(absl::StrCat(
          "mesh of shape ", DimsToString(shape), ": holder ", holders[i],
          " is at positions ", at->second, " and ", i));
    }
  }
  const auto [low, high] = std::minmax_element(holders.begin(), holders.end());
  list->bounds = {*low, *high};
  list->digest = DigestBuilder().Add(absl::MakeConstSpan(holders)).Finish();
  list->holders = std::move(holders);

  DeviceMesh mesh = Iota(std::move(shape), 0, std::move(dim_names));
  mesh.explicit_ = std::move(list);
  return mesh;
}

Holder DeviceMesh::At(absl::Span<const int64_t> coords) const {
  const int64_t position = FlatIndex(shape_, coords);
  return is_iota() ? first_ + position : explicit_->holders[position];
}

std::optional<Dims> DeviceMesh::CoordsOf(Holder holder) const {
  int64_t position = 0;
  if (is_iota()) {
    if (holder < first_ || holder - first_ >= size_) return std::nullopt;
    position = holder - first_;
  } else {
    const auto it = explicit_->index.find(holder);
    if (it == explicit_->index.end()) return std::nullopt;
    position = it->second;
  }
  Dims coords(shape_.size());
  for (int d = ndim(); d-- > 0;) {
    coords[d] = position % shape_[d];
    position /= shape_[d];
  }
  return coords;
}

std::pair<Holder, Holder> DeviceMesh::bounds() const {
  if (is_iota()) return {first_, first_ + size_ - 1};
  return explicit_->bounds;
}

void DeviceMesh::AddTo(DigestBuilder& digest) const {
  digest.Add(absl::MakeConstSpan(shape_)).Add(first_);
  digest.Add(int64_t{is_iota()});
  if (!is_iota()) digest.Add(explicit_->digest);
}

bool operator==(const DeviceMesh& a, const DeviceMesh& b) {
  if (a.shape_ != b.shape_ || a.is_iota() != b.is_iota()) return false;
  if (a.is_iota()) return a.first_ == b.first_;
  return a.explicit_ == b.explicit_ ||
         a.explicit_->holders == b.explicit_->holders;
}

std::string DeviceMesh::ToString() const {
  std::string out = absl::StrCat("mesh", DimsToString(shape_));
  if (!dim_names_->empty()) {
    absl::StrAppend(&out, "(", absl::StrJoin(*dim_names_, ", "), ")");
  }
  return out;
}

}  // namespace dsd
