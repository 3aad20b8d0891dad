// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/launch.h"

#include <stdlib.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "absl/log/log.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/world_size.h"

extern char** environ;  // POSIX declares it nowhere

namespace dsd {
namespace {

constexpr int kTorchrunPort = 29500;
constexpr int kMinDerivedPort = 15000;
constexpr int kMaxDerivedPort = 30000;
constexpr int kMaxHosts = kMaxWorldSize;
constexpr int kMaxHeartbeatSeconds = 24 * 60 * 60;

class Reader {
 public:
  explicit Reader(const EnvironmentMap& env) : env_(env) {}

  bool Has(absl::string_view name) const { return env_.contains(name); }

  std::string Text(absl::string_view name) const {
    const auto it = env_.find(name);
    return it == env_.end() ? "" : it->second;
  }

  absl::StatusOr<int> Number(absl::string_view name, int min, int max) const {
    const auto it = env_.find(name);
    if (it == env_.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, " is not set", Because()));
    }
    int value;
    const bool digits =
        !it->second.empty() &&
        it->second.find_first_not_of("0123456789") == std::string::npos;
    if (!digits || !absl::SimpleAtoi(it->second, &value) || value < min ||
        value > max) {
      return absl::InvalidArgumentError(absl::StrCat(
          name, " is \"", it->second, "\", expected a number from ", min,
          " to ", max, Because()));
    }
    return value;
  }

  absl::StatusOr<int> NumberOr(absl::string_view name, int min, int max,
                               int otherwise) const {
    if (!Has(name)) return otherwise;
    return Number(name, min, max);
  }

  // What tells the reader of an error why a variable is needed at all.
  void set_because(std::string because) { because_ = std::move(because); }

 private:
  std::string Because() const {
    return because_.empty() ? "" : absl::StrCat(" (", because_, ")");
  }

  const EnvironmentMap& env_;
  std::string because_;
};

// The variables of one launcher.
struct Names {
  absl::string_view rank, size, local_rank, local_size;
};

constexpr int kMax = std::numeric_limits<int>::max();

absl::Status ReadRanks(const Reader& reader, const Names& names,
                       LaunchInfo& info) {
  DSD_ASSIGN_OR_RETURN(info.world_size,
                       reader.Number(names.size, 1, kMaxWorldSize));
  DSD_ASSIGN_OR_RETURN(info.rank,
                       reader.Number(names.rank, 0, info.world_size - 1));
  if (!names.local_size.empty()) {
    DSD_ASSIGN_OR_RETURN(
        info.local_world_size,
        reader.NumberOr(names.local_size, 1, info.world_size, 1));
  }
  const bool has_local_size =
      !names.local_size.empty() && reader.Has(names.local_size);
  DSD_ASSIGN_OR_RETURN(
      info.local_rank,
      reader.NumberOr(
          names.local_rank, 0,
          (has_local_size ? info.local_world_size : info.world_size) - 1, 0));
  return absl::OkStatus();
}

// MASTER_ADDR and MASTER_PORT, where they are set.
absl::Status ReadMaster(const Reader& reader, absl::string_view default_addr,
                        int default_port, LaunchInfo& info) {
  info.master_addr = std::string(default_addr);
  if (reader.Has("MASTER_ADDR")) info.master_addr = reader.Text("MASTER_ADDR");
  if (info.master_addr.empty() && info.world_size > 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "MASTER_ADDR is ", reader.Has("MASTER_ADDR") ? "empty" : "not set",
        ", expected the host of rank 0, since ", info.world_size,
        " ranks take part"));
  }
  DSD_ASSIGN_OR_RETURN(info.master_port,
                       reader.NumberOr("MASTER_PORT", 1, 65535, default_port));
  return absl::OkStatus();
}

// The same on all ranks of a job, different for most jobs on a host.
int PortOfJob(absl::string_view job_id) {
  uint32_t hash = 2166136261u;  // FNV-1a
  for (const char c : job_id) {
    hash = (hash ^ static_cast<uint8_t>(c)) * 16777619u;
  }
  return kMinDerivedPort +
         static_cast<int>(hash % (kMaxDerivedPort - kMinDerivedPort));
}

absl::Status BadNodeList(absl::string_view list) {
  return absl::InvalidArgumentError(
      absl::StrCat("SLURM_STEP_NODELIST is \"", list,
                   "\", expected a list such as \"node[01-04,07],login\""));
}

// The first host of "a[01-04,07]b,c": "a01b".
absl::StatusOr<std::string> FirstHost(absl::string_view list) {
  std::string host;
  size_t at = 0;
  while (at < list.size() && list[at] != ',') {
    if (list[at] != '[') {
      if (list[at] == ']') return BadNodeList(list);
      host += list[at++];
      continue;
    }
    const size_t end = list.find(']', at);
    if (end == absl::string_view::npos) return BadNodeList(list);
    const absl::string_view ranges = list.substr(at + 1, end - at - 1);
    const absl::string_view first =
        ranges.substr(0, ranges.find_first_of(",-"));
    if (first.empty() ||
        first.find_first_not_of("0123456789") != absl::string_view::npos) {
      return BadNodeList(list);
    }
    absl::StrAppend(&host, first);
    at = end + 1;
  }
  if (host.empty()) return BadNodeList(list);
  return host;
}

