// SPDX-License-Identifier: Apache-2.0
//
// How the ranks that are left of a failed world find each other, whoever served
// its store. Each rank of such a world listens at a port of its own from the
// start, and knows those of all others; a process that dies closes its port.
// The lowest rank that is left serves the next store at its port, and calls the
// roll. Private to this package.

#ifndef DSD_CORE_COMM_REBUILD_H_
#define DSD_CORE_COMM_REBUILD_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/launch.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store.h"
#include "dsd/core/comm/tcp_store.h"

namespace dsd {

inline constexpr char kWorldGroup[] = "world";

// TcpStoreServerOptions::fan_out of the store of a world of so many ranks.
// InvalidArgument if it is said to be negative.
absl::StatusOr<int> ControlFanOut(const LaunchInfo& launch,
                                  const WorldOptions& options, int world_size);

// What a rank keeps for the day its world fails.
struct Standby {
  LaunchInfo launch;
  WorldOptions options;
  Socket listener;             // nobody is served at it until then
  std::vector<Address> ranks;  // where the others' are
  int attempts = 0;
};

// Collective on `comm`, a world that has just been connected through `store`.
absl::StatusOr<std::unique_ptr<Standby>> MakeStandby(
    Communicator& comm, const Store& store, const LaunchInfo& launch,
    const WorldOptions& options, absl::Time deadline);

// Who is left, and through what they meet.
struct Roll {
  std::vector<int> ranks;        // by their old numbers, ascending
  std::shared_ptr<Store> store;  // null for one rank
};

// Collective over those who are left of `standby`'s world.
absl::StatusOr<Roll> CallRoll(const Standby& standby, uint64_t generation,
                              const RebuildOptions& options,
                              absl::Time deadline);

}  // namespace dsd

#endif  // DSD_CORE_COMM_REBUILD_H_
