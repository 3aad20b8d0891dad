// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/module/module.h"

#include <cstddef>
#include <memory>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/prefetch.h"
#include "dsd/core/fqn/fqn_modifiers.h"
#include "dsd/core/fqn/module_wrapper.h"
#include "dsd/core/state_dict/extra_state.h"
#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/tensor/tensor_memory.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/module/non_persistent.h"
#include "torch/nn/module.h"

namespace dsd {
// Names the friend of torch::nn::Module below.
struct ModuleContents {};
}  // namespace dsd

namespace torch::nn {
template <typename Derived>
class Cloneable;
}  // namespace torch::nn

// Module's accessors copy, with a hash table for every module, and models have
// many small ones. It lets this template see what there is.
template <>
class torch::nn::Cloneable<dsd::ModuleContents> {
 public:
  using Tensors = torch::OrderedDict<std::string, at::Tensor>;
  using Modules =
      torch::OrderedDict<std::string, std::shared_ptr<torch::nn::Module>>;

  static const Tensors& Parameters(const Module& module) {
    return module.parameters_;
  }
  static const Tensors& Buffers(const Module& module) {
    return module.buffers_;
  }
  static const Modules& Children(const Module& module) {
    return module.children_;
  }
};

namespace dsd {
namespace {

using Contents = torch::nn::Cloneable<ModuleContents>;

// dynamic_cast<Interface*> of modules, asked once for neighbours of one class:
// a cast that fails is a search through the class's bases.
template <class Interface>
class InterfaceCast {
 public:
  template <class Module>
  Interface* operator()(Module& module) {
    const std::type_info& type = typeid(module);
    if (type_ != nullptr && *type_ == type && !found_) return nullptr;
    type_ = &type;
    auto* const interface = dynamic_cast<Interface*>(&module);
    found_ = interface != nullptr;
    return interface;
  }

 private:
  const std::type_info* type_ = nullptr;
  bool found_ = false;
};

// A model may have thousands of small modules, in each of which a walk waits
// for memory again and again: for the module, its lists and its tensors. So it
// asks for what it will need a few modules ahead, one step after another.
void PrefetchModules(const std::vector<Contents::Modules::Item>& modules,
                     size_t current) {
  const auto ahead = [&](size_t distance) -> const torch::nn::Module* {
    return current + distance < modules.size()
               ? modules[current + distance].value().get()
               : nullptr;
  };
  if (const auto* const module = ahead(6)) {
    PrefetchBytes(module, sizeof(*module));
  }
  if (const auto* const module = ahead(4)) {
    const auto& items = Contents::Parameters(*module).items();
    PrefetchBytes(items.data(), items.size() * sizeof(items[0]));
  }
  if (const auto* const module = ahead(2)) {
    for (const auto& item : Contents::Parameters(*module)) {
      PrefetchTensor(item.value());
    }
  }
}

// `names` becomes a digest of the tree.
void Walk(const torch::nn::Module& module, size_t& names,
          absl::FunctionRef<void(const at::Tensor&)> visit) {
  for (const auto* tensors :
       {&Contents::Parameters(module), &Contents::Buffers(module)}) {
    for (const auto& item : *tensors) {
      if (!item.value().defined()) continue;
      visit(item.value());
      names = absl::HashOf(names, item.key());
    }
  }
  const auto& children = Contents::Children(module).items();
  names += children.size();
  for (size_t i = 0; i < children.size(); ++i) {
    PrefetchModules(children, i);
    names = absl::HashOf(names, children[i].key());
    Walk(*children[i].value(), names, visit);
  }
}

void CollectExtraStates(torch::nn::Module& module,
                        InterfaceCast<ExtraState>& cast,
                        std::vector<ExtraState*>& extra_states) {
  if (ExtraState* const extra = cast(module)) extra_states.push_back(extra);
  for (const auto& child : Contents::Children(module)) {
    CollectExtraStates(*child.value(), cast, extra_states);
  }
}

// Slots are counted in the order of the functions above.
struct Description {
  const std::string& fqn_modifiers;
  size_t tensor_slots = 0;
  size_t extra_state_slots = 0;
  InterfaceCast<const ModuleWrapper> to_wrapper;
  InterfaceCast<const FqnModifiers> to_modifiers;
  InterfaceCast<const ExtraState> to_extra_state;
};

ModuleNode DescribeNode(std::string name, const torch::nn::Module& module,
                        Description& description) {
  ModuleNode node;
  node.name = std::move(name);
  node.object = dynamic_cast<const void*>(&module);
  if (const auto* wrapper = description.to_wrapper(module)) {
    node.wrapped_child = std::string(wrapper->wrapped_child_name());
  }
  if (const auto* modifiers = description.to_modifiers(module)) {
    node.modifiers = modifiers->fqn_modifiers(description.fqn_modifiers);
  }
  node.tensors.reserve(Contents::Parameters(module).size() +
                       Contents::Buffers(module).size());
  node.children.reserve(Contents::Children(module).size());
  for (const auto& item : Contents::Parameters(module)) {
    if (!item.value().defined()) continue;
    node.tensors.push_back({item.key(), EntryKind::kParameter,
                            IdentityOf(item.value()),
                            description.tensor_slots++});
  }
  for (const auto& item : Contents::Buffers(module)) {
    if (!item.value().defined()) continue;
    node.tensors.push_back({item.key(),
                            IsNonPersistent(module, item.key(), item.value())
                                ? EntryKind::kNonPersistentBuffer
                                : EntryKind::kBuffer,
                            IdentityOf(item.value()),
                            description.tensor_slots++});
  }
  if (const auto* extra = description.to_extra_state(module)) {
    TensorIdentity identity;
    identity.storage = extra;
    node.tensors.push_back({std::string(kExtraStateName),
                            EntryKind::kExtraState, std::move(identity),
                            description.extra_state_slots++});
  }
  const auto& children = Contents::Children(module).items();
  for (size_t i = 0; i < children.size(); ++i) {
    PrefetchModules(children, i);
    node.children.push_back(
        DescribeNode(children[i].key(), *children[i].value(), description));
  }
  return node;
}

}  // namespace

absl::Status TorchModuleSource::ForEachTensor(
    absl::FunctionRef<void(const at::Tensor&)> visit) {
  names_ = 0;
  return TorchToStatus([&] { Walk(*module_, names_, visit); });
}

absl::StatusOr<std::vector<ExtraState*>> TorchModuleSource::ExtraStates() {
  return TorchToStatus([&] {
    std::vector<ExtraState*> extra_states;
    InterfaceCast<ExtraState> cast;
    CollectExtraStates(*module_, cast, extra_states);
    return extra_states;
  });
}

int64_t TorchModuleSource::revision() {
  return static_cast<int64_t>(absl::HashOf(NonPersistentRevision(), names_));
}

absl::StatusOr<ModuleNode> TorchModuleSource::Describe() {
  return TorchToStatus([&] {
    Description description{fqn_modifiers_};
    return DescribeNode("", *module_, description);
  });
}

}  // namespace dsd
