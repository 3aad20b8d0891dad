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

  size_t size() const { return tensors_.size(); }
  bool empty() const { return tensors_.empty(); }
  const TensorSpec& operator[](size_t index) const { return tensors_[index]; }
  const std::vector<TensorSpec>& tensors() const { return tensors_; }
  std::optional<size_t> Find(absl::string_view fqn) const;

  // Covers names, order, dtypes and layout symbols.
  Digest Fingerprint() const;

 private:
  std::vector<TensorSpec> tensors_;
  absl::flat_hash_map<std::string, size_t> index_;
};

}  // namespace dsd

#endif  // DSD_CORE_PLAN_CATALOG_H_
