// SPDX-License-Identifier: Apache-2.0
//
// A FullyShard model trained on some ranks, saved, and trained on by others:
// the dicts have the names of the unwrapped model, and the training goes on bit
// for bit.

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ATen/Context.h"
#include "ATen/ops/equal.h"
#include "ATen/ops/ones.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/parallel/fully_shard.h"
#include "dsd/frontends/torch/checkpoint.h"
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

struct NetImpl : nn::Module {
  explicit NetImpl(const std::shared_ptr<FullyShardContext>& context)
      : first(register_module("first",
                              MakeFullyShard(nn::Linear(3, 5), context))),
        second(register_module("second", nn::Linear(5, 2))) {}

  at::Tensor forward(at::Tensor x) {
    return second->forward(first->forward(std::move(x)).tanh());
  }

  std::shared_ptr<FullyShard<nn::LinearImpl>> first;
  nn::Linear second;
};

// The parameters of all ranks start equal.
absl::Mutex& SeedMutex() {
  static absl::Mutex mu;
  return mu;
}

struct Job {
  Job(Communicator& comm, int seed)
      : context(std::make_shared<FullyShardContext>(&comm)) {
    absl::MutexLock lock(&SeedMutex());
    at::manual_seed(seed);
    net = MakeFullyShard(std::make_shared<NetImpl>(context), context);
    optimizer = std::make_unique<optim::AdamW>(net->parameters(),
                                               optim::AdamWOptions(0.05));
  }

  // Every rank has the same batch, so that the mean over ranks is exact for 1,
  // 2 and 4 of them.
  void Train(int begin, int end) {
    for (int step = begin; step < end; ++step) {
      optimizer->zero_grad();
      const at::Tensor x = at::ones({4, 3}).cumsum(0).mul_(step + 1).sin();
      net->forward(x).pow(2).sum().backward();
      optimizer->step();
    }
  }

  absl::StatusOr<StateDict> State(Communicator& comm, bool full) {
    StateDictOptions options;
    options.full_state_dict = full;
    DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict got,
                         GetStateDict(*net, *optimizer, &comm, options));
    StateDict state;
    state.Set("model", Value(std::move(got.model)));
    state.Set("optim", Value(std::move(got.optimizer)));
    return state;
  }

  std::shared_ptr<FullyShardContext> context;
  std::shared_ptr<FullyShard<NetImpl>> net;
  std::unique_ptr<optim::AdamW> optimizer;
};

std::vector<std::pair<std::string, at::Tensor>> TensorsOf(StateDict state) {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  ForEachTensor(state, "", [&](const std::string& name, TensorValue& value) {
    tensors.emplace_back(name, *value.Local());
  });
  return tensors;
}

TEST(FullyShardStateTest, TrainSaveAndGoOnWithOtherRanks) {
  const std::string directory =
      absl::StrCat(testing::TempDir(), "/fully_shard_state");
  std::vector<std::pair<std::string, at::Tensor>> expected;
  ASSERT_THAT(
      RunRankThreads(4,
                     [&](Communicator& comm) -> absl::Status {
                       return TorchToStatus([&]() -> absl::Status {
                         Job job(comm, 1);
                         job.Train(0, 3);
                         DSD_ASSIGN_OR_RETURN(const StateDict state,
                                              job.State(comm, /*full=*/false));
                         DSD_RETURN_IF_ERROR(
                             SaveCheckpoint(directory, state, &comm));
                         job.Train(3, 6);
                         DSD_ASSIGN_OR_RETURN(StateDict full,
                                              job.State(comm, /*full=*/true));
                         if (comm.rank() == 0)
                           expected = TensorsOf(std::move(full));
                         return absl::OkStatus();
                       });
                     }),
      AllOk());
  std::vector<std::string> names;
  for (const auto& [name, tensor] : expected) names.push_back(name);
  EXPECT_THAT(names,
              testing::IsSupersetOf({"model.first.weight", "model.second.bias",
                                     "optim.state.first.weight.exp_avg",
                                     "optim.state.second.bias.step"}));
  for (const int ranks : {1, 2, 4}) {
    EXPECT_THAT(
        RunRankThreads(
            ranks,
            [&](Communicator& comm) -> absl::Status {
              return TorchToStatus([&]() -> absl::Status {
                Job job(comm, 2);
                DSD_ASSIGN_OR_RETURN(StateDict state,
                                     job.State(comm, /*full=*/false));
                DSD_RETURN_IF_ERROR(LoadCheckpoint(directory, &state, &comm));
                DSD_RETURN_IF_ERROR(SetStateDict(
                    *job.net, *job.optimizer,
                    *state.Find("model")->get_if<StateDict>(),
                    *state.Find("optim")->get_if<StateDict>(), &comm));
                job.Train(3, 6);
                DSD_ASSIGN_OR_RETURN(StateDict full,
                                     job.State(comm, /*full=*/true));
                const auto found = TensorsOf(std::move(full));
                if (found.size() != expected.size()) {
                  return absl::InternalError("other keys");
                }
                for (size_t i = 0; i < found.size(); ++i) {
                  if (found[i].first != expected[i].first ||
                      !at::equal(found[i].second, expected[i].second)) {
                    return absl::InternalError(
                        absl::StrCat(found[i].first, " differs"));
                  }
                }
                return absl::OkStatus();
              });
            }),
        AllOk())
        << ranks << " ranks";
  }
}

// Upstream reshards in a hook. Here parameters are shards whenever no forward()
// or backward() runs, so that nothing has to be done.
TEST(FullyShardStateTest, GetBetweenForwardAndBackward) {
  for (const int ranks : {1, 2, 4}) {
    EXPECT_THAT(
        RunRankThreads(ranks,
                       [&](Communicator& comm) -> absl::Status {
                         return TorchToStatus([&]() -> absl::Status {
                           Job job(comm, 1);
                           const at::Tensor loss =
                               job.net->forward(at::ones({4, 3})).sum();
                           DSD_RETURN_IF_ERROR(job.State(comm, /*full=*/true));
                           loss.backward();
                           job.optimizer->step();
                           return job.State(comm, /*full=*/false).status();
                         });
                       }),
        AllOk())
        << ranks << " ranks";
  }
}

// A lane has sequence numbers of its own: sessions in different threads do not
// mix.
TEST(FullyShardStateTest, SessionsOnLanesOfTheirOwnRunAtOnce) {
  EXPECT_THAT(
      RunRankThreads(2,
                     [&](Communicator& comm) -> absl::Status {
                       return TorchToStatus([&]() -> absl::Status {
                         Job job(comm, 1);
                         DSD_ASSIGN_OR_RETURN(const auto lane,
                                              comm.OpenLane("saver"));
                         StateDictOptions full;
                         full.full_state_dict = true;
                         absl::Status in_background;
                         std::thread saver([&] {
                           const auto session = StateDictSession::Create(
                               *job.net, {}, lane.get(), full);
                           in_background = session.status();
                           for (int i = 0; i < 20 && in_background.ok(); ++i) {
                             in_background = (*session)->GetModel().status();
                           }
                         });
                         absl::Status in_front;
                         for (int i = 0; i < 20 && in_front.ok(); ++i) {
                           in_front = job.State(comm, /*full=*/true).status();
                         }
                         saver.join();
                         in_front.Update(in_background);
                         return in_front;
                       });
                     }),
      AllOk());
}

}  // namespace
}  // namespace dsd
