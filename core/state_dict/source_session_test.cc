// SPDX-License-Identifier: Apache-2.0
//
// Get and set of models: options, layouts, mismatches, on 1, 2 and 4 ranks.

#include "dsd/core/state_dict/source_session.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/equal.h"
#include "ATen/ops/zeros.h"
#include "ATen/ops/zeros_like.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/fake_sources.h"
#include "dsd/core/state_dict/test_world.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::FakeModel;
using ::dsd::test::Full;
using ::dsd::test::KeysOf;
using ::dsd::test::Leave;
using ::dsd::test::Numbers;
using ::dsd::test::TensorAt;
using ::dsd::test::World;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

class SourceSessionTest : public testing::TestWithParam<int> {
 protected:
  int ranks() const { return GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, SourceSessionTest, testing::Values(1, 2, 4));

TEST_P(SourceSessionTest, ShardedGetAliasesAndSendsNothing) {
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            // The other ranks never call: a message would wait for
            // them.
            if (comm.rank() != 0) return comm.Barrier();
            const auto model = World::Make(comm.size(), comm.rank());
            SourceSession session(model.get(), {}, &comm, {});
            DSD_ASSIGN_OR_RETURN(const StateDict dict, session.GetModel());
            DSD_REQUIRE(dict.size() == model->size());
            for (size_t i = 0; i < model->size(); ++i) {
              const at::Tensor value = TensorAt(dict, dict.key_text(i));
              DSD_REQUIRE(value.is_alias_of(model->tensor(i)));
              DSD_REQUIRE(!value.requires_grad());
            }
            DSD_REQUIRE(dict.Find("rows")->get_if<TensorValue>()->shape() ==
                        Dims({5, 3}));
            DSD_REQUIRE(session.stats().last_transfer.bytes_local == 0);
            return comm.Barrier();
          }),
      AllOk());
}

TEST_P(SourceSessionTest, FullGetIsWholeContiguousAndOwned) {
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            const auto model = World::Make(comm.size(), comm.rank());
            SourceSession session(model.get(), {}, &comm, Full());
            DSD_ASSIGN_OR_RETURN(const StateDict dict, session.GetModel());
            const auto whole = World::Whole();
            DSD_REQUIRE(dict.size() == whole.size());
            for (size_t i = 0; i < whole.size(); ++i) {
              DSD_REQUIRE(dict.key_text(i) == whole[i].first);
              const at::Tensor value = TensorAt(dict, whole[i].first);
              DSD_REQUIRE(at::equal(value, whole[i].second));
              DSD_REQUIRE(value.is_contiguous());
              DSD_REQUIRE(!value.is_alias_of(model->tensor(i)));
              DSD_REQUIRE(dict.value(i).get_if<TensorValue>()->is_plain());
            }
            return absl::OkStatus();
          }),
      AllOk());
}

TEST_P(SourceSessionTest, FullGetWithCpuOffloadGoesToRankZeroOnly) {
  StateDictOptions options = Full();
  options.cpu_offload = true;
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            const auto model = World::Make(comm.size(), comm.rank());
            SourceSession session(model.get(), {}, &comm, options);
            DSD_ASSIGN_OR_RETURN(const StateDict dict, session.GetModel());
            if (comm.rank() != 0) {
              DSD_REQUIRE(dict.empty());
              DSD_REQUIRE(session.stats().last_transfer.bytes_received == 0);
              return absl::OkStatus();
            }
            for (const auto& [name, whole] : World::Whole()) {
              DSD_REQUIRE(at::equal(TensorAt(dict, name), whole));
            }
            return absl::OkStatus();
          }),
      AllOk());
}

TEST_P(SourceSessionTest, CpuOffloadKeepsTensorsThatAreThere) {
  StateDictOptions options;
  options.cpu_offload = true;
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            const auto model = World::Make(comm.size(), comm.rank());
            SourceSession session(model.get(), {}, &comm, options);
            DSD_ASSIGN_OR_RETURN(const StateDict dict, session.GetModel());
            DSD_REQUIRE(TensorAt(dict, "rows").is_alias_of(model->tensor(0)));
            DSD_REQUIRE(!dict.Find("rows")->get_if<TensorValue>()->is_plain());
            return absl::OkStatus();
          }),
      AllOk());
}

