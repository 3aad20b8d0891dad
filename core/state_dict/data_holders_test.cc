// SPDX-License-Identifier: Apache-2.0
//
// Sets where all ranks, some or one have the data, and nobody says which.

#include <cstdint>
#include <string>
#include <vector>

#include "ATen/ops/equal.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/fake_sources.h"
#include "dsd/core/state_dict/source_session.h"
#include "dsd/core/state_dict/test_world.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::FakeModel;
using ::dsd::test::FakeOptimizer;
using ::dsd::test::Full;
using ::dsd::test::Numbers;
using ::dsd::test::RunAndLeave;
using ::dsd::test::TensorAt;
using ::dsd::test::World;
using ::testing::HasSubstr;

class DataHoldersTest : public testing::TestWithParam<int> {
 protected:
  int ranks() const { return GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, DataHoldersTest, testing::Values(2, 4));

// 157781, 125177: upstream hangs if only rank 0 has data and nobody said so.
TEST_P(DataHoldersTest, AnyRanksMayHaveTheData) {
  for (int has = 1; has < 1 << ranks(); ++has) {
    absl::Mutex mu;
    int64_t received_by_holders = 0;
    EXPECT_THAT(RunRankThreads(
                    ranks(),
                    [&](Communicator& comm) -> absl::Status {
                      const bool is_holder = (has >> comm.rank() & 1) != 0;
                      const auto model = World::Make(comm.size(), comm.rank());
                      SourceSession session(model.get(), {}, &comm, Full());
                      const StateDict dict =
                          is_holder ? World::WholeDict(300) : StateDict();
                      DSD_ASSIGN_OR_RETURN(const IncompatibleKeys keys,
                                           session.SetModel(dict));
                      DSD_REQUIRE(keys.empty());
                      if (is_holder) {
                        absl::MutexLock lock(&mu);
                        received_by_holders +=
                            session.stats().last_transfer.bytes_received;
                      }
                      return World::Check(*model, comm.size(), comm.rank(),
                                          300);
                    }),
                AllOk())
        << "ranks " << has;
    EXPECT_EQ(received_by_holders, 0);
  }
}

// The options of one struct serve get and set, wherever the data went.
TEST_P(DataHoldersTest, WhatAFullGetWithOffloadGaveCanBeSet) {
  StateDictOptions options = Full();
  options.cpu_offload = true;
  options.full_state_dict_ranks = {ranks() - 1};
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            const auto from = World::Make(comm.size(), comm.rank(), 70);
            DSD_ASSIGN_OR_RETURN(
                const StateDict dict,
                SourceSession(from.get(), {}, &comm, options).GetModel());
            const auto to = World::Make(comm.size(), comm.rank());
            DSD_RETURN_IF_ERROR(
                SourceSession(to.get(), {}, &comm, options).SetModel(dict));
            return World::Check(*to, comm.size(), comm.rank(), 70);
          }),
      AllOk());
}

// The model's dict on one rank, the optimizer's on another.
TEST_P(DataHoldersTest, PartsMayBeOnDifferentRanks) {
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            FakeModel model;
            FakeOptimizer optimizer;
            const Layout layout = *Layout::FromPlacements(
                {5, 2}, DeviceMesh::Iota({comm.size()}), {Shard(0)});
            at::Tensor whole = Numbers({5, 2}).requires_grad_();
            optimizer.groups.push_back(
                {{model.AddShard("w", whole, layout, comm.rank())}, {}});
            SourceSession session(&model, {&optimizer}, &comm, Full());
            StateDict model_dict;
            StateDict optimizer_dict;
            if (comm.rank() == 1) {
              model_dict.Set("w", Value(TensorValue(Numbers({5, 2}, 100))));
            }
            if (comm.rank() == 0) {
              StateDict entry;
              entry.Set("step", Value(3));
              entry.Set("moment", Value(TensorValue(Numbers({5, 2}, 200))));
              StateDict state;
              state.Set("w", Value(std::move(entry)));
              optimizer_dict.Set("state", Value(std::move(state)));
            }
            DSD_ASSIGN_OR_RETURN(const IncompatibleKeys keys,
                                 session.Set(model_dict, optimizer_dict));
            DSD_REQUIRE(keys.empty());
            DSD_REQUIRE(at::equal(
                model.tensor(0).detach(),
                test::ShardOf(Numbers({5, 2}, 100), layout, comm.rank())));
            StateDict& state = optimizer.StateOf(model.tensor(0));
            DSD_REQUIRE(*state.Find("step")->get_if<int64_t>() == 3);
            DSD_REQUIRE(at::equal(
                TensorAt(state, "moment"),
                test::ShardOf(Numbers({5, 2}, 200), layout, comm.rank())));
            return absl::OkStatus();
          }),
      AllOk());
}

