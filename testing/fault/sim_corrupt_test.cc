// SPDX-License-Identifier: Apache-2.0
//
// Whatever a byte between two ranks becomes, a save and a load come to an end:
// no crash, no memory without bounds.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "dsd/backends/sim/simulation.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/test_state.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

constexpr int kRanks = 2;
constexpr char kDir[] = "/job";

std::vector<TestTensor> Tensors() {
  const DeviceMesh mesh = DeviceMesh::Iota({kRanks});
  return {{{std::string("w")},
           DType::kFloat32,
           *Layout::FromPlacements({8, 8}, mesh, {Shard(0)})},
          {{std::string("b")},
           DType::kBFloat16,
           *Layout::FromPlacements({6}, mesh, {Replicate()})}};
}

std::vector<ObjectEntry> Objects() {
  return {{{std::string("step")}, Object(int64_t{7})}};
}

absl::Status SaveOnce(Communicator& comm) {
  TestState state = TestState::Filled(Tensors(), comm.rank(), 1, Objects());
  return Save(kDir, state.state(), &comm).status();
}

absl::Status LoadOnce(Communicator& comm) {
  TestState state = TestState::Blank(Tensors(), comm.rank(), Objects());
  return Load(kDir, state.state(), &comm).status();
}

using Body = absl::Status (*)(Communicator& comm);

// A byte of each message in turn, many times over.
void RunCorrupted(Body body) {
  int64_t errors = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    sim::SimulationOptions options;
    options.seed = seed;
    sim::Simulation simulation(options);
    for (const absl::Status& status :
         simulation.Run(kRanks, SaveOnce).Survivors()) {
      ASSERT_TRUE(status.ok()) << status;
    }
    for (const absl::Status& status :
         simulation.Run(kRanks, body).Survivors()) {
      ASSERT_TRUE(status.ok()) << status;
    }
    for (const auto& link :
         std::vector<sim::Simulation::LinkUse>(simulation.link_use())) {
      for (int64_t at = 0; at < link.messages; ++at) {
        simulation.AddFault(
            {sim::FaultKind::kCorruptByte, link.from, link.to, at});
        const sim::Outcome outcome = simulation.Run(kRanks, body);
        ASSERT_TRUE(outcome.run.ok()) << outcome.run;
        for (const absl::Status& status : outcome.Survivors()) {
          errors += !status.ok();
        }
      }
    }
  }
  EXPECT_GT(errors, 100);
}

TEST(SimCorruptTest, ASaveEnds) { RunCorrupted(SaveOnce); }
TEST(SimCorruptTest, ALoadEnds) { RunCorrupted(LoadOnce); }

}  // namespace
}  // namespace dsd::checkpoint
