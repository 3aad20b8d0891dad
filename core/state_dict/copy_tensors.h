// SPDX-License-Identifier: Apache-2.0
//
// Values of a dict that are kept: with tensors of their own.

#ifndef DSD_CORE_STATE_DICT_COPY_TENSORS_H_
#define DSD_CORE_STATE_DICT_COPY_TENSORS_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "dsd/core/state_dict/optimizer_state.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// Replaces all tensors below `value` by new, whole ones on the same device
// (host memory for those that this rank does not have), and adds the pairs that
// fill them, with paths that begin with `name`.
absl::Status CopyTensors(const std::string& name, Value& value,
                         std::vector<TensorPair>& pairs);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_COPY_TENSORS_H_
