// SPDX-License-Identifier: Apache-2.0
//
// Optimizer dicts: structure, both forms, groups that do not match one to one,
// missing and partial state, on one rank and on several.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/equal.h"
#include "ATen/ops/scalar_tensor.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/fake_sources.h"
#include "dsd/core/state_dict/source_session.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::FakeModel;
using ::dsd::test::FakeOptimizer;
using ::dsd::test::Numbers;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A model of plain tensors a, b.w and c, with an optimizer for some of them.
struct Job {
  Job() {
    model.Add("a", Numbers({2, 3}).requires_grad_());
    model.Add("b.w", Numbers({4}).requires_grad_());
    model.Add("c", Numbers({3}).requires_grad_());
  }

  at::Tensor param(size_t i) { return model.tensor(i); }

  void AddGroup(std::vector<size_t> params, double lr) {
    FakeOptimizer::Group group;
    for (const size_t i : params) group.params.push_back(param(i));
    group.hyperparameters.Set("lr", lr);
    group.hyperparameters.Set("betas", Object::Tuple{{0.9, 0.99}});
    optimizer.groups.push_back(std::move(group));
  }

  // State as after some steps, the numbers starting at `start`.
  void Step(size_t i, int64_t step, double start) {
    StateDict& state = optimizer.StateOf(param(i));
    state.Set("step", Value(step));
    state.Set(
        "moment",
        Value(TensorValue(Numbers(
            Dims(param(i).sizes().begin(), param(i).sizes().end()), start))));
  }

  absl::StatusOr<StateDict> Get(StateDictOptions options = {}) {
    return SourceSession(&model, {&optimizer}, nullptr, options).GetOptimizer();
  }
  absl::Status Set(const StateDict& dict, bool strict = true) {
    StateDictOptions options;
    options.strict = strict;
    return SourceSession(&model, {&optimizer}, nullptr, options)
        .SetOptimizer(dict);
  }

  at::Tensor Moment(size_t i) {
    const Value* value = optimizer.StateOf(param(i)).Find("moment");
    return value == nullptr ? at::Tensor()
                            : *value->get_if<TensorValue>()->Local();
  }
  int64_t StepOf(size_t i) {
    const Value* value = optimizer.StateOf(param(i)).Find("step");
    return value == nullptr ? -1 : *value->get_if<int64_t>();
  }
  Object Hyper(size_t group, const char* name) {
    const Object* value = optimizer.groups[group].hyperparameters.Find(name);
    return value == nullptr ? Object("absent") : *value;
  }

  FakeModel model;
  FakeOptimizer optimizer;
};

const StateDict& DictAt(const StateDict& dict, const std::string& key) {
  return *dict.Find(key)->get_if<StateDict>();
}

std::vector<std::string> KeysOf(const StateDict& dict) {
  std::vector<std::string> keys;
  for (size_t i = 0; i < dict.size(); ++i) keys.push_back(dict.key_text(i));
  return keys;
}

StateDict& GroupAt(StateDict& dict, size_t i) {
  return *(*dict.Find("param_groups")->get_if<Value::List>())[i]
              .get_if<StateDict>();
}

TEST(OptimizerStateTest, NestedFormIsKeyedByFqn) {
  Job job;
  job.AddGroup({1, 0}, 0.1);
  job.AddGroup({2}, 0.2);
  job.Step(0, 3, 10);
  job.Step(1, 3, 20);
  job.Step(2, 3, 30);
  absl::StatusOr<StateDict> dict = job.Get();
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_THAT(KeysOf(*dict), ElementsAre("state", "param_groups"));
  EXPECT_THAT(KeysOf(DictAt(*dict, "state")), ElementsAre("b.w", "a", "c"));
  EXPECT_THAT(KeysOf(DictAt(DictAt(*dict, "state"), "a")),
              ElementsAre("step", "moment"));
  const StateDict& group = GroupAt(*dict, 0);
  EXPECT_THAT(KeysOf(group), ElementsAre("lr", "betas", "params"));
  EXPECT_TRUE(group.Find("betas")->is<Value::Tuple>());
  const auto& params = *group.Find("params")->get_if<Value::List>();
  EXPECT_EQ(*params[0].get_if<std::string>(), "b.w");
  EXPECT_EQ(*params[1].get_if<std::string>(), "a");
  // Aliases of live state.
  EXPECT_TRUE(DictAt(DictAt(*dict, "state"), "a")
                  .Find("moment")
                  ->get_if<TensorValue>()
                  ->Local()
                  ->is_alias_of(job.Moment(0)));
}

