// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/sources.h"

#include <cstddef>

#include "absl/status/status.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {

void PlainTensorsOf(const StateDict& state, absl::Span<const StateField> fields,
                    absl::Span<at::Tensor> out) {
  for (size_t i = 0; i < fields.size(); ++i) {
    const Value* const value = state.Find(fields[i].name);
    const auto* const tensor =
        value == nullptr ? nullptr : value->get_if<TensorValue>();
    out[i] = tensor != nullptr && tensor->is_plain() ? tensor->locals()[0]
                                                     : at::Tensor();
  }
}

absl::Status OptimizerSource::LiveTensors(size_t group, size_t param,
                                          absl::Span<const StateField> fields,
                                          absl::Span<at::Tensor> out) const {
  DSD_ASSIGN_OR_RETURN(const StateDict state, State(group, param));
  PlainTensorsOf(state, fields, out);
  return absl::OkStatus();
}

}  // namespace dsd
