// SPDX-License-Identifier: Apache-2.0
//
// Complaints about PyTorch's distributed state dict that could be made here
// too: a test for each, with its number in the name. Issues and pull requests
// are those of pytorch/pytorch unless the name says otherwise. Those about
// optimizers alone are in frontends/optimizer/optimizer_test.cc.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/Functions.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/fqn/fqn_modifiers.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/frontends/module/non_persistent.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/catalogue/fixtures.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adamw.h"

namespace dsd::catalogue {
namespace {

namespace nn = torch::nn;
namespace optim = torch::optim;

enum class Way { kFsdp, kTp, kHsdp, kFsdpTp, kBoxes };
constexpr Way kAllWays[] = {Way::kFsdp, Way::kTp, Way::kHsdp, Way::kFsdpTp,
                            Way::kBoxes};

at::Tensor Numbers(at::IntArrayRef shape, double start) {
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  return at::arange(start, start + static_cast<double>(count), at::kFloat)
      .view(shape);
}

// [7, 5]: uneven in every way.
absl::StatusOr<Layout> LayoutOf(Way way, int64_t ranks) {
  const int64_t outer = ranks == 4 ? 2 : 1;
  const DeviceMesh flat = DeviceMesh::Iota({ranks});
  const DeviceMesh mesh = DeviceMesh::Iota({outer, ranks / outer});
  switch (way) {
    case Way::kFsdp:
      return Layout::FromPlacements({7, 5}, flat, {Shard(0)});
    case Way::kTp:
      return Layout::FromPlacements({7, 5}, flat, {Shard(1)});
    case Way::kHsdp:
      return Layout::FromPlacements({7, 5}, mesh, {Replicate(), Shard(0)});
    case Way::kFsdpTp:
      return Layout::FromPlacements({7, 5}, mesh,
                                    {StridedShard(0, ranks / outer), Shard(0)});
    case Way::kBoxes:
      break;
  }
  // Sizes that no formula gives: one row each, the rest for the last rank.
  std::vector<HolderBox> boxes;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    boxes.push_back({rank, {{rank, 0}, {rank + 1 == ranks ? 7 : rank + 1, 5}}});
  }
  return Layout::FromBoxes({7, 5}, std::move(boxes));
}

// A sharded "w" and a plain "b", with AdamW, of which the state is as after
// `step` steps; 0: none.
struct Job {
  static absl::StatusOr<std::unique_ptr<Job>> Make(Way way, Communicator& comm,
                                                   double start,
                                                   int64_t step = 0) {
    auto job = std::make_unique<Job>();
    DSD_ASSIGN_OR_RETURN(const Layout layout, LayoutOf(way, comm.size()));
    const auto cut =
        [&](const at::Tensor& whole) -> absl::StatusOr<at::Tensor> {
      // Filled from the whole tensor, without a message.
      nn::Module holder;
      std::optional<Dims> shape = layout.LocalShape(comm.rank());
      if (!shape.has_value()) {
        shape = layout.BoxesOf(comm.rank())[0].box.extents();
      }
      at::Tensor shard =
          at::zeros(std::vector<int64_t>(shape->begin(), shape->end()));
      DSD_RETURN_IF_ERROR(
          ShardingTable::Global().Set(shard, layout, comm.rank()));
      holder.register_buffer("w", shard);
      StateDict dict;
      dict.Set("w", Value(whole));
      DSD_RETURN_IF_ERROR(SetModelStateDict(holder, dict));
      return shard;
    };
    DSD_ASSIGN_OR_RETURN(at::Tensor shard, cut(Numbers({7, 5}, start)));
    job->w = job->model.register_parameter("w", shard);
    DSD_RETURN_IF_ERROR(
        ShardingTable::Global().Set(job->w, layout, comm.rank()));
    job->b = job->model.register_parameter("b", Numbers({3}, start + 100));
    job->optimizer = std::make_unique<optim::AdamW>(
        job->model.parameters(), optim::AdamWOptions(step == 0 ? 0.1 : 0.5));
    for (const bool is_w : {true, false}) {
      if (step == 0) break;
      auto state = std::make_unique<optim::AdamWParamState>();
      state->step(step);
      for (const bool squared : {false, true}) {
        at::Tensor moment = Numbers({3}, start + (squared ? 300 : 200));
        if (is_w) {
          DSD_ASSIGN_OR_RETURN(
              moment, cut(Numbers({7, 5}, start + (squared ? 500 : 400))));
        }
        squared ? state->exp_avg_sq(moment) : state->exp_avg(moment);
      }
      job->optimizer->state()[(is_w ? job->w : job->b).unsafeGetTensorImpl()] =
          std::move(state);
    }
    return job;
  }

