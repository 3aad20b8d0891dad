// SPDX-License-Identifier: Apache-2.0
//
// State dicts of TorchScript modules: a served model is filled from the shards
// of a trainer, or from a checkpoint, without Python and without its class.
//
//   torch::jit::Module served = torch::jit::load("model.pt");
//   absl::StatusOr<dsd::IncompatibleKeys> keys =
//       dsd::SetModelStateDict(served, trained, comm.get());

#ifndef DSD_FRONTENDS_SCRIPT_SCRIPT_H_
#define DSD_FRONTENDS_SCRIPT_SCRIPT_H_

#include <memory>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/fqn/module_tree.h"
#include "dsd/core/state_dict/sources.h"
#include "dsd/core/state_dict/state_dict.h"

namespace torch::jit {
struct Module;
}  // namespace torch::jit

namespace dsd {

// Parameters and buffers of a scripted or traced module and its children, in
// the order of their attributes; those that are None are left out. A frozen
// module (torch::jit::freeze) has none: its tensors are constants of the graph.
// Attributes that are tensors, but neither, are left out, as in Python's
// state_dict(). Thread-compatible.
class ScriptModuleSource : public ModelSource {
 public:
  // Shares the module's object, as copies of torch::jit::Module do.
  explicit ScriptModuleSource(const torch::jit::Module& module);
  ~ScriptModuleSource() override;

  absl::Status ForEachTensor(
      absl::FunctionRef<void(const at::Tensor&)> visit) override;
  absl::StatusOr<ModuleNode> Describe() override;

 private:
  std::unique_ptr<const torch::jit::Module> module_;
};

// As for torch::nn::Module in dsd/frontends/torch/state_dict.h: what is
// collective and which errors there are stands in
// dsd/core/state_dict/source_session.h. A parameter that ShardingTable lists is
// a shard; all others are taken to be equal on all ranks.
absl::StatusOr<StateDict> GetModelStateDict(
    const torch::jit::Module& model, Communicator* comm = nullptr,
    const StateDictOptions& options = {}, const CallOptions& call = {});

// Fills the module's tensors in place: methods, other references to the module
// and optimized graphs see the new values.
absl::StatusOr<IncompatibleKeys> SetModelStateDict(
    torch::jit::Module& model, const StateDict& model_state_dict,
    Communicator* comm = nullptr, const StateDictOptions& options = {},
    const CallOptions& call = {});

}  // namespace dsd

#endif  // DSD_FRONTENDS_SCRIPT_SCRIPT_H_
