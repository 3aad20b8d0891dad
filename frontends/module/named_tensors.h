// SPDX-License-Identifier: Apache-2.0
//
// Any model that can list its tensors by name, as the source of a state dict:
// the adapter for module systems other than torch::nn and TorchScript.
//
//   dsd::NamedTensorsSource source([&] {
//     std::vector<dsd::NamedTensor> tensors;
//     for (Layer& layer : net.layers()) {
//       tensors.push_back({layer.name + ".weight", layer.weight});
//     }
//     return tensors;
//   });
//   dsd::SourceSession session(&source, {}, comm, options);

#ifndef DSD_FRONTENDS_MODULE_NAMED_TENSORS_H_
#define DSD_FRONTENDS_MODULE_NAMED_TENSORS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/fqn/module_tree.h"
#include "dsd/core/state_dict/sources.h"

namespace dsd {

struct NamedTensor {
  std::string fqn;
  at::Tensor tensor;
  EntryKind kind = EntryKind::kParameter;
};

// Keys of get are in the order of the list. One tensor under several FQNs is
// tied. Thread-compatible.
class NamedTensorsSource : public ModelSource {
 public:
  // `list` gives the model's tensors as they are now; undefined ones are left
  // out. It is called in every operation.
  explicit NamedTensorsSource(std::function<std::vector<NamedTensor>()> list)
      : list_(std::move(list)) {}

  absl::Status ForEachTensor(
      absl::FunctionRef<void(const at::Tensor&)> visit) override;
  // InvalidArgument for an empty FQN. Two tensors of one FQN are an error of
  // the operation.
  absl::StatusOr<ModuleNode> Describe() override;
  int64_t revision() override { return static_cast<int64_t>(names_); }

 private:
  std::function<std::vector<NamedTensor>()> list_;
  size_t names_ = 0;  // digest of those that ForEachTensor saw last
};

}  // namespace dsd

#endif  // DSD_FRONTENDS_MODULE_NAMED_TENSORS_H_
