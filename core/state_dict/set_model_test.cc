// SPDX-License-Identifier: Apache-2.0
//
// Sets of models: key maps, assign, types, and tensors of every kind on both
// sides.

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/_neg_view.h"
#include "ATen/ops/complex.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/equal.h"
#include "ATen/ops/eye.h"
#include "ATen/ops/imag.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "c10/core/InferenceMode.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/fake_sources.h"
#include "dsd/core/state_dict/key_map.h"
#include "dsd/core/state_dict/source_session.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/core/state_dict/test_world.h"
#include "dsd/core/tensor/sharding_table.h"
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
using ::dsd::test::TensorAt;
using ::dsd::test::World;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

StateDict DictOf(std::vector<std::pair<std::string, at::Tensor>> tensors) {
  StateDict dict;
  for (auto& [key, tensor] : tensors) {
    dict.Set(key, Value(TensorValue(std::move(tensor))));
  }
  return dict;
}

absl::StatusOr<IncompatibleKeys> Set(FakeModel& model, const StateDict& dict,
                                     StateDictOptions options = {}) {
  return SourceSession(&model, {}, nullptr, std::move(options)).SetModel(dict);
}

// torchtitan 639: names change between versions of a model.
TEST(KeyMapTest, TableRenamesKeysOfBothDicts) {
  FakeModel model;
  FakeOptimizer optimizer;
  model.Add("layer.w", at::zeros({2}).requires_grad_());
  model.Add("layer.b", at::zeros({2}).requires_grad_());
  optimizer.groups.push_back({{model.tensor(0), model.tensor(1)}, {}});
  StateDictOptions options;
  options.key_map = RenameKeys({{"old.w", "layer.w"}, {"dropped", ""}});
  const StateDict model_dict = DictOf({{"old.w", Numbers({2}, 1)},
                                       {"layer.b", Numbers({2}, 3)},
                                       {"dropped", Numbers({9})}});
  const auto state_of = [](double start) {
    StateDict entry;
    entry.Set("step", Value(4));
    entry.Set("moment", Value(TensorValue(Numbers({2}, start))));
    return Value(entry);
  };
  StateDict state;
  state.Set("old.w", state_of(5));
  state.Set("layer.b", state_of(7));
  StateDict group;
  group.Set("lr", Value(0.25));
  group.Set("params", Value(Value::List{"old.w", "layer.b"}));
  StateDict nested;
  nested.Set("state", Value(state));
  nested.Set("param_groups", Value(Value::List{Value(group)}));
  StateDict flat;
  flat.Set("state.old.w.step", Value(4));
  flat.Set("state.old.w.moment", Value(TensorValue(Numbers({2}, 5))));
  flat.Set("state.layer.b.step", Value(4));
  flat.Set("state.layer.b.moment", Value(TensorValue(Numbers({2}, 7))));
  flat.Set("param_groups.old.w.lr", Value(0.25));
  flat.Set("param_groups.layer.b.lr", Value(0.25));
  for (const StateDict& optimizer_dict : {nested, flat}) {
    optimizer.state.clear();
    optimizer.groups[0].hyperparameters = ObjectDict();
    SourceSession session(&model, {&optimizer}, nullptr, options);
    const auto keys = session.Set(model_dict, optimizer_dict);
    ASSERT_TRUE(keys.ok()) << keys.status();
    EXPECT_TRUE(keys->empty());
    EXPECT_TRUE(at::equal(model.tensor(0).detach(), Numbers({2}, 1)));
    EXPECT_TRUE(
        at::equal(TensorAt(optimizer.StateOf(model.tensor(0)), "moment"),
                  Numbers({2}, 5)));
    EXPECT_TRUE(
        at::equal(TensorAt(optimizer.StateOf(model.tensor(1)), "moment"),
                  Numbers({2}, 7)));
    EXPECT_EQ(*optimizer.groups[0].hyperparameters.Find("lr"), Object(0.25));
  }
  EXPECT_THAT(KeysOf(model_dict), ElementsAre("old.w", "layer.b", "dropped"));
}

TEST(KeyMapTest, StateThatIsRenamedAwayIsNotLoaded) {
  for (const bool flat : {false, true}) {
    FakeModel model;
    FakeOptimizer optimizer;
    model.Add("w", at::zeros({2}).requires_grad_());
    optimizer.groups.push_back({{model.tensor(0)}, {}});
    optimizer.groups[0].hyperparameters.Set("lr", Object(0.5));
    StateDict& state = optimizer.StateOf(model.tensor(0));
    state.Set("step", Value(1));
    state.Set("moment", Value(TensorValue(Numbers({2}))));
    StateDictOptions options;
    options.flatten_optimizer_state_dict = flat;
    options.key_map = RenameKeys({{"w", "old.w"}});
    SourceSession session(&model, {&optimizer}, nullptr, options);
    absl::StatusOr<StateDict> dict = session.GetOptimizer();
    ASSERT_TRUE(dict.ok()) << dict.status();
    state.Set("step", Value(7));
    EXPECT_THAT(session.SetOptimizer(*dict),
                IsStatus(absl::StatusCode::kInvalidArgument,
                         "missing optimizer state (1): \"w\""))
        << flat;
    EXPECT_EQ(*state.Find("step")->get_if<int64_t>(), 7);
    // Another parameter takes the name.
    model.Add("v", at::zeros({2}).requires_grad_());
    FakeOptimizer both;
    both.groups.push_back({{model.tensor(0), model.tensor(1)}, {}});
    both.groups[0].hyperparameters.Set("lr", Object(0.5));
    for (const size_t i : {0, 1}) {
      StateDict& own = both.StateOf(model.tensor(i));
      own.Set("step", Value(static_cast<int64_t>(i)));
      own.Set("moment", Value(TensorValue(Numbers({2}, 10.0 * i))));
    }
    options.key_map = nullptr;
    dict = SourceSession(&model, {&both}, nullptr, options).GetOptimizer();
    ASSERT_TRUE(dict.ok()) << dict.status();
    options.key_map = RenameKeys({{"v", "w"}, {"w", "old.w"}});
    options.strict = false;
    EXPECT_TRUE(SourceSession(&model, {&both}, nullptr, options)
                    .SetOptimizer(*dict)
                    .ok());
    const StateDict& loaded = both.StateOf(model.tensor(0));
    EXPECT_EQ(*loaded.Find("step")->get_if<int64_t>(), 1) << flat;
    EXPECT_TRUE(at::equal(TensorAt(loaded, "moment"), Numbers({2}, 10)));
  }
}

