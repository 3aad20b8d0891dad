// SPDX-License-Identifier: Apache-2.0
//
// The six functions and the session over real modules and optimizers. What
// Python gives for the same was recorded with PyTorch 2.11.0.

#include "dsd/frontends/torch/state_dict.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/Context.h"
#include "ATen/Parallel.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/equal.h"
#include "ATen/ops/full_like.h"
#include "ATen/ops/linear.h"
#include "ATen/ops/ones.h"
#include "ATen/ops/ones_like.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/strings/substitute.h"
#include "dsd/core/fqn/module_wrapper.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/frontends/optimizer/typed_codec.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/modules/batchnorm.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adam.h"
#include "torch/optim/adamw.h"
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

at::Tensor TensorAt(const StateDict& dict, const std::string& key) {
  return *dict.Find(key)->get_if<TensorValue>()->Local();
}

StateDict& GroupAt(StateDict& dict, size_t i) {
  return *(*dict.Find("param_groups")->get_if<Value::List>())[i]
              .get_if<StateDict>();
}

struct Net : nn::Module {
  Net()
      : first(register_module("first", nn::Linear(3, 4))),
        norm(register_module("norm", nn::BatchNorm1d(4))),
        second(register_module("second", nn::Linear(4, 2))) {}

  at::Tensor forward(const at::Tensor& x) {
    return second(norm(first(x).tanh()));
  }

  nn::Linear first;
  nn::BatchNorm1d norm;
  nn::Linear second;
};

template <class Module, class Optimizer>
void Train(Module& net, Optimizer& optimizer, int steps) {
  for (int step = 0; step < steps; ++step) {
    const at::Tensor x =
        at::ones({4, 3}).cumsum(0).mul_(0.1 * (step + 1)).sin();
    optimizer.zero_grad();
    net.forward(x).pow(2).sum().backward();
    optimizer.step();
  }
}

void ExpectEqual(const StateDict& a, const StateDict& b) {
  ASSERT_EQ(Show(Value(a)), Show(Value(b)));
  std::vector<at::Tensor> tensors[2];
  StateDict copies[2] = {a, b};
  for (int side = 0; side < 2; ++side) {
    ForEachTensor(copies[side], "", [&](const std::string&, TensorValue& v) {
      tensors[side].push_back(*v.Local());
    });
  }
  for (size_t i = 0; i < tensors[0].size(); ++i) {
    EXPECT_TRUE(at::equal(tensors[0][i], tensors[1][i])) << "tensor " << i;
  }
}

constexpr char kAdamGroup[] =
    "[{'lr': 0.01, 'betas': (0.9, 0.999), 'eps': 1e-08, 'weight_decay': $0, "
    "'amsgrad': $1, 'maximize': False, 'foreach': None, 'capturable': False, "
    "'differentiable': False, 'fused': None, 'decoupled_weight_decay': $2, "
    "'params': ['weight', 'bias']}]";

TEST(PythonStructureTest, AdamW) {
  nn::Linear net(3, 2);
  optim::AdamW optimizer(net->parameters(), optim::AdamWOptions(0.01));
  Train(*net, optimizer, 1);
  const auto dict = GetOptimizerStateDict(*net, optimizer);
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_EQ(Show(Value(*dict)),
            absl::StrCat(
                "{'state': {'weight': {'step': float32[], 'exp_avg': "
                "float32[2, 3], 'exp_avg_sq': float32[2, 3]}, 'bias': {'step': "
                "float32[], 'exp_avg': float32[2], 'exp_avg_sq': float32[2]}}, "
                "'param_groups': ",
                absl::Substitute(kAdamGroup, "0.01", "False", "True"), "}"));
}

