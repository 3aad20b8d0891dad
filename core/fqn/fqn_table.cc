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
#include "absl/strings/string_view.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {
namespace {

// A node on the way down, with the prefixes of what is in it.
struct Visit {
  const ModuleNode* node;
  std::string prefix;  // "" or "a.b."
  std::string raw_prefix;
};

absl::string_view WithoutDot(absl::string_view prefix) {
  return prefix.substr(0, prefix.empty() ? 0 : prefix.size() - 1);
}

const ModuleNode* FindChild(const ModuleNode& node, absl::string_view name) {
  const auto it =
      std::find_if(node.children.begin(), node.children.end(),
                   [&](const ModuleNode& child) { return child.name == name; });
  return it == node.children.end() ? nullptr : &*it;
}

bool HasName(const ModuleNode& node, absl::string_view name) {
  return FindChild(node, name) != nullptr ||
         std::any_of(
             node.tensors.begin(), node.tensors.end(),
             [&](const ModuleNode::Tensor& t) { return t.name == name; });
}

// The names of the children that leave no segment.
absl::StatusOr<std::vector<absl::string_view>> HiddenChildren(
    const Visit& visit) {
  const ModuleNode& node = *visit.node;
  std::vector<absl::string_view> hidden;
  if (node.wrapped_child.has_value()) {
    if (FindChild(node, *node.wrapped_child) == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "module \"", WithoutDot(visit.raw_prefix),
          "\" says that it wraps its child \"", *node.wrapped_child,
          "\", but it has no child of that name; register it, or correct "
          "wrapped_child_name()"));
    }
    hidden.push_back(*node.wrapped_child);
  }
  for (const FqnModifier& modifier : node.modifiers) {
    const ModuleNode* child = FindChild(node, modifier.hidden_child);
    if (child == nullptr || !HasName(*child, modifier.name)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "module \"", WithoutDot(visit.raw_prefix), "\" says that its \"",
          modifier.name, "\" is in its child \"", modifier.hidden_child,
          child == nullptr ? "\", but it has no child of that name"
                           : "\", but nothing has that name there",
          "; correct fqn_modifiers()"));
    }
    hidden.push_back(modifier.hidden_child);
  }
  return hidden;
}

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
    table.modules_.push_back(
        {std::string(WithoutDot(visit.prefix)), node.object});
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
            "\"; rename the one that belongs to the wrapper, or correct "
            "fqn_modifiers()"));
      }
      const auto [group, is_new_group] =
          group_of.try_emplace(tensor.identity, table.groups_.size());
      if (is_new_group) table.groups_.emplace_back();
      entry.group = group->second;
      std::vector<size_t>& aliases = table.groups_[entry.group];
      const bool goes_first =
          entry.kind != EntryKind::kNonPersistentBuffer && !aliases.empty() &&
          table.entries_[aliases[0]].kind == EntryKind::kNonPersistentBuffer;
      aliases.insert(goes_first ? aliases.begin() : aliases.end(), index);
      table.entries_.push_back(std::move(entry));
    }
    DSD_ASSIGN_OR_RETURN(const std::vector<absl::string_view> hidden,
                         HiddenChildren(visit));
    for (auto child = node.children.rbegin(); child != node.children.rend();
         ++child) {
      stack.push_back(
          {&*child,
           std::find(hidden.begin(), hidden.end(), child->name) != hidden.end()
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
