// SPDX-License-Identifier: Apache-2.0
//
// What modules say about themselves: submodules, modifiers of names, extra
// states, buffers that are not persistent, wrappers, sharing; on 1, 2 and 4
// ranks where ranks matter.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/equal.h"
#include "ATen/ops/full.h"
#include "ATen/ops/ones.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/fqn/fqn_modifiers.h"
#include "dsd/core/fqn/module_wrapper.h"
#include "dsd/core/state_dict/extra_state.h"
#include "dsd/frontends/module/non_persistent.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adamw.h"

namespace dsd {
namespace {

namespace nn = torch::nn;
namespace optim = torch::optim;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::vector<std::string> KeysOf(const StateDict& dict) {
  std::vector<std::string> keys;
  for (size_t i = 0; i < dict.size(); ++i) keys.push_back(dict.key_text(i));
  return keys;
}

at::Tensor TensorAt(const StateDict& dict, const std::string& key) {
  return *dict.Find(key)->get_if<TensorValue>()->Local();
}

struct BlockImpl : nn::Module {
  BlockImpl() : proj(register_module("proj", nn::Linear(2, 2))) {
    mask = register_buffer("mask", at::ones({2}));
    steps = register_buffer("steps", at::zeros({1}));
    EXPECT_TRUE(SetNonPersistent(*this, "mask").ok());
  }
  nn::Linear proj;
  at::Tensor mask;
  at::Tensor steps;
};
TORCH_MODULE(Block);

struct Net : nn::Module {
  Net()
      : first(register_module("first", Block())),
        second(register_module("second", Block())) {}
  Block first;
  Block second;
};

StateDictOptions Only(std::vector<Submodule> submodules, bool keep = true) {
  StateDictOptions options;
  options.submodules = std::move(submodules);
  options.keep_submodule_prefixes = keep;
  return options;
}

TEST(SubmodulesTest, ByNameAndByObjectWithAndWithoutPrefix) {
  Net net;
  for (const Submodule& one :
       {Submodule("second"), Submodule(net.second.get()),
        Submodule(static_cast<const nn::Module*>(net.second.get()))}) {
    const auto kept = GetModelStateDict(net, nullptr, Only({one}));
    ASSERT_TRUE(kept.ok()) << kept.status();
    EXPECT_THAT(KeysOf(*kept), ElementsAre("second.steps", "second.proj.weight",
                                           "second.proj.bias"));
    const auto stripped = GetModelStateDict(net, nullptr, Only({one}, false));
    ASSERT_TRUE(stripped.ok());
    EXPECT_THAT(KeysOf(*stripped),
                ElementsAre("steps", "proj.weight", "proj.bias"));
  }
  const auto all = GetModelStateDict(net, nullptr, Only({""}));
  ASSERT_TRUE(all.ok());
  EXPECT_EQ(all->size(), 6);
}

TEST(SubmodulesTest, WhatWasGotCanBeSetWithTheSameOptions) {
  Net from;
  Net to;
  for (const bool keep : {true, false}) {
    const at::Tensor other = to.first->proj->weight.detach().clone();
    const StateDictOptions options = Only({"second.proj"}, keep);
    const auto keys = SetModelStateDict(
        to, *GetModelStateDict(from, nullptr, options), nullptr, options);
    ASSERT_TRUE(keys.ok()) << keys.status();
    EXPECT_TRUE(keys->empty());
    EXPECT_TRUE(at::equal(to.second->proj->weight, from.second->proj->weight));
    EXPECT_TRUE(at::equal(to.first->proj->weight, other));
  }
}

// Its keys without prefixes are those of one module.
TEST(SubmodulesTest, ModuleThatIsRegisteredTwice) {
  struct Twice : nn::Module {
    Twice() {
      register_module("a", shared.ptr());
      register_module("b", shared.ptr());
    }
    nn::Linear shared{2, 1};
  };
  Twice net;
  const StateDictOptions options = Only({net.shared.get()}, false);
  const auto dict = GetModelStateDict(net, nullptr, options);
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_THAT(KeysOf(*dict), ElementsAre("weight", "bias"));
  Twice other;
  const auto keys = SetModelStateDict(other, *dict, nullptr,
                                      Only({other.shared.get()}, false));
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(keys->empty());
  EXPECT_TRUE(at::equal(other.shared->weight, net.shared->weight));
}

TEST(SubmodulesTest, NullIsNotTheWholeModel) {
  Net net;
  const StateDict dict = *GetModelStateDict(net);
  const char* const no_name = nullptr;
  const nn::Module* const no_module = nullptr;
  for (const Submodule& null : {Submodule(no_name), Submodule(no_module)}) {
    const StateDictOptions options = Only({"first", null});
    EXPECT_THAT(GetModelStateDict(net, nullptr, options).status(),
                IsStatus(absl::StatusCode::kInvalidArgument,
                         "submodules: entry 1 of 2 is a null pointer"));
    EXPECT_THAT(SetModelStateDict(net, dict, nullptr, options).status(),
                IsStatus(absl::StatusCode::kInvalidArgument,
                         "submodules: entry 1 of 2 is a null pointer"));
  }
}

TEST(SessionTest, ModulesThatAreRegisteredUnderOtherNames) {
  Net net;
  const auto session = *StateDictSession::Create(net);
  const StateDict dict = *session->GetModel();
  net.unregister_module("second");
  net.register_module("third", net.second);
  const StateDict renamed = *session->GetModel();
  EXPECT_THAT(
      KeysOf(renamed),
      ElementsAre("first.steps", "first.proj.weight", "first.proj.bias",
                  "third.steps", "third.proj.weight", "third.proj.bias"));
  EXPECT_THAT(session->SetModel(dict).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "unexpected keys (3): \"second.steps\""));
  EXPECT_TRUE(session->SetModel(renamed).ok());
  // A level deeper: the same names in the same order.
  auto outer = std::make_shared<nn::Module>("outer");
  net.unregister_module("third");
  outer->register_module("third", net.second);
  net.register_module("outer", outer);
  EXPECT_THAT(KeysOf(*session->GetModel()),
              testing::Contains("outer.third.steps"));
  EXPECT_EQ(session->stats().tables_built, 3);
}

TEST(SubmodulesTest, UnknownOnesAndCollisionsAreErrors) {
  Net net;
  Net other;
  EXPECT_THAT(GetModelStateDict(net, nullptr, Only({"third"})).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "the model has no module \"third\""));
  EXPECT_THAT(GetModelStateDict(net, nullptr, Only({&other})).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "not a module of this model"));
  const StateDictOptions both = Only({"first", "second"}, false);
  EXPECT_THAT(
      GetModelStateDict(net, nullptr, both).status(),
      IsStatus(absl::StatusCode::kInvalidArgument, "have the key \"steps\""));
  EXPECT_THAT(
      SetModelStateDict(net, StateDict(), nullptr, both).status(),
      IsStatus(absl::StatusCode::kInvalidArgument, "have the key \"steps\""));
}

