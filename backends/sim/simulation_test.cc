// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/sim/simulation.h"

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::sim {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;

absl::Status SumOnce(Communicator& comm, size_t count) {
  std::vector<int32_t> data(count, comm.rank() + 1);
  const absl::Span<std::byte> bytes(reinterpret_cast<std::byte*>(data.data()),
                                    data.size() * sizeof(int32_t));
  CallOptions options;
  options.timeout = absl::Seconds(30);
  DSD_RETURN_IF_ERROR(
      comm.AllReduce(bytes, DType::kInt32, ReduceOp::kSum, options));
  const int sum = comm.size() * (comm.size() + 1) / 2;
  if (data[count / 2] != sum) return absl::InternalError("wrong sum");
  return absl::OkStatus();
}

Outcome RunSums(Simulation& simulation, int ranks) {
  return simulation.Run(ranks, [](Communicator& comm) -> absl::Status {
    for (const size_t count : {1, 100, 30000}) {
      DSD_RETURN_IF_ERROR(SumOnce(comm, count));
    }
    return absl::OkStatus();
  });
}

TEST(SimulationTest, RanksSum) {
  for (const int ranks : {1, 2, 3, 4, 16, 64}) {
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      Simulation simulation(SimulationOptions::FromSeed(seed));
      EXPECT_THAT(RunSums(simulation, ranks).Survivors(), AllOk())
          << ranks << " ranks, seed " << seed;
    }
  }
}

TEST(SimulationTest, TheSameSeedIsTheSameRun) {
  std::vector<uint64_t> traces;
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    std::vector<uint64_t> same;
    for (int round = 0; round < 2; ++round) {
      Simulation simulation(SimulationOptions::FromSeed(seed));
      simulation.AddFault(
          {static_cast<FaultKind>(seed % kNumFaultKinds),
           static_cast<int>(seed % 4), static_cast<int>((seed + 1) % 4),
           static_cast<int64_t>(seed % 9), absl::Milliseconds(seed)});
      RunSums(simulation, 4);
      same.push_back(simulation.scheduler().trace());
    }
    EXPECT_EQ(same[0], same[1]) << "seed " << seed;
    traces.push_back(same[0]);
  }
  std::sort(traces.begin(), traces.end());
  EXPECT_EQ(std::unique(traces.begin(), traces.end()), traces.end());
}

TEST(SimulationTest, ADeathAnywhereIsNamedByAllSurvivors) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Simulation simulation(SimulationOptions::FromSeed(seed));
    ASSERT_THAT(RunSums(simulation, 3).Survivors(), AllOk());
    const std::vector<Simulation::RankUse> use = simulation.rank_use();
    for (const int rank : {0, 2}) {
      ASSERT_GT(use[rank].places, 10);
      for (int64_t at = 1; at <= use[rank].places; ++at) {
        simulation.AddFault({FaultKind::kDeath, rank, 0, at});
        const Outcome outcome = RunSums(simulation, 3);
        const std::string where =
            absl::StrCat("seed ", seed, ", rank ", rank, " at ", at);
        ASSERT_TRUE(outcome.run.ok()) << where << outcome.run;
        if (!outcome.ranks[rank].died) continue;
        for (const absl::Status& status : outcome.Survivors()) {
          if (status.ok()) continue;  // it was through by then
          EXPECT_THAT(status.code(),
                      ::testing::AnyOf(absl::StatusCode::kUnavailable,
                                       absl::StatusCode::kDeadlineExceeded))
              << where << status;
          EXPECT_THAT(std::string(status.message()),
                      HasSubstr(absl::StrCat("rank ", rank)))
              << where;
        }
      }
    }
  }
}

TEST(SimulationTest, APauseWithinTheDeadlineIsHarmless) {
  Simulation simulation({});
  int64_t at = 0;
  do {
    simulation.AddFault({FaultKind::kPause, 1, 0, ++at, absl::Seconds(20)});
    EXPECT_THAT(RunSums(simulation, 3).Survivors(), AllOk());
  } while (simulation.faults()[0].fired > 0);
  EXPECT_GT(at, 10);
}

