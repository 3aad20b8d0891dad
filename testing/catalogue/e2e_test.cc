// SPDX-License-Identifier: Apache-2.0
//
// PyTorch's e2e tests of state dicts and checkpoints, by their names.

#include <string>
#include <utility>
#include <vector>

#include "ATen/Functions.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/state_dict/joint.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/core/state_dict/stateful.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/catalogue/fixtures.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adam.h"

namespace dsd::catalogue {
namespace {

namespace nn = torch::nn;
namespace optim = torch::optim;

// A directory per test and world size.
std::string DirectoryFor(Communicator& comm, absl::string_view name) {
  return absl::StrCat(testing::TempDir(), "/", name, "_", comm.size());
}

const StateDict& Part(const StateDict& state, absl::string_view key) {
  return *state.Find(key)->get_if<StateDict>();
}

// The state of a job as its trainer writes it.
absl::StatusOr<StateDict> JobState(const Model& model,
                                   optim::Optimizer& optimizer,
                                   Communicator& comm, int64_t step) {
  DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict parts,
                       GetStateDict(*model.module, optimizer, &comm));
  StateDict state;
  state.Set("model", Value(std::move(parts.model)));
  state.Set("optimizer", Value(std::move(parts.optimizer)));
  StateDict train;
  train.Set("step", Value(step));
  state.Set("train_state", Value(std::move(train)));
  return state;
}

// A position in the data.
struct Counter : Stateful {
  absl::StatusOr<StateDict> GetState() override {
    StateDict state;
    state.Set("count", Value(count));
    return state;
  }
  absl::Status SetState(const StateDict& state) override {
    ++loads;
    count = *state.Find("count")->get_if<int64_t>();
    return absl::OkStatus();
  }
  int64_t count = 0;
  int loads = 0;
};

// One whose ranks meet when they are given their state.
struct Communicating : Counter {
  explicit Communicating(Communicator& comm) : comm(comm) {}
  absl::Status SetState(const StateDict& state) override {
    DSD_RETURN_IF_ERROR(Counter::SetState(state));
    return comm.Barrier();
  }
  Communicator& comm;
};

TEST(TestE2ESaveAndLoad, test_e2e) {
  enum class Way { kFsdp, kUnits, kDdp };
  for (const Way way : {Way::kFsdp, Way::kUnits, Way::kDdp}) {
    for (const bool compiled : {false, true}) {
      OnRanks([&](Communicator& comm) -> absl::Status {
        const std::string directory = DirectoryFor(
            comm, absl::StrCat("e2e_", static_cast<int>(way), compiled));
        Build build;
        build.seed = 6;
        build.shard_root = way != Way::kDdp;
        build.shard_units = way == Way::kUnits;
        if (way == Way::kDdp) build.wrappers = {kDdpSegment};
        if (compiled) build.wrappers.push_back(kCompileSegment);
        const Model model = MakeComposite(&comm, build);
        const auto optimizer =
            MakeOptimizer(OptimizerKind::kAdamW, model.module->parameters());
        Train(model, {optimizer.get()}, 0, 2);
        DSD_ASSIGN_OR_RETURN(const StateDict saved,
                             JobState(model, *optimizer, comm, 2));
        DSD_RETURN_IF_ERROR(SaveCheckpoint(directory, saved, &comm).status());

        build.seed = 7;
        const Model fresh = MakeComposite(&comm, build);
        const auto fresh_optimizer = MakeOptimizer(
            OptimizerKind::kAdamW, fresh.module->parameters(), 0.5);
        DSD_ASSIGN_OR_RETURN(StateDict state,
                             JobState(fresh, *fresh_optimizer, comm, 0));
        DSD_RETURN_IF_ERROR(LoadCheckpoint(directory, &state, &comm).status());
        DSD_RETURN_IF_ERROR(SetStateDict(*fresh.module, *fresh_optimizer,
                                         Part(state, "model"),
                                         Part(state, "optimizer"), &comm)
                                .status());
        DSD_RETURN_IF_ERROR(Expect(
            *Part(state, "train_state").Find("step")->get_if<int64_t>() == 2,
            "the step is loaded"));
        // Aliases of live tensors: compared after one more step too.
        const auto compare = [&]() -> absl::Status {
          DSD_ASSIGN_OR_RETURN(const StateDict expected,
                               JobState(model, *optimizer, comm, 2));
          DSD_ASSIGN_OR_RETURN(const StateDict found,
                               JobState(fresh, *fresh_optimizer, comm, 2));
          return ExpectEqual(found, expected, "job");
        };
        DSD_RETURN_IF_ERROR(compare());
        Train(model, {optimizer.get()}, 2, 3);
        Train(fresh, {fresh_optimizer.get()}, 2, 3);
        return compare();
      });
    }
  }
}

TEST(TestNoDist, test_no_dist) {
  const std::string directory = absl::StrCat(testing::TempDir(), "/no_dist");
  ASSERT_TRUE(SaveCheckpoint(directory, StateDict()).ok());
  StateDict state;
  const auto report = LoadCheckpoint(directory, &state);
  EXPECT_TRUE(report.ok()) << report.status();
}

TEST(TestE2ESaveAndLoad, test_partial_load) {
  OnRanks([](Communicator& comm) -> absl::Status {
    const std::string directory = DirectoryFor(comm, "partial_load");
    Build build;
    build.shard_root = true;
    const Model model = MakeComposite(&comm, build);
    const auto optimizer =
        MakeOptimizer(OptimizerKind::kAdam, model.module->parameters());
    Train(model, {optimizer.get()}, 0, 2);
    DSD_ASSIGN_OR_RETURN(const StateDict saved,
                         JobState(model, *optimizer, comm, 2));
    DSD_RETURN_IF_ERROR(SaveCheckpoint(directory, saved, &comm).status());

    build.seed = 8;
    const Model fresh = MakeComposite(&comm, build);
    StateDict wanted;
    DSD_ASSIGN_OR_RETURN(StateDict fresh_model,
                         GetModelStateDict(*fresh.module, &comm));
    wanted.Set("model", Value(std::move(fresh_model)));
    checkpoint::LoadOptions part;
    part.allow_unexpected = true;
    DSD_RETURN_IF_ERROR(
        LoadCheckpoint(directory, &wanted, &comm, part).status());
    DSD_RETURN_IF_ERROR(
        SetModelStateDict(*fresh.module, Part(wanted, "model"), &comm)
            .status());
    DSD_ASSIGN_OR_RETURN(const StateDict found,
                         GetModelStateDict(*fresh.module, &comm));
    DSD_RETURN_IF_ERROR(ExpectEqual(found, Part(saved, "model"), "model"));

    // The state without the groups.
    const auto fresh_optimizer =
        MakeOptimizer(OptimizerKind::kAdam, fresh.module->parameters());
    DSD_ASSIGN_OR_RETURN(
        StateDict state,
        GetOptimizerStateDict(*fresh.module, *fresh_optimizer, &comm));
    state.Erase(PathSegment("param_groups"));
    wanted = StateDict();
    wanted.Set("optimizer", Value(std::move(state)));
    DSD_RETURN_IF_ERROR(
        LoadCheckpoint(directory, &wanted, &comm, part).status());
    return ExpectEqual(Part(Part(wanted, "optimizer"), "state"),
                       Part(Part(saved, "optimizer"), "state"), "state");
  });
}

// A dict that notes which of its entries were replaced: objects are asked in
// place, plain values are replaced.
TEST(TestE2ESaveAndLoad, test_stateful_and_non_stateful_loads) {
  OnRanks([](Communicator& comm) -> absl::Status {
    const std::string directory = DirectoryFor(comm, "stateful");
    Counter stateful;
    stateful.count = 7;
    StateDict saved;
    saved.Set("plain", Value(int64_t{3}));
    saved.Set("tensor", Value(at::full({4}, 2.0)));
    DSD_RETURN_IF_ERROR(GetStateful({{"object", &stateful}}, &comm, saved));
    DSD_RETURN_IF_ERROR(SaveCheckpoint(directory, saved, &comm).status());

    stateful.count = 0;
    const at::Tensor live = at::zeros({4});
    StateDict state;
    state.Set("plain", Value(int64_t{0}));
    state.Set("tensor", Value(live));
    DSD_RETURN_IF_ERROR(GetStateful({{"object", &stateful}}, &comm, state));
    DSD_RETURN_IF_ERROR(LoadCheckpoint(directory, &state, &comm).status());
    DSD_RETURN_IF_ERROR(Expect(*state.Find("plain")->get_if<int64_t>() == 3,
                               "a plain value is replaced"));
    DSD_RETURN_IF_ERROR(
        Expect(live.equal(at::full({4}, 2.0)), "a tensor is filled in place"));
    DSD_RETURN_IF_ERROR(Expect(stateful.loads == 0, "not called yet"));
    DSD_RETURN_IF_ERROR(SetStateful({{"object", &stateful}}, state, &comm));
    return Expect(stateful.loads == 1 && stateful.count == 7,
                  "the object was given its state");
  });
}

// Objects that communicate, listed in another order on rank 0: an error that
// names the keys, where a job could wait for ever.
TEST(TestE2ESaveAndLoad, test_different_ordered_state_dict_keys) {
  for (const absl::Status& status : RunRankThreads(
           4,
           [](Communicator& comm) -> absl::Status {
             Communicating a(comm);
             Communicating b(comm);
             std::vector<StatefulEntry> entries = {
                 {"a", &a, StatefulEntry::kPerRank},
                 {"b", &b, StatefulEntry::kPerRank}};
             StateDict state;
             DSD_RETURN_IF_ERROR(GetStateful(entries, &comm, state));
             DSD_RETURN_IF_ERROR(SetStateful(entries, state, &comm));
             DSD_RETURN_IF_ERROR(
                 Expect(a.loads == 1 && b.loads == 1, "in the same order"));
             if (comm.rank() == 0) std::swap(entries[0], entries[1]);
             state = StateDict();
             const absl::Status status = GetStateful(entries, &comm, state);
             comm.Shutdown().IgnoreError();
             return status;
           },
           {absl::Seconds(60), {}, /*shutdown=*/false})) {
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                 "keys \"b\", \"a\""));
  }
}

