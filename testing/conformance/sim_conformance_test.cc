// SPDX-License-Identifier: Apache-2.0
//
// Runs the cases on simulated ranks, but for those of the machine's memory and
// descriptors: each on 1 to 4 of them with several orders of events, and the
// small ones on up to 64.

#include <algorithm>
#include <ostream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/backends/sim/simulation.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/testing/conformance/conformance.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

constexpr int kMaxRanks = 4;
constexpr int kManyRanks[] = {8, 16, 64};

// Cases whose bytes grow with the square of the ranks.
bool IsHeavy(absl::string_view name) {
  for (const absl::string_view part :
       {"Of64MiB", "OfEqualAndUnequalParts", "BlobsOfAnySize", "FromEachRoot",
        "AllToAll", "PendingExchangesOverlap", "ReductionsOfFloats",
        "ReductionsOfIntegers", "ReductionsOfManyElements", "ToMany", "OfMany",
        "Split", "Scatter"}) {
    if (absl::StrContains(name, part)) return true;
  }
  return false;
}

struct Parameter {
  ConformanceCase one;
  int ranks;
};

void PrintTo(const Parameter& parameter, std::ostream* os) {
  *os << parameter.one.name << " on " << parameter.ranks << " ranks";
}

std::vector<Parameter> Parameters() {
  std::vector<Parameter> parameters;
  for (const ConformanceCase& one : ConformanceCases()) {
    for (int ranks = one.min_ranks; ranks <= std::min(kMaxRanks, one.max_ranks);
         ++ranks) {
      parameters.push_back({one, ranks});
    }
    if (IsHeavy(one.name)) continue;
    for (const int ranks : kManyRanks) {
      if (ranks >= one.min_ranks && ranks <= one.max_ranks) {
        parameters.push_back({one, ranks});
      }
    }
  }
  return parameters;
}

class SimConformanceTest : public ::testing::TestWithParam<Parameter> {};

TEST_P(SimConformanceTest, Passes) {
  const auto& [one, ranks] = GetParam();
  const int seeds = IsHeavy(one.name) || ranks > 8 ? 1 : DSD_SEEDS;
  for (int seed = 1; seed <= seeds; ++seed) {
    sim::SimulationOptions options;
    if (seed > 1) options = sim::SimulationOptions::FromSeed(seed);
    // Cases wait for what they cause for seconds, not for megabytes at
    // megabytes per second.
    options.link.bytes_per_second = 1e10;
    sim::Simulation simulation(options);
    absl::Mutex mu;
    int connected = 0;
    sim::RanksOptions ranks_options;
    ranks_options.shutdown = false;
    const sim::Outcome outcome = simulation.Run(
        ranks,
        [&, body = one.body](Communicator& comm) -> absl::Status {
          {
            // One that fails the group at once would else fail the others'
            // connecting.
            const auto all = [&] { return connected == comm.size(); };
            absl::MutexLock lock(&mu);
            ++connected;
            comm.env()->Await(mu, absl::Condition(&all),
                              comm.env()->Now() + absl::Minutes(5));
          }
          DSD_RETURN_IF_ERROR(body(comm));
          return comm.status().ok() ? comm.Shutdown() : absl::OkStatus();
        },
        ranks_options);
    EXPECT_THAT(outcome.Survivors(), AllOk()) << "seed " << seed;
  }
}

INSTANTIATE_TEST_SUITE_P(All, SimConformanceTest,
                         ::testing::ValuesIn(Parameters()),
                         [](const auto& info) {
                           return absl::StrCat(info.param.one.name, "_",
                                               info.param.ranks);
                         });

}  // namespace
}  // namespace dsd
