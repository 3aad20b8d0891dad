// SPDX-License-Identifier: Apache-2.0
//
// State dicts of LibTorch's own optimizers, and of one that is not among them.
// What Python gives for the same was recorded with PyTorch 2.11.0. Tests with a
// number are about that issue of pytorch/pytorch.

#include "dsd/frontends/optimizer/optimizer.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ATen/Context.h"
#include "ATen/ops/arange.h"
#include "ATen/ops/equal.h"
#include "ATen/ops/full.h"
#include "ATen/ops/full_like.h"
#include "ATen/ops/ones.h"
#include "ATen/ops/scalar_tensor.h"
#include "ATen/ops/zeros.h"
#include "ATen/ops/zeros_like.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/frontends/optimizer/typed_codec.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adagrad.h"
#include "torch/optim/adam.h"
#include "torch/optim/adamw.h"
#include "torch/optim/lbfgs.h"
#include "torch/optim/rmsprop.h"
#include "torch/optim/sgd.h"

namespace dsd {
namespace {

namespace nn = torch::nn;
namespace optim = torch::optim;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Show(const Value& value);

std::string ShowItems(const std::vector<Value>& items) {
  return absl::StrJoin(items, ", ", [](std::string* out, const Value& item) {
    absl::StrAppend(out, Show(item));
  });
}

// As Python prints it, tensors by type and shape.
std::string Show(const Value& value) {
  if (const auto* v = value.get_if<bool>()) return *v ? "True" : "False";
  if (const auto* v = value.get_if<int64_t>()) return absl::StrCat(*v);
  if (const auto* v = value.get_if<double>()) return absl::StrCat(*v);
  if (const auto* v = value.get_if<std::string>()) {
    return absl::StrCat("'", *v, "'");
  }
  if (const auto* v = value.get_if<TensorValue>()) {
    return absl::StrCat(DTypeName(*ToDType(v->scalar_type())),
                        DimsToString(v->shape()));
  }
  if (const auto* v = value.get_if<Value::List>()) {
    return absl::StrCat("[", ShowItems(*v), "]");
  }
  if (const auto* v = value.get_if<Value::Tuple>()) {
    return absl::StrCat("(", ShowItems(v->items), ")");
  }
  if (const auto* v = value.get_if<StateDict>()) {
    std::vector<std::string> items;
    for (size_t i = 0; i < v->size(); ++i) {
      items.push_back(
          absl::StrCat("'", v->key_text(i), "': ", Show(v->value(i))));
    }
    return absl::StrCat("{", absl::StrJoin(items, ", "), "}");
  }
  return std::string(value.kind_name());
}

std::vector<std::string> KeysOf(const StateDict& dict) {
  std::vector<std::string> keys;
  for (size_t i = 0; i < dict.size(); ++i) keys.push_back(dict.key_text(i));
  return keys;
}

StateDict& DictAt(StateDict& dict, const char* key) {
  return *dict.Find(key)->get_if<StateDict>();
}

// The state of a parameter in a nested dict.
StateDict& StateOf(StateDict& dict, const char* fqn) {
  return DictAt(DictAt(dict, "state"), fqn);
}

StateDict& GroupAt(StateDict& dict, size_t i) {
  return *(*dict.Find("param_groups")->get_if<Value::List>())[i]
              .get_if<StateDict>();
}

at::Tensor TensorAt(const StateDict& dict, const char* key) {
  return *dict.Find(key)->get_if<TensorValue>()->Local();
}

bool Equal(const StateDict& a, const StateDict& b) {
  if (Show(Value(a)) != Show(Value(b))) return false;
  std::vector<at::Tensor> tensors[2];
  StateDict copies[2] = {a, b};
  for (int side = 0; side < 2; ++side) {
    ForEachTensor(copies[side], "", [&](const std::string&, TensorValue& v) {
      tensors[side].push_back(*v.Local());
    });
  }
  for (size_t i = 0; i < tensors[0].size(); ++i) {
    if (!at::equal(tensors[0][i], tensors[1][i])) return false;
  }
  return true;
}

// Two layers, so that there are several parameters of different shapes.
struct Net : nn::Module {
  Net()
      : first(register_module("first", nn::Linear(3, 4))),
        second(register_module("second", nn::Linear(4, 2))) {
    at::manual_seed(3);
    for (auto& param : parameters()) param.detach().normal_();
  }

  at::Tensor Loss(int step) {
    const at::Tensor x =
        at::ones({4, 3}).cumsum(0).mul_(0.1 * (step + 1)).sin();
    return second(first(x).tanh()).pow(2).sum();
  }

