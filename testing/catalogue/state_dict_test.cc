// SPDX-License-Identifier: Apache-2.0
//
// PyTorch's test_state_dict.py, by the names of its tests. What is different
// here and why: docs/semantics.md.

#include "dsd/frontends/torch/state_dict.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/Functions.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/extra_state.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/frontends/module/non_persistent.h"
#include "dsd/testing/catalogue/fixtures.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adamw.h"

namespace dsd::catalogue {
namespace {

namespace nn = torch::nn;
namespace optim = torch::optim;

struct SaveLoad {
  OptimizerKind optimizer = OptimizerKind::kAdamW;
  bool test_frozen = false;
  bool flatten = false;
};

// PyTorch's _test_save_load: a plain model on one rank and the same one as
// `build` says are trained alike; the dict of the second has to be that of the
// first, and has to fill a fresh model and optimizer.
absl::Status TestSaveLoad(Communicator& comm, Build build,
                          const SaveLoad& options) {
  build.seed = 1;
  Build plain_build;
  plain_build.seed = 1;
  plain_build.freeze_units = build.freeze_units;
  const Model plain = MakeComposite(nullptr, plain_build);
  const Model model = MakeComposite(&comm, build);
  const auto plain_optimizer =
      MakeOptimizer(options.optimizer, plain.module->parameters());
  const auto optimizer =
      MakeOptimizer(options.optimizer, model.module->parameters());
  Train(plain, {plain_optimizer.get()}, 0, 10);
  Train(model, {optimizer.get()}, 0, 10);

  StateDictOptions get;
  get.ignore_frozen_params = options.test_frozen;
  get.flatten_optimizer_state_dict = options.flatten;
  StateDictOptions get_full = get;
  get_full.full_state_dict = true;
  const auto verify = [&](const Model& live, optim::Optimizer& live_optimizer,
                          absl::string_view what) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(
        const ModelAndOptimizerStateDict expected,
        GetStateDict(*plain.module, *plain_optimizer, nullptr, get));
    DSD_ASSIGN_OR_RETURN(
        const ModelAndOptimizerStateDict found,
        GetStateDict(*live.module, live_optimizer, &comm, get_full));
    DSD_RETURN_IF_ERROR(ExpectEqual(found.model, expected.model,
                                    absl::StrCat(what, ", model")));
    return ExpectEqual(found.optimizer, expected.optimizer,
                       absl::StrCat(what, ", optimizer"));
  };
  DSD_RETURN_IF_ERROR(verify(model, *optimizer, "trained"));

  // By loading it into a new plain optimizer.
  {
    DSD_ASSIGN_OR_RETURN(
        const StateDict whole,
        GetOptimizerStateDict(*model.module, *optimizer, &comm, get_full));
    const auto fresh =
        MakeOptimizer(options.optimizer, plain.module->parameters(), 0.5);
    DSD_RETURN_IF_ERROR(SetOptimizerStateDict(*plain.module, *fresh, whole));
    DSD_ASSIGN_OR_RETURN(const StateDict loaded,
                         GetOptimizerStateDict(*plain.module, *fresh));
    DSD_ASSIGN_OR_RETURN(
        const StateDict expected,
        GetOptimizerStateDict(*plain.module, *plain_optimizer));
    DSD_RETURN_IF_ERROR(ExpectEqual(loaded, expected, "loaded"));
  }
  if (options.test_frozen) return absl::OkStatus();

  DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict state,
                       GetStateDict(*model.module, *optimizer, &comm, get));
  build.seed = 2;
  const Model fresh = MakeComposite(&comm, build);
  const auto fresh_optimizer =
      MakeOptimizer(options.optimizer, fresh.module->parameters(), 0.5);
  DSD_ASSIGN_OR_RETURN(const IncompatibleKeys keys,
                       SetModelStateDict(*fresh.module, state.model, &comm));
  DSD_RETURN_IF_ERROR(Expect(keys.empty(), "all keys fit"));
  DSD_RETURN_IF_ERROR(SetOptimizerStateDict(*fresh.module, *fresh_optimizer,
                                            state.optimizer, &comm));
  DSD_RETURN_IF_ERROR(verify(fresh, *fresh_optimizer, "fresh"));
  // And it trains on as the first one does.
  Train(model, {optimizer.get()}, 10, 12);
  Train(fresh, {fresh_optimizer.get()}, 10, 12);
  Train(plain, {plain_optimizer.get()}, 10, 12);
  return verify(fresh, *fresh_optimizer, "trained on");
}

