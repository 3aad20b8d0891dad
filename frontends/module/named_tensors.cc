// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/module/named_tensors.h"

#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/tensor/torch_boundary.h"

namespace dsd {

absl::Status NamedTensorsSource::ForEachTensor(
    absl::FunctionRef<void(const at::Tensor&)> visit) {
  return TorchToStatus([&] {
    names_ = 0;
    for (const NamedTensor& named : list_()) {
      if (!named.tensor.defined()) continue;
      visit(named.tensor);
      names_ = absl::HashOf(names_, named.fqn, named.kind);
    }
  });
}

absl::StatusOr<ModuleNode> NamedTensorsSource::Describe() {
  return TorchToStatus([&]() -> absl::StatusOr<ModuleNode> {
    // One node: FQNs are taken as they are.
    ModuleNode root;
    for (NamedTensor& named : list_()) {
      if (!named.tensor.defined()) continue;
      const size_t slot = root.tensors.size();
      if (named.fqn.empty()) {
        return absl::InvalidArgumentError(
            absl::StrCat("tensor ", slot,
                         " of the model's list has no name; give all an FQN"));
      }
      root.tensors.push_back(
          {std::move(named.fqn), named.kind, IdentityOf(named.tensor), slot});
    }
    return root;
  });
}

}  // namespace dsd
