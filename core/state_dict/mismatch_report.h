// SPDX-License-Identifier: Apache-2.0
//
// Everything that is wrong with a dict, collected before anything is set.

#ifndef DSD_CORE_STATE_DICT_MISMATCH_REPORT_H_
#define DSD_CORE_STATE_DICT_MISMATCH_REPORT_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "dsd/core/state_dict/state_dict.h"

namespace dsd {

struct MismatchReport {
  // Of the model's dict.
  IncompatibleKeys model;
  // Optimizer state that the dict lacks: "<FQN>" or "<FQN>.<name>".
  std::vector<std::string> missing_state;
  // Optimizer state that the live optimizer has no place for.
  std::vector<std::string> unexpected_state;
  // Complete sentences about values that fit nowhere, whatever `strict` is.
  std::vector<std::string> misfits;
  // What may explain unexpected keys; empty if nothing.
  std::string hint;

  // What `other` says about the optimizer and about values.
  void Add(MismatchReport other);

  // InvalidArgument that lists it all; OK if nothing is wrong. Missing and
  // unexpected keys are wrong only if `strict`.
  absl::Status ToStatus(bool strict) const;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_MISMATCH_REPORT_H_
