// SPDX-License-Identifier: Apache-2.0
//
// Sharded training, a full get, a save, a set from one rank and a load.

#ifndef DSD_TESTING_COMPOSITION_SHARDED_JOB_H_
#define DSD_TESTING_COMPOSITION_SHARDED_JOB_H_

#include <string>

#include "absl/status/statusor.h"
#include "c10/core/Device.h"
#include "dsd/core/comm/communicator.h"

namespace dsd::test {

// The bits of everything that comes out of the job on this rank, with a model
// on `device`; it saves in `directory`. Collective.
absl::StatusOr<std::string> BitsOfShardedJob(Communicator& comm,
                                             const std::string& directory,
                                             c10::Device device = c10::kCPU);

}  // namespace dsd::test

#endif  // DSD_TESTING_COMPOSITION_SHARDED_JOB_H_