// Entry `node` of "2(x3),1": tasks per node, run-length encoded.
absl::StatusOr<int> TasksOnNode(absl::string_view list, int node) {
  const auto bad = [&] {
    return absl::InvalidArgumentError(absl::StrCat(
        "SLURM_STEP_TASKS_PER_NODE is \"", list, "\", expected tasks for node ",
        node, " in a list such as \"2(x3),1\""));
  };
  int64_t before = 0;
  for (absl::string_view entry : absl::StrSplit(list, ',')) {
    int64_t repeat = 1;
    const size_t open = entry.find("(x");
    if (open != absl::string_view::npos) {
      absl::string_view count = entry.substr(open + 2);
      if (count.empty() || count.back() != ')' ||
          !absl::SimpleAtoi(count.substr(0, count.size() - 1), &repeat) ||
          repeat < 1 || repeat > kMaxHosts) {
        return bad();
      }
      entry = entry.substr(0, open);
    }
    int tasks;
    if (!absl::SimpleAtoi(entry, &tasks) || tasks < 1) return bad();
    before += repeat;
    if (node < before) return tasks;
  }
  return bad();
}

// RANK and WORLD_SIZE count, since torchrun and its like run inside jobs of
// other launchers. Set by hand they may be what another job has left.
void WarnOfOtherLaunchers(const Reader& reader, const LaunchInfo& info) {
  if (reader.Has("TORCHELASTIC_RUN_ID") || reader.Has("DSD_LISTEN_FD")) return;
  constexpr std::pair<absl::string_view, absl::string_view> kOthers[] = {
      {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"},
      {"PMI_RANK", "PMI_SIZE"},
      {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"},
      {"SLURM_PROCID", "SLURM_NTASKS"},
  };
  for (const auto& [rank, size] : kOthers) {
    int its_rank;
    int its_size;
    if (!absl::SimpleAtoi(reader.Text(rank), &its_rank) ||
        !absl::SimpleAtoi(reader.Text(size), &its_size) || its_size <= 1 ||
        (its_rank == info.rank && its_size == info.world_size)) {
      continue;
    }
    LOG_FIRST_N(WARNING, 1)
        << "RANK and WORLD_SIZE say that this is rank " << info.rank << " of "
        << info.world_size << ", but " << rank << " and " << size << " rank "
        << its_rank << " of " << its_size
        << "; the former count (unset them if they are not meant)";
    return;
  }
}

absl::StatusOr<LaunchInfo> FromTorchrun(Reader& reader) {
  LaunchInfo info;
  info.launcher = "torchrun";
  const bool only_size = !reader.Has("RANK");
  reader.set_because(only_size ? "WORLD_SIZE is set, so RANK is needed"
                               : "RANK is set, so WORLD_SIZE is needed");
  if (!reader.Has("RANK") || !reader.Has("WORLD_SIZE")) {
    return reader.Number(only_size ? "RANK" : "WORLD_SIZE", 0, 0).status();
  }
  reader.set_because("");
  DSD_RETURN_IF_ERROR(ReadRanks(
      reader, {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}, info));
  DSD_RETURN_IF_ERROR(ReadMaster(
      reader, info.world_size == 1 ? "127.0.0.1" : "", kTorchrunPort, info));
  WarnOfOtherLaunchers(reader, info);
  const std::string restarts = reader.Text("TORCHELASTIC_RESTART_COUNT");
  info.job_id = reader.Text("TORCHELASTIC_RUN_ID");
  if (!restarts.empty()) absl::StrAppend(&info.job_id, ".", restarts);
  const std::string agent = reader.Text("TORCHELASTIC_USE_AGENT_STORE");
  if (!agent.empty() && agent != "True" && agent != "False") {
    return absl::InvalidArgumentError(
        absl::StrCat("TORCHELASTIC_USE_AGENT_STORE is \"", agent,
                     "\", expected True or False"));
  }
  info.agent_store = agent == "True";
  if (reader.Has("DSD_LISTEN_FD") && info.rank == 0) {
    DSD_ASSIGN_OR_RETURN(info.listen_fd,
                         reader.Number("DSD_LISTEN_FD", 3, kMax));
  }
  return info;
}

absl::StatusOr<LaunchInfo> FromSlurm(Reader& reader) {
  LaunchInfo info;
  info.launcher = "slurm";
  reader.set_because("SLURM_STEP_ID is set");
  // In the shell of an allocation SLURM_NTASKS may speak of the allocation.
  const absl::string_view size = reader.Has("SLURM_STEP_NUM_TASKS")
                                     ? "SLURM_STEP_NUM_TASKS"
                                     : "SLURM_NTASKS";
  DSD_RETURN_IF_ERROR(
      ReadRanks(reader, {"SLURM_PROCID", size, "SLURM_LOCALID", ""}, info));
  if (reader.Has("SLURM_STEP_TASKS_PER_NODE")) {
    DSD_ASSIGN_OR_RETURN(const int node,
                         reader.NumberOr("SLURM_NODEID", 0, kMaxHosts, 0));
    DSD_ASSIGN_OR_RETURN(
        info.local_world_size,
        TasksOnNode(reader.Text("SLURM_STEP_TASKS_PER_NODE"), node));
    if (info.local_rank >= info.local_world_size) {
      return absl::InvalidArgumentError(absl::StrCat(
          "SLURM_LOCALID is ", info.local_rank, ", but node ", node, " has ",
          info.local_world_size, " tasks (SLURM_STEP_TASKS_PER_NODE is \"",
          reader.Text("SLURM_STEP_TASKS_PER_NODE"), "\")"));
    }
  }
  info.job_id = absl::StrCat(reader.Text("SLURM_JOB_ID"), ".",
                             reader.Text("SLURM_STEP_ID"));
  std::string first_host = reader.Text("SLURM_LAUNCH_NODE_IPADDR");
  if (reader.Has("SLURM_STEP_NODELIST")) {
    DSD_ASSIGN_OR_RETURN(first_host,
                         FirstHost(reader.Text("SLURM_STEP_NODELIST")));
  }
  if (first_host.empty() && info.world_size == 1) first_host = "127.0.0.1";
  DSD_RETURN_IF_ERROR(
      ReadMaster(reader, first_host, PortOfJob(info.job_id), info));
  return info;
}

absl::StatusOr<LaunchInfo> FromMpi(Reader& reader, absl::string_view launcher,
                                   const Names& names,
                                   absl::string_view job_variable) {
  LaunchInfo info;
  info.launcher = std::string(launcher);
  reader.set_because(absl::StrCat(
      reader.Has(names.rank) ? names.rank : names.size, " is set"));
  DSD_RETURN_IF_ERROR(ReadRanks(reader, names, info));
  if (!job_variable.empty()) info.job_id = reader.Text(job_variable);
  // mpirun says nothing about hosts, unless all ranks are on this one.
  const bool one_host = info.local_world_size == info.world_size;
  DSD_RETURN_IF_ERROR(ReadMaster(
      reader, one_host ? "127.0.0.1" : "",
      info.job_id.empty() ? kTorchrunPort : PortOfJob(info.job_id), info));
  return info;
}

absl::StatusOr<LaunchInfo> FromLauncher(Reader& reader) {
  // The innermost launcher counts: torchrun may run inside a job of any other,
  // and mpirun starts its ranks through steps of Slurm. There PMI_RANK alone is
  // srun's own (--mpi=pmi2); mpiexec sets MPI_LOCALRANKID, too.
  if (reader.Has("RANK") || reader.Has("WORLD_SIZE")) {
    return FromTorchrun(reader);
  }
  if (reader.Has("OMPI_COMM_WORLD_RANK") ||
      reader.Has("OMPI_COMM_WORLD_SIZE")) {
    return FromMpi(reader, "openmpi",
                   {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                    "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"},
                   "PMIX_NAMESPACE");
  }
  // sbatch alone, without srun, leaves SLURM_PROCID=0 and no step.
  const bool in_step = reader.Has("SLURM_STEP_ID");
  if (reader.Has("MPI_LOCALRANKID") ||
      (!in_step && (reader.Has("PMI_RANK") || reader.Has("PMI_SIZE")))) {
    return FromMpi(
        reader, "mpich",
        {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"}, "");
  }
  if (in_step) return FromSlurm(reader);
  return LaunchInfo();
}

}  // namespace

absl::StatusOr<LaunchInfo> LaunchFromEnvironment(const EnvironmentMap& env) {
  Reader reader(env);
  DSD_ASSIGN_OR_RETURN(LaunchInfo info, FromLauncher(reader));
  reader.set_because("");
  if (reader.Has("DSD_HEARTBEAT_SECONDS")) {
    DSD_ASSIGN_OR_RETURN(
        const int seconds,
        reader.Number("DSD_HEARTBEAT_SECONDS", 0, kMaxHeartbeatSeconds));
    info.heartbeat_bound = absl::Seconds(seconds);
  }
  if (reader.Has("DSD_CONTROL_FAN_OUT")) {
    DSD_ASSIGN_OR_RETURN(info.control_fan_out,
                         reader.Number("DSD_CONTROL_FAN_OUT", 0, kMax));
  }
  info.host = reader.Text("DSD_HOST");
  for (const auto& [name, field] :
       {std::pair("DSD_TOKEN", &info.token),
        std::pair("DSD_TOKEN_FILE", &info.token_file)}) {
    *field = reader.Text(name);
    // A job that was to have one must not run without.
    if (reader.Has(name) && field->empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, " is empty; unset it for a job without a token"));
    }
  }
  return info;
}

EnvironmentMap ProcessEnvironment() {
  EnvironmentMap env;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(*entry, absl::MaxSplits('=', 1));
    env.emplace(parts.first, parts.second);
  }
  return env;
}

}  // namespace dsd
