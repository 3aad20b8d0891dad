// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/sim/simulation.h"

#include <algorithm>
#include <utility>

#include "absl/log/check.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"

namespace dsd::sim {

SimulationOptions SimulationOptions::FromSeed(uint64_t seed) {
  std::mt19937_64 random(seed * 0x9e3779b97f4a7c15u + 1);
  const auto one_of = [&](auto... values) {
    const std::common_type_t<decltype(values)...> all[] = {values...};
    return all[random() % sizeof...(values)];
  };
  SimulationOptions options;
  options.seed = seed;
  options.link.latency =
      absl::Microseconds(one_of(int64_t{1}, int64_t{50}, int64_t{2000}));
  options.link.jitter = options.link.latency * one_of(0, 1, 10);
  options.link.bytes_per_second = one_of(1e6, 1e8, 1e10);
  options.link.eager_bytes =
      one_of(int64_t{-1}, int64_t{256}, int64_t{4096}, int64_t{1} << 40);
  options.link.overtaking = one_of(true, false);
  options.link.reports_death = one_of(true, false);
  options.link.death_delay = absl::Milliseconds(one_of(0, 10, 500));
  options.control_plane.death_delay = absl::Milliseconds(one_of(0, 10, 500));
  options.store_at_rank0 = one_of(true, false);
  // Slow links are slow enough alike.
  if (options.link.bytes_per_second > 1e6) {
    options.link.slowest_link = one_of(1.0, 10.0);
  }
  options.ranks_per_host = one_of(0, 1, 2, 3);
  return options;
}

std::vector<absl::Status> Outcome::Survivors() const {
  if (!run.ok()) return {run};
  std::vector<absl::Status> statuses;
  for (const RankOutcome& rank : ranks) {
    if (!rank.died) statuses.push_back(rank.status);
  }
  return statuses;
}

Simulation::Simulation(const SimulationOptions& options)
    : options_(options), scheduler_(options.seed) {
  disk_options_.latency = options.disk_latency;
  disk_options_.fault = [this](DiskOperation& operation) {
    return OnDisk(operation);
  };
  scheduler_.SetYieldHook([this](Scheduler::Process process, int64_t number) {
    OnYield(process, number);
  });
}

Simulation::~Simulation() = default;

void Simulation::AddFault(const Fault& fault) {
  if (std::exchange(faults_are_old_, false)) faults_.clear();
  faults_.push_back(fault);
  faults_.back().fired = 0;
}

int Simulation::RankOf(Scheduler::Process process) const {
  const auto it = std::find(processes_.begin(), processes_.end(), process);
  return it == processes_.end() ? -1
                                : static_cast<int>(it - processes_.begin());
}

void Simulation::KillRank(int rank) {
  const Scheduler::Process process = processes_[rank];
  if (scheduler_.IsDead(process)) return;
  scheduler_.Kill(process);
  network_->ProcessDied(process);
  control_plane_->ProcessDied(process);
}

void Simulation::Happens(Fault& fault) {
  if (fault.fired++ == 0) fault.when = scheduler_.now();
}

void Simulation::OnYield(Scheduler::Process process, int64_t number) {
  const int rank = RankOf(process);
  if (rank < 0) return;
  rank_use_[rank].places = number;
  for (Fault& fault : faults_) {
    if (fault.rank != rank || fault.at != number || fault.fired > 0) continue;
    if (fault.kind == FaultKind::kDeath) {
      Happens(fault);
      KillRank(rank);
    } else if (fault.kind == FaultKind::kPause) {
      Happens(fault);
      scheduler_.Pause(process, scheduler_.now() + fault.length);
    }
  }
}

void Simulation::OnMessage(Fate& fate) {
  LinkUse& link = links_[fate.from * processes_.size() + fate.to];
  link.messages = fate.number + 1;
  link.bytes += fate.size;
  for (Fault& fault : faults_) {
    if (fault.kind == FaultKind::kReorder) {
      fate.extra_delay += scheduler_.RandomDuration(fault.length);
      continue;
    }
    if (fault.rank != fate.from || fault.peer != fate.to ||
        fault.at != fate.number || fault.fired > 0) {
      continue;
    }
    switch (fault.kind) {
      case FaultKind::kDelay:
        fate.extra_delay += fault.length;
        break;
      case FaultKind::kDisconnect:
        fate.broken_before = true;
        break;
      case FaultKind::kShortTransfer:
        fate.broken_within = true;
        break;
      case FaultKind::kCorruptByte:
        if (fate.size == 0) continue;
        fate.corrupt = true;
        break;
      default:
        continue;
    }
    Happens(fault);
  }
}

absl::Status Simulation::OnDisk(DiskOperation& operation) {
  const int rank = RankOf(operation.process);
  if (rank < 0) return absl::OkStatus();
  rank_use_[rank].disk_operations = operation.number + 1;
  if (operation.write_number >= 0) {
    rank_use_[rank].disk_writes = operation.write_number + 1;
  }
  const auto tear = [&] {
    operation.torn_bytes =
        scheduler_.Random(static_cast<uint64_t>(operation.bytes) + 1);
  };
  absl::Status status;
  for (Fault& fault : faults_) {
    switch (fault.kind) {
      case FaultKind::kNoSpace:
        // From then on, for all; a rank that frees room does not help.
        if (fault.rank == rank && fault.at <= operation.number) {
          disk_full_ = true;
        }
        if (disk_full_ && operation.bytes > 0) {
          tear();
          status = absl::ResourceExhaustedError(absl::StrCat(
              "write \"", operation.path, "\": no space left on device"));
          Happens(fault);
        }
        break;
      case FaultKind::kIoError:
        if (fault.rank == rank && fault.at == operation.number &&
            fault.fired == 0) {
          tear();
          status = absl::UnavailableError(absl::StrCat(
              operation.what, " \"", operation.path, "\": I/O error"));
          Happens(fault);
        }
        break;
      case FaultKind::kTornWrite:
        if (fault.rank == rank && fault.at == operation.write_number &&
            fault.fired == 0) {
          tear();
          status = absl::UnavailableError("the process is dead");
          Happens(fault);
          KillRank(rank);
        }
        break;
      case FaultKind::kPowerLoss:
        if (fault.rank == rank && fault.at == operation.number &&
            fault.fired == 0) {
          tear();
          status = absl::UnavailableError("the machine is down");
          Happens(fault);
          lost_power_ = true;
          for (size_t r = 0; r < processes_.size(); ++r) {
            KillRank(static_cast<int>(r));
          }
        }
        break;
      default:
        break;
    }
  }
  return status;
}

void Simulation::Recover() {
  // What is not synced now is what the loss took.
  disk_.CrashAt(disk_.num_operations());
  disk_.Recover(scheduler_.RandomBits());
  lost_power_ = false;
}

Outcome Simulation::RunProcesses(
    int world_size,
    absl::FunctionRef<absl::Status(int rank, SimEnv& env,
                                   std::shared_ptr<Store> store)>
        body,
    const RanksOptions& options) {
  if (faults_are_old_) faults_.clear();
  disk_full_ = false;
  rank_use_.assign(world_size, {});
  link_use_.clear();
  links_.assign(world_size * world_size, {});
  processes_.clear();
  for (int rank = 0; rank < world_size; ++rank) {
    processes_.push_back(scheduler_.AddProcess(absl::StrCat("rank ", rank)));
  }
  network_ = std::make_unique<Network>(&scheduler_, options_.link);
  network_->SetFate([this](Fate& fate) { OnMessage(fate); });
  control_plane_ = std::make_unique<ControlPlane>(
      &scheduler_,
      options_.store_at_rank0 ? processes_[0] : scheduler_.AddProcess("store"),
      options_.control_plane);

  std::vector<std::unique_ptr<SimEnv>> envs;
  std::vector<std::unique_ptr<EnvThread>> threads;
  Outcome outcome;
  outcome.ranks.resize(world_size);
  for (int rank = 0; rank < world_size; ++rank) {
    std::unique_ptr<FileSystem> files = MakeSimFileSystem(
        &disk_, &scheduler_, processes_[rank], &disk_options_);
    if (options.wrap_files) files = options.wrap_files(rank, std::move(files));
    envs.push_back(std::make_unique<SimEnv>(&scheduler_, processes_[rank],
                                            network_.get(), std::move(files)));
    std::shared_ptr<Store> store =
        control_plane_->Connect(envs.back().get(), rank);
    if (options.wrap_store) store = options.wrap_store(rank, std::move(store));
    threads.push_back(scheduler_.StartThread(
        "main",
        [&outcome, &body, rank, env = envs.back().get(), store] {
          absl::Status status = body(rank, *env, store);
          if (!env->scheduler().IsRunningOut()) {
            outcome.ranks[rank].status = std::move(status);
            outcome.ranks[rank].ended = env->Now();
          }
        },
        processes_[rank]));
  }
  // By then they have said what they had to say, or are dead.
  outcome.run = scheduler_.Run();
  for (Fault& fault : faults_) {
    if (fault.kind == FaultKind::kReorder) fault.fired = network_->overtakes();
  }
  for (int rank = 0; rank < world_size; ++rank) {
    outcome.ranks[rank].died = scheduler_.IsDead(processes_[rank]);
  }
  for (int i = 0; i < world_size * world_size; ++i) {
    if (links_[i].messages == 0) continue;
    links_[i].from = i / world_size;
    links_[i].to = i % world_size;
    link_use_.push_back(links_[i]);
  }
  control_plane_.reset();
  network_.reset();
  processes_.clear();
  faults_are_old_ = true;
  return outcome;
}

Outcome Simulation::Run(
    int world_size, absl::FunctionRef<absl::Status(Communicator& comm)> body,
    const RanksOptions& options) {
  const uint64_t generation = generation_++;
  return RunProcesses(
      world_size,
      [&](int rank, SimEnv& env, std::shared_ptr<Store> store) -> absl::Status {
        CommunicatorOptions comm_options;
        comm_options.rank = rank;
        comm_options.world_size = world_size;
        comm_options.descriptor = options.descriptor;
        comm_options.env = &env;
        if (options_.ranks_per_host > 0) {
          comm_options.host =
              absl::StrCat("host ", rank / options_.ranks_per_host);
        }
        comm_options.store = std::move(store);
        comm_options.generation = generation;
        comm_options.connect_timeout = options.connect_timeout;
        DSD_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> comm,
                             Communicator::Create(comm_options));
        DSD_RETURN_IF_ERROR(body(*comm));
        return options.shutdown ? comm->Shutdown() : absl::OkStatus();
      },
      options);
}

}  // namespace dsd::sim
