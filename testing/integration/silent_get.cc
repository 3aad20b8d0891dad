// SPDX-License-Identifier: Apache-2.0
//
// Two ranks over Gloo that get a sharded state dict. What they do when is
// marked by the names they give their thread, which strace shows:
// silence_test.py reads that.

#include <sys/prctl.h>

#include <iostream>
#include <memory>

#include "ATen/Functions.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/harness/rank_processes.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/module.h"
#include "torch/optim/adamw.h"

namespace dsd {
namespace {

// At most 15 characters.
void Mark(const char* name) { prctl(PR_SET_NAME, name); }

DSD_RANK_PROGRAM(MarkedGets) {
  WorldOptions options;
  options.backend = "gloo";
  options.heartbeat_bound = absl::Hours(1);  // no beat while a rank gets
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectWorld(rank.launch(), options));
  torch::nn::Module model;
  const at::Tensor weight =
      model.register_parameter("weight", at::ones({3, 4}));
  DSD_ASSIGN_OR_RETURN(
      Layout layout,
      Layout::FromPlacements({6, 4}, DeviceMesh::Iota({2}), {Shard(0)}));
  DSD_RETURN_IF_ERROR(
      ShardingTable::Global().Set(weight, std::move(layout), comm->rank()));
  model.register_parameter("bias", at::ones({4}));
  torch::optim::AdamW optimizer(model.parameters());
  DSD_ASSIGN_OR_RETURN(const auto session,
                       StateDictSession::Create(model, optimizer, comm.get()));
  DSD_RETURN_IF_ERROR(comm->Barrier());
  // No rank is before or after its gets while another gets: its messages would
  // be seen to arrive.
  DSD_RETURN_IF_ERROR(rank.Pause("before"));
  for (const char* const get : {"dsd:first get", "dsd:second get"}) {
    Mark(get);
    const auto state = session->Get();
    Mark("dsd:end");
    DSD_RETURN_IF_ERROR(state);
    if (state->model.size() != 2 || state->optimizer.empty()) {
      return absl::InternalError("the state is not all there");
    }
  }
  DSD_RETURN_IF_ERROR(rank.Pause("after"));
  // What strace must show, or it shows nothing at all.
  Mark("dsd:message");
  const absl::Status status = comm->Barrier();
  Mark("dsd:end");
  DSD_RETURN_IF_ERROR(status);
  return comm->Shutdown();
}

TEST(SilentGetTest, Runs) {
  RankProcesses processes(2, "MarkedGets");
  for (const char* const place : {"before", "after"}) {
    for (int rank = 0; rank < 2; ++rank) {
      EXPECT_TRUE(processes.WaitFor(rank, place)) << "rank " << rank;
    }
    for (int rank = 0; rank < 2; ++rank) processes.Release(rank);
  }
  EXPECT_THAT(processes.Wait(), AllRanksOk());
}

}  // namespace
}  // namespace dsd