// A stage of a pipeline: one layer of its own.
struct Stage : nn::Module {
  explicit Stage(int stage)
      : layer(register_module(absl::StrCat("layer", stage),
                              nn::Linear(kWidth, kWidth))) {
    for (at::Tensor& param : layer->parameters()) {
      param.detach().copy_(
          at::arange(param.numel(), at::kFloat).view(param.sizes()) + stage);
    }
  }
  nn::Linear layer;
};

// Each rank has one layer and its optimizer; the checkpoint has all, and
// opens as one model that is sharded over the ranks, and as stages again.
TEST(TestPipeline, test_pipeline) {
  OnRanks([](Communicator& comm) -> absl::Status {
    const std::string directory = DirectoryFor(comm, "pipeline");
    StateDictOptions flat;
    flat.flatten_optimizer_state_dict = true;
    const auto state_of =
        [&](Stage& stage,
            optim::Optimizer& optimizer) -> absl::StatusOr<StateDict> {
      DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict parts,
                           GetStateDict(stage, optimizer, &comm, flat));
      StateDict mine;
      mine.Set("model", Value(std::move(parts.model)));
      mine.Set("optim", Value(std::move(parts.optimizer)));
      return JoinStateDicts(mine, &comm, {comm.rank()});
    };
    Stage stage(comm.rank());
    const auto optimizer =
        MakeOptimizer(OptimizerKind::kAdamW, stage.parameters());
    stage.layer(at::ones({1, kWidth})).sum().backward();
    optimizer->step();
    DSD_ASSIGN_OR_RETURN(const StateDict saved, state_of(stage, *optimizer));
    DSD_RETURN_IF_ERROR(SaveCheckpoint(directory, saved, &comm).status());

    // As stages, of which each reads its own keys.
    Stage fresh(100);
    Stage again(comm.rank());
    const auto again_optimizer =
        MakeOptimizer(OptimizerKind::kAdamW, again.parameters(), 0.5);
    DSD_ASSIGN_OR_RETURN(StateDict loaded, state_of(again, *again_optimizer));
    DSD_RETURN_IF_ERROR(LoadCheckpoint(directory, &loaded, &comm).status());
    StateDictOptions own;
    own.replica_ranks = {comm.rank()};
    DSD_RETURN_IF_ERROR(SetStateDict(again, *again_optimizer,
                                     Part(loaded, "model"),
                                     Part(loaded, "optim"), &comm, own)
                            .status());
    DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict before,
                         GetStateDict(stage, *optimizer, nullptr, flat));
    DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict after,
                         GetStateDict(again, *again_optimizer, nullptr, flat));
    DSD_RETURN_IF_ERROR(ExpectEqual(after.model, before.model, "the stage"));
    DSD_RETURN_IF_ERROR(
        ExpectEqual(after.optimizer, before.optimizer, "its optimizer"));

    // As one model on every rank.
    nn::Module all("all");
    for (int i = 0; i < comm.size(); ++i) {
      all.register_module(absl::StrCat("layer", i), nn::Linear(kWidth, kWidth));
    }
    DSD_ASSIGN_OR_RETURN(StateDict model, GetModelStateDict(all, &comm));
    StateDict job;
    job.Set("model", Value(std::move(model)));
    checkpoint::LoadOptions options;
    options.allow_unexpected = true;
    DSD_RETURN_IF_ERROR(
        LoadCheckpoint(directory, &job, &comm, options).status());
    const std::string key = absl::StrCat("layer", comm.rank(), ".weight");
    return Expect(
        TensorAt(Part(job, "model"), key).equal(stage.layer->weight.detach()),
        "each layer is there");
  });
}

