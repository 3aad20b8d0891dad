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

absl::Status CheckLocalShape(const Sharding& sharding, const Dims& shape) {
  std::optional<Dims> expected = sharding.layout.LocalShape(sharding.holder);
  if (!expected.has_value()) {
    const std::vector<LocalBox> boxes =
        sharding.layout.BoxesOf(sharding.holder);
    if (boxes.size() > 1) {
      return absl::InvalidArgumentError(absl::StrCat(
          "holder ", sharding.holder, " has ", boxes.size(),
          " boxes of layout ", sharding.layout.ToString(),
          ": there is no single local tensor for it; give each box a tensor"));
    }
    if (boxes.empty()) {
      if (Box::Whole(shape).num_elements() == 0) return absl::OkStatus();
      return absl::InvalidArgumentError(
          absl::StrCat("holder ", sharding.holder, " has no part of layout ",
                       sharding.layout.ToString(), ", the tensor has shape ",
                       DimsToString(shape)));
    }
    expected = boxes[0].box.extents();
  }
  if (*expected == shape) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "the part of holder ", sharding.holder, " in layout ",
      sharding.layout.ToString(), " has shape ", DimsToString(*expected),
      ", the tensor has ", DimsToString(shape)));
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
  DSD_RETURN_IF_ERROR(CheckLocalShape(sharding, ToDims(tensor.sizes())))
      << "ShardingTable";
  absl::MutexLock lock(&mu_);
  generation_.fetch_add(1, std::memory_order_release);
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
  if (generation() == 0) return std::nullopt;
  absl::ReaderMutexLock lock(&mu_);
  // The weak pointer keeps the block of memory, so that an equal address is the
  // same tensor.
  const auto it = entries_.find(tensor.unsafeGetTensorImpl());
  if (it == entries_.end()) return std::nullopt;
  return it->second.sharding;
}

void ShardingTable::Erase(const at::Tensor& tensor) {
  absl::MutexLock lock(&mu_);
  generation_.fetch_add(1, std::memory_order_release);
  entries_.erase(tensor.unsafeGetTensorImpl());
}

}  // namespace dsd
