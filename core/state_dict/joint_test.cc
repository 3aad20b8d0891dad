// SPDX-License-Identifier: Apache-2.0
//
// Ranks with different keys: two pipeline stages of one or two ranks each, and
// what happens to a key that is truly missing.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/equal.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
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
using ::dsd::test::KeysOf;
using ::dsd::test::Numbers;
using ::dsd::test::RunAndLeave;
using ::dsd::test::TensorAt;
using ::testing::AllOf;
using ::testing::HasSubstr;

// Stage s has "s<s>.plain" on both of its ranks, "s<s>.rows" and "s<s>.columns"
// sharded over them, and "s<s>.scale" of one element.
struct Stage {
  Stage(const Communicator& comm, double start)
      : stage(comm.rank() * 2 / comm.size()) {
    const int per_stage = comm.size() / 2;
    std::vector<Holder> holders;
    for (int i = 0; i < per_stage; ++i) {
      options.replica_ranks.push_back(stage * per_stage + i);
      holders.push_back(stage * per_stage + i);
    }
    options.full_state_dict = true;
    const DeviceMesh mesh = *DeviceMesh::Create({per_stage}, holders);
    for (const auto& [name, whole] : Whole(stage, start)) {
      if (name.find("rows") != std::string::npos ||
          name.find("columns") != std::string::npos) {
        const int dim = name.find("rows") != std::string::npos ? 0 : 1;
        model.AddShard(name, whole.clone().requires_grad_(),
                       *Layout::FromPlacements(
                           {whole.sizes().begin(), whole.sizes().end()}, mesh,
                           {Shard(dim)}),
                       comm.rank());
      } else {
        model.Add(name, whole.clone().requires_grad_());
      }
    }
    FakeOptimizer::Group group;
    for (size_t i = 0; i < model.size(); ++i) {
      group.params.push_back(model.tensor(i));
      StateDict& state = optimizer.StateOf(model.tensor(i));
      state.Set("step", Value(int64_t{3 + stage}));
      state.Set("moment", Value(TensorValue(model.tensor(i).detach().mul(2))));
    }
    group.hyperparameters.Set("lr", Object(0.5 + stage));
    optimizer.groups.push_back(std::move(group));
  }

  static std::vector<std::pair<std::string, at::Tensor>> Whole(int stage,
                                                               double start) {
    const double from = start + 1000 * stage;
    return {{absl::StrCat("s", stage, ".plain"), Numbers({3, 2}, from)},
            {absl::StrCat("s", stage, ".rows"), Numbers({5, 3}, from + 100)},
            {absl::StrCat("s", stage, ".columns"), Numbers({3, 3}, from + 200)},
            {absl::StrCat("s", stage, ".scale"), Numbers({1}, from + 300)}};
  }

  static StateDict WholeDict(double start) {
    StateDict dict;
    for (const int stage : {0, 1}) {
      for (const auto& [name, whole] : Whole(stage, start)) {
        dict.Set(name, Value(TensorValue(whole)));
      }
    }
    return dict;
  }

  absl::Status Check(const Communicator& comm, double start) {
    Stage expected(comm, start);
    for (size_t i = 0; i < model.size(); ++i) {
      if (!at::equal(model.tensor(i).detach(),
                     expected.model.tensor(i).detach())) {
        return test::Fail(absl::StrCat("tensor ", i, " has other values"));
      }
    }
    return absl::OkStatus();
  }

  int stage;
  StateDictOptions options;
  FakeModel model;
  FakeOptimizer optimizer;
};

