// SPDX-License-Identifier: Apache-2.0
//
// A launcher for one machine: starts this program again, once per rank, with
// the environment that torchrun would give it.

#ifndef DSD_EXAMPLES_SPAWN_RANKS_H_
#define DSD_EXAMPLES_SPAWN_RANKS_H_

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace dsd_examples {

// Runs `world_size` processes of this program (fork and exec) with `arguments`
// (argv without argv[0]) and waits for all of them. They write where this
// process does, and die with it. OK if all of them ended with exit code 0.
// After the first that did not, the others have 30 s to end by themselves.
//
// Errors: Aborted naming each failed rank, in the order in which they ended,
// with signal or exit code; InvalidArgument in the same words if all that
// failed have exit code 2, for arguments or an environment that are wrong; what
// the system reports.
absl::Status RunRanks(int world_size,
                      const std::vector<std::string>& arguments);

}  // namespace dsd_examples

#endif  // DSD_EXAMPLES_SPAWN_RANKS_H_
