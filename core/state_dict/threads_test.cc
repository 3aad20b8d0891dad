// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/threads.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "ATen/Parallel.h"
#include "absl/status/status.h"
#include "c10/core/InferenceMode.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;

constexpr size_t kMany = 100000;

TEST(ThreadsForTest, FewTensorsAndLibTorchsOwnLimitAndInferenceMode) {
  const int before = at::get_num_threads();
  at::set_num_threads(3);
  EXPECT_EQ(ThreadsFor(10), 1);
  EXPECT_EQ(ThreadsFor(kMany), 3);
  {
    const c10::InferenceMode inference;
    EXPECT_EQ(ThreadsFor(kMany), 1);
  }
  at::set_num_threads(1);
  EXPECT_EQ(ThreadsFor(kMany), 1);
  at::set_num_threads(before);
}

TEST(ForRangesTest, EachIndexOnce) {
  for (const int threads : {1, 2, 5}) {
    for (const size_t size : {size_t{0}, size_t{1}, size_t{5000}, kMany}) {
      std::vector<std::atomic<int>> visits(size);
      EXPECT_TRUE(
          ForRanges(Env::Real(), threads, size, [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; ++i) ++visits[i];
            return absl::OkStatus();
          }).ok());
      EXPECT_TRUE(std::all_of(visits.begin(), visits.end(),
                              [](const auto& count) { return count == 1; }));
    }
  }
}

TEST(ForRangesTest, AnErrorIsReturnedAndEndsIt) {
  for (const int threads : {1, 4}) {
    std::atomic<size_t> visited{0};
    const absl::Status status =
        ForRanges(Env::Real(), threads, kMany, [&](size_t begin, size_t end) {
          visited += end - begin;
          return begin == 0 ? absl::DataLossError("the first")
                            : absl::OkStatus();
        });
    EXPECT_EQ(status, absl::DataLossError("the first"));
    if (threads == 1) {
      EXPECT_LT(visited, kMany);
    }
    const absl::Status thrown =
        ForRanges(Env::Real(), threads, kMany, [](size_t, size_t) {
          throw std::runtime_error("on purpose");
          return absl::OkStatus();
        });
    EXPECT_EQ(thrown.code(), absl::StatusCode::kInternal);
    EXPECT_THAT(std::string(thrown.message()), HasSubstr("on purpose"));
  }
}

TEST(RunBothTest, BothAreDone) {
  for (const int threads : {1, 2}) {
    int first = 0;
    int second = 0;
    RunBoth(
        Env::Real(), threads, [&] { first = 1; }, [&] { second = 2; });
    EXPECT_EQ(first, 1);
    EXPECT_EQ(second, 2);
    // Also if the first throws: it may have what the second uses.
    EXPECT_THROW(RunBoth(
                     Env::Real(), threads,
                     [] { throw std::runtime_error("on purpose"); },
                     [&] { second = 3; }),
                 std::runtime_error);
    EXPECT_EQ(second, threads == 1 ? 2 : 3);
  }
}

TEST(MapRangesTest, PartsAreInOrderAndAnErrorIsTheirs) {
  for (const int threads : {1, 4}) {
    const auto parts = MapRanges<std::vector<size_t>>(
        Env::Real(), threads, 10000,
        [](size_t begin, size_t end, std::vector<size_t>& part) {
          for (size_t i = begin; i < end; ++i) part.push_back(i);
          return absl::OkStatus();
        });
    ASSERT_TRUE(parts.ok()) << parts.status();
    size_t next = 0;
    for (const std::vector<size_t>& part : *parts) {
      for (const size_t i : part) ASSERT_EQ(i, next++);
    }
    EXPECT_EQ(next, 10000);
    EXPECT_EQ(MapRanges<int>(Env::Real(), threads, 10000,
                             [](size_t begin, size_t, int&) {
                               return begin == 0 ? absl::OkStatus()
                                                 : absl::NotFoundError("");
                             })
                  .status()
                  .code(),
              absl::StatusCode::kNotFound);
  }
}

}  // namespace
}  // namespace dsd