  // OK if all is as Make(.., start, step) made it.
  absl::Status Check(Communicator& comm, double start, int64_t step) {
    StateDictOptions full;
    full.full_state_dict = true;
    DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict found,
                         GetStateDict(model, *optimizer, &comm, full));
    DSD_RETURN_IF_ERROR(
        Expect(TensorAt(found.model, "w").equal(Numbers({7, 5}, start)) &&
                   TensorAt(found.model, "b").equal(Numbers({3}, start + 100)),
               "the model has the values"));
    const StateDict& states =
        *found.optimizer.Find("state")->get_if<StateDict>();
    const StateDict& of_w = *states.Find("w")->get_if<StateDict>();
    return Expect(
        TensorAt(of_w, "step").item<double>() == static_cast<double>(step) &&
            (step == 0 ||
             TensorAt(of_w, "exp_avg_sq").equal(Numbers({7, 5}, start + 500))),
        "the optimizer has the values");
  }

  nn::Module model{"job"};
  at::Tensor w;
  at::Tensor b;
  std::unique_ptr<optim::AdamW> optimizer;
};

StateDictOptions Full(bool broadcast = false) {
  StateDictOptions options;
  options.full_state_dict = true;
  options.broadcast_from_rank0 = broadcast;
  return options;
}

StateDict WholeModel(double start) {
  StateDict dict;
  dict.Set("w", Value(Numbers({7, 5}, start)));
  dict.Set("b", Value(Numbers({3}, start + 100)));
  return dict;
}

// What each rank returned; none hangs.
std::vector<absl::Status> Statuses(
    int ranks, absl::FunctionRef<absl::Status(Communicator&)> body) {
  return RunRankThreads(ranks,
                        [&](Communicator& comm) -> absl::Status {
                          const absl::Status status = body(comm);
                          comm.Shutdown().IgnoreError();
                          return status;
                        },
                        {absl::Seconds(60), {}, /*shutdown=*/false});
}

// --- Speed and memory.

// Names are kept in sessions, which the user ends.
TEST(IssuesTest, Issue149100_PR149354_NothingKeepsAModelAlive) {
  std::weak_ptr<nn::Module> model;
  c10::weak_intrusive_ptr<c10::TensorImpl> weight(
      at::zeros({1}).getIntrusivePtr());
  {
    const Model composite = MakeComposite(nullptr, Build());
    model = composite.module;
    const auto optimizer =
        MakeOptimizer(OptimizerKind::kAdamW, composite.module->parameters());
    weight = c10::weak_intrusive_ptr<c10::TensorImpl>(
        composite.module->parameters()[0].getIntrusivePtr());
    const auto state = GetStateDict(*composite.module, *optimizer);
    ASSERT_TRUE(state.ok()) << state.status();
    ASSERT_TRUE(SetStateDict(*composite.module, *optimizer, state->model,
                             state->optimizer)
                    .ok());
  }
  EXPECT_TRUE(model.expired());
  EXPECT_TRUE(weight.expired());
}

TEST(IssuesTest, PR125501_Issue61398_OneWalkNamesAllTensors) {
  const Model model = MakeComposite(nullptr, Build());
  const auto optimizer =
      MakeOptimizer(OptimizerKind::kAdamW, model.module->parameters());
  const auto session = *StateDictSession::Create(*model.module, *optimizer);
  for (int i = 0; i < 3; ++i) {
    const auto state = session->Get();
    ASSERT_TRUE(state.ok()) << state.status();
    ASSERT_TRUE(session->Set(state->model, state->optimizer).ok());
  }
  EXPECT_EQ(session->stats().tables_built, 1);
}