// Python's optimizer.state_dict() has numbers where others have names.
TEST(KeyMapTest, NumbersOfParametersAreNoNames) {
  FakeModel model;
  FakeOptimizer optimizer;
  model.Add("module.w", at::zeros({2}).requires_grad_());
  optimizer.groups.push_back({{model.tensor(0)}, {}});
  optimizer.groups[0].hyperparameters.Set("lr", Object(0.5));
  StateDict entry;
  entry.Set("step", Value(3));
  entry.Set("moment", Value(TensorValue(Numbers({2}, 5))));
  StateDict state;
  state.Set(int64_t{0}, Value(std::move(entry)));
  StateDict group;
  group.Set("lr", Value(0.25));
  group.Set("params", Value(Value::List{Value(int64_t{0})}));
  StateDict dict;
  dict.Set("state", Value(std::move(state)));
  dict.Set("param_groups", Value(Value::List{Value(std::move(group))}));
  StateDictOptions options;
  options.key_map = [](absl::string_view key) {
    return absl::StrCat("module.", key);
  };
  SourceSession session(&model, {&optimizer}, nullptr, options);
  const absl::StatusOr<IncompatibleKeys> keys =
      session.Set(DictOf({{"w", Numbers({2}, 1)}}), dict);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(keys->empty());
  EXPECT_TRUE(at::equal(TensorAt(optimizer.StateOf(model.tensor(0)), "moment"),
                        Numbers({2}, 5)));
  EXPECT_EQ(*optimizer.groups[0].hyperparameters.Find("lr"), Object(0.25));
}

TEST(KeyMapTest, CollisionsNameAllThree) {
  FakeModel model;
  model.Add("w", at::zeros({2}));
  StateDictOptions options;
  options.key_map = [](absl::string_view) { return std::string("w"); };
  const absl::Status status =
      Set(model, DictOf({{"a", Numbers({2})}, {"b", Numbers({2})}}), options)
          .status();
  EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                               "\"w\" of both \"a\" and \"b\""));
}

// Ranks whose functions give other names do not agree.
TEST(KeyMapTest, FunctionsCountByTheNamesTheyGive) {
  for (const absl::Status& status :
       test::RunAndLeave(2, [](Communicator& comm) {
         FakeModel model;
         model.Add("w", at::zeros({2}));
         StateDictOptions options;
         options.strict = false;
         options.key_map = [&](absl::string_view key) {
           return std::string(comm.rank() == 0 ? key : "v");
         };
         return SourceSession(&model, {}, &comm, options)
             .SetModel(DictOf({{"w", Numbers({2})}}))
             .status();
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "ranks disagree"));
  }
}

// Both maps fit the model.
TEST(KeyMapTest, RanksWithOtherMapsDisagree) {
  enum How { kEverywhere, kOnRank0, kJoint };
  enum Part { kModel, kNested, kFlat };
  for (const How how : {kEverywhere, kOnRank0, kJoint}) {
    for (const Part part : {kModel, kNested, kFlat}) {
      for (const bool same : {false, true}) {
        const std::vector<absl::Status> statuses =
            test::RunAndLeave(2, [&](Communicator& comm) -> absl::Status {
              FakeModel model;
              FakeOptimizer optimizer;
              optimizer.groups.emplace_back();
              for (const char* name : {"a", "b"}) {
                model.Add(name, at::zeros({2}).requires_grad_());
                const at::Tensor& param = model.tensor(model.size() - 1);
                optimizer.groups[0].params.push_back(param);
                StateDict& state = optimizer.StateOf(param);
                state.Set("step", Value(1));
                state.Set("moment", Value(Numbers({2}, model.size())));
              }
              optimizer.groups[0].hyperparameters.Set("lr", Object(0.5));
              StateDictOptions options = Full();
              options.flatten_optimizer_state_dict = part == kFlat;
              DSD_ASSIGN_OR_RETURN(
                  StateDict dict,
                  SourceSession(&model, {&optimizer}, nullptr, options)
                      .GetOptimizer());
              if (part == kModel) {
                dict = DictOf({{"a", Numbers({2}, 3)}, {"b", Numbers({2}, 5)}});
              }
              if (how == kOnRank0 && comm.rank() != 0) dict = StateDict();
              if (how == kJoint) options.replica_ranks = {0, 1};
              if (same || comm.rank() == 1) {
                options.key_map = RenameKeys({{"a", "b"}, {"b", "a"}});
              }
              SourceSession session(&model, {&optimizer}, &comm, options);
              const absl::Status status = part == kModel
                                              ? session.SetModel(dict).status()
                                              : session.SetOptimizer(dict);
              const at::Tensor& first =
                  part == kModel
                      ? model.tensor(0)
                      : TensorAt(optimizer.StateOf(model.tensor(0)), "moment");
              const double expected =
                  part == kModel ? (same ? 5 : 0) : (same ? 2 : 1);
              DSD_REQUIRE(first[0].item<double>() == expected);
              return status;
            });
        for (const absl::Status& status : statuses) {
          EXPECT_EQ(status, statuses[0]);
          if (same) {
            EXPECT_TRUE(status.ok()) << status << how << part;
            continue;
          }
          EXPECT_THAT(status,
                      IsStatus(absl::StatusCode::kFailedPrecondition,
                               "renamed by key_map [\"a\" to \"b\", \"b\" to "
                               "\"a\"] on rank 1"))
              << how << part;
        }
      }
    }
  }
}