TEST(TestStateDict, test_fsdp) {
  for (const OptimizerKind kind : kAllOptimizers) {
    for (const bool units : {false, true}) {
      OnRanks([&](Communicator& comm) {
        Build build;
        build.shard_root = true;
        build.shard_units = units;
        return TestSaveLoad(comm, build, {kind});
      });
    }
  }
}

TEST(TestStateDict, test_compiled_fsdp) {
  for (const OptimizerKind kind :
       {OptimizerKind::kAdam, OptimizerKind::kAdamW}) {
    OnRanks([&](Communicator& comm) {
      Build build;
      build.shard_root = true;
      build.shard_units = true;
      build.unit_wrapper = kCompileSegment;
      build.wrappers = {kCompileSegment};
      return TestSaveLoad(comm, build, {kind});
    });
  }
}

TEST(TestStateDict, test_fsdp2) {
  for (const OptimizerKind kind :
       {OptimizerKind::kAdam, OptimizerKind::kAdamW}) {
    for (const bool compiled : {false, true}) {
      OnRanks([&](Communicator& comm) {
        Build build;
        build.shard_root = true;
        if (compiled) build.wrappers = {kCompileSegment};
        return TestSaveLoad(comm, build, {kind});
      });
    }
  }
}

TEST(TestStateDict, test_ddp) {
  for (const OptimizerKind kind : kAllOptimizers) {
    OnRanks([&](Communicator& comm) {
      Build build;
      build.wrappers = {kDdpSegment};
      return TestSaveLoad(comm, build, {kind});
    });
  }
}

TEST(TestStateDict, test_fsdp_ddp) {
  for (const bool frozen : {false, true}) {
    OnRanks([&](Communicator& comm) {
      Build build;
      build.shard_units = true;
      build.wrappers = {kDdpSegment};
      build.freeze_units = frozen;
      return TestSaveLoad(comm, build, {OptimizerKind::kAdamW, frozen});
    });
  }
}

// Also with the flat form.
TEST(TestStateDict, test_single_gpu) {
  for (const OptimizerKind kind : kAllOptimizers) {
    for (const bool flatten : {false, true}) {
      OnRanks(
          [&](Communicator& comm) {
            return TestSaveLoad(comm, Build(), {kind, false, flatten});
          },
          {1});
    }
  }
}

TEST(TestStateDict, test_strict) {
  for (const bool sharded : {false, true}) {
    OnRanks([&](Communicator& comm) -> absl::Status {
      Build build;
      build.shard_root = sharded;
      if (!sharded) build.wrappers = {kDdpSegment};
      const Model model = MakeComposite(&comm, build);
      DSD_ASSIGN_OR_RETURN(StateDict state,
                           GetModelStateDict(*model.module, &comm));
      const std::string key = state.key_text(0);
      state.Set("abc", Value(at::zeros({1})));
      absl::Status status =
          SetModelStateDict(*model.module, state, &comm).status();
      DSD_RETURN_IF_ERROR(
          Expect(absl::StrContains(status.message(), "unexpected key") &&
                     absl::StrContains(status.message(), "abc"),
                 absl::StrCat("abc is unexpected: ", status.ToString())));

      state.Erase(PathSegment(key));
      StateDictOptions loose;
      loose.strict = false;
      DSD_ASSIGN_OR_RETURN(
          const IncompatibleKeys keys,
          SetModelStateDict(*model.module, state, &comm, loose));
      DSD_RETURN_IF_ERROR(
          Expect(keys.missing_keys == std::vector<std::string>{key} &&
                     keys.unexpected_keys == std::vector<std::string>{"abc"},
                 "both lists are filled"));

      state.Erase(PathSegment("abc"));
      status = SetModelStateDict(*model.module, state, &comm).status();
      return Expect(absl::StrContains(status.message(), "missing key") &&
                        absl::StrContains(status.message(), key),
                    absl::StrCat(key, " is missing: ", status.ToString()));
    });
  }
}

// Calls `check` for each tensor of both dicts.
absl::Status ForAllTensors(ModelAndOptimizerStateDict state,
                           absl::FunctionRef<bool(const TensorValue&)> check,
                           absl::string_view what) {
  absl::Status status;
  for (StateDict* dict : {&state.model, &state.optimizer}) {
    ForEachTensor(*dict, "", [&](const std::string& name, TensorValue& value) {
      if (status.ok()) {
        status = Expect(check(value), absl::StrCat(name, " is ", what));
      }
    });
  }
  return status;
}

