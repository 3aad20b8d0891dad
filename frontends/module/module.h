// SPDX-License-Identifier: Apache-2.0
//
// torch::nn::Module as the source of a state dict.

#ifndef DSD_FRONTENDS_MODULE_MODULE_H_
#define DSD_FRONTENDS_MODULE_MODULE_H_

#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/statusor.h"
#include "dsd/core/fqn/module_tree.h"
#include "dsd/core/state_dict/sources.h"

namespace torch::nn {
class Module;
}  // namespace torch::nn

namespace dsd {

// Parameters and buffers of a module and all its children, as registered;
// undefined ones are left out, all buffers are persistent. Modules that inherit
// ModuleWrapper leave no trace in names. Thread-compatible.
class TorchModuleSource : public ModelSource {
 public:
  // `module` is borrowed.
  explicit TorchModuleSource(const torch::nn::Module* module)
      : module_(module) {}

  absl::StatusOr<std::vector<at::Tensor>> Tensors() override;
  absl::StatusOr<ModuleNode> Describe() override;

 private:
  const torch::nn::Module* module_;
};

}  // namespace dsd

#endif  // DSD_FRONTENDS_MODULE_MODULE_H_
