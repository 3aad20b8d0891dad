// SPDX-License-Identifier: Apache-2.0
//
// PyTorch's test_fsdp_dsd.py, by the names of its tests. FSDP1's flat
// parameters are layouts like any other here.

#include <string>
#include <utility>
#include <vector>

#include "ATen/Functions.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/catalogue/fixtures.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/optim/adamw.h"

namespace dsd::catalogue {
namespace {

namespace nn = torch::nn;
namespace optim = torch::optim;

struct Param {
  const char* name;
  Dims shape;
};
// Column-wise and row-wise layers of tensor parallelism, and a bias.
const std::vector<Param>& Params() {
  static const auto* const params = new std::vector<Param>{
      {"up", {10, 6}}, {"up_bias", {10}}, {"down", {5, 10}}};
  return *params;
}

enum class Kind { kPlain, kFsdp, kHsdp, kTp, kFsdpTp, kFlat };
constexpr Kind kAllKinds[] = {Kind::kPlain, Kind::kFsdp,   Kind::kHsdp,
                              Kind::kTp,    Kind::kFsdpTp, Kind::kFlat};

// The layout of parameter `p` over `ranks` ranks; of kPlain there is none.
Layout LayoutFor(Kind kind, size_t p, int ranks) {
  const Dims& shape = Params()[p].shape;
  const DeviceMesh line = DeviceMesh::Iota({ranks});
  const int64_t pairs = ranks % 2 == 0 ? 2 : 1;
  const DeviceMesh square = DeviceMesh::Iota({ranks / pairs, pairs});
  // Rows of "up" and its bias, columns of "down".
  const bool columns = p == 2;
  switch (kind) {
    case Kind::kHsdp:
      return *Layout::FromPlacements(shape, square, {Replicate(), Shard(0)});
    case Kind::kTp:
      return *Layout::FromPlacements(shape, line, {Shard(columns ? 1 : 0)});
    case Kind::kFsdpTp:
      return *Layout::FromPlacements(
          shape, square,
          columns ? std::vector<Placement>{Shard(0), Shard(1)}
                  : std::vector<Placement>{StridedShard(0, pairs), Shard(0)});
    case Kind::kFlat: {
      int64_t size = 1;
      for (const int64_t extent : shape) size *= extent;
      const int64_t each = (size + ranks - 1) / ranks;
      std::vector<FlatInterval> intervals;
      for (int rank = 0; rank < ranks; ++rank) {
        intervals.push_back({rank, std::min(rank * each, size),
                             std::min((rank + 1) * each, size)});
      }
      return *Layout::FromFlatIntervals(shape, std::move(intervals));
    }
    default:
      return *Layout::FromPlacements(shape, line, {Shard(0)});
  }
}

struct LaidOut : nn::Module {
  LaidOut(Kind kind, Communicator& comm) {
    for (size_t p = 0; p < Params().size(); ++p) {
      Dims local = Params()[p].shape;
      if (kind != Kind::kPlain) {
        local = *LayoutFor(kind, p, comm.size()).LocalShape(comm.rank());
      }
      const at::Tensor parameter = register_parameter(
          Params()[p].name,
          at::zeros(at::IntArrayRef(local.data(), local.size())));
      if (kind == Kind::kPlain) continue;
      status.Update(ShardingTable::Global().Set(
          parameter, LayoutFor(kind, p, comm.size()), comm.rank()));
    }
    optimizer =
        std::make_unique<optim::AdamW>(parameters(), optim::AdamWOptions(0.01));
  }
  absl::Status status;
  std::unique_ptr<optim::AdamW> optimizer;
};

// A model and moments with values of their own everywhere.
absl::StatusOr<ModelAndOptimizerStateDict> WholeState() {
  nn::Module model;
  double value = 1;
  for (const Param& param : Params()) {
    model.register_parameter(
        param.name,
        at::arange(value, value + 1000)
            .slice(0, 0,
                   at::empty(
                       at::IntArrayRef(param.shape.data(), param.shape.size()))
                       .numel())
            .to(at::kFloat)
            .view(at::IntArrayRef(param.shape.data(), param.shape.size())));
    value += 1000;
  }
  optim::AdamW optimizer(model.parameters(), optim::AdamWOptions(0.02));
  for (const at::Tensor& parameter : model.parameters()) {
    parameter.mutable_grad() = parameter.detach().sin();
  }
  optimizer.step();
  DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict live,
                       GetStateDict(model, optimizer));
  ModelAndOptimizerStateDict whole;
  DSD_ASSIGN_OR_RETURN(whole.model, CloneStateDict(live.model));
  DSD_ASSIGN_OR_RETURN(whole.optimizer, CloneStateDict(live.optimizer));
  return whole;
}

StateDict AsOne(ModelAndOptimizerStateDict parts) {
  StateDict state;
  state.Set("model", Value(std::move(parts.model)));
  state.Set("optim", Value(std::move(parts.optimizer)));
  return state;
}

absl::Status ExpectWhole(LaidOut& net, Communicator& comm,
                         const ModelAndOptimizerStateDict& whole,
                         absl::string_view what) {
  StateDictOptions options;
  options.full_state_dict = true;
  DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict found,
                       GetStateDict(net, *net.optimizer, &comm, options));
  DSD_RETURN_IF_ERROR(ExpectEqual(found.model, whole.model, what));
  return ExpectEqual(found.optimizer, whole.optimizer, what);
}

