// SPDX-License-Identifier: Apache-2.0
//
// Ranks on several hosts: what crosses the network between these.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "dsd/backends/sim/simulation.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/transfer/random_tensors.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::sim {
namespace {

using ::dsd::test::CheckSide;
using ::dsd::test::FillSide;
using ::dsd::test::OneToAll;
using ::dsd::test::Side;
using ::dsd::test::TensorCase;
using ::testing::ElementsAre;

SimulationOptions Hosts(int ranks_per_host) {
  SimulationOptions options;
  options.ranks_per_host = ranks_per_host;
  return options;
}

// What the ranks of each host got from others in the last run.
std::vector<int64_t> BytesFromOtherHosts(const Simulation& simulation,
                                         int ranks, int ranks_per_host) {
  std::vector<int64_t> bytes((ranks + ranks_per_host - 1) / ranks_per_host);
  for (const Simulation::LinkUse& link : simulation.link_use()) {
    if (link.from / ranks_per_host == link.to / ranks_per_host) continue;
    bytes[link.to / ranks_per_host] += link.bytes;
  }
  return bytes;
}

std::vector<int> Copy(absl::Span<const int> values) {
  return {values.begin(), values.end()};
}

TEST(HostsTest, AllRanksKnowThem) {
  for (int ranks = 1; ranks <= 9; ++ranks) {
    for (int ranks_per_host = 1; ranks_per_host <= 4; ++ranks_per_host) {
      Simulation simulation(Hosts(ranks_per_host));
      std::vector<std::vector<int>> known(ranks);
      EXPECT_THAT(simulation
                      .Run(ranks,
                           [&](Communicator& comm) {
                             known[comm.rank()] = Copy(comm.host_of_rank());
                             return absl::OkStatus();
                           })
                      .Survivors(),
                  AllOk());
      std::vector<int> expected;
      for (int r = 0; r < ranks; ++r) expected.push_back(r / ranks_per_host);
      for (const std::vector<int>& hosts : known) EXPECT_EQ(hosts, expected);
    }
  }
}

TEST(HostsTest, WithoutANameAllAreOnOne) {
  Simulation simulation({});
  EXPECT_THAT(simulation
                  .Run(3,
                       [](Communicator& comm) -> absl::Status {
                         EXPECT_THAT(comm.host_of_rank(), ElementsAre(0, 0, 0));
                         return absl::OkStatus();
                       })
                  .Survivors(),
              AllOk());
}

TEST(HostsTest, PartsOfAGroupHaveTheirOwnNumbers) {
  Simulation simulation(Hosts(2));
  EXPECT_THAT(
      simulation
          .Run(6,
               [](Communicator& comm) -> absl::Status {
                 DSD_ASSIGN_OR_RETURN(const auto lane, comm.OpenLane("more"));
                 EXPECT_THAT(lane->host_of_rank(),
                             ElementsAre(0, 0, 1, 1, 2, 2));
                 // Ranks 5, 4, 3 and 2, 1, 0.
                 DSD_ASSIGN_OR_RETURN(
                     const auto part,
                     comm.Split(comm.rank() / 3, -comm.rank()));
                 if (comm.rank() >= 3) {
                   EXPECT_THAT(part->host_of_rank(), ElementsAre(0, 0, 1));
                 } else {
                   EXPECT_THAT(part->host_of_rank(), ElementsAre(0, 1, 1));
                 }
                 return absl::OkStatus();
               })
          .Survivors(),
      AllOk());
}

TEST(HostsTest, ABroadcastReachesEachHostOnce) {
  constexpr int64_t kSizes[] = {0, 1000, 200 << 10, 1 << 20, 9 << 20};
  for (const auto& [ranks, ranks_per_host] :
       {std::pair(8, 2), std::pair(9, 3), std::pair(11, 4), std::pair(5, 1)}) {
    for (const int64_t size : kSizes) {
      for (int root = 0; root < ranks; root += 3) {
        Simulation simulation(Hosts(ranks_per_host));
        const auto bytes_with = [&](bool broadcast) {
          const Outcome outcome =
              simulation.Run(ranks, [&](Communicator& comm) -> absl::Status {
                std::vector<std::byte> data(
                    size, std::byte(comm.rank() == root ? 7 : 1));
                if (!broadcast) return absl::OkStatus();
                DSD_RETURN_IF_ERROR(comm.Broadcast(absl::MakeSpan(data), root));
                EXPECT_EQ(std::count(data.begin(), data.end(), std::byte(7)),
                          size)
                    << "rank " << comm.rank();
                return absl::OkStatus();
              });
          EXPECT_THAT(outcome.Survivors(), AllOk());
          return BytesFromOtherHosts(simulation, ranks, ranks_per_host);
        };
        const std::vector<int64_t> without = bytes_with(false);
        const std::vector<int64_t> with = bytes_with(true);
        for (size_t host = 0; host < with.size(); ++host) {
          const bool is_roots = static_cast<int>(host) == root / ranks_per_host;
          const int64_t more = with[host] - without[host];
          EXPECT_GE(more, is_roots ? 0 : size);
          // Headers of chunks; the rest of the connecting differs little.
          EXPECT_LE(more, (is_roots ? 0 : size) + size / 100 + 1000)
              << ranks << " ranks, " << ranks_per_host << " per host, root "
              << root << ", host " << host;
        }
      }
    }
  }
}

TEST(HostsTest, ATensorThatAllNeedReachesEachHostOnce) {
  constexpr int kRanks = 8;
  constexpr int kRanksPerHost = 4;
  constexpr int64_t kElements = 1 << 20;
  const std::vector<TensorCase> tensors = {OneToAll(kRanks, kElements)};
  Simulation simulation(Hosts(kRanksPerHost));
  const Outcome outcome =
      simulation.Run(kRanks, [&](Communicator& comm) -> absl::Status {
        Side source;
        Side target;
        DSD_RETURN_IF_ERROR(FillSide(tensors, comm.rank(), true, source));
        DSD_RETURN_IF_ERROR(FillSide(tensors, comm.rank(), false, target));
        DSD_RETURN_IF_ERROR(
            Redistribute(source.endpoint, target.endpoint, &comm).status());
        return CheckSide(tensors, comm.rank(), target);
      });
  EXPECT_THAT(outcome.Survivors(), AllOk());
  const std::vector<int64_t> bytes =
      BytesFromOtherHosts(simulation, kRanks, kRanksPerHost);
  constexpr int64_t kBytes = 4 * kElements;
  EXPECT_GE(bytes[1], kBytes);
  EXPECT_LE(bytes[1], kBytes + kBytes / 100);
  EXPECT_LE(bytes[0], kBytes / 100);
}

}  // namespace
}  // namespace dsd::sim