class JointTest : public testing::TestWithParam<int> {
 protected:
  int ranks() const { return GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, JointTest, testing::Values(2, 4));

// 126595, 112167: pipeline stages.
TEST_P(JointTest, FullGetHasTheKeysOfAllStages) {
  for (const bool one_rank : {false, true}) {
    EXPECT_THAT(
        RunRankThreads(
            ranks(),
            [&](Communicator& comm) -> absl::Status {
              Stage stage(comm, 0);
              if (one_rank) stage.options.full_state_dict_ranks = {ranks() - 1};
              SourceSession session(&stage.model, {&stage.optimizer}, &comm,
                                    stage.options);
              DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict dicts,
                                   session.Get());
              if (one_rank && comm.rank() != ranks() - 1) {
                DSD_REQUIRE(dicts.model.empty() && dicts.optimizer.empty());
                return absl::OkStatus();
              }
              const StateDict expected = Stage::WholeDict(0);
              DSD_REQUIRE(KeysOf(dicts.model) == KeysOf(expected));
              const auto& state =
                  *dicts.optimizer.Find("state")->get_if<StateDict>();
              for (const std::string& key : KeysOf(expected)) {
                const at::Tensor whole = TensorAt(expected, key);
                DSD_REQUIRE(at::equal(TensorAt(dicts.model, key), whole));
                DSD_REQUIRE(at::equal(
                    TensorAt(*state.Find(key)->get_if<StateDict>(), "moment"),
                    whole.mul(2)));
              }
              const auto& groups =
                  *dicts.optimizer.Find("param_groups")->get_if<Value::List>();
              DSD_REQUIRE(groups.size() == 2);
              DSD_REQUIRE(*groups[1]
                               .get_if<StateDict>()
                               ->Find("lr")
                               ->get_if<double>() == 1.5);
              return absl::OkStatus();
            }),
        AllOk());
  }
}

TEST_P(JointTest, SetTakesValuesFromWhateverRankHasThem) {
  enum Who { kAll, kOwnKeys, kLastRank, kFirstByName };
  for (const Who who : {kAll, kOwnKeys, kLastRank, kFirstByName}) {
    EXPECT_THAT(
        RunRankThreads(ranks(),
                       [&](Communicator& comm) -> absl::Status {
                         Stage stage(comm, 0);
                         StateDict dict;
                         if (who == kAll ||
                             (who == kLastRank && comm.rank() == ranks() - 1)) {
                           dict = Stage::WholeDict(70);
                         } else if (who == kOwnKeys) {
                           for (const auto& [name, whole] :
                                Stage::Whole(stage.stage, 70)) {
                             dict.Set(name, Value(TensorValue(whole)));
                           }
                         } else if (who == kFirstByName) {
                           stage.options.source_rank = 0;
                           dict = Stage::WholeDict(comm.rank() == 0 ? 70 : 5);
                         }
                         SourceSession session(&stage.model, {}, &comm,
                                               stage.options);
                         DSD_ASSIGN_OR_RETURN(const IncompatibleKeys keys,
                                              session.SetModel(dict));
                         DSD_REQUIRE(keys.empty());
                         return stage.Check(comm, 70);
                       }),
        AllOk())
        << who;
  }
}

TEST_P(JointTest, BothDictsRoundTripThroughOneRank) {
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            Stage from(comm, 40);
            from.options.full_state_dict_ranks = {0};
            DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict dicts,
                                 SourceSession(&from.model, {&from.optimizer},
                                               &comm, from.options)
                                     .Get());
            Stage to(comm, 0);
            DSD_ASSIGN_OR_RETURN(
                const IncompatibleKeys keys,
                SourceSession(&to.model, {&to.optimizer}, &comm, to.options)
                    .Set(dicts.model, dicts.optimizer));
            DSD_REQUIRE(keys.empty());
            for (size_t i = 0; i < to.model.size(); ++i) {
              DSD_REQUIRE(at::equal(
                  TensorAt(to.optimizer.StateOf(to.model.tensor(i)), "moment"),
                  to.model.tensor(i).detach().mul(2)));
            }
            return to.Check(comm, 40);
          }),
      AllOk());
}

// Each rank has an expert beside a sharded parameter that all have, and both in
// one group.
struct Expert {
  Expert(const Communicator& comm, double start) {
    const Layout rows = *Layout::FromPlacements(
        {5, 2}, DeviceMesh::Iota({comm.size()}), {Shard(0)});
    const std::vector<at::Tensor> params = {
        model.AddShard("shared", Numbers({5, 2}, start).requires_grad_(), rows,
                       comm.rank()),
        Numbers({3}, start + 100 * comm.rank()).requires_grad_()};
    model.Add(absl::StrCat("expert", comm.rank()), params[1]);
    for (const at::Tensor& param : params) {
      StateDict& state = optimizer.StateOf(param);
      state.Set("step", Value(static_cast<int64_t>(start)));
      state.Set("moment", Value(TensorValue(param.detach().mul(2))));
    }
    optimizer.groups.push_back({params, {}});
    optimizer.groups[0].hyperparameters.Set("lr", Object(start));
    options.replica_ranks = {comm.rank()};
  }