// A dict made by state_dict() of a DDP, compiled or checkpointed model.
TEST(KeyMapTest, PrefixesOfWrappersAreReportedAndCanBeStripped) {
  FakeModel model;
  model.Add("l.w", at::zeros({2}));
  const StateDict dict = DictOf(
      {{"module._orig_mod.l._checkpoint_wrapped_module.w", Numbers({2}, 1)}});
  EXPECT_THAT(Set(model, dict).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "set key_map = dsd::StripWrapperSegments()"));
  StateDictOptions options;
  options.key_map = StripWrapperSegments();
  ASSERT_TRUE(Set(model, dict, options).ok());
  EXPECT_TRUE(at::equal(model.tensor(0), Numbers({2}, 1)));
}

TEST(DTypePolicyTest, CastKeepAndError) {
  FakeModel model;
  model.Add("w", at::zeros({2}).requires_grad_());
  const StateDict dict = DictOf({{"w", Numbers({2}, 1, c10::kDouble)}});
  StateDictOptions options;
  options.dtype_policy = DTypePolicy::kError;
  EXPECT_THAT(
      Set(model, dict, options).status(),
      IsStatus(absl::StatusCode::kInvalidArgument,
               "\"w\": type in the dict is Double, in the model Float"));
  options.dtype_policy = DTypePolicy::kKeep;
  EXPECT_THAT(Set(model, dict, options).status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "assign = true"));
  options.dtype_policy = DTypePolicy::kCast;
  ASSERT_TRUE(Set(model, dict, options).ok());
  EXPECT_EQ(model.tensor(0).scalar_type(), c10::kFloat);
  EXPECT_TRUE(at::equal(model.tensor(0).detach(), Numbers({2}, 1)));
  options.dtype_policy = DTypePolicy::kKeep;
  options.assign = true;
  ASSERT_TRUE(Set(model, dict, options).ok());
  EXPECT_EQ(model.tensor(0).scalar_type(), c10::kDouble);
  EXPECT_TRUE(model.tensor(0).requires_grad());
  EXPECT_THAT(Set(model, DictOf({{"w", Numbers({2}, 1, c10::kLong)}}), options)
                  .status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "gradients"));
}

// 188346: ties stay, and optimizers keep their parameters.
TEST(AssignTest, ReplacesMemoryOfAllOwnersAndKeepsTheTensors) {
  FakeModel model;
  const at::Tensor shared = Numbers({3, 2}).requires_grad_();
  model.Add("embedding", shared);
  model.Add("head", shared);
  model.Add("view", shared.detach());  // the same tensor, another object
  const void* const memory = shared.data_ptr();
  const void* const impl = shared.unsafeGetTensorImpl();
  StateDictOptions options;
  options.assign = true;
  const at::Tensor input = Numbers({3, 2}, 10);
  const auto keys = Set(model, DictOf({{"head", input}}), options);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(keys->empty());
  EXPECT_EQ(model.tensor(0).unsafeGetTensorImpl(), impl);
  EXPECT_NE(shared.data_ptr(), memory);
  EXPECT_TRUE(at::equal(shared.detach(), input));
  EXPECT_TRUE(shared.requires_grad());
  EXPECT_EQ(model.tensor(2).data_ptr(), shared.data_ptr());
  EXPECT_NE(shared.data_ptr(), input.data_ptr());
}

TEST(AssignTest, MetaTensorsBecomeRealAndOthersAreReported) {
  FakeModel model;
  const at::Tensor meta = at::empty({2, 2}, c10::kMeta).requires_grad_();
  model.Add("w", meta);
  model.Add("cache", at::empty({4}, c10::kMeta),
            EntryKind::kNonPersistentBuffer);
  const StateDict dict = DictOf({{"w", Numbers({2, 2}, 5)}});
  EXPECT_THAT(Set(model, dict).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "\"w\": the live tensor is on the meta device"));
  StateDictOptions options;
  options.assign = true;
  const auto keys = Set(model, dict, options);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_THAT(keys->unmaterialized_keys, ElementsAre("cache"));
  EXPECT_TRUE(meta.is_cpu());
  EXPECT_TRUE(at::equal(meta.detach(), Numbers({2, 2}, 5)));
  // It computes and differentiates as any other.
  meta.mul(meta).sum().backward();
  EXPECT_TRUE(at::equal(meta.grad(), meta.detach().mul(2)));
}

