// SPDX-License-Identifier: Apache-2.0
//
// The names of all tensors of a model: canonical FQNs without wrapper segments,
// and which of them are one tensor.

#ifndef DSD_CORE_FQN_FQN_TABLE_H_
#define DSD_CORE_FQN_FQN_TABLE_H_

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/prefetch.h"
#include "dsd/core/fqn/module_tree.h"

namespace dsd {

// Immutable and cheap to copy. Thread-safe.
class FqnTable {
 public:
  // Indices in entries(). Most tensors have one name.
  using Aliases = absl::InlinedVector<size_t, 1>;

  struct Entry {
    std::string fqn;  // dotted path in the unwrapped model
    EntryKind kind;
    size_t slot;
    size_t group;  // index in groups()
  };
  struct Module {
    std::string fqn;  // empty for the root
    const void* object;
  };

  // An empty table.
  FqnTable();

  // One walk over the tree, linear in its size.
  // Errors: AlreadyExists if two tensors get one FQN (both raw paths named);
  // InvalidArgument if a wrapper lacks the child it names, or a hidden child of
  // FqnModifiers is not there or does not have the name.
  static absl::StatusOr<FqnTable> Build(const ModuleNode& root);

  // In module order: own parameters, own buffers, own extra state, then the
  // children.
  absl::Span<const Entry> entries() const { return rep_->entries; }

  // Entries that are the same tensor or extra state, by index in entries(), in
  // module order, but those that are in state dicts first. The first one's FQN
  // is canonical for the group. Groups are ordered by their first entry.
  absl::Span<const Aliases> groups() const { return rep_->groups; }

  const Entry& canonical(size_t group) const {
    return rep_->entries[rep_->groups[group][0]];
  }

  // All modules under every path, in module order.
  absl::Span<const Module> modules() const { return rep_->modules; }

  // Index in entries(); nullopt if there is no such FQN.
  std::optional<size_t> Find(absl::string_view fqn) const;

  // Find of names that mostly come in module order: looks first at *position,
  // which becomes the one behind the name.
  std::optional<size_t> FindNear(absl::string_view fqn, size_t* position) const;

  // Asks for the memory of the names some entries behind `index`.
  void PrefetchNear(size_t index) const {
    constexpr size_t kAhead = 8;
    if (index + kAhead >= rep_->entries.size()) return;
    const std::string& fqn = rep_->entries[index + kAhead].fqn;
    PrefetchBytes(fqn.data(), fqn.size());
  }

 private:
  struct Rep {
    std::vector<Entry> entries;
    std::vector<Aliases> groups;
    std::vector<Module> modules;
    absl::flat_hash_map<absl::string_view, size_t> by_fqn;  // of `entries`
  };

  std::shared_ptr<const Rep> rep_;
};

}  // namespace dsd

#endif  // DSD_CORE_FQN_FQN_TABLE_H_