TEST(SimulationTest, APauseBeyondItIsNamed) {
  SimulationOptions options;
  options.store_at_rank0 = false;
  Simulation simulation(options);
  // After connecting.
  simulation.AddFault({FaultKind::kPause, 1, 0, 20, absl::Hours(1)});
  const Outcome outcome = RunSums(simulation, 3);
  EXPECT_THAT(outcome.Survivors(),
              Each(IsStatus(absl::StatusCode::kDeadlineExceeded, "rank 1")));
  EXPECT_THAT(outcome.ranks[0].status.message(), HasSubstr("does not answer"));
}

// In each stage of connecting.
TEST(SimulationTest, APauseWhileConnectingIsNamed) {
  SimulationOptions options;
  options.store_at_rank0 = false;
  Simulation simulation(options);
  RanksOptions ranks;
  ranks.connect_timeout = absl::Seconds(10);
  for (int64_t at = 1; at < 12; ++at) {
    simulation.AddFault({FaultKind::kPause, 0, 0, at, absl::Hours(1)});
    const Outcome outcome = simulation.Run(
        3, [](Communicator& comm) { return comm.Barrier(); }, ranks);
    for (const int rank : {1, 2}) {
      const absl::Status& status = outcome.ranks[rank].status;
      // Later on it is the barrier that waits.
      if (!absl::StrContains(status.message(), "connect")) continue;
      EXPECT_THAT(status,
                  IsStatus(absl::StatusCode::kDeadlineExceeded, "rank 0"));
      EXPECT_THAT(status,
                  IsStatus(absl::StatusCode::kDeadlineExceeded, "within 10s"));
    }
  }
}

TEST(SimulationTest, WhoDoesNotTakeAMessageIsNamed) {
  SimulationOptions options;
  options.link.eager_bytes = -1;
  Simulation simulation(options);
  const Outcome outcome =
      simulation.Run(3, [](Communicator& comm) -> absl::Status {
        std::vector<std::byte> data(20000);
        CallOptions call;
        call.timeout = absl::Seconds(10);
        if (comm.rank() == 0) return comm.Exchange({{2, data}}, {}, "x", call);
        comm.env()->SleepUntil(comm.env()->Now() + absl::Minutes(1));
        return comm.status();
      });
  for (const absl::Status& status : outcome.Survivors()) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kDeadlineExceeded,
                                 "not all messages to rank 2 were taken"));
  }
}

TEST(SimulationTest, DelaysAndReorderingAreHarmless) {
  Simulation simulation({});
  for (int64_t at = 0; at < 8; ++at) {
    simulation.AddFault({FaultKind::kDelay, 1, 2, at, absl::Seconds(5)});
    EXPECT_THAT(RunSums(simulation, 3).Survivors(), AllOk());
  }
  simulation.AddFault({FaultKind::kReorder, 0, 0, 0, absl::Milliseconds(3)});
  EXPECT_THAT(RunSums(simulation, 3).Survivors(), AllOk());
  EXPECT_GT(simulation.faults()[0].fired, 0);
}

TEST(SimulationTest, LinksMayBeOfDifferentSpeed) {
  SimulationOptions options;
  options.link.bytes_per_second = 1e6;
  options.link.slowest_link = 100;
  Simulation simulation(options);
  std::vector<absl::Duration> took;
  const Outcome outcome =
      simulation.Run(6, [&](Communicator& comm) -> absl::Status {
        std::vector<std::byte> data(100000);
        for (int sender = 0; sender < 5; ++sender) {
          const absl::Time start = comm.env()->Now();
          if (comm.rank() == sender) {
            DSD_RETURN_IF_ERROR(comm.Exchange({{sender + 1, data}}, {}, "x"));
          } else if (comm.rank() == sender + 1) {
            DSD_RETURN_IF_ERROR(
                comm.Exchange({}, {{sender, absl::MakeSpan(data)}}, "x"));
            took.push_back(comm.env()->Now() - start);
          }
          DSD_RETURN_IF_ERROR(comm.Barrier());
        }
        return absl::OkStatus();
      });
  ASSERT_THAT(outcome.Survivors(), AllOk());
  ASSERT_THAT(took, SizeIs(5));
  std::sort(took.begin(), took.end());
  EXPECT_GT(took[0], absl::Milliseconds(99));
  EXPECT_LT(took[4], absl::Seconds(11));
  EXPECT_GT(took[4], 3 * took[0]);
}

