// SPDX-License-Identifier: Apache-2.0
//
// One rank's Env in a simulation.

#ifndef DSD_BACKENDS_SIM_SIM_ENV_H_
#define DSD_BACKENDS_SIM_SIM_ENV_H_

#include <memory>
#include <utility>

#include "dsd/backends/sim/scheduler.h"
#include "dsd/core/base/env.h"

namespace dsd::sim {

class Network;

// Threads and clock are the scheduler's; threads belong to `process`.
class SimEnv final : public Env {
 public:
  // `network`, which may be null, is what engines with this Env use. All
  // pointers are borrowed; `files` may be null if no file is touched.
  SimEnv(Scheduler* scheduler, Scheduler::Process process, Network* network,
         std::unique_ptr<FileSystem> files)
      : scheduler_(scheduler),
        process_(process),
        network_(network),
        files_(std::move(files)) {}

  Scheduler& scheduler() { return *scheduler_; }
  Scheduler::Process process() const { return process_; }
  Network* network() { return network_; }

  absl::Time Now() override { return scheduler_->now(); }
  absl::Time WallTime() override {
    return scheduler_->now() + absl::Hours(24 * 365 * 50);
  }
  bool Await(absl::Mutex& mu, const absl::Condition& condition,
             absl::Time deadline) override ABSL_SHARED_LOCKS_REQUIRED(mu) {
    return scheduler_->Await(mu, condition, deadline,
                             __builtin_return_address(0));
  }
  void SleepUntil(absl::Time time) override { scheduler_->SleepUntil(time); }
  absl::StatusOr<int> Poll(absl::Span<struct pollfd> fds,
                           absl::Time deadline) override {
    return scheduler_->Poll(fds, deadline);
  }
  std::unique_ptr<EnvThread> StartThread(
      absl::string_view name, absl::AnyInvocable<void()> body) override {
    return scheduler_->StartThread(name, std::move(body), process_);
  }
  uint64_t RandomSeed() override { return scheduler_->RandomBits(); }
  FileSystem& files() override { return *files_; }

 private:
  Scheduler* const scheduler_;
  const Scheduler::Process process_;
  Network* const network_;
  const std::unique_ptr<FileSystem> files_;
};

}  // namespace dsd::sim

#endif  // DSD_BACKENDS_SIM_SIM_ENV_H_