TEST(IssuesTest, Issue149640_PR142845_PR125338_SetNeedsNoWholeTensorPerRank) {
  for (const bool assign : {false, true}) {
    OnRanks([&](Communicator& comm) -> absl::Status {
      DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 0));
      StateDictOptions options = Full(/*broadcast=*/true);
      options.assign = assign;
      DSD_ASSIGN_OR_RETURN(
          const auto session,
          StateDictSession::Create(job->model, {}, &comm, options));
      DSD_RETURN_IF_ERROR(
          session->SetModel(comm.rank() == 0 ? WholeModel(1000) : StateDict()));
      const TransferStats stats = session->stats().last_transfer;
      DSD_RETURN_IF_ERROR(Expect(
          comm.rank() == 0 ||
              stats.bytes_received == static_cast<int64_t>(job->w.nbytes()) +
                                          static_cast<int64_t>(job->b.nbytes()),
          "a rank receives what it needs"));
      DSD_RETURN_IF_ERROR(Expect(job->w.storage().nbytes() == job->w.nbytes(),
                                 "a shard does not hold on to a whole tensor"));
      return job->Check(comm, 1000, 0);
    });
  }
}

TEST(IssuesTest, LightningPR19870_WholeModelAsAStreamInBoundedMemory) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 0));
    StreamOptions stream;
    stream.batch_bytes = 32;
    int64_t elements = 0;
    DSD_RETURN_IF_ERROR(StreamModelStateDict(
        job->model,
        [&](StreamedValue& piece) -> absl::Status {
          const at::Tensor part = *piece.value.get_if<TensorValue>()->Local();
          elements += part.numel();
          return Expect(part.nbytes() <= 32, "pieces are small");
        },
        &comm, {}, stream));
    return Expect(elements == 7 * 5 + 3, "everything came once");
  });
}

TEST(IssuesTest, Fairscale844_Issue73383_PR183037_OnlyChosenRanksReceive) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 0));
    StateDictOptions options = Full();
    options.full_state_dict_ranks = {comm.size() - 1};
    DSD_ASSIGN_OR_RETURN(
        const auto session,
        StateDictSession::Create(job->model, *job->optimizer, &comm, options));
    DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict state,
                         session->Get());
    const bool receives = comm.rank() == comm.size() - 1;
    return Expect(
        state.model.empty() != receives &&
            state.optimizer.empty() != receives &&
            (receives || session->stats().last_transfer.bytes_received == 0),
        "the others get nothing");
  });
}

TEST(IssuesTest, Issue103737_OptimizerStateIsFilledWhereItLies) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const auto source, Job::Make(Way::kFsdp, comm, 50, 3));
    DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 0, 1));
    const auto moment = [&] {
      return static_cast<optim::AdamWParamState&>(
                 *job->optimizer->state()[job->w.unsafeGetTensorImpl()])
          .exp_avg();
    };
    const void* const before = moment().const_data_ptr();
    DSD_ASSIGN_OR_RETURN(
        const StateDict state,
        GetOptimizerStateDict(source->model, *source->optimizer, &comm));
    DSD_RETURN_IF_ERROR(
        SetOptimizerStateDict(job->model, *job->optimizer, state, &comm));
    return Expect(moment().const_data_ptr() == before, "the same memory");
  });
}

TEST(IssuesTest, PR166025_PR155192_CopiesShareNothingButTies) {
  const Model model = MakeTied(nullptr, Build(), 5);
  const StateDict live = *GetModelStateDict(*model.module);
  const StateDict first = *CopyToHost(live);
  const StateDict second = *CopyToHost(live);
  const at::Tensor a = TensorAt(first, "embedding.weight");
  EXPECT_TRUE(a.is_alias_of(TensorAt(first, "decoder.weight")));
  EXPECT_FALSE(a.is_alias_of(TensorAt(second, "embedding.weight")));
  EXPECT_FALSE(a.is_alias_of(TensorAt(live, "embedding.weight")));
}

