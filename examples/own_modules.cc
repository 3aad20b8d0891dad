// SPDX-License-Identifier: Apache-2.0
//
// State dicts of a module system that is neither torch::nn nor TorchScript: the
// model says what its tensors are called, and that is all. Two ranks, threads
// here, have one half of each weight; rank 0 gets the whole model, doubles it
// and gives it back to both.
//
//   ./bazelw run //examples:own_modules

#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/Functions.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/state_dict/source_session.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/module/named_tensors.h"

namespace {

constexpr int kRanks = 2;
constexpr int64_t kWidth = 6;

// The user's own idea of a model: layers in a list, nothing else.
struct Layer {
  std::string name;
  at::Tensor weight;  // this rank's rows of [kWidth, kWidth]
  at::Tensor bias;    // whole on every rank
};
using Model = std::vector<Layer>;

absl::StatusOr<Model> MakeModel(int rank) {
  Model model;
  for (const char* name : {"encoder", "decoder"}) {
    model.push_back({name, at::full({kWidth / kRanks, kWidth}, rank + 1.0),
                     at::full({kWidth}, 0.5)});
    // What cannot be seen in a tensor: that it is a part, and which.
    DSD_ASSIGN_OR_RETURN(dsd::Layout rows,
                         dsd::Layout::FromPlacements(
                             {kWidth, kWidth}, dsd::DeviceMesh::Iota({kRanks}),
                             {dsd::Shard(0)}));
    DSD_RETURN_IF_ERROR(dsd::ShardingTable::Global().Set(
        model.back().weight, std::move(rows), rank));
  }
  return model;
}

// The adapter.
dsd::NamedTensorsSource SourceOf(const Model& model) {
  return dsd::NamedTensorsSource([&model] {
    std::vector<dsd::NamedTensor> tensors;
    for (const Layer& layer : model) {
      tensors.push_back({layer.name + ".weight", layer.weight});
      tensors.push_back({layer.name + ".bias", layer.bias});
    }
    return tensors;
  });
}

absl::Status RunRank(dsd::Communicator& comm) {
  DSD_ASSIGN_OR_RETURN(const Model model, MakeModel(comm.rank()));
  dsd::NamedTensorsSource source = SourceOf(model);

  dsd::StateDictOptions options;
  options.full_state_dict = true;
  options.cpu_offload = true;  // only rank 0 receives
  options.broadcast_from_rank0 = true;
  dsd::SourceSession session(&source, {}, &comm, options);

  DSD_ASSIGN_OR_RETURN(dsd::StateDict whole, session.GetModel());
  DSD_RETURN_IF_ERROR(dsd::TorchToStatus([&] {
    for (size_t i = 0; i < whole.size(); ++i) {
      const at::Tensor tensor =
          *whole.value(i).get_if<dsd::TensorValue>()->Local();
      std::cout << absl::StrCat("rank 0 has ", whole.key_text(i),
                                " whole: ", tensor.numel(), " elements, sum ",
                                tensor.sum().item<double>(), "\n");
      tensor.mul_(2);
    }
  }));
  DSD_RETURN_IF_ERROR(session.SetModel(whole).status());

  return dsd::TorchToStatus([&]() -> absl::Status {
    for (const Layer& layer : model) {
      if (!layer.weight.eq(2.0 * (comm.rank() + 1)).all().item<bool>() ||
          !layer.bias.eq(1.0).all().item<bool>()) {
        return absl::InternalError("the live tensors were not filled");
      }
    }
    return comm.Shutdown();
  });
}

absl::Status Run() {
  const auto store = dsd::MakeInProcessStore(dsd::Env::Real());
  std::vector<absl::Status> statuses(kRanks);
  {
    std::vector<std::unique_ptr<dsd::EnvThread>> threads;
    for (int rank = 0; rank < kRanks; ++rank) {
      threads.push_back(dsd::Env::Real()->StartThread(
          absl::StrCat("rank ", rank), [rank, &store, &statuses] {
            dsd::CommunicatorOptions options;
            options.rank = rank;
            options.world_size = kRanks;
            options.backend = "local";
            options.store = store;
            auto comm = dsd::Communicator::Create(options);
            statuses[rank] = comm.ok() ? RunRank(**comm) : comm.status();
          }));
      if (threads.back() == nullptr) {
        statuses[rank] = dsd::NoThread(absl::StrCat("rank ", rank));
      }
    }
  }
  for (const absl::Status& status : statuses) DSD_RETURN_IF_ERROR(status);
  std::cout << "both ranks have the doubled model in their own tensors\n";
  return absl::OkStatus();
}

}  // namespace

int main() {
  const absl::Status status = Run();
  if (status.ok()) return 0;
  std::cerr << status << "\n";
  return 1;
}
