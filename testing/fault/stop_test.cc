// SPDX-License-Identifier: Apache-2.0
//
// SIGSTOP, at every stage, of every rank: nothing is closed, but no sign of
// life comes any more. Each survivor gets an error that names the rank, and so
// does the rank itself when it goes on.

#include <signal.h>

#include <iterator>
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

struct World {
  int ranks;
  // How many ranks are connected to rank 0 and relay for the others.
  const char* control_fan_out;
};
constexpr World kWorlds[] = {{3, "64"}, {4, "2"}};
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

void ExpectStopReported(int stopped, absl::Span<const RankResult> results) {
  for (int rank = 0; rank < static_cast<int>(results.size()); ++rank) {
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

// Jobs that only wait do so all at the same time, from before the first test.
class StopTest : public ::testing::Test {
 protected:
  // A job of which one rank stops itself, for each rank of each world.
  struct StoppingJob {
    std::string program;
    World world;
    int stopped;
    std::unique_ptr<RankProcesses> processes;
  };
  struct Jobs {
    std::vector<StoppingJob> stopping;
    // Stopped from outside, and gone on since.
    std::vector<std::unique_ptr<RankProcesses>> whole, without_heartbeats;
  };

  static void SetUpTestSuite() {
    jobs_ = new Jobs;
    for (const World& world : kWorlds) {
      for (const char* program :
           {"StopBeforeABarrier", "StopInAnExchange", "StopWhileConnecting"}) {
        for (int stopped = 0; stopped < world.ranks; ++stopped) {
          jobs_->stopping.push_back(
              {program, world, stopped,
               Start(world, program, kBound, absl::StrCat(stopped))});
        }
      }
      jobs_->whole.push_back(Start(world, "BarrierAfterAPause", kBound));
      jobs_->without_heartbeats.push_back(
          Start(world, "BarrierAfterAPause", absl::ZeroDuration()));
    }
    for (size_t i = 0; i < std::size(kWorlds); ++i) {
      for (int rank = 0; rank < kWorlds[i].ranks; ++rank) {
        EXPECT_TRUE(jobs_->whole[i]->WaitFor(rank, "connected"));
        EXPECT_TRUE(jobs_->without_heartbeats[i]->WaitFor(rank, "connected"));
      }
    }
    SignalTheOutside(SIGSTOP);
    Env::Real()->SleepUntil(Env::Real()->Now() + 2 * kBound);
    SignalTheOutside(SIGCONT);
    for (size_t i = 0; i < std::size(kWorlds); ++i) {
      for (int rank = 0; rank < kWorlds[i].ranks; ++rank) {
        jobs_->whole[i]->Release(rank);
        jobs_->without_heartbeats[i]->Release(rank);
      }
    }
  }

  static void TearDownTestSuite() {
    delete jobs_;
    jobs_ = nullptr;
  }

  static std::unique_ptr<RankProcesses> Start(
      const World& world, const char* program, absl::Duration bound,
      const std::string& argument = "") {
    RankRunOptions options;
    options.argument = argument;
    options.environment = {
        {"DSD_HEARTBEAT_SECONDS", absl::StrCat(absl::ToInt64Seconds(bound))},
        {"DSD_CONTROL_FAN_OUT", world.control_fan_out}};
    return std::make_unique<RankProcesses>(world.ranks, program, options);
  }

  static void SignalTheOutside(int signal) {
    for (size_t i = 0; i < std::size(kWorlds); ++i) {
      for (int rank = 0; rank < kWorlds[i].ranks; ++rank) {
        jobs_->whole[i]->Signal(rank, signal);
      }
      jobs_->without_heartbeats[i]->Signal(1, signal);
    }
  }

  static void ExpectStopsReported(absl::string_view program) {
    for (StoppingJob& job : jobs_->stopping) {
      if (job.program != program) continue;
      SCOPED_TRACE(absl::StrCat("rank ", job.stopped, " of ", job.world.ranks,
                                " is stopped"));
      // The others end by themselves.
      for (int rank = 0; rank < job.world.ranks; ++rank) {
        if (rank != job.stopped) job.processes->WaitFor(rank, "never");
      }
      job.processes->Signal(job.stopped, SIGCONT);
      ExpectStopReported(job.stopped, job.processes->Wait());
    }
  }

  static Jobs* jobs_;
};

StopTest::Jobs* StopTest::jobs_ = nullptr;

TEST_F(StopTest, WhileTheOthersWaitInABarrier) {
  ExpectStopsReported("StopBeforeABarrier");
}

TEST_F(StopTest, InAnExchange) { ExpectStopsReported("StopInAnExchange"); }

TEST_F(StopTest, WhileConnecting) {
  ExpectStopsReported("StopWhileConnecting");
}

// As by Ctrl-Z: nobody has run, so nobody blames another.
TEST_F(StopTest, AJobThatIsStoppedAsAWholeGoesOn) {
  for (const auto& job : jobs_->whole) EXPECT_THAT(job->Wait(), AllRanksOk());
}

TEST_F(StopTest, WithoutHeartbeatsAStopIsNoDeath) {
  for (const auto& job : jobs_->without_heartbeats) {
    EXPECT_THAT(job->Wait(), AllRanksOk());
  }
}

}  // namespace
}  // namespace dsd
