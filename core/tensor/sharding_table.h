// SPDX-License-Identifier: Apache-2.0
//
// Which plain at::Tensor is a shard, and of what. LibTorch has no DTensor: code
// that shards parameters (frontends/parallel, or your own) says so here, and
// get, set, save and load then know.

#ifndef DSD_CORE_TENSOR_SHARDING_TABLE_H_
#define DSD_CORE_TENSOR_SHARDING_TABLE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "ATen/core/Tensor.h"
#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/layout/layout.h"

namespace dsd {

// The tensor holds the part that `layout` gives to `holder`: contiguous or not,
// of a shape that CheckLocalShape takes.
struct Sharding {
  Layout layout;
  Holder holder;
};

// OK if a tensor of this shape can hold the part of sharding.holder: its local
// shape; for box layouts that of its box, or any shape without elements if it
// has none. InvalidArgument otherwise (both shapes shown), and if the holder
// has several boxes of a box layout.
absl::Status CheckLocalShape(const Sharding& sharding, const Dims& shape);

// Weak: an entry dies with its TensorImpl; a new tensor at the same address is
// not mistaken for it. Entries survive Tensor::set_data. Thread-safe.
class ShardingTable {
 public:
  // The table that the frontends use.
  static ShardingTable& Global();

  // Replaces an older entry. InvalidArgument if the tensor's shape is not that
  // of the holder's part (both shown), or if the tensor is undefined.
  absl::Status Set(const at::Tensor& tensor, Layout layout, Holder holder);

  // nullopt: a plain tensor.
  std::optional<Sharding> Find(const at::Tensor& tensor) const;

  void Erase(const at::Tensor& tensor);

  // Grows with every change by Set and Erase; 0: nothing was ever set. While it
  // stays the same, so does what Find says of a live tensor.
  uint64_t generation() const {
    return generation_.load(std::memory_order_acquire);
  }

 private:
  struct Entry {
    c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> impl;
    Sharding sharding;
  };
  mutable absl::Mutex mu_;
  absl::flat_hash_map<const c10::TensorImpl*, Entry> entries_
      ABSL_GUARDED_BY(mu_);
  std::atomic<uint64_t> generation_{0};
  size_t sweep_at_ ABSL_GUARDED_BY(mu_) = 64;  // drop dead entries at this size
};

}  // namespace dsd

#endif  // DSD_CORE_TENSOR_SHARDING_TABLE_H_