bool IsOnCpu(const TensorValue& value) {
  for (const at::Tensor& local : value.locals()) {
    if (!local.is_cpu()) return false;
  }
  return true;
}
bool IsPlain(const TensorValue& value) { return value.is_plain(); }

TEST(TestStateDict, test_cpu_offload_full_state_dict) {
  for (const OptimizerKind kind :
       {OptimizerKind::kAdam, OptimizerKind::kAdamW}) {
    OnRanks([&](Communicator& comm) -> absl::Status {
      Build build;
      build.shard_root = true;
      const Model model = MakeComposite(&comm, build);
      const auto optimizer = MakeOptimizer(kind, model.module->parameters());
      StateDictOptions options;
      options.cpu_offload = true;
      DSD_ASSIGN_OR_RETURN(
          ModelAndOptimizerStateDict state,
          GetStateDict(*model.module, *optimizer, &comm, options));
      DSD_RETURN_IF_ERROR(ForAllTensors(state, IsOnCpu, "in host memory"));

      options.cpu_offload = false;
      options.full_state_dict = true;
      DSD_ASSIGN_OR_RETURN(
          state, GetStateDict(*model.module, *optimizer, &comm, options));
      DSD_RETURN_IF_ERROR(ForAllTensors(state, IsPlain, "whole"));

      options.cpu_offload = true;
      DSD_ASSIGN_OR_RETURN(
          state, GetStateDict(*model.module, *optimizer, &comm, options));
      if (comm.rank() > 0) {
        return Expect(state.model.empty() && state.optimizer.empty(),
                      "only rank 0 receives");
      }
      DSD_RETURN_IF_ERROR(Expect(!state.model.empty(), "rank 0 receives"));
      DSD_RETURN_IF_ERROR(ForAllTensors(state, IsOnCpu, "in host memory"));
      return ForAllTensors(state, IsPlain, "whole");
    });
  }
}

absl::Status ExpectKeysOfBareModel(Communicator& comm, Build build) {
  const Model bare = MakeComposite(nullptr, Build());
  const Model model = MakeComposite(&comm, build);
  DSD_ASSIGN_OR_RETURN(const StateDict expected,
                       GetModelStateDict(*bare.module));
  DSD_ASSIGN_OR_RETURN(const StateDict found,
                       GetModelStateDict(*model.module, &comm));
  return Expect(KeysOf(found) == KeysOf(expected) && found.size() == 15,
                "wrappers leave no trace in the keys");
}

TEST(TestStateDict, test_activation_ckpt_fqns_ddp) {
  OnRanks([](Communicator& comm) {
    Build build;
    build.unit_wrapper = kCheckpointSegment;
    build.wrappers = {kDdpSegment};
    return ExpectKeysOfBareModel(comm, build);
  });
}

TEST(TestStateDict, test_activation_ckpt_fqns_fsdp1) {
  OnRanks([](Communicator& comm) {
    Build build;
    build.unit_wrapper = kCheckpointSegment;
    build.shard_units = true;
    build.shard_root = true;
    build.wrappers = {kCheckpointSegment, kCompileSegment, kDdpSegment};
    return ExpectKeysOfBareModel(comm, build);
  });
}

struct WithExtraState : nn::Module, ExtraState {
  WithExtraState() : l(register_module("l", nn::Linear(2, 2))) {}
  absl::StatusOr<Value> GetExtraState() const override { return Value(state); }
  absl::Status SetExtraState(const Value& value) override {
    const auto* text = value.get_if<std::string>();
    if (text == nullptr) return absl::InvalidArgumentError("expected text");
    state = *text;
    return absl::OkStatus();
  }
  nn::Linear l;
  std::string state = "MyState";
};

TEST(TestStateDict, test_extra_state) {
  nn::Module model;
  const auto u1 =
      model.register_module("u1", std::make_shared<WithExtraState>());
  absl::StatusOr<StateDict> state = GetModelStateDict(model);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_THAT(KeysOf(*state),
              testing::UnorderedElementsAre("u1._extra_state", "u1.l.weight",
                                            "u1.l.bias"));
  EXPECT_EQ(*state->Find("u1._extra_state")->get_if<std::string>(), "MyState");
  u1->state = "changed";
  const auto keys = SetModelStateDict(model, *state);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_EQ(u1->state, "MyState");
  state->Erase(PathSegment("u1._extra_state"));
  EXPECT_THAT(std::string(SetModelStateDict(model, *state).status().message()),
              testing::HasSubstr("u1._extra_state"));
}