// Experts: rank r has expert r % 4, on a mesh of two ranks, beside what all
// eight share.
TEST(TestE2ESaveAndLoad, test_fsdp_ep) {
  OnRanks(
      [](Communicator& comm) -> absl::Status {
        const std::string directory = DirectoryFor(comm, "experts");
        const int expert = comm.rank() % 4;
        const auto make = [&](nn::Module& net, double scale) -> absl::Status {
          const auto add = [&](const std::string& name, const DeviceMesh& mesh,
                               double start) -> absl::Status {
            DSD_ASSIGN_OR_RETURN(
                const Layout layout,
                Layout::FromPlacements({kWidth, 3}, mesh, {Shard(0)}));
            const Dims shape = *layout.LocalShape(comm.rank());
            at::Tensor shard = net.register_parameter(
                name, at::full({shape[0], shape[1]}, start * scale));
            return ShardingTable::Global().Set(shard, layout, comm.rank());
          };
          DSD_RETURN_IF_ERROR(add("shared", DeviceMesh::Iota({8}), 1));
          DSD_ASSIGN_OR_RETURN(const DeviceMesh pair,
                               DeviceMesh::Create({2}, {expert, expert + 4}));
          return add(absl::StrCat("expert", expert), pair, 10 + expert);
        };
        nn::Module net("net");
        DSD_RETURN_IF_ERROR(make(net, 1));
        optim::Adam optimizer(net.parameters(), optim::AdamOptions(0.1));
        StateDictOptions flat;
        flat.flatten_optimizer_state_dict = true;
        DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict parts,
                             GetStateDict(net, optimizer, &comm, flat));
        DSD_RETURN_IF_ERROR(
            Expect(KeysOf(parts.model) ==
                       std::vector<std::string>(
                           {"shared", absl::StrCat("expert", expert)}),
                   "keys of other experts are absent"));
        DSD_RETURN_IF_ERROR(Expect(!parts.model.value(1)
                                        .get_if<TensorValue>()
                                        ->layout()
                                        .BoxesOf((expert + 4))
                                        .empty(),
                                   "an expert is on its own mesh"));
        StateDict mine;
        mine.Set("model", Value(std::move(parts.model)));
        mine.Set("optim", Value(std::move(parts.optimizer)));
        DSD_ASSIGN_OR_RETURN(const StateDict joint,
                             JoinStateDicts(mine, &comm));
        DSD_RETURN_IF_ERROR(SaveCheckpoint(directory, joint, &comm).status());

        nn::Module again("again");
        DSD_RETURN_IF_ERROR(make(again, 0));
        DSD_ASSIGN_OR_RETURN(const StateDict live,
                             GetModelStateDict(again, &comm));
        StateDict job;
        job.Set("model", Value(StateDict(live)));
        DSD_ASSIGN_OR_RETURN(StateDict loaded, JoinStateDicts(job, &comm));
        checkpoint::LoadOptions options;
        options.allow_unexpected = true;
        DSD_RETURN_IF_ERROR(
            LoadCheckpoint(directory, &loaded, &comm, options).status());
        for (size_t i = 0; i < 2; ++i) {
          DSD_RETURN_IF_ERROR(Expect(
              again.parameters()[i].equal(net.parameters()[i]), "loaded"));
        }
        return absl::OkStatus();
      },
      {8});
}