TEST_P(SourceSessionTest, FullSetCutsLocallyWithoutMovingBytes) {
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            const auto model = World::Make(comm.size(), comm.rank());
            const auto version = model->tensor(0)._version();
            SourceSession session(model.get(), {}, &comm, Full());
            DSD_ASSIGN_OR_RETURN(const IncompatibleKeys keys,
                                 session.SetModel(World::WholeDict(500)));
            DSD_REQUIRE(keys.empty());
            DSD_REQUIRE(session.stats().last_transfer.bytes_sent == 0);
            DSD_REQUIRE(session.stats().last_transfer.bytes_received == 0);
            DSD_REQUIRE(model->tensor(0).requires_grad());
            DSD_REQUIRE(model->tensor(0)._version() > version);
            return World::Check(*model, comm.size(), comm.rank(), 500);
          }),
      AllOk());
}

TEST_P(SourceSessionTest, BroadcastSendsEachByteOnlyToWhoNeedsIt) {
  StateDictOptions options = Full();
  options.broadcast_from_rank0 = true;
  absl::Mutex mu;
  int64_t sent = 0;
  int64_t needed = 0;
  EXPECT_THAT(RunRankThreads(
                  ranks(),
                  [&](Communicator& comm) -> absl::Status {
                    const auto model = World::Make(comm.size(), comm.rank());
                    SourceSession session(model.get(), {}, &comm, options);
                    const StateDict dict =
                        comm.rank() == 0 ? World::WholeDict(700) : StateDict();
                    DSD_ASSIGN_OR_RETURN(const IncompatibleKeys keys,
                                         session.SetModel(dict));
                    DSD_REQUIRE(keys.empty());
                    {
                      absl::MutexLock lock(&mu);
                      sent += session.stats().last_transfer.bytes_sent;
                      for (size_t i = 0; comm.rank() != 0 && i < model->size();
                           ++i) {
                        // The scalar came with the agreement.
                        if (model->tensor(i).dim() > 0) {
                          needed += model->tensor(i).nbytes();
                        }
                      }
                    }
                    return World::Check(*model, comm.size(), comm.rank(), 700);
                  }),
              AllOk());
  EXPECT_EQ(sent, needed);
}

// Upstream sends the memory of such tensors as if they were contiguous.
TEST_P(SourceSessionTest, BroadcastOfTensorsThatAreNotContiguous) {
  StateDictOptions options = Full();
  options.broadcast_from_rank0 = true;
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            const auto model = World::Make(comm.size(), comm.rank());
            StateDict dict;
            for (const auto& [name, whole] : World::Whole(900)) {
              at::Tensor tensor = whole;
              if (whole.dim() == 2) {
                tensor = whole.t().contiguous().t();
                at::Tensor wide = at::zeros({whole.size(0), 2 * whole.size(1)});
                wide = wide.slice(1, 0, 2 * whole.size(1), 2);
                wide.copy_(tensor);
                if (name == "both") tensor = wide;
              }
              dict.Set(name, Value(TensorValue(tensor)));
            }
            SourceSession session(model.get(), {}, &comm, options);
            DSD_RETURN_IF_ERROR(
                session.SetModel(comm.rank() == 0 ? dict : StateDict()));
            return World::Check(*model, comm.size(), comm.rank(), 900);
          }),
      AllOk());
}

TEST_P(SourceSessionTest, ShardsOfOtherLayoutsAreMoved) {
  EXPECT_THAT(RunRankThreads(
                  ranks(),
                  [&](Communicator& comm) -> absl::Status {
                    const auto model = World::Make(comm.size(), comm.rank());
                    StateDict dict = World::WholeDict(100);
                    const Layout by_columns = *Layout::FromPlacements(
                        {7, 4}, DeviceMesh::Iota({comm.size()}), {Shard(1)});
                    dict.Set("both",
                             Value(*TensorValue::Sharded(
                                 {by_columns, comm.rank()},
                                 test::ShardOf(World::Whole(100)[4].second,
                                               by_columns, comm.rank()))));
                    SourceSession session(model.get(), {}, &comm, {});
                    DSD_RETURN_IF_ERROR(session.SetModel(dict));
                    return World::Check(*model, comm.size(), comm.rank(), 100);
                  }),
              AllOk());
}