  nn::Linear first;
  nn::Linear second;
};

void Train(Net& net, optim::Optimizer& optimizer, int steps) {
  for (int step = 0; step < steps; ++step) {
    optimizer.step([&] {
      optimizer.zero_grad();
      at::Tensor loss = net.Loss(step);
      loss.backward();
      return loss;
    });
  }
}

StateDict Get(Net& net, const Optimizers& optimizers, bool flat = false) {
  StateDictOptions options;
  options.flatten_optimizer_state_dict = flat;
  absl::StatusOr<StateDict> dict =
      GetOptimizerStateDict(net, optimizers, nullptr, options);
  EXPECT_TRUE(dict.ok()) << dict.status();
  return dict.ok() ? *std::move(dict) : StateDict();
}

absl::Status Set(Net& net, const Optimizers& optimizers, const StateDict& dict,
                 bool strict = true,
                 DTypePolicy policy = DTypePolicy::kDefault) {
  StateDictOptions options;
  options.strict = strict;
  options.dtype_policy = policy;
  return SetOptimizerStateDict(net, optimizers, dict, nullptr, options);
}

MATCHER_P(IsInvalid, text, "") {
  *result_listener << arg;
  return arg.code() == absl::StatusCode::kInvalidArgument &&
         absl::StrContains(arg.message(), text);
}

// --- What is in the dicts.

TEST(PythonStructureTest, Adagrad) {
  Net net;
  optim::Adagrad optimizer(
      net.first->parameters(),
      optim::AdagradOptions(0.01).initial_accumulator_value(0.5));
  Train(net, optimizer, 1);
  EXPECT_EQ(
      Show(Value(Get(net, optimizer))),
      "{'state': {'first.weight': {'step': float32[], 'sum': float32[4, 3]}, "
      "'first.bias': {'step': float32[], 'sum': float32[4]}}, 'param_groups': "
      "[{'lr': 0.01, 'lr_decay': 0, 'eps': 1e-10, 'weight_decay': 0, "
      "'initial_accumulator_value': 0.5, 'foreach': None, 'maximize': False, "
      "'differentiable': False, 'fused': None, 'params': ['first.weight', "
      "'first.bias']}]}");
}

TEST(PythonStructureTest, RmsProp) {
  for (const bool more : {false, true}) {
    Net net;
    optim::RMSprop optimizer(
        {net.first->bias},
        optim::RMSpropOptions(0.01).momentum(more ? 0.5 : 0).centered(more));
    Train(net, optimizer, 1);
    EXPECT_EQ(
        Show(Value(Get(net, optimizer))),
        absl::StrCat(
            "{'state': {'first.bias': {'step': float32[], 'square_avg': "
            "float32[4]",
            more ? ", 'momentum_buffer': float32[4], 'grad_avg': float32[4]"
                 : "",
            "}}, 'param_groups': [{'lr': 0.01, 'momentum': ", more ? 0.5 : 0,
            ", 'alpha': 0.99, 'eps': 1e-08, 'centered': ",
            more ? "True" : "False",
            ", 'weight_decay': 0, 'capturable': False, 'foreach': None, "
            "'maximize': False, 'differentiable': False, 'params': "
            "['first.bias']}]}"));
  }
}

constexpr char kLbfgsGroup[] =
    "'param_groups': [{'lr': 1, 'max_iter': 20, 'max_eval': 25, "
    "'tolerance_grad': 1e-07, 'tolerance_change': 1e-09, 'history_size': 3, "
    "'line_search_fn': None, 'params': ['first.weight', 'first.bias', "
    "'second.weight', 'second.bias']}]}";

TEST(PythonStructureTest, Lbfgs) {
  Net net;
  optim::LBFGS optimizer(net.parameters(),
                         optim::LBFGSOptions().history_size(3));
  EXPECT_EQ(Show(Value(Get(net, optimizer))),
            absl::StrCat("{'state': {}, ", kLbfgsGroup));
  Train(net, optimizer, 1);
  StateDict dict = Get(net, optimizer);
  EXPECT_THAT(KeysOf(DictAt(dict, "state")), ElementsAre("first.weight"));
  const StateDict& state = StateOf(dict, "first.weight");
  EXPECT_THAT(KeysOf(state), ElementsAre("func_evals", "n_iter", "al", "d", "t",
                                         "old_dirs", "old_stps", "ro", "H_diag",
                                         "prev_flat_grad", "prev_loss"));
  EXPECT_EQ(TensorAt(state, "d").numel(), 26);
  EXPECT_EQ(state.Find("al")->get_if<Value::List>()->size(), 3);
}

// --- Round trips.

template <class Optimizer, class Options>
void ExpectTrainingGoesOn(const Options& options, bool has_flat_form = true) {
  for (const bool flat : {false, true}) {
    if (flat && !has_flat_form) continue;
    Net a;
    Optimizer optimizer_a(a.parameters(), options);
    Train(a, optimizer_a, 2);
    StateDictOptions full;
    full.full_state_dict = true;
    full.flatten_optimizer_state_dict = flat;
    const auto state = GetStateDict(a, optimizer_a, nullptr, full);
    ASSERT_TRUE(state.ok()) << state.status();
    Net b;
    Options other = options;
    other.lr(0.125);
    Optimizer optimizer_b(b.parameters(), other);
    Train(b, optimizer_b, 1);
    const auto keys =
        SetStateDict(b, optimizer_b, state->model, state->optimizer);
    ASSERT_TRUE(keys.ok()) << keys.status();
    EXPECT_TRUE(Equal(Get(b, optimizer_b), Get(a, optimizer_a)));
    Train(a, optimizer_a, 2);
    Train(b, optimizer_b, 2);
    EXPECT_TRUE(Equal(*GetModelStateDict(a), *GetModelStateDict(b)));
    EXPECT_TRUE(Equal(Get(b, optimizer_b), Get(a, optimizer_a)));
  }
}

TEST(RoundTripTest, TrainingGoesOnBitForBit) {
  ExpectTrainingGoesOn<optim::Adagrad>(optim::AdagradOptions(0.01));
  ExpectTrainingGoesOn<optim::Adagrad>(optim::AdagradOptions(0.01)
                                           .lr_decay(0.1)
                                           .weight_decay(0.1)
                                           .initial_accumulator_value(0.5));
  ExpectTrainingGoesOn<optim::RMSprop>(optim::RMSpropOptions(0.01));
  ExpectTrainingGoesOn<optim::RMSprop>(
      optim::RMSpropOptions(0.01).momentum(0.9).centered(true));
  ExpectTrainingGoesOn<optim::LBFGS>(
      optim::LBFGSOptions(0.1).max_iter(4).history_size(3), false);
  ExpectTrainingGoesOn<optim::LBFGS>(
      optim::LBFGSOptions(0.1).max_iter(2).line_search_fn("strong_wolfe"),
      false);
  // One iteration: no history and no "al" yet.
  ExpectTrainingGoesOn<optim::LBFGS>(optim::LBFGSOptions(0.1).max_iter(1),
                                     false);
}

// State made without a step is the state before the first step.
template <class Optimizer, class Options>
void ExpectInertIsFresh(const Options& options) {
  Net a;
  Optimizer optimizer_a(a.parameters(), options);
  const auto state = GetStateDict(a, optimizer_a);
  ASSERT_TRUE(state.ok()) << state.status();
  Net b;
  Optimizer optimizer_b(b.parameters(), options);
  Train(b, optimizer_b, 1);
  const auto keys =
      SetStateDict(b, optimizer_b, state->model, state->optimizer);
  ASSERT_TRUE(keys.ok()) << keys.status();
  Train(a, optimizer_a, 2);
  Train(b, optimizer_b, 2);
  EXPECT_TRUE(Equal(*GetModelStateDict(a), *GetModelStateDict(b)));
}

TEST(RoundTripTest, InertStateStepsLikeNone) {
  ExpectInertIsFresh<optim::Adagrad>(
      optim::AdagradOptions(0.01).initial_accumulator_value(0.5));
  ExpectInertIsFresh<optim::RMSprop>(
      optim::RMSpropOptions(0.01).momentum(0.9).centered(true));
  ExpectInertIsFresh<optim::LBFGS>(optim::LBFGSOptions(0.1).max_iter(2));
}

// --- LBFGS.

struct LbfgsJob {
  explicit LbfgsJob(int steps = 1) {
    optimizer = std::make_unique<optim::LBFGS>(
        net.parameters(), optim::LBFGSOptions(0.1).max_iter(4).history_size(5));
    Train(net, *optimizer, steps);
  }
  Net net;
  std::unique_ptr<optim::LBFGS> optimizer;
};

TEST(LbfgsTest, PythonsFormsAreRead) {
  LbfgsJob job;
  StateDict dict = Get(job.net, *job.optimizer);
  StateDict& state = StateOf(dict, "first.weight");
  const double t = *state.Find("t")->get_if<double>();
  // In Python "t" is a tensor after the first iteration, H_diag the number 1
  // until there is a history, "al" has None where nothing was written.
  state.Set("t", Value(TensorValue(at::scalar_tensor(t, c10::kDouble))));
  state.Set("H_diag", Value(1));
  state.Set("func_evals",
            Value(TensorValue(at::scalar_tensor(7, c10::kFloat))));
  (*state.Find("al")->get_if<Value::List>())[4] = Value();
  LbfgsJob other(0);
  const absl::Status status = Set(other.net, *other.optimizer, dict);
  ASSERT_TRUE(status.ok()) << status;
  StateDict again = Get(other.net, *other.optimizer);
  const StateDict& loaded = StateOf(again, "first.weight");
  EXPECT_EQ(*loaded.Find("t")->get_if<double>(), t);
  EXPECT_EQ(*loaded.Find("func_evals")->get_if<int64_t>(), 7);
  EXPECT_EQ(TensorAt(loaded, "H_diag").item().toDouble(), 1);
  EXPECT_TRUE((*loaded.Find("al")->get_if<Value::List>())[4].is<None>());
  Train(other.net, *other.optimizer, 2);
}

TEST(LbfgsTest, WhatDoesNotFitIsNamedAndChangesNothing) {
  LbfgsJob job;
  const StateDict good = Get(job.net, *job.optimizer);
  const auto refuses = [&](const char* text,
                           const std::function<void(StateDict&)>& change) {
    StateDict dict = good;
    change(dict);
    LbfgsJob other(2);
    const StateDict before = Get(other.net, *other.optimizer);
    EXPECT_THAT(Set(other.net, *other.optimizer, dict), IsInvalid(text));
    EXPECT_TRUE(Equal(Get(other.net, *other.optimizer), before));
  };
  const auto set = [](const char* key, Value value) {
    return
        [=](StateDict& dict) { StateOf(dict, "first.weight").Set(key, value); };
  };
  refuses("\"d\": expected a tensor of shape [26], found a tensor of shape [3]",
          set("d", Value(TensorValue(at::zeros({3})))));
  refuses("\"d\" is missing", [](StateDict& dict) {
    StateOf(dict, "first.weight").Erase(std::string("d"));
  });
  refuses("\"ro\": expected a list, found int", set("ro", Value(3)));
  refuses("\"ro\" has 1 entries, but \"old_dirs\" has",
          set("ro", Value(Value::List{Value(1.0)})));
  refuses("\"old_dirs.0\": expected a tensor of shape [26], found None",
          [](StateDict& dict) {
            (*StateOf(dict, "first.weight")
                  .Find("old_dirs")
                  ->get_if<Value::List>())[0] = Value();
          });
  refuses("\"n_iter\": expected a count, found -1", set("n_iter", Value(-1)));
  refuses("\"al\" has 1 entries, but \"history_size\" is 5",
          set("al", Value(Value::List{Value()})));
  refuses("\"t\": expected a number", set("t", Value("x")));
  refuses("more than \"history_size\", which is 1", [](StateDict& dict) {
    GroupAt(dict, 0).Set("history_size", Value(1));
    StateOf(dict, "first.weight").Erase(std::string("al"));
  });
  refuses("\"line_search_fn\": expected \"strong_wolfe\" or None",
          [](StateDict& dict) {
            GroupAt(dict, 0).Set("line_search_fn", Value("golden"));
          });
  refuses("must be those of the dict in the same order", [](StateDict& dict) {
    auto& params = *GroupAt(dict, 0).Find("params")->get_if<Value::List>();
    std::swap(params[1], params[2]);
  });
  refuses("the state is that of \"first.bias\"", [](StateDict& dict) {
    StateDict& state = DictAt(dict, "state");
    Value moved = *state.Find("first.weight");
    state.Erase(std::string("first.weight"));
    state.Set("first.bias", std::move(moved));
  });
}

TEST(LbfgsTest, TypeOfStateIsAPolicy) {
  LbfgsJob job(2);
  const StateDict good = Get(job.net, *job.optimizer);
  StateDict doubles = *CloneStateDict(good);
  ForEachTensor(doubles, "", [](const std::string&, TensorValue& tensor) {
    if (!c10::isFloatingType(tensor.scalar_type())) return;
    tensor = TensorValue(tensor.Local()->to(c10::kDouble));
  });
  // With state of its own, with another history, and without.
  for (const int steps : {2, 1, 0}) {
    const auto load = [&](DTypePolicy policy, StateDict* loaded) {
      LbfgsJob other(steps);
      const absl::Status status =
          Set(other.net, *other.optimizer, doubles, true, policy);
      *loaded = *CloneStateDict(Get(other.net, *other.optimizer));
      if (policy == DTypePolicy::kCast) Train(other.net, *other.optimizer, 1);
      return status;
    };
    StateDict loaded;
    for (const DTypePolicy policy :
         {DTypePolicy::kDefault, DTypePolicy::kKeep}) {
      ASSERT_TRUE(load(policy, &loaded).ok());
      EXPECT_TRUE(Equal(loaded, doubles));
    }
    ASSERT_TRUE(load(DTypePolicy::kCast, &loaded).ok());
    EXPECT_TRUE(Equal(loaded, good)) << Show(Value(loaded));
    const absl::Status status = load(DTypePolicy::kError, &loaded);
    EXPECT_THAT(status, IsInvalid("\"first.weight.d\": type in the dict is "
                                  "Double, here Float"));
    EXPECT_THAT(status, IsInvalid("\"first.weight.old_dirs\" at \"0\""));
  }
}

TEST(LbfgsTest, NoStateIsLoadedAsNoState) {
  LbfgsJob fresh(0);
  const StateDict dict = Get(fresh.net, *fresh.optimizer);
  LbfgsJob job(2);
  ASSERT_TRUE(Set(job.net, *job.optimizer, dict).ok());
  EXPECT_TRUE(job.optimizer->state().empty());
}

TEST(LbfgsTest, HasNoFlatForm) {
  LbfgsJob job;
  StateDictOptions options;
  options.flatten_optimizer_state_dict = true;
  EXPECT_THAT(
      GetOptimizerStateDict(job.net, *job.optimizer, nullptr, options).status(),
      IsInvalid("use the nested form"));
}

TEST(LbfgsTest, ShardedParametersAreRefused) {
  EXPECT_THAT(
      RunRankThreads(
          2,
          [](Communicator& comm) -> absl::Status {
            nn::Linear net(3, 1);
            DSD_RETURN_IF_ERROR(ShardingTable::Global().Set(
                net->weight,
                *Layout::FromPlacements({2, 3}, DeviceMesh::Iota({2}),
                                        {Shard(0)}),
                comm.rank()));
            optim::LBFGS optimizer(net->parameters());
            const absl::Status get =
                GetOptimizerStateDict(*net, optimizer, &comm).status();
            StateDict dict;
            dict.Set("param_groups", Value(Value::List{}));
            const absl::Status set =
                SetOptimizerStateDict(*net, optimizer, dict, &comm);
            for (const absl::Status& status : {get, set}) {
              if (status.code() != absl::StatusCode::kFailedPrecondition ||
                  !absl::StrContains(status.message(),
                                     "\"weight\" is sharded")) {
                return absl::InternalError(
                    absl::StrCat("not refused: ", status.ToString()));
              }
            }
            return absl::OkStatus();
          }),
      AllOk());
}

// --- Defects of the original, by issue (docs/semantics.md has the table).

// Also #121186, pytorch/torchtitan#4382, mosaicml/composer#3226: a step was run
// to make the state, which counts, decays and fires what watches gradients.
template <class Optimizer, class Options>
void ExpectGetChangesNothing(const Options& options) {
  Net net;
  Optimizer optimizer(net.parameters(), options);
  const size_t num_states = optimizer.state().size();
  int grads_seen = 0;
  net.first->weight.register_hook([&](const at::Tensor&) { ++grads_seen; });
  std::vector<at::Tensor> before;
  for (const at::Tensor& param : net.parameters()) {
    before.push_back(param.detach().clone());
  }
  net.second->bias.mutable_grad() = at::ones({2});
  StateDict dict = Get(net, optimizer);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Set(net, optimizer, dict).ok());
  for (size_t i = 0; i < before.size(); ++i) {
    EXPECT_TRUE(at::equal(net.parameters()[i], before[i]));
  }
  EXPECT_EQ(grads_seen, 0);
  EXPECT_FALSE(net.first->weight.grad().defined());
  EXPECT_TRUE(at::equal(net.second->bias.grad(), at::ones({2})));
  EXPECT_EQ(static_cast<const Options&>(optimizer.param_groups()[0].options())
                .get_lr(),
            options.get_lr());
  // The state is that of step 0, and there although there are gradients.
  StateDict& states = DictAt(dict, "state");
  for (size_t i = 0; i < states.size(); ++i) {
    StateDict& state = *states.value(i).get_if<StateDict>();
    for (size_t k = 0; k < state.size(); ++k) {
      const at::Tensor entry = *state.value(k).get_if<TensorValue>()->Local();
      EXPECT_TRUE(at::equal(entry, at::zeros_like(entry)));
    }
  }
  EXPECT_TRUE(num_states == 0 || num_states == 4);
}

TEST(OptimizerIssuesTest, Issue164929_Issue140898_GetMakesStateWithoutAStep) {
  ExpectGetChangesNothing<optim::AdamW>(
      optim::AdamWOptions(0.25).weight_decay(0.5));
  ExpectGetChangesNothing<optim::Adam>(
      optim::AdamOptions(0.25).weight_decay(0.5).amsgrad(true));
  ExpectGetChangesNothing<optim::SGD>(
      optim::SGDOptions(0.25).momentum(0.5).weight_decay(0.5));
  ExpectGetChangesNothing<optim::RMSprop>(
      optim::RMSpropOptions(0.25).momentum(0.5).centered(true).weight_decay(
          0.5));
  ExpectGetChangesNothing<optim::Adagrad>(
      optim::AdagradOptions(0.25).weight_decay(0.5));
}

TEST(OptimizerIssuesTest, Issue133415_Issue192225_StatelessSgd) {
  for (const bool flat : {false, true}) {
    Net a;
    optim::SGD first_a(a.first->parameters(), optim::SGDOptions(0.25));
    optim::SGD second_a(a.second->parameters(), optim::SGDOptions(0.5));
    const Optimizers both_a = {&first_a, &second_a};
    Train(a, first_a, 1);
    const StateDict dict = Get(a, both_a, flat);
    EXPECT_TRUE(first_a.state().empty());
    Net b;
    optim::SGD first_b(b.first->parameters(), optim::SGDOptions(1));
    optim::SGD second_b(b.second->parameters(), optim::SGDOptions(1));
    const Optimizers both_b = {&first_b, &second_b};
    const absl::Status status = Set(b, both_b, dict);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_TRUE(Equal(Get(b, both_b, flat), dict));
    EXPECT_TRUE(first_b.state().empty());
    // And each from the dict of both.
    Net c;
    optim::SGD second_c(c.second->parameters(), optim::SGDOptions(1));
    ASSERT_TRUE(Set(c, second_c, dict).ok());
    EXPECT_EQ(second_c.param_groups()[0].options().get_lr(), 0.5);
  }
}

TEST(OptimizerIssuesTest, Issue132628_DictOfSomeOfTheParameters) {
  Net a;
  optim::AdamW optimizer_a(a.first->parameters(), optim::AdamWOptions(0.5));
  Train(a, optimizer_a, 3);
  for (const bool flat : {false, true}) {
    Net b;
    optim::AdamW optimizer_b(b.parameters(), optim::AdamWOptions(0.1));
    Train(b, optimizer_b, 1);
    const StateDict own = Get(b, optimizer_b);
    const StateDict dict = Get(a, optimizer_a, flat);
    EXPECT_THAT(Set(b, optimizer_b, dict),
                IsInvalid("missing optimizer state (2): \"second.weight\", "
                          "\"second.bias\""));
    EXPECT_TRUE(Equal(Get(b, optimizer_b), own));
    ASSERT_TRUE(Set(b, optimizer_b, dict, /*strict=*/false).ok());
    StateDict merged = Get(b, optimizer_b);
    StateDict own_copy = own;
    StateDict from_a = Get(a, optimizer_a);
    EXPECT_TRUE(Equal(StateOf(merged, "first.weight"),
                      StateOf(from_a, "first.weight")));
    EXPECT_TRUE(Equal(StateOf(merged, "second.bias"),
                      StateOf(own_copy, "second.bias")));
  }
}

TEST(OptimizerIssuesTest,
     Issue164257_Issue192224_MissingStateIsNamedInBothForms) {
  std::string texts[2];
  for (const bool flat : {false, true}) {
    Net a;
    optim::AdamW optimizer_a(a.parameters());
    Train(a, optimizer_a, 1);
    StateDict nested = Get(a, optimizer_a);
    // As Python writes it: a parameter that was never used has no state.
    DictAt(nested, "state").Erase(std::string("first.bias"));
    StateOf(nested, "second.bias").Erase(std::string("exp_avg"));
    StateDict dict = nested;
    if (flat) {
      dict = Get(a, optimizer_a, true);
      for (const char* name :
           {"first.bias.step", "first.bias.exp_avg", "first.bias.exp_avg_sq",
            "second.bias.exp_avg"}) {
        ASSERT_TRUE(dict.Erase(absl::StrCat("state.", name)));
      }
    }
    const absl::Status status = Set(a, optimizer_a, dict);
    EXPECT_THAT(status,
                IsInvalid("missing optimizer state (2): \"first.bias\", "
                          "\"second.bias.exp_avg\""));
    texts[flat] = std::string(status.message());
    EXPECT_TRUE(Set(a, optimizer_a, dict, /*strict=*/false).ok());
  }
  EXPECT_EQ(texts[0], texts[1]);
}

TEST(OptimizerIssuesTest, Issue192202_StateOfFrozenParametersIsLoaded) {
  for (const bool flat : {false, true}) {
    Net a;
    optim::AdamW optimizer_a(a.parameters());
    Train(a, optimizer_a, 3);
    a.first->weight.requires_grad_(false);
    const StateDict dict = Get(a, optimizer_a, flat);
    Net b;
    optim::AdamW optimizer_b(b.parameters());
    b.first->weight.requires_grad_(false);
    const absl::Status status = Set(b, optimizer_b, dict);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_TRUE(Equal(Get(b, optimizer_b, flat), dict));
  }
}

// Also microsoft/dion#89.
TEST(OptimizerIssuesTest,
     Issue192202_VerlPR7283_TorchtitanPR4474_PartialStateIsCompleted) {
  Net net;
  optim::Adam optimizer(net.first->parameters(), optim::AdamOptions(0.1));
  Train(net, optimizer, 2);
  optimizer.state().erase(net.first->bias.unsafeGetTensorImpl());
  auto& options =
      static_cast<optim::AdamOptions&>(optimizer.param_groups()[0].options());
  options.amsgrad(true);
  StateDict dict = Get(net, optimizer);
  for (const char* fqn : {"first.weight", "first.bias"}) {
    EXPECT_THAT(KeysOf(StateOf(dict, fqn)),
                ElementsAre("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"));
  }
  EXPECT_EQ(TensorAt(StateOf(dict, "first.weight"), "step").item().toInt(), 2);
  EXPECT_EQ(TensorAt(StateOf(dict, "first.bias"), "step").item().toInt(), 0);
  EXPECT_EQ(optimizer.state().size(), 1);
  ASSERT_TRUE(Set(net, optimizer, dict).ok());
  EXPECT_TRUE(Equal(Get(net, optimizer), dict));
}

TEST(RoundTripTest, StateIsFilledInPlaceAndLosesWhatTheDictLacks) {
  Net net;
  optim::Adam optimizer(net.parameters(),
                        optim::AdamOptions(0.1).amsgrad(true));
  Train(net, optimizer, 2);
  StateDict with = Get(net, optimizer);
  auto& options =
      static_cast<optim::AdamOptions&>(optimizer.param_groups()[0].options());
  options.amsgrad(false);
  Net other;
  optim::Adam without(other.parameters(), optim::AdamOptions(0.1));
  Train(other, without, 5);
  const StateDict dict = Get(other, without);

  void* const key = net.first->bias.unsafeGetTensorImpl();
  auto& state = static_cast<optim::AdamParamState&>(*optimizer.state()[key]);
  const at::Tensor average = state.exp_avg();
  ASSERT_TRUE(state.max_exp_avg_sq().defined());
  ASSERT_TRUE(Set(net, optimizer, dict).ok());
  EXPECT_EQ(optimizer.state()[key].get(), &state);
  EXPECT_EQ(state.step(), 5);
  EXPECT_TRUE(state.exp_avg().is_same(average));
  EXPECT_FALSE(state.max_exp_avg_sq().defined());
  EXPECT_TRUE(Equal(Get(net, optimizer), dict));
  // And back.
  ASSERT_TRUE(Set(net, optimizer, with).ok());
  EXPECT_EQ(optimizer.state()[key].get(), &state);
  EXPECT_EQ(state.step(), 2);
  EXPECT_TRUE(state.max_exp_avg_sq().defined());
  EXPECT_TRUE(Equal(Get(net, optimizer), with));
}

// What a source says of a state's tensors without making its dict.
TEST(TorchOptimizerSourceTest, LiveTensorsAreThoseOfTheState) {
  Net net;
  std::vector<std::unique_ptr<optim::Optimizer>> optimizers;
  const std::vector<at::Tensor> params = net.parameters();
  optimizers.push_back(std::make_unique<optim::SGD>(
      params, optim::SGDOptions(0.1).momentum(0.9)));
  optimizers.push_back(std::make_unique<optim::Adam>(
      params, optim::AdamOptions(0.1).amsgrad(true)));
  optimizers.push_back(
      std::make_unique<optim::AdamW>(params, optim::AdamWOptions(0.1)));
  optimizers.push_back(
      std::make_unique<optim::Adagrad>(params, optim::AdagradOptions(0.1)));
  optimizers.push_back(std::make_unique<optim::RMSprop>(
      params, optim::RMSpropOptions(0.1).momentum(0.9).centered(true)));
  optimizers.push_back(
      std::make_unique<optim::LBFGS>(params, optim::LBFGSOptions(0.1)));
  for (const auto& optimizer : optimizers) {
    Train(net, *optimizer, 1);
    optimizer->state().erase(params[1].unsafeGetTensorImpl());
    const auto source = *TorchOptimizerSource::Create(optimizer.get());
    SCOPED_TRACE(source->type_name());
    std::vector<StateField> fields =
        *source->StateFields(*source->Hyperparameters(0));
    fields.push_back({"no such thing"});
    source->PrefetchStates(0, 0, params.size());
    for (size_t param = 0; param < params.size(); ++param) {
      std::vector<at::Tensor> expected(fields.size());
      PlainTensorsOf(*source->State(0, param), fields,
                     absl::MakeSpan(expected));
      std::vector<at::Tensor> found(fields.size(), params[0]);
      ASSERT_TRUE(
          source->LiveTensors(0, param, fields, absl::MakeSpan(found)).ok());
      for (size_t i = 0; i < fields.size(); ++i) {
        if (fields[i].shape == StateField::Shape::kCount) continue;
        EXPECT_TRUE(found[i].is_same(expected[i])) << fields[i].name;
        if (param == 1) {
          EXPECT_FALSE(found[i].defined());
        }
      }
    }
  }
}

// Also ByteDance-Seed/VeOmni#878.
TEST(OptimizerIssuesTest, Issue143828_GroupsAreMatchedByParameter) {
  const auto groups = [](Net& net, bool split) {
    const auto options = [](double lr, double decay) {
      return std::make_unique<optim::AdamWOptions>(
          optim::AdamWOptions(lr).weight_decay(decay));
    };
    std::vector<optim::OptimizerParamGroup> out;
    if (split) {
      out.emplace_back(net.second->parameters(), options(0.5, 0));
      out.emplace_back(std::vector<at::Tensor>{}, options(0.75, 0));
      out.emplace_back(net.first->parameters(), options(0.5, 0));
    } else {
      out.emplace_back(net.parameters(), options(0.25, 0.125));
      out.emplace_back(std::vector<at::Tensor>{}, options(0.875, 0));
    }
    return out;
  };
  const auto lr = [](const optim::Optimizer& optimizer, size_t group) {
    return optimizer.param_groups()[group].options().get_lr();
  };
  for (const bool flat : {false, true}) {
    Net one;
    optim::AdamW optimizer_one(groups(one, false));
    Train(one, optimizer_one, 1);
    Net split;
    optim::AdamW optimizer_split(groups(split, true));
    Train(split, optimizer_split, 2);
    // Several saved groups to one.
    Net b;
    optim::AdamW optimizer_b(groups(b, false));
    absl::Status status =
        Set(b, optimizer_b, Get(split, optimizer_split, flat));
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(lr(optimizer_b, 0), 0.5);
    EXPECT_EQ(lr(optimizer_b, 1), 0.875);  // an empty group keeps its own
    // One saved group to several.
    status = Set(split, optimizer_split, Get(one, optimizer_one, flat));
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(lr(optimizer_split, 0), 0.25);
    EXPECT_EQ(lr(optimizer_split, 1), 0.75);
    EXPECT_EQ(lr(optimizer_split, 2), 0.25);
    EXPECT_EQ(static_cast<const optim::AdamWOptions&>(
                  optimizer_split.param_groups()[2].options())
                  .weight_decay(),
              0.125);
    Train(split, optimizer_split, 1);
    // Contradictions name everybody.
    optimizer_split.param_groups()[0].options().set_lr(0.0625);
    EXPECT_THAT(Set(b, optimizer_b, Get(split, optimizer_split, flat)),
                IsInvalid("AdamW group 0: \"lr\" is 0.25 for \"first.weight\", "
                          "\"first.bias\" and 0.0625 for \"second.weight\", "
                          "\"second.bias\", but they are in one group here"));
  }
}

// Pipeline stages: the flat dicts of all can be put together as they are.
TEST(OptimizerIssuesTest, Issue126595_FlatDictsOfStagesMakeOne) {
  Net a;
  optim::AdamW first(a.first->parameters(), optim::AdamWOptions(0.5));
  optim::AdamW second(a.second->parameters(), optim::AdamWOptions(0.5));
  Train(a, first, 1);
  Train(a, second, 2);
  StateDict all = Get(a, first, true);
  const StateDict other = Get(a, second, true);
  for (size_t i = 0; i < other.size(); ++i) {
    all.Set(other.key(i), other.value(i));
  }
  Net b;
  optim::AdamW whole(b.parameters());
  ASSERT_TRUE(Set(b, whole, all).ok());
  EXPECT_TRUE(Equal(Get(b, whole, true), Get(a, {&first, &second}, true)));
}

TEST(OptimizerIssuesTest, Issue129079_TensorLrAndPlainValuesAreLoaded) {
  Net a;
  optim::AdamW optimizer_a(a.parameters(), optim::AdamWOptions(0.5));
  StateDict dict = Get(a, optimizer_a);
  GroupAt(dict, 0).Set("lr", Value(TensorValue(at::scalar_tensor(0.75))));
  GroupAt(dict, 0).Set("eps", Value(1));
  Net b;
  optim::AdamW optimizer_b(b.parameters());
  const absl::Status status = Set(b, optimizer_b, dict);
  ASSERT_TRUE(status.ok()) << status;
  const auto& options = static_cast<const optim::AdamWOptions&>(
      optimizer_b.param_groups()[0].options());
  EXPECT_EQ(options.lr(), 0.75);
  EXPECT_EQ(options.eps(), 1);
  GroupAt(dict, 0).Set("lr", Value(TensorValue(at::zeros({2}))));
  EXPECT_THAT(Set(b, optimizer_b, dict), IsInvalid("group 0 \"lr\""));
}

// Also #103256, #173901: the type and device of "step".
TEST(OptimizerIssuesTest, Issue108860_StepOfAnyType) {
  for (const c10::ScalarType type :
       {c10::kByte, c10::kShort, c10::kInt, c10::kLong, c10::kHalf,
        c10::kBFloat16, c10::kFloat, c10::kDouble}) {
    for (const bool flat : {false, true}) {
      Net net;
      optim::AdamW optimizer(net.first->parameters());
      Train(net, optimizer, 1);
      StateDict dict = Get(net, optimizer, flat);
      Value step(TensorValue(at::scalar_tensor(7, type)));
      if (flat) {
        dict.Set("state.first.bias.step", step);
      } else {
        StateOf(dict, "first.bias").Set("step", step);
      }
      const absl::Status status = Set(net, optimizer, dict);
      ASSERT_TRUE(status.ok()) << status;
      StateDict again = Get(net, optimizer);
      EXPECT_EQ(Show(*StateOf(again, "first.bias").Find("step")), "float32[]");
      EXPECT_EQ(TensorAt(StateOf(again, "first.bias"), "step").item().toInt(),
                7);
    }
  }
}

// Also pytorch/torchtitan#4615, pytorch/ao#3314, NVIDIA/TransformerEngine#3507.
TEST(OptimizerIssuesTest, Issue43706_Issue187138_TypeOfStateIsAPolicy) {
  Net a;
  a.to(c10::kBFloat16);
  optim::AdamW optimizer_a(a.first->parameters());
  for (const at::Tensor& param : a.first->parameters()) {
    auto state = std::make_unique<optim::AdamWParamState>();
    state->step(3);
    state->exp_avg(at::full(param.sizes(), 1.0 / 3, c10::kFloat));
    state->exp_avg_sq(at::full(param.sizes(), 1.0 / 7, c10::kFloat));
    optimizer_a.state()[param.unsafeGetTensorImpl()] = std::move(state);
  }
  StateDict dict = Get(a, optimizer_a);
  const auto load = [&](DTypePolicy policy, absl::Status* status) {
    Net b;
    b.to(c10::kBFloat16);
    optim::AdamW optimizer_b(b.first->parameters());
    *status = Set(b, optimizer_b, dict, true, policy);
    StateDict loaded = Get(b, optimizer_b);
    return TensorAt(StateOf(loaded, "first.weight"), "exp_avg");
  };
  absl::Status status;
  for (const DTypePolicy policy : {DTypePolicy::kDefault, DTypePolicy::kKeep}) {
    const at::Tensor kept = load(policy, &status);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_TRUE(
        at::equal(kept, TensorAt(StateOf(dict, "first.weight"), "exp_avg")));
  }
  const at::Tensor cast = load(DTypePolicy::kCast, &status);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(cast.scalar_type(), c10::kBFloat16);
  EXPECT_TRUE(at::equal(cast, at::full({4, 3}, 1.0 / 3, c10::kBFloat16)));
  load(DTypePolicy::kError, &status);
  EXPECT_THAT(status, IsInvalid("\"first.weight.exp_avg\": type in the dict is "
                                "Float, here BFloat16"));
  EXPECT_THAT(status, IsInvalid("\"first.bias.exp_avg_sq\""));
}

TEST(OptimizerIssuesTest, Issue166208_AParameterInTwoOptimizersIsAnError) {
  Net net;
  optim::AdamW first(net.parameters());
  optim::SGD second(net.second->parameters(), optim::SGDOptions(0.1));
  const Optimizers both = {&first, &second};
  constexpr char kText[] =
      "parameter \"second.weight\" is in AdamW group 0 and in SGD group 0";
  EXPECT_THAT(GetOptimizerStateDict(net, both).status(), IsInvalid(kText));
  EXPECT_THAT(Set(net, both, Get(net, first)), IsInvalid(kText));
  // A dict that has it twice does not say which hyperparameters it means.
  StateDict dict = Get(net, first);
  auto& groups = *dict.Find("param_groups")->get_if<Value::List>();
  groups.push_back(groups[0]);
  EXPECT_THAT(Set(net, first, dict),
              IsInvalid("the dict has \"first.weight\" in group 0 and in "
                        "group 1"));
}

// Wishes since #1489: state by name, and strictness.
TEST(OptimizerIssuesTest, Issue1489_Issue34660_OrderOfParametersDoesNotMatter) {
  Net a;
  optim::AdamW optimizer_a(a.parameters());
  Train(a, optimizer_a, 2);
  Net b;
  std::vector<at::Tensor> reversed = b.parameters();
  std::reverse(reversed.begin(), reversed.end());
  optim::AdamW optimizer_b(reversed);
  StateDict dict = Get(a, optimizer_a);
  ASSERT_TRUE(Set(b, optimizer_b, dict).ok());
  StateDict again = Get(b, optimizer_b);
  for (const char* fqn : {"first.weight", "second.bias"}) {
    EXPECT_TRUE(Equal(StateOf(again, fqn), StateOf(dict, fqn)));
  }
  StateOf(dict, "first.bias").Set("velocity", Value(1.0));
  EXPECT_THAT(Set(b, optimizer_b, dict),
              IsInvalid("unexpected optimizer state (1): "
                        "\"first.bias.velocity\""));
}

// Also #128011: a KeyError for tied weights, and nothing at all if flat.
TEST(OptimizerIssuesTest, Issue128011_Issue148825_TiedParametersInBothForms) {
  struct TiedLinear : nn::Module {
    explicit TiedLinear(bool tied) {
      in = register_parameter("in", at::arange(3.0));
      out = tied ? register_parameter("out", in)
                 : register_parameter("out", at::arange(3.0));
    }
    at::Tensor in;
    at::Tensor out;
  };
  const auto step = [](TiedLinear& net, optim::Optimizer& optimizer) {
    (net.in * 2 + net.out).pow(2).sum().backward();
    optimizer.step();
  };
  for (const bool flat : {false, true}) {
    StateDictOptions options;
    options.flatten_optimizer_state_dict = flat;
    TiedLinear tied(true);
    // LibTorch lists a tied parameter once for each of its names.
    optim::AdamW optimizer(tied.parameters());
    ASSERT_EQ(optimizer.param_groups()[0].params().size(), 2);
    step(tied, optimizer);
    const auto state = GetStateDict(tied, optimizer, nullptr, options);
    ASSERT_TRUE(state.ok()) << state.status();
    if (!flat) {
      StateDict dict = state->optimizer;
      EXPECT_THAT(KeysOf(DictAt(dict, "state")), ElementsAre("in"));
      EXPECT_EQ(Show(*GroupAt(dict, 0).Find("params")), "['in']");
    }
    TiedLinear again(true);
    optim::AdamW optimizer_again(again.parameters());
    absl::Status status =
        SetOptimizerStateDict(again, optimizer_again, state->optimizer);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_TRUE(
        Equal(*GetOptimizerStateDict(again, optimizer_again, nullptr, options),
              state->optimizer));

    // Saved tied, live apart: the other one's state is known from the model's
    // dict, and missing without it.
    TiedLinear apart(false);
    optim::AdamW optimizer_apart(apart.parameters());
    EXPECT_THAT(SetOptimizerStateDict(apart, optimizer_apart, state->optimizer),
                IsInvalid("missing optimizer state (1): \"out\""));
    const auto keys =
        SetStateDict(apart, optimizer_apart, state->model, state->optimizer);
    ASSERT_TRUE(keys.ok()) << keys.status();
    StateDict nested = *GetOptimizerStateDict(apart, optimizer_apart);
    EXPECT_TRUE(Equal(StateOf(nested, "in"), StateOf(nested, "out")));
    EXPECT_FALSE(TensorAt(StateOf(nested, "in"), "exp_avg")
                     .is_alias_of(TensorAt(StateOf(nested, "out"), "exp_avg")));

    // Saved apart, live tied: the first name counts.
    step(apart, optimizer_apart);
    const auto two =
        GetOptimizerStateDict(apart, optimizer_apart, nullptr, options);
    status = SetOptimizerStateDict(again, optimizer_again, *two);
    ASSERT_TRUE(status.ok()) << status;
    StateDict one = *GetOptimizerStateDict(again, optimizer_again);
    nested = *GetOptimizerStateDict(apart, optimizer_apart);
    EXPECT_TRUE(Equal(StateOf(one, "in"), StateOf(nested, "in")));
  }
}

// --- Dicts of Python.

// optimizer.state_dict(), with its keys: parameters are numbers.
StateDict RawDict(const Net& net, bool text_keys) {
  StateDict state;
  int64_t number = 0;
  for (const at::Tensor& param : net.parameters()) {
    StateDict entries;
    entries.Set("step", Value(TensorValue(at::scalar_tensor(5.0))));
    entries.Set("exp_avg", Value(TensorValue(at::full(
                               param.sizes(), static_cast<double>(number)))));
    entries.Set("exp_avg_sq", Value(TensorValue(at::ones(param.sizes()))));
    // Not in order, as in Python after some loads.
    state.Set(text_keys ? PathSegment(absl::StrCat(3 - number))
                        : PathSegment(3 - number),
              Value(std::move(entries)));
    ++number;
  }
  StateDict group;
  group.Set("lr", Value(0.5));
  group.Set("fused", Value(true));
  group.Set("params", Value(Value::List{3, 2, 1, 0}));
  StateDict dict;
  dict.Set("state", Value(std::move(state)));
  dict.Set("param_groups", Value(Value::List{Value(std::move(group))}));
  return dict;
}

TEST(RawPythonDictTest, NumbersArePositions) {
  for (const bool text_keys : {false, true}) {
    Net net;
    optim::AdamW optimizer(net.parameters());
    const absl::Status status = Set(net, optimizer, RawDict(net, text_keys));
    ASSERT_TRUE(status.ok()) << status;
    StateDict dict = Get(net, optimizer);
    int number = 0;
    for (const char* fqn :
         {"first.weight", "first.bias", "second.weight", "second.bias"}) {
      EXPECT_TRUE(at::equal(
          TensorAt(StateOf(dict, fqn), "exp_avg"),
          at::full_like(TensorAt(StateOf(dict, fqn), "exp_avg"), number++)));
      EXPECT_EQ(TensorAt(StateOf(dict, fqn), "step").item().toInt(), 5);
    }
    EXPECT_EQ(Show(*GroupAt(dict, 0).Find("lr")), "0.5");
    EXPECT_EQ(Show(*GroupAt(dict, 0).Find("fused")), "True");
  }
}

TEST(RawPythonDictTest, WhatDoesNotFitIsNamed) {
  Net net;
  optim::AdamW optimizer(net.parameters());
  StateDict dict = RawDict(net, false);
  optim::AdamW smaller(net.first->parameters());
  EXPECT_THAT(Set(net, smaller, dict),
              IsInvalid("group 0 of the dict has 4 parameters, AdamW group 0 "
                        "has 2"));
  optim::SGD other(net.second->parameters(), optim::SGDOptions(0.1));
  EXPECT_THAT(Set(net, {&smaller, &other}, dict),
              IsInvalid("names parameters by number"));
  DictAt(dict, "state").Set(int64_t{7}, Value(StateDict()));
  EXPECT_THAT(Set(net, optimizer, dict),
              IsInvalid("no group lists parameter 7, which has state"));
  GroupAt(dict, 0).Set("params", Value(Value::List{3, 2, 1, 1}));
  EXPECT_THAT(Set(net, optimizer, dict),
              IsInvalid("lists parameter 3 under a number that is taken"));
  GroupAt(dict, 0).Set("params", Value(Value::List{3, 2, 1, "x"}));
  EXPECT_THAT(Set(net, optimizer, dict),
              IsInvalid("lists parameter 3 not by number"));
  // Without state, as of plain SGD.
  optim::SGD sgd(net.parameters(), optim::SGDOptions(0.1));
  GroupAt(dict, 0).Set("params", Value(Value::List{0, 1, 2, 3}));
  dict.Set("state", Value(StateDict()));
  ASSERT_TRUE(Set(net, sgd, dict).ok());
  EXPECT_EQ(sgd.param_groups()[0].options().get_lr(), 0.5);
}

TEST(PythonOnlyKeysTest, AreKeptByEachClass) {
  Net net;
  optim::Adagrad adagrad(net.first->parameters());
  optim::RMSprop rmsprop(net.second->parameters());
  const Optimizers both = {&adagrad, &rmsprop};
  StateDict dict = Get(net, both);
  for (const size_t group : {0, 1}) {
    GroupAt(dict, group).Set("foreach", Value(true));
    GroupAt(dict, group).Set("differentiable", Value(true));
    GroupAt(dict, group).Set("initial_lr", Value(0.25));
  }
  GroupAt(dict, 0).Set("fused", Value(true));
  GroupAt(dict, 1).Set("capturable", Value(true));
  ASSERT_TRUE(Set(net, both, dict).ok());
  EXPECT_EQ(Show(*Get(net, both).Find("param_groups")), [&] {
    // "initial_lr" comes before "params".
    StateDict expected = dict;
    for (const size_t group : {0, 1}) {
      Value params = *GroupAt(expected, group).Find("params");
      GroupAt(expected, group).Erase(std::string("params"));
      GroupAt(expected, group).Set("params", std::move(params));
    }
    return Show(*expected.Find("param_groups"));
  }());
  Train(net, adagrad, 1);
  Train(net, rmsprop, 1);
  GroupAt(dict, 1).Set("maximize", Value(true));
  EXPECT_THAT(Set(net, both, dict), IsInvalid("RMSprop group 0: \"maximize\""));
}

TEST(HyperparameterTest, ZeroAndOneAreTruths) {
  Net net;
  optim::Adam adam(net.parameters(), optim::AdamOptions(0.1).amsgrad(true));
  StateDict dict = Get(net, adam);
  GroupAt(dict, 0).Set("amsgrad", Value(0));
  ASSERT_TRUE(Set(net, adam, dict).ok());
  EXPECT_FALSE(
      static_cast<optim::AdamOptions&>(adam.param_groups()[0].options())
          .amsgrad());
  GroupAt(dict, 0).Set("amsgrad", Value(2));
  EXPECT_THAT(Set(net, adam, dict), IsInvalid("amsgrad"));
}

TEST(PythonOnlyKeysTest, ParamNamesFollowTheParameters) {
  for (const bool flat : {false, true}) {
    Net a;
    optim::SGD optimizer_a(a.parameters(), optim::SGDOptions(0.1));
    StateDict dict = Get(a, optimizer_a);
    const Value names(Value::List{"first.weight", "first.bias", "second.weight",
                                  "second.bias"});
    GroupAt(dict, 0).Set("param_names", names);
    ASSERT_TRUE(Set(a, optimizer_a, dict).ok());
    dict = Get(a, optimizer_a);
    EXPECT_EQ(KeysOf(GroupAt(dict, 0))[0], "param_names");
    EXPECT_EQ(Show(*GroupAt(dict, 0).Find("param_names")), Show(names));
    dict = Get(a, optimizer_a, flat);
    // Into other groups.
    Net b;
    optim::SGD optimizer_b(
        std::vector<optim::OptimizerParamGroup>{
            {b.second->parameters()}, {{b.first->bias, b.first->weight}}},
        optim::SGDOptions(0.1));
    const absl::Status status = Set(b, optimizer_b, dict);
    ASSERT_TRUE(status.ok()) << status;
    StateDict again = Get(b, optimizer_b);
    EXPECT_EQ(Show(*GroupAt(again, 0).Find("param_names")),
              "['second.weight', 'second.bias']");
    EXPECT_EQ(Show(*GroupAt(again, 1).Find("param_names")),
              "['first.bias', 'first.weight']");
    // They are of the parameters that were there.
    optimizer_b.param_groups()[1].params().pop_back();
    again = Get(b, optimizer_b);
    EXPECT_FALSE(GroupAt(again, 1).contains("param_names"));
  }
}

// --- Sessions.

// A session reads again only what has changed, and all of that.
TEST(SessionTest, SeesEveryChangeOfAnOptimizer) {
  Net net;
  optim::AdamW adamw(net.first->parameters());
  optim::SGD sgd(net.second->parameters(),
                 optim::SGDOptions(0.1).momentum(0.5));
  const Optimizers both = {&adamw, &sgd};
  const auto session = StateDictSession::Create(net, both);
  ASSERT_TRUE(session.ok()) << session.status();
  const auto check = [&](const char* what) {
    const auto cached = (*session)->GetOptimizer();
    ASSERT_TRUE(cached.ok()) << cached.status();
    EXPECT_TRUE(Equal(*cached, Get(net, both))) << what;
    const auto again = (*session)->GetOptimizer();
    EXPECT_TRUE(Equal(*again, *cached)) << what;
  };
  check("no state");
  const StateDict first = *(*session)->GetOptimizer();
  const std::string first_text = Show(Value(first));
  Train(net, adamw, 1);
  check("state of one");
  Train(net, sgd, 1);
  check("state of both");
  StateDict second = *(*session)->GetOptimizer();
  Train(net, adamw, 1);
  check("steps");
  adamw.param_groups()[0].options().set_lr(0.75);
  check("lr");
  net.first->weight.requires_grad_(false);
  check("frozen with state");
  adamw.state().erase(net.first->weight.unsafeGetTensorImpl());
  check("frozen without state");
  net.first->weight.requires_grad_(true);
  check("trained again");
  static_cast<optim::AdamWParamState&>(
      *adamw.state()[net.first->bias.unsafeGetTensorImpl()])
      .exp_avg(at::ones({4}));
  check("another tensor");
  adamw.param_groups()[0].params().pop_back();
  check("fewer parameters");
  sgd.add_param_group(optim::OptimizerParamGroup(
      {net.first->bias}, std::make_unique<optim::SGDOptions>(0.3)));
  check("another group");
  adamw.state().clear();
  check("cleared");
  // Dicts that were given out before are as they were.
  EXPECT_EQ(Show(Value(first)), first_text);
  EXPECT_EQ(TensorAt(StateOf(second, "first.bias"), "step").item().toInt(), 1);
}

TEST(SessionTest, WhatACallerDoesToADictStaysThere) {
  Net net;
  optim::AdamW optimizer(net.parameters());
  Train(net, optimizer, 1);
  const auto session = StateDictSession::Create(net, optimizer);
  StateDict mine = *(*session)->GetOptimizer();
  const StateDict untouched = *(*session)->GetOptimizer();
  // In place too: a step is a number that the dict has for itself.
  TensorAt(StateOf(mine, "first.bias"), "step").fill_(50);
  StateOf(mine, "first.weight").Set("step", Value(70));
  DictAt(mine, "state").Erase(std::string("second.bias"));
  GroupAt(mine, 0).Set("lr", Value(9.0));
  StateDict now = *(*session)->GetOptimizer();
  EXPECT_TRUE(Equal(now, Get(net, optimizer)));
  EXPECT_EQ(TensorAt(StateOf(now, "first.bias"), "step").item().toInt(), 1);
  EXPECT_EQ(TensorAt(StateOf(now, "second.bias"), "step").item().toInt(), 1);
  EXPECT_EQ(Show(Value(untouched)), Show(Value(now)));
}

// --- An optimizer of a user, with a codec as README.md says.

using LionBetas = std::tuple<double, double>;

struct LionOptions : optim::OptimizerCloneableOptions<LionOptions> {
  explicit LionOptions(double lr) : lr_(lr) {}
  TORCH_ARG(double, lr);
  TORCH_ARG(int64_t, warmup) = 10;
  TORCH_ARG(LionBetas, betas) = {0.9, 0.99};
};

struct LionState : optim::OptimizerCloneableParamState<LionState> {
  TORCH_ARG(at::Tensor, exp_avg);
};

class Lion : public optim::Optimizer {
 public:
  Lion(std::vector<at::Tensor> params, const LionOptions& options)
      : Optimizer(std::move(params), std::make_unique<LionOptions>(options)) {}

