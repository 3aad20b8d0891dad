// SPDX-License-Identifier: Apache-2.0
//
// The store of a simulation, reached over connections that take time and end.

#ifndef DSD_BACKENDS_SIM_CONTROL_PLANE_H_
#define DSD_BACKENDS_SIM_CONTROL_PLANE_H_

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "dsd/backends/sim/scheduler.h"
#include "dsd/backends/sim/sim_env.h"
#include "dsd/core/comm/store.h"

namespace dsd::sim {

struct ControlPlaneOptions {
  // Of one message to or from the store, at most.
  absl::Duration latency = absl::Microseconds(200);
  // After a death, until the store sees the end of the connection; at most.
  absl::Duration death_delay = absl::Milliseconds(10);
};

// An in-process store in a process of its own or in that of rank 0, and what
// each rank has of it. As with the real one, the end of a process is the end of
// its connection, and then its group fails with Unavailable that names it.
class ControlPlane {
 public:
  // `server`: whose death is the store's.
  ControlPlane(Scheduler* scheduler, Scheduler::Process server,
               const ControlPlaneOptions& options);
  ~ControlPlane();

  // The connection of one rank.
  std::shared_ptr<Store> Connect(SimEnv* env, int rank);
  void ProcessDied(Scheduler::Process process);

 private:
  friend class SimStore;
  friend class SimMembership;
  struct Client;

  // Runs `what` in the store or at its client, after the way there; what
  // belongs to one client stays in order.
  void Send(const std::shared_ptr<Client>& client,
            absl::AnyInvocable<void()> what);
  void SendAt(absl::Time time, absl::AnyInvocable<void()> what);
  absl::Status ServerDied(const Client& client) const;
  // The group has failed: tells the client, once.
  void Tell(const std::shared_ptr<Client>& client, const absl::Status& status);

  Scheduler& scheduler_;
  const Scheduler::Process server_;
  const ControlPlaneOptions options_;
  SimEnv env_;
  const std::shared_ptr<Store> store_;
  bool closing_ = false;
  std::vector<std::shared_ptr<Client>> clients_;
  std::vector<std::unique_ptr<EnvThread>> threads_;
};

}  // namespace dsd::sim

#endif  // DSD_BACKENDS_SIM_CONTROL_PLANE_H_
