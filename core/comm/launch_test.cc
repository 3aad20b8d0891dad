// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/launch.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/log_severity.h"
#include "absl/log/scoped_mock_log.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::AllOf;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::Lt;

const EnvironmentMap kTorchrun = {
    {"RANK", "5"},
    {"LOCAL_RANK", "1"},
    {"WORLD_SIZE", "8"},
    {"LOCAL_WORLD_SIZE", "4"},
    {"GROUP_RANK", "1"},
    {"MASTER_ADDR", "node0"},
    {"MASTER_PORT", "29511"},
    {"TORCHELASTIC_RUN_ID", "job7"},
    {"TORCHELASTIC_RESTART_COUNT", "2"},
    {"TORCHELASTIC_USE_AGENT_STORE", "True"},
    // torchrun inside a job of Slurm.
    {"SLURM_STEP_ID", "0"},
    {"SLURM_PROCID", "0"},
    {"SLURM_NTASKS", "2"},
};

const EnvironmentMap kSlurm = {
    {"SLURM_JOB_ID", "4242"},
    {"SLURM_STEP_ID", "1"},
    {"SLURM_PROCID", "6"},
    {"SLURM_NTASKS", "7"},
    {"SLURM_LOCALID", "0"},
    {"SLURM_NODEID", "3"},
    {"SLURM_STEP_NODELIST", "gpu[007-009,012]b,login"},
    {"SLURM_STEP_TASKS_PER_NODE", "2(x3),1"},
};