  at::Tensor step(LossClosure closure = nullptr) override {
    if (closure != nullptr) closure();
    const at::NoGradGuard no_grad;
    for (auto& group : param_groups_) {
      const auto& options = static_cast<LionOptions&>(group.options());
      const auto [beta1, beta2] = options.betas();
      for (auto& param : group.params()) {
        auto& state = state_[param.unsafeGetTensorImpl()];
        if (state == nullptr) {
          state = std::make_unique<LionState>();
          static_cast<LionState&>(*state).exp_avg(at::zeros_like(param));
        }
        at::Tensor& average = static_cast<LionState&>(*state).exp_avg();
        param.add_((average * beta1 + param.grad() * (1 - beta1)).sign(),
                   -options.lr());
        average.mul_(beta2).add_(param.grad(), 1 - beta2);
      }
    }
    return {};
  }
};

TEST(OwnCodecTest, ClassWithoutACodecIsNamed) {
  struct Nameless : optim::Optimizer {
    using Optimizer::Optimizer;
    at::Tensor step(LossClosure) override { return {}; }
  };
  Net net;
  Nameless optimizer(net.parameters(), std::make_unique<LionOptions>(0.1));
  const absl::Status status = GetOptimizerStateDict(net, optimizer).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("Nameless"),
                    HasSubstr("SGD, Adam, AdamW, Adagrad, RMSprop, LBFGS"),
                    HasSubstr("RegisterOptimizerCodec")));
}