TEST(TestStateDict, test_non_persistent_buffers) {
  const Model model = MakeComposite(nullptr, Build());
  const at::Tensor buffer = RegisterNonPersistentBuffer(
      *model.module, "non_persistent", at::ones({3}));
  const absl::StatusOr<StateDict> state = GetModelStateDict(*model.module);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->size(), 15);
  EXPECT_FALSE(state->contains("non_persistent"));
  const auto keys = SetModelStateDict(*model.module, *state);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(keys->empty());
  EXPECT_TRUE(buffer.eq(1).all().item<bool>());
}

TEST(TestStateDict, test_broadcast_from_rank0) {
  for (const bool units : {false, true}) {
    OnRanks([&](Communicator& comm) -> absl::Status {
      Build build;
      build.seed = 3;
      const Model plain = MakeComposite(nullptr, build);
      build.shard_root = true;
      build.shard_units = units;
      const Model model = MakeComposite(&comm, build);
      const auto plain_optimizer =
          MakeOptimizer(OptimizerKind::kAdam, plain.module->parameters());
      const auto optimizer =
          MakeOptimizer(OptimizerKind::kAdam, model.module->parameters());
      Train(plain, {plain_optimizer.get()}, 0, 1);
      Train(model, {optimizer.get()}, 0, 1);
      StateDictOptions options;
      options.full_state_dict = true;
      DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict expected,
                           GetStateDict(*plain.module, *plain_optimizer));
      const auto found = [&] {
        return GetStateDict(*model.module, *optimizer, &comm, options);
      };
      const auto verify = [&]() -> absl::Status {
        DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict state, found());
        DSD_RETURN_IF_ERROR(ExpectEqual(state.model, expected.model, "model"));
        return ExpectEqual(state.optimizer, expected.optimizer, "optimizer");
      };
      DSD_RETURN_IF_ERROR(verify());

      Train(model, {optimizer.get()}, 1, 2);
      DSD_RETURN_IF_ERROR(Expect(!verify().ok(), "a step changes the state"));

      options.broadcast_from_rank0 = true;
      ModelAndOptimizerStateDict loaded;
      if (comm.rank() == 0) loaded = expected;
      DSD_RETURN_IF_ERROR(SetStateDict(*model.module, *optimizer, loaded.model,
                                       loaded.optimizer, &comm, options)
                              .status());
      DSD_RETURN_IF_ERROR(verify());

      std::string first;
      if (comm.rank() == 0) {
        first = loaded.model.key_text(0);
        loaded.model.Erase(PathSegment(first));
      }
      const absl::Status status =
          SetModelStateDict(*model.module, loaded.model, &comm, options)
              .status();
      DSD_RETURN_IF_ERROR(Expect(
          absl::StrContains(status.message(), "missing key") &&
              absl::StrContains(status.message(), first),
          absl::StrCat("all ranks see the missing key: ", status.ToString())));
      return verify();  // nothing was changed
    });
  }
}

TEST(TestStateDict, test_fsdp_root_not_initialized) {
  OnRanks([](Communicator& comm) -> absl::Status {
    Build build;
    build.shard_root = true;
    const Model model = MakeComposite(&comm, build);
    const auto optimizer =
        MakeOptimizer(OptimizerKind::kAdam, model.module->parameters());
    return GetStateDict(*model.module, *optimizer, &comm).status();
  });
}

// A scheduler of Python adds "initial_lr" to the groups.
TEST(TestStateDict, test_optim_state_dict_param_matching) {
  OnRanks([](Communicator& comm) -> absl::Status {
    Build build;
    build.shard_root = true;
    const Model model = MakeComposite(&comm, build);
    const auto optimizer =
        MakeOptimizer(OptimizerKind::kAdam, model.module->parameters());
    StateDictOptions options;
    options.full_state_dict = true;
    options.cpu_offload = true;
    DSD_ASSIGN_OR_RETURN(
        StateDict state,
        GetOptimizerStateDict(*model.module, *optimizer, &comm, options));
    const auto group_of = [](StateDict& dict) -> StateDict& {
      return *(*dict.Find("param_groups")->get_if<Value::List>())[0]
                  .get_if<StateDict>();
    };
    if (comm.rank() == 0) group_of(state).Set("initial_lr", Value(0.125));
    options.broadcast_from_rank0 = true;
    const auto fresh =
        MakeOptimizer(OptimizerKind::kAdam, model.module->parameters());
    DSD_RETURN_IF_ERROR(
        SetOptimizerStateDict(*model.module, *fresh, state, &comm, options));
    DSD_ASSIGN_OR_RETURN(StateDict after,
                         GetOptimizerStateDict(*model.module, *fresh, &comm));
    const Value* const initial = group_of(after).Find("initial_lr");
    return Expect(initial != nullptr && *initial->get_if<double>() == 0.125,
                  "every rank has initial_lr");
  });
}

