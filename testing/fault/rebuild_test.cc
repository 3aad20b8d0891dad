// SPDX-License-Identifier: Apache-2.0
//
// Who is left goes on: a new world after a death, whoever died, and one with a
// process that takes the place of the dead.

#include <signal.h>

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/testing/harness/rank_processes.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

WorldOptions Rebuildable() {
  WorldOptions options;
  options.backend = "gloo";
  options.connect_timeout = absl::Seconds(30);
  options.may_rebuild = true;
  return options;
}

// Some calls; records who took part, by the numbers of the launch.
absl::Status Work(RankContext& rank, Communicator& comm) {
  for (int i = 0; i < 3; ++i) {
    std::vector<int64_t> ones(100000, 1);
    DSD_RETURN_IF_ERROR(
        comm.AllReduce(absl::MakeSpan(reinterpret_cast<std::byte*>(ones.data()),
                                      ones.size() * sizeof(ones[0])),
                       DType::kInt64, ReduceOp::kSum));
    if (ones.back() != comm.size()) {
      return absl::InternalError(absl::StrCat("the sum is ", ones.back()));
    }
  }
  DSD_ASSIGN_OR_RETURN(const std::vector<std::string> members,
                       comm.AllGatherBlobs(absl::StrCat(rank.rank()), 10));
  rank.Record("members", absl::StrJoin(members, " "));
  rank.Record("generation", absl::StrCat(comm.generation()));
  return absl::OkStatus();
}

// Until a death ends it.
void BarrierUntilFailure(Communicator& comm) {
  while (comm.Barrier().ok()) {
  }
}

// The argument: how many times somebody dies.
DSD_RANK_PROGRAM(GoOn) {
  int deaths = 0;
  if (!absl::SimpleAtoi(rank.argument(), &deaths)) {
    return absl::InvalidArgumentError(rank.argument());
  }
  DSD_ASSIGN_OR_RETURN(auto comm, ConnectWorld(rank.launch(), Rebuildable()));
  for (int death = 0; death < deaths; ++death) {
    DSD_RETURN_IF_ERROR(Work(rank, *comm));
    DSD_RETURN_IF_ERROR(rank.Pause(absl::StrCat("round ", death)));
    BarrierUntilFailure(*comm);
    rank.Reach(absl::StrCat("rebuild ", death));
    DSD_ASSIGN_OR_RETURN(auto next, comm->Rebuild());
    DSD_RETURN_IF_ERROR(Work(rank, *next));
    comm = std::move(next);  // and so ends what is left of the old one
  }
  DSD_RETURN_IF_ERROR(Work(rank, *comm));
  return comm->Shutdown();
}

// Kills the ranks deaths[n] when all are at rest in round n.
std::vector<RankResult> RunDeaths(int ranks,
                                  const std::vector<std::vector<int>>& deaths,
                                  const RankRunOptions& more = {}) {
  RankRunOptions options = more;
  options.argument = absl::StrCat(deaths.size());
  RankProcesses processes(ranks, "GoOn", options);
  for (size_t round = 0; round < deaths.size(); ++round) {
    for (int rank = 0; rank < ranks; ++rank) {
      processes.WaitFor(rank, absl::StrCat("round ", round));
    }
    for (const int dead : deaths[round]) processes.Signal(dead, SIGKILL);
    for (int rank = 0; rank < ranks; ++rank) processes.Release(rank);
  }
  return processes.Wait();
}

void ExpectGoesOn(const std::vector<RankResult>& results,
                  const std::vector<int>& members, int generation) {
  std::set<int> alive(members.begin(), members.end());
  for (int rank = 0; rank < static_cast<int>(results.size()); ++rank) {
    SCOPED_TRACE(absl::StrCat("rank ", rank));
    if (alive.count(rank) == 0) {
      EXPECT_EQ(results[rank].signal, SIGKILL);
      continue;
    }
    EXPECT_EQ(results[rank].end, RankResult::End::kReturned);
    EXPECT_EQ(results[rank].status, absl::OkStatus());
    const auto& values = results[rank].values;
    ASSERT_EQ(values.count("members"), 1);
    EXPECT_EQ(values.at("members"), absl::StrJoin(members, " "));
    EXPECT_EQ(values.at("generation"), absl::StrCat(generation));
  }
}

TEST(RebuildTest, WhoeverDies) {
  ExpectGoesOn(RunDeaths(4, {{0}}), {1, 2, 3}, 1);
  ExpectGoesOn(RunDeaths(4, {{1}}), {0, 2, 3}, 1);
  ExpectGoesOn(RunDeaths(4, {{3}}), {0, 1, 2}, 1);
}

TEST(RebuildTest, SeveralDieAtOnce) {
  ExpectGoesOn(RunDeaths(5, {{0, 1}}), {2, 3, 4}, 1);
  ExpectGoesOn(RunDeaths(5, {{0, 4}}), {1, 2, 3}, 1);
}

