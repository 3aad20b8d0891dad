// SPDX-License-Identifier: Apache-2.0
//
// State dicts through checkpoints: on one rank, and from 4 ranks to 2.

#include "dsd/frontends/torch/checkpoint.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/equal.h"
#include "ATen/ops/ones.h"
#include "ATen/ops/zeros.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
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

std::string NewDirectory() {
  static int count = 0;
  return absl::StrCat(
      testing::TempDir(), "/checkpoint_",
      testing::UnitTest::GetInstance()->current_test_info()->name(), "_",
      count++);
}

struct Net : nn::Module {
  Net()
      : first(register_module("first", nn::Linear(3, 5))),
        second(register_module("second", nn::Linear(5, 2))) {}
  nn::Linear first;
  nn::Linear second;
};

absl::StatusOr<StateDict> JobState(nn::Module& net, optim::Optimizer& optimizer,
                                   Communicator* comm, int64_t step) {
  DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict got,
                       GetStateDict(net, optimizer, comm));
  StateDict state;
  state.Set("model", Value(std::move(got.model)));
  state.Set("optim", Value(std::move(got.optimizer)));
  state.Set("step", Value(step));
  return state;
}

// Replaces the parameters of `net` by this rank's rows of them.
absl::Status Cut(nn::Module& net, int ranks, int rank) {
  absl::flat_hash_set<const void*> cut;  // tied ones come twice
  for (auto& item : net.named_parameters()) {
    at::Tensor& param = item.value();
    if (!cut.insert(param.unsafeGetTensorImpl()).second) continue;
    Dims shape(param.sizes().begin(), param.sizes().end());
    DSD_ASSIGN_OR_RETURN(
        const Layout layout,
        Layout::FromPlacements(shape, DeviceMesh::Iota({ranks}), {Shard(0)}));
    const std::vector<LocalBox> boxes = layout.BoxesOf(rank);
    const int64_t begin = boxes.empty() ? 0 : boxes[0].box.lo[0];
    const int64_t rows = (*layout.LocalShape(rank))[0];
    param.set_data(param.detach().narrow(0, begin, rows).clone());
    DSD_RETURN_IF_ERROR(ShardingTable::Global().Set(param, layout, rank));
  }
  return absl::OkStatus();
}

// A model, its optimizer and numbers in all of their state, the same whole
// values whatever the number of ranks.
struct Trained {
  absl::Status Init(int ranks, int rank, double scale) {
    int64_t start = 0;
    for (at::Tensor& param : net.parameters()) {
      param.detach().copy_(at::ones({param.numel()})
                               .cumsum(0)
                               .add_(start)
                               .mul_(scale)
                               .view(param.sizes()));
      start += param.numel();
    }
    optimizer = std::make_unique<optim::AdamW>(net.parameters(),
                                               optim::AdamWOptions(0.01));
    for (at::Tensor& param : net.parameters()) {
      param.mutable_grad() = param.detach() * 0.5;
    }
    optimizer->step();
    optimizer->zero_grad();
    // Cut the state as the parameters are cut.
    for (at::Tensor& param : net.parameters()) {
      auto& state = static_cast<optim::AdamWParamState&>(
          *optimizer->state()[param.unsafeGetTensorImpl()]);
      const int64_t size = param.size(0);
      const int64_t chunk = (size + ranks - 1) / ranks;
      const int64_t begin = std::min(rank * chunk, size);
      const int64_t rows = std::min(begin + chunk, size) - begin;
      state.exp_avg(state.exp_avg().narrow(0, begin, rows).clone());
      state.exp_avg_sq(state.exp_avg_sq().narrow(0, begin, rows).clone());
    }
    return Cut(net, ranks, rank);
  }

  Net net;
  std::unique_ptr<optim::AdamW> optimizer;
};

// A decoder that is the encoder, and a bias of the same values that is not.
struct TiedNet : nn::Module {
  TiedNet()
      : encoder(register_parameter("encoder", at::ones({6, 4}).cumsum(0))),
        bias(register_parameter("bias", at::ones({6, 4}).cumsum(0))),
        decoder(register_parameter("decoder", encoder)) {}
  at::Tensor encoder;
  at::Tensor bias;
  at::Tensor decoder;
};