// A rank that has a collective call behind it, and is in an exchange by then,
// is not in disagreement with those that wait in the call.
TEST(SimulationTest, ARankThatIsAheadIsNotTakenForOneThatDisagrees) {
  const auto body = [](Communicator& comm) -> absl::Status {
    CallOptions options;
    options.timeout = absl::Seconds(10);
    std::string value(1, 'x');
    DSD_RETURN_IF_ERROR(comm.AllGatherBlobs(value, 1, options).status());
    std::vector<std::byte> data(1);
    const int other = 2 - comm.rank();
    if (other == 1) return absl::OkStatus();
    return comm.Exchange({{other, data}}, {{other, absl::MakeSpan(data)}},
                         "later", options);
  };
  Simulation simulation({});
  ASSERT_THAT(simulation.Run(3, body).ranks[1].status, absl::OkStatus());
  bool found = false;
  for (int64_t at = 0; at < 6; ++at) {
    simulation.AddFault({FaultKind::kDelay, 1, 2, at, absl::Minutes(1)});
    const Outcome outcome = simulation.Run(3, body);
    for (const absl::Status& status : outcome.Survivors()) {
      if (status.ok()) continue;
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kDeadlineExceeded,
                                   "did not finish within 10s"));
      found |= absl::StrContains(status.message(), "from rank 1");
    }
  }
  EXPECT_TRUE(found);
}

// Rank 2 is late, rank 1 waits for it, rank 0 for rank 1: which is not to
// blame, also when rank 2 is back before the time is over.
TEST(SimulationTest, WhomAMissingRankWaitedForIsNamed) {
  for (const absl::Duration late :
       {absl::Milliseconds(9990), absl::Milliseconds(10005)}) {
    Simulation simulation({});
    const Outcome outcome =
        simulation.Run(3, [&](Communicator& comm) -> absl::Status {
          CallOptions options;
          options.timeout = absl::Seconds(10);
          const int rank = comm.rank();
          std::vector<std::byte> data(1);
          if (rank == 2) comm.env()->SleepUntil(comm.env()->Now() + late);
          if (rank < 2) {
            DSD_RETURN_IF_ERROR(comm.Exchange(
                {}, {{rank + 1, absl::MakeSpan(data)}}, "pass on", options));
          }
          if (rank == 1) {
            comm.env()->SleepUntil(comm.env()->Now() + absl::Milliseconds(50));
          }
          if (rank > 0) {
            DSD_RETURN_IF_ERROR(
                comm.Exchange({{rank - 1, data}}, {}, "pass on", options));
          }
          return comm.Barrier(options);
        });
    EXPECT_THAT(outcome.ranks[0].status,
                IsStatus(absl::StatusCode::kDeadlineExceeded, "for rank 2"));
  }
}

// Whoever gives up first answers the others' questions all the same.
TEST(SimulationTest, DifferentRootsAreADisagreementWhoeverGivesUpFirst) {
  for (const int ranks : {2, 3, 4}) {
    for (uint64_t seed = 1; seed <= 200; ++seed) {
      Simulation simulation(SimulationOptions::FromSeed(seed));
      const Outcome outcome =
          simulation.Run(ranks, [](Communicator& comm) -> absl::Status {
            std::vector<std::byte> data(100);
            CallOptions options;
            options.timeout = absl::Seconds(1);
            return comm.Broadcast(absl::MakeSpan(data),
                                  comm.rank() == 0 ? 1 : 0, options);
          });
      // One that got the bytes of its root may be through.
      int failed = 0;
      for (const absl::Status& status : outcome.Survivors()) {
        if (status.ok()) continue;
        ++failed;
        EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                     "ranks disagree"))
            << ranks << " ranks, seed " << seed;
      }
      EXPECT_GE(failed, 2) << ranks << " ranks, seed " << seed;
    }
  }
}

TEST(SimulationTest, ALostLinkIsNamed) {
  for (const FaultKind kind :
       {FaultKind::kDisconnect, FaultKind::kShortTransfer}) {
    Simulation simulation({});
    for (int64_t at = 0; at < 8; ++at) {
      simulation.AddFault({kind, 1, 2, at});
      const Outcome outcome = RunSums(simulation, 3);
      if (simulation.faults()[0].fired == 0) continue;
      EXPECT_THAT(outcome.Survivors(),
                  Each(IsStatus(absl::StatusCode::kUnavailable, "was lost")));
    }
  }
}