TEST(TestE2ESaveAndLoad, test_overwrite) {
  OnRanks([](Communicator& comm) -> absl::Status {
    const std::string directory = DirectoryFor(comm, "overwrite");
    StateDict state;
    state.Set("t", Value(at::full({10}, 1.0)));
    DSD_RETURN_IF_ERROR(SaveCheckpoint(directory, state, &comm).status());
    state.Set("t", Value(at::full({10}, 2.0)));
    DSD_RETURN_IF_ERROR(SaveCheckpoint(directory, state, &comm).status());
    StateDict found;
    found.Set("t", Value(at::zeros({10})));
    DSD_RETURN_IF_ERROR(LoadCheckpoint(directory, &found, &comm).status());
    DSD_RETURN_IF_ERROR(ExpectEqual(found, state, "the second"));
    checkpoint::SaveOptions keep;
    keep.overwrite = false;
    const absl::Status status =
        SaveCheckpoint(directory, state, &comm, keep).status();
    return Expect(status.code() == absl::StatusCode::kAlreadyExists,
                  absl::StrCat("it is there already: ", status.ToString()));
  });
}

TEST(TestInitStateDict, test_init_state_dict) {
  const std::string directory =
      absl::StrCat(testing::TempDir(), "/init_state_dict");
  OnRanks(
      [&](Communicator& comm) -> absl::Status {
        Build build;
        build.seed = 9;
        const Model model = MakeComposite(&comm, build);
        const auto optimizer = MakeOptimizer(OptimizerKind::kAdam,
                                             model.module->parameters(), 0.1);
        Train(model, {optimizer.get()}, 0, 1);
        DSD_ASSIGN_OR_RETURN(const StateDict saved,
                             JobState(model, *optimizer, comm, 1));
        DSD_RETURN_IF_ERROR(SaveCheckpoint(directory, saved, &comm).status());

        build.seed = 10;
        const Model other = MakeComposite(&comm, build);
        const auto other_optimizer = MakeOptimizer(
            OptimizerKind::kAdam, other.module->parameters(), 0.2);
        DSD_ASSIGN_OR_RETURN(StateDict state,
                             JobState(other, *other_optimizer, comm, 0));
        const at::Tensor before = TensorAt(Part(state, "model"), "l.weight");
        DSD_RETURN_IF_ERROR(LoadCheckpoint(directory, &state, &comm).status());
        // In place.
        DSD_RETURN_IF_ERROR(
            Expect(before.is_same(TensorAt(Part(state, "model"), "l.weight")),
                   "tensors stay the same objects"));
        DSD_RETURN_IF_ERROR(SetStateDict(*other.module, *other_optimizer,
                                         Part(state, "model"),
                                         Part(state, "optimizer"), &comm)
                                .status());
        DSD_ASSIGN_OR_RETURN(const StateDict found,
                             JobState(other, *other_optimizer, comm, 1));
        DSD_RETURN_IF_ERROR(ExpectEqual(found, saved, "job"));
        return Expect(
            other_optimizer->param_groups()[0].options().get_lr() == 0.1,
            "the learning rate is loaded");
      },
      {1});
}

