// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/local/local_backend.h"

#include <vector>

#include "dsd/core/base/status_macros.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::ElementsAre;

TEST(LocalBackendTest, RanksExchangeAndReduce) {
  EXPECT_THAT(
      RunRankThreads(4,
                     [](Communicator& comm) {
                       std::vector<int32_t> data(300000, comm.rank() + 1);
                       const absl::Span<std::byte> bytes(
                           reinterpret_cast<std::byte*>(data.data()),
                           data.size() * sizeof(int32_t));
                       const absl::Status status =
                           comm.AllReduce(bytes, DType::kInt32, ReduceOp::kSum);
                       EXPECT_EQ(data[123456], 10);
                       return status;
                     }),
      AllOk());
}

TEST(LocalBackendTest, LeavingWithoutShutdownFailsTheOthers) {
  RankThreadsOptions options;
  options.shutdown = false;
  const std::vector<absl::Status> statuses = RunRankThreads(
      3,
      [](Communicator& comm) {
        return comm.rank() == 1 ? absl::OkStatus() : comm.Barrier();
      },
      options);
  EXPECT_THAT(statuses,
              ElementsAre(IsStatus(absl::StatusCode::kUnavailable, "rank 1"),
                          absl::OkStatus(),
                          IsStatus(absl::StatusCode::kUnavailable, "rank 1")));
}

// All ranks return an error that they agree on, none calls Shutdown, and one is
// slow to take the message that lets it return.
TEST(LocalBackendTest, RanksThatGiveUpTogetherDoNotBlameEachOther) {
  RankThreadsOptions options;
  options.shutdown = false;
  const absl::Status verdict = absl::NotFoundError("no such checkpoint");
  const std::vector<absl::Status> statuses = RunRankThreads(
      3,
      [&](Communicator& comm) -> absl::Status {
        std::vector<std::byte> in(1);
        const std::vector<std::byte> out(1);
        DSD_ASSIGN_OR_RETURN(
            PendingExchange pending,
            comm.StartExchange({{(comm.rank() + 1) % 3, out}},
                               {{(comm.rank() + 2) % 3, absl::MakeSpan(in)}},
                               "verdict"));
        // The others have left by then, or are about to.
        if (comm.rank() == 2) {
          comm.env()->SleepUntil(comm.env()->Now() + absl::Milliseconds(100));
        }
        DSD_RETURN_IF_ERROR(pending.Wait());
        return verdict;
      },
      options);
  EXPECT_THAT(statuses, ElementsAre(verdict, verdict, verdict));
}

TEST(LocalBackendTest, AnAbsentRankIsNamed) {
  RankThreadsOptions options;
  options.connect_timeout = absl::Milliseconds(50);
  options.absent = {2};
  const std::vector<absl::Status> statuses = RunRankThreads(
      3, [](Communicator& comm) { return comm.Barrier(); }, options);
  EXPECT_THAT(statuses[0],
              IsStatus(absl::StatusCode::kDeadlineExceeded, "rank 2 of 3"));
  EXPECT_THAT(statuses[1],
              IsStatus(absl::StatusCode::kDeadlineExceeded, "rank 2 of 3"));
}

}  // namespace
}  // namespace dsd
