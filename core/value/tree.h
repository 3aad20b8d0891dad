// SPDX-License-Identifier: Apache-2.0
//
// Walking a tree of values, and taking it apart and putting it together without
// loss. (dsd/core/value/flatten.h has the keys that files use, which lose empty
// dicts, tuples and whether a key was a number.)

#ifndef DSD_CORE_VALUE_TREE_H_
#define DSD_CORE_VALUE_TREE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/value/value.h"

namespace dsd {

struct ListIndex {
  int64_t index;
  friend bool operator==(ListIndex a, ListIndex b) {
    return a.index == b.index;
  }
};
struct TupleIndex {
  int64_t index;
  friend bool operator==(TupleIndex a, TupleIndex b) {
    return a.index == b.index;
  }
};

// A step down from a container: a dict's key, text or number, or a position.
using TreeStep = std::variant<std::string, int64_t, ListIndex, TupleIndex>;
using TreePath = std::vector<TreeStep>;

// The steps joined by dots, for people and for flat names.
inline std::string TreePathText(const TreePath& path) {
  std::string text;
  for (const TreeStep& step : path) {
    if (!text.empty()) text.push_back('.');
    if (const auto* key = std::get_if<std::string>(&step)) {
      text.append(*key);
    } else if (const auto* number = std::get_if<int64_t>(&step)) {
      absl::StrAppend(&text, *number);
    } else if (const auto* item = std::get_if<ListIndex>(&step)) {
      absl::StrAppend(&text, item->index);
    } else {
      absl::StrAppend(&text, std::get<TupleIndex>(step).index);
    }
  }
  return text;
}

template <class TensorT>
struct TreeLeaf {
  TreePath path;
  BasicValue<TensorT> value;  // no container, or an empty one
};

namespace internal {

// ValueT is BasicValue<TensorT>, const or not.
template <class TensorT, class ValueT>
void VisitTree(ValueT& value, TreePath& path,
               absl::FunctionRef<void(const TreePath&, ValueT&)> visit) {
  using Value = BasicValue<TensorT>;
  const auto below = [&](TreeStep step, ValueT& item) {
    path.push_back(std::move(step));
    VisitTree<TensorT, ValueT>(item, path, visit);
    path.pop_back();
  };
  if (auto* dict = value.template get_if<typename Value::Dict>();
      dict != nullptr && !dict->empty()) {
    for (size_t i = 0; i < dict->size(); ++i) {
      below(std::visit([](const auto& key) { return TreeStep(key); },
                       dict->key(i)),
            dict->value(i));
    }
  } else if (auto* list = value.template get_if<typename Value::List>();
             list != nullptr && !list->empty()) {
    for (size_t i = 0; i < list->size(); ++i) {
      below(ListIndex{static_cast<int64_t>(i)}, (*list)[i]);
    }
  } else if (auto* tuple = value.template get_if<typename Value::Tuple>();
             tuple != nullptr && !tuple->items.empty()) {
    for (size_t i = 0; i < tuple->items.size(); ++i) {
      below(TupleIndex{static_cast<int64_t>(i)}, tuple->items[i]);
    }
  } else {
    visit(path, value);
  }
}

template <class ContainerT, class TensorT>
ContainerT* ContainerAt(BasicValue<TensorT>& at) {
  if (at.template is<None>()) at = ContainerT();
  return at.template get_if<ContainerT>();
}

}  // namespace internal

// Calls `visit` for every leaf below `root`, in order: what is no container,
// and containers that are empty.
template <class TensorT>
void VisitTree(
    const BasicValue<TensorT>& root,
    absl::FunctionRef<void(const TreePath&, const BasicValue<TensorT>&)>
        visit) {
  TreePath path;
  internal::VisitTree<TensorT, const BasicValue<TensorT>>(root, path, visit);
}
template <class TensorT>
void VisitTree(
    BasicValue<TensorT>& root,
    absl::FunctionRef<void(const TreePath&, BasicValue<TensorT>&)> visit) {
  TreePath path;
  internal::VisitTree<TensorT, BasicValue<TensorT>>(root, path, visit);
}

template <class TensorT>
std::vector<TreeLeaf<TensorT>> FlattenTree(const BasicValue<TensorT>& root) {
  std::vector<TreeLeaf<TensorT>> leaves;
  VisitTree<TensorT>(
      root, [&](const TreePath& path, const BasicValue<TensorT>& value) {
        leaves.push_back({path, value});
      });
  return leaves;
}

// The inverse: equal to what was flattened. Leaves of one dict may come in any
// order, which becomes the dict's; those of a list or tuple come in theirs.
// InvalidArgument, naming the path, if a leaf is where another kind of
// container is, if a path comes twice, or if an item is left out.
template <class TensorT>
absl::StatusOr<BasicValue<TensorT>> UnflattenTree(
    std::vector<TreeLeaf<TensorT>> leaves) {
  using Value = BasicValue<TensorT>;
  Value root;
  bool root_is_set = false;
  for (TreeLeaf<TensorT>& leaf : leaves) {
    const auto error = [&](absl::string_view what) {
      return absl::InvalidArgumentError(
          absl::StrCat("unflatten \"", TreePathText(leaf.path), "\": ", what));
    };
    Value* at = &root;
    bool is_new = !root_is_set;
    for (const TreeStep& step : leaf.path) {
      // Nothing is below what is already a value of its own.
      if (!is_new && !at->is_container()) {
        return error("there is a value above it");
      }
      const auto item = [&](std::vector<Value>* items,
                            int64_t index) -> absl::Status {
        if (items == nullptr) return error("expected a list or tuple above");
        const auto size = static_cast<int64_t>(items->size());
        if (index < 0 || index > size) {
          return error(absl::StrCat("expected item ", size, " next"));
        }
        is_new = index == size;
        if (is_new) items->emplace_back();
        at = &(*items)[index];
        return absl::OkStatus();
      };
      if (const auto* list_index = std::get_if<ListIndex>(&step)) {
        DSD_RETURN_IF_ERROR(
            item(internal::ContainerAt<typename Value::List>(*at),
                 list_index->index));
      } else if (const auto* tuple_index = std::get_if<TupleIndex>(&step)) {
        auto* tuple = internal::ContainerAt<typename Value::Tuple>(*at);
        DSD_RETURN_IF_ERROR(item(tuple == nullptr ? nullptr : &tuple->items,
                                 tuple_index->index));
      } else {
        auto* dict = internal::ContainerAt<typename Value::Dict>(*at);
        if (dict == nullptr) return error("expected a dict above");
        const PathSegment key = std::holds_alternative<std::string>(step)
                                    ? PathSegment(std::get<std::string>(step))
                                    : PathSegment(std::get<int64_t>(step));
        Value* found = dict->Find(key);
        is_new = found == nullptr;
        at = is_new ? &dict->Set(key, Value()) : found;
      }
    }
    if (!is_new) return error("it is there already");
    *at = std::move(leaf.value);
    root_is_set = true;
  }
  return root;
}

// The value at `path`: text is a dict's key; an integer is a dict's key or an
// item's position. Null if there is none.
template <class TensorT>
const BasicValue<TensorT>* FindAtPath(const BasicValue<TensorT>& root,
                                      const Path& path) {
  using Value = BasicValue<TensorT>;
  const Value* at = &root;
  for (const PathSegment& segment : path) {
    if (const auto* dict = at->template get_if<typename Value::Dict>()) {
      at = dict->Find(segment);
      if (at == nullptr) return nullptr;
      continue;
    }
    const auto* items = at->template get_if<typename Value::List>();
    if (const auto* tuple = at->template get_if<typename Value::Tuple>()) {
      items = &tuple->items;
    }
    const auto* index = std::get_if<int64_t>(&segment);
    if (items == nullptr || index == nullptr || *index < 0 ||
        *index >= static_cast<int64_t>(items->size())) {
      return nullptr;
    }
    at = &(*items)[*index];
  }
  return at;
}

}  // namespace dsd

#endif  // DSD_CORE_VALUE_TREE_H_
