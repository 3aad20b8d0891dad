// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/module/module.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "dsd/core/fqn/module_wrapper.h"
#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "torch/nn/module.h"

namespace dsd {
namespace {

void Collect(const torch::nn::Module& module,
             std::vector<at::Tensor>& tensors) {
  for (const auto& item : module.named_parameters(/*recurse=*/false)) {
    tensors.push_back(item.value());
  }
  for (const auto& item : module.named_buffers(/*recurse=*/false)) {
    tensors.push_back(item.value());
  }
  for (const std::shared_ptr<torch::nn::Module>& child : module.children()) {
    Collect(*child, tensors);
  }
}

// Slots are counted in the order of Collect.
ModuleNode DescribeNode(std::string name, const torch::nn::Module& module,
                        size_t& slot) {
  ModuleNode node;
  node.name = std::move(name);
  if (const auto* wrapper = dynamic_cast<const ModuleWrapper*>(&module)) {
    node.wrapped_child = std::string(wrapper->wrapped_child_name());
  }
  for (const auto& item : module.named_parameters(/*recurse=*/false)) {
    node.tensors.push_back(
        {item.key(), TensorKind::kParameter, IdentityOf(item.value()), slot++});
  }
  for (const auto& item : module.named_buffers(/*recurse=*/false)) {
    node.tensors.push_back(
        {item.key(), TensorKind::kBuffer, IdentityOf(item.value()), slot++});
  }
  for (const auto& item : module.named_children()) {
    node.children.push_back(DescribeNode(item.key(), *item.value(), slot));
  }
  return node;
}

}  // namespace

absl::StatusOr<std::vector<at::Tensor>> TorchModuleSource::Tensors() {
  return TorchToStatus([&] {
    std::vector<at::Tensor> tensors;
    Collect(*module_, tensors);
    return tensors;
  });
}

absl::StatusOr<ModuleNode> TorchModuleSource::Describe() {
  return TorchToStatus([&] {
    size_t slot = 0;
    return DescribeNode("", *module_, slot);
  });
}

}  // namespace dsd
