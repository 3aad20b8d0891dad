// SPDX-License-Identifier: Apache-2.0
//
// What a save does with the series that its directory is one of.

#ifndef DSD_FRONTENDS_CHECKPOINT_STEP_FILES_H_
#define DSD_FRONTENDS_CHECKPOINT_STEP_FILES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/env.h"
#include "dsd/frontends/checkpoint/checkpoint.h"

namespace dsd::checkpoint {

struct StepName {
  std::string root;    // "/runs/7"
  std::string prefix;  // "step-"
  int64_t number = 0;  // 500
  std::string name;    // "step-500"
};

// InvalidArgument if the name does not end in a number.
absl::StatusOr<StepName> ParseStep(const std::string& directory);

// Makes "<prefix>latest" name the step, atomically. `file_id`: see
// file_names.h.
absl::Status PointToLatest(const StepName& step, absl::string_view file_id,
                           FileSystem& files);

// Prune, below a step that is known to be whole.
absl::StatusOr<std::vector<std::string>> PruneOlder(const StepName& newest,
                                                    const Retention& retention,
                                                    FileSystem& files);

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_STEP_FILES_H_
