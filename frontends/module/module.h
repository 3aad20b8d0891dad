// SPDX-License-Identifier: Apache-2.0
//
// torch::nn::Module as the source of a state dict.

#ifndef DSD_FRONTENDS_MODULE_MODULE_H_
#define DSD_FRONTENDS_MODULE_MODULE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/fqn/module_tree.h"
#include "dsd/core/state_dict/extra_state.h"
#include "dsd/core/state_dict/sources.h"

namespace torch::nn {
class Module;
}  // namespace torch::nn

namespace dsd {

// Parameters and buffers of a module and all its children, as registered, and
// their extra states; undefined tensors are left out, buffers are persistent
// unless SetNonPersistent says otherwise. What a module class inherits beside
// its module base is used: ModuleWrapper (leaves no trace in names),
// FqnModifiers, ExtraState. A module that is registered twice is under both
// names. Thread-compatible.
class TorchModuleSource : public ModelSource {
 public:
  // `module` is borrowed. `fqn_modifiers`: see
  // StateDictOptions::dsd_fqn_modifiers.
  explicit TorchModuleSource(torch::nn::Module* module,
                             std::string fqn_modifiers = "_fqn_modifiers")
      : module_(module), fqn_modifiers_(std::move(fqn_modifiers)) {}

  absl::Status ForEachTensor(
      absl::FunctionRef<void(const at::Tensor&)> visit) override;
  absl::StatusOr<std::vector<ExtraState*>> ExtraStates() override;
  int64_t revision() override;
  absl::StatusOr<ModuleNode> Describe() override;

 private:
  torch::nn::Module* module_;
  std::string fqn_modifiers_;
  size_t names_ = 0;  // digest of the tree that ForEachTensor walked last
};

}  // namespace dsd

#endif  // DSD_FRONTENDS_MODULE_MODULE_H_