// pytorch/pytorch#164929, #121186, #140898: a step was run to make the state.
TEST(OptimizerStateTest, GetMakesInertStateAndLeavesTheOptimizerAlone) {
  Job job;
  job.AddGroup({0, 1, 2}, 0.1);
  job.Step(1, 5, 7);  // the others have none yet
  job.param(2).requires_grad_(false);
  const absl::StatusOr<StateDict> dict = job.Get();
  ASSERT_TRUE(dict.ok()) << dict.status();
  const StateDict& state = DictAt(*dict, "state");
  // Frozen and never stepped: no state.
  EXPECT_THAT(KeysOf(state), ElementsAre("a", "b.w"));
  EXPECT_EQ(*DictAt(state, "a").Find("step")->get_if<int64_t>(), 0);
  EXPECT_TRUE(at::equal(
      *DictAt(state, "a").Find("moment")->get_if<TensorValue>()->Local(),
      at::zeros({2, 3})));
  EXPECT_EQ(job.optimizer.state.size(), 1);
  EXPECT_EQ(job.Hyper(0, "lr"), Object(0.1));
}

TEST(OptimizerStateTest, BothFormsRoundTrip) {
  for (const bool flat : {false, true}) {
    Job saved;
    saved.AddGroup({0, 1}, 0.3);
    saved.AddGroup({2}, 0.4);
    for (size_t i = 0; i < 3; ++i) saved.Step(i, 5 + i, 100.0 * i);
    StateDictOptions options;
    options.flatten_optimizer_state_dict = flat;
    const absl::StatusOr<StateDict> dict = saved.Get(options);
    ASSERT_TRUE(dict.ok()) << dict.status();
    if (flat) {
      EXPECT_THAT(
          KeysOf(*dict),
          ElementsAre("state.a.step", "state.a.moment", "state.b.w.step",
                      "state.b.w.moment", "state.c.step", "state.c.moment",
                      "param_groups.a.lr", "param_groups.a.betas",
                      "param_groups.b.w.lr", "param_groups.b.w.betas",
                      "param_groups.c.lr", "param_groups.c.betas"));
    }
    Job live;
    live.AddGroup({2}, 1);
    live.AddGroup({1, 0}, 1);
    const absl::Status status = live.Set(*dict);
    ASSERT_TRUE(status.ok()) << status;
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(live.StepOf(i), 5 + i);
      EXPECT_TRUE(at::equal(live.Moment(i), saved.Moment(i)));
      EXPECT_FALSE(live.Moment(i).is_alias_of(saved.Moment(i)));
    }
    EXPECT_EQ(live.Hyper(0, "lr"), Object(0.4));
    EXPECT_EQ(live.Hyper(1, "lr"), Object(0.3));
    EXPECT_EQ(live.Hyper(1, "betas"), Object(Object::Tuple{{0.9, 0.99}}));
  }
}

TEST(OptimizerStateTest, LiveStateIsFilledInPlace) {
  Job job;
  job.AddGroup({0}, 0.1);
  job.Step(0, 1, 5);
  const at::Tensor before = job.Moment(0);
  Job other;
  other.AddGroup({0}, 0.1);
  other.Step(0, 9, 50);
  ASSERT_TRUE(job.Set(*other.Get()).ok());
  EXPECT_TRUE(job.Moment(0).is_alias_of(before));
  EXPECT_TRUE(at::equal(before, other.Moment(0)));
}

// pytorch/pytorch#143828: only the first group kept its hyperparameters.
TEST(OptimizerStateTest, OneSavedGroupFillsSeveralLiveOnes) {
  Job saved;
  saved.AddGroup({0, 1, 2}, 0.3);
  for (size_t i = 0; i < 3; ++i) saved.Step(i, 5, i);
  Job live;
  live.AddGroup({0}, 1);
  live.AddGroup({1, 2}, 2);
  live.AddGroup({}, 7);  // an empty group keeps its own
  ASSERT_TRUE(live.Set(*saved.Get()).ok());
  EXPECT_EQ(live.Hyper(0, "lr"), Object(0.3));
  EXPECT_EQ(live.Hyper(1, "lr"), Object(0.3));
  EXPECT_EQ(live.Hyper(2, "lr"), Object(7.0));
}

TEST(OptimizerStateTest, SavedGroupsThatContradictEachOtherAreAnError) {
  Job saved;
  saved.AddGroup({0}, 0.3);
  saved.AddGroup({1}, 0.4);
  saved.Step(0, 5, 1);
  saved.Step(1, 5, 1);
  Job live;
  live.AddGroup({0, 1}, 1);
  const absl::Status status = live.Set(*saved.Get());
  EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                               "\"lr\" is 0.3 for \"a\" and 0.4 for \"b.w\""));
  EXPECT_EQ(live.Hyper(0, "lr"), Object(1.0));
  EXPECT_TRUE(live.optimizer.state.empty() || live.StepOf(0) == -1);
}

