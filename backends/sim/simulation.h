// SPDX-License-Identifier: Apache-2.0
//
// Ranks, links, time and a disk in one thread at a time:
//
//   dsd::sim::Simulation simulation({.seed = 7});
//   simulation.AddFault({dsd::sim::FaultKind::kDeath, /*rank=*/1, 0, 40});
//   const auto outcome = simulation.Run(4, [](dsd::Communicator& comm) {
//     return comm.Barrier();
//   });
//
// Equal seeds and faults give equal runs, step by step.

#ifndef DSD_BACKENDS_SIM_SIMULATION_H_
#define DSD_BACKENDS_SIM_SIMULATION_H_

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "dsd/backends/sim/control_plane.h"
#include "dsd/backends/sim/disk.h"
#include "dsd/backends/sim/fault.h"
#include "dsd/backends/sim/network.h"
#include "dsd/backends/sim/scheduler.h"
#include "dsd/backends/sim/sim_env.h"
#include "dsd/core/base/fake_env.h"
#include "dsd/core/comm/communicator.h"

namespace dsd::sim {

struct SimulationOptions {
  uint64_t seed = 1;
  LinkOptions link;
  ControlPlaneOptions control_plane;
  absl::Duration disk_latency = absl::Microseconds(100);
  // Whether the store is in rank 0's process and dies with it.
  bool store_at_rank0 = true;
  // Rank r is on host r / ranks_per_host; 0: all are on one.
  int ranks_per_host = 0;

  // A link, a control plane, a place of the store and hosts drawn by `seed`.
  static SimulationOptions FromSeed(uint64_t seed);
};

// How ranks get their communicator, and what stands between them and the
// simulation: for bugs planted on purpose.
struct RanksOptions {
  absl::Duration connect_timeout = absl::Seconds(60);
  // Calls Shutdown for a body that returns OK.
  bool shutdown = true;
  const BackendDescriptor* descriptor = &SimBackend();
  std::function<std::unique_ptr<FileSystem>(int rank,
                                            std::unique_ptr<FileSystem>)>
      wrap_files;
  std::function<std::shared_ptr<Store>(int rank, std::shared_ptr<Store>)>
      wrap_store;
};

struct RankOutcome {
  bool died = false;
  absl::Status status;  // what the body, connecting or Shutdown returned
  absl::Time ended;
};

struct Outcome {
  // Internal with a report of all threads for a deadlock or livelock.
  absl::Status run;
  std::vector<RankOutcome> ranks;

  // The statuses of those that live, by rank; the run's own if that failed.
  std::vector<absl::Status> Survivors() const;
};

// Thread-compatible.
class Simulation {
 public:
  explicit Simulation(const SimulationOptions& options);
  ~Simulation();

  Scheduler& scheduler() { return scheduler_; }
  // Lives as long as the simulation, whatever happens to ranks.
  FakeFileSystem& disk() { return disk_; }

  // For the next Run.
  void AddFault(const Fault& fault);
  // Those of the last Run, with how often each happened.
  const std::vector<Fault>& faults() const { return faults_; }

  // Runs `body` on `world_size` fresh ranks. Those that a fault kills never
  // return from it, and their memory may be touched again only after Run.
  Outcome Run(int world_size,
              absl::FunctionRef<absl::Status(Communicator& comm)> body,
              const RanksOptions& options = {});

  // The same without communicators.
  Outcome RunProcesses(int world_size,
                       absl::FunctionRef<absl::Status(
                           int rank, SimEnv& env, std::shared_ptr<Store> store)>
                           body,
                       const RanksOptions& options = {});

  // After a power loss: the disk comes back with what it left.
  void Recover();
  bool lost_power() const { return lost_power_; }

  // What the last Run did, for who places faults in the next.
  struct RankUse {
    int64_t places = 0;  // at which it may have lost the baton
    int64_t disk_operations = 0;
    int64_t disk_writes = 0;
  };
  struct LinkUse {
    int from = 0;
    int to = 0;
    int64_t messages = 0;
    int64_t bytes = 0;
  };
  const std::vector<RankUse>& rank_use() const { return rank_use_; }
  const std::vector<LinkUse>& link_use() const { return link_use_; }

 private:
  void KillRank(int rank);
  void Happens(Fault& fault);
  void OnYield(Scheduler::Process process, int64_t number);
  void OnMessage(Fate& fate);
  absl::Status OnDisk(DiskOperation& operation);
  int RankOf(Scheduler::Process process) const;

  const SimulationOptions options_;
  Scheduler scheduler_;
  FakeFileSystem disk_;
  DiskOptions disk_options_;
  std::vector<Fault> faults_;
  bool faults_are_old_ = false;
  bool disk_full_ = false;
  bool lost_power_ = false;
  std::vector<RankUse> rank_use_;  // by rank
  std::vector<LinkUse> link_use_;  // of links with messages
  std::vector<LinkUse> links_;     // by from * size + to

  // Of the Run in progress.
  std::vector<Scheduler::Process> processes_;  // by rank
  std::unique_ptr<Network> network_;
  std::unique_ptr<ControlPlane> control_plane_;
  uint64_t generation_ = 0;
};

}  // namespace dsd::sim

#endif  // DSD_BACKENDS_SIM_SIMULATION_H_