TEST(TestStateDict, test_flattened_osd) {
  OnRanks([](Communicator& comm) -> absl::Status {
    Build build;
    build.shard_root = true;
    const Model model = MakeComposite(&comm, build);
    const auto optimizer =
        MakeOptimizer(OptimizerKind::kAdamW, model.module->parameters());
    Train(model, {optimizer.get()}, 0, 1);
    DSD_ASSIGN_OR_RETURN(
        const StateDict expected,
        GetOptimizerStateDict(*model.module, *optimizer, &comm));
    for (const bool flat_save : {false, true}) {
      for (const bool flat_load : {false, true}) {
        StateDictOptions save;
        save.flatten_optimizer_state_dict = flat_save;
        StateDictOptions load;
        load.flatten_optimizer_state_dict = flat_load;
        DSD_ASSIGN_OR_RETURN(
            const StateDict state,
            GetOptimizerStateDict(*model.module, *optimizer, &comm, save));
        const auto fresh = MakeOptimizer(OptimizerKind::kAdamW,
                                         model.module->parameters(), 0.5);
        DSD_RETURN_IF_ERROR(
            SetOptimizerStateDict(*model.module, *fresh, state, &comm, load));
        DSD_ASSIGN_OR_RETURN(
            const StateDict found,
            GetOptimizerStateDict(*model.module, *fresh, &comm));
        DSD_RETURN_IF_ERROR(ExpectEqual(found, expected, "flat or nested"));
      }
    }
    return absl::OkStatus();
  });
}

// Submodules are no deprecated form here.
TEST(TestStateDict, test_deprecate_api) {
  OnRanks([](Communicator& comm) -> absl::Status {
    const Model model = MakeComposite(&comm, Build());
    DSD_ASSIGN_OR_RETURN(StateDict live, GetModelStateDict(*model.module));
    DSD_ASSIGN_OR_RETURN(const StateDict before, CloneStateDict(live));
    StateDictOptions options;
    options.submodules = {"l"};
    DSD_ASSIGN_OR_RETURN(const StateDict with,
                         GetModelStateDict(*model.module, &comm, options));
    DSD_RETURN_IF_ERROR(
        Expect(KeysOf(with) == std::vector<std::string>{"l.weight", "l.bias"},
               "keys have the prefix"));
    options.keep_submodule_prefixes = false;
    DSD_ASSIGN_OR_RETURN(const StateDict without,
                         GetModelStateDict(*model.module, &comm, options));
    DSD_RETURN_IF_ERROR(
        Expect(KeysOf(without) == std::vector<std::string>{"weight", "bias"},
               "keys have no prefix"));
    DSD_RETURN_IF_ERROR(
        Expect(TensorAt(with, "l.weight").equal(TensorAt(without, "weight")),
               "values are the same"));

    DSD_ASSIGN_OR_RETURN(const StateDict saved, CloneStateDict(with));
    TensorAt(live, "l.weight").detach().zero_();
    StateDictOptions loose;
    loose.strict = false;
    DSD_RETURN_IF_ERROR(
        SetModelStateDict(*model.module, saved, &comm, loose).status());
    DSD_RETURN_IF_ERROR(ExpectEqual(live, before, "part of the model"));

    // The dict of the submodule itself, with nothing else missing.
    DSD_ASSIGN_OR_RETURN(const StateDict own, CloneStateDict(without));
    TensorAt(live, "l.weight").detach().zero_();
    DSD_RETURN_IF_ERROR(
        SetModelStateDict(*model.module, own, &comm, options).status());
    return ExpectEqual(live, before, "the submodule");
  });
}

