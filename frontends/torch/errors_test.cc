// SPDX-License-Identifier: Apache-2.0
//
// The catalogue of errors of torch.distributed.checkpoint.state_dict, row by
// row: what is an error here too, with which code and text, and what is none.
// Rows that cannot occur have no test: an input that is not a mapping, a dict
// keyed by module objects, load_state_dict() overridden without `assign`,
// deprecation warnings, FSDP1 without state. Two rows are about code of its own
// and are tested there: keys that become equal when flattened
// (FlatStateTest.EqualKeysAndTensorsInTuplesAreNamed) and copies between dicts
// of other structure (StateDictOpsTest.CopyIntoAnotherStructureChangesNothing).

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/empty.h"
#include "ATen/ops/equal.h"
#include "ATen/ops/full.h"
#include "ATen/ops/full_like.h"
#include "ATen/ops/ones.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/fqn/module_wrapper.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/state_dict/deliver.h"
#include "dsd/core/state_dict/extra_state.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adamw.h"
#include "torch/optim/lbfgs.h"
#include "torch/optim/sgd.h"

namespace dsd {
namespace {

namespace nn = torch::nn;
namespace optim = torch::optim;
constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

StateDictOptions NotStrict() {
  StateDictOptions options;
  options.strict = false;
  return options;
}

struct Wrapper : nn::Module, ModuleWrapper {
  explicit Wrapper(const std::string& child) {
    register_module(child, nn::Linear(2, 1).ptr());
  }
  absl::string_view wrapped_child_name() const override { return "module"; }
};

TEST(VerifyOptionsTest, OptimizerCallWithoutOptimizers) {
  nn::Linear net(2, 1);
  EXPECT_THAT(GetOptimizerStateDict(*net, {}).status(),
              IsStatus(kInvalid, "no optimizers were given"));
  EXPECT_THAT(SetOptimizerStateDict(*net, {}, StateDict()),
              IsStatus(kInvalid, "no optimizers were given"));
}

TEST(VerifyOptionsTest, BroadcastWithoutFull) {
  nn::Linear net(2, 1);
  StateDictOptions options;
  options.broadcast_from_rank0 = true;
  for (const absl::Status& status :
       {GetModelStateDict(*net, nullptr, options).status(),
        SetModelStateDict(*net, StateDict(), nullptr, options).status()}) {
    EXPECT_THAT(status, IsStatus(kInvalid,
                                 "broadcast_from_rank0 needs full_state_dict"));
  }
}

TEST(VerifyOptionsTest, TwoSourcesOfData) {
  nn::Linear net(2, 1);
  StateDictOptions options;
  options.full_state_dict = true;
  options.broadcast_from_rank0 = true;
  options.source_rank = 1;
  EXPECT_THAT(SetModelStateDict(*net, StateDict(), nullptr, options).status(),
              IsStatus(kInvalid, "exclude each other"));
}

// AssertionError upstream: here it is under each of its paths.
TEST(VerifyOptionsTest, SubmoduleUnderTwoPaths) {
  struct Twice : nn::Module {
    Twice() {
      register_module("a", shared.ptr());
      register_module("b", shared.ptr());
      register_module("c", nn::Linear(2, 1).ptr());
    }
    nn::Linear shared{2, 1};
  };
  Twice net;
  StateDictOptions options;
  options.submodules = {net.shared.get()};
  const auto dict = GetModelStateDict(net, nullptr, options);
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_EQ(dict->size(), 4);
  EXPECT_TRUE(SetModelStateDict(net, *dict, nullptr, options).ok());
  options.submodules = {"d"};
  EXPECT_THAT(GetModelStateDict(net, nullptr, options).status(),
              IsStatus(kInvalid, "the model has no module \"d\""));
}

TEST(VerifyDictTest, EmptyModelDictWhileRequired) {
  nn::Linear net(2, 1);
  EXPECT_THAT(SetModelStateDict(*net, StateDict()).status(),
              IsStatus(kInvalid, "missing keys (2): \"weight\", \"bias\""));
  const auto keys = SetModelStateDict(*net, StateDict(), nullptr, NotStrict());
  ASSERT_TRUE(keys.ok());
  EXPECT_THAT(keys->missing_keys, testing::ElementsAre("weight", "bias"));
}

TEST(VerifyDictTest, EmptyOptimizerDictWhileRequired) {
  nn::Linear net(2, 1);
  optim::AdamW optimizer(net->parameters());
  EXPECT_THAT(SetOptimizerStateDict(*net, optimizer, StateDict()),
              IsStatus(kInvalid, "\"weight\""));
}

TEST(VerifyDictTest, FlatParamInAKey) {
  nn::Linear net(2, 1);
  StateDict dict = *GetModelStateDict(*net);
  dict.Set("_fsdp_wrapped_module._flat_param",
           Value(TensorValue(at::zeros({3}))));
  EXPECT_THAT(SetModelStateDict(*net, dict).status(),
              IsStatus(kInvalid, "is a flat parameter of FSDP"));
}

TEST(FqnTest, WrapperWhoseSegmentIsNotThere) {
  Wrapper net("net");
  EXPECT_THAT(GetModelStateDict(net).status(),
              IsStatus(kInvalid, "no child of that name"));
}

TEST(FqnTest, ExtraStateThatIsNotLast) {
  nn::Linear net(2, 1);
  StateDict dict = *GetModelStateDict(*net);
  dict.Set("_extra_state.weight", Value(1));
  EXPECT_THAT(SetModelStateDict(*net, dict).status(),
              IsStatus(kInvalid, "unexpected keys (1)"));
}

// torchtitan 3569: a key that no attribute has is reported, not a crash.
TEST(FqnTest, NoSuchAttribute) {
  nn::Linear net(2, 1);
  StateDict dict = *GetModelStateDict(*net);
  dict.Set("made.by.a.hook", Value(TensorValue(at::zeros({1}))));
  EXPECT_THAT(SetModelStateDict(*net, dict).status(),
              IsStatus(kInvalid, "unexpected keys (1): \"made.by.a.hook\""));
  EXPECT_TRUE(SetModelStateDict(*net, dict, nullptr, NotStrict()).ok());
}

TEST(ModelGetTest, TwoTensorsOfOneName) {
  Wrapper net("module");
  net.register_parameter("weight", at::zeros({1}));
  EXPECT_THAT(GetModelStateDict(net).status(),
              IsStatus(absl::StatusCode::kAlreadyExists,
                       "registered as \"weight\" and as \"module.weight\""));
}

// KeyError upstream: the filter has dropped it before.
TEST(ModelGetTest, FrozenParameterOutsideTheSubmodules) {
  struct Net : nn::Module {
    Net() {
      register_module("a", a.ptr());
      register_module("b", b.ptr());
      a->weight.requires_grad_(false);
    }
    nn::Linear a{2, 1};
    nn::Linear b{2, 1};
  };
  Net net;
  StateDictOptions options;
  options.ignore_frozen_params = true;
  options.submodules = {"b"};
  const auto dict = GetModelStateDict(net, nullptr, options);
  ASSERT_TRUE(dict.ok());
  EXPECT_EQ(dict->size(), 2);
}

// ValueError upstream: any value passes here.
TEST(GatherTest, ExtraStateOfAnyKind) {
  struct Net : nn::Module, ExtraState {
    absl::StatusOr<Value> GetExtraState() const override {
      return Value(Value::Tuple{{Value(Opaque{"a.B"}), Value(Bytes{"x"})}});
    }
    absl::Status SetExtraState(const Value&) override {
      return absl::OkStatus();
    }
  };
  Net net;
  StateDictOptions options;
  options.full_state_dict = true;
  options.cpu_offload = true;
  const auto dict = GetModelStateDict(net, nullptr, options);
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_TRUE(dict->Find("_extra_state")->is<Value::Tuple>());
}

TEST(ModelLoadTest, MissingKeyOfAWrappedModelIsCanonical) {
  Wrapper net("module");
  StateDict dict = *GetModelStateDict(net);
  dict.Erase(std::string("bias"));
  EXPECT_THAT(SetModelStateDict(net, dict).status(),
              IsStatus(kInvalid, "missing keys (1): \"bias\""));
  const auto keys = SetModelStateDict(net, dict, nullptr, NotStrict());
  ASSERT_TRUE(keys.ok());
  EXPECT_THAT(keys->missing_keys, testing::ElementsAre("bias"));
}

// 158519: and the caller's dict stays as it is.
TEST(ModelLoadTest, InputOfAWrappedModelIsNotEdited) {
  Wrapper net("module");
  const StateDict dict = *GetModelStateDict(net);
  ASSERT_TRUE(SetModelStateDict(net, dict).ok());
  EXPECT_EQ(dict.size(), 2);
  EXPECT_TRUE(dict.contains("weight"));
}

TEST(ModelLoadTest, StrictMismatchListsBothKinds) {
  nn::Linear net(2, 1);
  StateDict dict;
  dict.Set("wieght", Value(TensorValue(at::zeros({1, 2}))));
  const absl::Status status = SetModelStateDict(*net, dict).status();
  EXPECT_THAT(status, IsStatus(kInvalid, "missing keys (2)"));
  EXPECT_THAT(status, IsStatus(kInvalid, "unexpected keys (1): \"wieght\""));
  EXPECT_THAT(status, IsStatus(kInvalid, "set strict = false"));
}

TEST(ModelLoadTest, ShapeMismatchWhateverStrictIs) {
  for (const bool strict : {true, false}) {
    nn::Linear net(2, 1);
    const at::Tensor before = net->bias.detach().clone();
    StateDict dict;
    dict.Set("weight", Value(TensorValue(at::zeros({2, 2}))));
    dict.Set("bias", Value(TensorValue(at::full({1}, 5.0))));
    StateDictOptions options;
    options.strict = strict;
    EXPECT_THAT(SetModelStateDict(*net, dict, nullptr, options).status(),
                IsStatus(kInvalid,
                         "\"weight\": shape in the dict is [2, 2], in the "
                         "model [1, 2]"));
    EXPECT_TRUE(at::equal(net->bias, before));
  }
}

// Silently broadcast or half applied upstream.
TEST(ModelLoadTest, ShapeThatWouldBroadcastIsAMismatch) {
  nn::Linear net(2, 3);
  StateDict dict = *GetModelStateDict(*net);
  dict.Set("bias", Value(TensorValue(at::zeros({1}))));
  EXPECT_THAT(SetModelStateDict(*net, dict).status(),
              IsStatus(kInvalid, "\"bias\": shape"));
}

// ValueError upstream, "Multiple devices found": each tensor has its own.
TEST(ModelLoadTest, LiveTensorsOnSeveralDevices) {
  nn::Module net("net");
  net.register_parameter("meta", at::empty({2}, c10::kMeta));
  const at::Tensor host = net.register_parameter("host", at::zeros({2}));
  StateDict dict;
  dict.Set("meta", Value(at::ones({2})));
  dict.Set("host", Value(at::ones({2})));
  EXPECT_THAT(SetModelStateDict(net, dict).status(),
              IsStatus(kInvalid, "\"meta\": the live tensor is on the meta"));
  EXPECT_TRUE(at::equal(host, at::zeros({2})));
  StateDictOptions options;
  options.assign = true;
  ASSERT_TRUE(SetModelStateDict(net, dict, nullptr, options).ok());
  EXPECT_TRUE(at::equal(host, at::ones({2})));
}

// TypeError upstream: LBFGS cannot step without a closure. Nothing is stepped.
TEST(OptimizerInitTest, Lbfgs) {
  nn::Linear net(2, 1);
  optim::LBFGS optimizer(net->parameters());
  const auto dict = GetOptimizerStateDict(*net, optimizer);
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_TRUE(dict->Find("state")->get_if<StateDict>()->empty());
  EXPECT_TRUE(SetOptimizerStateDict(*net, optimizer, *dict).ok());
}

// RuntimeError in old versions, no state at all in new ones.
TEST(OptimizerInitTest, GradientsWithoutState) {
  nn::Linear net(2, 1);
  optim::AdamW optimizer(net->parameters());
  net->forward(at::ones({1, 2})).sum().backward();
  const auto dict = GetOptimizerStateDict(*net, optimizer);
  ASSERT_TRUE(dict.ok()) << dict.status();
  EXPECT_EQ(dict->Find("state")->get_if<StateDict>()->size(), 2);
  EXPECT_TRUE(net->weight.grad().defined());
}

TEST(OptimizerGetTest, NameThatIsNotUnique) {
  Wrapper net("module");
  net.register_parameter("weight", at::zeros({1}));
  optim::AdamW optimizer(net.parameters());
  EXPECT_THAT(GetOptimizerStateDict(net, optimizer).status(),
              IsStatus(absl::StatusCode::kAlreadyExists,
                       "two tensors of the model have the FQN \"weight\""));
}

// NotImplementedError upstream.
TEST(FlattenTest, StateThatTheFlatFormCannotHold) {
  nn::Linear net(2, 1);
  optim::LBFGS optimizer(net->parameters(), optim::LBFGSOptions(0.1));
  optimizer.step([&] {
    optimizer.zero_grad();
    at::Tensor loss = net->forward(at::ones({1, 2})).pow(2).sum();
    loss.backward();
    return loss;
  });
  StateDictOptions options;
  options.flatten_optimizer_state_dict = true;
  EXPECT_THAT(GetOptimizerStateDict(*net, optimizer, nullptr, options).status(),
              IsStatus(kInvalid,
                       "the flat form has tensors, numbers and dicts of "
                       "them, found list; use the nested form"));
}

// KeyError upstream.
TEST(UnflattenTest, MissingHyperparameterKeepsTheLiveOne) {
  nn::Linear net(2, 1);
  optim::AdamW optimizer(net->parameters(), optim::AdamWOptions(0.1).eps(0.5));
  StateDictOptions options;
  options.flatten_optimizer_state_dict = true;
  StateDict dict = *GetOptimizerStateDict(*net, optimizer, nullptr, options);
  for (const char* fqn : {"weight", "bias"}) {
    ASSERT_TRUE(dict.Erase(absl::StrCat("param_groups.", fqn, ".eps")));
    dict.Set(absl::StrCat("param_groups.", fqn, ".lr"), Value(0.25));
  }
  const absl::Status status = SetOptimizerStateDict(*net, optimizer, dict);
  ASSERT_TRUE(status.ok()) << status;
  const auto& group = static_cast<const optim::AdamWOptions&>(
      optimizer.param_groups()[0].options());
  EXPECT_EQ(group.eps(), 0.5);
  EXPECT_EQ(group.lr(), 0.25);
}

// IndexError (flat) and ValueError (nested, whatever empty groups there are)
// upstream; also other counts and sizes of groups, and KeyError "betas" at the
// next step, since the hyperparameters of all groups but the last are lost.
TEST(SplitTest, GroupsOfOtherNumbersAndSizesAndEmptyOnes) {
  const auto options = [](double lr) {
    return std::make_unique<optim::AdamWOptions>(
        optim::AdamWOptions(lr).betas({0.5, 0.75}));
  };
  for (const bool flat : {false, true}) {
    nn::Linear saved(2, 1);
    optim::AdamW saved_optimizer(saved->parameters(),
                                 optim::AdamWOptions(0.25).betas({0.5, 0.75}));
    StateDictOptions get;
    get.flatten_optimizer_state_dict = flat;
    const StateDict dict =
        *GetOptimizerStateDict(*saved, saved_optimizer, nullptr, get);
    nn::Linear net(2, 1);
    std::vector<optim::OptimizerParamGroup> groups;
    groups.emplace_back(std::vector<at::Tensor>{net->bias}, options(1));
    groups.emplace_back(std::vector<at::Tensor>{}, options(2));
    groups.emplace_back(std::vector<at::Tensor>{net->weight}, options(3));
    groups.emplace_back(std::vector<at::Tensor>{}, options(4));
    optim::AdamW optimizer(groups);
    const absl::Status status = SetOptimizerStateDict(*net, optimizer, dict);
    ASSERT_TRUE(status.ok()) << status;
    const double expected[] = {0.25, 2, 0.25, 4};
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(optimizer.param_groups()[i].options().get_lr(), expected[i]);
    }
    net->forward(at::ones({1, 2})).sum().backward();
    optimizer.step();
  }
}

// ValueErrors upstream. By number there is nothing but the position.
TEST(OptimizerLoaderTest, NumberedGroupsThatAreOthers) {
  nn::Linear net(2, 1);
  optim::SGD optimizer(net->parameters(), 0.1);
  StateDict dict = *GetOptimizerStateDict(*net, optimizer);
  auto& groups = *dict.Find("param_groups")->get_if<Value::List>();
  groups[0].get_if<StateDict>()->Set("params", Value(Value::List{0}));
  EXPECT_THAT(SetOptimizerStateDict(*net, optimizer, dict),
              IsStatus(kInvalid,
                       "group 0 of the dict has 1 parameters, SGD "
                       "group 0 has 2"));
  groups.push_back(groups[0]);
  EXPECT_THAT(SetOptimizerStateDict(*net, optimizer, dict),
              IsStatus(kInvalid, "it has 2, SGD has 1"));
}

TEST(OptimizerGetTest, ParameterOutsideTheModel) {
  nn::Linear net(2, 1);
  nn::Linear other(2, 1);
  optim::SGD optimizer(other->parameters(), 0.1);
  EXPECT_THAT(
      GetOptimizerStateDict(*net, optimizer).status(),
      IsStatus(absl::StatusCode::kNotFound, "not a parameter of the model"));
}

// #164257: the names of all, and what to do.
TEST(OptimizerSetTest, MissingStateWhileStrict) {
  nn::Linear net(2, 1);
  optim::AdamW optimizer(net->parameters());
  StateDict dict = *GetOptimizerStateDict(*net, optimizer);
  dict.Set("state", Value(StateDict()));
  const absl::Status status = SetOptimizerStateDict(*net, optimizer, dict);
  EXPECT_THAT(status, IsStatus(kInvalid, "\"weight\""));
  EXPECT_THAT(status, IsStatus(kInvalid, "\"bias\""));
  EXPECT_THAT(status, IsStatus(kInvalid, "strict = false"));
  EXPECT_TRUE(
      SetOptimizerStateDict(*net, optimizer, dict, nullptr, NotStrict()).ok());
}

// AssertionError upstream: "Expected device to be set".
TEST(FullLoadTest, StatelessOptimizer) {
  nn::Linear net(2, 1);
  optim::SGD optimizer(net->parameters(), 0.1);
  StateDictOptions options;
  options.full_state_dict = true;
  const auto dict = GetOptimizerStateDict(*net, optimizer, nullptr, options);
  ASSERT_TRUE(dict.ok());
  EXPECT_TRUE(
      SetOptimizerStateDict(*net, optimizer, *dict, nullptr, options).ok());
}

// ValueError upstream, "Device mismatch".
TEST(FullLoadTest, StateOnTwoDevices) {
  nn::Linear net(2, 1);
  optim::AdamW optimizer(net->parameters());
  StateDictOptions options;
  options.full_state_dict = true;
  StateDict dict = *GetOptimizerStateDict(*net, optimizer, nullptr, options);
  dict.Find("state")
      ->get_if<StateDict>()
      ->Find("bias")
      ->get_if<StateDict>()
      ->Set("exp_avg", Value(at::empty({1}, c10::kMeta)));
  EXPECT_THAT(SetOptimizerStateDict(*net, optimizer, dict, nullptr, options),
              IsStatus(kInvalid,
                       "\"optim.state.bias.exp_avg\": the tensor is "
                       "on the meta device"));
}

// AssertionErrors upstream: an uneven _StridedShard, and a key that the live
// optimizer does not have, which stays on rank 0 if broadcast.
TEST(FullLoadTest, UnevenStridedShardsAndAddedKeys) {
  for (const bool broadcast : {false, true}) {
    EXPECT_THAT(
        RunRankThreads(
            4,
            [&](Communicator& comm) -> absl::Status {
              DSD_ASSIGN_OR_RETURN(
                  const Layout layout,
                  Layout::FromPlacements({7, 2}, DeviceMesh::Iota({2, 2}),
                                         {StridedShard(0, 2), Shard(0)}));
              const Dims shape = *layout.LocalShape(comm.rank());
              nn::Module net("net");
              const at::Tensor shard =
                  net.register_parameter("w", at::zeros({shape[0], shape[1]}));
              DSD_RETURN_IF_ERROR(
                  ShardingTable::Global().Set(shard, layout, comm.rank()));
              optim::SGD optimizer(net.parameters(), 0.1);
              StateDictOptions options;
              options.full_state_dict = true;
              options.broadcast_from_rank0 = broadcast;
              DSD_ASSIGN_OR_RETURN(
                  ModelAndOptimizerStateDict state,
                  GetStateDict(net, optimizer, &comm, options));
              state.model.Set("w", Value(at::full({7, 2}, 3.0)));
              (*state.optimizer.Find("param_groups")->get_if<Value::List>())[0]
                  .get_if<StateDict>()
                  ->Set("initial_lr", Value(0.75));
              if (broadcast && comm.rank() != 0) state = {};
              DSD_RETURN_IF_ERROR(SetStateDict(net, optimizer, state.model,
                                               state.optimizer, &comm,
                                               options));
              EXPECT_TRUE(at::equal(shard, at::full_like(shard, 3.0)));
              DSD_ASSIGN_OR_RETURN(const StateDict after,
                                   GetOptimizerStateDict(net, optimizer));
              EXPECT_TRUE(
                  (*after.Find("param_groups")->get_if<Value::List>())[0]
                      .get_if<StateDict>()
                      ->contains("initial_lr"));
              return absl::OkStatus();
            }),
        AllOk());
  }
}

// KeyError upstream.
TEST(FullLoadTest, FlattenFlagIsIgnored) {
  nn::Linear net(2, 1);
  optim::AdamW optimizer(net->parameters());
  StateDictOptions options;
  options.full_state_dict = true;
  const auto nested = GetOptimizerStateDict(*net, optimizer, nullptr, options);
  ASSERT_TRUE(nested.ok());
  options.flatten_optimizer_state_dict = true;
  const auto flat = GetOptimizerStateDict(*net, optimizer, nullptr, options);
  ASSERT_TRUE(flat.ok());
  for (const StateDict& dict : {*nested, *flat}) {
    EXPECT_TRUE(
        SetOptimizerStateDict(*net, optimizer, dict, nullptr, options).ok());
  }
}

// 149516: KeyError upstream.
TEST(BroadcastTest, CpuOffloadWithAKeyThatOthersDoNotHave) {
  for (const int ranks : {1, 2, 4}) {
    EXPECT_THAT(
        RunRankThreads(
            ranks,
            [&](Communicator& comm) -> absl::Status {
              nn::Linear net(2, 1);
              StateDictOptions options = NotStrict();
              options.full_state_dict = true;
              options.broadcast_from_rank0 = true;
              options.cpu_offload = true;
              StateDict dict;
              if (comm.rank() == 0) {
                dict.Set("weight", Value(TensorValue(at::full({1, 2}, 4.0))));
                dict.Set("unknown", Value(TensorValue(at::ones({3}))));
              }
              const auto keys = SetModelStateDict(*net, dict, &comm, options);
              if (!keys.ok()) return keys.status();
              EXPECT_THAT(keys->missing_keys, testing::ElementsAre("bias"));
              EXPECT_THAT(keys->unexpected_keys,
                          testing::ElementsAre("unknown"));
              EXPECT_TRUE(at::equal(net->weight, at::full({1, 2}, 4.0)));
              return absl::OkStatus();
            }),
        AllOk());
  }
}

// What is found before anything is asked of the others is theirs, too.
TEST(OptimizersTest, OneThatIsWrongOnOneRankIsEverybodysError) {
  for (const bool full : {false, true}) {
    const std::vector<absl::Status> statuses =
        RunRankThreads(2, [&](Communicator& comm) -> absl::Status {
          nn::Linear net(2, 1);
          optim::SGD sgd(net->parameters(), 0.1);
          std::vector<optim::Optimizer*> list = {&sgd};
          if (comm.rank() == 1) list.push_back(nullptr);
          StateDictOptions options;
          options.full_state_dict = full;
          CallOptions call;
          call.timeout = absl::Minutes(10);  // nobody waits for as long
          const ModelAndOptimizerStateDict state = *GetStateDict(*net, sgd);
          std::vector<absl::Status> all = {
              SetStateDict(*net, list, state.model, state.optimizer, &comm,
                           options, call)
                  .status(),
              SetOptimizerStateDict(*net, list, state.optimizer, &comm, options,
                                    call)};
          if (full) {
            all.push_back(
                GetStateDict(*net, list, &comm, options, call).status());
            all.push_back(
                GetOptimizerStateDict(*net, list, &comm, options, call)
                    .status());
            all.push_back(StreamStateDict(
                *net, list, [](StreamedValue&) { return absl::OkStatus(); },
                &comm, options, {}, call));
          }
          for (const absl::Status& status : all) {
            EXPECT_THAT(status, IsStatus(kInvalid, "one of the optimizers"))
                << "rank " << comm.rank();
          }
          return absl::OkStatus();
        });
    EXPECT_THAT(statuses, AllOk());
  }
  nn::Linear net(2, 1);
  EXPECT_THAT(GetStateDict(*net, {nullptr}).status(),
              IsStatus(kInvalid, "one of the optimizers"));
  EXPECT_THAT(StateDictSession::Create(*net, {nullptr}).status(),
              IsStatus(kInvalid, "one of the optimizers"));
}

}  // namespace
}  // namespace dsd