// A message for each tensor is what takes long.
TEST(IssuesTest, Issue117476_OptimizerStateOfManyTensorsTravelsTogether) {
  OnRanks([](Communicator& comm) -> absl::Status {
    constexpr int kParams = 200;
    nn::Module net("net");
    for (int i = 0; i < kParams; ++i) {
      net.register_parameter(absl::StrCat("p", i), Numbers({4}, i));
    }
    optim::AdamW optimizer(net.parameters(), 0.1);
    StateDictOptions options = Full();
    options.cpu_offload = true;
    DSD_ASSIGN_OR_RETURN(
        const auto session,
        StateDictSession::Create(net, optimizer, &comm, options));
    DSD_ASSIGN_OR_RETURN(const StateDict whole, session->GetOptimizer());
    DSD_RETURN_IF_ERROR(Expect(whole.empty() == (comm.rank() != 0),
                               "in host memory of rank 0"));
    DSD_RETURN_IF_ERROR(session->SetOptimizer(whole));
    const TransferStats stats = session->stats().last_transfer;
    DSD_RETURN_IF_ERROR(
        Expect(comm.rank() == 0 || stats.bytes_received == kParams * 2 * 16,
               "all state is sent"));
    return Expect(stats.messages_sent <= 2 * (comm.size() - 1),
                  "tensors share messages");
  });
}

// Nothing but the dict holds what a get has copied, page-locked or not.
TEST(IssuesTest, PR131270_CopiesEndWithTheDictThatHasThem) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 50, 3));
    StateDictOptions options = Full();
    options.cpu_offload = true;
    options.pin_memory = true;
    options.full_state_dict_ranks = {comm.size() - 1, 0};
    DSD_ASSIGN_OR_RETURN(
        const auto session,
        StateDictSession::Create(job->model, *job->optimizer, &comm, options));
    std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages;
    {
      DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict state, session->Get());
      for (StateDict* const dict : {&state.model, &state.optimizer}) {
        ForEachTensor(
            *dict, "", [&](const std::string& path, TensorValue& value) {
              if (absl::EndsWith(path, "step")) return;  // a count
              storages.push_back(value.Local()->storage().getWeakStorageImpl());
            });
      }
      DSD_RETURN_IF_ERROR(Expect(
          storages.size() == (state.model.empty() ? 0u : 6u), "two and four"));
    }
    for (const auto& storage : storages) {
      DSD_RETURN_IF_ERROR(Expect(storage.expired(), "nothing is left"));
    }
    return absl::OkStatus();
  });
}

TEST(IssuesTest, PR140097_Torchtune1412_ShardsInHostMemoryAreFilledThere) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 0));
    const void* const before = job->w.const_data_ptr();
    // Says nothing about a set: values go to the device of each live shard.
    StateDictOptions options = Full(/*broadcast=*/true);
    options.cpu_offload = true;
    DSD_ASSIGN_OR_RETURN(
        const auto session,
        StateDictSession::Create(job->model, {}, &comm, options));
    DSD_RETURN_IF_ERROR(
        session->SetModel(comm.rank() == 0 ? WholeModel(1000) : StateDict()));
    DSD_RETURN_IF_ERROR(
        Expect(job->w.is_cpu() && job->w.const_data_ptr() == before,
               "the shard is filled where it lies"));
    DSD_RETURN_IF_ERROR(
        Expect(comm.rank() == 0 ||
                   session->stats().last_transfer.bytes_received ==
                       static_cast<int64_t>(job->w.nbytes() + job->b.nbytes()),
               "no whole tensor on the way"));
    return job->Check(comm, 1000, 0);
  });
}

TEST(IssuesTest, VeOmni637_Issue134095_DataEverywhereIsCutLocally) {
  OnRanks([](Communicator& comm) -> absl::Status {
    for (const Way way : kAllWays) {
      DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(way, comm, 0));
      DSD_ASSIGN_OR_RETURN(
          const auto session,
          StateDictSession::Create(job->model, {}, &comm, Full()));
      DSD_RETURN_IF_ERROR(session->SetModel(WholeModel(1000)));
      DSD_RETURN_IF_ERROR(
          Expect(session->stats().last_transfer.bytes_sent == 0, "no bytes"));
      DSD_RETURN_IF_ERROR(job->Check(comm, 1000, 0));
    }
    return absl::OkStatus();
  });
}

// --- Names, wrappers, tied weights.