// 122792, PR 125337: persistence is looked up where the buffer is registered.
TEST(NonPersistentTest, BuffersAreInNoDictWhateverWraps) {
  struct Wrapper : nn::Module, ModuleWrapper {
    explicit Wrapper(std::shared_ptr<nn::Module> inner) {
      register_module("_orig_mod", std::move(inner));
    }
    absl::string_view wrapped_child_name() const override {
      return kCompileSegment;
    }
  };
  const auto net = std::make_shared<Net>();
  Wrapper wrapper(net);
  const auto dict = GetModelStateDict(wrapper);
  ASSERT_TRUE(dict.ok());
  EXPECT_THAT(
      KeysOf(*dict),
      ElementsAre("first.steps", "first.proj.weight", "first.proj.bias",
                  "second.steps", "second.proj.weight", "second.proj.bias"));
  net->to(c10::kDouble);  // keeps the buffers
  EXPECT_EQ(GetModelStateDict(wrapper)->size(), 6);
}

TEST(NonPersistentTest, CanBeSaidLaterAndOnlyOfWhatThereIs) {
  nn::Linear linear(2, 2);
  linear->register_buffer("cache", at::zeros({2}));
  const auto session = *StateDictSession::Create(*linear);
  EXPECT_THAT(KeysOf(*session->GetModel()),
              ElementsAre("weight", "bias", "cache"));
  ASSERT_TRUE(SetNonPersistent(*linear, "cache").ok());
  EXPECT_THAT(KeysOf(*session->GetModel()), ElementsAre("weight", "bias"));
  EXPECT_EQ(SetNonPersistent(*linear, "weight").code(),
            absl::StatusCode::kNotFound);
}

