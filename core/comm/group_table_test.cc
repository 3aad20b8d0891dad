// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/group_table.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

constexpr absl::Duration kPatience = absl::Seconds(5);
const absl::Time kNow = absl::UnixEpoch();

// "<member> joined: <status>".
std::vector<std::string> Text(const std::vector<GroupTable::Event>& events) {
  std::vector<std::string> lines;
  for (const GroupTable::Event& event : events) {
    const char* kind = event.kind == GroupTable::EventKind::kJoined   ? "joined"
                       : event.kind == GroupTable::EventKind::kFailed ? "failed"
                                                                      : "left";
    lines.push_back(
        absl::StrCat(event.member, " ", kind, ": ", event.status.ToString()));
  }
  return lines;
}

// Member 10 + r is rank r of "g".
std::vector<std::string> Join(GroupTable& table, int rank, int size = 3,
                              absl::string_view facts = "same",
                              uint64_t member = 0) {
  return Text(table.Join(member == 0 ? 10 + rank : member, "g", rank, size,
                         facts, kPatience, kNow));
}

const absl::Status kSilent = absl::UnavailableError("rank 1 is silent");

TEST(GroupTableTest, OneThatIsSilentFailsAllAndHearsOfIt) {
  GroupTable table;
  for (int rank = 0; rank < 3; ++rank) Join(table, rank);
  EXPECT_THAT(Text(table.Leave(10)), IsEmpty());
  EXPECT_THAT(Text(table.Break(11, kSilent)),
              ElementsAre("10 left: UNAVAILABLE: rank 1 is silent",
                          "11 failed: UNAVAILABLE: rank 1 is silent",
                          "12 failed: UNAVAILABLE: rank 1 is silent"));
  // Once, and its end is nothing new.
  EXPECT_THAT(Text(table.Break(11, kSilent)), IsEmpty());
  EXPECT_THAT(Text(table.Remove(11, "died")), IsEmpty());
  EXPECT_THAT(Text(table.Break(99, kSilent)), IsEmpty());
}

// The others would wait for one that may never run again.
TEST(GroupTableTest, OneThatIsSilentWhileJoiningFailsAll) {
  GroupTable table;
  Join(table, 0);
  Join(table, 1);
  EXPECT_THAT(Text(table.Break(11, kSilent)),
              ElementsAre("10 joined: UNAVAILABLE: rank 1 is silent",
                          "11 joined: UNAVAILABLE: rank 1 is silent"));
}

TEST(GroupTableTest, AllJoinAtOnceAndLeaveAtOnce) {
  GroupTable table;
  EXPECT_THAT(Join(table, 1), IsEmpty());
  EXPECT_THAT(Join(table, 0), IsEmpty());
  EXPECT_EQ(table.NextExpiry(), kNow + kPatience);
  EXPECT_THAT(Join(table, 2),
              ElementsAre("10 joined: OK", "11 joined: OK", "12 joined: OK"));
  EXPECT_EQ(table.NextExpiry(), absl::InfiniteFuture());
  EXPECT_EQ(table.Peers(11).size(), 3);
  EXPECT_THAT(Text(table.Leave(12)), IsEmpty());
  EXPECT_THAT(Text(table.Leave(10)), IsEmpty());
  EXPECT_FALSE(table.WasDissolved("g"));
  EXPECT_THAT(Text(table.Leave(11)),
              ElementsAre("10 left: OK", "11 left: OK", "12 left: OK"));
  EXPECT_TRUE(table.WasDissolved("g"));
  // Its end is no death any more, and the name is free.
  EXPECT_THAT(Text(table.Remove(11, "died")), IsEmpty());
  EXPECT_THAT(Join(table, 0, 1, "same", 20), ElementsAre("20 joined: OK"));
}

TEST(GroupTableTest, ADeathFailsTheOthersOnce) {
  GroupTable table;
  for (int rank = 0; rank < 3; ++rank) Join(table, rank);
  EXPECT_THAT(Text(table.Remove(11, "died")),
              ElementsAre("10 failed: UNAVAILABLE: rank 1 died",
                          "12 failed: UNAVAILABLE: rank 1 died"));
  EXPECT_THAT(Text(table.Remove(10, "died")), IsEmpty());
  EXPECT_THAT(Text(table.Fail(12, absl::InternalError("late"))), IsEmpty());
  EXPECT_THAT(Text(table.Leave(12)),
              ElementsAre("12 left: UNAVAILABLE: rank 1 died"));
  // Who comes late hears of it.
  EXPECT_THAT(Join(table, 1, 3, "same", 30),
              ElementsAre("30 joined: UNAVAILABLE: rank 1 died"));
}

TEST(GroupTableTest, AFailureReachesAllButItsOrigin) {
  GroupTable table;
  for (int rank = 0; rank < 3; ++rank) Join(table, rank);
  EXPECT_THAT(Text(table.Leave(10)), IsEmpty());
  EXPECT_THAT(Text(table.Fail(11, absl::DataLossError("bad"))),
              UnorderedElementsAre("10 left: DATA_LOSS: bad",
                                   "12 failed: DATA_LOSS: bad"));
}

// The others may still wait for it: only when all leave is the end no death.
TEST(GroupTableTest, AMemberThatDiesWhileLeavingFailsTheOthers) {
  GroupTable table;
  for (int rank = 0; rank < 3; ++rank) Join(table, rank);
  table.Leave(10);
  table.Leave(11);
  EXPECT_THAT(Text(table.Remove(10, "died")),
              ElementsAre("11 left: UNAVAILABLE: rank 0 died",
                          "12 failed: UNAVAILABLE: rank 0 died"));
  EXPECT_THAT(Text(table.Leave(12)),
              ElementsAre("12 left: UNAVAILABLE: rank 0 died"));
}

