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
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/catalogue/fixtures.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/modules/linear.h"

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
