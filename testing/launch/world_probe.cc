// SPDX-License-Identifier: Apache-2.0
//
// Connects the world of its launcher, twice, and prints what the ranks agree
// on.

#include <cstdint>
#include <iostream>
#include <memory>

#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/launch.h"

namespace dsd {
namespace {

absl::Status Probe() {
  DSD_ASSIGN_OR_RETURN(const LaunchInfo launch,
                       LaunchFromEnvironment(ProcessEnvironment()));
  // A second world after the first, as a job has that starts again.
  int64_t sum = 0;
  for (int round = 0; round < 2; ++round) {
    DSD_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> comm,
                         ConnectWorld(launch));
    sum = launch.rank + 1;
    DSD_RETURN_IF_ERROR(comm->AllReduce(
        absl::MakeSpan(reinterpret_cast<std::byte*>(&sum), sizeof(sum)),
        DType::kInt64, ReduceOp::kSum));
    DSD_RETURN_IF_ERROR(comm->Shutdown());
  }
  std::cout << "probe: " << launch.launcher << " rank " << launch.rank << " of "
            << launch.world_size << ", agent store "
            << (launch.agent_store ? "on" : "off") << ", sum " << sum
            << std::endl;
  return absl::OkStatus();
}

}  // namespace
}  // namespace dsd

int main() {
  const absl::Status status = dsd::Probe();
  if (status.ok()) return 0;
  std::cerr << status << std::endl;
  return 1;
}