// The trained units of one model become frozen units of another.
TEST(TestFineTuning, test_fine_tuning) {
  OnRanks([](Communicator& comm) -> absl::Status {
    const std::string pretrain = DirectoryFor(comm, "pretrain");
    const std::string finetune = DirectoryFor(comm, "finetune");
    Build build;
    build.shard_units = true;
    build.shard_root = true;
    {
      const Model model = MakeComposite(&comm, build);
      const auto optimizer =
          MakeOptimizer(OptimizerKind::kAdamW, model.module->parameters());
      Train(model, {optimizer.get()}, 0, 2);
      StateDict state;
      DSD_ASSIGN_OR_RETURN(StateDict part,
                           GetModelStateDict(*model.module, &comm));
      state.Set("model", Value(std::move(part)));
      DSD_RETURN_IF_ERROR(SaveCheckpoint(pretrain, state, &comm).status());
    }
    build.freeze_units = true;
    StateDict frozen_before;
    for (int round = 0; round < 2; ++round) {
      build.seed = 20 + round;
      const Model model = MakeComposite(&comm, build);
      const auto optimizer =
          MakeOptimizer(OptimizerKind::kAdamW, model.module->parameters());
      // The frozen part from the first job, the trained part from the last
      // round.
      StateDictOptions units;
      units.submodules = {"u1", "u2"};
      DSD_ASSIGN_OR_RETURN(StateDict part,
                           GetModelStateDict(*model.module, &comm, units));
      StateDict state;
      state.Set("model", Value(std::move(part)));
      checkpoint::LoadOptions some;
      some.allow_unexpected = true;
      DSD_RETURN_IF_ERROR(
          LoadCheckpoint(pretrain, &state, &comm, some).status());
      StateDictOptions loose;
      loose.strict = false;
      DSD_RETURN_IF_ERROR(
          SetModelStateDict(*model.module, Part(state, "model"), &comm, loose)
              .status());
      StateDictOptions trained;
      trained.ignore_frozen_params = true;
      const auto trained_state = [&]() -> absl::StatusOr<StateDict> {
        DSD_ASSIGN_OR_RETURN(
            ModelAndOptimizerStateDict parts,
            GetStateDict(*model.module, *optimizer, &comm, trained));
        StateDict job;
        job.Set("model", Value(std::move(parts.model)));
        job.Set("optimizer", Value(std::move(parts.optimizer)));
        return job;
      };
      if (round > 0) {
        DSD_ASSIGN_OR_RETURN(StateDict job, trained_state());
        DSD_RETURN_IF_ERROR(LoadCheckpoint(finetune, &job, &comm).status());
        DSD_RETURN_IF_ERROR(SetStateDict(*model.module, *optimizer,
                                         Part(job, "model"),
                                         Part(job, "optimizer"), &comm, loose)
                                .status());
      }
      Train(model, {optimizer.get()}, 2 * round, 2 * round + 2);
      DSD_ASSIGN_OR_RETURN(const StateDict job, trained_state());
      DSD_RETURN_IF_ERROR(
          Expect(KeysOf(Part(job, "model")) ==
                     std::vector<std::string>{"p", "l.weight", "l.bias"},
                 "only trained parameters are saved"));
      DSD_RETURN_IF_ERROR(SaveCheckpoint(finetune, job, &comm).status());

      DSD_ASSIGN_OR_RETURN(StateDict frozen,
                           GetModelStateDict(*model.module, &comm, units));
      DSD_ASSIGN_OR_RETURN(frozen, CloneStateDict(frozen));
      if (round > 0) {
        DSD_RETURN_IF_ERROR(ExpectEqual(frozen, frozen_before, "frozen"));
      }
      frozen_before = std::move(frozen);
    }
    return absl::OkStatus();
  });
}

}  // namespace
}  // namespace dsd::catalogue
