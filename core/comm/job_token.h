// SPDX-License-Identifier: Apache-2.0
//
// The secret that the processes of a job share, and how two of them show each
// other that they know it. For this package and backends.

#ifndef DSD_CORE_COMM_JOB_TOKEN_H_
#define DSD_CORE_COMM_JOB_TOKEN_H_

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/comm/launch.h"

namespace dsd {

class Env;

inline constexpr size_t kMinTokenBytes = 16;
inline constexpr size_t kMaxTokenBytes = 1024;
inline constexpr size_t kNonceBytes = 32;

// The token of a launch, from the file if it names one; empty if it has none.
// Errors: InvalidArgument (length; both are given); what Env::files says.
absl::StatusOr<std::string> FindToken(Env* env, const LaunchInfo& launch);

// Never the same twice.
std::string NewNonce(Env* env);

// Who proves it to whom: a proof of one side is none of the other.
enum class TokenSide { kClient, kServer };

// What only those can compute who know the token: HMAC-SHA-256 over all the
// rest. `token` is not empty. Internal if the library refuses.
absl::StatusOr<std::string> TokenProof(absl::string_view token, TokenSide side,
                                       absl::string_view job_id,
                                       absl::string_view client_nonce,
                                       absl::string_view server_nonce);

// Takes the same time wherever they differ.
bool SameProof(absl::string_view a, absl::string_view b);

}  // namespace dsd

#endif  // DSD_CORE_COMM_JOB_TOKEN_H_
