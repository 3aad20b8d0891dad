// SPDX-License-Identifier: Apache-2.0
//
// Which tensors there are and how each lies across holders: one side of a
// redistribution, without any address.

#ifndef DSD_CORE_PLAN_CATALOG_H_
#define DSD_CORE_PLAN_CATALOG_H_

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/layout.h"

namespace dsd {

// Bytes of an element of the largest dtype.
inline constexpr int64_t kLargestItemBytes = 16;

// What every holder agrees on about a tensor.
struct TensorSpec {
  std::string fqn;  // unique within a catalog
  DType dtype = DType::kFloat32;
  Layout layout;  // its shape is the tensor's global shape

  const Dims& shape() const { return layout.shape(); }
};

// Tensors in the order of insertion. Thread-compatible.
class Catalog {
 public:
  // AlreadyExists if the name is taken; InvalidArgument if the tensor has so
  // many elements that 64 bits could not count its bytes in every dtype.
  absl::Status Add(TensorSpec spec);

  // For `size` tensors in all.
  void Reserve(size_t size);

  size_t size() const { return tensors_.size(); }
  bool empty() const { return tensors_.empty(); }
  const TensorSpec& operator[](size_t index) const { return tensors_[index]; }
  const std::vector<TensorSpec>& tensors() const { return tensors_; }
  std::optional<size_t> Find(absl::string_view fqn) const;

  // Covers names, order, dtypes and layout symbols.
  Digest Fingerprint() const;

 private:
  static constexpr size_t kNone = static_cast<size_t>(-1);

  // Among the tensor at `index` and those before it of the same hash.
  std::optional<size_t> FindFrom(size_t index, absl::string_view fqn) const;

  std::vector<TensorSpec> tensors_;
  // The last tensor of a hash of names, and for each the one before it of the
  // same hash. So names are not kept twice.
  absl::flat_hash_map<size_t, size_t> by_hash_;
  std::vector<size_t> before_;
};

}  // namespace dsd

#endif  // DSD_CORE_PLAN_CATALOG_H_
