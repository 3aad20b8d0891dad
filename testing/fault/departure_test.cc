// SPDX-License-Identifier: Apache-2.0
//
// Ranks that leave in other ways than by dying in the middle: after their
// shutdown, by an early exit or return, together, or only as seen by others,
// since they are stopped. None of these measures how soon the others know.
// Compiled once per backend, with its name in DSD_BACKEND.

#include <signal.h>
#include <unistd.h>

#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/testing/harness/rank_processes.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

constexpr int kRanks = 4;

DSD_RANK_PROGRAM(ShutdownThenDie) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(DSD_BACKEND));
  DSD_RETURN_IF_ERROR(comm->Barrier());
  DSD_RETURN_IF_ERROR(comm->Shutdown());
  rank.Reach("after shutdown");
  return absl::OkStatus();
}

DSD_RANK_PROGRAM(ShutdownThenExit) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(DSD_BACKEND));
  DSD_RETURN_IF_ERROR(comm->Shutdown());
  if (rank.rank() == 0) raise(SIGKILL);
  return absl::OkStatus();
}

DSD_RANK_PROGRAM(ExitEarly) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(DSD_BACKEND));
  if (absl::StrCat(rank.rank()) == rank.argument()) _exit(0);
  return comm->Barrier();
}

DSD_RANK_PROGRAM(ReturnEarly) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(DSD_BACKEND));
  if (absl::StrCat(rank.rank()) == rank.argument()) {
    return absl::NotFoundError("no such file");
  }
  return comm->Barrier();
}

// All find the same error, and none has anything more to say.
DSD_RANK_PROGRAM(GiveUpTogether) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(DSD_BACKEND));
  DSD_RETURN_IF_ERROR(comm->AllGatherBlobs("no such file", 100).status());
  return absl::NotFoundError("the verdict");
}

DSD_RANK_PROGRAM(BarrierWithDeadline) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(DSD_BACKEND));
  DSD_RETURN_IF_ERROR(rank.Pause("connected"));
  CallOptions options;
  options.timeout = absl::Milliseconds(500);
  const absl::Time start = comm->env()->Now();
  const absl::Status status = comm->Barrier(options);
  rank.Record("took",
              absl::StrCat(absl::ToDoubleSeconds(comm->env()->Now() - start)));
  return status;
}

class DepartureTest : public ::testing::TestWithParam<int> {};

TEST_P(DepartureTest, AfterShutdownIsNoError) {
  RankRunOptions options;
  options.kill_at[GetParam()] = "after shutdown";
  const auto results = RunRanks(kRanks, "ShutdownThenDie", options);
  for (int rank = 0; rank < kRanks; ++rank) {
    if (rank == GetParam()) continue;
    EXPECT_EQ(results[rank].end, RankResult::End::kReturned);
    EXPECT_EQ(results[rank].status, absl::OkStatus());
  }
}

// Rank 0 has the store: what it has just been told, the others must hear too.
TEST(DepartureOfRank0Test, RightAfterShutdownIsNoError) {
  constexpr int kManyRanks = 8;
  for (int round = 0; round < 10; ++round) {
    const auto results = RunRanks(kManyRanks, "ShutdownThenExit", {});
    for (int rank = 1; rank < kManyRanks; ++rank) {
      EXPECT_EQ(results[rank].end, RankResult::End::kReturned);
      EXPECT_EQ(results[rank].status, absl::OkStatus()) << "rank " << rank;
    }
  }
}

// Rank `leaving` leaves in `program`, and each of the others hears how.
void ExpectOthersHear(absl::string_view program, int leaving,
                      absl::string_view how) {
  RankRunOptions options;
  options.argument = absl::StrCat(leaving);
  const auto results = RunRanks(kRanks, program, options);
  for (int rank = 0; rank < kRanks; ++rank) {
    if (rank == leaving) continue;
    EXPECT_EQ(results[rank].status.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(results[rank].status.message()),
                HasSubstr(absl::StrCat("rank ", leaving, " ", how)));
  }
}

TEST_P(DepartureTest, AnEarlyExitIsADeath) {
  ExpectOthersHear("ExitEarly", GetParam(), "died");
}

TEST_P(DepartureTest, ARankThatReturnsEarlyIsNamed) {
  ExpectOthersHear("ReturnEarly", GetParam(), "left group \"world\"");
}

TEST(GiveUpTest, RanksThatAgreeOnAnErrorDoNotBlameEachOther) {
  for (int round = 0; round < 5; ++round) {
    for (const RankResult& result : RunRanks(kRanks, "GiveUpTogether")) {
      EXPECT_EQ(result.status, absl::NotFoundError("the verdict"));
    }
  }
}

// A stopped process closes nothing: only deadlines end the others' waits. When
// it goes on it finds the group failed.
TEST_P(DepartureTest, AStoppedRankIsNamedAtTheDeadline) {
  RankProcesses processes(kRanks, "BarrierWithDeadline");
  for (int rank = 0; rank < kRanks; ++rank) {
    ASSERT_TRUE(processes.WaitFor(rank, "connected"));
  }
  processes.Signal(GetParam(), SIGSTOP);
  for (int rank = 0; rank < kRanks; ++rank) processes.Release(rank);
  // The stopped one cannot record anything; the others end by themselves.
  for (int rank = 0; rank < kRanks; ++rank) {
    if (rank != GetParam()) processes.WaitFor(rank, "never");
  }
  processes.Signal(GetParam(), SIGCONT);
  const auto results = processes.Wait();
  for (int rank = 0; rank < kRanks; ++rank) {
    const RankResult& result = results[rank];
    SCOPED_TRACE(absl::StrCat("rank ", rank));
    ASSERT_EQ(result.end, RankResult::End::kReturned);
    EXPECT_FALSE(result.status.ok());
    if (rank == GetParam()) continue;
    EXPECT_EQ(result.status.code(), absl::StatusCode::kDeadlineExceeded);
    // Without rank 0 nobody tells who is behind.
    EXPECT_THAT(std::string(result.status.message()),
                AnyOf(HasSubstr(absl::StrCat("rank ", GetParam(),
                                             " (does not answer)")),
                      HasSubstr("rank 0")));
    double took = 0;
    ASSERT_TRUE(absl::SimpleAtod(result.values.at("took"), &took));
    EXPECT_LT(took, 20);  // and not the ten minutes of other calls
  }
}

INSTANTIATE_TEST_SUITE_P(Rank, DepartureTest, ::testing::Range(0, kRanks),
                         [](const auto& info) {
                           return absl::StrCat(info.param);
                         });

}  // namespace
}  // namespace dsd
