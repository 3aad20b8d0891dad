// SPDX-License-Identifier: Apache-2.0
//
// What ranks learn when they do not agree, replicas that differ, and sets that
// are all or nothing.

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/equal.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/store.h"
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
using ::dsd::test::World;
using ::testing::HasSubstr;
using ::testing::Not;

// 40 tensors, of which one rank has one less or of another kind.
std::unique_ptr<FakeModel> Many(int without, int changed, at::Tensor other) {
  auto model = std::make_unique<FakeModel>();
  for (int i = 0; i < 40; ++i) {
    if (i == without) continue;
    model->Add(absl::StrCat("p", i), i == changed ? other : Numbers({4}, i));
  }
  return model;
}

void ExpectAll(const std::vector<absl::Status>& statuses, const char* text) {
  for (const absl::Status& status : statuses) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition, text));
    EXPECT_EQ(status.message(), statuses[0].message());
    // Of 40 tensors only the one that differs is named.
    EXPECT_THAT(std::string(status.message()), Not(HasSubstr("p7")));
  }
}

TEST(DisagreementTest, KeyThatOneRankLacksIsNamedWithIt) {
  ExpectAll(RunAndLeave(4,
                        [](Communicator& comm) {
                          const auto model =
                              Many(comm.rank() == 2 ? 31 : -1, -1, {});
                          return SourceSession(model.get(), {}, &comm, Full())
                              .GetModel()
                              .status();
                        }),
            "\"model.p31\" is missing on rank 2 and is on ranks 0, 1, 3");
}

TEST(DisagreementTest, ShapesAndTypesOfAKeyAreNamedWithTheirRanks) {
  ExpectAll(RunAndLeave(4,
                        [](Communicator& comm) {
                          const auto model = Many(
                              -1, comm.rank() == 2 ? 31 : -1, Numbers({5}));
                          return SourceSession(model.get(), {}, &comm, Full())
                              .GetModel()
                              .status();
                        }),
            "\"model.p31\" is float32 [5] mesh[4] R on rank 2 and float32 [4] "
            "mesh[4] R on ranks 0, 1, 3");
  ExpectAll(RunAndLeave(2,
                        [](Communicator& comm) {
                          const auto model =
                              Many(-1, comm.rank() == 0 ? 31 : -1,
                                   Numbers({4}, 31, c10::kDouble));
                          return SourceSession(model.get(), {}, &comm, Full())
                              .GetModel()
                              .status();
                        }),
            "\"model.p31\" is float64 [4] mesh[2] R on rank 0 and float32");
}

TEST(DisagreementTest, DictsThatDifferInAType) {
  ExpectAll(RunAndLeave(4,
                        [](Communicator& comm) -> absl::Status {
                          const auto model = Many(-1, -1, {});
                          StateDict dict;
                          for (int i = 0; i < 40; ++i) {
                            dict.Set(absl::StrCat("p", i),
                                     Value(Numbers({4}, i,
                                                   i == 31 && comm.rank() == 3
                                                       ? c10::kDouble
                                                       : c10::kFloat)));
                          }
                          SourceSession session(model.get(), {}, &comm, Full());
                          const absl::Status status =
                              session.SetModel(dict).status();
                          // All is as before, and goes on.
                          DSD_RETURN_IF_ERROR(session.GetModel());
                          return status;
                        }),
            "\"model.p31\" is float64 [4] mesh[4] R on rank 3 and float32");
}

TEST(DisagreementTest, KeysThatAreMissingOnSomeRanksOnly) {
  StateDictOptions options = Full();
  options.strict = false;
  ExpectAll(RunAndLeave(4,
                        [&](Communicator& comm) {
                          const auto model = Many(-1, -1, {});
                          StateDict dict;
                          for (int i = 0; i < 40; ++i) {
                            if (i == 31 && comm.rank() == 1) continue;
                            dict.Set(absl::StrCat("p", i),
                                     Value(Numbers({4}, i)));
                          }
                          return SourceSession(model.get(), {}, &comm, options)
                              .SetModel(dict)
                              .status();
                        }),
            "missing keys [p31] and unexpected keys [] on rank 1");
}

TEST(DisagreementTest, OptionsOfAFullGetAreNamed) {
  ExpectAll(RunAndLeave(4,
                        [](Communicator& comm) {
                          const auto model = Many(-1, -1, {});
                          StateDictOptions options = Full();
                          options.cpu_offload = comm.rank() == 3;
                          return SourceSession(model.get(), {}, &comm, options)
                              .GetModel()
                              .status();
                        }),
            "cpu_offload = true for the ranks [0] on rank 3 and cpu_offload = "
            "false for the ranks [0, 1, 2, 3] on ranks 0, 1, 2");
}

