// SPDX-License-Identifier: Apache-2.0
//
// How fast state goes to and from a GPU, against what the machine gives. Prints
// a table; asserts nothing about time.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/core/grad_mode.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/equal.h"
#include "ATen/ops/zeros.h"
#include "absl/log/check.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/tensor_endpoint.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/device/cuda/cuda_job.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gtest/gtest.h"
#include "torch/nn/module.h"

namespace dsd {
namespace {

using ::dsd::test::DeviceUnderTest;
using ::dsd::test::Synchronize;

double baseline_gbps = 0;

// Median of 5 runs after one that is not counted.
void Row(const std::string& what, int64_t bytes,
         const std::function<void()>& run) {
  std::vector<double> seconds;
  for (int i = 0; i < 6; ++i) {
    Synchronize();
    const absl::Time start = absl::Now();
    run();
    Synchronize();
    if (i > 0) seconds.push_back(absl::ToDoubleSeconds(absl::Now() - start));
  }
  std::sort(seconds.begin(), seconds.end());
  const double gbps = static_cast<double>(bytes) / seconds[2] / 1e9;
  if (baseline_gbps == 0) baseline_gbps = gbps;
  std::cout << absl::StrFormat("| %-62s | %7.2f | %5.2f | %6.2f-%.2f |", what,
                               gbps, gbps / baseline_gbps,
                               static_cast<double>(bytes) / seconds[4] / 1e9,
                               static_cast<double>(bytes) / seconds[0] / 1e9)
            << std::endl;
}

void Head(const std::string& what) {
  baseline_gbps = 0;
  std::cout << absl::StrFormat("| %-62s | %7s | %5s | %s |", what, "GB/s",
                               "ratio", "range")
            << std::endl;
}

void Move(const at::Tensor& from, const at::Tensor& to) {
  const DeviceMesh one = DeviceMesh::Iota({1});
  TensorEndpoint source(one, 0);
  TensorEndpoint target(one, 0);
  CHECK_OK(source.Add("t", from));
  CHECK_OK(target.Add("t", to));
  CHECK_OK(Redistribute(source, target, nullptr).status());
}

struct Params : torch::nn::Module {
  Params(int64_t count, const Dims& shape, c10::Device device) {
    for (int64_t i = 0; i < count; ++i) {
      register_parameter(
          absl::StrCat("p", i),
          at::zeros(ToIntArrayRef(shape),
                    c10::TensorOptions(c10::kFloat).device(device))
              .add_(static_cast<double>(i)));
    }
  }
};

void Get(torch::nn::Module& module, bool pinned) {
  StateDictOptions options;
  options.cpu_offload = true;
  options.pin_memory = pinned;
  CHECK_OK(GetModelStateDict(module, nullptr, options).status());
}

TEST(CudaTimings, Table) {
  const at::NoGradGuard no_grad;
  const c10::Device device = DeviceUnderTest();
  const int64_t side = device.is_cuda() ? 11585 : 1024;  // 512 MiB
  const int64_t bytes = side * side * 4;
  const c10::TensorOptions on_device =
      c10::TensorOptions(c10::kFloat).device(device);
  const at::Tensor there = at::zeros({side, side}, on_device).add_(1);
  const at::Tensor there_too = at::zeros({side, side}, on_device);
  const at::Tensor pageable = at::zeros({side, side});
  const at::Tensor pinned = at::empty(
      {side, side},
      c10::TensorOptions(c10::kFloat).pinned_memory(device.is_cuda()));
  pinned.zero_();

  Head("one tensor of 512 MiB, device to host");
  Row("plain copy to page-locked memory", bytes,
      [&] { pinned.copy_(there, /*non_blocking=*/true); });
  Row("plain copy to pageable memory that was touched", bytes,
      [&] { pageable.copy_(there); });
  Row("plain copy to fresh pageable memory (Tensor::cpu)", bytes,
      [&] { there.cpu(); });
  Row("transfer to page-locked memory", bytes, [&] { Move(there, pinned); });
  Row("transfer to pageable memory that was touched, staged", bytes,
      [&] { Move(there, pageable); });
  Row("transfer of a transposed view to page-locked memory", bytes,
      [&] { Move(there.t(), pinned); });
  Row("plain copy of a transposed view to page-locked memory", bytes,
      [&] { pinned.copy_(there.t(), /*non_blocking=*/true); });
  {
    Params module(1, {side, side}, device);
    Row("get with cpu_offload into fresh memory", bytes,
        [&] { Get(module, false); });
    Row("get with cpu_offload and pin_memory", bytes,
        [&] { Get(module, true); });
  }

  Head("one tensor of 512 MiB, host to device");
  Row("plain copy from page-locked memory", bytes,
      [&] { there.copy_(pinned, /*non_blocking=*/true); });
  Row("plain copy from pageable memory", bytes, [&] { there.copy_(pageable); });
  Row("transfer from page-locked memory", bytes, [&] { Move(pinned, there); });
  Row("transfer from pageable memory, staged", bytes,
      [&] { Move(pageable, there); });
  {
    Params module(1, {side, side}, device);
    StateDict dict;
    dict.Set("p0", Value(TensorValue(pageable)));
    Row("set from a dict in pageable memory", bytes,
        [&] { CHECK_OK(SetModelStateDict(module, dict).status()); });
  }

  Head("one tensor of 512 MiB, within the device");
  Row("plain copy", bytes, [&] { there_too.copy_(there); });
  Row("transfer", bytes, [&] { Move(there, there_too); });

  const int64_t small = 2000;
  const int64_t small_bytes = small * 64 * 64 * 4;
  Head("2000 tensors of 16 KiB, device to host");
  {
    Params module(small, {64, 64}, device);
    const auto params = module.parameters();
    Row("plain copies to fresh pageable memory (Tensor::cpu)", small_bytes,
        [&] {
          for (const at::Tensor& param : params) param.detach().cpu();
        });
    Row("get with cpu_offload", small_bytes, [&] { Get(module, false); });
    Row("get with cpu_offload and pin_memory", small_bytes,
        [&] { Get(module, true); });
  }

  Head("512 MiB over 2 ranks (threads, backend local)");
  for (const int dim : {0, 1}) {
    std::vector<double> seconds;
    const auto statuses =
        RunRankThreads(2, [&](Communicator& comm) -> absl::Status {
          const at::NoGradGuard guard;
          const Dims shape = {side, side};
          const Layout layout = *Layout::FromPlacements(
              shape, DeviceMesh::Iota({2}), {Shard(dim)});
          at::Tensor shard = at::zeros(
              ToIntArrayRef(*layout.LocalShape(comm.rank())), on_device);
          torch::nn::Module module;
          module.register_parameter("w", shard);
          CHECK_OK(ShardingTable::Global().Set(module.parameters()[0], layout,
                                               comm.rank()));
          StateDictOptions options;
          options.full_state_dict = true;
          options.cpu_offload = true;
          options.pin_memory = true;
          for (int i = 0; i < 4; ++i) {
            DSD_RETURN_IF_ERROR(comm.Barrier());
            const absl::Time start = absl::Now();
            DSD_RETURN_IF_ERROR(
                GetModelStateDict(module, &comm, options).status());
            if (i > 0 && comm.rank() == 0) {
              seconds.push_back(absl::ToDoubleSeconds(absl::Now() - start));
            }
          }
          return absl::OkStatus();
        });
    EXPECT_THAT(statuses, AllOk());
    if (seconds.size() != 3) continue;
    std::sort(seconds.begin(), seconds.end());
    std::cout << absl::StrFormat(
                     "| full get on rank 0, page-locked, %s shards: %.2f GB/s "
                     "of 512 MiB",
                     dim == 0 ? "row" : "column",
                     static_cast<double>(bytes) / seconds[1] / 1e9)
              << std::endl;
  }

  Head("save of 512 MiB");
  const auto save = [&](c10::Device where, const std::string& name) {
    Params module(4, {side / 4, side}, where);
    const auto got = GetModelStateDict(module);
    CHECK_OK(got.status());
    Row(absl::StrCat("from ", where.str()), bytes, [&] {
      CHECK_OK(SaveCheckpoint(absl::StrCat(testing::TempDir(), "/", name), *got)
                   .status());
    });
    StateDict state = *got;
    Row(absl::StrCat("load to ", where.str()), bytes, [&] {
      CHECK_OK(
          LoadCheckpoint(absl::StrCat(testing::TempDir(), "/", name), &state)
              .status());
    });
  };
  save(c10::kCPU, "timings_cpu");
  save(device, "timings_device");
}

}  // namespace
}  // namespace dsd
