// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/copy_tensors.h"

#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/tensor_memory.h"

namespace dsd {

absl::Status CopyTensors(const std::string& name, Value& value,
                         std::vector<TensorPair>& pairs) {
  absl::Status status;
  ForEachTensor(value, name, [&](const std::string& path, TensorValue& tensor) {
    if (!status.ok()) return;
    if (!tensor.defined()) {
      status = absl::InvalidArgumentError(
          absl::StrCat("\"", path, "\": the tensor is undefined"));
      return;
    }
    absl::StatusOr<at::Tensor> copy = NewTensor(
        tensor.shape(),
        c10::TensorOptions(tensor.scalar_type())
            .device(tensor.locals().empty() ? c10::Device(c10::kCPU)
                                            : tensor.locals()[0].device()));
    if (!copy.ok()) {
      status = Annotate(copy.status(), absl::StrCat("\"", path, "\""));
      return;
    }
    TensorValue target(*std::move(copy));
    pairs.push_back({path, tensor, target});
    tensor = std::move(target);
  });
  return status;
}

}  // namespace dsd
