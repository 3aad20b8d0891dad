// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/fqn/fqn_table.h"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace dsd {
namespace {

// A node on the way down, with the prefixes of what is in it.
struct Visit {
  const ModuleNode* node;
  std::string prefix;  // "" or "a.b."
  std::string raw_prefix;
};

}  // namespace

absl::StatusOr<FqnTable> FqnTable::Build(const ModuleNode& root) {
  FqnTable table;
  absl::flat_hash_map<TensorIdentity, size_t> group_of;
  // Depth first without recursion: module trees come from users.
  std::vector<Visit> stack = {{&root, "", ""}};
  while (!stack.empty()) {
    const Visit visit = std::move(stack.back());
    stack.pop_back();
    const ModuleNode& node = *visit.node;
    for (const ModuleNode::Tensor& tensor : node.tensors) {
      const size_t index = table.entries_.size();
      Entry entry;
      entry.fqn = absl::StrCat(visit.prefix, tensor.name);
      entry.raw_path = absl::StrCat(visit.raw_prefix, tensor.name);
      entry.kind = tensor.kind;
      entry.slot = tensor.slot;
      const auto [name, is_new] = table.by_fqn_.try_emplace(entry.fqn, index);
      if (!is_new) {
        return absl::AlreadyExistsError(absl::StrCat(
            "two tensors of the model have the FQN \"", entry.fqn,
            "\": registered as \"", table.entries_[name->second].raw_path,
            "\" and as \"", entry.raw_path,
            "\"; rename the one that belongs to the wrapper"));
      }
      const auto [group, is_new_group] =
          group_of.try_emplace(tensor.identity, table.groups_.size());
      if (is_new_group) table.groups_.emplace_back();
      entry.group = group->second;
      table.groups_[entry.group].push_back(index);
      table.entries_.push_back(std::move(entry));
    }
    if (node.wrapped_child.has_value() &&
        std::none_of(node.children.begin(), node.children.end(),
                     [&](const ModuleNode& child) {
                       return child.name == *node.wrapped_child;
                     })) {
      return absl::InvalidArgumentError(absl::StrCat(
          "module \"",
          absl::string_view(visit.raw_prefix)
              .substr(0, visit.raw_prefix.empty()
                             ? 0
                             : visit.raw_prefix.size() - 1),
          "\" says that it wraps its child \"", *node.wrapped_child,
          "\", but it has no child of that name; register it, or correct "
          "wrapped_child_name()"));
    }
    for (auto child = node.children.rbegin(); child != node.children.rend();
         ++child) {
      stack.push_back({&*child,
                       node.wrapped_child == child->name
                           ? visit.prefix
                           : absl::StrCat(visit.prefix, child->name, "."),
                       absl::StrCat(visit.raw_prefix, child->name, ".")});
    }
  }
  return table;
}

std::optional<size_t> FqnTable::Find(absl::string_view fqn) const {
  const auto it = by_fqn_.find(fqn);
  if (it == by_fqn_.end()) return std::nullopt;
  return it->second;
}

}  // namespace dsd