TEST(AssignTest, InferenceTensorsKeepTheirMemory) {
  FakeModel model;
  {
    const c10::InferenceMode guard;
    model.Add("w", at::zeros({2}));
  }
  const StateDict dict = DictOf({{"w", Numbers({2}, 3)}});
  StateDictOptions options;
  options.assign = true;
  EXPECT_THAT(Set(model, dict, options).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "\"w\": the live tensor was made in inference mode"));
  EXPECT_TRUE(at::equal(model.tensor(0), at::zeros({2})));
  ASSERT_TRUE(Set(model, dict).ok());
  EXPECT_TRUE(at::equal(model.tensor(0), Numbers({2}, 3)));
}

// What is assigned in inference mode can be trained outside of it.
TEST(AssignTest, InInferenceMode) {
  FakeModel model;
  model.Add("w", at::zeros({2}).requires_grad_());
  StateDictOptions options;
  options.assign = true;
  {
    const c10::InferenceMode guard;
    const auto keys = Set(model, DictOf({{"w", Numbers({2}, 3)}}), options);
    ASSERT_TRUE(keys.ok()) << keys.status();
  }
  EXPECT_TRUE(at::equal(model.tensor(0).detach(), Numbers({2}, 3)));
  EXPECT_FALSE(model.tensor(0).is_inference());
  model.tensor(0).mul(model.tensor(0)).sum().backward();
  EXPECT_TRUE(at::equal(model.tensor(0).grad(), Numbers({2}, 3).mul(2)));
}

TEST(AssignTest, ShardsStayShards) {
  StateDictOptions options;
  options.assign = true;
  options.dtype_policy = DTypePolicy::kKeep;
  for (const int ranks : {1, 2, 4}) {
    EXPECT_THAT(
        RunRankThreads(
            ranks,
            [&](Communicator& comm) -> absl::Status {
              const auto model = World::Make(comm.size(), comm.rank());
              StateDict dict;
              for (const auto& [name, whole] : World::Whole(40)) {
                dict.Set(name, Value(TensorValue(whole.to(c10::kDouble))));
              }
              if (comm.rank() != 0) dict = StateDict();
              SourceSession session(model.get(), {}, &comm, options);
              DSD_RETURN_IF_ERROR(session.SetModel(dict));
              DSD_ASSIGN_OR_RETURN(
                  const StateDict full,
                  SourceSession(model.get(), {}, &comm, Full()).GetModel());
              for (const auto& [name, whole] : World::Whole(40)) {
                DSD_REQUIRE(
                    at::equal(TensorAt(full, name), whole.to(c10::kDouble)));
              }
              return absl::OkStatus();
            }),
        AllOk());
  }
}

TEST(TensorKindsTest, AnyStridesOnBothSides) {
  // Transposed, channels last, every other row, a column of a wider tensor.
  const auto kinds = [](double start) {
    return std::vector<std::pair<std::string, at::Tensor>>{
        {"transposed", Numbers({5, 3}, start).t()},
        {"channels_last", Numbers({2, 3, 4, 5}, start)
                              .contiguous(c10::MemoryFormat::ChannelsLast)},
        {"every_other", Numbers({8, 2}, start).slice(0, 0, 8, 2)},
        {"column", Numbers({6, 4}, start).slice(1, 2, 3)},
        {"empty", Numbers({3, 0}, start)},
        {"scalar", Numbers({}, start)}};
  };
  FakeModel model;
  StateDict contiguous;
  for (const auto& [name, tensor] : kinds(0)) model.Add(name, tensor);
  for (const auto& [name, tensor] : kinds(100)) {
    contiguous.Set(name, Value(TensorValue(tensor.contiguous())));
  }
  for (const StateDict& dict : {contiguous, DictOf(kinds(100))}) {
    ASSERT_TRUE(Set(model, dict).ok());
    size_t i = 0;
    for (const auto& [name, tensor] : kinds(100)) {
      EXPECT_TRUE(at::equal(model.tensor(i), tensor)) << name;
      EXPECT_EQ(model.tensor(i++).strides(), tensor.strides()) << name;
    }
  }
  const auto full = SourceSession(&model, {}, nullptr, Full()).GetModel();
  ASSERT_TRUE(full.ok());
  for (const auto& [name, tensor] : kinds(100)) {
    EXPECT_TRUE(at::equal(TensorAt(*full, name), tensor)) << name;
    EXPECT_TRUE(TensorAt(*full, name).is_contiguous()) << name;
  }
}

TEST(TensorKindsTest, ExpandedValuesAreFineExpandedLiveTensorsAreNot) {
  FakeModel model;
  model.Add("w", at::zeros({4}));
  ASSERT_TRUE(Set(model, DictOf({{"w", Numbers({1}, 7).expand({4})}})).ok());
  EXPECT_TRUE(at::equal(model.tensor(0), Numbers({1}, 7).expand({4})));
  model.Add("unfolded", at::zeros({10}).unfold(0, 4, 2));
  EXPECT_THAT(
      Set(model, DictOf({{"w", Numbers({4})}, {"unfolded", Numbers({4, 4})}}))
          .status(),
      IsStatus(absl::StatusCode::kInvalidArgument,
               "\"unfolded\": the live tensor is expanded"));
}

