// SPDX-License-Identifier: Apache-2.0
//
// A module tree as a frontend describes it: names and identities, no tensors.

#ifndef DSD_CORE_FQN_MODULE_TREE_H_
#define DSD_CORE_FQN_MODULE_TREE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"

namespace dsd {

// What a tensor is in memory. Two tensors are aliases (tied weights) if all of
// it is equal. Never a data pointer: empty tensors share one.
struct TensorIdentity {
  const void* storage = nullptr;
  int64_t offset = 0;
  absl::InlinedVector<int64_t, 4> sizes;
  absl::InlinedVector<int64_t, 4> strides;

  friend bool operator==(const TensorIdentity& a, const TensorIdentity& b) {
    return a.storage == b.storage && a.offset == b.offset &&
           a.sizes == b.sizes && a.strides == b.strides;
  }
  template <class H>
  friend H AbslHashValue(H h, const TensorIdentity& id) {
    return H::combine(std::move(h), id.storage, id.offset, id.sizes,
                      id.strides);
  }
};

enum class TensorKind : uint8_t { kParameter, kBuffer };

// One module and what is below it. A module or tensor that is registered twice
// is described twice.
struct ModuleNode {
  struct Tensor {
    std::string name;
    TensorKind kind = TensorKind::kParameter;
    TensorIdentity identity;
    size_t slot = 0;  // the describing frontend's own number
  };

  std::string name;                  // in the parent; empty for the root
  std::vector<Tensor> tensors;       // parameters, then buffers, as registered
  std::vector<ModuleNode> children;  // as registered
  // If the module is a wrapper (ModuleWrapper): the name of the child whose
  // segment is left out of FQNs.
  std::optional<std::string> wrapped_child;
};

}  // namespace dsd

#endif  // DSD_CORE_FQN_MODULE_TREE_H_
