// SPDX-License-Identifier: Apache-2.0
//
// What a launcher tells a process in its environment: torchrun, Slurm, Open
// MPI, MPICH and Intel MPI; nothing at all means a world of one.

#ifndef DSD_CORE_COMM_LAUNCH_H_
#define DSD_CORE_COMM_LAUNCH_H_

#include <optional>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace dsd {

struct LaunchInfo {
  std::string launcher = "none";  // torchrun, slurm, openmpi, mpich, none
  int rank = 0;
  int world_size = 1;
  int local_rank = 0;
  int local_world_size = 1;
  std::string master_addr = "127.0.0.1";
  int master_port = 0;
  // Distinguishes jobs and restarts: part of every store key.
  std::string job_id;
  // A listening socket for the store, inherited from the parent, or -1: how a
  // launcher on one machine hands out a port that the kernel chose. Rank 0
  // only; variable DSD_LISTEN_FD.
  int listen_fd = -1;
  // WorldOptions::heartbeat_bound, from outside; zero: none, for work with a
  // debugger. Variable DSD_HEARTBEAT_SECONDS; rank 0's counts.
  std::optional<absl::Duration> heartbeat_bound;
  // WorldOptions::control_fan_out, from outside. Variable DSD_CONTROL_FAN_OUT;
  // rank 0's counts.
  std::optional<int> control_fan_out;
  // CommunicatorOptions::host, from outside. Variable DSD_HOST.
  std::string host;
  // The secret of the job, the same for all ranks, or empty: with it only those
  // who know it can take part in its store. Variable DSD_TOKEN; or
  // DSD_TOKEN_FILE, the path of a file that holds it.
  std::string token;
  std::string token_file;
  // torchrun's agent already serves a c10d TCPStore at master_addr:master_port.
  bool agent_store = false;
};

using EnvironmentMap = absl::flat_hash_map<std::string, std::string>;

// A pure function of its argument. Errors: InvalidArgument for half-set,
// contradictory, empty or non-numeric variables (RANK without WORLD_SIZE, RANK
// >= WORLD_SIZE, ...), naming the variable, its value and what is expected.
absl::StatusOr<LaunchInfo> LaunchFromEnvironment(const EnvironmentMap& env);

// The environment of this process.
EnvironmentMap ProcessEnvironment();

}  // namespace dsd

#endif  // DSD_CORE_COMM_LAUNCH_H_
