// SPDX-License-Identifier: Apache-2.0
//
// A group that is aborted at a random moment, again and again.

#ifndef DSD_TESTING_HARNESS_ABORT_STORM_H_
#define DSD_TESTING_HARNESS_ABORT_STORM_H_

#include <functional>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/testing/harness/rank_threads.h"

namespace dsd::test {

struct AbortStormOptions {
  RankThreadsOptions threads;
  int rounds = 30;
  absl::Duration max_delay = absl::Milliseconds(20);  // after connecting
  // What a rank does until it fails; empty: a ring of messages in host memory.
  std::function<absl::Status(Communicator&)> talk;
};

// In each round three ranks, which are threads, so that leaks can be counted,
// talk until one aborts. Expects that all know who and why, and that no
// descriptor and no thread is left; the memory of messages is freed at once,
// which a sanitizer watches.
void AbortStorm(const AbortStormOptions& options);

}  // namespace dsd::test

#endif  // DSD_TESTING_HARNESS_ABORT_STORM_H_