TEST(IssuesTest, Issue158519_TheDictOfTheCallerIsNotEdited) {
  Build build;
  build.wrappers = {kDdpSegment, kCompileSegment};
  const Model model = MakeComposite(nullptr, build);
  StateDict dict = *CloneStateDict(*GetModelStateDict(*model.module));
  dict.Set("abc", Value(at::ones({1})));
  const std::vector<std::string> keys = KeysOf(dict);
  const StateDict copy = *CloneStateDict(dict);
  StateDictOptions options = Full();
  options.strict = false;
  ASSERT_TRUE(SetModelStateDict(*model.module, dict, nullptr, options).ok());
  EXPECT_EQ(KeysOf(dict), keys);
  EXPECT_TRUE(ExpectEqual(dict, copy, "the dict").ok());
}

TEST(IssuesTest, Torchtitan2622_Issue124546_WrappersInWrappersLeaveNoTrace) {
  const Model plain = MakeComposite(nullptr, Build());
  Build build;
  build.unit_wrapper = kCheckpointSegment;
  build.wrappers = {kCompileSegment, kCheckpointSegment, kDdpSegment};
  const Model wrapped = MakeComposite(nullptr, build);
  EXPECT_EQ(KeysOf(*GetModelStateDict(*wrapped.module)),
            KeysOf(*GetModelStateDict(*plain.module)));
  const auto optimizer =
      MakeOptimizer(OptimizerKind::kAdamW, wrapped.module->parameters());
  const StateDict dict = *GetOptimizerStateDict(*wrapped.module, *optimizer);
  EXPECT_EQ(KeysOf(*dict.Find("state")->get_if<StateDict>()),
            KeysOf(*GetModelStateDict(*plain.module)));
}

TEST(IssuesTest, Torchtitan639_KeysAreRenamedOnTheWayIn) {
  nn::Linear net(2, 1);
  StateDict old;
  old.Set("fc.w", Value(at::full({1, 2}, 3.0)));
  old.Set("fc.b", Value(at::full({1}, 4.0)));
  StateDictOptions options;
  options.key_map = [](absl::string_view key) -> std::string {
    return key == "fc.w" ? "weight" : "bias";
  };
  ASSERT_TRUE(SetModelStateDict(*net, old, nullptr, options).ok());
  EXPECT_TRUE(net->weight.equal(at::full({1, 2}, 3.0)));
}

TEST(IssuesTest, Torchtitan3569_KeysThatNothingHasAreReported) {
  nn::Linear net(2, 1);
  StateDict dict = *GetModelStateDict(*net);
  dict.Set("made.by.a.hook", Value(at::zeros({1})));
  EXPECT_THAT(SetModelStateDict(*net, dict).status(),
              IsStatus(absl::StatusCode::kInvalidArgument,
                       "unexpected keys (1): \"made.by.a.hook\""));
}

struct TokensImpl : nn::Module, FqnModifiers {
  TokensImpl() { register_module("embedding", nn::Linear(3, 2).ptr()); }
  std::vector<FqnModifier> fqn_modifiers(absl::string_view) const override {
    return {{"weight", "embedding"}};
  }
};

TEST(IssuesTest, Issue146053_PR146557_ModifiersHoldForModelAndOptimizer) {
  TokensImpl net;
  optim::AdamW optimizer(net.parameters(), 0.1);
  for (const bool flat : {false, true}) {
    StateDictOptions options;
    options.flatten_optimizer_state_dict = flat;
    const auto state = GetStateDict(net, optimizer, nullptr, options);
    ASSERT_TRUE(state.ok()) << state.status();
    EXPECT_THAT(KeysOf(state->model), testing::ElementsAre("weight", "bias"));
    EXPECT_TRUE(
        SetStateDict(net, optimizer, state->model, state->optimizer).ok());
  }
}

TEST(IssuesTest,
     Issue122792_PR125337_BuffersThatAreNotPersistentUnderAWrapper) {
  const auto inner = std::make_shared<nn::LinearImpl>(2, 1);
  RegisterNonPersistentBuffer(*inner, "cache", at::zeros({4}));
  Wrapper wrapper(inner, kCompileSegment);
  const StateDict dict = *GetModelStateDict(wrapper);
  EXPECT_THAT(KeysOf(dict), testing::ElementsAre("weight", "bias"));
  EXPECT_TRUE(SetModelStateDict(wrapper, dict).ok());
}