TEST(DisagreementTest, OneRankVerifiesAndTheOthersDoNot) {
  ExpectAll(RunAndLeave(4,
                        [](Communicator& comm) {
                          const auto model = Many(-1, -1, {});
                          StateDictOptions options = Full();
                          options.verify_replicas = comm.rank() == 3;
                          return SourceSession(model.get(), {}, &comm, options)
                              .GetModel()
                              .status();
                        }),
            "rank 3: with verify_replicas");
}

// State that is set without being moved, of dicts that are not taken strictly.
TEST(DisagreementTest, OptimizerStateThatOneRankLacksOrHasMoreOf) {
  for (const bool lacks : {true, false}) {
    const std::vector<absl::Status> statuses =
        RunAndLeave(2, [&](Communicator& comm) -> absl::Status {
          const auto model = Many(-1, -1, {});
          model->tensor(0).requires_grad_();
          FakeOptimizer optimizer;
          optimizer.groups.push_back({{model->tensor(0)}, {}});
          StateDict& live = optimizer.StateOf(model->tensor(0));
          live.Set("step", Value(1));
          live.Set("moment", Value(Numbers({4})));
          StateDictOptions options;
          options.strict = false;
          SourceSession session(model.get(), {&optimizer}, &comm, options);
          DSD_ASSIGN_OR_RETURN(const StateDict got, session.GetOptimizer());
          StateDict dict = got;
          StateDict& state = *dict.Find("state")
                                  ->get_if<StateDict>()
                                  ->Find("p0")
                                  ->get_if<StateDict>();
          state.Set("step", Value(5));
          if (comm.rank() == 1) {
            if (lacks) {
              state.Erase(std::string("step"));
            } else {
              state.Set("more", Value(1));
            }
          }
          const absl::Status status = session.SetOptimizer(dict);
          DSD_REQUIRE(*live.Find("step")->get_if<int64_t>() == 1);
          DSD_RETURN_IF_ERROR(session.GetOptimizer());
          return status;
        });
    ExpectAll(statuses, lacks ? "missing optimizer state [p0.step] and "
                                "unexpected optimizer state [] on rank 1"
                              : "missing optimizer state [] and unexpected "
                                "optimizer state [p0.more] on rank 1");
  }
}

TEST(DisagreementTest, ManyDifferencesAreCut) {
  for (const absl::Status& status : RunAndLeave(2, [](Communicator& comm) {
         FakeModel model;
         for (int i = 0; i < 200; ++i) {
           model.Add(absl::StrCat("p", i), at::zeros({comm.rank() + 2}));
         }
         return SourceSession(&model, {}, &comm, Full()).GetModel().status();
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "and 150 more"));
  }
}

class VerifyReplicasTest : public testing::TestWithParam<int> {
 protected:
  int ranks() const { return GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, VerifyReplicasTest, testing::Values(1, 2, 4));

TEST_P(VerifyReplicasTest, EqualOnesPass) {
  EXPECT_THAT(RunRankThreads(
                  ranks(),
                  [&](Communicator& comm) -> absl::Status {
                    StateDictOptions options = Full();
                    options.verify_replicas = true;
                    const auto model = World::Make(ranks(), comm.rank());
                    SourceSession session(model.get(), {}, &comm, options);
                    DSD_RETURN_IF_ERROR(session.GetModel());
                    DSD_RETURN_IF_ERROR(session.SetModel(World::WholeDict(50)));
                    DSD_RETURN_IF_ERROR(session.SetModel(
                        comm.rank() == 0 ? World::WholeDict(70) : StateDict()));
                    return World::Check(*model, ranks(), comm.rank(), 70);
                  }),
              AllOk());
}

TEST_P(VerifyReplicasTest, PlainTensorsObjectsAndReplicatedShards) {
  if (ranks() == 1) return;
  const int odd = ranks() - 1;
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
         FakeModel model;
         const bool is_odd = comm.rank() == odd;
         model.Add("same", Numbers({3}).requires_grad_());
         model.Add("plain", Numbers({3}, is_odd ? 1 : 0).requires_grad_());
         // Every rank has all rows.
         const Layout replicated = *Layout::FromPlacements(
             {4, 2}, DeviceMesh::Iota({ranks()}), {Replicate()});
         model.AddShard("shard", Numbers({4, 2}, is_odd ? 1 : 0), replicated,
                        comm.rank());
         FakeOptimizer optimizer;
         optimizer.groups.push_back({{model.tensor(0)}, {}});
         optimizer.groups[0].hyperparameters.Set("lr", is_odd ? 0.5 : 0.25);
         StateDictOptions options = Full();
         DSD_RETURN_IF_ERROR(
             SourceSession(&model, {&optimizer}, &comm, options).Get());
         options.verify_replicas = true;
         return SourceSession(&model, {&optimizer}, &comm, options)
             .Get()
             .status();
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "\"model.plain\""));
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "\"model.shard\""));
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "\"optim.param_groups.0.lr\""));
    EXPECT_THAT(std::string(status.message()), Not(HasSubstr("same\"")));
    EXPECT_THAT(std::string(status.message()),
                HasSubstr(ranks() == 2 ? "0 | 1" : "0, 1, 2 | 3"));
  }
}

