// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/script/script.h"

#include <string>
#include <utility>

#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/state_dict/source_session.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "torch/csrc/jit/api/module.h"

namespace dsd {
namespace {

// Slots are counted in the order of the walk.
ModuleNode Walk(std::string name, const torch::jit::Module& module,
                size_t& slot,
                absl::FunctionRef<void(const at::Tensor&)> visit) {
  ModuleNode node;
  node.name = std::move(name);
  const auto add = [&](const auto& items, EntryKind kind) {
    for (const auto& item : items) {
      if (!item.value.defined()) continue;
      visit(item.value);
      node.tensors.push_back({item.name, kind, IdentityOf(item.value), slot++});
    }
  };
  add(module.named_parameters(/*recurse=*/false), EntryKind::kParameter);
  add(module.named_buffers(/*recurse=*/false), EntryKind::kBuffer);
  for (const auto& child : module.named_children()) {
    node.children.push_back(Walk(child.name, child.value, slot, visit));
  }
  return node;
}

}  // namespace

ScriptModuleSource::ScriptModuleSource(const torch::jit::Module& module)
    : module_(std::make_unique<const torch::jit::Module>(module)) {}

ScriptModuleSource::~ScriptModuleSource() = default;

absl::Status ScriptModuleSource::ForEachTensor(
    absl::FunctionRef<void(const at::Tensor&)> visit) {
  return TorchToStatus([&] {
    size_t slot = 0;
    Walk("", *module_, slot, visit);
  });
}

absl::StatusOr<ModuleNode> ScriptModuleSource::Describe() {
  return TorchToStatus([&] {
    size_t slot = 0;
    return Walk("", *module_, slot, [](const at::Tensor&) {});
  });
}

absl::StatusOr<StateDict> GetModelStateDict(const torch::jit::Module& model,
                                            Communicator* comm,
                                            const StateDictOptions& options,
                                            const CallOptions& call) {
  ScriptModuleSource source(model);
  return SourceSession(&source, {}, comm, options).GetModel(call);
}

absl::StatusOr<IncompatibleKeys> SetModelStateDict(
    torch::jit::Module& model, const StateDict& model_state_dict,
    Communicator* comm, const StateDictOptions& options,
    const CallOptions& call) {
  ScriptModuleSource source(model);
  return SourceSession(&source, {}, comm, options)
      .SetModel(model_state_dict, call);
}

}  // namespace dsd
