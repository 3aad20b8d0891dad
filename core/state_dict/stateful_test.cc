// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/stateful.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/equal.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/flat_state.h"
#include "dsd/core/state_dict/test_world.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::KeysOf;
using ::dsd::test::Numbers;
using ::dsd::test::RunAndLeave;
using ::testing::HasSubstr;

// A count and a tensor, as a data loader or a random generator has them.
class Position : public Stateful {
 public:
  explicit Position(int64_t count)
      : count(count), bytes(Numbers({16}, count)) {}

  absl::StatusOr<StateDict> GetState() override {
    StateDict state;
    state.Set("count", Value(count));
    state.Set("bytes", Value(TensorValue(bytes)));
    return state;
  }
  absl::Status SetState(const StateDict& state) override {
    const Value* found = state.Find("count");
    if (found == nullptr || !found->is<int64_t>()) {
      return absl::InvalidArgumentError("expected a count");
    }
    count = *found->get_if<int64_t>();
    DSD_ASSIGN_OR_RETURN(bytes,
                         state.Find("bytes")->get_if<TensorValue>()->Local());
    return absl::OkStatus();
  }

  int64_t count;
  at::Tensor bytes;
};

class StatefulTest : public testing::TestWithParam<int> {
 protected:
  int ranks() const { return GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, StatefulTest, testing::Values(1, 2, 4));

TEST_P(StatefulTest, RoundTripKeepsWhatIsCommonAndWhatIsNot) {
  EXPECT_THAT(
      RunRankThreads(ranks(),
                     [&](Communicator& comm) -> absl::Status {
                       Position scheduler(5);
                       Position data(100 * comm.rank());
                       StateDict root;
                       root.Set("step", Value(1));
                       DSD_RETURN_IF_ERROR(GetStateful(
                           {{"scheduler", &scheduler},
                            {"data", &data, StatefulEntry::kPerRank}},
                           &comm, root));
                       std::vector<std::string> keys = {"step", "scheduler"};
                       for (int rank = 0; rank < ranks(); ++rank) {
                         keys.push_back(absl::StrCat("data@rank", rank));
                         // Counts of all ranks are everywhere.
                         const auto* state =
                             root.Find(keys.back())->get_if<StateDict>();
                         DSD_REQUIRE(*state->Find("count")->get_if<int64_t>() ==
                                     100 * rank);
                       }
                       DSD_REQUIRE(KeysOf(root) == keys);
                       // As a checkpoint wants it: equal catalogs on all ranks.
                       DSD_RETURN_IF_ERROR(Flatten(root, &comm));
                       Position new_scheduler(0);
                       Position new_data(0);
                       DSD_RETURN_IF_ERROR(SetStateful(
                           {{"scheduler", &new_scheduler},
                            {"data", &new_data, StatefulEntry::kPerRank}},
                           root, &comm));
                       DSD_REQUIRE(new_scheduler.count == 5);
                       DSD_REQUIRE(new_data.count == 100 * comm.rank());
                       DSD_REQUIRE(at::equal(new_data.bytes, data.bytes));
                       DSD_REQUIRE(!new_data.bytes.is_alias_of(data.bytes));
                       return absl::OkStatus();
                     }),
      AllOk());
}

TEST_P(StatefulTest, MissingStateIsNamedWithItsRankAndNothingIsSet) {
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
         Position data(3);
         Position other(4);
         StateDict root;
         DSD_RETURN_IF_ERROR(
             GetStateful({{"a", &data}, {"b", &data, StatefulEntry::kPerRank}},
                         &comm, root));
         root.Erase(absl::StrCat("b@rank", ranks() - 1));
         const std::vector<StatefulEntry> entries = {
             {"a", &other}, {"b", &other, StatefulEntry::kPerRank}};
         const absl::Status status = SetStateful(entries, root, &comm);
         DSD_REQUIRE(other.count == 4);
         DSD_RETURN_IF_ERROR(
             SetStateful(entries, root, &comm, /*strict=*/false));
         DSD_REQUIRE(other.count == 3);
         return status;
       })) {
    EXPECT_THAT(status,
                IsStatus(absl::StatusCode::kNotFound,
                         absl::StrCat("no \"b@rank", ranks() - 1, "\"")));
  }
}