TEST(OptimizerStateTest, LiveHyperparametersThatAreNotSavedStay) {
  Job saved;
  saved.AddGroup({0}, 0.3);
  saved.Step(0, 5, 1);
  StateDict dict = *saved.Get();
  GroupAt(dict, 0).Erase(std::string("betas"));
  GroupAt(dict, 0).Set("initial_lr", Value(0.5));
  GroupAt(dict, 0).Set("param_names", Value(Value::List{Value("a")}));
  Job live;
  live.AddGroup({0}, 1);
  ASSERT_TRUE(live.Set(dict).ok());
  EXPECT_EQ(live.Hyper(0, "betas"), Object(Object::Tuple{{0.9, 0.99}}));
  EXPECT_EQ(live.Hyper(0, "initial_lr"), Object(0.5));
  EXPECT_EQ(live.Hyper(0, "param_names"), Object(Object::List{"a"}));
}

// pytorch/pytorch#164257: a bare KeyError for the first parameter.
TEST(OptimizerStateTest, MissingStateIsListedOrLeft) {
  Job saved;
  saved.AddGroup({0}, 0.3);
  saved.Step(0, 5, 1);
  StateDict dict = *saved.Get();
  dict.Find("state")
      ->get_if<StateDict>()
      ->Find("a")
      ->get_if<StateDict>()
      ->Erase(std::string("step"));
  Job live;
  live.AddGroup({0, 1, 2}, 1);
  live.Step(1, 3, 33);
  const absl::Status status = live.Set(dict);
  EXPECT_THAT(status,
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "missing optimizer state (3): \"a.step\", \"b.w\", "
                       "\"c\""));
  EXPECT_EQ(live.Hyper(0, "lr"), Object(1.0));
  ASSERT_TRUE(live.Set(dict, /*strict=*/false).ok());
  EXPECT_EQ(live.StepOf(0), 0);  // inert
  EXPECT_TRUE(at::equal(live.Moment(0), saved.Moment(0)));
  EXPECT_EQ(live.StepOf(1), 3);
  EXPECT_EQ(live.Hyper(0, "lr"), Object(0.3));
}

TEST(OptimizerStateTest, StateOfOtherParametersIsIgnored) {
  Job saved;
  saved.AddGroup({0, 1, 2}, 0.3);
  for (size_t i = 0; i < 3; ++i) saved.Step(i, 5, i);
  for (const bool flat : {false, true}) {
    StateDictOptions options;
    options.flatten_optimizer_state_dict = flat;
    Job live;
    live.AddGroup({1}, 1);
    ASSERT_TRUE(live.Set(*saved.Get(options)).ok());
    EXPECT_EQ(live.StepOf(1), 5);
    EXPECT_EQ(live.StepOf(0), -1);
  }
}

TEST(OptimizerStateTest, UnknownEntriesAndWrongKindsAreListed) {
  Job saved;
  saved.AddGroup({0, 1}, 0.3);
  saved.Step(0, 5, 1);
  saved.Step(1, 5, 1);
  StateDict dict = *saved.Get();
  StateDict& state = *dict.Find("state")->get_if<StateDict>();
  StateDict& a = *state.Find("a")->get_if<StateDict>();
  StateDict& b = *state.Find("b.w")->get_if<StateDict>();
  a.Set("variance", Value(1.0));
  a.Set("step", Value("five"));
  b.Set("step", Value(-1));
  b.Set("moment", Value(TensorValue(at::zeros({5}))));
  Job live;
  live.AddGroup({0, 1}, 1);
  const absl::Status status = live.Set(dict);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(
      std::string(status.message()),
      AllOf(HasSubstr("unexpected optimizer state (1): \"a.variance\""),
            HasSubstr("\"a.step\": expected a count, found 'five'"),
            HasSubstr("\"b.w.step\": expected a count, found -1"),
            HasSubstr("\"b.w.moment\": shape in the dict is [5], of the "
                      "parameter [4]")));
}

// pytorch/pytorch#43706 and followers: moments were cast to the parameter's
// type.
TEST(OptimizerStateTest, StateKeepsTheTypeItWasSavedWith) {
  Job saved;
  saved.AddGroup({1}, 0.3);
  saved.Step(1, 5, 0.125);
  saved.optimizer.StateOf(saved.param(1))
      .Set("moment", Value(TensorValue(Numbers({4}, 0.125, c10::kDouble))));
  Job live;
  live.AddGroup({1}, 1);
  live.Step(1, 1, 1);
  ASSERT_TRUE(live.Set(*saved.Get()).ok());
  EXPECT_EQ(live.Moment(1).scalar_type(), c10::kDouble);
  EXPECT_TRUE(at::equal(live.Moment(1), saved.Moment(1)));
}

