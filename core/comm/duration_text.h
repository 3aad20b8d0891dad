// SPDX-License-Identifier: Apache-2.0
//
// Durations in error texts. Private to this package.

#ifndef DSD_CORE_COMM_DURATION_TEXT_H_
#define DSD_CORE_COMM_DURATION_TEXT_H_

#include <string>

#include "absl/time/time.h"

namespace dsd {

// As a person would give it: what is left of a deadline of 30 s is "30s".
inline std::string DurationText(absl::Duration duration) {
  return absl::FormatDuration(
      absl::Trunc(duration + absl::Microseconds(500), absl::Milliseconds(1)));
}

}  // namespace dsd

#endif  // DSD_CORE_COMM_DURATION_TEXT_H_