TEST_P(SourceSessionTest, DictOfAliasesCanBeSet) {
  EXPECT_THAT(RunRankThreads(
                  ranks(),
                  [&](Communicator& comm) -> absl::Status {
                    const auto model = World::Make(comm.size(), comm.rank(), 3);
                    SourceSession session(model.get(), {}, &comm, {});
                    DSD_ASSIGN_OR_RETURN(const StateDict dict,
                                         session.GetModel());
                    DSD_RETURN_IF_ERROR(session.SetModel(dict));
                    return World::Check(*model, comm.size(), comm.rank(), 3);
                  }),
              AllOk());
}

TEST_P(SourceSessionTest, StrictMismatchListsAllOnEveryRankAndChangesNothing) {
  for (const bool broadcast : {false, true}) {
    StateDictOptions options = Full();
    options.broadcast_from_rank0 = broadcast;
    const std::vector<absl::Status> results = RunRankThreads(
        ranks(),
        [&](Communicator& comm) -> absl::Status {
          const auto model = World::Make(comm.size(), comm.rank());
          StateDict dict = World::WholeDict(500);
          dict.Erase(std::string("few"));
          dict.Erase(std::string("plain"));
          dict.Set("extra.b", Value(TensorValue(at::zeros({1}))));
          dict.Set("extra.a", Value(7));
          dict.Set("rows", Value(TensorValue(at::zeros({5, 4}))));
          dict.Set("columns", Value("text"));
          dict.Set("both",
                   Value(TensorValue(at::zeros({7, 4}, c10::kComplexFloat))));
          if (broadcast && comm.rank() != 0) dict = StateDict();
          SourceSession session(model.get(), {}, &comm, options);
          const absl::Status status = session.SetModel(dict).status();
          DSD_RETURN_IF_ERROR(
              World::Check(*model, comm.size(), comm.rank(), 0));
          // The session and the communicator are as before.
          DSD_RETURN_IF_ERROR(session.GetModel());
          return Leave(comm, status);
        },
        {absl::Seconds(60), {}, /*shutdown=*/false});
    for (const absl::Status& status : results) {
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_EQ(status.message(), results[0].message());
      EXPECT_THAT(
          std::string(status.message()),
          AllOf(HasSubstr("missing keys (2): \"few\", \"plain\""),
                HasSubstr("unexpected keys (2): \"extra.b\", \"extra.a\""),
                HasSubstr("\"rows\": shape in the dict is [5, 4], in the model "
                          "[5, 3]"),
                HasSubstr("\"columns\": expected a tensor, found str"),
                HasSubstr("\"both\": type in the dict is ComplexFloat"),
                HasSubstr("nothing was changed")));
    }
  }
}

TEST_P(SourceSessionTest, NonStrictSetsTheRestAndReportsTheSameEverywhere) {
  for (const bool broadcast : {false, true}) {
    StateDictOptions options = Full();
    options.broadcast_from_rank0 = broadcast;
    options.strict = false;
    EXPECT_THAT(
        RunRankThreads(
            ranks(),
            [&](Communicator& comm) -> absl::Status {
              const auto model = World::Make(comm.size(), comm.rank());
              StateDict dict;
              dict.Set("unknown", Value(TensorValue(at::zeros({3}))));
              dict.Set("rows", *World::WholeDict(500).Find("rows"));
              if (broadcast && comm.rank() != 0) dict = StateDict();
              SourceSession session(model.get(), {}, &comm, options);
              DSD_ASSIGN_OR_RETURN(const IncompatibleKeys keys,
                                   session.SetModel(dict));
              DSD_REQUIRE(keys.missing_keys ==
                          std::vector<std::string>({"columns", "few", "plain",
                                                    "both", "none", "scalar"}));
              DSD_REQUIRE(keys.unexpected_keys ==
                          std::vector<std::string>({"unknown"}));
              const auto rows = World::Make(comm.size(), comm.rank(), 500);
              DSD_REQUIRE(at::equal(model->tensor(0), rows->tensor(0)));
              const auto before = World::Make(comm.size(), comm.rank());
              DSD_REQUIRE(at::equal(model->tensor(1), before->tensor(1)));
              return absl::OkStatus();
            }),
        AllOk());
  }
}

