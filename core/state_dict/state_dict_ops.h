// SPDX-License-Identifier: Apache-2.0
//
// State dicts as values: copies, comparison, text, and the dictionaries of
// LibTorch and the standard library. All of it is local; nothing is sent.

#ifndef DSD_CORE_STATE_DICT_STATE_DICT_OPS_H_
#define DSD_CORE_STATE_DICT_STATE_DICT_OPS_H_

#include <cstddef>
#include <string>
#include <unordered_map>
#include <vector>

#include "ATen/core/Dict.h"
#include "ATen/core/Tensor.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/state_dict/state_dict.h"
#include "dsd/core/tensor/tensor_value.h"
#include "torch/ordered_dict.h"

namespace dsd {

// The value with `map` applied to each of this rank's tensors: of the same
// layout, shape and type, wherever its memory is. Errors: of `map`.
absl::StatusOr<TensorValue> MapLocalTensors(
    const TensorValue& value,
    absl::FunctionRef<absl::StatusOr<at::Tensor>(const at::Tensor&)> map);

// A copy in new memory on the same devices, without autograd history. Leaves
// that are one tensor in `from` are one in the copy. Undefined tensors stay
// undefined. Errors: those of LibTorch, ResourceExhausted above all.
absl::StatusOr<StateDict> CloneStateDict(const StateDict& from);

// The same in host memory, contiguous. Unlike the option cpu_offload, which
// leaves what is in host memory where it is.
absl::StatusOr<StateDict> CopyToHost(const StateDict& from);

// Copies the elements of all tensors of `from` into those of `to`, which stay
// where they are, and replaces all other values: for staging memory that is
// used again. InvalidArgument, with nothing changed, if the two are not of one
// structure: containers, keys, and types, shapes and layouts of tensors (the
// first difference is named). After torch.distributed._state_dict_utils.
// _copy_state_dict.
absl::Status CopyStateDictInto(const StateDict& from, StateDict& to);

struct DiffOptions {
  // Elements of floating point may differ by atol + rtol * |b|. With both 0
  // elements are compared by their bytes, so that a NaN equals itself.
  double rtol = 0;
  double atol = 0;
  bool compare_key_order = false;
  size_t max_differences = 100;
};

// What differs between two state dicts as this rank has them, a line each, in
// the order of `a`: "optim.state.fc.weight.exp_avg: 3 of 12 elements, the first
// at [0, 2]: 1.5 and 1.25". Empty: nothing. Tensors without elements in memory
// (meta) are compared by type and shape. Errors: those of LibTorch.
absl::StatusOr<std::vector<std::string>> DiffStateDicts(
    const StateDict& a, const StateDict& b, const DiffOptions& options = {});

// The dict as a tree for people: a line per leaf, tensors by type, shape,
// layout and device, those of one element with their value.
std::string StateDictText(const StateDict& dict);

// This rank's tensors under flat keys (path joined by dots), in order where the
// target has one. InvalidArgument for a value that is no tensor (named), two
// values of one flat key, and a tensor of which this rank has not exactly one
// part. The maps share the tensors.
absl::StatusOr<std::unordered_map<std::string, at::Tensor>> ToTensorMap(
    const StateDict& dict);
absl::StatusOr<torch::OrderedDict<std::string, at::Tensor>> ToOrderedDict(
    const StateDict& dict);
absl::StatusOr<c10::Dict<std::string, at::Tensor>> ToC10Dict(
    const StateDict& dict);

// Plain tensors under the same keys; shares them. The keys of an unordered_map
// are sorted.
StateDict FromTensorMap(
    const std::unordered_map<std::string, at::Tensor>& tensors);
StateDict FromOrderedDict(
    const torch::OrderedDict<std::string, at::Tensor>& tensors);
StateDict FromC10Dict(const c10::Dict<std::string, at::Tensor>& tensors);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_STATE_DICT_OPS_H_
