// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/device_stream.h"

#include <algorithm>

#include "dsd/core/base/status_macros.h"

namespace dsd {

absl::Status WaitUntilReached(DeviceStream& stream,
                              DeviceStream::Position position, Env* env,
                              absl::Time deadline) {
  // A chunk takes about 100 us: look often at first, then give the core away,
  // as what is waited for may be a kernel of the caller that runs for seconds.
  constexpr int kLooksAwake = 200;
  absl::Duration nap = absl::Microseconds(10);
  for (int look = 0;; ++look) {
    DSD_ASSIGN_OR_RETURN(const bool reached, stream.IsReached(position));
    if (reached) return absl::OkStatus();
    if (look < kLooksAwake) continue;
    const absl::Time now = env->Now();
    if (now >= deadline) {
      return absl::DeadlineExceededError(
          "the device has not done its work in time: kernels that were "
          "enqueued before the call may still be running");
    }
    env->SleepUntil(std::min(now + nap, deadline));
    nap = std::min(2 * nap, absl::Milliseconds(1));
  }
}

}  // namespace dsd