TEST(CheckpointTest, TiedTensorsAreOneInAnArchive) {
  for (const int ranks : {1, 2, 3}) {
    const std::string directory = NewDirectory();
    EXPECT_THAT(RunRankThreads(
                    ranks,
                    [&](Communicator& comm) -> absl::Status {
                      TiedNet net;
                      DSD_RETURN_IF_ERROR(Cut(net, ranks, comm.rank()));
                      DSD_ASSIGN_OR_RETURN(StateDict state,
                                           GetModelStateDict(net, &comm));
                      return ExportCheckpoint(absl::StrCat(directory, ".pt"),
                                              checkpoint::Format::kTorchArchive,
                                              state, &comm)
                          .status();
                    }),
                AllOk());
    const auto opened =
        checkpoint::Checkpoint::Open(absl::StrCat(directory, ".pt"));
    ASSERT_TRUE(opened.ok()) << opened.status();
    const Catalog& catalog = (*opened)->catalog();
    ASSERT_EQ(catalog.size(), 3);
    const size_t encoder = *catalog.Find("encoder");
    const size_t decoder = *catalog.Find("decoder");
    const size_t bias = *catalog.Find("bias");
    const std::vector<size_t>& same_as = (*opened)->same_as();
    EXPECT_EQ(same_as[decoder], same_as[encoder]) << ranks;
    EXPECT_EQ(same_as[bias], bias) << ranks;
  }
}

// One rank has two names for one memory, the other has not.
TEST(CheckpointTest, TiesAreTiesOnAllRanks) {
  const std::string path = absl::StrCat(NewDirectory(), ".pt");
  EXPECT_THAT(
      RunRankThreads(
          2,
          [&](Communicator& comm) -> absl::Status {
            const at::Tensor one = at::ones({2, 3});
            StateDict state;
            state.Set("a", Value(TensorValue(one)));
            state.Set("b",
                      Value(TensorValue(comm.rank() == 0 ? one : one.clone())));
            state.Set("c", Value(TensorValue(one)));
            return ExportCheckpoint(path, checkpoint::Format::kTorchArchive,
                                    state, &comm)
                .status();
          }),
      AllOk());
  const auto opened = checkpoint::Checkpoint::Open(path);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const auto first_of = [&](const char* key) {
    return (*opened)->same_as()[*(*opened)->catalog().Find(key)];
  };
  EXPECT_EQ(first_of("c"), first_of("a"));
  EXPECT_NE(first_of("b"), first_of("a"));
}

TEST(CheckpointTest, AnArchiveKeepsTheNestingOfADict) {
  StateDict of_one;
  of_one.Set("exp_avg", Value(TensorValue(at::ones({2}))));
  StateDict states;
  states.Set(PathSegment(int64_t{0}), Value(std::move(of_one)));
  StateDict state;
  state.Set("state", Value(std::move(states)));
  state.Set("none", Value(StateDict()));
  const std::string path = absl::StrCat(NewDirectory(), ".pt");
  const auto report =
      ExportCheckpoint(path, checkpoint::Format::kTorchArchive, state);
  ASSERT_TRUE(report.ok()) << report.status();
  const auto opened = checkpoint::Checkpoint::Open(path);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const Nesting& nesting = (*opened)->nesting();
  EXPECT_THAT(nesting.number_keyed, testing::ElementsAre(Path{"state"}));
  EXPECT_THAT(nesting.empty, testing::ElementsAre(Path{"none"}));
}

