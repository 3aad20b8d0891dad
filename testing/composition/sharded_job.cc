// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/composition/sharded_job.h"

#include <memory>
#include <utility>

#include "ATen/Context.h"
#include "ATen/ops/ones.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/parallel/fully_shard.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adamw.h"

namespace dsd::test {
namespace {

using Net = FullyShard<torch::nn::LinearImpl>;

struct Job {
  Job(Communicator& comm, c10::Device device, int seed)
      : context(std::make_shared<FullyShardContext>(&comm)) {
    static absl::Mutex mu(absl::kConstInit);
    absl::MutexLock lock(&mu);
    at::manual_seed(seed);
    // Large enough for messages of their own, see kMaxInlinePayload.
    torch::nn::Linear whole(4001, 13);
    whole->to(device);
    net = MakeFullyShard(whole, context);
    optimizer = std::make_unique<torch::optim::AdamW>(
        net->parameters(), torch::optim::AdamWOptions(0.05));
  }

  void Train(int rank) {
    const c10::Device device = net->parameters()[0].device();
    for (int step = 0; step < 3; ++step) {
      optimizer->zero_grad();
      const at::Tensor x =
          at::ones({2, 4001}).cumsum(1).mul_(step + rank + 1).sin().to(device);
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
    const at::Tensor tensor = value.Local()->cpu().contiguous();
    digest.Add(name).Add(
        absl::string_view(static_cast<const char*>(tensor.const_data_ptr()),
                          tensor.numel() * tensor.element_size()));
  });
}

}  // namespace

absl::StatusOr<std::string> BitsOfShardedJob(Communicator& comm,
                                             const std::string& directory,
                                             c10::Device device) {
  return TorchToStatus([&]() -> absl::StatusOr<std::string> {
    DigestBuilder digest;
    Job trained(comm, device, 1);
    trained.Train(comm.rank());
    DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict full,
                         trained.Get(comm, /*full=*/true));
    AddTensors(Joined(full), digest);
    DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict shards,
                         trained.Get(comm, /*full=*/false));
    AddTensors(Joined(shards), digest);
    DSD_RETURN_IF_ERROR(
        SaveCheckpoint(directory, Joined(shards), &comm).status());

    Job told(comm, device, 2);
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

    Job loaded(comm, device, 3);
    DSD_ASSIGN_OR_RETURN(const ModelAndOptimizerStateDict aliases,
                         loaded.Get(comm, /*full=*/false));
    StateDict target = Joined(aliases);
    DSD_RETURN_IF_ERROR(LoadCheckpoint(directory, &target, &comm).status());
    AddTensors(target, digest);
    return digest.Finish().Hex();
  });
}

}  // namespace dsd::test