TEST(PythonStructureTest, AdamWithAmsgrad) {
  nn::Linear net(3, 2);
  optim::Adam optimizer(net->parameters(),
                        optim::AdamOptions(0.01).amsgrad(true));
  Train(*net, optimizer, 1);
  const auto dict = GetOptimizerStateDict(*net, optimizer);
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_EQ(
      Show(Value(*dict)),
      absl::StrCat(
          "{'state': {'weight': {'step': float32[], 'exp_avg': float32[2, 3], "
          "'exp_avg_sq': float32[2, 3], 'max_exp_avg_sq': float32[2, 3]}, "
          "'bias': {'step': float32[], 'exp_avg': float32[2], 'exp_avg_sq': "
          "float32[2], 'max_exp_avg_sq': float32[2]}}, 'param_groups': ",
          absl::Substitute(kAdamGroup, "0", "True", "False"), "}"));
}

TEST(PythonStructureTest, Sgd) {
  for (const double momentum : {0.0, 0.9}) {
    nn::Linear net(3, 2);
    optim::SGD optimizer(net->parameters(),
                         optim::SGDOptions(0.01).momentum(momentum));
    Train(*net, optimizer, 1);
    const auto dict = GetOptimizerStateDict(*net, optimizer);
    ASSERT_TRUE(dict.ok()) << dict.status();
    EXPECT_EQ(
        Show(Value(*dict)),
        absl::StrCat(
            "{'state': {",
            momentum == 0
                ? ""
                : "'weight': {'momentum_buffer': float32[2, 3]}, 'bias': "
                  "{'momentum_buffer': float32[2]}",
            "}, 'param_groups': [{'lr': 0.01, 'momentum': ", momentum,
            ", 'dampening': 0, 'weight_decay': 0, 'nesterov': False, "
            "'maximize': False, 'foreach': None, 'differentiable': False, "
            "'fused': None, 'params': ['weight', 'bias']}]}"));
  }
}

TEST(PythonStructureTest, FlatForm) {
  nn::Linear net(3, 2);
  optim::SGD optimizer(net->parameters(),
                       optim::SGDOptions(0.01).momentum(0.9));
  Train(*net, optimizer, 1);
  StateDictOptions options;
  options.flatten_optimizer_state_dict = true;
  const auto dict = GetOptimizerStateDict(*net, optimizer, nullptr, options);
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_THAT(
      KeysOf(*dict),
      ElementsAre(
          "state.weight.momentum_buffer", "state.bias.momentum_buffer",
          "param_groups.weight.lr", "param_groups.weight.momentum",
          "param_groups.weight.dampening", "param_groups.weight.weight_decay",
          "param_groups.weight.nesterov", "param_groups.weight.maximize",
          "param_groups.weight.foreach", "param_groups.weight.differentiable",
          "param_groups.weight.fused", "param_groups.bias.lr",
          "param_groups.bias.momentum", "param_groups.bias.dampening",
          "param_groups.bias.weight_decay", "param_groups.bias.nesterov",
          "param_groups.bias.maximize", "param_groups.bias.foreach",
          "param_groups.bias.differentiable", "param_groups.bias.fused"));
}

TEST(ModelTest, KeysAreInModuleOrderWithBuffers) {
  Net net;
  const auto dict = GetModelStateDict(net);
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_THAT(
      KeysOf(*dict),
      ElementsAre("first.weight", "first.bias", "norm.weight", "norm.bias",
                  "norm.running_mean", "norm.running_var",
                  "norm.num_batches_tracked", "second.weight", "second.bias"));
  EXPECT_TRUE(TensorAt(*dict, "first.weight").is_alias_of(net.first->weight));
}

// A wrapper around any module.
struct Wrapper : nn::Module, ModuleWrapper {
  Wrapper(std::string segment, std::shared_ptr<nn::Module> module)
      : segment(std::move(segment)) {
    register_module(this->segment, std::move(module));
  }
  absl::string_view wrapped_child_name() const override { return segment; }
  const std::string segment;
};