TEST(OptimizerStateTest, StepInAnyForm) {
  for (const Value& step :
       {Value(7), Value(7.0), Value(TensorValue(at::scalar_tensor(7.0))),
        Value(TensorValue(at::scalar_tensor(7, c10::kLong))),
        Value(TensorValue(at::scalar_tensor(7, c10::kDouble).view({1})))}) {
    Job job;
    job.AddGroup({0}, 0.1);
    job.Step(0, 1, 1);
    StateDict dict = *job.Get();
    dict.Find("state")
        ->get_if<StateDict>()
        ->Find("a")
        ->get_if<StateDict>()
        ->Set("step", step);
    ASSERT_TRUE(job.Set(dict).ok());
    EXPECT_EQ(job.StepOf(0), 7);
  }
}

// pytorch/pytorch#192225, #133415.
TEST(OptimizerStateTest, StatelessOptimizers) {
  for (const bool flat : {false, true}) {
    StateDictOptions options;
    options.flatten_optimizer_state_dict = flat;
    Job saved;
    saved.optimizer.stateless = true;
    saved.AddGroup({0, 1}, 0.3);
    const absl::StatusOr<StateDict> dict = saved.Get(options);
    ASSERT_TRUE(dict.ok()) << dict.status();
    EXPECT_TRUE(saved.optimizer.state.empty());
    Job live;
    live.optimizer.stateless = true;
    live.AddGroup({0, 1}, 1);
    const absl::Status status = live.Set(*dict);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(live.Hyper(0, "lr"), Object(0.3));
    EXPECT_TRUE(live.optimizer.state.empty());
  }
}

// pytorch/pytorch#165071: state of optimizers like Shampoo has dicts with
// numbers as keys, which the flat form makes texts of.
TEST(OptimizerStateTest, Issue165071_FreeFormStateKeepsItsStructure) {
  for (const bool flat : {false, true}) {
    // Whether there is live state that tells how keys are meant.
    for (const bool has_live : {false, true}) {
      for (const bool text_key : {false, true}) {
        const PathSegment key =
            text_key ? PathSegment(std::string("0")) : PathSegment(int64_t{0});
        const auto history = [&](double start) {
          StateDict blocks;
          blocks.Set(key, Value(TensorValue(Numbers({2, 2}, start))));
          StateDict dict;
          dict.Set("blocks", Value(std::move(blocks)));
          dict.Set("count", Value(3));
          return dict;
        };
        Job saved;
        saved.AddGroup({0}, 0.3);
        saved.Step(0, 5, 1);
        saved.optimizer.StateOf(saved.param(0)).Set("history", history(40));
        StateDictOptions options;
        options.flatten_optimizer_state_dict = flat;
        Job live;
        live.AddGroup({0}, 1);
        if (has_live) {
          live.Step(0, 1, 1);
          live.optimizer.StateOf(live.param(0)).Set("history", history(0));
        }
        const absl::Status status = live.Set(*saved.Get(options));
        ASSERT_TRUE(status.ok()) << status;
        const StateDict& loaded =
            DictAt(live.optimizer.StateOf(live.param(0)), "history");
        EXPECT_EQ(*loaded.Find("count")->get_if<int64_t>(), 3);
        // Without anything that tells, a number it is.
        const bool is_text = text_key && (!flat || has_live);
        const Value* block = DictAt(loaded, "blocks")
                                 .Find(is_text ? PathSegment(std::string("0"))
                                               : PathSegment(int64_t{0}));
        ASSERT_NE(block, nullptr);
        EXPECT_TRUE(at::equal(*block->get_if<TensorValue>()->Local(),
                              Numbers({2, 2}, 40)));
      }
    }
  }
}

