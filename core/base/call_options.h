// SPDX-License-Identifier: Apache-2.0
//
// How long a call may take and how it is stopped.

#ifndef DSD_CORE_BASE_CALL_OPTIONS_H_
#define DSD_CORE_BASE_CALL_OPTIONS_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace dsd {

// Work done so far, for progress bars.
struct Progress {
  int64_t bytes_done = 0;
  int64_t bytes_total = 0;
};

// Options of every call that may wait. Copyable.
struct CallOptions {
  // Counted from the entry of the outermost call. There is no infinity: values
  // over 24 hours are cut to that, values <= 0 have expired already.
  absl::Duration timeout = absl::Minutes(10);

  // If not null and set by any thread, the call ends with Cancelled on all
  // ranks. Must outlive the call.
  const std::atomic<bool>* cancel = nullptr;

  // Called now and then from the calling thread. May be empty.
  std::function<void(const Progress&)> progress;
};

}  // namespace dsd

#endif  // DSD_CORE_BASE_CALL_OPTIONS_H_