struct TokensImpl : nn::Module, FqnModifiers {
  TokensImpl() : embedding(register_module("embedding", nn::Linear(3, 2))) {}
  std::vector<FqnModifier> fqn_modifiers(
      absl::string_view which) const override {
    if (which == "_none") return {};
    return {{"weight", "embedding"}};
  }
  nn::Linear embedding;
};

struct Model : nn::Module {
  Model()
      : tok(register_module("tok", std::make_shared<TokensImpl>())),
        head(register_module("head", nn::Linear(2, 1))) {}
  at::Tensor forward(const at::Tensor& x) { return head(tok->embedding(x)); }
  std::shared_ptr<TokensImpl> tok;
  nn::Linear head;
};

// 146053, PR 146557: upstream uses the names for models but not for optimizers,
// and another method's name only on set.
TEST(FqnModifiersTest, HoldOnAllPaths) {
  for (const bool flat : {false, true}) {
    Model from;
    optim::AdamW from_optimizer(from.parameters(), optim::AdamWOptions(0.1));
    from.forward(at::ones({1, 3})).sum().backward();
    from_optimizer.step();
    StateDictOptions options;
    options.flatten_optimizer_state_dict = flat;
    const auto dicts = GetStateDict(from, from_optimizer, nullptr, options);
    ASSERT_TRUE(dicts.ok()) << dicts.status();
    EXPECT_THAT(KeysOf(dicts->model), ElementsAre("tok.weight", "tok.bias",
                                                  "head.weight", "head.bias"));
    if (flat) {
      EXPECT_TRUE(dicts->optimizer.contains("state.tok.weight.exp_avg"));
    } else {
      EXPECT_THAT(
          KeysOf(*dicts->optimizer.Find("state")->get_if<StateDict>()),
          ElementsAre("tok.weight", "tok.bias", "head.weight", "head.bias"));
    }
    Model to;
    optim::AdamW to_optimizer(to.parameters(), optim::AdamWOptions(0.2));
    const auto keys = SetStateDict(to, to_optimizer, dicts->model,
                                   dicts->optimizer, nullptr, options);
    ASSERT_TRUE(keys.ok()) << keys.status();
    EXPECT_TRUE(
        at::equal(to.tok->embedding->weight, from.tok->embedding->weight));
  }
}

TEST(FqnModifiersTest, OptionSaysWhichOnes) {
  Model model;
  StateDictOptions options;
  options.dsd_fqn_modifiers = "_none";
  const auto dict = GetModelStateDict(model, nullptr, options);
  ASSERT_TRUE(dict.ok());
  EXPECT_THAT(KeysOf(*dict),
              ElementsAre("tok.embedding.weight", "tok.embedding.bias",
                          "head.weight", "head.bias"));
  EXPECT_TRUE(SetModelStateDict(model, *dict, nullptr, options).ok());
}

// A count and a tensor.
struct CounterImpl : nn::Module, ExtraState {
  CounterImpl() : weight(register_parameter("weight", at::zeros({2}))) {}
  absl::StatusOr<Value> GetExtraState() const override {
    StateDict dict;
    dict.Set("count", Value(count));
    dict.Set("history", Value(Value::List{Value(TensorValue(history))}));
    return Value(std::move(dict));
  }
  absl::Status SetExtraState(const Value& value) override {
    const auto* dict = value.get_if<StateDict>();
    const Value* found = dict == nullptr ? nullptr : dict->Find("count");
    if (found == nullptr || !found->is<int64_t>()) {
      return absl::InvalidArgumentError("expected a count");
    }
    count = *found->get_if<int64_t>();
    history = *(*dict->Find("history")->get_if<Value::List>())[0]
                   .get_if<TensorValue>()
                   ->Local();
    return absl::OkStatus();
  }
  at::Tensor weight;
  int64_t count = 0;
  at::Tensor history = at::zeros({3});
};

