// SPDX-License-Identifier: Apache-2.0
//
// What somebody may have meant by a name that does not exist.

#ifndef DSD_FRONTENDS_CLI_NEAR_KEYS_H_
#define DSD_FRONTENDS_CLI_NEAR_KEYS_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace dsd::cli {

// At most three of `keys`, the nearest first: those that have `wanted` in them,
// then those a few changed characters away.
std::vector<std::string> NearKeys(absl::Span<const absl::string_view> keys,
                                  absl::string_view wanted);

// "; did you mean "a" or "b"?"; "" if nothing is near. For errors.
std::string DidYouMean(absl::Span<const absl::string_view> keys,
                       absl::string_view wanted);

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_NEAR_KEYS_H_