// Saves the state in the layout `from` on 4 ranks, as shards or whole, and
// loads it into the layout `to` on 4 and on 2 ranks.
void SaveAndLoad(Kind from, bool full, Kind to) {
  const std::string directory =
      absl::StrCat(testing::TempDir(), "/resharding_", static_cast<int>(from),
                   full, static_cast<int>(to));
  SCOPED_TRACE(directory);
  OnRanks(
      [&](Communicator& comm) -> absl::Status {
        DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict whole,
                             WholeState());
        LaidOut net(from, comm);
        DSD_RETURN_IF_ERROR(net.status);
        DSD_RETURN_IF_ERROR(SetStateDict(net, *net.optimizer, whole.model,
                                         whole.optimizer, &comm)
                                .status());
        DSD_RETURN_IF_ERROR(ExpectWhole(net, comm, whole, "set"));
        StateDictOptions options;
        options.full_state_dict = full;
        DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict state,
                             GetStateDict(net, *net.optimizer, &comm, options));
        return SaveCheckpoint(directory, AsOne(std::move(state)), &comm)
            .status();
      },
      {4});
  OnRanks(
      [&](Communicator& comm) -> absl::Status {
        DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict whole,
                             WholeState());
        LaidOut net(to, comm);
        DSD_RETURN_IF_ERROR(net.status);
        DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict live,
                             GetStateDict(net, *net.optimizer, &comm));
        StateDict state = AsOne(std::move(live));
        DSD_RETURN_IF_ERROR(LoadCheckpoint(directory, &state, &comm).status());
        DSD_RETURN_IF_ERROR(
            SetStateDict(net, *net.optimizer,
                         *state.Find("model")->get_if<StateDict>(),
                         *state.Find("optim")->get_if<StateDict>(), &comm)
                .status());
        return ExpectWhole(net, comm, whole, "loaded");
      },
      {4, 2});
}