TEST(TensorKindsTest, OverlappingLiveViewsAreNamedAsATarget) {
  FakeModel model;
  const at::Tensor whole = Numbers({4, 6});
  model.Add("left", whole.slice(1, 0, 3));
  model.Add("right", whole.slice(1, 3, 6));
  const StateDict halves =
      DictOf({{"left", Numbers({4, 3}, 1)}, {"right", Numbers({4, 3}, 50)}});
  ASSERT_TRUE(Set(model, halves).ok());  // interleaved, but no element shared
  EXPECT_TRUE(at::equal(model.tensor(0), Numbers({4, 3}, 1)));
  model.Add("all", whole);
  StateDict dict = halves;
  dict.Set("all", Value(TensorValue(Numbers({4, 6}, 9))));
  const at::Tensor before = whole.clone();
  EXPECT_THAT(Set(model, dict).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "\"left\" and \"all\" share some of their memory"));
  EXPECT_TRUE(at::equal(whole, before));
  // A part of them that does not overlap can be set, and all can be got.
  StateDictOptions options;
  options.strict = false;
  EXPECT_TRUE(Set(model, halves, options).ok());
  EXPECT_TRUE(SourceSession(&model, {}, nullptr, Full()).GetModel().ok());
}

// Aliases of live tensors under other names: one must not be filled from what
// the other has just become.
TEST(TensorKindsTest, LiveTensorsCanBeSwapped) {
  for (const int ranks : {1, 2}) {
    EXPECT_THAT(
        RunRankThreads(
            ranks,
            [&](Communicator& comm) -> absl::Status {
              FakeModel model;
              const Layout rows = *Layout::FromPlacements(
                  {4, 4}, DeviceMesh::Iota({comm.size()}), {Shard(0)});
              model.AddShard("a", Numbers({4, 4}, 0), rows, comm.rank());
              model.AddShard("b", Numbers({4, 4}, 100), rows, comm.rank());
              model.Add("c", Numbers({3, 3}, 7));
              SourceSession session(&model, {}, &comm, {});
              DSD_ASSIGN_OR_RETURN(StateDict dict, session.GetModel());
              const Value a = *dict.Find("a");
              dict.Set("a", *dict.Find("b"));
              dict.Set("b", a);
              dict.Set("c", Value(TensorValue(model.tensor(2).t())));
              DSD_RETURN_IF_ERROR(session.SetModel(dict));
              DSD_REQUIRE(at::equal(
                  model.tensor(0),
                  test::ShardOf(Numbers({4, 4}, 100), rows, comm.rank())));
              DSD_REQUIRE(at::equal(
                  model.tensor(1),
                  test::ShardOf(Numbers({4, 4}, 0), rows, comm.rank())));
              DSD_REQUIRE(at::equal(model.tensor(2), Numbers({3, 3}, 7).t()));
              return absl::OkStatus();
            }),
        AllOk());
  }
}

TEST(TensorKindsTest, MetaIsReturnedByASimpleGetAndRefusedByAFullOne) {
  FakeModel model;
  model.Add("w", at::empty({2}, c10::kMeta));
  const auto dict = SourceSession(&model, {}, nullptr, {}).GetModel();
  ASSERT_TRUE(dict.ok());
  EXPECT_TRUE(TensorAt(*dict, "w").is_meta());
  EXPECT_THAT(SourceSession(&model, {}, nullptr, Full()).GetModel().status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "meta"));
  model.tensor(0) = at::zeros({2});
  EXPECT_THAT(Set(model, *dict).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "\"w\": the tensor in the dict is on the meta device"));
}

TEST(TensorKindsTest, SparseTensorsAreGotAndRefusedAsATarget) {
  FakeModel model;
  model.Add("w", at::zeros({2}));
  model.Add("sparse", at::eye(3).to_sparse());
  const auto dict = SourceSession(&model, {}, nullptr, {}).GetModel();
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_THAT(SourceSession(&model, {}, nullptr, Full()).GetModel().status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "not dense"));
  const StateDict dense =
      DictOf({{"w", Numbers({2}, 5)}, {"sparse", at::eye(3)}});
  for (const bool assign : {false, true}) {
    StateDictOptions options;
    options.assign = assign;
    EXPECT_THAT(Set(model, dense, options).status(),
                IsStatus(absl::StatusCode::kInvalidArgument,
                         "\"sparse\": the live tensor is not dense"));
    EXPECT_TRUE(at::equal(model.tensor(0), at::zeros({2})));
  }
  FakeModel other;
  other.Add("w", at::zeros({2}));
  other.Add("sparse", at::zeros({3, 3}));
  EXPECT_THAT(Set(other, *dict).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "\"sparse\": the tensor in the dict is not dense"));
}

// Of PyTorch before 0.4, as load_state_dict() takes it.
TEST(TensorKindsTest, OneElementInOneDimensionFillsAScalar) {
  for (const bool assign : {false, true}) {
    FakeModel model;
    model.Add("s", at::zeros({}));
    StateDictOptions options;
    options.assign = assign;
    const auto keys = Set(model, DictOf({{"s", Numbers({1}, 7)}}), options);
    ASSERT_TRUE(keys.ok()) << keys.status();
    EXPECT_TRUE(at::equal(model.tensor(0), Numbers({}, 7)));
    EXPECT_FALSE(Set(model, DictOf({{"s", Numbers({1, 1})}}), options).ok());
  }
}