TEST(CheckpointTest, ReadsWhatIsThereWithoutATarget) {
  StateDict of_one;
  of_one.Set("exp_avg", Value(TensorValue(at::ones({2, 3}).cumsum(1))));
  StateDict states;
  states.Set(PathSegment(int64_t{0}), Value(std::move(of_one)));
  StateDict state;
  state.Set("state", Value(std::move(states)));
  state.Set("none", Value(StateDict()));
  state.Set("list", Value(Value::List{Value(TensorValue(at::zeros({4}))),
                                      Value(int64_t{5})}));
  state.Set("name", Value("x"));
  const auto digests = ComputeDigests(state);
  ASSERT_TRUE(digests.ok()) << digests.status();
  const std::string dcp = NewDirectory();
  ASSERT_TRUE(SaveCheckpoint(dcp, state).ok());
  const std::string archive = absl::StrCat(NewDirectory(), ".pt");
  ASSERT_TRUE(
      ExportCheckpoint(archive, checkpoint::Format::kTorchArchive, state).ok());
  for (const std::string& path : {dcp, archive}) {
    EXPECT_THAT(
        RunRankThreads(
            2,
            [&](Communicator& comm) -> absl::Status {
              DSD_ASSIGN_OR_RETURN(const StateDict read,
                                   ReadCheckpoint(path, &comm));
              DSD_ASSIGN_OR_RETURN(const auto found, ComputeDigests(read));
              EXPECT_TRUE(found.whole == digests->whole) << path;
              EXPECT_EQ(read.contains("none"), path == archive);
              const auto& keys = *read.Find("state")->get_if<StateDict>();
              EXPECT_EQ(keys.Find(PathSegment(int64_t{0})) != nullptr,
                        path == archive);
              EXPECT_EQ(read.Find("list")->get_if<Value::List>()->size(), 2);

              ReadOptions only;
              only.wanted = [](absl::string_view key) { return key == "name"; };
              DSD_ASSIGN_OR_RETURN(const StateDict name,
                                   ReadCheckpoint(path, &comm, only));
              EXPECT_EQ(name.size(), 1);
              EXPECT_EQ(*name.Find("name")->get_if<std::string>(), "x");
              return absl::OkStatus();
            }),
        AllOk());
  }
  // Not there for one rank: for none.
  EXPECT_THAT(RunRankThreads(
                  2,
                  [&](Communicator& comm) {
                    return ReadCheckpoint(
                               comm.rank() == 0 ? dcp : dcp + "/nowhere", &comm)
                        .status();
                  }),
              testing::Each(IsStatus(absl::StatusCode::kNotFound, "nowhere")));
}