TEST(SourceSessionRanksTest, KeyMissingOnOneRankIsAnErrorOnAll) {
  const std::vector<absl::Status> results = RunRankThreads(
      2,
      [&](Communicator& comm) -> absl::Status {
        const auto model = World::Make(2, comm.rank());
        StateDict dict = World::WholeDict(500);
        if (comm.rank() == 1) dict.Erase(std::string("plain"));
        SourceSession session(model.get(), {}, &comm, Full());
        const absl::Status status = session.SetModel(dict).status();
        DSD_RETURN_IF_ERROR(World::Check(*model, 2, comm.rank(), 0));
        return Leave(comm, status);
      },
      {absl::Seconds(60), {}, /*shutdown=*/false});
  for (const absl::Status& status : results) {
    EXPECT_THAT(status,
                IsStatus(absl::StatusCode::kInvalidArgument, "rank 1: "));
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("missing keys (1): \"plain\""));
  }
}

TEST(SourceSessionRanksTest, DictsThatDifferAreAnErrorOnAll) {
  StateDictOptions options = Full();
  options.strict = false;
  const std::vector<absl::Status> results = RunRankThreads(
      2,
      [&](Communicator& comm) -> absl::Status {
        const auto model = World::Make(2, comm.rank());
        StateDict dict = World::WholeDict(500);
        if (comm.rank() == 1) dict.Erase(std::string("plain"));
        SourceSession session(model.get(), {}, &comm, options);
        const absl::Status status = session.SetModel(dict).status();
        DSD_RETURN_IF_ERROR(World::Check(*model, 2, comm.rank(), 0));
        return Leave(comm, status);
      },
      {absl::Seconds(60), {}, /*shutdown=*/false});
  for (const absl::Status& status : results) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "ranks disagree"));
  }
}

TEST(SourceSessionRanksTest, OptionsThatDifferAreAnErrorOnAll) {
  const std::vector<absl::Status> results =
      RunRankThreads(2,
                     [&](Communicator& comm) -> absl::Status {
                       const auto model = World::Make(2, comm.rank());
                       StateDictOptions options = Full();
                       options.cpu_offload = comm.rank() == 0;
                       SourceSession session(model.get(), {}, &comm, options);
                       return Leave(comm, session.GetModel().status());
                     },
                     {absl::Seconds(60), {}, /*shutdown=*/false});
  for (const absl::Status& status : results) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "ranks disagree"));
  }
}

TEST(SourceSessionRanksTest, BroadcastOfShardsIsRefusedOnAll) {
  StateDictOptions options = Full();
  options.broadcast_from_rank0 = true;
  const std::vector<absl::Status> results = RunRankThreads(
      2,
      [&](Communicator& comm) -> absl::Status {
        const auto model = World::Make(2, comm.rank());
        DSD_ASSIGN_OR_RETURN(
            const StateDict dict,
            SourceSession(model.get(), {}, &comm, {}).GetModel());
        SourceSession session(model.get(), {}, &comm, options);
        return Leave(comm, session.SetModel(dict).status());
      },
      {absl::Seconds(60), {}, /*shutdown=*/false});
  for (const absl::Status& status : results) {
    EXPECT_THAT(status,
                IsStatus(absl::StatusCode::kInvalidArgument, "key \"rows\""));
  }
}

