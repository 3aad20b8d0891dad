// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/flat_state.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/value/flatten.h"

namespace dsd {
namespace {

bool HasTensor(const Value& value) {
  if (value.is<TensorValue>()) return true;
  if (const auto* dict = value.get_if<StateDict>()) {
    for (size_t i = 0; i < dict->size(); ++i) {
      if (HasTensor(dict->value(i))) return true;
    }
    return false;
  }
  const std::vector<Value>* items = value.get_if<Value::List>();
  if (const auto* tuple = value.get_if<Value::Tuple>()) items = &tuple->items;
  return items != nullptr &&
         std::any_of(items->begin(), items->end(), HasTensor);
}

absl::Status AddLeaf(const Path& path, const Value& value, Holder self,
                     absl::flat_hash_set<std::string>& keys, FlatState& flat) {
  std::string key = JoinPath(path);
  if (!keys.insert(key).second) {
    return absl::AlreadyExistsError(absl::StrCat(
        "two values of the state dict have the key \"", key, "\""));
  }
  if (const auto* tensor = value.get_if<TensorValue>()) {
    DSD_RETURN_IF_ERROR(tensor->CheckIsOf(self)) << "\"" << key << "\"";
    flat.tensor_paths.push_back(path);
    return flat.tensors.Add(std::move(key), *tensor);
  }
  if (HasTensor(value)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", key, "\" is a ", value.kind_name(),
        " with a tensor in it, which has no key of its own; use a list"));
  }
  DSD_ASSIGN_OR_RETURN(Object object, ToObject(value));
  flat.objects.push_back({path, std::move(object)});
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<FlatState> Flatten(const StateDict& dict, Communicator* comm) {
  // A copy of the tree shares all tensors.
  const Value root{StateDict(dict)};
  std::optional<Holder> self;
  if (comm != nullptr) {
    self = comm->rank();
  } else {
    VisitLeaves<TensorValue>(root, [&](const Path&, const Value& value) {
      const auto* tensor = value.get_if<TensorValue>();
      if (!self.has_value() && tensor != nullptr && !tensor->is_plain() &&
          !tensor->locals().empty()) {
        self = tensor->holder();
      }
    });
  }
  FlatState flat{
      TensorEndpoint(comm != nullptr ? DeviceMesh::Iota({comm->size()})
                                     : DeviceMesh::Iota({1}, self.value_or(0)),
                     self.value_or(0)),
      {},
      {}};
  absl::Status status;
  absl::flat_hash_set<std::string> keys;
  VisitLeaves<TensorValue>(root, [&](const Path& path, const Value& value) {
    if (status.ok()) {
      status = AddLeaf(path, value, self.value_or(0), keys, flat);
    }
  });
  DSD_RETURN_IF_ERROR(status);
  return flat;
}

absl::Status PutObjects(const std::vector<FlatState::ObjectEntry>& objects,
                        StateDict& dict) {
  Value root(std::move(dict));
  absl::Status status;
  for (const FlatState::ObjectEntry& entry : objects) {
    status = SetAtPath(root, entry.path, FromObject(entry.value));
    if (!status.ok()) break;
  }
  dict = std::move(*root.get_if<StateDict>());
  return status;
}

}  // namespace dsd
