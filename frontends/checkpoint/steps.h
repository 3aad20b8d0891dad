// SPDX-License-Identifier: Apache-2.0
//
// Checkpoints of one job side by side, in directories whose names end in a
// number: "/runs/7/step-100", "/runs/7/step-200". The part before the number,
// "/runs/7/step-", names the series.
//
//   auto latest = FindLatest("/runs/7/step-", comm);
//   if (latest.ok()) Load(latest->step.directory, state, comm);

#ifndef DSD_FRONTENDS_CHECKPOINT_STEPS_H_
#define DSD_FRONTENDS_CHECKPOINT_STEPS_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/frontends/checkpoint/checkpoint.h"

namespace dsd::checkpoint {

struct Step {
  int64_t number = 0;
  std::string directory;
};

// The committed checkpoints of a series, by number: those with an index. Empty
// if there is no such directory. Errors: what files report.
absl::StatusOr<std::vector<Step>> ListSteps(const std::string& series,
                                            Env* env = Env::Real());

struct LatestStep {
  Step step;
  // Newer ones that cannot be loaded, newest first, and why: a file is missing
  // or too short, or the index does not decode.
  std::vector<std::pair<Step, absl::Status>> skipped;
};

// The newest checkpoint of a series that is whole: its index decodes, and every
// file that it names is there at its length. Collective over `comm`, if there
// is one: rank 0 looks, all get the same answer (`skipped` on rank 0 only).
// NotFound if there is none: the text says what was skipped.
absl::StatusOr<LatestStep> FindLatest(const std::string& series,
                                      Communicator* comm = nullptr,
                                      const CallOptions& options = {},
                                      Env* env = nullptr);

// Removes the checkpoints of a series that `retention` does not keep, and what
// interrupted saves and removals left of those older than the newest. Of each
// the index goes first: at no time can half a checkpoint be taken for a whole
// one. Files that are none of a checkpoint stay. Returns the directories that
// are gone. Not while a save with a lower number than the newest is under way.
// Errors: FailedPrecondition if the newest is not whole: then all stay;
// what files report, after which some may be gone.
absl::StatusOr<std::vector<std::string>> Prune(const std::string& series,
                                               const Retention& retention,
                                               Env* env = Env::Real());

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_STEPS_H_