// Keys with dots may look like those of other values: nothing gets lost.
TEST(OptimizerStateTest, FreeFormKeysThatLookAlike) {
  Job saved;
  saved.AddGroup({0}, 0.3);
  saved.Step(0, 5, 1);
  StateDict inner;
  inner.Set("y", Value(TensorValue(Numbers({1}, 1))));
  StateDict history;
  history.Set("x.y", Value(TensorValue(Numbers({1}, 2))));
  history.Set("x", Value(std::move(inner)));
  saved.optimizer.StateOf(saved.param(0)).Set("history", Value(history));
  Job live;
  live.AddGroup({0}, 1);
  const absl::Status status = live.Set(*saved.Get());
  ASSERT_TRUE(status.ok()) << status;
  const StateDict& loaded =
      DictAt(live.optimizer.StateOf(live.param(0)), "history");
  EXPECT_TRUE(at::equal(*loaded.Find("x.y")->get_if<TensorValue>()->Local(),
                        Numbers({1}, 2)));
  EXPECT_TRUE(
      at::equal(*DictAt(loaded, "x").Find("y")->get_if<TensorValue>()->Local(),
                Numbers({1}, 1)));
  // In the flat form both have one key.
  StateDictOptions options;
  options.flatten_optimizer_state_dict = true;
  EXPECT_THAT(saved.Get(options).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "two values have the key \"state.a.history.x.y\""));
  StateDict above;
  above.Set("state.a.history.x.y", Value(1));
  above.Set("state.a.history.x", Value(1));
  EXPECT_THAT(live.Set(above),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "\"state.a.history.x\" is above the key of another"));
}

TEST(OptimizerStateTest, FlatFormRefusesWhatItCannotExpress) {
  Job job;
  job.AddGroup({0}, 0.3);
  job.Step(0, 5, 1);
  job.optimizer.StateOf(job.param(0)).Set("history", Value(Value::List{1, 2}));
  StateDictOptions options;
  options.flatten_optimizer_state_dict = true;
  EXPECT_THAT(
      job.Get(options).status(),
      IsStatus(absl::StatusCode::kInvalidArgument, "\"state.a.history\""));
}

TEST(OptimizerStateTest, WhatIsNoOptimizerDict) {
  Job job;
  job.AddGroup({0}, 0.3);
  StateDict integers;
  StateDict state;
  state.Set(int64_t{0}, Value(StateDict()));
  integers.Set("state", Value(state));
  EXPECT_THAT(job.Set(integers),
              IsStatus(absl::StatusCode::kInvalidArgument, "integer key 0"));
  StateDict model;
  model.Set("a", Value(TensorValue(at::zeros({1}))));
  EXPECT_THAT(job.Set(model),
              IsStatus(absl::StatusCode::kInvalidArgument, "found \"a\""));
  StateDict groups;
  groups.Set("param_groups", Value(Value::List{Value(StateDict())}));
  EXPECT_THAT(job.Set(groups), IsStatus(absl::StatusCode::kInvalidArgument,
                                        "group 0 has no list \"params\""));
  // Empty: all state is missing.
  EXPECT_THAT(job.Set(StateDict()),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "missing optimizer state (1): \"a\""));
}

TEST(OptimizerStateTest, ParameterOutsideTheModelIsNamed) {
  Job job;
  job.AddGroup({0}, 0.3);
  job.optimizer.groups[0].params.push_back(at::zeros({9}).requires_grad_());
  EXPECT_THAT(job.Get().status(),
              IsStatus(absl::StatusCode::kNotFound,
                       "Fake group 0 parameter 1: a tensor of shape [9]"));
}

TEST(OptimizerStateTest, SeveralContradictionsNameEveryParameter) {
  Job saved;
  saved.AddGroup({0}, 0.3);
  saved.AddGroup({1}, 0.4);
  saved.AddGroup({2}, 0.3);
  saved.optimizer.groups[2].hyperparameters.Set("eps", 1.0);
  saved.optimizer.groups[0].hyperparameters.Set("eps", 2.0);
  for (size_t i = 0; i < 3; ++i) saved.Step(i, 5, 1);
  for (const bool flat : {false, true}) {
    StateDictOptions options;
    options.flatten_optimizer_state_dict = flat;
    Job live;
    live.AddGroup({0, 1, 2}, 1);
    EXPECT_THAT(live.Set(*saved.Get(options)),
                IsStatus(absl::StatusCode::kInvalidArgument,
                         "Fake group 0: \"lr\" is 0.3 for \"a\", \"c\" and "
                         "0.4 for \"b.w\", but they are in one group here; "
                         "Fake group 0: \"eps\" is 2.0 for \"a\" and 1.0 for "
                         "\"c\""));
  }
}

