// SPDX-License-Identifier: Apache-2.0
//
// One job over every backend: sharded training, a full get, a save, a set from
// one rank and a load give the same bits, whatever moves them.

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/Context.h"
#include "ATen/ops/ones.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/backends/sim/simulation.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/parallel/fully_shard.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/harness/rank_processes.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adamw.h"

namespace dsd {
namespace {

using Net = FullyShard<torch::nn::LinearImpl>;

constexpr int kRanks = 3;  // shards of 13 rows are uneven

struct Job {
  Job(Communicator& comm, int seed)
      : context(std::make_shared<FullyShardContext>(&comm)) {
    static absl::Mutex mu(absl::kConstInit);
    absl::MutexLock lock(&mu);
    at::manual_seed(seed);
    // Large enough for messages of their own, see kMaxInlinePayload.
    net = MakeFullyShard(torch::nn::Linear(4001, 13), context);
    optimizer = std::make_unique<torch::optim::AdamW>(
        net->parameters(), torch::optim::AdamWOptions(0.05));
  }

  void Train(int rank) {
    for (int step = 0; step < 3; ++step) {
      optimizer->zero_grad();
      const at::Tensor x =
          at::ones({2, 4001}).cumsum(1).mul_(step + rank + 1).sin();
      net->forward(x).pow(2).sum().backward();
      optimizer->step();
    }
  }

  absl::StatusOr<ModelAndOptimizerStateDict> Get(Communicator& comm,
                                                 bool full) {
    StateDictOptions options;
    options.full_state_dict = full;
    return GetStateDict(*net, *optimizer, &comm, options);
  }

  std::shared_ptr<FullyShardContext> context;
  std::shared_ptr<Net> net;
  std::unique_ptr<torch::optim::AdamW> optimizer;
};

StateDict Joined(const ModelAndOptimizerStateDict& got) {
  StateDict state;
  state.Set("model", Value(got.model));
  state.Set("optim", Value(got.optimizer));
  return state;
}

void AddTensors(StateDict state, DigestBuilder& digest) {
  ForEachTensor(state, "", [&](const std::string& name, TensorValue& value) {
    const at::Tensor tensor = value.Local()->contiguous();
    digest.Add(name).Add(
        absl::string_view(static_cast<const char*>(tensor.const_data_ptr()),
                          tensor.numel() * tensor.element_size()));
  });
}

// The bits of everything that comes out of the job on this rank.
absl::StatusOr<std::string> Bits(Communicator& comm,
                                 const std::string& directory) {
  return TorchToStatus([&]() -> absl::StatusOr<std::string> {
    DigestBuilder digest;
    Job trained(comm, 1);
    trained.Train(comm.rank());
    DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict full,
                         trained.Get(comm, /*full=*/true));
    AddTensors(Joined(full), digest);
    DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict shards,
                         trained.Get(comm, /*full=*/false));
    AddTensors(Joined(shards), digest);
    DSD_RETURN_IF_ERROR(
        SaveCheckpoint(directory, Joined(shards), &comm).status());

    Job told(comm, 2);
    StateDictOptions from_one;
    from_one.full_state_dict = true;
    from_one.broadcast_from_rank0 = true;
    if (comm.rank() != 0) full = {};
    DSD_RETURN_IF_ERROR(SetStateDict(*told.net, *told.optimizer, full.model,
                                     full.optimizer, &comm, from_one)
                            .status());
    told.Train(comm.rank());
    DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict after,
                         told.Get(comm, /*full=*/false));
    AddTensors(Joined(after), digest);

    Job loaded(comm, 3);
    DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict aliases,
                         loaded.Get(comm, /*full=*/false));
    StateDict target = Joined(aliases);
    DSD_RETURN_IF_ERROR(LoadCheckpoint(directory, &target, &comm).status());
    AddTensors(target, digest);
    return digest.Finish().Hex();
  });
}

DSD_RANK_PROGRAM(JobOverABackend) {
  // The argument is the backend and a directory.
  const std::string& argument = rank.argument();
  const size_t space = argument.find(' ');
  DSD_ASSIGN_OR_RETURN(const auto comm,
                       rank.Connect(argument.substr(0, space)));
  DSD_ASSIGN_OR_RETURN(const std::string bits,
                       Bits(*comm, argument.substr(space + 1)));
  rank.Record("bits", bits);
  return comm->Shutdown();
}

std::string Directory(absl::string_view backend) {
  return absl::StrCat(testing::TempDir(), "/same_bits_", backend);
}

TEST(SameBitsTest, OfOneJobOverEveryBackend) {
  std::vector<std::string> expected(kRanks);
  ASSERT_THAT(RunRankThreads(kRanks,
                             [&](Communicator& comm) -> absl::Status {
                               DSD_ASSIGN_OR_RETURN(
                                   expected[comm.rank()],
                                   Bits(comm, Directory("local")));
                               return absl::OkStatus();
                             }),
              AllOk());
  EXPECT_NE(expected[0], expected[1]);  // ranks hold different shards

  for (const std::string backend : {"gloo", "ucx", "c10d"}) {
    RankRunOptions options;
    options.argument = absl::StrCat(backend, " ", Directory(backend));
    const std::vector<RankResult> results =
        RunRanks(kRanks, "JobOverABackend", options);
    ASSERT_THAT(results, AllRanksOk()) << backend;
    for (int rank = 0; rank < kRanks; ++rank) {
      EXPECT_EQ(results[rank].values.at("bits"), expected[rank])
          << backend << ", rank " << rank;
    }
  }

  std::vector<std::string> simulated(kRanks);
  sim::Simulation simulation(sim::SimulationOptions::FromSeed(7));
  const sim::Outcome outcome =
      simulation.Run(kRanks, [&](Communicator& comm) -> absl::Status {
        DSD_ASSIGN_OR_RETURN(simulated[comm.rank()], Bits(comm, "/simulated"));
        return absl::OkStatus();
      });
  EXPECT_EQ(outcome.run, absl::OkStatus());
  EXPECT_THAT(outcome.Survivors(), AllOk());
  EXPECT_EQ(simulated, expected);
}

}  // namespace
}  // namespace dsd