const EnvironmentMap kOpenMpi = {
    {"OMPI_COMM_WORLD_RANK", "1"},
    {"OMPI_COMM_WORLD_SIZE", "2"},
    {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
    {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
    {"PMIX_NAMESPACE", "prterun-host-99@1"},
};

const EnvironmentMap kHydra = {
    {"PMI_RANK", "0"},         {"PMI_SIZE", "3"},
    {"MPI_LOCALRANKID", "0"},  {"MPI_LOCALNRANKS", "1"},
    {"MASTER_ADDR", "node-a"},
};

EnvironmentMap With(EnvironmentMap env, const std::string& name,
                    const std::string& value) {
  env[name] = value;
  return env;
}
EnvironmentMap Without(EnvironmentMap env, const std::string& name) {
  env.erase(name);
  return env;
}

TEST(LaunchTest, NothingIsAWorldOfOne) {
  const LaunchInfo info = *LaunchFromEnvironment({{"PATH", "/bin"}});
  EXPECT_EQ(info.launcher, "none");
  EXPECT_EQ(info.rank, 0);
  EXPECT_EQ(info.world_size, 1);
  EXPECT_FALSE(info.agent_store);
}

TEST(LaunchTest, Torchrun) {
  const LaunchInfo info = *LaunchFromEnvironment(kTorchrun);
  EXPECT_EQ(info.launcher, "torchrun");
  EXPECT_EQ(info.rank, 5);
  EXPECT_EQ(info.world_size, 8);
  EXPECT_EQ(info.local_rank, 1);
  EXPECT_EQ(info.local_world_size, 4);
  EXPECT_EQ(info.master_addr, "node0");
  EXPECT_EQ(info.master_port, 29511);
  EXPECT_EQ(info.job_id, "job7.2");
  EXPECT_TRUE(info.agent_store);
  EXPECT_FALSE(LaunchFromEnvironment(
                   With(kTorchrun, "TORCHELASTIC_USE_AGENT_STORE", "False"))
                   ->agent_store);
}

TEST(LaunchTest, ByHand) {
  const LaunchInfo info = *LaunchFromEnvironment({{"RANK", "0"},
                                                  {"WORLD_SIZE", "2"},
                                                  {"MASTER_ADDR", "::1"},
                                                  {"DSD_LISTEN_FD", "7"}});
  EXPECT_EQ(info.master_port, 29500);
  EXPECT_EQ(info.listen_fd, 7);
  EXPECT_EQ(info.job_id, "");
  EXPECT_EQ(info.local_world_size, 1);
}

TEST(LaunchTest, Slurm) {
  const LaunchInfo info = *LaunchFromEnvironment(kSlurm);
  EXPECT_EQ(info.launcher, "slurm");
  EXPECT_EQ(info.rank, 6);
  EXPECT_EQ(info.world_size, 7);
  EXPECT_EQ(info.local_rank, 0);
  EXPECT_EQ(info.local_world_size, 1);
  EXPECT_EQ(info.master_addr, "gpu007b");
  EXPECT_EQ(info.job_id, "4242.1");
  EXPECT_THAT(info.master_port, AllOf(Ge(15000), Lt(30000)));
  // All ranks of the job agree on it, another step need not.
  EXPECT_EQ(LaunchFromEnvironment(
                With(With(kSlurm, "SLURM_PROCID", "0"), "SLURM_NODEID", "0"))
                ->master_port,
            info.master_port);
  EXPECT_EQ(
      LaunchFromEnvironment(With(kSlurm, "MASTER_PORT", "1234"))->master_port,
      1234);
}

TEST(LaunchTest, SlurmNodeLists) {
  const std::pair<std::string, std::string> cases[] = {
      {"n1", "n1"},
      {"n1,n2", "n1"},
      {"a[1-3]", "a1"},
      {"a[03,07-09]", "a03"},
      {"rack[2]node[10-12]", "rack2node10"},
      {"rack2-a[1,2]x", "rack2-a1x"},
  };
  for (const auto& [list, first] : cases) {
    EXPECT_EQ(LaunchFromEnvironment(With(kSlurm, "SLURM_STEP_NODELIST", list))
                  ->master_addr,
              first);
  }
  for (const std::string bad : {"", "a[", "a[]", "a]", "a[x-y]", ","}) {
    const absl::Status status =
        LaunchFromEnvironment(With(kSlurm, "SLURM_STEP_NODELIST", bad))
            .status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("SLURM_STEP_NODELIST is \"" + bad + "\""));
  }
}

// The shell of an allocation of 7 tasks is a step of one.
TEST(LaunchTest, SlurmTellsTheStepFromTheAllocation) {
  EnvironmentMap env = With(kSlurm, "SLURM_STEP_NUM_TASKS", "1");
  env["SLURM_PROCID"] = "0";
  EXPECT_EQ(LaunchFromEnvironment(env)->world_size, 1);
}

// mpirun and mpiexec start ranks on other hosts through srun, one step per job
// and one task per host, and people call them from the shell of a step.
TEST(LaunchTest, MpirunInsideAStepOfSlurm) {
  for (const EnvironmentMap& inner :
       {kOpenMpi, With(kHydra, "MASTER_PORT", "29501")}) {
    EnvironmentMap env = kSlurm;
    for (const auto& [name, value] : inner) env[name] = value;
    const LaunchInfo expected = *LaunchFromEnvironment(inner);
    const LaunchInfo info = *LaunchFromEnvironment(env);
    EXPECT_EQ(info.launcher, expected.launcher);
    EXPECT_EQ(info.rank, expected.rank);
    EXPECT_EQ(info.world_size, expected.world_size);
    EXPECT_EQ(info.master_port, expected.master_port);
  }
  // srun --mpi=pmi2
  const LaunchInfo info = *LaunchFromEnvironment(
      With(With(kSlurm, "PMI_RANK", "6"), "PMI_SIZE", "7"));
  EXPECT_EQ(info.launcher, "slurm");
  EXPECT_EQ(info.local_world_size, 1);
}

// What sbatch alone leaves behind is no launch.
TEST(LaunchTest, SlurmWithoutAStep) {
  EXPECT_EQ(LaunchFromEnvironment(Without(kSlurm, "SLURM_STEP_ID"))->launcher,
            "none");
}

TEST(LaunchTest, OpenMpi) {
  const LaunchInfo info = *LaunchFromEnvironment(kOpenMpi);
  EXPECT_EQ(info.launcher, "openmpi");
  EXPECT_EQ(info.rank, 1);
  EXPECT_EQ(info.world_size, 2);
  EXPECT_EQ(info.master_addr, "127.0.0.1");
  EXPECT_THAT(info.master_port, AllOf(Ge(15000), Lt(30000)));
}

TEST(LaunchTest, Hydra) {
  const LaunchInfo info = *LaunchFromEnvironment(kHydra);
  EXPECT_EQ(info.launcher, "mpich");
  EXPECT_EQ(info.rank, 0);
  EXPECT_EQ(info.world_size, 3);
  EXPECT_EQ(info.master_addr, "node-a");
  EXPECT_EQ(info.master_port, 29500);
}

struct Bad {
  EnvironmentMap env;
  std::vector<std::string> texts;  // that the error contains
};

TEST(LaunchTest, HeartbeatsWhateverTheLauncher) {
  EXPECT_EQ(LaunchFromEnvironment({})->heartbeat_bound, std::nullopt);
  EXPECT_EQ(
      LaunchFromEnvironment({{"DSD_HEARTBEAT_SECONDS", "0"}})->heartbeat_bound,
      absl::ZeroDuration());
  EXPECT_EQ(
      LaunchFromEnvironment(
          {{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"DSD_HEARTBEAT_SECONDS", "90"}})
          ->heartbeat_bound,
      absl::Seconds(90));
  for (const char* bad : {"", "-1", "soon", "86401"}) {
    EXPECT_EQ(
        LaunchFromEnvironment({{"DSD_HEARTBEAT_SECONDS", bad}}).status().code(),
        absl::StatusCode::kInvalidArgument);
  }
}

TEST(LaunchTest, TheFanOutOfControlConnections) {
  EXPECT_EQ(LaunchFromEnvironment({})->control_fan_out, std::nullopt);
  for (const auto& [text, number] :
       {std::pair("0", 0), std::pair("2", 2), std::pair("4096", 4096)}) {
    EXPECT_EQ(
        LaunchFromEnvironment({{"DSD_CONTROL_FAN_OUT", text}})->control_fan_out,
        number);
  }
  for (const char* bad : {"", "-1", "few"}) {
    EXPECT_EQ(
        LaunchFromEnvironment({{"DSD_CONTROL_FAN_OUT", bad}}).status().code(),
        absl::StatusCode::kInvalidArgument);
  }
}

TEST(LaunchTest, HostsWhateverTheLauncher) {
  EXPECT_EQ(LaunchFromEnvironment({})->host, "");
  EXPECT_EQ(LaunchFromEnvironment(
                {{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"DSD_HOST", "blue"}})
                ->host,
            "blue");
}

TEST(LaunchTest, TokensWhateverTheLauncher) {
  EXPECT_EQ(LaunchFromEnvironment({})->token, "");
  const auto info = LaunchFromEnvironment({{"DSD_TOKEN", "secret"}});
  EXPECT_EQ(info->token, "secret");
  EXPECT_EQ(info->token_file, "");
  EXPECT_EQ(LaunchFromEnvironment({{"DSD_TOKEN_FILE", "/run/t"}})->token_file,
            "/run/t");
  for (const char* name : {"DSD_TOKEN", "DSD_TOKEN_FILE"}) {
    const absl::Status status = LaunchFromEnvironment({{name, ""}}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(name));
  }
}

// Left by another job, or set by a launcher inside of one.
TEST(LaunchTest, TwoLaunchersThatDifferAreLoggedOnce) {
  EnvironmentMap env = kOpenMpi;
  env["RANK"] = "0";
  env["WORLD_SIZE"] = "1";
  env["TORCHELASTIC_RUN_ID"] = "job";
  absl::ScopedMockLog log(absl::MockLogDefault::kDisallowUnexpected);
  EXPECT_CALL(log,
              Log(absl::LogSeverity::kWarning, ::testing::_,
                  HasSubstr("this is rank 0 of 1, but OMPI_COMM_WORLD_RANK")))
      .Times(1);
  log.StartCapturingLogs();
  EXPECT_EQ(LaunchFromEnvironment(env)->world_size, 1);
  env.erase("TORCHELASTIC_RUN_ID");
  EXPECT_EQ(LaunchFromEnvironment(env)->world_size, 1);
  EXPECT_EQ(LaunchFromEnvironment(env)->world_size, 1);
}

TEST(LaunchTest, ContradictionsAndGarbageAreNamed) {
  const Bad cases[] = {
      {{{"RANK", "0"}}, {"WORLD_SIZE is not set", "RANK is set"}},
      {{{"WORLD_SIZE", "2"}}, {"RANK is not set", "WORLD_SIZE is set"}},
      {With(kTorchrun, "RANK", "8"), {"RANK is \"8\"", "from 0 to 7"}},
      {With(kTorchrun, "RANK", ""), {"RANK is \"\""}},
      {With(kTorchrun, "RANK", "one"), {"RANK is \"one\""}},
      {With(kTorchrun, "RANK", "-1"), {"RANK is \"-1\""}},
      {With(kTorchrun, "RANK", " 1"), {"RANK is \" 1\""}},
      {With(kTorchrun, "RANK", "0x1"), {"RANK is \"0x1\""}},
      {With(kTorchrun, "WORLD_SIZE", "0"), {"WORLD_SIZE is \"0\"", "from 1"}},
      {With(kTorchrun, "WORLD_SIZE", "99999999999"),
       {"WORLD_SIZE is \"99999999999\""}},
      {With(kTorchrun, "WORLD_SIZE", "2147483647"),
       {"WORLD_SIZE is \"2147483647\"", "1048576"}},
      {With(kTorchrun, "LOCAL_RANK", "4"), {"LOCAL_RANK is \"4\"", "0 to 3"}},
      {With(kTorchrun, "LOCAL_WORLD_SIZE", "9"),
       {"LOCAL_WORLD_SIZE is \"9\"", "1 to 8"}},
      {With(kTorchrun, "MASTER_PORT", "65536"), {"MASTER_PORT is \"65536\""}},
      {With(kTorchrun, "MASTER_PORT", ""), {"MASTER_PORT is \"\""}},
      {With(kTorchrun, "MASTER_ADDR", ""), {"MASTER_ADDR is empty"}},
      {Without(kTorchrun, "MASTER_ADDR"),
       {"MASTER_ADDR is not set", "8 ranks"}},
      {With(kTorchrun, "TORCHELASTIC_USE_AGENT_STORE", "yes"),
       {"TORCHELASTIC_USE_AGENT_STORE is \"yes\"", "True or False"}},
      {With(With(kTorchrun, "DSD_LISTEN_FD", "x"), "RANK", "0"),
       {"DSD_LISTEN_FD is \"x\""}},
      {Without(kSlurm, "SLURM_PROCID"),
       {"SLURM_PROCID is not set", "SLURM_STEP_ID is set"}},
      {With(kSlurm, "SLURM_PROCID", "7"), {"SLURM_PROCID is \"7\""}},
      {With(kSlurm, "SLURM_STEP_TASKS_PER_NODE", "2(x3)"),
       {"SLURM_STEP_TASKS_PER_NODE is \"2(x3)\"", "node 3"}},
      {With(kSlurm, "SLURM_STEP_TASKS_PER_NODE", "2(x"),
       {"SLURM_STEP_TASKS_PER_NODE is \"2(x\""}},
      {With(kSlurm, "SLURM_LOCALID", "1"), {"SLURM_LOCALID is 1"}},
      {Without(kOpenMpi, "OMPI_COMM_WORLD_SIZE"),
       {"OMPI_COMM_WORLD_SIZE is not set", "OMPI_COMM_WORLD_RANK is set"}},
      {With(kOpenMpi, "OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
       {"OMPI_COMM_WORLD_LOCAL_RANK is \"1\""}},
      {Without(kHydra, "MASTER_ADDR"), {"MASTER_ADDR is not set", "3 ranks"}},
      {Without(kHydra, "PMI_RANK"), {"PMI_RANK is not set"}},
  };
  for (const Bad& bad : cases) {
    const absl::Status status = LaunchFromEnvironment(bad.env).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument)
        << bad.texts[0];
    for (const std::string& text : bad.texts) {
      EXPECT_THAT(std::string(status.message()), HasSubstr(text));
    }
  }
}

TEST(LaunchTest, TheEnvironmentOfThisProcess) {
  EXPECT_TRUE(ProcessEnvironment().contains("PATH"));
}

}  // namespace
}  // namespace dsd
