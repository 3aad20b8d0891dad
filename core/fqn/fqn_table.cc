// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/fqn/fqn_table.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/no_destructor.h"
#include "absl/container/flat_hash_map.h"
#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {
namespace {

// A module on the way down.
struct Visit {
  const ModuleNode* node;
  size_t parent;       // index among the modules visited
  std::string prefix;  // of what is in it: "" or "a.b."
};

absl::string_view WithoutDot(absl::string_view prefix) {
  return prefix.substr(0, prefix.empty() ? 0 : prefix.size() - 1);
}

// What has been visited, to name it by its path with wrapper segments.
class Trail {
 public:
  void Add(const Visit& visit) {
    modules_.emplace_back(visit.node, visit.parent);
  }

  // "a.b.name"
  std::string PathOf(size_t module, absl::string_view name) const {
    std::string path(name);
    for (; module != 0; module = modules_[module].second) {
      path = absl::StrCat(modules_[module].first->name, path.empty() ? "" : ".",
                          path);
    }
    return path;
  }

 private:
  std::vector<std::pair<const ModuleNode*, size_t>> modules_;
};

struct IdentityHash {
  size_t operator()(const TensorIdentity* identity) const {
    return absl::HashOf(identity->storage, int64_t{identity->offset});
  }
};
struct SameIdentity {
  bool operator()(const TensorIdentity* a, const TensorIdentity* b) const {
    return *a == *b;
  }
};

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
    const ModuleNode& node, const Trail& trail, size_t module) {
  std::vector<absl::string_view> hidden;
  if (node.wrapped_child.has_value()) {
    if (FindChild(node, *node.wrapped_child) == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "module \"", trail.PathOf(module, ""),
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
          "module \"", trail.PathOf(module, ""), "\" says that its \"",
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

FqnTable::FqnTable() {
  static const absl::NoDestructor<std::shared_ptr<const Rep>> empty(
      std::make_shared<const Rep>());
  rep_ = *empty;
}

absl::StatusOr<FqnTable> FqnTable::Build(const ModuleNode& root) {
  auto rep = std::make_shared<Rep>();
  absl::flat_hash_map<const TensorIdentity*, size_t, IdentityHash, SameIdentity>
      group_of;
  Trail trail;
  std::vector<std::pair<size_t, const ModuleNode::Tensor*>> places;
  // Without recursion, here and below: module trees come from users.
  std::vector<const ModuleNode*> uncounted = {&root};
  size_t num_modules = 0;
  size_t num_tensors = 0;
  while (!uncounted.empty()) {
    const ModuleNode& node = *uncounted.back();
    uncounted.pop_back();
    ++num_modules;
    num_tensors += node.tensors.size();
    for (const ModuleNode& child : node.children) uncounted.push_back(&child);
  }
  rep->modules.reserve(num_modules);
  rep->entries.reserve(num_tensors);
  rep->groups.reserve(num_tensors);
  places.reserve(num_tensors);
  group_of.reserve(num_tensors);
  // Depth first.
  std::vector<Visit> stack = {{&root, 0, ""}};
  while (!stack.empty()) {
    const Visit visit = std::move(stack.back());
    stack.pop_back();
    const ModuleNode& node = *visit.node;
    const size_t module = rep->modules.size();
    trail.Add(visit);
    rep->modules.push_back(
        {std::string(WithoutDot(visit.prefix)), node.object});
    for (const ModuleNode::Tensor& tensor : node.tensors) {
      const size_t index = rep->entries.size();
      places.emplace_back(module, &tensor);
      const auto [group, is_new_group] =
          group_of.try_emplace(&tensor.identity, rep->groups.size());
      if (is_new_group) rep->groups.emplace_back();
      rep->entries.push_back({absl::StrCat(visit.prefix, tensor.name),
                              tensor.kind, tensor.slot, group->second});
      Aliases& aliases = rep->groups[group->second];
      const bool goes_first =
          tensor.kind != EntryKind::kNonPersistentBuffer && !aliases.empty() &&
          rep->entries[aliases[0]].kind == EntryKind::kNonPersistentBuffer;
      aliases.insert(goes_first ? aliases.begin() : aliases.end(), index);
    }
    DSD_ASSIGN_OR_RETURN(const std::vector<absl::string_view> hidden,
                         HiddenChildren(node, trail, module));
    for (auto child = node.children.rbegin(); child != node.children.rend();
         ++child) {
      stack.push_back(
          {&*child, module,
           std::find(hidden.begin(), hidden.end(), child->name) != hidden.end()
               ? visit.prefix
               : absl::StrCat(visit.prefix, child->name, ".")});
    }
  }

  rep->by_fqn.reserve(rep->entries.size());
  for (size_t i = 0; i < rep->entries.size(); ++i) {
    const auto [other, is_new] =
        rep->by_fqn.try_emplace(rep->entries[i].fqn, i);
    if (is_new) continue;
    const auto path = [&](size_t entry) {
      return trail.PathOf(places[entry].first, places[entry].second->name);
    };
    return absl::AlreadyExistsError(absl::StrCat(
        "two tensors of the model have the FQN \"", rep->entries[i].fqn,
        "\": registered as \"", path(other->second), "\" and as \"", path(i),
        "\"; rename the one that belongs to the wrapper, or correct "
        "fqn_modifiers()"));
  }
  FqnTable table;
  table.rep_ = std::move(rep);
  return table;
}

std::optional<size_t> FqnTable::Find(absl::string_view fqn) const {
  const auto it = rep_->by_fqn.find(fqn);
  if (it == rep_->by_fqn.end()) return std::nullopt;
  return it->second;
}

std::optional<size_t> FqnTable::FindNear(absl::string_view fqn,
                                         size_t* position) const {
  std::optional<size_t> index;
  if (*position < rep_->entries.size() && rep_->entries[*position].fqn == fqn) {
    index = *position;
  } else {
    index = Find(fqn);
  }
  if (index.has_value()) *position = *index + 1;
  return index;
}

}  // namespace dsd
