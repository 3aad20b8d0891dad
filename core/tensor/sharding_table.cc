// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/tensor/sharding_table.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/base/no_destructor.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {

absl::StatusOr<Dims> LocalTensorShape(const Sharding& sharding) {
  const std::optional<Dims> shape = sharding.layout.LocalShape(sharding.holder);
  if (shape.has_value()) return *shape;
  const std::vector<LocalBox> boxes = sharding.layout.BoxesOf(sharding.holder);
  if (boxes.size() == 1) return boxes[0].box.extents();
  return absl::InvalidArgumentError(absl::StrCat(
      "holder ", sharding.holder, " has ", boxes.size(), " boxes of layout ",
      sharding.layout.ToString(),
      ": there is no single local tensor for it; give each box a tensor"));
}

ShardingTable& ShardingTable::Global() {
  static absl::NoDestructor<ShardingTable> table;
  return *table;
}

absl::Status ShardingTable::Set(const at::Tensor& tensor, Layout layout,
                                Holder holder) {
  if (!tensor.defined()) {
    return absl::InvalidArgumentError(
        "ShardingTable: an undefined tensor cannot be a shard");
  }
  Sharding sharding{std::move(layout), holder};
  DSD_ASSIGN_OR_RETURN(const Dims expected, LocalTensorShape(sharding));
  const Dims found = ToDims(tensor.sizes());
  if (found != expected) {
    return absl::InvalidArgumentError(absl::StrCat(
        "ShardingTable: the part of holder ", holder, " in layout ",
        sharding.layout.ToString(), " has shape ", DimsToString(expected),
        ", the tensor has ", DimsToString(found)));
  }
  absl::MutexLock lock(&mu_);
  if (entries_.size() >= sweep_at_) {
    absl::erase_if(entries_, [](const auto& entry) {
      return entry.second.impl.expired();
    });
    sweep_at_ = std::max<size_t>(64, 2 * entries_.size());
  }
  entries_.insert_or_assign(
      tensor.unsafeGetTensorImpl(),
      Entry{c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(
                tensor.getIntrusivePtr()),
            std::move(sharding)});
  return absl::OkStatus();
}

std::optional<Sharding> ShardingTable::Find(const at::Tensor& tensor) const {
  absl::ReaderMutexLock lock(&mu_);
  // The weak pointer keeps the block of memory, so that an equal address is the
  // same tensor.
  const auto it = entries_.find(tensor.unsafeGetTensorImpl());
  if (it == entries_.end()) return std::nullopt;
  return it->second.sharding;
}

void ShardingTable::Erase(const at::Tensor& tensor) {
  absl::MutexLock lock(&mu_);
  entries_.erase(tensor.unsafeGetTensorImpl());
}

}  // namespace dsd
