// SPDX-License-Identifier: Apache-2.0
//
// What is left of the time of a call that makes others.

#ifndef DSD_CORE_BASE_CALL_CLOCK_H_
#define DSD_CORE_BASE_CALL_CLOCK_H_

#include <utility>

#include "absl/time/time.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/env.h"

namespace dsd {

// CallOptions whose timeout was started at the entry of the outermost call.
class CallClock {
 public:
  CallClock(Env* env, CallOptions options)
      : env_(env),
        options_(std::move(options)),
        deadline_(env->Now() + options_.timeout) {}

  absl::Time deadline() const { return deadline_; }

  // The options with what is left of the timeout.
  CallOptions Left() const {
    CallOptions left = options_;
    left.timeout = deadline_ - env_->Now();
    return left;
  }

 private:
  Env* env_;
  CallOptions options_;
  absl::Time deadline_;
};

}  // namespace dsd

#endif  // DSD_CORE_BASE_CALL_CLOCK_H_