TEST(IssuesTest, Issue128011_PR128685_PR148825_TiedWeightsOnAllPaths) {
  for (const bool flat : {false, true}) {
    OnRanks([&](Communicator& comm) -> absl::Status {
      Build build;
      build.shard_root = true;
      const Model model = MakeTied(&comm, build, 9);
      const auto optimizer =
          MakeOptimizer(OptimizerKind::kAdamW, model.module->parameters());
      StateDictOptions options = Full();
      options.flatten_optimizer_state_dict = flat;
      DSD_ASSIGN_OR_RETURN(
          const ModelAndOptimizerStateDict state,
          GetStateDict(*model.module, *optimizer, &comm, options));
      const Model fresh = MakeTied(&comm, build, 9);
      const auto fresh_optimizer =
          MakeOptimizer(OptimizerKind::kAdamW, fresh.module->parameters());
      return SetStateDict(*fresh.module, *fresh_optimizer, state.model,
                          state.optimizer, &comm, options)
          .status();
    });
  }
}

TEST(IssuesTest, Issue188346_AssignKeepsTiesAndOptimizers) {
  const Model model = MakeTied(nullptr, Build(), 5);
  const auto optimizer =
      MakeOptimizer(OptimizerKind::kAdamW, model.module->parameters());
  StateDict dict = *CloneStateDict(*GetModelStateDict(*model.module));
  StateDictOptions options;
  options.assign = true;
  ASSERT_TRUE(SetModelStateDict(*model.module, dict, nullptr, options).ok());
  const StateDict after = *GetModelStateDict(*model.module);
  EXPECT_TRUE(TensorAt(after, "embedding.weight")
                  .is_alias_of(TensorAt(after, "decoder.weight")));
  EXPECT_TRUE(GetOptimizerStateDict(*model.module, *optimizer).ok());
}

TEST(IssuesTest, LlamaFactoryPR10820_TensorsThatWereNotLoadedAreReported) {
  nn::Module net("net");
  net.register_parameter("w", at::empty({2}, at::kMeta));
  RegisterNonPersistentBuffer(net, "cache", at::empty({4}, at::kMeta));
  StateDict dict;
  dict.Set("w", Value(at::ones({2})));
  StateDictOptions options;
  options.assign = true;
  const auto keys = SetModelStateDict(net, dict, nullptr, options);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_THAT(keys->unmaterialized_keys, testing::ElementsAre("cache"));
}

// --- Optimizers on several ranks.

TEST(IssuesTest, Issue121186_SettingAgainAndAgainChangesNothing) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 50, 3));
    for (int i = 0; i < 3; ++i) {
      DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict state,
                           GetStateDict(job->model, *job->optimizer, &comm));
      DSD_RETURN_IF_ERROR(SetStateDict(job->model, *job->optimizer, state.model,
                                       state.optimizer, &comm));
    }
    return job->Check(comm, 50, 3);
  });
}

TEST(IssuesTest, DionPR89_StateThatSomeRanksLackIsThereOnAll) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const auto job,
                         Job::Make(Way::kFsdp, comm, 50, comm.rank() % 2));
    return GetOptimizerStateDict(job->model, *job->optimizer, &comm, Full())
        .status();
  });
}

TEST(IssuesTest, Issue126950_PR128004_PlainStateBecomesShardsLikeTheParameter) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const auto source, Job::Make(Way::kTp, comm, 50, 3));
    DSD_ASSIGN_OR_RETURN(
        const ModelAndOptimizerStateDict whole,
        GetStateDict(source->model, *source->optimizer, &comm, Full()));
    DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 0));
    // No option says that these tensors are whole.
    DSD_RETURN_IF_ERROR(SetStateDict(job->model, *job->optimizer, whole.model,
                                     whole.optimizer, &comm));
    const at::Tensor& moment =
        static_cast<optim::AdamWParamState&>(
            *job->optimizer->state()[job->w.unsafeGetTensorImpl()])
            .exp_avg();
    DSD_RETURN_IF_ERROR(
        Expect(moment.sizes() == job->w.sizes(), "state is as its parameter"));
    return job->Check(comm, 50, 3);
  });
}