TEST(TestFullyShardWithDistributedStateDict,
     test_1d_fsdp_get_model_state_dict) {
  for (const bool units : {false, true}) {
    OnRanks([&](Communicator& comm) -> absl::Status {
      const Model plain = MakeComposite(nullptr, Build());
      Build build;
      build.shard_root = true;
      build.shard_units = units;
      const Model model = MakeComposite(&comm, build);
      // After a forward() the parameters are shards again.
      model.forward(at::ones({2, kWidth}));
      DSD_ASSIGN_OR_RETURN(const StateDict whole,
                           GetModelStateDict(*plain.module));
      DSD_ASSIGN_OR_RETURN(const StateDict shards,
                           GetModelStateDict(*model.module, &comm));
      DSD_RETURN_IF_ERROR(
          Expect(KeysOf(shards) == KeysOf(whole), "keys are equal"));
      for (const std::string& key : KeysOf(whole)) {
        const at::Tensor full = TensorAt(whole, key);
        const int64_t rows = (full.size(0) + comm.size() - 1) / comm.size();
        const int64_t begin = std::min(rows * comm.rank(), full.size(0));
        const int64_t end = std::min(begin + rows, full.size(0));
        DSD_RETURN_IF_ERROR(
            Expect(TensorAt(shards, key).equal(full.slice(0, begin, end)),
                   absl::StrCat(key, " is this rank's part")));
      }
      return absl::OkStatus();
    });
  }
}

TEST(TestFullyShardWithDistributedStateDict,
     test_1d_fsdp_cpu_offload_full_model_state_dict) {
  OnRanks([](Communicator& comm) -> absl::Status {
    const Model plain = MakeComposite(nullptr, Build());
    Build build;
    build.shard_root = true;
    build.shard_units = true;
    const Model model = MakeComposite(&comm, build);
    StateDictOptions options;
    options.full_state_dict = true;
    options.cpu_offload = true;
    DSD_ASSIGN_OR_RETURN(const StateDict found,
                         GetModelStateDict(*model.module, &comm, options));
    DSD_ASSIGN_OR_RETURN(const StateDict whole,
                         GetModelStateDict(*plain.module));
    return ExpectEqual(found, comm.rank() == 0 ? whole : StateDict(), "whole");
  });
}

TEST(TestFullyShardWithDistributedStateDict,
     test_save_with_fsdp1_and_load_with_fsdp2) {
  SaveAndLoad(Kind::kFlat, /*full=*/true, Kind::kFsdp);
  SaveAndLoad(Kind::kFlat, /*full=*/false, Kind::kFsdp);
}

TEST(TestFullyShardWithDistributedStateDict,
     test_save_with_fsdp1_and_load_with_fsdp2_tp) {
  SaveAndLoad(Kind::kPlain, /*full=*/true, Kind::kFsdpTp);
  SaveAndLoad(Kind::kFlat, /*full=*/false, Kind::kFsdpTp);
}

TEST(TestFullyShardWithDistributedStateDict,
     test_save_with_tp_and_load_with_fsdp2_tp) {
  SaveAndLoad(Kind::kPlain, /*full=*/true, Kind::kFsdpTp);
  SaveAndLoad(Kind::kTp, /*full=*/false, Kind::kFsdpTp);
}

TEST(TestFullyShardWithDistributedStateDict,
     test_save_with_fsdp2_tp_and_load_with_tp) {
  SaveAndLoad(Kind::kFsdpTp, /*full=*/true, Kind::kTp);
  SaveAndLoad(Kind::kFsdpTp, /*full=*/false, Kind::kTp);
}

// What the tests above do not pair, in memory.
TEST(TestFullyShardWithDistributedStateDict, AnyLayoutFillsAnyOther) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict whole, WholeState());
    for (const Kind from : kAllKinds) {
      LaidOut source(from, comm);
      DSD_RETURN_IF_ERROR(source.status);
      DSD_RETURN_IF_ERROR(SetStateDict(source, *source.optimizer, whole.model,
                                       whole.optimizer, &comm)
                              .status());
      DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict shards,
                           GetStateDict(source, *source.optimizer, &comm));
      for (const Kind to : kAllKinds) {
        LaidOut target(to, comm);
        DSD_RETURN_IF_ERROR(target.status);
        DSD_RETURN_IF_ERROR(SetStateDict(target, *target.optimizer,
                                         shards.model, shards.optimizer, &comm)
                                .status());
        DSD_RETURN_IF_ERROR(
            ExpectWhole(target, comm, whole,
                        absl::StrCat(static_cast<int>(from), " to ",
                                     static_cast<int>(to))));
      }
    }
    return absl::OkStatus();
  });
}

}  // namespace
}  // namespace dsd::catalogue