TEST(SourceSessionRanksTest, RankThatNeverComesIsADeadline) {
  absl::Notification done;
  const std::vector<absl::Status> results = RunRankThreads(
      2,
      [&](Communicator& comm) -> absl::Status {
        const auto model = World::Make(2, comm.rank());
        if (comm.rank() == 1) {
          // Alive, and in no collective call.
          done.WaitForNotificationWithTimeout(absl::Seconds(60));
          return absl::OkStatus();
        }
        SourceSession session(model.get(), {}, &comm, Full());
        CallOptions call;
        call.timeout = absl::Milliseconds(200);
        const absl::Status status = session.GetModel(call).status();
        done.Notify();
        return status;
      },
      {absl::Seconds(60), {}, /*shutdown=*/false});
  EXPECT_EQ(results[0].code(), absl::StatusCode::kDeadlineExceeded)
      << results[0];
}

TEST(SourceSessionOneRankTest, WorksWithoutACommunicator) {
  const auto model = World::Make(1, 0);
  SourceSession full(model.get(), {}, nullptr, Full());
  const absl::StatusOr<StateDict> dict = full.GetModel();
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_THAT(KeysOf(*dict), ElementsAre("rows", "columns", "few", "plain",
                                         "both", "none", "scalar"));
  ASSERT_TRUE(full.SetModel(World::WholeDict(50)).ok());
  EXPECT_TRUE(World::Check(*model, 1, 0, 50).ok());
}

// A rank of a sharded job may set its own part from whole tensors alone.
TEST(SourceSessionOneRankTest,
     ShardsCanBeSetWithoutACommunicatorButNotGathered) {
  const auto model = World::Make(4, 2);
  SourceSession session(model.get(), {}, nullptr, Full());
  const absl::StatusOr<IncompatibleKeys> keys =
      session.SetModel(World::WholeDict(60));
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(World::Check(*model, 4, 2, 60).ok());
  EXPECT_EQ(session.GetModel().status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(SourceSessionOneRankTest, BroadcastNeedsFull) {
  const auto model = World::Make(1, 0);
  StateDictOptions options;
  options.broadcast_from_rank0 = true;
  SourceSession session(model.get(), {}, nullptr, options);
  EXPECT_THAT(session.GetModel().status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "full_state_dict"));
  EXPECT_THAT(session.SetModel(World::WholeDict(0)).status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "full_state_dict"));
}

TEST(SourceSessionOneRankTest, GatheredShardIsRefused) {
  const auto model = World::Make(2, 0);
  model->tensor(0).set_data(at::zeros({5, 3}));
  SourceSession session(model.get(), {}, nullptr, {});
  EXPECT_THAT(session.GetModel().status(),
              IsStatus(absl::StatusCode::kFailedPrecondition,
                       "between forward and backward"));
}

TEST(SourceSessionOneRankTest, FrozenParametersCanBeLeftOut) {
  FakeModel model;
  model.Add("a", at::zeros({1}).requires_grad_());
  model.Add("b", at::zeros({1}));
  model.Add("c", at::zeros({1}), EntryKind::kBuffer);
  StateDictOptions options;
  options.ignore_frozen_params = true;
  const auto dict = SourceSession(&model, {}, nullptr, options).GetModel();
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_THAT(KeysOf(*dict), ElementsAre("a", "c"));
}

TEST(SourceSessionOneRankTest, TiedTensorsHaveBothNamesAndEitherIsEnough) {
  FakeModel model;
  const at::Tensor shared = Numbers({3, 2}).requires_grad_();
  model.Add("embedding", shared);
  model.Add("head", shared);
  const auto aliases = SourceSession(&model, {}, nullptr, {}).GetModel();
  ASSERT_TRUE(aliases.ok());
  EXPECT_THAT(KeysOf(*aliases), ElementsAre("embedding", "head"));

  // Gathered once, and still tied.
  SourceSession session(&model, {}, nullptr, Full());
  const auto full = session.GetModel();
  ASSERT_TRUE(full.ok());
  EXPECT_TRUE(TensorAt(*full, "embedding").is_same(TensorAt(*full, "head")));
  EXPECT_EQ(session.stats().last_transfer.bytes_local, 6 * 4);

  StateDict one;
  one.Set("head", Value(TensorValue(Numbers({3, 2}, 10))));
  const auto keys = session.SetModel(one);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_THAT(keys->missing_keys, IsEmpty());
  EXPECT_TRUE(at::equal(shared.detach(), Numbers({3, 2}, 10)));
}