TEST(TestStateDict, test_shared_weight) {
  for (const bool sharded : {false, true}) {
    for (const bool flatten : {false, true}) {
      OnRanks([&](Communicator& comm) -> absl::Status {
        constexpr int64_t kVocabulary = 50;
        Build build;
        build.seed = 4;
        const Model plain = MakeTied(nullptr, build, kVocabulary);
        build.shard_root = sharded;
        const Model model = MakeTied(&comm, build, kVocabulary);
        // Each tensor once, as users of tied weights do.
        const auto parameters = [](const Model& m) {
          return std::vector<at::Tensor>{m.module->parameters()[0],
                                         m.module->parameters().back()};
        };
        const auto plain_optimizer =
            MakeOptimizer(OptimizerKind::kAdamW, parameters(plain), 1e-4);
        const auto optimizer =
            MakeOptimizer(OptimizerKind::kAdamW, parameters(model), 1e-4);
        Train(plain, {plain_optimizer.get()}, 0, 3, at::kLong);
        Train(model, {optimizer.get()}, 0, 3, at::kLong);
        StateDictOptions options;
        options.flatten_optimizer_state_dict = flatten;
        DSD_ASSIGN_OR_RETURN(
            const ModelAndOptimizerStateDict expected,
            GetStateDict(*plain.module, *plain_optimizer, nullptr, options));
        DSD_RETURN_IF_ERROR(Expect(
            KeysOf(expected.model) ==
                std::vector<std::string>{"embedding.weight", "decoder.weight",
                                         "decoder.bias"},
            "both names are there"));
        options.full_state_dict = true;
        DSD_ASSIGN_OR_RETURN(
            const ModelAndOptimizerStateDict found,
            GetStateDict(*model.module, *optimizer, &comm, options));
        DSD_RETURN_IF_ERROR(ExpectEqual(found.model, expected.model, "model"));
        DSD_RETURN_IF_ERROR(
            ExpectEqual(found.optimizer, expected.optimizer, "optimizer"));

        build.seed = 5;
        const Model fresh = MakeTied(&comm, build, kVocabulary);
        const auto fresh_optimizer =
            MakeOptimizer(OptimizerKind::kAdamW, parameters(fresh), 0.5);
        DSD_RETURN_IF_ERROR(SetStateDict(*fresh.module, *fresh_optimizer,
                                         found.model, found.optimizer, &comm)
                                .status());
        DSD_ASSIGN_OR_RETURN(
            const ModelAndOptimizerStateDict after,
            GetStateDict(*fresh.module, *fresh_optimizer, &comm, options));
        DSD_RETURN_IF_ERROR(ExpectEqual(after.model, expected.model, "fresh"));
        return ExpectEqual(after.optimizer, expected.optimizer,
                           "fresh optimizer");
      });
    }
  }
}

// A parameter without memory: on the meta device, this rank's rows.
struct MetaNet : nn::Module {
  MetaNet(Communicator& comm, int64_t rows, int64_t columns) {
    for (const char* name : {"a", "b"}) {
      const Layout layout = *Layout::FromPlacements(
          {rows, columns}, DeviceMesh::Iota({comm.size()}), {Shard(0)});
      const Dims local = *layout.LocalShape(comm.rank());
      const at::Tensor weight = register_parameter(
          name, at::empty({local[0], local[1]},
                          at::TensorOptions(at::kFloat).device(at::kMeta)));
      set = ShardingTable::Global().Set(weight, layout, comm.rank());
    }
  }
  absl::Status set;
};

TEST(TestStateDict, test_setting_meta_device_model) {
  OnRanks([](Communicator& comm) -> absl::Status {
    MetaNet net(comm, 5, 4);
    DSD_RETURN_IF_ERROR(net.set);
    StateDict whole;
    whole.Set("a", Value(at::arange(20).to(at::kFloat).view({5, 4})));
    whole.Set("b", Value(at::arange(20).to(at::kFloat).view({5, 4}).neg()));
    StateDictOptions options;
    options.assign = true;
    options.strict = false;
    DSD_RETURN_IF_ERROR(SetModelStateDict(net, whole, &comm, options).status());
    options.full_state_dict = true;
    DSD_ASSIGN_OR_RETURN(const StateDict found,
                         GetModelStateDict(net, &comm, options));
    return ExpectEqual(found, whole, "materialized");
  });
}

// The bound is on what the library stages: 4 MiB chunks, two each way.
TEST(TestStateDict, test_setting_meta_device_model_broadcasting_and_memory) {
  OnRanks(
      [](Communicator& comm) -> absl::Status {
        constexpr int64_t kRows = 8192;
        constexpr int64_t kColumns = 1024;  // 32 MiB
        MetaNet net(comm, kRows, kColumns);
        DSD_RETURN_IF_ERROR(net.set);
        StateDict whole;
        if (comm.rank() == 0) {
          whole.Set("a", Value(at::full({kRows, kColumns}, 3.0)));
          whole.Set("b", Value(at::full({kRows, kColumns}, 4.0)));
        }
        StateDictOptions options;
        options.assign = true;
        options.strict = false;
        options.full_state_dict = true;
        options.broadcast_from_rank0 = true;
        DSD_ASSIGN_OR_RETURN(const auto session,
                             StateDictSession::Create(net, {}, &comm, options));
        DSD_RETURN_IF_ERROR(session->SetModel(whole).status());
        DSD_RETURN_IF_ERROR(
            Expect(session->stats().last_transfer.bytes_staged_peak <=
                       4 * (int64_t{4} << 20),
                   "staging is bounded"));
        return Expect(net.parameters()[0].eq(3.0).all().item<bool>() &&
                          net.parameters()[1].eq(4.0).all().item<bool>(),
                      "the shards are filled");
      },
      {4});
}