// All ranks but one learn an error together and leave. The one that has lost a
// link in the last message says so, not only that the others left.
TEST(SimulationTest, ALostLinkIsNamedToOneWhoseVerdictWasOnIt) {
  const auto body = [](Communicator& comm) -> absl::Status {
    DSD_RETURN_IF_ERROR(comm.AllGatherBlobs("x", 1).status());
    return absl::NotFoundError("no such checkpoint");
  };
  Simulation simulation({});
  bool left = false;
  for (int64_t at = 0; at < 6; ++at) {
    simulation.AddFault({FaultKind::kShortTransfer, 2, 1, at});
    for (const absl::Status& status : simulation.Run(3, body).Survivors()) {
      if (absl::IsNotFound(status)) continue;
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kUnavailable, "was lost"));
      left |= absl::StrContains(status.message(), "left group");
    }
  }
  EXPECT_TRUE(left);
}

// An engine is trusted with the bytes: what a link changes is found only where
// a digest or a header covers it.
TEST(SimulationTest, ACorruptByteEndsNothing) {
  int wrong = 0;
  Simulation simulation({});
  for (int64_t at = 0; at < 12; ++at) {
    simulation.AddFault({FaultKind::kCorruptByte, 1, 2, at});
    const Outcome outcome = RunSums(simulation, 3);
    EXPECT_TRUE(outcome.run.ok()) << outcome.run;
    for (const RankOutcome& rank : outcome.ranks) wrong += !rank.status.ok();
  }
  EXPECT_GT(wrong, 0);
}

TEST(SimulationTest, RanksShareADisk) {
  Simulation simulation({});
  const auto run = [&] {
    return simulation.RunProcesses(
        2,
        [](int rank, SimEnv& env,
           const std::shared_ptr<Store>& store) -> absl::Status {
          const absl::Time deadline = env.Now() + absl::Seconds(10);
          if (rank == 0) {
            DSD_ASSIGN_OR_RETURN(auto file, env.files().CreateWritable("/f"));
            const std::byte bytes[] = {std::byte{1}, std::byte{2}};
            DSD_RETURN_IF_ERROR(file->WriteAt(0, bytes));
            DSD_RETURN_IF_ERROR(file->Sync());
            DSD_RETURN_IF_ERROR(env.files().SyncDir("/"));
            return store->Set("written", "yes", deadline);
          }
          DSD_RETURN_IF_ERROR(store->Get("written", deadline).status());
          DSD_ASSIGN_OR_RETURN(auto file, env.files().OpenReadable("/f"));
          std::byte bytes[2];
          DSD_RETURN_IF_ERROR(file->ReadAt(0, absl::MakeSpan(bytes)));
          return bytes[1] == std::byte{2} ? absl::OkStatus()
                                          : absl::InternalError("wrong bytes");
        });
  };
  EXPECT_THAT(run().Survivors(), AllOk());
  ASSERT_TRUE(simulation.disk().Remove("/f").ok());

  simulation.AddFault({FaultKind::kNoSpace, 0, 0, 1});
  const Outcome full = run();
  EXPECT_THAT(full.ranks[0].status,
              IsStatus(absl::StatusCode::kResourceExhausted, "\"/f\""));
  EXPECT_THAT(full.ranks[1].status,
              IsStatus(absl::StatusCode::kDeadlineExceeded, "written"));
  ASSERT_TRUE(simulation.disk().Remove("/f").ok());

  simulation.AddFault({FaultKind::kIoError, 0, 0, 2});
  EXPECT_THAT(run().ranks[0].status,
              IsStatus(absl::StatusCode::kUnavailable, "I/O error"));
  ASSERT_TRUE(simulation.disk().Remove("/f").ok());

  simulation.AddFault({FaultKind::kTornWrite, 0, 0, 0});
  EXPECT_TRUE(run().ranks[0].died);
  EXPECT_TRUE(simulation.disk().Remove("/f").ok());

  simulation.AddFault({FaultKind::kPowerLoss, 0, 0, 3});
  EXPECT_THAT(run().Survivors(), IsEmpty());
  ASSERT_TRUE(simulation.lost_power());
  simulation.Recover();
  // The content was synced, its name may be lost.
  const auto content = simulation.disk().Content("/f");
  if (content.ok()) {
    EXPECT_EQ(*content, "\x01\x02");
  }
}

}  // namespace
}  // namespace dsd::sim
