// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/harness/rank_processes.h"

#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <iostream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

DSD_RANK_PROGRAM(Report) {
  std::cout << "hello from " << rank.rank() << std::endl;
  rank.Record("argument", rank.argument());
  rank.Record("threads", getenv("OMP_NUM_THREADS"));
  rank.Record("parent", absl::StrCat(getppid()));
  if (rank.rank() == 1) return absl::NotFoundError("nothing here");
  return absl::OkStatus();
}

DSD_RANK_PROGRAM(PauseThenReach) {
  DSD_RETURN_IF_ERROR(rank.Pause("first"));
  rank.Reach("second");
  rank.Record("passed", "second");
  return absl::OkStatus();
}

DSD_RANK_PROGRAM(Exit) { _exit(7); }

DSD_RANK_PROGRAM(Hang) {
  Env::Real()->SleepUntil(absl::InfiniteFuture());
  return absl::OkStatus();
}

TEST(RankProcessesTest, ResultsComeBackByRank) {
  RankRunOptions options;
  options.argument = "an argument\nof two lines";
  const std::vector<RankResult> results = RunRanks(3, "Report", options);
  EXPECT_THAT(results, Not(AllRanksOk()));
  for (int rank = 0; rank < 3; ++rank) {
    const RankResult& result = results[rank];
    EXPECT_EQ(result.end, RankResult::End::kReturned);
    EXPECT_EQ(result.values.at("argument"), options.argument);
    EXPECT_EQ(result.values.at("threads"), "1");
    EXPECT_EQ(result.values.at("parent"), absl::StrCat(getpid()));
    EXPECT_THAT(result.output, HasSubstr(absl::StrCat("hello from ", rank)));
    EXPECT_EQ(result.status, rank == 1 ? absl::NotFoundError("nothing here")
                                       : absl::OkStatus());
  }
}

TEST(RankProcessesTest, ARankWaitsAndDiesWhereItIsTold) {
  RankRunOptions options;
  options.kill_at[1] = "second";
  RankProcesses processes(3, "PauseThenReach", options);
  for (int rank = 0; rank < 3; ++rank) {
    EXPECT_TRUE(processes.WaitFor(rank, "first"));
  }
  processes.Signal(2, SIGKILL);
  processes.Release(0);
  processes.Release(1);
  const std::vector<RankResult> results = processes.Wait();
  EXPECT_EQ(results[0].end, RankResult::End::kReturned);
  EXPECT_EQ(results[0].values.count("passed"), 1);
  for (int rank : {1, 2}) {
    EXPECT_EQ(results[rank].end, RankResult::End::kKilled);
    EXPECT_EQ(results[rank].signal, SIGKILL);
    EXPECT_EQ(results[rank].values.count("passed"), 0);
  }
  EXPECT_LE(results[1].killed_at, results[1].ended_at);
}

TEST(RankProcessesTest, EndsOfAllKindsAreTold) {
  RankRunOptions options;
  options.absent = {0};
  const std::vector<RankResult> results = RunRanks(2, "Exit", options);
  EXPECT_EQ(results[0].end, RankResult::End::kAbsent);
  EXPECT_EQ(results[1].end, RankResult::End::kExited);
  EXPECT_EQ(results[1].exit_code, 7);
}

TEST(RankProcessesTest, ARunThatHangsEnds) {
  RankRunOptions options;
  options.timeout = absl::Milliseconds(300);
  const std::vector<RankResult> results = RunRanks(2, "Hang", options);
  for (const RankResult& result : results) {
    EXPECT_EQ(result.end, RankResult::End::kTimedOut);
    EXPECT_THAT(result.output, HasSubstr("the threads of this rank"));
  }
}

}  // namespace
}  // namespace dsd