TEST(TestStateDict, test_set_cpu_model_state_dict_broadcast_from_rank0) {
  OnRanks([](Communicator& comm) -> absl::Status {
    nn::Linear model(2, 2);
    for (at::Tensor& parameter : model->parameters()) {
      parameter.detach().zero_();
    }
    StateDict whole;
    if (comm.rank() == 0) {
      whole.Set("weight", Value(at::arange(4).to(at::kFloat).view({2, 2})));
      whole.Set("bias", Value(at::ones({2})));
    }
    StateDictOptions options;
    options.full_state_dict = true;
    options.broadcast_from_rank0 = true;
    DSD_RETURN_IF_ERROR(
        SetModelStateDict(*model, whole, &comm, options).status());
    DSD_ASSIGN_OR_RETURN(const StateDict found, GetModelStateDict(*model));
    return Expect(KeysOf(found) == std::vector<std::string>{"weight", "bias"} &&
                      TensorAt(found, "weight").sum().item<float>() == 6 &&
                      TensorAt(found, "bias").eq(1).all().item<bool>(),
                  "all ranks have rank 0's values");
  });
}

// Several devices are no error here; on one machine without others: meta and
// host memory.
TEST(TestStateDict, test_multi_device_load_model_state_dict) {
  OnRanks([](Communicator& comm) -> absl::Status {
    nn::Module model;
    model.register_parameter(
        "meta", at::empty({2, 2}, at::TensorOptions().device(at::kMeta)));
    model.register_parameter("host", at::zeros({2, 2}));
    StateDict whole;
    if (comm.rank() == 0) {
      whole.Set("meta", Value(at::full({2, 2}, 1.0)));
      whole.Set("host", Value(at::full({2, 2}, 2.0)));
    }
    StateDictOptions options;
    options.full_state_dict = true;
    options.broadcast_from_rank0 = true;
    options.strict = false;
    options.assign = true;
    DSD_RETURN_IF_ERROR(
        SetModelStateDict(model, whole, &comm, options).status());
    return Expect(model.parameters()[0].eq(1.0).all().item<bool>() &&
                      model.parameters()[1].eq(2.0).all().item<bool>(),
                  "both are filled");
  });
}

struct FusionEmbedding : nn::Module {
  FusionEmbedding()
      : embedding(register_module("embedding", nn::Linear(3, 2))),
        fusion_embedding(
            register_module("fusion_embedding", nn::Linear(3, 2))) {}
  nn::Linear embedding;
  nn::Linear fusion_embedding;
};

struct FusionEmbeddingWithModifier : FusionEmbedding, FqnModifiers {
  std::vector<FqnModifier> fqn_modifiers(absl::string_view) const override {
    return {{"weight", "embedding"}};
  }
};

TEST(TestStateDict, test_state_dict_with_hook_on_keys) {
  // As the renaming hook of Python leaves it.
  FusionEmbedding hooked;
  absl::StatusOr<StateDict> got = GetModelStateDict(hooked);
  ASSERT_TRUE(got.ok()) << got.status();
  StateDict renamed;
  for (size_t i = 0; i < got->size(); ++i) {
    const std::string key = got->key_text(i);
    renamed.Set(absl::StartsWith(key, "embedding.")
                    ? key.substr(std::string("embedding.").size())
                    : key,
                got->value(i));
  }
  FusionEmbedding plain;
  EXPECT_THAT(std::string(SetModelStateDict(plain, renamed).status().message()),
              testing::HasSubstr("missing key"));
  FusionEmbeddingWithModifier modified;
  const auto keys = SetModelStateDict(modified, renamed);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(modified.embedding->weight.equal(hooked.embedding->weight));
}

// Tensor parallel layers: rows of one, columns of the other.
struct TpNet : nn::Module {
  TpNet(Communicator& comm, double value) {
    for (const int dim : {0, 1}) {
      const Layout layout = *Layout::FromPlacements(
          {kWidth, kWidth}, DeviceMesh::Iota({comm.size()}), {Shard(dim)});
      const Dims local = *layout.LocalShape(comm.rank());
      weights.push_back(
          register_parameter(dim == 0 ? "fc" : "fc1",
                             at::full({local[0], local[1]}, value + dim)));
      set.Update(
          ShardingTable::Global().Set(weights.back(), layout, comm.rank()));
    }
  }
  std::vector<at::Tensor> weights;
  absl::Status set;
};

