// SPDX-License-Identifier: Apache-2.0

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/membership.h"
#include "dsd/core/comm/store.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

absl::Time Soon() { return Env::Real()->Now() + absl::Seconds(30); }

// Rank 3 fails while rank 1 asks, and rank 0 hears of it first: it may be gone
// before rank 1 is told. So rank 1 is told before it gets its answers.
TEST(InProcessStoreTest, AFailureIsToldBeforeAnswers) {
  constexpr int kRanks = 4;
  const std::shared_ptr<Store> store = MakeInProcessStore(Env::Real());
  std::unique_ptr<Membership> members[kRanks];
  absl::Notification rank0_hears, release;
  absl::Status rank1_heard;
  std::thread failing;
  std::vector<std::thread> joining;
  for (int rank = 0; rank < kRanks; ++rank) {
    joining.emplace_back([&, rank] {
      MemberOptions options;
      options.group = "g";
      options.rank = rank;
      options.size = kRanks;
      options.on_failure = [&, rank](const absl::Status& status) {
        if (rank == 0) {
          rank0_hears.Notify();
          release.WaitForNotification();
        }
        if (rank == 1) rank1_heard = status;
      };
      options.on_question = [&, rank](absl::string_view) {
        if (rank == 2) {
          failing = std::thread(
              [&] { members[3]->Fail(absl::AbortedError("enough")); });
          rank0_hears.WaitForNotification();
        }
        return std::string();
      };
      members[rank] = *store->Join(options, Soon());
    });
  }
  for (std::thread& thread : joining) thread.join();
  members[1]->Ask("where", Soon());
  EXPECT_EQ(rank1_heard, absl::AbortedError("enough"));
  release.Notify();
  failing.join();
  EXPECT_EQ(rank1_heard, absl::AbortedError("enough"));
}

}  // namespace
}  // namespace dsd