TEST(ModelTest, WrappersLeaveNoTraceButNamesLikeTheirsStay) {
  struct Plain : nn::Module {
    Plain() {
      register_module("module", std::make_shared<nn::LinearImpl>(1, 1));
      register_module("deep", std::make_shared<Wrapper>(
                                  "_checkpoint_wrapped_module",
                                  std::make_shared<Wrapper>(
                                      "_orig_mod",
                                      std::make_shared<nn::LinearImpl>(1, 1))));
    }
  };
  Wrapper root("module", std::make_shared<Wrapper>("_fsdp_wrapped_module",
                                                   std::make_shared<Plain>()));
  optim::AdamW optimizer(root.parameters());
  const auto state = GetStateDict(root, optimizer);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_THAT(KeysOf(state->model), ElementsAre("module.weight", "module.bias",
                                                "deep.weight", "deep.bias"));
  EXPECT_THAT(
      KeysOf(*state->optimizer.Find("state")->get_if<StateDict>()),
      ElementsAre("module.weight", "module.bias", "deep.weight", "deep.bias"));
  // Into a model that is wrapped otherwise.
  Wrapper other("_orig_mod", std::make_shared<Plain>());
  EXPECT_TRUE(SetModelStateDict(other, state->model).ok());
}

template <class Optimizer, class Options>
void ExpectTrainingGoesOn(const Options& options) {
  at::manual_seed(1);
  Net a;
  Optimizer optimizer_a(a.parameters(), options);
  Train(a, optimizer_a, 3);
  for (const bool flat : {false, true}) {
    StateDictOptions full;
    full.full_state_dict = true;
    full.flatten_optimizer_state_dict = flat;
    const auto state = GetStateDict(a, optimizer_a, nullptr, full);
    ASSERT_TRUE(state.ok()) << state.status();
    Net b;
    Options other = options;
    other.lr(0.5);
    Optimizer optimizer_b(b.parameters(), other);
    Train(b, optimizer_b, 1);
    const auto keys =
        SetStateDict(b, optimizer_b, state->model, state->optimizer);
    ASSERT_TRUE(keys.ok()) << keys.status();
    EXPECT_TRUE(keys->empty());
    ExpectEqual(*GetOptimizerStateDict(b, optimizer_b),
                *GetOptimizerStateDict(a, optimizer_a));
    Train(a, optimizer_a, 2);
    Train(b, optimizer_b, 2);
    ExpectEqual(*GetModelStateDict(a), *GetModelStateDict(b));
  }
}

TEST(RoundTripTest, TrainingGoesOnBitForBit) {
  ExpectTrainingGoesOn<optim::AdamW>(optim::AdamWOptions(0.01));
  ExpectTrainingGoesOn<optim::Adam>(
      optim::AdamOptions(0.01).amsgrad(true).weight_decay(0.1));
  ExpectTrainingGoesOn<optim::SGD>(optim::SGDOptions(0.01));
  ExpectTrainingGoesOn<optim::SGD>(
      optim::SGDOptions(0.01).momentum(0.9).dampening(0.5).weight_decay(0.1));
}

// State made without a step is the state before the first step.
template <class Optimizer, class Options>
void ExpectInertIsFresh(const Options& options) {
  at::manual_seed(2);
  Net a;
  Optimizer optimizer_a(a.parameters(), options);
  const auto state = GetStateDict(a, optimizer_a);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_TRUE(optimizer_a.state().empty());
  Net b;
  Optimizer optimizer_b(b.parameters(), options);
  const auto keys =
      SetStateDict(b, optimizer_b, state->model, state->optimizer);
  ASSERT_TRUE(keys.ok()) << keys.status();
  Train(a, optimizer_a, 2);
  Train(b, optimizer_b, 2);
  ExpectEqual(*GetModelStateDict(a), *GetModelStateDict(b));
}

TEST(RoundTripTest, InertStateStepsLikeNone) {
  ExpectInertIsFresh<optim::AdamW>(optim::AdamWOptions(0.01));
  ExpectInertIsFresh<optim::Adam>(
      optim::AdamOptions(0.01).amsgrad(true).weight_decay(0.1));
  ExpectInertIsFresh<optim::SGD>(
      optim::SGDOptions(0.01).momentum(0.9).dampening(0.5));
}