// The optimizers are not part of the call.
TEST_P(DataHoldersTest, SetOfOnePartLeavesTheOtherAlone) {
  EXPECT_THAT(RunRankThreads(
                  ranks(),
                  [&](Communicator& comm) -> absl::Status {
                    const auto model = World::Make(comm.size(), comm.rank());
                    FakeOptimizer optimizer;
                    optimizer.groups.push_back({{model->tensor(0)}, {}});
                    SourceSession session(model.get(), {&optimizer}, &comm,
                                          Full());
                    DSD_RETURN_IF_ERROR(session.SetModel(
                        comm.rank() == 0 ? World::WholeDict(9) : StateDict()));
                    DSD_REQUIRE(optimizer.state.empty());
                    return World::Check(*model, comm.size(), comm.rank(), 9);
                  }),
              AllOk());
}

TEST_P(DataHoldersTest, PreferredRankWinsOverDictsThatDiffer) {
  for (int chosen = 0; chosen < ranks(); ++chosen) {
    StateDictOptions options;
    options.source_rank = chosen;
    EXPECT_THAT(
        RunRankThreads(
            ranks(),
            [&](Communicator& comm) -> absl::Status {
              const auto model = World::Make(comm.size(), comm.rank());
              StateDict dict = World::WholeDict(100 * comm.rank());
              if (comm.rank() != chosen) dict.Erase(std::string("rows"));
              DSD_RETURN_IF_ERROR(SourceSession(model.get(), {}, &comm, options)
                                      .SetModel(dict));
              return World::Check(*model, comm.size(), comm.rank(),
                                  100 * chosen);
            }),
        AllOk());
  }
}

TEST_P(DataHoldersTest, DictsOfSomeRanksThatDifferAreAnErrorOnAll) {
  if (ranks() < 3) GTEST_SKIP() << "needs two ranks with and one without";
  for (const bool other_shape : {false, true}) {
    for (const absl::Status& status :
         RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
           const auto model = World::Make(comm.size(), comm.rank());
           StateDict dict;
           if (comm.rank() < 2) dict = World::WholeDict(100);
           if (comm.rank() == 1 && other_shape) {
             dict.Set("plain", Value(TensorValue(at::zeros({4}))));
           } else if (comm.rank() == 1) {
             dict.Erase(std::string("plain"));
           }
           const absl::Status status =
               SourceSession(model.get(), {}, &comm, Full())
                   .SetModel(dict)
                   .status();
           DSD_RETURN_IF_ERROR(
               World::Check(*model, comm.size(), comm.rank(), 0));
           return status;
         })) {
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                   "differs from that of rank 0"));
      EXPECT_THAT(std::string(status.message()),
                  testing::AllOf(HasSubstr("rank 1: "), HasSubstr("\"plain\""),
                                 HasSubstr("source_rank")));
    }
  }
}

TEST_P(DataHoldersTest, NobodyHasDataIsMissingKeysOnAll) {
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) {
         const auto model = World::Make(comm.size(), comm.rank());
         return SourceSession(model.get(), {}, &comm, Full())
             .SetModel(StateDict())
             .status();
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                                 "missing keys (7): \"rows\""));
  }
}

TEST_P(DataHoldersTest, RankWithoutTheRankItNamesIsRefused) {
  StateDictOptions options;
  options.source_rank = ranks();
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) {
         const auto model = World::Make(comm.size(), comm.rank());
         return SourceSession(model.get(), {}, &comm, options)
             .SetModel(World::WholeDict(0))
             .status();
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                                 absl::StrCat("no rank ", ranks())));
  }
}

TEST_P(DataHoldersTest, OptionsThatDifferAreNamedOnAll) {
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) {
         const auto model = World::Make(comm.size(), comm.rank());
         StateDictOptions options = Full();
         options.strict = comm.rank() != 1;
         return SourceSession(model.get(), {}, &comm, options)
             .SetModel(World::WholeDict(0))
             .status();
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "rank 1: strict = 0"));
  }
}

}  // namespace
}  // namespace dsd