// Stages have keys, and groups of parameters, of their own.
TEST_P(VerifyReplicasTest, RanksOfDifferentKeysAreNotCompared) {
  EXPECT_THAT(RunRankThreads(
                  ranks(),
                  [&](Communicator& comm) -> absl::Status {
                    FakeModel model;
                    model.Add(absl::StrCat("stage", comm.rank()),
                              Numbers({3}, comm.rank()).requires_grad_());
                    FakeOptimizer optimizer;
                    optimizer.groups.push_back({{model.tensor(0)}, {}});
                    optimizer.groups[0].hyperparameters.Set("lr",
                                                            comm.rank() + 0.5);
                    StateDictOptions options = Full();
                    options.verify_replicas = true;
                    options.staged = true;
                    options.replica_ranks = {comm.rank()};
                    SourceSession session(&model, {&optimizer}, &comm, options);
                    DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict dicts,
                                         session.Get());
                    return session.Set(dicts.model, dicts.optimizer).status();
                  }),
              AllOk());
}

TEST_P(VerifyReplicasTest, DictsOfSeveralRanksMustBeEqual) {
  if (ranks() == 1) return;
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
         const auto model = World::Make(ranks(), comm.rank());
         StateDict dict = World::WholeDict(50);
         if (comm.rank() == 1) dict.Set("plain", Value(Numbers({2, 2}, 9)));
         StateDictOptions options = Full();
         options.verify_replicas = true;
         SourceSession session(model.get(), {}, &comm, options);
         const absl::Status status = session.SetModel(dict).status();
         DSD_RETURN_IF_ERROR(World::Check(*model, ranks(), comm.rank(), 0));
         DSD_RETURN_IF_ERROR(session.GetModel());
         return status;
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "differ in \"model.plain\""));
  }
}

// Some ranks give what the others are to have.
TEST_P(VerifyReplicasTest, DictsOfSomeRanksMustBeEqual) {
  if (ranks() < 4) return;
  for (const std::string other : {"plain", "scalar"}) {
    for (const absl::Status& status :
         RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
           const auto model = World::Make(ranks(), comm.rank());
           StateDict dict;
           if (comm.rank() < 2) dict = World::WholeDict(50);
           if (comm.rank() == 1) {
             const at::Tensor value = test::TensorAt(dict, other);
             dict.Set(other, Value(TensorValue(value.add(1))));
           }
           StateDictOptions options = Full();
           options.verify_replicas = true;
           SourceSession session(model.get(), {}, &comm, options);
           const absl::Status status = session.SetModel(dict).status();
           DSD_RETURN_IF_ERROR(World::Check(*model, ranks(), comm.rank(), 0));
           return status;
         })) {
      EXPECT_THAT(status,
                  IsStatus(absl::StatusCode::kFailedPrecondition,
                           absl::StrCat("differ in \"model.", other, "\"")));
    }
  }
}

// What nobody uses may differ.
TEST_P(VerifyReplicasTest, UnexpectedKeysAreNotCompared) {
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            const auto model = World::Make(ranks(), comm.rank());
            StateDict dict = World::WholeDict(50);
            dict.Set("unknown", Value(Numbers({3}, comm.rank())));
            StateDictOptions options = Full();
            options.verify_replicas = true;
            options.strict = false;
            DSD_RETURN_IF_ERROR(
                SourceSession(model.get(), {}, &comm, options).SetModel(dict));
            return World::Check(*model, ranks(), comm.rank(), 50);
          }),
      AllOk());
}

class StagedTest : public VerifyReplicasTest {};
INSTANTIATE_TEST_SUITE_P(Ranks, StagedTest, testing::Values(1, 2, 4));