TEST(IssuesTest, PR173901_StepsThatFloat32WouldRoundAreKept) {
  nn::Linear net(2, 1);
  optim::AdamW optimizer(net->parameters(), 0.1);
  StateDict dict = *GetOptimizerStateDict(*net, optimizer);
  constexpr int64_t kStep = (int64_t{1} << 24) + 1;
  dict.Find("state")
      ->get_if<StateDict>()
      ->Find("weight")
      ->get_if<StateDict>()
      ->Set("step",
            Value(at::scalar_tensor(static_cast<double>(kStep), at::kDouble)));
  ASSERT_TRUE(SetOptimizerStateDict(*net, optimizer, dict).ok());
  EXPECT_EQ(static_cast<optim::AdamWParamState&>(
                *optimizer.state()[net->weight.unsafeGetTensorImpl()])
                .step(),
            kStep);
}

// --- Collectives, hangs, layouts.

TEST(IssuesTest, Issue157781_Issue125177_OnlyOneRankHasTheData) {
  OnRanks([](Communicator& comm) -> absl::Status {
    for (const int holder : {0, comm.size() - 1}) {
      DSD_ASSIGN_OR_RETURN(const auto source,
                           Job::Make(Way::kFsdp, comm, 50, 3));
      StateDictOptions options = Full();
      options.full_state_dict_ranks = {holder};
      DSD_ASSIGN_OR_RETURN(
          const ModelAndOptimizerStateDict state,
          GetStateDict(source->model, *source->optimizer, &comm, options));
      DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 0));
      // No option says who has it.
      DSD_RETURN_IF_ERROR(SetStateDict(job->model, *job->optimizer, state.model,
                                       state.optimizer, &comm));
      DSD_RETURN_IF_ERROR(job->Check(comm, 50, 3));
    }
    return absl::OkStatus();
  });
}

TEST(IssuesTest, AcceleratePR3982_OtherKeysOnARankAreNamedOnAll) {
  for (const absl::Status& status :
       Statuses(4, [](Communicator& comm) -> absl::Status {
         nn::Module net("net");
         for (int i = 0; i < 30; ++i) {
           if (i == 20 && comm.rank() == 2) continue;
           net.register_parameter(absl::StrCat("p", i), at::ones({4}));
         }
         return GetModelStateDict(net, &comm, Full()).status();
       })) {
    EXPECT_THAT(status,
                IsStatus(absl::StatusCode::kFailedPrecondition,
                         "\"model.p20\" is missing on rank 2 and is on ranks "
                         "0, 1, 3"));
  }
}

TEST(IssuesTest, Issue128444_PR128446_HsdpOptimizerFromOneRank) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const auto source, Job::Make(Way::kHsdp, comm, 50, 3));
    StateDictOptions options = Full();
    options.cpu_offload = true;
    DSD_ASSIGN_OR_RETURN(
        const ModelAndOptimizerStateDict state,
        GetStateDict(source->model, *source->optimizer, &comm, options));
    DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kHsdp, comm, 0));
    DSD_RETURN_IF_ERROR(SetStateDict(job->model, *job->optimizer, state.model,
                                     state.optimizer, &comm, Full(true)));
    return job->Check(comm, 50, 3);
  });
}

TEST(IssuesTest, Issue155680_WholeOptimizerStateIsOnRank0) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 50, 3));
    StateDictOptions options = Full();
    options.cpu_offload = true;
    DSD_ASSIGN_OR_RETURN(
        const StateDict state,
        GetOptimizerStateDict(job->model, *job->optimizer, &comm, options));
    return Expect(state.empty() == (comm.rank() != 0), "rank 0 and only it");
  });
}

TEST(IssuesTest, Torchft282_RanksThatMakeOtherCallsDoNotWaitForEver) {
  const std::vector<absl::Status> statuses =
      Statuses(2, [](Communicator& comm) -> absl::Status {
        DSD_ASSIGN_OR_RETURN(const auto job,
                             Job::Make(Way::kFsdp, comm, 50, 3));
        CallOptions call;
        call.timeout = absl::Seconds(20);
        if (comm.rank() == 0) {
          return GetOptimizerStateDict(job->model, *job->optimizer, &comm,
                                       Full(), call)
              .status();
        }
        return SetModelStateDict(job->model, WholeModel(0), &comm, Full(), call)
            .status();
      });
  for (const absl::Status& status : statuses) EXPECT_FALSE(status.ok());
}

