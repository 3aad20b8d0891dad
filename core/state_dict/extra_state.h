// SPDX-License-Identifier: Apache-2.0
//
// State that is not a tensor of a module: Python's get_extra_state() and
// set_extra_state().

#ifndef DSD_CORE_STATE_DICT_EXTRA_STATE_H_
#define DSD_CORE_STATE_DICT_EXTRA_STATE_H_

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

// Inherited by a module class beside its module base. Its value is in the
// model's dict under "<FQN of the module>._extra_state", after the module's own
// tensors. A dict that lacks it lacks a key.
class ExtraState {
 public:
  // Any value. Tensors in it are taken to be whole and the same on every rank.
  virtual absl::StatusOr<Value> GetExtraState() const = 0;

  // `value`: of a dict, with tensors in memory of their own, which may be kept.
  // Called after all ranks have agreed and all tensors of the model have been
  // filled; an error leaves the set half done.
  virtual absl::Status SetExtraState(const Value& value) = 0;

 protected:
  ~ExtraState() = default;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_EXTRA_STATE_H_