TEST(OptimizerStateTest, TwoOptimizersShareADict) {
  Job job;
  job.AddGroup({0}, 0.1);
  job.Step(0, 1, 1);
  FakeOptimizer second;
  FakeOptimizer::Group group;
  group.params.push_back(job.param(1));
  group.hyperparameters.Set("lr", 0.2);
  second.groups.push_back(group);
  second.StateOf(job.param(1)).Set("step", Value(4));
  second.StateOf(job.param(1))
      .Set("moment", Value(TensorValue(Numbers({4}, 9))));
  SourceSession session(&job.model, {&job.optimizer, &second}, nullptr, {});
  const absl::StatusOr<StateDict> dict = session.GetOptimizer();
  ASSERT_TRUE(dict.ok());
  EXPECT_THAT(KeysOf(DictAt(*dict, "state")), ElementsAre("a", "b.w"));
  second.StateOf(job.param(1)).Set("step", Value(0));
  second.groups[0].hyperparameters.Set("lr", 0.9);
  job.optimizer.groups[0].hyperparameters.Set("lr", 0.9);
  ASSERT_TRUE(session.SetOptimizer(*dict).ok());
  EXPECT_EQ(job.Hyper(0, "lr"), Object(0.1));
  EXPECT_EQ(*second.groups[0].hyperparameters.Find("lr"), Object(0.2));
  EXPECT_EQ(*second.StateOf(job.param(1)).Find("step")->get_if<int64_t>(), 4);
}

// pytorch/pytorch#128011: tied weights, KeyError in the optimizer's load.
TEST(OptimizerStateTest, TiedParameterUnderEitherName) {
  FakeModel model;
  const at::Tensor shared = Numbers({3}).requires_grad_();
  model.Add("in", shared);
  model.Add("out", shared);
  FakeOptimizer optimizer;
  optimizer.groups.push_back({{shared}, {}});
  optimizer.groups[0].hyperparameters.Set("lr", 0.1);
  SourceSession session(&model, {&optimizer}, nullptr, {});
  StateDict dict = *session.GetOptimizer();
  EXPECT_THAT(KeysOf(DictAt(dict, "state")), ElementsAre("in"));
  StateDict renamed;
  StateDict state;
  state.Set("out", *DictAt(dict, "state").Find("in"));
  renamed.Set("state", Value(std::move(state)));
  GroupAt(dict, 0).Set("params", Value(Value::List{Value("out")}));
  GroupAt(dict, 0).Set("lr", Value(0.7));
  renamed.Set("param_groups", *dict.Find("param_groups"));
  const absl::Status status = session.SetOptimizer(renamed);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(*optimizer.groups[0].hyperparameters.Find("lr"), Object(0.7));
}

TEST(OptimizerStateTest, ErrorInOnePartLeavesTheOtherUnchanged) {
  Job job;
  job.AddGroup({0, 1, 2}, 0.1);
  for (size_t i = 0; i < 3; ++i) job.Step(i, 1, 1);
  SourceSession session(&job.model, {&job.optimizer}, nullptr, {});
  ModelAndOptimizerStateDict state = *session.Get();
  StateDict model;
  for (size_t i = 0; i < 3; ++i) {
    model.Set(state.model.key(i),
              Value(TensorValue(at::zeros(job.param(i).sizes()))));
  }
  state.optimizer.Find("state")->get_if<StateDict>()->Erase(std::string("c"));
  EXPECT_THAT(session.Set(model, state.optimizer).status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "\"c\""));
  EXPECT_TRUE(at::equal(job.param(0).detach(), Numbers({2, 3})));
}

TEST(OptimizerStateTest, SetThatFailsHalfWayPoisonsUntilOneSucceeds) {
  Job job;
  job.AddGroup({0}, 0.1);
  job.Step(0, 1, 1);
  SourceSession session(&job.model, {&job.optimizer}, nullptr, {});
  const StateDict dict = *session.GetOptimizer();
  job.optimizer.set_state_error = absl::InternalError("codec bug");
  EXPECT_THAT(session.SetOptimizer(dict),
              IsStatus(absl::StatusCode::kInternal, "unspecified"));
  EXPECT_THAT(session.GetModel().status(),
              IsStatus(absl::StatusCode::kFailedPrecondition, "codec bug"));
  job.optimizer.set_state_error = absl::OkStatus();
  ASSERT_TRUE(session.SetOptimizer(dict).ok());
  EXPECT_TRUE(session.GetModel().ok());
}

// Codecs are the user's.
TEST(OptimizerStateTest, ExceptionAtTheCommitIsAnError) {
  struct Throwing : FakeOptimizer {
    absl::Status SetState(size_t, size_t, StateDict) override {
      TORCH_CHECK(false, "codec throws");
    }
  };
  Job job;
  job.AddGroup({0}, 0.1);
  job.Step(0, 1, 1);
  Throwing optimizer;
  static_cast<FakeOptimizer&>(optimizer) = job.optimizer;
  SourceSession session(&job.model, {&optimizer}, nullptr, {});
  const absl::StatusOr<StateDict> dict = session.GetOptimizer();
  ASSERT_TRUE(dict.ok()) << dict.status();
  const absl::Status status = session.SetOptimizer(*dict);
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("codec throws"), HasSubstr("unspecified")));
  EXPECT_FALSE(session.GetModel().ok());
}

