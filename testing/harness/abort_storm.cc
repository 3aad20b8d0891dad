// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/harness/abort_storm.h"

#include <cstddef>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "dsd/core/base/env.h"
#include "dsd/testing/harness/process_counts.h"
#include "dsd/testing/harness/test_seed.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::test {
namespace {

constexpr int kRanks = 3;

absl::Status Ring(Communicator& comm) {
  absl::Status status;
  while (status.ok()) {
    const std::vector<std::byte> out(700000, std::byte{1});
    std::vector<std::byte> in(700000);
    status = comm.Exchange(
        {{(comm.rank() + 1) % kRanks, out}},
        {{(comm.rank() + kRanks - 1) % kRanks, absl::MakeSpan(in)}}, "storm");
  }
  return status;
}

}  // namespace

void AbortStorm(const AbortStormOptions& options) {
  std::mt19937_64 random(TestSeed());
  int descriptors = 0;
  int threads = 0;
  for (int round = 0; round < options.rounds; ++round) {
    const absl::Duration delay = absl::Nanoseconds(
        random() % absl::ToInt64Nanoseconds(options.max_delay));
    const std::vector<absl::Status> results = RunRankThreads(
        kRanks,
        [&](Communicator& comm) {
          std::thread aborter;
          if (comm.rank() == 1) {
            aborter = std::thread([&] {
              comm.env()->SleepUntil(comm.env()->Now() + delay);
              comm.Abort(absl::UnknownError("on purpose"));
            });
          }
          const absl::Status status =
              options.talk ? options.talk(comm) : Ring(comm);
          if (aborter.joinable()) aborter.join();
          return status;
        },
        options.threads);
    for (const absl::Status& status : results) {
      ASSERT_EQ(status.code(), absl::StatusCode::kAborted) << status;
      EXPECT_THAT(std::string(status.message()),
                  ::testing::HasSubstr("rank 1 aborted"));
    }
    const int now = OpenDescriptors();
    if (round == 0) {
      threads = RunningThreads();
    } else {
      ASSERT_EQ(now, descriptors) << "round " << round;
      ASSERT_LE(RunningThreads(threads), threads) << "round " << round;
    }
    descriptors = now;
  }
}

}  // namespace dsd::test