TEST_P(StatefulTest, ErrorOfAnObjectIsEverybodys) {
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
         Position data(3);
         StateDict root;
         StateDict bad;
         bad.Set("count",
                 comm.rank() == 0 ? Value("three") : Value(int64_t{3}));
         bad.Set("bytes", Value(TensorValue(Numbers({1}))));
         root.Set("a", Value(bad));
         return SetStateful({{"a", &data}}, root, &comm);
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                                 "\"a\": expected a count"));
  }
}

// Also where the others need nothing of that rank.
TEST_P(StatefulTest, ErrorsOfGetAreEverybodysAndAllAreNamed) {
  struct Broken : Stateful {
    absl::StatusOr<StateDict> GetState() override {
      return absl::UnavailableError("no state");
    }
    absl::Status SetState(const StateDict&) override {
      return absl::OkStatus();
    }
  };
  for (const bool per_rank : {false, true}) {
    const std::vector<absl::Status> statuses =
        RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
          Position data(3);
          Broken broken;
          Stateful* const object = comm.rank() == ranks() - 1
                                       ? static_cast<Stateful*>(&broken)
                                       : &data;
          StateDict root;
          root.Set("before", Value(1));
          const absl::Status status = GetStateful(
              {{"fine", &data},
               {"a", object},
               {"b", object,
                per_rank ? StatefulEntry::kPerRank : StatefulEntry::kJob}},
              &comm, root);
          DSD_REQUIRE(root.size() == 1);
          return status;
        });
    for (const absl::Status& status : statuses) {
      EXPECT_EQ(status, statuses[0]);
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kUnavailable,
                                   "\"a\": no state; \"b\": no state"));
    }
  }
}

TEST_P(StatefulTest, KeyThatIsTakenOnOneRankIsEverybodysError) {
  const std::vector<absl::Status> statuses =
      RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
        Position data(3);
        StateDict root;
        if (comm.rank() == ranks() - 1) root.Set("a", Value(1));
        const size_t before = root.size();
        const absl::Status status = GetStateful(
            {{"first", &data}, {"a", &data}, {"first", &data}}, &comm, root);
        DSD_REQUIRE(root.size() == before);
        return status;
      });
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status, statuses[0]);
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kAlreadyExists, "\"a\""));
    EXPECT_THAT(std::string(status.message()), HasSubstr("\"first\""));
  }
}

// An entry that is per rank on some ranks only.
TEST_P(StatefulTest, RanksWithOtherEntriesDoNotWait) {
  if (ranks() == 1) return;
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
         Position data(3);
         StateDict root;
         return GetStateful({{"a", &data,
                              comm.rank() == 0 ? StatefulEntry::kPerRank
                                               : StatefulEntry::kJob}},
                            &comm, root);
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "keys \"a\" (of the job)"));
  }
}

TEST_P(StatefulTest, NullIsAnError) {
  for (const bool set : {false, true}) {
    for (const absl::Status& status :
         RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
           StateDict root;
           if (!set) return GetStateful({{"a", nullptr}}, &comm, root);
           root.Set("a", Value(StateDict()));
           return SetStateful({{"a", nullptr}}, root, &comm);
         })) {
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                                   "\"a\": the object is null"));
    }
  }
}

TEST_P(StatefulTest, KeysThatAreTakenOrDifferAreErrors) {
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
         Position data(3);
         StateDict root;
         root.Set("a", Value(1));
         return GetStateful({{"a", &data}}, &comm, root);
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kAlreadyExists, "\"a\""));
  }
  if (ranks() == 1) return;
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
         Position data(3);
         StateDict root;
         return GetStateful(
             {{comm.rank() == 0 ? "a" : "b", &data, StatefulEntry::kPerRank}},
             &comm, root);
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "ranks disagree"));
  }
}

}  // namespace
}  // namespace dsd