class OptimizerRanksTest : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, OptimizerRanksTest, testing::Values(1, 2, 4));

// State of a sharded parameter is sharded like it, through every kind of get
// and set.
TEST_P(OptimizerRanksTest, StateInheritsTheSharding) {
  const int ranks = GetParam();
  const at::Tensor weight = Numbers({5, 2}).requires_grad_();
  const at::Tensor moment = Numbers({5, 2}, 100);
  const Layout layout =
      *Layout::FromPlacements({5, 2}, DeviceMesh::Iota({ranks}), {Shard(0)});
  EXPECT_THAT(
      RunRankThreads(
          ranks,
          [&](Communicator& comm) -> absl::Status {
            const auto require = [](bool ok, int line) {
              return ok ? absl::OkStatus()
                        : absl::InternalError(absl::StrCat("line ", line));
            };
            const auto make = [&](FakeModel& model, FakeOptimizer& optimizer,
                                  bool trained) {
              const at::Tensor shard =
                  model.AddShard("w", weight, layout, comm.rank());
              optimizer.groups.push_back({{shard}, {}});
              optimizer.groups[0].hyperparameters.Set("lr",
                                                      trained ? 0.5 : 0.1);
              if (!trained) return;
              StateDict& state = optimizer.StateOf(shard);
              state.Set("step", Value(3));
              state.Set("moment", Value(TensorValue(test::ShardOf(
                                      moment, layout, comm.rank()))));
            };
            FakeModel model;
            FakeOptimizer optimizer;
            make(model, optimizer, true);
            StateDictOptions full;
            full.full_state_dict = true;
            SourceSession session(&model, {&optimizer}, &comm, full);
            DSD_ASSIGN_OR_RETURN(const StateDict whole, session.GetOptimizer());
            const StateDict& state = DictAt(DictAt(whole, "state"), "w");
            DSD_RETURN_IF_ERROR(require(
                at::equal(*state.Find("moment")->get_if<TensorValue>()->Local(),
                          moment),
                __LINE__));

            // Sharded aliases, whole dicts everywhere, and a dict on rank 0
            // only.
            DSD_ASSIGN_OR_RETURN(
                const StateDict sharded,
                SourceSession(&model, {&optimizer}, &comm, {}).GetOptimizer());
            for (const int how : {0, 1, 2}) {
              FakeModel other_model;
              FakeOptimizer other;
              make(other_model, other, false);
              StateDictOptions options;
              options.full_state_dict = how > 0;
              options.broadcast_from_rank0 = how == 2;
              SourceSession target(&other_model, {&other}, &comm, options);
              DSD_RETURN_IF_ERROR(target.SetOptimizer(
                  how == 0
                      ? sharded
                      : (how == 1 || comm.rank() == 0 ? whole : StateDict())));
              const StateDict& loaded = other.StateOf(other_model.tensor(0));
              DSD_RETURN_IF_ERROR(require(
                  at::equal(
                      *loaded.Find("moment")->get_if<TensorValue>()->Local(),
                      test::ShardOf(moment, layout, comm.rank())),
                  __LINE__));
              DSD_RETURN_IF_ERROR(
                  require(*loaded.Find("step")->get_if<int64_t>() == 3 &&
                              *other.groups[0].hyperparameters.Find("lr") ==
                                  Object(0.5),
                          __LINE__));
            }
            return absl::OkStatus();
          }),
      AllOk());
}

// pytorch/pytorch: rank 0 passes a model dict and the others pass {}: a hang.
TEST_P(OptimizerRanksTest, BroadcastOfBothWithEmptyDictsElsewhere) {
  EXPECT_THAT(
      RunRankThreads(
          GetParam(),
          [&](Communicator& comm) -> absl::Status {
            Job job;
            job.AddGroup({0, 1, 2}, 0.1);
            Job source;
            source.AddGroup({0, 1, 2}, 0.4);
            for (size_t i = 0; i < 3; ++i) {
              source.Step(i, 8, i);
              source.param(i).detach().fill_(3);
            }
            ModelAndOptimizerStateDict state;
            if (comm.rank() == 0) {
              DSD_ASSIGN_OR_RETURN(
                  state,
                  SourceSession(&source.model, {&source.optimizer}, nullptr, {})
                      .Get());
            }
            StateDictOptions options;
            options.full_state_dict = true;
            options.broadcast_from_rank0 = true;
            SourceSession session(&job.model, {&job.optimizer}, &comm, options);
            DSD_RETURN_IF_ERROR(session.Set(state.model, state.optimizer));
            for (size_t i = 0; i < 3; ++i) {
              if (!at::equal(job.param(i), source.param(i)) ||
                  !at::equal(job.Moment(i), source.Moment(i)) ||
                  job.StepOf(i) != 8) {
                return absl::InternalError("not what rank 0 has");
              }
            }
            return absl::OkStatus();
          }),
      AllOk());
}