TEST(SourceSessionOneRankTest, ValuesAreCastToTheLiveTypeOrRefused) {
  FakeModel model;
  model.Add("w", at::zeros({4}, c10::kBFloat16));
  model.Add("n", at::zeros({1}, c10::kLong), EntryKind::kBuffer);
  SourceSession session(&model, {}, nullptr, {});
  StateDict dict;
  dict.Set("w", Value(TensorValue(Numbers({4}, 0.25, c10::kDouble))));
  dict.Set("n", Value(TensorValue(Numbers({1}, 3, c10::kInt))));
  ASSERT_TRUE(session.SetModel(dict).ok());
  EXPECT_TRUE(at::equal(model.tensor(0),
                        Numbers({4}, 0.25, c10::kDouble).to(c10::kBFloat16)));
  EXPECT_EQ(model.tensor(1).data_ptr<int64_t>()[0], 3);
  dict.Set("n", Value(TensorValue(Numbers({1}, 0.5))));
  EXPECT_THAT(session.SetModel(dict).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "\"n\": type in the dict is Float, in the model Long"));
}

TEST(SourceSessionOneRankTest, ExpandedLiveTensorIsRefused) {
  FakeModel model;
  model.Add("w", at::zeros({1}).expand({4}));
  StateDict dict;
  dict.Set("w", Value(TensorValue(Numbers({4}))));
  EXPECT_THAT(SourceSession(&model, {}, nullptr, {}).SetModel(dict).status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "expanded"));
}

TEST(SourceSessionOneRankTest, InputIsNeitherChangedNorKept) {
  FakeModel model;
  model.Add("w", at::zeros({4}));
  StateDict dict;
  const at::Tensor input = Numbers({4}, 5);
  dict.Set("w", Value(TensorValue(input)));
  ASSERT_TRUE(SourceSession(&model, {}, nullptr, {}).SetModel(dict).ok());
  model.tensor(0).fill_(9);
  EXPECT_TRUE(at::equal(input, Numbers({4}, 5)));
  EXPECT_THAT(KeysOf(dict), ElementsAre("w"));
}

TEST(SourceSessionOneRankTest, SecondCallMakesNoNamesAndNoPlan) {
  const auto model = World::Make(1, 0);
  SourceSession session(model.get(), {}, nullptr, Full());
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(session.GetModel().ok());
    ASSERT_TRUE(session.SetModel(World::WholeDict(i)).ok());
  }
  EXPECT_EQ(session.stats().tables_built, 1);
  EXPECT_EQ(session.stats().plans_made, 2);
  EXPECT_EQ(model->describe_calls(), 1);
}

TEST(SourceSessionOneRankTest, ReassignedResizedAndReshardedIsNoticed) {
  FakeModel model;
  model.Add("w", Numbers({4}));
  SourceSession session(&model, {}, nullptr, Full());
  ASSERT_TRUE(session.GetModel().ok());
  model.tensor(0) = Numbers({4}, 10);
  EXPECT_TRUE(at::equal(TensorAt(*session.GetModel(), "w"), Numbers({4}, 10)));
  model.tensor(0).set_data(Numbers({6}, 20));
  EXPECT_TRUE(at::equal(TensorAt(*session.GetModel(), "w"), Numbers({6}, 20)));
  ASSERT_TRUE(
      ShardingTable::Global()
          .Set(model.tensor(0),
               *Layout::FromPlacements({6}, DeviceMesh::Iota({1}), {Shard(0)}),
               0)
          .ok());
  EXPECT_TRUE(at::equal(TensorAt(*session.GetModel(), "w"), Numbers({6}, 20)));
}

TEST(SourceSessionOneRankTest, OptimizerCallsNeedAnOptimizer) {
  FakeModel model;
  SourceSession session(&model, {}, nullptr, {});
  EXPECT_EQ(session.GetOptimizer().status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(session.SetOptimizer(StateDict()).code(),
            absl::StatusCode::kInvalidArgument);
  const auto both = session.Get();
  ASSERT_TRUE(both.ok());
  EXPECT_THAT(KeysOf(both->optimizer), SizeIs(0));
}

}  // namespace
}  // namespace dsd