TEST(RoundTripTest, LoadedOptionsDecideWhichStateThereIs) {
  Net a;
  optim::Adam optimizer_a(a.parameters(),
                          optim::AdamOptions(0.1).amsgrad(true));
  Train(a, optimizer_a, 2);
  Net b;
  optim::Adam optimizer_b(b.parameters(), optim::AdamOptions(0.2));
  Train(b, optimizer_b, 1);
  ASSERT_TRUE(SetOptimizerStateDict(b, optimizer_b,
                                    *GetOptimizerStateDict(a, optimizer_a))
                  .ok());
  ExpectEqual(*GetOptimizerStateDict(b, optimizer_b),
              *GetOptimizerStateDict(a, optimizer_a));
  // And back: the state that amsgrad = false has no use for is gone.
  Net c;
  optim::Adam optimizer_c(c.parameters(), optim::AdamOptions(0.1));
  Train(c, optimizer_c, 2);
  ASSERT_TRUE(SetOptimizerStateDict(b, optimizer_b,
                                    *GetOptimizerStateDict(c, optimizer_c))
                  .ok());
  ExpectEqual(*GetOptimizerStateDict(b, optimizer_b),
              *GetOptimizerStateDict(c, optimizer_c));
}

TEST(PythonOnlyKeysTest, AreKeptThroughARoundTrip) {
  nn::Linear net(3, 2);
  optim::AdamW optimizer(net->parameters());
  const optim::OptimizerOptions* const options =
      &optimizer.param_groups()[0].options();
  StateDict dict = *GetOptimizerStateDict(*net, optimizer);
  // What our own dicts have needs no other options object.
  ASSERT_TRUE(SetOptimizerStateDict(*net, optimizer, dict).ok());
  EXPECT_EQ(&optimizer.param_groups()[0].options(), options);

  GroupAt(dict, 0).Set("foreach", Value(true));
  GroupAt(dict, 0).Set("initial_lr", Value(0.25));
  GroupAt(dict, 0).Set("betas", Value(Value::List{0.5, 0.75}));
  ASSERT_TRUE(SetOptimizerStateDict(*net, optimizer, dict).ok());
  const StateDict again = *GetOptimizerStateDict(*net, optimizer);
  EXPECT_THAT(
      Show(Value(again)),
      AllOf(HasSubstr("'foreach': True, 'capturable': False"),
            HasSubstr("'decoupled_weight_decay': True, 'initial_lr': 0.25, "
                      "'params'"),
            HasSubstr("'betas': (0.5, 0.75)")));
  // The group's copies carry them, and LibTorch sees its own options in them.
  optim::OptimizerParamGroup copy(optimizer.param_groups()[0]);
  EXPECT_EQ(static_cast<const optim::AdamWOptions&>(copy.options()).lr(), 1e-3);
  Train(*net, optimizer, 1);
}

TEST(PythonOnlyKeysTest, OnesThatChangeTheTrainingAreRefused) {
  nn::Linear net(3, 2);
  optim::AdamW optimizer(net->parameters());
  StateDict dict = *GetOptimizerStateDict(*net, optimizer);
  GroupAt(dict, 0).Set("maximize", Value(true));
  const absl::Status status = SetOptimizerStateDict(*net, optimizer, dict);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("\"maximize\""));
  StateDictOptions options;
  options.strict = false;
  EXPECT_TRUE(
      SetOptimizerStateDict(*net, optimizer, dict, nullptr, options).ok());
  // Of Adam into AdamW.
  optim::Adam adam(net->parameters());
  EXPECT_THAT(
      std::string(SetOptimizerStateDict(*net, optimizer,
                                        *GetOptimizerStateDict(*net, adam))
                      .message()),
      HasSubstr("\"decoupled_weight_decay\""));
}

TEST(OptimizerTest, WrongKindOfHyperparameterIsNamed) {
  nn::Linear net(3, 2);
  optim::AdamW optimizer(net->parameters());
  StateDict dict = *GetOptimizerStateDict(*net, optimizer);
  GroupAt(dict, 0).Set("betas", Value(0.9));
  EXPECT_THAT(
      std::string(SetOptimizerStateDict(*net, optimizer, dict).message()),
      HasSubstr("AdamW group 0: \"betas\": expected a tuple of two numbers, "
                "found float"));
}