TEST(OwnCodecTest, TablesAreEnough) {
  CodecTables<LionOptions, LionState> tables;
  tables.name = "Lion";
  tables.native = {
      {"lr", +[](LionOptions& o) -> double& { return o.lr(); }},
      {"betas", +[](LionOptions& o) -> LionBetas& { return o.betas(); }},
      {"warmup", +[](LionOptions& o) -> int64_t& { return o.warmup(); }},
  };
  tables.tensors = {{"exp_avg",
                     +[](LionState& s) -> at::Tensor& { return s.exp_avg(); },
                     +[](const LionOptions&) { return true; }}};
  RegisterOptimizerCodec(
      std::make_unique<TypedCodec<Lion, LionOptions, LionState>>(
          std::move(tables)));

  for (const bool flat : {false, true}) {
    Net a;
    Lion optimizer_a(a.parameters(), LionOptions(0.01).warmup(20));
    StateDict inert = Get(a, optimizer_a);
    EXPECT_TRUE(at::equal(TensorAt(StateOf(inert, "first.bias"), "exp_avg"),
                          at::zeros({4})));
    Train(a, optimizer_a, 3);
    const StateDict dict = Get(a, optimizer_a, flat);
    if (!flat) {
      StateDict copy = dict;
      EXPECT_EQ(Show(Value(GroupAt(copy, 0))),
                "{'lr': 0.01, 'betas': (0.9, 0.99), 'warmup': 20, 'params': "
                "['first.weight', 'first.bias', 'second.weight', "
                "'second.bias']}");
    }
    Net b;
    Lion optimizer_b(b.parameters(), LionOptions(0.5));
    const absl::Status status = Set(b, optimizer_b, dict);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_TRUE(Equal(Get(b, optimizer_b, flat), dict));
    for (size_t i = 0; i < 4; ++i) {
      b.parameters()[i].detach().copy_(a.parameters()[i].detach());
    }
    Train(a, optimizer_a, 2);
    Train(b, optimizer_b, 2);
    EXPECT_TRUE(Equal(*GetModelStateDict(a), *GetModelStateDict(b)));
  }
  Net net;
  Lion optimizer(net.parameters(), LionOptions(0.5));
  StateDict dict = Get(net, optimizer);
  GroupAt(dict, 0).Set("warmup", Value(1.5));
  EXPECT_THAT(Set(net, optimizer, dict),
              IsInvalid("Lion group 0: \"warmup\": expected a whole number, "
                        "found float"));
}

}  // namespace
}  // namespace dsd
