// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/module/module.h"

#include <cstddef>
#include <memory>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "dsd/core/fqn/fqn_modifiers.h"
#include "dsd/core/fqn/module_wrapper.h"
#include "dsd/core/state_dict/extra_state.h"
#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/module/non_persistent.h"
#include "torch/nn/module.h"

namespace dsd {
namespace {

// Access to what named_parameters() copies: models have many small modules.
struct ParametersOf : torch::nn::Module {
  static const torch::OrderedDict<std::string, at::Tensor>& Get(
      const torch::nn::Module& module) {
    return module.*(&ParametersOf::parameters_);
  }
};

// dynamic_cast<ExtraState*>, asked once for neighbours of one class.
class ExtraStateCast {
 public:
  ExtraState* operator()(torch::nn::Module& module) {
    const std::type_info& type = typeid(module);
    if (type_ != nullptr && *type_ == type && !found_) return nullptr;
    type_ = &type;
    auto* const extra = dynamic_cast<ExtraState*>(&module);
    found_ = extra != nullptr;
    return extra;
  }

 private:
  const std::type_info* type_ = nullptr;
  bool found_ = false;
};

void Collect(const torch::nn::Module& module,
             std::vector<at::Tensor>& tensors) {
  for (const auto& item : ParametersOf::Get(module)) {
    if (item.value().defined()) tensors.push_back(item.value());
  }
  for (const auto& item : module.named_buffers(/*recurse=*/false)) {
    tensors.push_back(item.value());
  }
  for (const std::shared_ptr<torch::nn::Module>& child : module.children()) {
    Collect(*child, tensors);
  }
}

void CollectExtraStates(torch::nn::Module& module, ExtraStateCast& cast,
                        std::vector<ExtraState*>& extra_states) {
  if (ExtraState* const extra = cast(module)) extra_states.push_back(extra);
  for (const std::shared_ptr<torch::nn::Module>& child : module.children()) {
    CollectExtraStates(*child, cast, extra_states);
  }
}

// Slots are counted in the order of the functions above.
struct Slots {
  size_t tensor = 0;
  size_t extra_state = 0;
};

ModuleNode DescribeNode(std::string name, const torch::nn::Module& module,
                        const std::string& fqn_modifiers, Slots& slots) {
  ModuleNode node;
  node.name = std::move(name);
  node.object = dynamic_cast<const void*>(&module);
  if (const auto* wrapper = dynamic_cast<const ModuleWrapper*>(&module)) {
    node.wrapped_child = std::string(wrapper->wrapped_child_name());
  }
  if (const auto* modifiers = dynamic_cast<const FqnModifiers*>(&module)) {
    node.modifiers = modifiers->fqn_modifiers(fqn_modifiers);
  }
  for (const auto& item : ParametersOf::Get(module)) {
    if (!item.value().defined()) continue;
    node.tensors.push_back({item.key(), EntryKind::kParameter,
                            IdentityOf(item.value()), slots.tensor++});
  }
  for (const auto& item : module.named_buffers(/*recurse=*/false)) {
    node.tensors.push_back({item.key(),
                            IsNonPersistent(module, item.key(), item.value())
                                ? EntryKind::kNonPersistentBuffer
                                : EntryKind::kBuffer,
                            IdentityOf(item.value()), slots.tensor++});
  }
  if (const auto* extra = dynamic_cast<const ExtraState*>(&module)) {
    TensorIdentity identity;
    identity.storage = extra;
    node.tensors.push_back({std::string(kExtraStateName),
                            EntryKind::kExtraState, std::move(identity),
                            slots.extra_state++});
  }
  for (const auto& item : module.named_children()) {
    node.children.push_back(
        DescribeNode(item.key(), *item.value(), fqn_modifiers, slots));
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

absl::StatusOr<std::vector<ExtraState*>> TorchModuleSource::ExtraStates() {
  return TorchToStatus([&] {
    std::vector<ExtraState*> extra_states;
    ExtraStateCast cast;
    CollectExtraStates(*module_, cast, extra_states);
    return extra_states;
  });
}

int64_t TorchModuleSource::revision() { return NonPersistentRevision(); }

absl::StatusOr<ModuleNode> TorchModuleSource::Describe() {
  return TorchToStatus([&] {
    Slots slots;
    return DescribeNode("", *module_, fqn_modifiers_, slots);
  });
}

}  // namespace dsd