TEST(RebuildTest, OneDiesAfterAnother) {
  // Rank 1 has become rank 0 when it dies.
  ExpectGoesOn(RunDeaths(4, {{0}, {1}}), {2, 3}, 2);
}

TEST(RebuildTest, TheNextToServeDiesWhenItIsAsked) {
  RankRunOptions options;
  options.kill_at = {{1, "rebuild 0"}};
  ExpectGoesOn(RunDeaths(5, {{0}}, options), {2, 3, 4}, 1);
}

TEST(RebuildTest, WithAToken) {
  RankRunOptions options;
  options.environment = {{"DSD_TOKEN", "0123456789abcdef"}};
  ExpectGoesOn(RunDeaths(3, {{0}}, options), {1, 2}, 1);
}

TEST(RebuildTest, TooFewAreAnErrorOnAllOfThem) {
  const auto results = RunDeaths(4, {{0, 2}});
  for (const int rank : {1, 3}) {
    EXPECT_EQ(results[rank].status.code(),
              absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(results[rank].status.message()),
                HasSubstr("2 of 4 ranks are left (1 3), expected at least 3"));
  }
}

// --- One that is there, but does not come ---

DSD_RANK_PROGRAM(GoOnWithoutOneThatIsLate) {
  DSD_ASSIGN_OR_RETURN(const auto comm,
                       ConnectWorld(rank.launch(), Rebuildable()));
  DSD_RETURN_IF_ERROR(rank.Pause("connected"));
  if (rank.rank() == 0) {
    comm->Abort(absl::InternalError("enough"));
  } else {
    BarrierUntilFailure(*comm);
  }
  const bool late = rank.argument() == absl::StrCat(rank.rank());
  if (late) DSD_RETURN_IF_ERROR(rank.Pause("late"));
  RebuildOptions options;
  options.patience = absl::Seconds(3);
  DSD_ASSIGN_OR_RETURN(const auto next, comm->Rebuild(options));
  DSD_RETURN_IF_ERROR(Work(rank, *next));
  DSD_RETURN_IF_ERROR(rank.Pause("rebuilt"));
  DSD_RETURN_IF_ERROR(Work(rank, *next));
  return next->Shutdown();
}

TEST(RebuildTest, WhoIsLateIsLeftOutAndHarmsNothing) {
  for (int late = 0; late < 3; ++late) {
    RankRunOptions options;
    options.argument = absl::StrCat(late);
    RankProcesses processes(3, "GoOnWithoutOneThatIsLate", options);
    for (int rank = 0; rank < 3; ++rank) {
      EXPECT_TRUE(processes.WaitFor(rank, "connected"));
    }
    for (int rank = 0; rank < 3; ++rank) processes.Release(rank);
    for (int rank = 0; rank < 3; ++rank) {
      if (rank == late) continue;
      EXPECT_TRUE(processes.WaitFor(rank, "rebuilt"));
    }
    EXPECT_TRUE(processes.WaitFor(late, "late"));
    processes.Release(late);
    // It ends while the others are still at work.
    processes.WaitFor(late, "never");
    for (int rank = 0; rank < 3; ++rank) processes.Release(rank);
    const auto results = processes.Wait();
    for (int rank = 0; rank < 3; ++rank) {
      SCOPED_TRACE(absl::StrCat("rank ", rank, ", late is ", late));
      if (rank != late) {
        EXPECT_EQ(results[rank].status, absl::OkStatus());
        continue;
      }
      EXPECT_THAT(std::string(results[rank].status.message()),
                  AnyOf(HasSubstr("came too late"),
                        HasSubstr("1 of 3 ranks are left")));
    }
  }
}

// --- One that is stopped, and goes on when the others have done so ---

DSD_RANK_PROGRAM(GoOnWithoutTheStopped) {
  DSD_ASSIGN_OR_RETURN(const auto comm,
                       ConnectWorld(rank.launch(), Rebuildable()));
  DSD_RETURN_IF_ERROR(rank.Pause("connected"));
  // Its bytes are on the wire, and come when nobody wants them any more.
  const int next = (comm->rank() + 1) % comm->size();
  const int previous = (comm->rank() + comm->size() - 1) % comm->size();
  const std::vector<std::byte> out(size_t{32} << 20);
  std::vector<std::byte> in(out.size());
  absl::StatusOr<PendingExchange> pending = comm->StartExchange(
      {{next, out}}, {{previous, absl::MakeSpan(in)}}, "ring");
  if (rank.argument() == absl::StrCat(rank.rank())) raise(SIGSTOP);
  if (pending.ok()) pending->Wait().IgnoreError();
  BarrierUntilFailure(*comm);
  RebuildOptions options;
  options.patience = absl::Seconds(3);
  DSD_ASSIGN_OR_RETURN(const auto rebuilt, comm->Rebuild(options));
  DSD_RETURN_IF_ERROR(Work(rank, *rebuilt));
  DSD_RETURN_IF_ERROR(rank.Pause("rebuilt"));
  DSD_RETURN_IF_ERROR(Work(rank, *rebuilt));
  return rebuilt->Shutdown();
}

