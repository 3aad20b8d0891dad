// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/whereabouts.h"

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr uint64_t kLane = 7;

absl::Time At(double seconds) {
  return absl::UnixEpoch() + absl::Seconds(seconds);
}

TEST(WhereaboutsTest, AreWhatWasEncoded) {
  Whereabouts here;
  here.collectives = 3;
  here.idle = false;
  here.call = "exchange \"a b\"";
  here.collective = "Barrier";
  here.waited_for = 2;
  here.waited = absl::Milliseconds(1500);
  const Whereabouts there = Whereabouts::Decode(here.Encode(), 3);
  EXPECT_EQ(there.collectives, 3);
  EXPECT_FALSE(there.idle);
  EXPECT_EQ(there.call, here.call);
  EXPECT_EQ(there.collective, "Barrier");
  EXPECT_EQ(there.waited_for, 2);
  EXPECT_EQ(there.waited, absl::Milliseconds(1500));
}

TEST(WhereaboutsTest, WhatIsNotUnderstoodIsLeftOut) {
  EXPECT_EQ(Whereabouts::Decode("", 3).waited_for, -1);
  EXPECT_TRUE(Whereabouts::Decode("garbage", 3).idle);
  // No rank of the group.
  EXPECT_EQ(Whereabouts::Decode("1 1 3 99 x\ny", 3).waited_for, -1);
  EXPECT_EQ(Whereabouts::Decode("1 1 -7 99 x\ny", 3).waited_for, -1);
}

TEST(PositionTest, TheLongestWaitCountsOverAndUnderWay) {
  Position position;
  EXPECT_EQ(position.On(kLane, At(0)).waited_for, -1);
  position.Begin(kLane, "Barrier", true, At(0), absl::Seconds(10));
  position.WaitFor(kLane, 1, At(0));
  position.WaitFor(kLane, 2, At(1));
  EXPECT_EQ(position.On(kLane, At(1.5)).waited_for, 1);
  EXPECT_EQ(position.On(kLane, At(4)).waited_for, 2);
  EXPECT_EQ(position.On(kLane, At(4)).waited, absl::Seconds(3));
  position.WaitFor(kLane, -1, At(5));
  position.End(kLane);
  const Whereabouts after = position.On(kLane, At(9));
  EXPECT_TRUE(after.idle);
  EXPECT_EQ(after.collectives, 1);
  EXPECT_EQ(after.waited_for, 2);
  EXPECT_EQ(after.waited, absl::Seconds(4));
  // On another lane all the same.
  EXPECT_EQ(position.On(8, At(9)).waited_for, 2);
}

TEST(PositionTest, WaitsOfLongAgoAreForgotten) {
  Position position;
  position.Begin(kLane, "Barrier", true, At(0), absl::Seconds(10));
  position.WaitFor(kLane, 1, At(0));
  position.WaitFor(kLane, -1, At(5));
  position.End(kLane);
  position.Begin(kLane, "Barrier", true, At(14), absl::Seconds(10));
  EXPECT_EQ(position.On(kLane, At(14)).waited_for, 1);
  position.Begin(kLane, "Barrier", true, At(16), absl::Seconds(10));
  EXPECT_EQ(position.On(kLane, At(16)).waited_for, -1);
}

class ExplainLateCallTest : public ::testing::Test {
 protected:
  ExplainLateCallTest() {
    for (std::optional<Whereabouts>& rank : ranks_) {
      rank.emplace();
      rank->collectives = 5;
      rank->idle = false;
      rank->call = rank->collective = "Barrier";
    }
    late_.text = "Barrier";
    late_.collective = true;
    late_.timeout = absl::Seconds(10);
    late_.rank = 0;
    late_.here = "on rank 0";
    late_.missing = "no message came from rank 1";
    late_.peers = {1};
  }
  void Waited(int rank, int peer, absl::Duration length) {
    ranks_[rank]->waited_for = peer;
    ranks_[rank]->waited = length;
  }
  std::string Text() {
    const absl::Status status = ExplainLateCall(late_, ranks_);
    EXPECT_EQ(status.code(), expected_);
    return std::string(status.message());
  }

