// SPDX-License-Identifier: Apache-2.0
//
// The names of all tensors of a model: canonical FQNs without wrapper segments,
// and which of them are one tensor.

#ifndef DSD_CORE_FQN_FQN_TABLE_H_
#define DSD_CORE_FQN_FQN_TABLE_H_

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/fqn/module_tree.h"

namespace dsd {

// Immutable after Build. Thread-safe.
class FqnTable {
 public:
  struct Entry {
    std::string fqn;       // dotted path in the unwrapped model
    std::string raw_path;  // the same with wrapper segments
    EntryKind kind;
    size_t slot;
    size_t group;  // index in groups()
  };
  struct Module {
    std::string fqn;  // empty for the root
    const void* object;
  };

  // An empty table.
  FqnTable() = default;

  // One walk over the tree, linear in its size.
  // Errors: AlreadyExists if two tensors get one FQN (both raw paths named);
  // InvalidArgument if a wrapper lacks the child it names, or a hidden child of
  // FqnModifiers is not there or does not have the name.
  static absl::StatusOr<FqnTable> Build(const ModuleNode& root);

  // In module order: own parameters, own buffers, own extra state, then the
  // children.
  absl::Span<const Entry> entries() const { return entries_; }

  // Entries that are the same tensor or extra state, by index in entries(), in
  // module order, but those that are in state dicts first. The first one's FQN
  // is canonical for the group. Groups are ordered by their first entry.
  absl::Span<const std::vector<size_t>> groups() const { return groups_; }

  const Entry& canonical(size_t group) const {
    return entries_[groups_[group][0]];
  }

  // All modules under every path, in module order.
  absl::Span<const Module> modules() const { return modules_; }

  // Index in entries(); nullopt if there is no such FQN.
  std::optional<size_t> Find(absl::string_view fqn) const;

 private:
  std::vector<Entry> entries_;
  std::vector<std::vector<size_t>> groups_;
  std::vector<Module> modules_;
  absl::flat_hash_map<std::string, size_t> by_fqn_;
};

}  // namespace dsd

#endif  // DSD_CORE_FQN_FQN_TABLE_H_