TEST(RebuildTest, WhoWasStoppedIsLeftOutAndHarmsNothing) {
  for (const int stopped : {0, 2}) {
    RankRunOptions options;
    options.argument = absl::StrCat(stopped);
    options.environment = {{"DSD_HEARTBEAT_SECONDS", "4"}};
    RankProcesses processes(3, "GoOnWithoutTheStopped", options);
    for (int rank = 0; rank < 3; ++rank) {
      EXPECT_TRUE(processes.WaitFor(rank, "connected"));
    }
    for (int rank = 0; rank < 3; ++rank) processes.Release(rank);
    for (int rank = 0; rank < 3; ++rank) {
      if (rank == stopped) continue;
      EXPECT_TRUE(processes.WaitFor(rank, "rebuilt"));
    }
    processes.Signal(stopped, SIGCONT);
    processes.WaitFor(stopped, "never");
    for (int rank = 0; rank < 3; ++rank) processes.Release(rank);
    const auto results = processes.Wait();
    for (int rank = 0; rank < 3; ++rank) {
      SCOPED_TRACE(absl::StrCat("rank ", rank, ", stopped is ", stopped));
      if (rank != stopped) {
        EXPECT_EQ(results[rank].status, absl::OkStatus());
        continue;
      }
      EXPECT_THAT(std::string(results[rank].status.message()),
                  AnyOf(HasSubstr("came too late"),
                        HasSubstr("1 of 3 ranks are left")));
    }
  }
}

// --- One that takes the place of the dead ---

// Rank 3 of the launch is spare: it becomes the rank that its argument names.
DSD_RANK_PROGRAM(Replaced) {
  constexpr int kRanks = 3;
  LaunchInfo launch = rank.launch();
  launch.world_size = kRanks;
  WorldOptions options;
  options.backend = "gloo";
  options.connect_timeout = absl::Seconds(30);
  if (rank.rank() == kRanks) {
    // A new rank 0 cannot serve before the old one is gone; others may wait.
    DSD_RETURN_IF_ERROR(rank.Pause("spare"));
    if (!absl::SimpleAtoi(rank.argument(), &launch.rank)) {
      return absl::InvalidArgumentError(rank.argument());
    }
  } else {
    DSD_ASSIGN_OR_RETURN(auto comm, ConnectWorld(launch, options));
    DSD_RETURN_IF_ERROR(rank.Pause("connected"));
    if (rank.argument() == absl::StrCat(rank.rank())) raise(SIGKILL);
    BarrierUntilFailure(*comm);
    comm.reset();
  }
  options.generation = 1;
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectWorld(launch, options));
  DSD_RETURN_IF_ERROR(Work(rank, *comm));
  return comm->Shutdown();
}

TEST(ReplaceTest, ANewProcessTakesThePlace) {
  for (int dead = 0; dead < 3; ++dead) {
    RankRunOptions options;
    options.argument = absl::StrCat(dead);
    RankProcesses processes(4, "Replaced", options);
    for (int rank = 0; rank < 3; ++rank) {
      EXPECT_TRUE(processes.WaitFor(rank, "connected"));
    }
    for (int rank = 0; rank < 3; ++rank) processes.Release(rank);
    EXPECT_TRUE(processes.WaitFor(3, "spare"));
    if (dead == 0) processes.WaitFor(0, "never");
    processes.Release(3);
    const auto results = processes.Wait();
    std::vector<std::string> members = {"0", "1", "2"};
    members[dead] = "3";
    for (int rank = 0; rank < 4; ++rank) {
      if (rank == dead) continue;
      SCOPED_TRACE(absl::StrCat("rank ", rank, ", dead is ", dead));
      ASSERT_EQ(results[rank].status, absl::OkStatus());
      EXPECT_EQ(results[rank].values.at("members"),
                absl::StrJoin(members, " "));
      EXPECT_EQ(results[rank].values.at("generation"), "1");
    }
  }
}

// --- Misuse ---

DSD_RANK_PROGRAM(RebuildTooSoon) {
  WorldOptions options = Rebuildable();
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectWorld(rank.launch(), options));
  const absl::Status status = comm->Rebuild().status();
  DSD_RETURN_IF_ERROR(comm->Shutdown());
  return status;
}

DSD_RANK_PROGRAM(RebuildUnprepared) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("gloo"));
  const absl::Status status = comm->Rebuild().status();
  DSD_RETURN_IF_ERROR(comm->Shutdown());
  return status;
}

TEST(RebuildTest, MisuseIsHarmless) {
  for (const auto& [program, text] :
       {std::pair("RebuildTooSoon", "it has not failed"),
        std::pair("RebuildUnprepared", "may_rebuild")}) {
    for (const RankResult& result : RunRanks(2, program)) {
      EXPECT_EQ(result.status.code(), absl::StatusCode::kFailedPrecondition);
      EXPECT_THAT(std::string(result.status.message()), HasSubstr(text));
    }
  }
}

}  // namespace
}  // namespace dsd
