// SPDX-License-Identifier: Apache-2.0
//
// One job over every backend: sharded training, a full get, a save, a set from
// one rank and a load give the same bits, whatever moves them.

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/backends/sim/simulation.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/testing/composition/sharded_job.h"
#include "dsd/testing/harness/rank_processes.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::BitsOfShardedJob;

constexpr int kRanks = 3;  // shards of 13 rows are uneven

DSD_RANK_PROGRAM(JobOverABackend) {
  // The argument is the backend and a directory.
  const std::string& argument = rank.argument();
  const size_t space = argument.find(' ');
  DSD_ASSIGN_OR_RETURN(const auto comm,
                       rank.Connect(argument.substr(0, space)));
  DSD_ASSIGN_OR_RETURN(const std::string bits,
                       BitsOfShardedJob(*comm, argument.substr(space + 1)));
  rank.Record("bits", bits);
  return comm->Shutdown();
}

std::string Directory(absl::string_view backend) {
  return absl::StrCat(testing::TempDir(), "/same_bits_", backend);
}

TEST(SameBitsTest, OfOneJobOverEveryBackend) {
  std::vector<std::string> expected(kRanks);
  ASSERT_THAT(RunRankThreads(kRanks,
                             [&](Communicator& comm) -> absl::Status {
                               DSD_ASSIGN_OR_RETURN(
                                   expected[comm.rank()],
                                   BitsOfShardedJob(comm, Directory("local")));
                               return absl::OkStatus();
                             }),
              AllOk());
  EXPECT_NE(expected[0], expected[1]);  // ranks hold different shards

  for (const std::string backend : {"gloo", "ucx", "c10d"}) {
    RankRunOptions options;
    options.argument = absl::StrCat(backend, " ", Directory(backend));
    const std::vector<RankResult> results =
        RunRanks(kRanks, "JobOverABackend", options);
    ASSERT_THAT(results, AllRanksOk()) << backend;
    for (int rank = 0; rank < kRanks; ++rank) {
      EXPECT_EQ(results[rank].values.at("bits"), expected[rank])
          << backend << ", rank " << rank;
    }
  }

  std::vector<std::string> simulated(kRanks);
  sim::Simulation simulation(sim::SimulationOptions::FromSeed(7));
  const sim::Outcome outcome =
      simulation.Run(kRanks, [&](Communicator& comm) -> absl::Status {
        DSD_ASSIGN_OR_RETURN(simulated[comm.rank()],
                             BitsOfShardedJob(comm, "/simulated"));
        return absl::OkStatus();
      });
  EXPECT_EQ(outcome.run, absl::OkStatus());
  EXPECT_THAT(outcome.Survivors(), AllOk());
  EXPECT_EQ(simulated, expected);
}

}  // namespace
}  // namespace dsd
