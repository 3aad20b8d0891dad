// SPDX-License-Identifier: Apache-2.0
//
// Many simulated jobs with faults. DSD_SIM_SEEDS says how many (default: the
// argument), DSD_SIM_FIRST_SEED where to begin (default: 1).

#include "dsd/testing/fault/sim_seed.h"

#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

uint64_t g_seeds = 300;
// The one that runs, for who aborts.
uint64_t g_seed = 0;

constexpr char kRepeat[] =
    "./bazelw test //testing/fault:sim_seed_test "
    "--test_filter=SimSeedTest.AllSeedsEndWell --test_env=DSD_SIM_SEEDS=1 "
    "--test_env=DSD_SIM_FIRST_SEED=";

void TellSeed(int signal) {
  char text[512];
  const int length =
      std::snprintf(text, sizeof(text),
                    "the process ends in seed %llu\n  repeat it: %s%llu\n",
                    static_cast<unsigned long long>(g_seed), kRepeat,
                    static_cast<unsigned long long>(g_seed));
  if (write(STDERR_FILENO, text, length) < 0) _exit(1);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* const text = std::getenv(name);
  uint64_t value;
  return text != nullptr && absl::SimpleAtoi(text, &value) ? value : otherwise;
}

std::string Describe(uint64_t seed, const SeedResult& result) {
  return absl::StrCat(
      "seed ", seed, ": ", result.scenario, ", ",
      absl::StrJoin(result.faults, "; ",
                    [](std::string* out, const sim::Fault& fault) {
                      absl::StrAppend(out, sim::ToString(fault));
                    }),
      "\n  ", result.failure, "\n  repeat it: ", kRepeat, seed);
}

TEST(SimSeedTest, AllSeedsEndWell) {
  const uint64_t seeds = FromEnvironment("DSD_SIM_SEEDS", g_seeds);
  const uint64_t first = FromEnvironment("DSD_SIM_FIRST_SEED", 1);
  std::array<int64_t, sim::kNumFaultKinds> fired{};
  int64_t steps = 0;
  uint64_t trace = 0;
  int failures = 0;
  const absl::Time start = absl::Now();
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    g_seed = seed;
    const SeedResult result = RunSeed(seed);
    steps += result.steps;
    trace = trace * 31 + result.trace;
    for (int kind = 0; kind < sim::kNumFaultKinds; ++kind) {
      for (const sim::Fault& fault : result.faults) {
        if (static_cast<int>(fault.kind) == kind && fault.fired > 0) {
          ++fired[kind];
          break;
        }
      }
    }
    if (!result.failure.empty()) {
      ADD_FAILURE() << Describe(seed, result);
      if (++failures == 20) break;
    }
  }
  const double ms = absl::ToDoubleMilliseconds(absl::Now() - start);
  std::cout << seeds << " seeds from " << first << ", " << ms / seeds
            << " ms and " << steps / seeds << " steps each, trace "
            << absl::StrCat(absl::Hex(trace))
            << "; seeds in which each fault happened:\n";
  for (int kind = 0; kind < sim::kNumFaultKinds; ++kind) {
    std::cout << "  " << sim::ToString(static_cast<sim::FaultKind>(kind))
              << ": " << fired[kind] << "\n";
    if (seeds >= 300 && failures == 0) {
      EXPECT_GE(fired[kind] * 100, static_cast<int64_t>(seeds))
          << sim::ToString(static_cast<sim::FaultKind>(kind));
    }
  }
}

TEST(SimSeedTest, TheSameSeedIsTheSameRun) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    const SeedResult first = RunSeed(seed);
    const SeedResult second = RunSeed(seed);
    EXPECT_EQ(first.trace, second.trace) << "seed " << seed;
    EXPECT_EQ(first.steps, second.steps) << "seed " << seed;
  }
}

// How many seeds it takes until the bug is found.
uint64_t SeedsUntil(PlantedBug bug) {
  for (uint64_t seed = 1; seed <= 2000; ++seed) {
    const SeedResult result = RunSeed(seed, bug);
    if (result.failure.empty()) continue;
    std::cout << Describe(seed, result) << "\n";
    EXPECT_EQ(RunSeed(seed).failure, "") << "it is not the planted bug";
    return seed;
  }
  return 0;
}

TEST(PlantedBugTest, ARenameBeforeTheSyncIsFound) {
  EXPECT_GT(SeedsUntil(PlantedBug::kRenameBeforeSync), 0);
}

TEST(PlantedBugTest, ARankThatIgnoresTheVerdictIsFound) {
  EXPECT_GT(SeedsUntil(PlantedBug::kIgnoredVerdict), 0);
}

TEST(PlantedBugTest, AnEngineThatIsEarlyIsFound) {
  EXPECT_GT(SeedsUntil(PlantedBug::kEarlyReceive), 0);
}

}  // namespace
}  // namespace dsd

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (argc > 1 && !absl::SimpleAtoi(argv[1], &dsd::g_seeds)) return 2;
  for (const int signal : {SIGABRT, SIGSEGV}) {
    std::signal(signal, &dsd::TellSeed);
  }
  return RUN_ALL_TESTS();
}