TEST_P(StagedTest, SetsTheSame) {
  EXPECT_THAT(
      RunRankThreads(ranks(),
                     [&](Communicator& comm) -> absl::Status {
                       StateDictOptions options = Full();
                       options.staged = true;
                       const auto model = World::Make(ranks(), comm.rank());
                       const void* const memory = model->tensor(0).data_ptr();
                       SourceSession session(model.get(), {}, &comm, options);
                       for (const bool everywhere : {true, false}) {
                         const double start = everywhere ? 50 : 70;
                         DSD_RETURN_IF_ERROR(
                             session.SetModel(everywhere || comm.rank() == 0
                                                  ? World::WholeDict(start)
                                                  : StateDict()));
                         DSD_RETURN_IF_ERROR(
                             World::Check(*model, ranks(), comm.rank(), start));
                       }
                       DSD_REQUIRE(model->tensor(0).data_ptr() == memory);
                       return absl::OkStatus();
                     }),
      AllOk());
}

// A transfer that is given up on one rank.
TEST_P(StagedTest, WhatFailsHalfWayChangesNothing) {
  if (ranks() == 1) return;
  for (const absl::Status& status : RunRankThreads(
           ranks(),
           [&](Communicator& comm) -> absl::Status {
             FakeModel model;
             const Layout rows = *Layout::FromPlacements(
                 {4 * ranks(), 1 << 16}, DeviceMesh::Iota({ranks()}),
                 {Shard(0)});
             model.AddShard("w", at::zeros({4 * ranks(), 1 << 16}), rows,
                            comm.rank());
             StateDict dict;
             if (comm.rank() == 0) {
               dict.Set("w", Value(Numbers({4 * ranks(), 1 << 16}, 1)));
             }
             StateDictOptions options = Full();
             options.staged = true;
             std::atomic<bool> cancel = false;
             CallOptions call;
             if (comm.rank() == 0) {
               call.cancel = &cancel;
               call.progress = [&](const Progress&) { cancel = true; };
             }
             SourceSession session(&model, {}, &comm, options);
             const absl::Status status = session.SetModel(dict, call).status();
             DSD_REQUIRE(!status.ok());
             DSD_REQUIRE(at::equal(model.tensor(0), at::zeros({4, 1 << 16})));
             // Nothing is unspecified.
             options.full_state_dict = false;
             DSD_RETURN_IF_ERROR(
                 SourceSession(&model, {}, &comm, {}).GetModel());
             return status;
           },
           {absl::Seconds(60), {}, /*shutdown=*/false})) {
    EXPECT_FALSE(status.ok());
    EXPECT_NE(status.code(), absl::StatusCode::kInternal) << status;
  }
}

// A group that failed in a set, and the one that takes its place.
TEST(RebindTest, SessionGoesOnOverAnotherCommunicator) {
  const std::shared_ptr<Store> store = MakeInProcessStore(Env::Real());
  EXPECT_THAT(
      RunRankThreads(
          2,
          [&](Communicator& comm) -> absl::Status {
            const auto model = World::Make(2, comm.rank());
            SourceSession session(model.get(), {}, &comm, Full());
            const StateDict dict =
                comm.rank() == 0 ? World::WholeDict(50) : StateDict();
            DSD_RETURN_IF_ERROR(session.SetModel(dict));
            const SessionStats before = session.stats();
            comm.Abort(absl::UnavailableError("the end"));
            DSD_REQUIRE(session.SetModel(dict).status().code() ==
                        absl::StatusCode::kAborted);

            CommunicatorOptions options =
                RankThreadCommunicator(comm.rank(), 2, store);
            options.generation = 1;
            DSD_ASSIGN_OR_RETURN(const auto next,
                                 Communicator::Create(options));
            DSD_RETURN_IF_ERROR(session.Rebind(next.get()));
            DSD_RETURN_IF_ERROR(session.SetModel(
                comm.rank() == 0 ? World::WholeDict(70) : StateDict()));
            DSD_RETURN_IF_ERROR(World::Check(*model, 2, comm.rank(), 70));
            DSD_REQUIRE(session.stats().plans_made == before.plans_made);
            DSD_REQUIRE(session.stats().tables_built == before.tables_built);

            const absl::Status other = session.Rebind(nullptr);
            DSD_REQUIRE(other.code() == absl::StatusCode::kInvalidArgument);
            DSD_RETURN_IF_ERROR(session.GetModel());
            return next->Shutdown();
          },
          {absl::Seconds(60), {}, /*shutdown=*/false}),
      AllOk());
}

}  // namespace
}  // namespace dsd