TEST(GroupTableTest, AMemberThatDiesWhileJoiningMayComeAgain) {
  GroupTable table;
  Join(table, 0);
  EXPECT_THAT(Text(table.Remove(10, "died")), IsEmpty());
  Join(table, 1);
  Join(table, 2);
  EXPECT_EQ(Join(table, 0, 3, "same", 20).size(), 3);
}

TEST(GroupTableTest, ButNotForLongWhileOthersWait) {
  const absl::Time until = kNow + absl::Seconds(1);
  {
    GroupTable table;
    Join(table, 0);
    Join(table, 1);
    EXPECT_THAT(Text(table.Remove(11, "died", until)), IsEmpty());
    EXPECT_EQ(table.NextExpiry(), until);
    EXPECT_THAT(Text(table.Expire(until - absl::Nanoseconds(1))), IsEmpty());
    EXPECT_THAT(Text(table.Expire(until)),
                ElementsAre("10 joined: UNAVAILABLE: rank 1 died before all "
                            "had connected"));
    EXPECT_EQ(table.NextExpiry(), absl::InfiniteFuture());
  }
  {
    GroupTable table;
    Join(table, 0);
    Join(table, 1);
    table.Remove(11, "died", until);
    EXPECT_THAT(Join(table, 1, 3, "same", 21), IsEmpty());
    EXPECT_THAT(Text(table.Expire(until)), IsEmpty());
    EXPECT_EQ(Join(table, 2).size(), 3);
  }
  {
    GroupTable table;
    Join(table, 1);
    table.Remove(11, "died", until);
    EXPECT_THAT(Text(table.Expire(until)), IsEmpty());
    Join(table, 0);
    EXPECT_THAT(Text(table.Expire(until + absl::Seconds(1))), IsEmpty());
  }
}

TEST(GroupTableTest, SizesAreBounded) {
  GroupTable table;
  EXPECT_THAT(Join(table, 0, (1 << 20) + 1),
              ElementsAre(HasSubstr("10 joined: INVALID_ARGUMENT")));
}

TEST(GroupTableTest, AbsentRanksAreNamed) {
  GroupTable table;
  Join(table, 1);
  EXPECT_THAT(Text(table.Expire(kNow + kPatience - absl::Nanoseconds(1))),
              IsEmpty());
  EXPECT_THAT(Text(table.Expire(kNow + kPatience)),
              ElementsAre("11 joined: DEADLINE_EXCEEDED: ranks 0, 2 of 3 did "
                          "not connect within 5s"));
  EXPECT_THAT(Join(table, 0).size(), 1);

  GroupTable large;
  Join(large, 99, 100);
  EXPECT_THAT(Text(large.Expire(kNow + kPatience)),
              ElementsAre("109 joined: DEADLINE_EXCEEDED: ranks 0, 1, 2, 3, 4, "
                          "5, 6, 7 and 91 more of 100 did not connect within "
                          "5s"));
}

TEST(GroupTableTest, WhatKeepsRanksOutIsNamed) {
  GroupTable table;
  Join(table, 1);
  EXPECT_THAT(Text(table.Expire(kNow + kPatience, "the door is shut")),
              ElementsAre("11 joined: RESOURCE_EXHAUSTED: ranks 0, 2 of 3 did "
                          "not connect within 5s: the door is shut"));
}

TEST(GroupTableTest, ALateComerDoesNotDisturbAGroupAtWork) {
  GroupTable table;
  for (int rank = 0; rank < 3; ++rank) Join(table, rank);
  const std::vector<std::string> events = Join(table, 1, 2, "other", 20);
  ASSERT_EQ(events.size(), 1);
  EXPECT_THAT(events[0],
              HasSubstr("20 joined: FAILED_PRECONDITION: all 3 ranks of the "
                        "group are connected already"));
  EXPECT_THAT(Text(table.Remove(20, "died")), IsEmpty());
  EXPECT_EQ(table.Peers(10).size(), 3);
}

TEST(GroupTableTest, DisagreementsFailAll) {
  {
    GroupTable table;
    Join(table, 0, 3, "backend \"gloo\"");
    EXPECT_THAT(
        Join(table, 2, 3, "backend \"local\""),
        ElementsAre(
            "10 joined: FAILED_PRECONDITION: ranks disagree: rank 2 has "
            "backend \"local\", rank 0 has backend \"gloo\"",
            "12 joined: FAILED_PRECONDITION: ranks disagree: rank 2 has "
            "backend \"local\", rank 0 has backend \"gloo\""));
  }
  {
    GroupTable table;
    Join(table, 0, 3);
    EXPECT_EQ(
        Join(table, 1, 2)[1],
        "11 joined: FAILED_PRECONDITION: ranks disagree: rank 1 says that "
        "2 ranks take part, rank 0 that 3");
  }
  {
    GroupTable table;
    Join(table, 1);
    EXPECT_EQ(Join(table, 1, 3, "same", 20)[1],
              "20 joined: FAILED_PRECONDITION: two processes say that they are "
              "rank 1 of 3");
  }
  GroupTable table;
  EXPECT_EQ(Join(table, 3)[0],
            "13 joined: INVALID_ARGUMENT: rank 3 is not in [0, 3)");
}

}  // namespace
}  // namespace dsd