// w and w.t(): one memory under two names, as tied as any.
TEST(TensorKindsTest, ATransposedTieIsATie) {
  for (const bool assign : {false, true}) {
    for (const bool first : {false, true}) {
      for (const bool second : {false, true}) {
        FakeModel model;
        const at::Tensor whole = Numbers({2, 3});
        model.Add("in", whole);
        model.Add("out", whole.t());
        StateDictOptions options;
        options.assign = assign;
        StateDict dict;
        if (first) dict.Set("in", Value(Numbers({2, 3}, 50)));
        if (second) dict.Set("out", Value(Numbers({2, 3}, 50).t()));
        const auto keys = Set(model, dict, options);
        if (!first && !second) {
          EXPECT_THAT(keys.status(),
                      IsStatus(absl::StatusCode::kInvalidArgument,
                               "missing keys (2): \"in\", \"out\""));
          continue;
        }
        ASSERT_TRUE(keys.ok()) << keys.status();
        EXPECT_TRUE(keys->empty());
        EXPECT_TRUE(at::equal(model.tensor(0), Numbers({2, 3}, 50)));
        EXPECT_TRUE(at::equal(model.tensor(1), Numbers({2, 3}, 50).t()));
        EXPECT_TRUE(model.tensor(0).is_alias_of(model.tensor(1)));
        // Both names are checked.
        dict.Set("out", Value(Numbers({2, 3})));
        EXPECT_FALSE(Set(model, dict, options).ok());
      }
    }
  }
}

// One tensor cannot have both values: the first name counts, and it is said.
TEST(TensorKindsTest, TiedNamesWithOtherValuesAreReported) {
  for (const bool transposed : {false, true}) {
    FakeModel model;
    const at::Tensor whole = at::zeros({2, 3});
    model.Add("in", whole);
    model.Add("out", transposed ? whole.t() : whole);
    const auto dict_with = [&](at::Tensor out) {
      return DictOf({{"in", Numbers({2, 3}, 5)},
                     {"out", transposed ? out.t() : std::move(out)}});
    };
    // Equal values in memory of their own are one value, in other types too.
    at::Tensor nan = Numbers({2, 3}, 5);
    nan[0][0] = NAN;
    EXPECT_TRUE(Set(model, dict_with(Numbers({2, 3}, 5))).ok());
    EXPECT_TRUE(Set(model, dict_with(Numbers({2, 3}, 5, c10::kDouble))).ok());
    EXPECT_TRUE(Set(model, DictOf({{"in", nan.clone()},
                                   {"out", transposed ? nan.t() : nan}}))
                    .ok());
    whole.zero_();
    EXPECT_THAT(Set(model, dict_with(Numbers({2, 3}, 6))).status(),
                IsStatus(absl::StatusCode::kInvalidArgument,
                         "\"out\" and \"in\" are one tensor in the model"));
    EXPECT_TRUE(at::equal(whole, at::zeros({2, 3})));
    StateDictOptions options;
    options.strict = false;
    const auto keys = Set(model, dict_with(Numbers({2, 3}, 6)), options);
    ASSERT_TRUE(keys.ok()) << keys.status();
    EXPECT_THAT(keys->unexpected_keys, ElementsAre("out"));
    EXPECT_TRUE(at::equal(whole, Numbers({2, 3}, 5)));
  }
}

// One memory read in two ways is two tensors, and filled through either.
TEST(TensorKindsTest, OtherReadingsOfTheSameMemory) {
  const at::Tensor numbers = Numbers({4}, 1);
  const at::Tensor z = at::complex(numbers, numbers.add(10));
  const std::vector<std::pair<at::Tensor, at::Tensor>> pairs = {
      {numbers.view(c10::kInt), numbers},
      {z, z.conj()},
      {at::imag(z), at::imag(z.conj())}};
  for (const auto& [first, second] : pairs) {
    const at::Tensor memory = first.resolve_neg().clone();
    const at::Tensor bits = first.is_complex() ? memory.conj()
                            : first.scalar_type() == c10::kInt
                                ? memory.view(c10::kFloat)
                                : at::_neg_view(memory);
    for (const bool full : {false, true}) {
      FakeModel model;
      model.Add("a", memory);
      model.Add("b", bits);
      StateDictOptions options;
      options.full_state_dict = full;
      SourceSession session(&model, {}, nullptr, options);
      const absl::StatusOr<StateDict> dict = session.GetModel();
      ASSERT_TRUE(dict.ok()) << dict.status();
      EXPECT_TRUE(at::equal(TensorAt(*dict, "a"), first));
      EXPECT_EQ(TensorAt(*dict, "b").scalar_type(), second.scalar_type());
      EXPECT_TRUE(at::equal(TensorAt(*dict, "b").resolve_conj(),
                            second.resolve_conj()));
      const absl::StatusOr<StateDict> saved = CloneStateDict(*dict);
      ASSERT_TRUE(saved.ok()) << saved.status();
      for (const std::string left_out : {"", "a", "b"}) {
        memory.zero_();
        StateDict part = *saved;
        if (!left_out.empty()) part.Erase(left_out);
        const auto keys = session.SetModel(part);
        ASSERT_TRUE(keys.ok()) << keys.status();
        EXPECT_TRUE(keys->empty());
        EXPECT_TRUE(at::equal(memory, first)) << left_out;
      }
    }
  }
}