struct Counting : nn::Module {
  Counting()
      : counter(register_module("counter", std::make_shared<CounterImpl>())),
        last(register_module("last", nn::Linear(2, 1))) {}
  std::shared_ptr<CounterImpl> counter;
  nn::Linear last;
};

TEST(ExtraStateTest, GoesWhereTheTensorsGo) {
  for (const int ranks : {1, 2, 4}) {
    for (const int holder : {-1, 0, ranks - 1}) {  // -1: every rank
      EXPECT_THAT(
          RunRankThreads(
              ranks,
              [&](Communicator& comm) -> absl::Status {
                Counting from;
                from.counter->count = 7;
                from.counter->history = at::full({3}, 5.0);
                StateDictOptions options;
                options.full_state_dict = true;
                DSD_ASSIGN_OR_RETURN(StateDict dict,
                                     GetModelStateDict(from, &comm, options));
                EXPECT_THAT(
                    KeysOf(dict),
                    ElementsAre("counter.weight", "counter._extra_state",
                                "last.weight", "last.bias"));
                if (holder >= 0 && comm.rank() != holder) dict = StateDict();
                Counting to;
                DSD_ASSIGN_OR_RETURN(
                    const IncompatibleKeys keys,
                    SetModelStateDict(to, dict, &comm, options));
                EXPECT_TRUE(keys.empty());
                EXPECT_EQ(to.counter->count, 7);
                EXPECT_TRUE(at::equal(to.counter->history, at::full({3}, 5.0)));
                EXPECT_FALSE(
                    to.counter->history.is_alias_of(from.counter->history));
                return absl::OkStatus();
              }),
          AllOk());
    }
  }
}

TEST(ExtraStateTest, MissingOneIsAMissingKeyInEveryMode) {
  for (const bool full : {false, true}) {
    for (const bool broadcast : {false, true}) {
      if (broadcast && !full) continue;
      Counting net;
      net.counter->count = 3;
      StateDictOptions options;
      options.full_state_dict = full;
      options.broadcast_from_rank0 = broadcast;
      StateDict dict = *GetModelStateDict(net, nullptr, options);
      dict.Erase(std::string("counter._extra_state"));
      EXPECT_THAT(SetModelStateDict(net, dict, nullptr, options).status(),
                  IsStatus(absl::StatusCode::kInvalidArgument,
                           "missing keys (1): \"counter._extra_state\""));
      options.strict = false;
      const auto keys = SetModelStateDict(net, dict, nullptr, options);
      ASSERT_TRUE(keys.ok());
      EXPECT_THAT(keys->missing_keys, ElementsAre("counter._extra_state"));
      EXPECT_EQ(net.counter->count, 3);
    }
  }
}

TEST(ExtraStateTest, ErrorNamesTheKeyAndPoisonsTheSession) {
  Counting net;
  const auto session = *StateDictSession::Create(net);
  StateDict dict = *session->GetModel();
  const StateDict good = dict;
  dict.Set("counter._extra_state", Value("text"));
  EXPECT_THAT(session->SetModel(dict).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "\"counter._extra_state\": expected a count"));
  EXPECT_THAT(
      session->GetModel().status(),
      IsStatus(absl::StatusCode::kFailedPrecondition, "a set failed half-way"));
  ASSERT_TRUE(session->SetModel(good).ok());
  EXPECT_TRUE(session->GetModel().ok());
}

// With replica_ranks only one rank may have extra states at all.
TEST(ExtraStateTest, ErrorOfOneRankIsEverybodys) {
  struct Refusing : nn::Module, ExtraState {
    explicit Refusing(bool refuses) : refuses(refuses) {}
    absl::StatusOr<Value> GetExtraState() const override { return Value(1); }
    absl::Status SetExtraState(const Value&) override {
      return refuses ? absl::DataLossError("not mine") : absl::OkStatus();
    }
    const bool refuses;
  };
  for (const bool on_all : {false, true}) {
    for (const absl::Status& status :
         RunRankThreads(2, [&](Communicator& comm) -> absl::Status {
           nn::Linear plain(2, 1);
           Refusing refusing(comm.rank() == 1);
           StateDictOptions options;
           if (!on_all) options.replica_ranks = {comm.rank()};
           nn::Module& net = on_all || comm.rank() == 1
                                 ? static_cast<nn::Module&>(refusing)
                                 : *plain;
           DSD_ASSIGN_OR_RETURN(const StateDict dict,
                                GetModelStateDict(net, &comm, options));
           return SetModelStateDict(net, dict, &comm, options).status();
         })) {
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kDataLoss,
                                   "rank 1: \"_extra_state\": not mine"));
    }
  }
}