TEST(CheckpointTest, ShardsAreExportedWholeAndLoaded) {
  for (const auto format :
       {checkpoint::Format::kSafetensors, checkpoint::Format::kTorchArchive}) {
    const std::string path = absl::StrCat(
        NewDirectory(),
        format == checkpoint::Format::kSafetensors ? ".safetensors" : ".pt");
    EXPECT_THAT(
        RunRankThreads(
            4,
            [&](Communicator& comm) -> absl::Status {
              Trained saved;
              DSD_RETURN_IF_ERROR(saved.Init(4, comm.rank(), 0.1));
              DSD_ASSIGN_OR_RETURN(StateDict state,
                                   GetModelStateDict(saved.net, &comm));
              return ExportCheckpoint(path, format, state, &comm).status();
            }),
        AllOk());
    EXPECT_THAT(
        RunRankThreads(
            2,
            [&](Communicator& comm) -> absl::Status {
              Trained live;
              DSD_RETURN_IF_ERROR(live.Init(2, comm.rank(), 7));
              DSD_ASSIGN_OR_RETURN(StateDict state,
                                   GetModelStateDict(live.net, &comm));
              DSD_RETURN_IF_ERROR(LoadCheckpoint(path, &state, &comm).status());
              Trained expected;
              DSD_RETURN_IF_ERROR(expected.Init(2, comm.rank(), 0.1));
              for (const char* name : {"first.weight", "second.bias"}) {
                const auto params = live.net.named_parameters();
                EXPECT_TRUE(
                    at::equal(params[name].detach(),
                              expected.net.named_parameters()[name].detach()))
                    << name;
              }
              return absl::OkStatus();
            }),
        AllOk());
  }
  StateDict with_number;
  with_number.Set("step", Value(int64_t{1}));
  EXPECT_EQ(ExportCheckpoint(absl::StrCat(NewDirectory(), ".safetensors"),
                             checkpoint::Format::kSafetensors, with_number)
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(CheckpointTest, OneRankLoadsInPlace) {
  const std::string directory = NewDirectory();
  Trained saved;
  ASSERT_TRUE(saved.Init(1, 0, 0.1).ok());
  const auto state = JobState(saved.net, *saved.optimizer, nullptr, 500);
  ASSERT_TRUE(state.ok()) << state.status();
  const auto report = SaveCheckpoint(directory, *state);
  ASSERT_TRUE(report.ok()) << report.status();

  Trained live;
  ASSERT_TRUE(live.Init(1, 0, 7).ok());
  auto target = JobState(live.net, *live.optimizer, nullptr, 0);
  ASSERT_TRUE(target.ok());
  const auto loaded = LoadCheckpoint(directory, &*target);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(*target->Find("step")->get_if<int64_t>(), 500);
  // The dict aliases the model.
  EXPECT_TRUE(at::equal(live.net.first->weight.detach(),
                        saved.net.first->weight.detach()));
  const auto a = ComputeDigests(*state);
  const auto b = ComputeDigests(*target);
  ASSERT_TRUE(a.ok() && b.ok()) << a.status() << b.status();
  EXPECT_TRUE(a->whole == b->whole);
}

TEST(CheckpointTest, TrainingGoesOnWhileASaveIsUnderWay) {
  const std::string directory = NewDirectory();
  ASSERT_THAT(
      RunRankThreads(
          2,
          [&](Communicator& comm) -> absl::Status {
            DSD_ASSIGN_OR_RETURN(const auto saver,
                                 checkpoint::Saver::Create(&comm));
            Trained live;
            DSD_RETURN_IF_ERROR(live.Init(2, comm.rank(), 0.1));
            DSD_ASSIGN_OR_RETURN(
                const StateDict state,
                JobState(live.net, *live.optimizer, &comm, 500));
            DSD_ASSIGN_OR_RETURN(const auto before,
                                 ComputeDigests(state, &comm));
            for (int i = 0; i < 2; ++i) {
              DSD_RETURN_IF_ERROR(StartCheckpoint(*saver, directory, state));
            }
            for (at::Tensor& param : live.net.parameters()) {
              param.detach().zero_();
            }
            DSD_RETURN_IF_ERROR(saver->Wait().status());
            DSD_ASSIGN_OR_RETURN(const auto opened,
                                 checkpoint::Checkpoint::Open(directory));
            DSD_ASSIGN_OR_RETURN(const auto saved,
                                 checkpoint::ComputeDigests(*opened));
            return saved.whole == before.whole
                       ? absl::OkStatus()
                       : absl::InternalError("other values");
          }),
      AllOk());
}

TEST(CheckpointTest, FourRanksToTwoAndToNew) {
  const std::string directory = NewDirectory();
  Digest128 digest;
  ASSERT_THAT(
      RunRankThreads(4,
                     [&](Communicator& comm) -> absl::Status {
                       Trained saved;
                       DSD_RETURN_IF_ERROR(saved.Init(4, comm.rank(), 0.1));
                       DSD_ASSIGN_OR_RETURN(
                           const StateDict state,
                           JobState(saved.net, *saved.optimizer, &comm, 500));
                       DSD_RETURN_IF_ERROR(
                           SaveCheckpoint(directory, state, &comm));
                       DSD_ASSIGN_OR_RETURN(const auto digests,
                                            ComputeDigests(state, &comm));
                       if (comm.rank() == 0) digest = digests.whole;
                       return absl::OkStatus();
                     }),
      AllOk());
  for (const int ranks : {1, 2, 4}) {
    EXPECT_THAT(
        RunRankThreads(
            ranks,
            [&](Communicator& comm) -> absl::Status {
              // A new job: its optimizer has no state yet.
              Net net;
              DSD_RETURN_IF_ERROR(Cut(net, ranks, comm.rank()));
              optim::AdamW optimizer(net.parameters());
              DSD_ASSIGN_OR_RETURN(StateDict state,
                                   JobState(net, optimizer, &comm, 0));
              DSD_RETURN_IF_ERROR(LoadCheckpoint(directory, &state, &comm));
              DSD_RETURN_IF_ERROR(SetStateDict(
                  net, optimizer, *state.Find("model")->get_if<StateDict>(),
                  *state.Find("optim")->get_if<StateDict>(), &comm));
              DSD_ASSIGN_OR_RETURN(
                  const StateDict now,
                  JobState(net, optimizer, &comm,
                           *state.Find("step")->get_if<int64_t>()));
              DSD_ASSIGN_OR_RETURN(const auto digests,
                                   ComputeDigests(now, &comm));
              return digests.whole == digest
                         ? absl::OkStatus()
                         : absl::InternalError("other values");
            }),
        AllOk())
        << ranks << " ranks";
  }
}

TEST(CheckpointTest, CheckpointOfAnotherModelListsAllAndChangesNothing) {
  const std::string directory = NewDirectory();
  nn::Linear saved(3, 2);
  StateDict state;
  state.Set("model", Value(*GetModelStateDict(*saved)));
  ASSERT_TRUE(SaveCheckpoint(directory, state).ok());
  Net live;
  const at::Tensor before = live.first->weight.detach().clone();
  StateDict target;
  target.Set("model", Value(*GetModelStateDict(live)));
  const absl::Status status = LoadCheckpoint(directory, &target).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  for (const char* key :
       {"model.weight", "model.bias", "model.first.weight", "model.first.bias",
        "model.second.weight", "model.second.bias"}) {
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr(key));
  }
  EXPECT_TRUE(at::equal(live.first->weight.detach(), before));
}

// A dict that one rank cannot save is an error on all ranks, and no checkpoint.
// A model in half precision from a checkpoint in full, and the reverse, onto
// shards.
TEST(CheckpointTest, CastsBetweenModelsOfTwoTypes) {
  for (const auto& [from, to] : {std::pair(c10::kFloat, c10::kBFloat16),
                                 std::pair(c10::kBFloat16, c10::kFloat)}) {
    const std::string directory = NewDirectory();
    Trained saved;
    ASSERT_TRUE(saved.Init(1, 0, 0.1).ok());
    saved.net.to(from);
    const auto got = GetModelStateDict(saved.net);
    ASSERT_TRUE(got.ok()) << got.status();
    StateDict state;
    state.Set("model", Value(*got));
    ASSERT_TRUE(SaveCheckpoint(directory, state).ok());
    const auto load = [&, to = to](Communicator& comm) -> absl::Status {
      Net net;
      net.to(to);
      DSD_RETURN_IF_ERROR(Cut(net, comm.size(), comm.rank()));
      DSD_ASSIGN_OR_RETURN(StateDict model, GetModelStateDict(net, &comm));
      StateDict target;
      target.Set("model", Value(std::move(model)));
      EXPECT_EQ(LoadCheckpoint(directory, &target, &comm).status().code(),
                absl::StatusCode::kFailedPrecondition);
      checkpoint::LoadOptions options;
      options.dtype_policy = DTypePolicy::kCast;
      DSD_ASSIGN_OR_RETURN(const checkpoint::LoadReport report,
                           LoadCheckpoint(directory, &target, &comm, options));
      EXPECT_EQ(report.cast, 4);
      EXPECT_TRUE(report.verified);
      const auto whole = saved.net.named_parameters();
      for (const auto& item : net.named_parameters()) {
        const at::Tensor& param = whole[item.key()];
        const int64_t chunk = (param.size(0) + comm.size() - 1) / comm.size();
        EXPECT_TRUE(
            at::equal(item.value().detach(),
                      param.detach().to(to).narrow(0, comm.rank() * chunk,
                                                   item.value().size(0))))
            << item.key();
      }
      return absl::OkStatus();
    };
    EXPECT_THAT(RunRankThreads(2, load), AllOk());
  }
}

TEST(CheckpointTest, DictThatCannotBeSavedOnOneRank) {
  const std::string directory = NewDirectory();
  const std::vector<absl::Status> results = RunRankThreads(
      2,
      [&](Communicator& comm) -> absl::Status {
        StateDict state;
        state.Set("x", comm.rank() == 0 ? Value(TensorValue(at::zeros({2})))
                                        : Value(TensorValue(at::Tensor())));
        const absl::Status status =
            SaveCheckpoint(directory, state, &comm).status();
        DSD_RETURN_IF_ERROR(comm.Shutdown());
        return status;
      },
      {absl::Seconds(60), {}, /*shutdown=*/false});
  for (const absl::Status& status : results) {
    EXPECT_THAT(status,
                IsStatus(absl::StatusCode::kInvalidArgument, "rank 1: \"x\""));
  }
  StateDict target;
  EXPECT_EQ(LoadCheckpoint(directory, &target).status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace dsd