TEST(OptimizerTest, LongCountsAreNotRounded) {
  nn::Linear net(3, 2);
  optim::AdamW optimizer(net->parameters());
  Train(*net, optimizer, 1);
  constexpr int64_t kStep = (int64_t{1} << 24) + 1;
  for (auto& [key, state] : optimizer.state()) {
    static_cast<optim::AdamWParamState&>(*state).step(kStep);
  }
  const StateDict dict = *GetOptimizerStateDict(*net, optimizer);
  Train(*net, optimizer, 1);
  ASSERT_TRUE(SetOptimizerStateDict(*net, optimizer, dict).ok());
  for (auto& [key, state] : optimizer.state()) {
    EXPECT_EQ(static_cast<optim::AdamWParamState&>(*state).step(), kStep);
  }
}

// Optimizers that were made for a model on the meta device.
TEST(OptimizerTest, StateOfMetaParametersComesWithThem) {
  nn::Linear from(3, 2);
  optim::AdamW from_optimizer(from->parameters(), optim::AdamWOptions(0.1));
  Train(*from, from_optimizer, 2);
  const auto state = GetStateDict(*from, from_optimizer);
  ASSERT_TRUE(state.ok()) << state.status();
  struct MetaLinear : nn::Module {
    MetaLinear() {
      weight = register_parameter("weight", at::empty({2, 3}, c10::kMeta));
      bias = register_parameter("bias", at::empty({2}, c10::kMeta));
    }
    at::Tensor forward(const at::Tensor& x) {
      return at::linear(x, weight, bias);
    }
    at::Tensor weight;
    at::Tensor bias;
  };
  MetaLinear to;
  StateDictOptions options;
  options.assign = true;
  optim::AdamW to_optimizer(to.parameters(), optim::AdamWOptions(0.5));
  const auto keys = SetStateDict(to, to_optimizer, state->model,
                                 state->optimizer, nullptr, options);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(keys->empty());
  Train(*from, from_optimizer, 2);
  Train(to, to_optimizer, 2);
  ExpectEqual(*GetModelStateDict(to), *GetModelStateDict(*from));
  ExpectEqual(*GetOptimizerStateDict(to, to_optimizer),
              *GetOptimizerStateDict(*from, from_optimizer));
}

// What a set that is not strict left out is told.
TEST(OptimizerTest, StateThatDoesNotMatchIsReported) {
  nn::Linear net(3, 2);
  optim::AdamW optimizer(net->parameters(), optim::AdamWOptions(0.1));
  ModelAndOptimizerStateDict state = *GetStateDict(*net, optimizer);
  auto* states = state.optimizer.Find("state")->get_if<StateDict>();
  states->Erase(std::string("bias"));
  states->Find("weight")->get_if<StateDict>()->Set("velocity", Value(1));
  StateDictOptions options;
  options.strict = false;
  const auto keys = SetStateDict(*net, optimizer, state.model, state.optimizer,
                                 nullptr, options);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_THAT(keys->missing_optimizer_state, ElementsAre("bias"));
  EXPECT_THAT(keys->unexpected_optimizer_state, ElementsAre("weight.velocity"));
  EXPECT_FALSE(keys->empty());
}

TEST(OptimizerTest, FrozenAndUnusedParametersRoundTrip) {
  Net a;
  optim::AdamW optimizer_a(a.parameters());
  Train(a, optimizer_a, 1);
  a.first->weight.requires_grad_(false);
  a.second->bias.requires_grad_(false);
  optimizer_a.state().erase(a.second->bias.unsafeGetTensorImpl());
  const auto dict = GetOptimizerStateDict(a, optimizer_a);
  ASSERT_TRUE(dict.ok());
  const StateDict& state = *dict->Find("state")->get_if<StateDict>();
  EXPECT_TRUE(state.contains("first.weight"));
  EXPECT_FALSE(state.contains("second.bias"));
  Net b;
  b.first->weight.requires_grad_(false);
  b.second->bias.requires_grad_(false);
  optim::AdamW optimizer_b(b.parameters());
  const absl::Status status = SetOptimizerStateDict(b, optimizer_b, *dict);
  ASSERT_TRUE(status.ok()) << status;
  ExpectEqual(*GetOptimizerStateDict(b, optimizer_b), *dict);
}