  FakeModel model;
  FakeOptimizer optimizer;
  StateDictOptions options;
};

TEST_P(JointTest, ParameterOfAllRanksIsInOneGroup) {
  for (const bool flat : {false, true}) {
    for (const bool full : {false, true}) {
      EXPECT_THAT(
          RunRankThreads(
              ranks(),
              [&](Communicator& comm) -> absl::Status {
                Expert from(comm, 40);
                Expert to(comm, 0);
                for (Expert* const expert : {&from, &to}) {
                  expert->options.full_state_dict = full;
                  expert->options.flatten_optimizer_state_dict = flat;
                }
                DSD_ASSIGN_OR_RETURN(
                    const StateDict dict,
                    SourceSession(&from.model, {&from.optimizer}, &comm,
                                  from.options)
                        .GetOptimizer());
                if (!flat && full) {
                  std::vector<std::string> names;
                  for (const Value& group :
                       *dict.Find("param_groups")->get_if<Value::List>()) {
                    for (const Value& name : *group.get_if<StateDict>()
                                                  ->Find("params")
                                                  ->get_if<Value::List>()) {
                      names.push_back(*name.get_if<std::string>());
                    }
                  }
                  std::vector<std::string> expected = {"shared"};
                  for (int rank = 0; rank < ranks(); ++rank) {
                    expected.push_back(absl::StrCat("expert", rank));
                  }
                  DSD_REQUIRE(names == expected);
                }
                DSD_RETURN_IF_ERROR(
                    SourceSession(&to.model, {&to.optimizer}, &comm, to.options)
                        .SetOptimizer(dict));
                for (size_t i = 0; i < to.model.size(); ++i) {
                  const StateDict& state =
                      to.optimizer.StateOf(to.model.tensor(i));
                  DSD_REQUIRE(at::equal(TensorAt(state, "moment"),
                                        from.model.tensor(i).detach().mul(2)));
                  DSD_REQUIRE(*state.Find("step")->get_if<int64_t>() == 40);
                }
                DSD_REQUIRE(*to.optimizer.groups[0].hyperparameters.Find(
                                "lr") == Object(40.0));
                return absl::OkStatus();
              }),
          AllOk())
          << flat << full;
    }
  }
}

// What one rank's dict says twice is an error, as it is without other ranks.
TEST_P(JointTest, ParameterInTwoGroupsOfOneRankIsStillAnError) {
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
         Expert expert(comm, 40);
         SourceSession session(&expert.model, {&expert.optimizer}, &comm,
                               expert.options);
         DSD_ASSIGN_OR_RETURN(StateDict dict, session.GetOptimizer());
         auto& groups = *dict.Find("param_groups")->get_if<Value::List>();
         groups.push_back(groups[0]);
         return session.SetOptimizer(dict);
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                                 "in group 0 and in group 1"));
  }
}

TEST_P(JointTest, KeyThatIsTrulyMissingIsNamedWithItsRank) {
  if (ranks() < 4) GTEST_SKIP() << "needs two ranks per stage";
  // The second one has one element.
  for (const std::string missing : {"s1.plain", "s1.scale"}) {
    for (const bool set : {false, true}) {
      for (const absl::Status& status :
           RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
             Stage stage(comm, 0);
             FakeModel less;
             for (const auto& [name, whole] : Stage::Whole(stage.stage, 0)) {
               if (comm.rank() == 3 && name == missing) continue;
               less.Add(name, whole);
             }
             SourceSession session(&less, {}, &comm, stage.options);
             return set ? session.SetModel(Stage::WholeDict(0)).status()
                        : session.GetModel().status();
           })) {
        EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                     absl::StrCat("\"model.", missing,
                                                  "\" is missing on rank 3 and "
                                                  "is on rank 2")));
      }
    }
  }
}