// A module's own code may throw what LibTorch throws.
TEST(ExtraStateTest, ExceptionsBecomeErrorsOnAllRanks) {
  struct Thrower : nn::Module, ExtraState {
    explicit Thrower(bool in_get) : in_get(in_get) {}
    absl::StatusOr<Value> GetExtraState() const override {
      if (in_get) at::ones({2}).view({3});
      return Value(1);
    }
    absl::Status SetExtraState(const Value&) override {
      if (!in_get) at::ones({2}).view({3});
      return absl::OkStatus();
    }
    const bool in_get;
  };
  for (const bool in_get : {false, true}) {
    for (const absl::Status& status : RunRankThreads(
             2,
             [&](Communicator& comm) -> absl::Status {
               Thrower net(in_get && comm.rank() == 1);
               StateDictOptions options;
               options.full_state_dict = true;
               absl::Status status =
                   GetModelStateDict(net, &comm, options).status();
               if (!in_get) {
                 Thrower setter(false);
                 StateDict dict;
                 dict.Set("_extra_state", Value(1));
                 status = SetModelStateDict(setter, dict, &comm).status();
               }
               comm.Shutdown().IgnoreError();
               return status;
             },
             {absl::Seconds(60), {}, /*shutdown=*/false})) {
      EXPECT_FALSE(status.ok());
      EXPECT_THAT(std::string(status.message()), HasSubstr("_extra_state"));
    }
  }
}

// One module at two places: both names, one tensor.
TEST(SharingTest, SharedModuleIsUnderBothNamesAndEitherIsEnough) {
  struct Twice : nn::Module {
    Twice() {
      register_module("a", shared.ptr());
      register_module("b", shared.ptr());
    }
    nn::Linear shared{2, 1};
  };
  Twice net;
  const auto dict = GetModelStateDict(net);
  ASSERT_TRUE(dict.ok());
  EXPECT_THAT(KeysOf(*dict),
              ElementsAre("a.weight", "a.bias", "b.weight", "b.bias"));
  StateDict half;
  half.Set("b.weight", Value(TensorValue(at::full({1, 2}, 3.0))));
  half.Set("b.bias", Value(TensorValue(at::full({1}, 4.0))));
  const auto keys = SetModelStateDict(net, half);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_THAT(keys->missing_keys, IsEmpty());
  EXPECT_TRUE(at::equal(net.shared->weight, at::full({1, 2}, 3.0)));
}

// An empty list of keys is what everything got that has no tensors.
TEST(SharingTest, ModelWithoutTensorsIsAnEmptyDict) {
  nn::Module net("empty");
  const auto dict = GetModelStateDict(net);
  ASSERT_TRUE(dict.ok());
  EXPECT_TRUE(dict->empty());
  EXPECT_TRUE(SetModelStateDict(net, *dict).ok());
}

TEST(UnusualNamesTest, RoundTrip) {
  nn::Module net("odd");
  for (const char* name : {" ", "a/b", "\xc3\xa9", "module", "0", "state"}) {
    net.register_parameter(name, at::ones({2}));
  }
  const auto dict = GetModelStateDict(net);
  ASSERT_TRUE(dict.ok());
  EXPECT_THAT(KeysOf(*dict),
              ElementsAre(" ", "a/b", "\xc3\xa9", "module", "0", "state"));
  StateDict changed;
  for (size_t i = 0; i < dict->size(); ++i) {
    changed.Set(dict->key(i), Value(TensorValue(at::full({2}, 2.0 + i))));
  }
  ASSERT_TRUE(SetModelStateDict(net, changed).ok());
  EXPECT_TRUE(
      at::equal(TensorAt(*GetModelStateDict(net), "0"), at::full({2}, 6.0)));
}

}  // namespace
}  // namespace dsd
