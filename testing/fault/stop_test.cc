// SPDX-License-Identifier: Apache-2.0
//
// SIGSTOP, at every stage, of every rank: nothing is closed, but no sign of
// life comes any more. Each survivor gets an error that names the rank, and so
// does the rank itself when it goes on.

#include <signal.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "dsd/backends/gloo/gloo_backend.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/testing/harness/rank_processes.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;

constexpr int kRanks = DSD_RANKS;
// As short as a busy machine allows: who runs at all must run once in it.
constexpr absl::Duration kBound = absl::Seconds(4);
// Of calls that have ten minutes, after a rank has stopped.
constexpr absl::Duration kKnown = absl::Seconds(19);

bool IsTheOne(const RankContext& rank) {
  return rank.argument() == absl::StrCat(rank.rank());
}

absl::Status Stamped(RankContext& rank, absl::Time start,
                     const absl::Status& status) {
  rank.Record("took", absl::FormatDuration(Env::Real()->Now() - start));
  return status;
}

DSD_RANK_PROGRAM(StopBeforeABarrier) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("gloo"));
  DSD_RETURN_IF_ERROR(comm->Barrier());
  const absl::Time start = comm->env()->Now();
  if (IsTheOne(rank)) raise(SIGSTOP);
  return Stamped(rank, start, comm->Barrier());
}

// Between posting and waiting, when its bytes are on the wire both ways.
DSD_RANK_PROGRAM(StopInAnExchange) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("gloo"));
  const int next = (comm->rank() + 1) % comm->size();
  const int previous = (comm->rank() + comm->size() - 1) % comm->size();
  const std::vector<std::byte> out(size_t{64} << 20, std::byte{1});
  std::vector<std::byte> in(out.size());
  const absl::Time start = comm->env()->Now();
  DSD_ASSIGN_OR_RETURN(
      PendingExchange pending,
      comm->StartExchange({{next, out}}, {{previous, absl::MakeSpan(in)}},
                          "transfer model.w"));
  if (IsTheOne(rank)) raise(SIGSTOP);
  // A rank that is done with the stopped one waits for it here.
  absl::Status status = pending.Wait();
  if (status.ok()) status = comm->Barrier();
  return Stamped(rank, start, status);
}

DSD_RANK_PROGRAM(StopWhileConnecting) {
  static RankContext* const context = &rank;
  static BackendDescriptor descriptor = GlooBackend();
  descriptor.create = [](const EngineOptions& options) {
    if (IsTheOne(*context)) raise(SIGSTOP);
    return GlooBackend().create(options);
  };
  WorldOptions options;
  options.descriptor = &descriptor;
  const absl::Time start = Env::Real()->Now();
  return Stamped(rank, start, ConnectWorld(rank.launch(), options).status());
}

DSD_RANK_PROGRAM(BarrierAfterAPause) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("gloo"));
  DSD_RETURN_IF_ERROR(rank.Pause("connected"));
  DSD_RETURN_IF_ERROR(comm->Barrier());
  return comm->Shutdown();
}

RankRunOptions WithBound(absl::Duration bound) {
  RankRunOptions options;
  options.environment = {
      {"DSD_HEARTBEAT_SECONDS", absl::StrCat(absl::ToInt64Seconds(bound))}};
  return options;
}

void ExpectStopReported(int stopped, absl::Span<const RankResult> results) {
  for (int rank = 0; rank < kRanks; ++rank) {
    const RankResult& result = results[rank];
    SCOPED_TRACE(
        absl::StrCat("rank ", rank, ": ", ::testing::PrintToString(result)));
    ASSERT_EQ(result.end, RankResult::End::kReturned);
    EXPECT_EQ(result.status.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(result.status.message()),
                HasSubstr(absl::StrCat("rank ", stopped, " does not answer")));
    if (rank == stopped) continue;
    absl::Duration took;
    ASSERT_TRUE(absl::ParseDuration(result.values.at("took"), &took));
    EXPECT_LT(took, kKnown);
  }
}

// A job for each rank that is stopped, all at the same time: they only wait.
void ExpectStopsReported(absl::string_view program) {
  std::vector<std::unique_ptr<RankProcesses>> jobs;
  for (int stopped = 0; stopped < kRanks; ++stopped) {
    RankRunOptions options = WithBound(kBound);
    options.argument = absl::StrCat(stopped);
    jobs.push_back(std::make_unique<RankProcesses>(kRanks, program, options));
  }
  for (int stopped = 0; stopped < kRanks; ++stopped) {
    SCOPED_TRACE(absl::StrCat("rank ", stopped, " is stopped"));
    // The others end by themselves.
    for (int rank = 0; rank < kRanks; ++rank) {
      if (rank != stopped) jobs[stopped]->WaitFor(rank, "never");
    }
    jobs[stopped]->Signal(stopped, SIGCONT);
    ExpectStopReported(stopped, jobs[stopped]->Wait());
  }
}

TEST(StopTest, WhileTheOthersWaitInABarrier) {
  ExpectStopsReported("StopBeforeABarrier");
}

TEST(StopTest, InAnExchange) { ExpectStopsReported("StopInAnExchange"); }

TEST(StopTest, WhileConnecting) { ExpectStopsReported("StopWhileConnecting"); }

// As by Ctrl-Z: nobody has run, so nobody blames another.
TEST(StopOfAllTest, AJobThatIsStoppedAsAWholeGoesOn) {
  RankProcesses processes(kRanks, "BarrierAfterAPause", WithBound(kBound));
  for (int rank = 0; rank < kRanks; ++rank) {
    ASSERT_TRUE(processes.WaitFor(rank, "connected"));
  }
  for (int rank = 0; rank < kRanks; ++rank) processes.Signal(rank, SIGSTOP);
  Env::Real()->SleepUntil(Env::Real()->Now() + 2 * kBound);
  for (int rank = 0; rank < kRanks; ++rank) processes.Signal(rank, SIGCONT);
  for (int rank = 0; rank < kRanks; ++rank) processes.Release(rank);
  EXPECT_THAT(processes.Wait(), AllRanksOk());
}

TEST(StopOfAllTest, WithoutHeartbeatsAStopIsNoDeath) {
  RankProcesses processes(kRanks, "BarrierAfterAPause",
                          WithBound(absl::ZeroDuration()));
  for (int rank = 0; rank < kRanks; ++rank) {
    ASSERT_TRUE(processes.WaitFor(rank, "connected"));
  }
  processes.Signal(1, SIGSTOP);
  Env::Real()->SleepUntil(Env::Real()->Now() + kBound);
  processes.Signal(1, SIGCONT);
  for (int rank = 0; rank < kRanks; ++rank) processes.Release(rank);
  EXPECT_THAT(processes.Wait(), AllRanksOk());
}

}  // namespace
}  // namespace dsd