// Counts of a shard are where the shard is, whatever plain tensors are
// replicated over.
TEST_P(JointTest, CountsNeedNotBeOnAllReplicas) {
  for (const bool flat : {false, true}) {
    EXPECT_THAT(
        RunRankThreads(
            ranks(),
            [&](Communicator& comm) -> absl::Status {
              Stage stage(comm, 0);
              FakeModel model;
              FakeOptimizer optimizer;
              model.Add("everywhere", Numbers({1}).requires_grad_());
              optimizer.groups.push_back({{model.tensor(0)}, {}});
              optimizer.groups[0].hyperparameters.Set("lr", Object(0.5));
              const int first = stage.stage * ranks() / 2;
              const DeviceMesh mesh = DeviceMesh::Iota({ranks() / 2}, first);
              optimizer.groups[0].params.push_back(model.AddShard(
                  absl::StrCat("expert", stage.stage),
                  Numbers({4, 2}).requires_grad_(),
                  *Layout::FromPlacements({4, 2}, mesh, {Shard(0)}),
                  comm.rank()));
              for (const at::Tensor& param : optimizer.groups[0].params) {
                StateDict& state = optimizer.StateOf(param);
                state.Set("step", Value(TensorValue(Numbers({}, 3))));
                state.Set("moment", Value(TensorValue(param.detach().mul(2))));
              }
              StateDictOptions options = Full();
              options.flatten_optimizer_state_dict = flat;
              for (int rank = 0; rank < ranks(); ++rank) {
                options.replica_ranks.push_back(rank);
              }
              SourceSession session(&model, {&optimizer}, &comm, options);
              DSD_ASSIGN_OR_RETURN(const StateDict dict,
                                   session.GetOptimizer());
              return session.SetOptimizer(dict);
            }),
        AllOk())
        << flat;
  }
}

// Dicts of PyTorch before 0.4 have [1] where there is no dimension now.
TEST_P(JointTest, OldScalarsFillThoseWithoutDimensions) {
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            Stage stage(comm, 0);
            const std::string name = absl::StrCat("s", stage.stage, ".zero");
            stage.model.Add(name, Numbers({}));
            StateDict dict;
            if (comm.rank() == ranks() - 1) {
              dict = Stage::WholeDict(70);
              dict.Set("s0.zero", Value(TensorValue(Numbers({1}, 7))));
              dict.Set("s1.zero", Value(TensorValue(Numbers({1}, 8))));
            }
            SourceSession session(&stage.model, {}, &comm, stage.options);
            DSD_RETURN_IF_ERROR(session.SetModel(dict));
            DSD_REQUIRE(at::equal(stage.model.tensor(stage.model.size() - 1),
                                  Numbers({}, 7 + stage.stage)));
            return absl::OkStatus();
          }),
      AllOk());
}

// Learning rates may be tensors, and groups have other numbers in the joint
// dict.
TEST_P(JointTest, TensorsInGroupsStayWithTheirGroups) {
  EXPECT_THAT(
      RunRankThreads(
          ranks(),
          [&](Communicator& comm) -> absl::Status {
            FakeModel model;
            FakeOptimizer optimizer;
            StateDict dict;
            StateDict states;
            Value::List groups;
            for (int i = 0; i <= comm.rank(); ++i) {
              const std::string fqn = absl::StrCat("p", comm.rank(), ".", i);
              model.Add(fqn, Numbers({2}).requires_grad_());
              optimizer.groups.push_back({{model.tensor(i)}, {}});
              StateDict state;
              state.Set("step", Value(int64_t{1}));
              state.Set("moment", Value(TensorValue(Numbers({2}))));
              states.Set(fqn, Value(std::move(state)));
              StateDict group;
              group.Set("lr",
                        Value(TensorValue(Numbers({}, 10 * comm.rank() + i))));
              group.Set("params", Value(Value::List{Value(fqn)}));
              groups.push_back(Value(std::move(group)));
            }
            dict.Set("state", Value(std::move(states)));
            dict.Set("param_groups", Value(std::move(groups)));
            StateDictOptions options;
            options.replica_ranks = {comm.rank()};
            DSD_RETURN_IF_ERROR(
                SourceSession(&model, {&optimizer}, &comm, options)
                    .SetOptimizer(dict));
            for (int i = 0; i <= comm.rank(); ++i) {
              DSD_REQUIRE(*optimizer.groups[i].hyperparameters.Find("lr") ==
                          Object(static_cast<double>(10 * comm.rank() + i)));
            }
            return absl::OkStatus();
          }),
      AllOk());
}