// Only the rank that has the values can tell.
TEST(TensorKindsTest, TiedNamesWithOtherValuesOnOneRank) {
  for (const bool strict : {false, true}) {
    for (const absl::Status& status :
         test::RunAndLeave(2, [&](Communicator& comm) -> absl::Status {
           FakeModel model;
           const at::Tensor whole = at::zeros({2});
           model.Add("in", whole);
           model.Add("out", whole);
           StateDict dict;
           if (comm.rank() == 1) {
             dict = DictOf({{"in", Numbers({2}, 5)}, {"out", Numbers({2}, 6)}});
           }
           StateDictOptions options = Full();
           options.strict = strict;
           DSD_ASSIGN_OR_RETURN(
               const IncompatibleKeys keys,
               SourceSession(&model, {}, &comm, options).SetModel(dict));
           DSD_REQUIRE(at::equal(whole, Numbers({2}, 5)));
           DSD_REQUIRE(keys.unexpected_keys.empty() == (comm.rank() == 0));
           return absl::OkStatus();
         })) {
      if (strict) {
        EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                                     "\"out\" and \"in\" are one tensor"));
      } else {
        EXPECT_TRUE(status.ok()) << status;
      }
    }
  }
}

TEST(TensorKindsTest, UndefinedValueIsAMisfit) {
  FakeModel model;
  model.Add("w", at::zeros({2}));
  EXPECT_THAT(
      Set(model, DictOf({{"w", at::Tensor()}})).status(),
      IsStatus(absl::StatusCode::kInvalidArgument, "found an undefined one"));
}

TEST(TensorKindsTest, NonPersistentBuffersAreInNoDict) {
  FakeModel model;
  model.Add("w", at::zeros({2}));
  model.Add("cache", at::zeros({2}), EntryKind::kNonPersistentBuffer);
  const auto dict = SourceSession(&model, {}, nullptr, {}).GetModel();
  ASSERT_TRUE(dict.ok());
  EXPECT_THAT(KeysOf(*dict), ElementsAre("w"));
  const auto keys = Set(model, *dict);
  ASSERT_TRUE(keys.ok());
  EXPECT_THAT(keys->missing_keys, IsEmpty());
  StateDict more = *dict;
  more.Set("cache", Value(TensorValue(Numbers({2}))));
  EXPECT_THAT(Set(model, more).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "unexpected keys (1): \"cache\""));
}

TEST(TensorKindsTest, FrozenTiedParametersAreLeftOutUnderAllNames) {
  FakeModel model;
  const at::Tensor shared = Numbers({2});
  model.Add("a", shared);
  model.Add("b", Numbers({2}).requires_grad_());
  model.Add("c", shared);
  StateDictOptions options;
  options.ignore_frozen_params = true;
  const auto dict = SourceSession(&model, {}, nullptr, options).GetModel();
  ASSERT_TRUE(dict.ok());
  EXPECT_THAT(KeysOf(*dict), ElementsAre("b"));
  // Frozen parameters load as any other; without them it is a partial dict.
  EXPECT_THAT(Set(model, *dict).status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "\"a\""));
  StateDictOptions partial;
  partial.strict = false;
  const auto keys = Set(model, *dict, partial);
  ASSERT_TRUE(keys.ok());
  EXPECT_THAT(keys->missing_keys, ElementsAre("a"));
}

// FSDP1 (use_orig_params = False): parameters are intervals of one flat tensor,
// cut between ranks wherever it comes out.
TEST(LayoutsTest, FlatParameters) {
  for (const int ranks : {1, 2, 4}) {
    EXPECT_THAT(
        RunRankThreads(
            ranks,
            [&](Communicator& comm) -> absl::Status {
              const std::vector<std::pair<std::string, at::Tensor>> params = {
                  {"l1.weight", Numbers({3, 5}, 100)},
                  {"l1.bias", Numbers({3}, 200)},
                  {"l2.weight", Numbers({2, 3}, 300)}};
              int64_t total = 0;
              for (const auto& [name, whole] : params) total += whole.numel();
              const int64_t part = (total + ranks - 1) / ranks;
              const at::Tensor flat = at::zeros({part});
              FakeModel model;
              int64_t first = 0;
              for (const auto& [name, whole] : params) {
                std::vector<FlatInterval> intervals;
                for (int rank = 0; rank < ranks; ++rank) {
                  const auto cut = [&](int64_t at) {
                    return std::min(std::max<int64_t>(at - first, 0),
                                    whole.numel());
                  };
                  intervals.push_back(
                      {rank, cut(rank * part), cut((rank + 1) * part)});
                }
                const FlatInterval mine = intervals[comm.rank()];
                const int64_t at =
                    std::max<int64_t>(first - comm.rank() * part, 0);
                at::Tensor view =
                    mine.begin == mine.end
                        ? flat.slice(0, 0, 0)
                        : flat.slice(0, at, at + mine.end - mine.begin);
                view.copy_(whole.view(-1).slice(0, mine.begin, mine.end));
                DSD_ASSIGN_OR_RETURN(
                    const Layout layout,
                    Layout::FromFlatIntervals(
                        {whole.sizes().begin(), whole.sizes().end()},
                        intervals));
                DSD_RETURN_IF_ERROR(
                    ShardingTable::Global().Set(view, layout, comm.rank()));
                model.Add(name, view);
                first += whole.numel();
              }
              SourceSession session(&model, {}, &comm, Full());
              DSD_ASSIGN_OR_RETURN(StateDict dict, session.GetModel());
              StateDict doubled;
              for (const auto& [name, whole] : params) {
                DSD_REQUIRE(at::equal(TensorAt(dict, name), whole));
                doubled.Set(name, Value(TensorValue(whole.mul(2))));
              }
              DSD_RETURN_IF_ERROR(
                  session.SetModel(comm.rank() == 0 ? doubled : StateDict()));
              DSD_ASSIGN_OR_RETURN(dict, session.GetModel());
              for (const auto& [name, whole] : params) {
                DSD_REQUIRE(at::equal(TensorAt(dict, name), whole.mul(2)));
              }
              return absl::OkStatus();
            }),
        AllOk());
  }
}