// An optimizer of a user, with a codec as frontends/optimizer/README.md says.
struct SignOptions : optim::OptimizerCloneableOptions<SignOptions> {
  explicit SignOptions(double lr) : lr_(lr) {}
  double& lr() { return lr_; }
  double lr_;
};
struct SignState : optim::OptimizerCloneableParamState<SignState> {
  at::Tensor& last() { return last_; }
  int64_t& step() { return step_; }
  at::Tensor last_;
  int64_t step_ = 0;
};
struct Sign : optim::Optimizer {
  Sign(std::vector<at::Tensor> params, double lr)
      : Optimizer(std::move(params), std::make_unique<SignOptions>(lr)) {}
  at::Tensor step(LossClosure = nullptr) override {
    const at::NoGradGuard no_grad;
    for (auto& group : param_groups_) {
      for (auto& param : group.params()) {
        auto& state = state_[param.unsafeGetTensorImpl()];
        if (state == nullptr) state = std::make_unique<SignState>();
        auto& mine = static_cast<SignState&>(*state);
        mine.last_ = param.grad().sign();
        ++mine.step_;
        param.add_(mine.last_, -static_cast<SignOptions&>(group.options()).lr_);
      }
    }
    return {};
  }
};

TEST(OptimizerTest, CodecOfOnesOwn) {
  CodecTables<SignOptions, SignState> tables;
  tables.name = "Sign";
  tables.native = {{"lr", +[](SignOptions& o) -> double& { return o.lr(); }}};
  tables.step = +[](SignState& s) -> int64_t& { return s.step(); };
  tables.tensors = {{"last",
                     +[](SignState& s) -> at::Tensor& { return s.last(); },
                     +[](const SignOptions&) { return true; }}};
  RegisterOptimizerCodec(
      std::make_unique<TypedCodec<Sign, SignOptions, SignState>>(tables));
  nn::Linear a(3, 2);
  Sign optimizer_a(a->parameters(), 0.5);
  Train(*a, optimizer_a, 3);
  nn::Linear b(3, 2);
  Sign optimizer_b(b->parameters(), 0.1);
  const StateDict dict = *GetOptimizerStateDict(*a, optimizer_a);
  EXPECT_THAT(Show(Value(dict)), HasSubstr("'weight': {'step': float32[], "
                                           "'last': float32[2, 3]}"));
  ASSERT_TRUE(SetOptimizerStateDict(*b, optimizer_b, dict).ok());
  ExpectEqual(*GetOptimizerStateDict(*b, optimizer_b), dict);
}

TEST(SessionTest, KeepsNamesAndPlansUntilTheModelChanges) {
  Net net;
  optim::AdamW optimizer(net.parameters());
  Train(net, optimizer, 1);
  StateDictOptions full;
  full.full_state_dict = true;
  const auto session = StateDictSession::Create(net, optimizer, nullptr, full);
  ASSERT_TRUE(session.ok()) << session.status();
  for (int i = 0; i < 3; ++i) {
    const auto state = (*session)->Get();
    ASSERT_TRUE(state.ok()) << state.status();
    ASSERT_TRUE((*session)->Set(state->model, state->optimizer).ok());
    Train(net, optimizer, 1);
  }
  EXPECT_EQ((*session)->stats().tables_built, 1);
  EXPECT_EQ((*session)->stats().plans_made, 2);
  net.register_buffer("extra", at::zeros({2}));
  EXPECT_TRUE((*session)->GetModel()->contains("extra"));
  EXPECT_EQ((*session)->stats().tables_built, 2);
}