TEST_P(JointTest, VerifyReplicasComparesAllOfTheDicts) {
  if (ranks() < 4) GTEST_SKIP() << "needs two ranks per stage";
  for (const std::string other :
       {"", "model.s1.plain", "model.s1.scale", "optim.state.s1.plain.step",
        "optim.state.gone.moment", "optim.param_groups.1.lr"}) {
    for (const absl::Status& status :
         RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
           Stage from(comm, 70);
           DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict dicts,
                                SourceSession(&from.model, {&from.optimizer},
                                              &comm, from.options)
                                    .Get());
           const bool is_odd = comm.rank() == 3;
           const double number = is_odd ? 5 : 4;
           StateDict& states =
               *dicts.optimizer.Find("state")->get_if<StateDict>();
           // No parameter has it any more.
           StateDict gone;
           gone.Set(
               "moment",
               Value(TensorValue(Numbers(
                   {2}, other == "optim.state.gone.moment" ? number : 4))));
           states.Set("gone", Value(std::move(gone)));
           if (is_odd && other == "model.s1.plain") {
             dicts.model.Set("s1.plain", Value(TensorValue(Numbers({3, 2}))));
           } else if (is_odd && other == "model.s1.scale") {
             dicts.model.Set("s1.scale", Value(TensorValue(Numbers({1}))));
           } else if (is_odd && other == "optim.state.s1.plain.step") {
             states.Find("s1.plain")
                 ->get_if<StateDict>()
                 ->Set("step", Value(9));
           } else if (is_odd && other == "optim.param_groups.1.lr") {
             (*dicts.optimizer.Find("param_groups")->get_if<Value::List>())[1]
                 .get_if<StateDict>()
                 ->Set("lr", Value(9.0));
           }
           Stage to(comm, 0);
           to.options.verify_replicas = true;
           const absl::Status status =
               SourceSession(&to.model, {&to.optimizer}, &comm, to.options)
                   .Set(dicts.model, dicts.optimizer)
                   .status();
           DSD_RETURN_IF_ERROR(to.Check(comm, other.empty() ? 70 : 0));
           return status;
         })) {
      if (other.empty()) {
        EXPECT_TRUE(status.ok()) << status;
        continue;
      }
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                   absl::StrCat("differ in \"", other, "\"")));
    }
  }
}

TEST_P(JointTest, MissingAndUnexpectedKeysAreThoseOfTheWholeJob) {
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
         Stage stage(comm, 0);
         StateDict dict = Stage::WholeDict(70);
         dict.Erase(std::string("s1.rows"));
         dict.Set("nowhere", Value(TensorValue(at::zeros({2}))));
         const absl::Status status =
             SourceSession(&stage.model, {}, &comm, stage.options)
                 .SetModel(dict)
                 .status();
         DSD_RETURN_IF_ERROR(stage.Check(comm, 0));
         return status;
       })) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("missing keys (1): \"s1.rows\""),
                      HasSubstr("unexpected keys (1): \"nowhere\""),
                      testing::Not(HasSubstr("\"s0."))));
  }
}

TEST_P(JointTest, RanksWithoutTheOptionDisagree) {
  for (const bool set : {false, true}) {
    for (const absl::Status& status :
         RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
           Stage stage(comm, 0);
           if (comm.rank() == 0) stage.options.replica_ranks.clear();
           SourceSession session(&stage.model, {}, &comm, stage.options);
           return set ? session.SetModel(Stage::WholeDict(0)).status()
                      : session.GetModel().status();
         })) {
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                   "replica_ranks"));
    }
  }
}

TEST_P(JointTest, ReplicasMustHaveTheRankItself) {
  for (const absl::Status& status :
       RunAndLeave(ranks(), [&](Communicator& comm) -> absl::Status {
         Stage stage(comm, 0);
         if (comm.rank() == 0) stage.options.replica_ranks = {1};
         return SourceSession(&stage.model, {}, &comm, stage.options)
             .GetModel()
             .status();
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                                 "rank 0 among them, found 1"));
  }
}

}  // namespace
}  // namespace dsd