  std::vector<std::optional<Whereabouts>> ranks_{4};
  LateCall late_;
  absl::StatusCode expected_ = absl::StatusCode::kDeadlineExceeded;
};

TEST_F(ExplainLateCallTest, ThePeerIsNamed) {
  EXPECT_EQ(Text(),
            "Barrier on rank 0 did not finish within 10s: all ranks have "
            "called it; no message came from rank 1; rank 1 is in Barrier");
}

TEST_F(ExplainLateCallTest, SoIsWhomItHasWaitedForInTurn) {
  Waited(1, 2, absl::Milliseconds(9800));
  Waited(2, 3, absl::Milliseconds(9900));
  ranks_[3]->idle = true;
  EXPECT_THAT(Text(),
              EndsWith("; rank 1 is in Barrier and has waited 9.8s for rank 2, "
                       "which is in Barrier and has waited 9.9s for rank 3, "
                       "which is in no call"));
}

// Not whoever else has called less.
TEST_F(ExplainLateCallTest, AMessageConcernsItsTwoEndsOnly) {
  late_.collective = false;
  late_.text = "exchange \"w\"";
  ranks_[2]->collectives = 0;
  ranks_[3].reset();
  EXPECT_EQ(Text(),
            "exchange \"w\" on rank 0 did not finish within 10s: no message "
            "came from rank 1; rank 1 is in Barrier");
}

TEST_F(ExplainLateCallTest, ShortWaitsAreNoCause) {
  Waited(1, 2, absl::Milliseconds(900));
  EXPECT_THAT(Text(), Not(HasSubstr("waited")));
}

TEST_F(ExplainLateCallTest, ChainsMayBeRings) {
  Waited(1, 2, absl::Seconds(9));
  Waited(2, 1, absl::Seconds(9));
  EXPECT_THAT(Text(), EndsWith("which is in Barrier and has waited 9s for rank "
                               "1"));
  Waited(2, 0, absl::Seconds(9));
  EXPECT_THAT(Text(), EndsWith("and has waited 9s for rank 0"));
}

TEST_F(ExplainLateCallTest, ThisRanksEarlierWaitIsNamed) {
  Waited(0, 2, absl::Seconds(9));
  Waited(2, 3, absl::Seconds(8));
  EXPECT_THAT(Text(), EndsWith("; rank 0 has waited 9s for rank 2, which is in "
                               "Barrier and has waited 8s for rank 3, which is "
                               "in Barrier"));
}

TEST_F(ExplainLateCallTest, AbsentRanksAreInOtherCalls) {
  ranks_[1]->collectives = 4;
  ranks_[1]->call = "exchange \"w\"";
  Waited(1, 3, absl::Seconds(9));
  ranks_[2].reset();
  EXPECT_THAT(Text(),
              HasSubstr("not called by rank 1 (is in exchange \"w\" and has "
                        "waited 9s for rank 3, which is in Barrier), rank 2 "
                        "(does not answer); no message came from rank 1"));
}

TEST_F(ExplainLateCallTest, AnotherCallIsADisagreement) {
  ranks_[2]->collective = "AllGather";
  ranks_[2]->call = "exchange \"w\"";
  ranks_[3]->call = ranks_[3]->collective = "Split";
  expected_ = absl::StatusCode::kFailedPrecondition;
  EXPECT_THAT(Text(), HasSubstr("ranks disagree: rank 2 has called AllGather, "
                                "rank 3 is in Split"));
  late_.members = {0, 1};
  expected_ = absl::StatusCode::kDeadlineExceeded;
  EXPECT_THAT(Text(), HasSubstr("all ranks have called it"));
}

}  // namespace
}  // namespace dsd
