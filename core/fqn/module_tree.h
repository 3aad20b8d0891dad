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
#include "absl/strings/string_view.h"
#include "dsd/core/fqn/fqn_modifiers.h"

namespace dsd {

// What a tensor is in memory. Two tensors are aliases (tied weights) if all of
// it is equal. Never a data pointer; a tensor without elements is only the same
// as itself, since empty shards of several parameters may lie at one place.
struct TensorIdentity {
  TensorIdentity() : offset(0), reading(0) {}

  const void* storage = nullptr;
  // Models have many of these: both in one word.
  int64_t offset : 48;    // in the storage, in elements
  uint64_t reading : 16;  // as what the elements are read: type, conjugated, ..
  absl::InlinedVector<int64_t, 4> sizes;
  absl::InlinedVector<int64_t, 4> strides;

  friend bool operator==(const TensorIdentity& a, const TensorIdentity& b) {
    return a.storage == b.storage && a.offset == b.offset &&
           a.reading == b.reading && a.sizes == b.sizes &&
           a.strides == b.strides;
  }
  template <class H>
  friend H AbslHashValue(H h, const TensorIdentity& id) {
    return H::combine(std::move(h), id.storage, int64_t{id.offset},
                      uint64_t{id.reading}, id.sizes, id.strides);
  }
};

enum class EntryKind : uint8_t {
  kParameter,
  kBuffer,
  kNonPersistentBuffer,  // has a name, is in no state dict
  kExtraState,           // not a tensor: what a module says about itself
};

// The last segment of an extra state's FQN.
inline constexpr absl::string_view kExtraStateName = "_extra_state";

// One module and what is below it. A module or tensor that is registered twice
// is described twice.
struct ModuleNode {
  struct Tensor {
    std::string name;
    EntryKind kind = EntryKind::kParameter;
    TensorIdentity identity;  // of an extra state: its object as the storage
    size_t slot = 0;          // the describing frontend's own number
  };

  std::string name;  // in the parent; empty for the root
  // Parameters, buffers, extra state, each as registered.
  std::vector<Tensor> tensors;
  std::vector<ModuleNode> children;  // as registered
  // If the module is a wrapper (ModuleWrapper): the name of the child whose
  // segment is left out of FQNs.
  std::optional<std::string> wrapped_child;
  // Of FqnModifiers: the segments of these children are left out as well.
  std::vector<FqnModifier> modifiers;
  // The address of the module, equal for a module that is described twice; null
  // if it cannot be asked for as an object.
  const void* object = nullptr;
};

}  // namespace dsd

#endif  // DSD_CORE_FQN_MODULE_TREE_H_