TEST(SessionTest, SeveralOptimizers) {
  Net net;
  optim::AdamW first(net.first->parameters());
  optim::SGD second(net.second->parameters(),
                    optim::SGDOptions(0.1).momentum(0.5));
  const Optimizers both = {&first, &second};
  const auto dict = GetOptimizerStateDict(net, both);
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_TRUE(SetOptimizerStateDict(net, both, *dict).ok());
  EXPECT_TRUE(SetOptimizerStateDict(net, second, *dict).ok());
}

// So many tensors that threads walk over them: what comes out is what one
// thread finds.
class ManyTensorsTest : public ::testing::TestWithParam<int> {
 protected:
  ManyTensorsTest() { at::set_num_threads(GetParam()); }
  ~ManyTensorsTest() override { at::set_num_threads(before_); }

  struct Job {
    Job() {
      for (int i = 0; i < 5000; ++i) {
        auto layer = std::make_shared<nn::LinearImpl>(1, 2);
        layers.push_back(layer);
        model.register_module(absl::StrCat("l", i), layer);
      }
      optimizer = std::make_unique<optim::AdamW>(model.parameters());
      Step();
    }
    void Step() {
      for (at::Tensor& param : model.parameters()) {
        param.mutable_grad() = at::ones_like(param);
      }
      optimizer->step();
    }
    nn::Module model;
    std::vector<std::shared_ptr<nn::LinearImpl>> layers;
    std::unique_ptr<optim::AdamW> optimizer;
  };

 private:
  const int before_ = at::get_num_threads();
};
INSTANTIATE_TEST_SUITE_P(Threads, ManyTensorsTest, ::testing::Values(1, 2, 4));

TEST_P(ManyTensorsTest, GetsFindEachChange) {
  Job job;
  const auto session = StateDictSession::Create(job.model, *job.optimizer);
  ASSERT_TRUE(session.ok()) << session.status();
  const auto get = [&] {
    const auto got = (*session)->Get();
    EXPECT_TRUE(got.ok()) << got.status();
    // A new session has no memory.
    const auto anew = GetStateDict(job.model, *job.optimizer);
    EXPECT_TRUE(anew.ok()) << anew.status();
    ExpectEqual(got->model, anew->model);
    ExpectEqual(got->optimizer, anew->optimizer);
    return *got;
  };
  EXPECT_EQ(get().model.size(), 10000);
  get();
  job.Step();
  get();
  for (const size_t i : {0, 2500, 4999}) {
    at::Tensor& weight = job.layers[i]->weight;
    {
      // Other memory for the same tensor.
      weight.set_data(at::full_like(weight, 7));
      EXPECT_EQ(get().model.size(), 10000);
    }
    auto& state = static_cast<optim::AdamWParamState&>(
        *job.optimizer->state().at(weight.unsafeGetTensorImpl()));
    state.step(1000 + i);
    get();
    state.exp_avg(at::full_like(weight, 5));
    get();
  }
  // Of another shape; its moments do not matter to a get.
  job.layers[3000]->register_buffer("late", at::zeros({1}));
  EXPECT_TRUE(get().model.contains("l3000.late"));
  EXPECT_EQ((*session)->stats().tables_built, 5);
}

TEST_P(ManyTensorsTest, SetsListWhatIsWrongWithBothParts) {
  Job from;
  auto dicts = *GetStateDict(from.model, *from.optimizer);
  Job to;
  ASSERT_TRUE(
      SetStateDict(to.model, *to.optimizer, dicts.model, dicts.optimizer).ok());
  const auto now = *GetStateDict(to.model, *to.optimizer);
  ExpectEqual(now.model, dicts.model);
  ExpectEqual(now.optimizer, dicts.optimizer);

  dicts.model.Set("l7.bias", TensorValue(at::zeros({3})));
  dicts.model.Set("nobody", TensorValue(at::zeros({1})));
  StateDict& state = *dicts.optimizer.Find("state")->get_if<StateDict>();
  state.Find("l9.bias")->get_if<StateDict>()->Set("exp_avg",
                                                  TensorValue(at::zeros({3})));
  const absl::Status status =
      SetStateDict(to.model, *to.optimizer, dicts.model, dicts.optimizer)
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("unexpected keys (1): \"nobody\""),
                    HasSubstr("l7.bias"), HasSubstr("l9.bias.exp_avg")));
}