// ShardedTensor: explicit offsets and sizes, uneven; the last rank has nothing.
TEST(LayoutsTest, ExplicitBoxes) {
  for (const int ranks : {1, 2, 4}) {
    EXPECT_THAT(
        RunRankThreads(
            ranks,
            [&](Communicator& comm) -> absl::Status {
              const at::Tensor whole = Numbers({7, 3}, 10);
              std::vector<HolderBox> boxes;
              const int owners = std::max(1, ranks - 1);
              int64_t row = 0;
              for (int rank = 0; rank < owners; ++rank) {
                const int64_t end =
                    rank + 1 == owners ? 7 : row + 1 + 2 * (rank % 2);
                boxes.push_back({rank, Box{{row, 0}, {end, 3}}});
                row = end;
              }
              DSD_ASSIGN_OR_RETURN(const Layout layout,
                                   Layout::FromBoxes({7, 3}, boxes));
              const bool has = comm.rank() < owners;
              at::Tensor local = at::zeros({0, 3});
              if (has) {
                const Box& box = boxes[comm.rank()].box;
                local = whole.slice(0, box.lo[0], box.hi[0]).clone();
              }
              DSD_RETURN_IF_ERROR(
                  ShardingTable::Global().Set(local, layout, comm.rank()));
              FakeModel model;
              model.Add("w", local);
              SourceSession session(&model, {}, &comm, Full());
              DSD_ASSIGN_OR_RETURN(const StateDict dict, session.GetModel());
              DSD_REQUIRE(at::equal(TensorAt(dict, "w"), whole));
              DSD_RETURN_IF_ERROR(
                  session.SetModel(DictOf({{"w", whole.add(100)}})));
              DSD_ASSIGN_OR_RETURN(const StateDict after, session.GetModel());
              DSD_REQUIRE(at::equal(TensorAt(after, "w"), whole.add(100)));
              // Shards to shards of another kind.
              DSD_ASSIGN_OR_RETURN(
                  const Layout columns,
                  Layout::FromPlacements(
                      {7, 3}, DeviceMesh::Iota({comm.size()}), {Shard(1)}));
              DSD_ASSIGN_OR_RETURN(
                  TensorValue sharded,
                  TensorValue::Sharded(
                      {columns, comm.rank()},
                      test::ShardOf(whole, columns, comm.rank())));
              StateDict other;
              other.Set("w", Value(std::move(sharded)));
              DSD_RETURN_IF_ERROR(
                  SourceSession(&model, {}, &comm, {}).SetModel(other));
              DSD_ASSIGN_OR_RETURN(const StateDict again, session.GetModel());
              DSD_REQUIRE(at::equal(TensorAt(again, "w"), whole));
              return absl::OkStatus();
            }),
        AllOk());
  }
}

// Found before the first byte moves.
TEST(LayoutsTest, ShardOfAnotherRankIsRefused) {
  const Layout rows =
      *Layout::FromPlacements({4, 2}, DeviceMesh::Iota({2}), {Shard(0)});
  for (const bool joint : {false, true}) {
    for (const absl::Status& status :
         test::RunAndLeave(2, [&](Communicator& comm) -> absl::Status {
           FakeModel model;
           model.AddShard("w", at::zeros({4, 2}), rows, comm.rank());
           StateDict dict;
           const Holder holder = 1 - comm.rank();
           DSD_ASSIGN_OR_RETURN(
               TensorValue shard,
               TensorValue::Sharded(
                   Sharding{rows, holder},
                   test::ShardOf(Numbers({4, 2}, 1), rows, holder)));
           dict.Set("w", Value(std::move(shard)));
           StateDictOptions options;
           if (joint) options.replica_ranks = {comm.rank()};
           SourceSession session(&model, {}, &comm, options);
           const absl::Status status = session.SetModel(dict).status();
           DSD_REQUIRE(at::equal(model.tensor(0), at::zeros({2, 2})));
           DSD_RETURN_IF_ERROR(session.GetModel());
           return status;
         })) {
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                   "shard of holder 1, but this is rank 0"))
          << joint;
    }
  }
}

// Dicts with the same keys in another order are the same.
TEST(LayoutsTest, UnexpectedKeysInAnyOrder) {
  EXPECT_THAT(
      RunRankThreads(2,
                     [&](Communicator& comm) -> absl::Status {
                       FakeModel model;
                       model.Add("w", at::zeros({2}));
                       const bool is_first = comm.rank() == 0;
                       StateDictOptions options;
                       options.strict = false;
                       DSD_ASSIGN_OR_RETURN(
                           const IncompatibleKeys keys,
                           SourceSession(&model, {}, &comm, options)
                               .SetModel(DictOf(
                                   {{is_first ? "x" : "y", at::zeros({1})},
                                    {"w", Numbers({2}, 5)},
                                    {is_first ? "y" : "x", at::zeros({1})}})));
                       DSD_REQUIRE(keys.unexpected_keys.size() == 2);
                       DSD_REQUIRE(at::equal(model.tensor(0), Numbers({2}, 5)));
                       return absl::OkStatus();
                     }),
      AllOk());
}

}  // namespace
}  // namespace dsd