// What a codec refuses on one rank.
TEST_P(OptimizerRanksTest, ErrorAtTheCommitOfOneRankIsEverybodys) {
  const int ranks = GetParam();
  for (const bool staged : {false, true}) {
    for (const absl::Status& status : RunRankThreads(
             ranks,
             [&](Communicator& comm) -> absl::Status {
               Job job;
               job.AddGroup({0}, 0.1);
               job.Step(0, 1, 1);
               StateDictOptions options;
               options.staged = staged;
               SourceSession session(&job.model, {&job.optimizer}, &comm,
                                     options);
               DSD_ASSIGN_OR_RETURN(const StateDict dict,
                                    session.GetOptimizer());
               if (comm.rank() == ranks - 1) {
                 job.optimizer.set_state_error =
                     absl::InternalError("codec bug");
               }
               const absl::Status failed = session.SetOptimizer(dict);
               // All of them know that values are unspecified, and can go on.
               EXPECT_THAT(session.GetOptimizer().status(),
                           IsStatus(absl::StatusCode::kFailedPrecondition,
                                    "codec bug"));
               job.optimizer.set_state_error = absl::OkStatus();
               DSD_RETURN_IF_ERROR(session.SetOptimizer(dict));
               DSD_RETURN_IF_ERROR(session.GetOptimizer());
               return failed;
             },
             {absl::Seconds(60), {}, /*shutdown=*/true})) {
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kInternal,
                                   ranks == 1 ? "codec bug"
                                              : absl::StrCat("rank ", ranks - 1,
                                                             ": ")));
      EXPECT_THAT(std::string(status.message()),
                  AllOf(HasSubstr("codec bug"), HasSubstr("unspecified")));
    }
  }
}

// Numbers that are set without being moved.
TEST_P(OptimizerRanksTest, VerifyReplicasComparesHyperparametersAndCounts) {
  const int ranks = GetParam();
  for (const std::string what : {"", "lr", "step", "free"}) {
    for (const bool flat : {false, true}) {
      for (const absl::Status& status :
           RunRankThreads(ranks, [&](Communicator& comm) -> absl::Status {
             Job saved;
             const bool is_odd = comm.rank() == ranks - 1;
             saved.AddGroup({0}, what == "lr" && is_odd ? 0.7 : 0.1);
             saved.Step(0, what == "step" && is_odd ? 2 : 1, 1);
             StateDict history;
             history.Set("n", Value(what == "free" && is_odd ? 5.0 : 4.0));
             saved.optimizer.StateOf(saved.param(0))
                 .Set("history", Value(std::move(history)));
             StateDictOptions options;
             options.flatten_optimizer_state_dict = flat;
             DSD_ASSIGN_OR_RETURN(const StateDict dict, saved.Get(options));
             Job job;
             job.AddGroup({0}, 0.3);
             job.Step(0, 9, 1);
             options.verify_replicas = true;
             const absl::Status status =
                 SourceSession(&job.model, {&job.optimizer}, &comm, options)
                     .SetOptimizer(dict);
             if (!status.ok() && job.StepOf(0) != 9) {
               return absl::InternalError("something was set");
             }
             return status;
           })) {
        if (what.empty() || ranks == 1) {
          EXPECT_TRUE(status.ok()) << status;
          continue;
        }
        EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                     "differ in \"optim."));
        EXPECT_THAT(std::string(status.message()),
                    HasSubstr(what == "free" ? "history.n\"" : what + "\""));
      }
    }
  }
}

// Only rank 0 would have noticed: the others receive empty dicts.
TEST_P(OptimizerRanksTest, WhatTheFlatFormCannotHoldIsEverybodysError) {
  for (const absl::Status& status :
       RunRankThreads(GetParam(), [&](Communicator& comm) -> absl::Status {
         Job job;
         job.AddGroup({0}, 0.1);
         job.Step(0, 1, 1);
         job.optimizer.StateOf(job.param(0))
             .Set("history", Value(Value::List{Value(1)}));
         StateDictOptions options;
         options.full_state_dict = true;
         options.cpu_offload = true;
         options.flatten_optimizer_state_dict = true;
         return SourceSession(&job.model, {&job.optimizer}, &comm, options)
             .Get()
             .status();
       })) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                                 "use the nested form"));
  }
}

}  // namespace
}  // namespace dsd