// The dict's tensors are the live ones, which are filled in the same call.
TEST_P(ManyTensorsTest, SetsFromLiveTensorsInAnotherOrder) {
  Job job;
  for (size_t i = 0; i < job.layers.size(); ++i) {
    job.layers[i]->weight.detach().fill_(static_cast<double>(i));
    static_cast<optim::AdamWParamState&>(
        *job.optimizer->state().at(job.layers[i]->weight.unsafeGetTensorImpl()))
        .exp_avg()
        .fill_(static_cast<double>(i));
  }
  auto dicts = *GetStateDict(job.model, *job.optimizer);
  StateDict model = dicts.model;
  StateDict optimizer = dicts.optimizer;
  StateDict& state = *optimizer.Find("state")->get_if<StateDict>();
  const StateDict& before = *dicts.optimizer.Find("state")->get_if<StateDict>();
  for (int i = 0; i < 5000; ++i) {
    const std::string key = absl::StrCat("l", i, ".weight");
    const std::string other = absl::StrCat("l", 4999 - i, ".weight");
    model.Set(key, *dicts.model.Find(other));
    state.Find(key)->get_if<StateDict>()->Set(
        "exp_avg", *before.Find(other)->get_if<StateDict>()->Find("exp_avg"));
  }
  const auto keys = SetStateDict(job.model, *job.optimizer, model, optimizer);
  ASSERT_TRUE(keys.ok()) << keys.status();
  const auto now = *GetStateDict(job.model, *job.optimizer);
  for (int i = 0; i < 5000; ++i) {
    const std::string key = absl::StrCat("l", i, ".weight");
    ASSERT_EQ(TensorAt(now.model, key).max().item<double>(), 4999 - i);
    ASSERT_EQ(TensorAt(*now.optimizer.Find("state")
                            ->get_if<StateDict>()
                            ->Find(key)
                            ->get_if<StateDict>(),
                       "exp_avg")
                  .max()
                  .item<double>(),
              4999 - i);
  }
}

// However many threads there are, the last one counts.
TEST_P(ManyTensorsTest, MomentsThatShareMemoryAreFilledInOrder) {
  Job job;
  const at::Tensor shared = at::zeros({2, 1});
  for (const auto& layer : job.layers) {
    static_cast<optim::AdamWParamState&>(
        *job.optimizer->state().at(layer->weight.unsafeGetTensorImpl()))
        .exp_avg(shared);
  }
  StateDict optimizer = *GetOptimizerStateDict(job.model, *job.optimizer);
  StateDict& state = *optimizer.Find("state")->get_if<StateDict>();
  for (int i = 0; i < 5000; ++i) {
    state.Find(absl::StrCat("l", i, ".weight"))
        ->get_if<StateDict>()
        ->Set("exp_avg", TensorValue(at::full_like(shared, i)));
  }
  ASSERT_TRUE(SetOptimizerStateDict(job.model, *job.optimizer, optimizer).ok());
  EXPECT_TRUE(at::equal(shared, at::full_like(shared, 4999)));
}

TEST_P(ManyTensorsTest, AnErrorOfTheOptimizerLeavesTheNextGetRight) {
  Job job;
  const auto session = StateDictSession::Create(job.model, *job.optimizer);
  ASSERT_TRUE((*session)->Get().ok());
  // A parameter that is not the model's.
  job.optimizer->param_groups()[0].params().push_back(at::ones({1}));
  EXPECT_FALSE((*session)->Get().ok());
  job.Step();
  job.optimizer->param_groups()[0].params().pop_back();
  const auto got = (*session)->Get();
  ASSERT_TRUE(got.ok()) << got.status();
  ExpectEqual(got->optimizer,
              *GetOptimizerStateDict(job.model, *job.optimizer));
}

}  // namespace
}  // namespace dsd