std::unique_ptr<optim::AdamW> TwoGroups(const TpNet& net, bool split) {
  std::vector<optim::OptimizerParamGroup> groups;
  const auto with_lr = [](double lr) {
    return std::make_unique<optim::AdamWOptions>(lr);
  };
  if (split) {
    groups.emplace_back(std::vector<at::Tensor>{net.weights[0]}, with_lr(0.1));
    groups.emplace_back(std::vector<at::Tensor>{net.weights[1]}, with_lr(0.2));
  } else {
    groups.emplace_back(net.weights, with_lr(0.1));
    groups.emplace_back(std::vector<at::Tensor>{}, with_lr(0.2));
  }
  return std::make_unique<optim::AdamW>(std::move(groups));
}

TEST(TestStateDict, test_multi_param_groups) {
  for (const bool split : {true, false}) {
    for (const bool full : {false, true}) {
      for (const bool broadcast : {false, true}) {
        if (broadcast && !full) continue;
        OnRanks([&](Communicator& comm) -> absl::Status {
          TpNet net(comm, 1.0);
          DSD_RETURN_IF_ERROR(net.set);
          const auto optimizer = TwoGroups(net, split);
          for (const at::Tensor& weight : net.weights) {
            weight.mutable_grad() = at::full_like(weight, 0.25);
          }
          optimizer->step();
          StateDictOptions options;
          options.full_state_dict = full;
          options.broadcast_from_rank0 = broadcast;
          DSD_ASSIGN_OR_RETURN(
              const StateDict state,
              GetOptimizerStateDict(net, *optimizer, &comm, options));
          const auto fresh = TwoGroups(net, split);
          DSD_RETURN_IF_ERROR(
              SetOptimizerStateDict(net, *fresh, state, &comm, options));
          DSD_ASSIGN_OR_RETURN(const StateDict expected,
                               GetOptimizerStateDict(net, *optimizer, &comm));
          DSD_ASSIGN_OR_RETURN(const StateDict found,
                               GetOptimizerStateDict(net, *fresh, &comm));
          return ExpectEqual(found, expected, "groups and state");
        });
      }
    }
  }
}

TEST(TestNoComm, test_no_dist) {
  const Model model = MakeComposite(nullptr, Build());
  const auto optimizer =
      MakeOptimizer(OptimizerKind::kAdamW, model.module->parameters());
  Train(model, {optimizer.get()}, 0, 1);
  StateDictOptions options;
  options.full_state_dict = true;
  options.cpu_offload = true;
  const auto state = GetStateDict(*model.module, *optimizer, nullptr, options);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->model.size(), 15);
  ASSERT_EQ(ForAllTensors(*state, IsOnCpu, "in host memory"), absl::OkStatus());
  const auto keys = SetModelStateDict(*model.module, state->model);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(keys->empty());
  EXPECT_EQ(SetOptimizerStateDict(*model.module, *optimizer, state->optimizer),
            absl::OkStatus());

  // Python's own optimizer.state_dict(): parameters by number.
  StateDict numbered;
  StateDict by_number;
  const StateDict& by_fqn =
      *state->optimizer.Find("state")->get_if<StateDict>();
  Value groups = *state->optimizer.Find("param_groups");
  Value& params =
      *(*groups.get_if<Value::List>())[0].get_if<StateDict>()->Find("params");
  Value::List numbers;
  const Value::List fqns = *params.get_if<Value::List>();
  for (size_t i = 0; i < fqns.size(); ++i) {
    const int64_t number = static_cast<int64_t>(i);
    by_number.Set(PathSegment(number),
                  *by_fqn.Find(*fqns[i].get_if<std::string>()));
    numbers.push_back(Value(number));
  }
  params = Value(std::move(numbers));
  numbered.Set("state", Value(std::move(by_number)));
  numbered.Set("param_groups", std::move(groups));
  const auto fresh =
      MakeOptimizer(OptimizerKind::kAdamW, model.module->parameters(), 0.5);
  ASSERT_EQ(SetOptimizerStateDict(*model.module, *fresh, numbered),
            absl::OkStatus());
  const auto found = GetOptimizerStateDict(*model.module, *fresh);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(ExpectEqual(*found, state->optimizer, "numbered"),
            absl::OkStatus());
}

}  // namespace
}  // namespace dsd::catalogue