TEST(IssuesTest, Issue149516_PR150239_OffloadWithKeysOfOneRank) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 0));
    StateDict dict;
    if (comm.rank() == 0) {
      dict = WholeModel(50);
      dict.Set("unknown", Value(at::ones({3})));
    }
    StateDictOptions options = Full(/*broadcast=*/true);
    options.cpu_offload = true;
    options.strict = false;
    DSD_ASSIGN_OR_RETURN(const IncompatibleKeys keys,
                         SetModelStateDict(job->model, dict, &comm, options));
    return Expect(keys.unexpected_keys == std::vector<std::string>({"unknown"}),
                  "reported everywhere");
  });
}

TEST(IssuesTest, Issue126285_StrictHoldsForFullDicts) {
  for (const bool broadcast : {false, true}) {
    for (const absl::Status& status :
         Statuses(4, [&](Communicator& comm) -> absl::Status {
           DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 0));
           StateDict dict = WholeModel(50);
           dict.Erase(std::string("b"));
           if (broadcast && comm.rank() != 0) dict = StateDict();
           return SetModelStateDict(job->model, dict, &comm, Full(broadcast))
               .status();
         })) {
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                                   "missing keys (1): \"b\""));
    }
  }
}

TEST(IssuesTest,
     Issue136228_Issue110762_Issue144109_Issue130760_UnevenShardsOfAnyKind) {
  OnRanks([](Communicator& comm) -> absl::Status {
    for (const Way from : kAllWays) {
      DSD_ASSIGN_OR_RETURN(const auto source, Job::Make(from, comm, 50, 3));
      DSD_RETURN_IF_ERROR(source->Check(comm, 50, 3));
      for (const bool full : {false, true}) {
        StateDictOptions options;
        options.full_state_dict = full;
        DSD_ASSIGN_OR_RETURN(
            const ModelAndOptimizerStateDict state,
            GetStateDict(source->model, *source->optimizer, &comm, options));
        for (const Way to : kAllWays) {
          DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(to, comm, 0));
          DSD_RETURN_IF_ERROR(SetStateDict(job->model, *job->optimizer,
                                           state.model, state.optimizer,
                                           &comm));
          DSD_RETURN_IF_ERROR(job->Check(comm, 50, 3));
        }
      }
    }
    return absl::OkStatus();
  });
}

TEST(IssuesTest, Issue126604_PR141571_Issue148252_CheckpointsAreVerified) {
  const std::string directory =
      absl::StrCat(testing::TempDir(), "/issue126604");
  OnRanks(
      [&](Communicator& comm) -> absl::Status {
        DSD_ASSIGN_OR_RETURN(const auto job, Job::Make(Way::kFsdp, comm, 50));
        DSD_ASSIGN_OR_RETURN(const StateDict state,
                             GetModelStateDict(job->model, &comm));
        return SaveCheckpoint(directory, state, &comm).status();
      },
      {2});
  for (const absl::Status& status :
       Statuses(2, [&](Communicator& comm) -> absl::Status {
         nn::Module other("other");
         other.register_parameter("w", at::zeros({7, 4}));
         other.register_parameter("c", at::zeros({3}));
         DSD_ASSIGN_OR_RETURN(StateDict state, GetModelStateDict(other, &comm));
         return LoadCheckpoint(directory, &state, &comm).status();
       })) {
    EXPECT_FALSE(status.ok());
    EXPECT_THAT(std::string(status.message()),
                testing::AllOf(testing::HasSubstr("[7, 5]"),
                               testing::HasSubstr("[7, 4]"),
                               testing::HasSubstr("\"c\"")));
  }
}

TEST(IssuesTest, Issue112167_TensorsOnMetaAreNotDroppedInSilence) {
  nn::Module net("net");
  net.register_parameter("here", at::ones({2}));
  net.register_parameter("elsewhere", at::empty({2}, at::kMeta));
  const auto aliases = GetModelStateDict(net);
  ASSERT_TRUE(aliases.ok());
  EXPECT_THAT(KeysOf(*aliases), testing::ElementsAre("here", "elsewhere"));
  EXPECT_THAT(GetModelStateDict(net, nullptr, Full()).status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "meta"));
}

}  // namespace
}  // namespace dsd::catalogue
