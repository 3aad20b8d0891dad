// SPDX-License-Identifier: Apache-2.0
//
// State dicts of tensors on CUDA are bit for bit what they are on the CPU,
// whatever backend moves them. Needs a GPU: see
// testing/device/run_cuda_tests.sh.

#include <unistd.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/core/grad_mode.h"
#include "ATen/ops/equal.h"
#include "ATen/ops/full.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "dsd/backends/nccl/nccl_backend.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/composition/sharded_job.h"
#include "dsd/testing/device/cuda/cuda_job.h"
#include "dsd/testing/harness/rank_processes.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::DeviceUnderTest;
using ::dsd::test::Job;
using ::dsd::test::KeepBusy;
using ::dsd::test::OtherStream;

std::string NewDirectory(int rank_count) {
  static int count = 0;
  return absl::StrCat(testing::TempDir(), "/dsd_cuda_test_", ::getpid(), "_",
                      count++, "_", rank_count);
}

absl::Status EachTensor(StateDict& dict,
                        absl::FunctionRef<bool(const at::Tensor& tensor)> holds,
                        const char* what) {
  std::string wrong;
  ForEachTensor(dict, "", [&](const std::string& name, TensorValue& value) {
    for (const at::Tensor& local : value.locals()) {
      // The optimizer's counts are in host memory.
      if (name.size() > 5 && name.substr(name.size() - 5) == ".step") continue;
      if (!holds(local)) absl::StrAppend(&wrong, " ", name);
    }
  });
  if (wrong.empty()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("not ", what, ":", wrong));
}

absl::Status Same(const StateDict& a, const StateDict& b, const char* what) {
  DSD_ASSIGN_OR_RETURN(const auto differences, DiffStateDicts(a, b));
  if (differences.empty()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", differences[0]));
}

// Everything a job does with its state. What it got, in host memory, by rank 0.
absl::StatusOr<std::vector<StateDict>> DoAll(c10::Device device,
                                             Communicator& comm,
                                             const std::string& own_directory,
                                             int64_t in, int64_t hidden) {
  const bool is_cuda = device.is_cuda();
  const auto on_device = [&](const at::Tensor& t) {
    return t.device() == device;
  };
  const auto in_host = [](const at::Tensor& t) { return t.device().is_cpu(); };
  Job job(device, &comm, in, hidden, 0);
  DSD_RETURN_IF_ERROR(job.Check());
  std::vector<StateDict> results;
  const auto keep = [&](const StateDict& dict) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(StateDict copy, CopyToHost(dict));
    results.push_back(std::move(copy));
    return absl::OkStatus();
  };

  DSD_ASSIGN_OR_RETURN(StateDict shards, job.State(&comm));
  DSD_RETURN_IF_ERROR(EachTensor(shards, on_device, "on the device"));
  DSD_RETURN_IF_ERROR(keep(shards));

  StateDictOptions offload;
  offload.cpu_offload = true;
  DSD_ASSIGN_OR_RETURN(StateDict host_shards, job.State(&comm, offload));
  DSD_RETURN_IF_ERROR(EachTensor(host_shards, in_host, "in host memory"));
  DSD_RETURN_IF_ERROR(Same(host_shards, results[0], "cpu_offload"));
  offload.pin_memory = true;
  DSD_ASSIGN_OR_RETURN(StateDict pinned, job.State(&comm, offload));
  if (is_cuda) {
    DSD_RETURN_IF_ERROR(EachTensor(
        pinned,
        [](const at::Tensor& t) { return t.numel() == 0 || t.is_pinned(); },
        "page-locked"));
  }
  DSD_RETURN_IF_ERROR(Same(pinned, results[0], "cpu_offload, pinned"));

  if (!is_cuda) {
    // They are aliases.
    DSD_ASSIGN_OR_RETURN(host_shards, CloneStateDict(host_shards));
    pinned = host_shards;
  }

  StateDictOptions full;
  full.full_state_dict = true;
  DSD_ASSIGN_OR_RETURN(StateDict whole, job.State(&comm, full));
  DSD_RETURN_IF_ERROR(EachTensor(whole, on_device, "on the device"));
  DSD_RETURN_IF_ERROR(keep(whole));
  StateDictOptions full_offload = full;
  full_offload.cpu_offload = true;
  full_offload.pin_memory = comm.size() % 2 == 0;
  DSD_ASSIGN_OR_RETURN(StateDict host_whole, job.State(&comm, full_offload));
  DSD_RETURN_IF_ERROR(EachTensor(host_whole, in_host, "in host memory"));
  if (comm.rank() == 0) {
    DSD_RETURN_IF_ERROR(Same(host_whole, results[1], "full cpu_offload"));
  }

  DSD_ASSIGN_OR_RETURN(const checkpoint::CheckpointDigests digests,
                       ComputeDigests(shards, &comm));
  StateDict digest;
  digest.Set("digest", Value(DigestHex(digests.whole)));
  results.push_back(std::move(digest));
  DSD_RETURN_IF_ERROR(SaveCheckpoint(own_directory, shards, &comm).status());
  job.Spoil();
  DSD_RETURN_IF_ERROR(LoadCheckpoint(own_directory, &shards, &comm).status());
  DSD_RETURN_IF_ERROR(job.Set(shards, &comm));
  DSD_RETURN_IF_ERROR(job.Check()) << "after load";

  // Rank 0's dict in host memory for everybody.
  job.Spoil();
  StateDictOptions broadcast = full;
  broadcast.broadcast_from_rank0 = true;
  DSD_RETURN_IF_ERROR(
      job.Set(comm.rank() == 0 ? host_whole : StateDict(), &comm, broadcast));
  DSD_RETURN_IF_ERROR(job.Check()) << "after a broadcast from host memory";
  // Rank 0's dict on the device for everybody.
  job.Spoil();
  DSD_RETURN_IF_ERROR(
      job.Set(comm.rank() == 0 ? whole : StateDict(), &comm, broadcast));
  DSD_RETURN_IF_ERROR(job.Check()) << "after a broadcast from the device";
  // Each from its own, whole and sharded.
  job.Spoil();
  DSD_RETURN_IF_ERROR(job.Set(whole, &comm, full));
  DSD_RETURN_IF_ERROR(job.Check()) << "after a set from the device";
  job.Spoil();
  DSD_RETURN_IF_ERROR(job.Set(results[1], &comm, full));
  DSD_RETURN_IF_ERROR(job.Check()) << "after a set from host memory";
  job.Spoil();
  DSD_RETURN_IF_ERROR(job.Set(pinned, &comm));
  DSD_RETURN_IF_ERROR(job.Check()) << "after a set from page-locked shards";
  job.Spoil();
  StateDictOptions assign;
  assign.assign = true;
  DSD_RETURN_IF_ERROR(job.Set(host_shards, &comm, assign));
  DSD_RETURN_IF_ERROR(job.Check()) << "after an assigning set";

  StateDict streamed;
  StreamOptions batches;
  batches.batch_bytes = 100000;
  DSD_RETURN_IF_ERROR(StreamStateDict(
      *job.net, *job.optimizer,
      [&](StreamedValue& value) {
        streamed.Set(absl::StrCat(value.key, "@", value.begin),
                     std::move(value.value));
        return absl::OkStatus();
      },
      &comm, full, batches));
  DSD_RETURN_IF_ERROR(keep(streamed));

  DSD_ASSIGN_OR_RETURN(const StateDict clone, CloneStateDict(whole));
  DSD_RETURN_IF_ERROR(Same(clone, whole, "clone"));
  if (StateDictText(whole).empty()) return absl::InternalError("no text");
  return results;
}

// The device does what the CPU does.
absl::Status ExpectEqual(Communicator& comm, const std::string& cpu_directory,
                         const std::string& device_directory) {
  // The weight of `columns` has over 8 MiB.
  DSD_ASSIGN_OR_RETURN(const auto cpu,
                       DoAll(c10::kCPU, comm, cpu_directory, 1501, 1400));
  DSD_ASSIGN_OR_RETURN(const auto device, DoAll(DeviceUnderTest(), comm,
                                                device_directory, 1501, 1400));
  for (size_t i = 0; i < cpu.size(); ++i) {
    DSD_RETURN_IF_ERROR(Same(cpu[i], device[i], "cpu and device"));
  }
  // Each loads what the other has saved.
  for (const bool swap : {false, true}) {
    Job job(swap ? DeviceUnderTest() : c10::Device(c10::kCPU), &comm, 1501,
            1400, 0);
    job.Spoil();
    DSD_ASSIGN_OR_RETURN(StateDict state, job.State(&comm));
    DSD_RETURN_IF_ERROR(
        LoadCheckpoint(swap ? cpu_directory : device_directory, &state, &comm)
            .status());
    DSD_RETURN_IF_ERROR(job.Set(state, &comm));
    DSD_RETURN_IF_ERROR(job.Check()) << "after a load of the other's";
  }
  return absl::OkStatus();
}

class CudaStateDictTest : public testing::TestWithParam<std::tuple<int, bool>> {
};

TEST_P(CudaStateDictTest, EqualsTheCpu) {
  const auto [ranks, other_stream] = GetParam();
  const bool uses_other_stream = other_stream;
  const std::string cpu_directory = NewDirectory(ranks);
  const std::string device_directory = NewDirectory(ranks);
  EXPECT_THAT(RunRankThreads(ranks,
                             [&](Communicator& comm) -> absl::Status {
                               std::optional<OtherStream> stream;
                               if (uses_other_stream) stream.emplace();
                               return ExpectEqual(comm, cpu_directory,
                                                  device_directory);
                             }),
              AllOk());
}

INSTANTIATE_TEST_SUITE_P(Ranks, CudaStateDictTest,
                         testing::Combine(testing::Values(1, 2, 3),
                                          testing::Bool()));

TEST(CudaStateDictTest, AGetFollowsAnOptimizerStepThatStillRuns) {
  OtherStream stream;
  Job job(DeviceUnderTest(), nullptr, 100, 200, 0);
  test::Synchronize();
  KeepBusy();
  {
    const at::NoGradGuard no_grad;
    job.net->columns->weight.fill_(3);
  }
  StateDictOptions offload;
  offload.cpu_offload = true;
  offload.full_state_dict = true;
  const auto got = GetModelStateDict(*job.net, nullptr, offload);
  ASSERT_TRUE(got.ok()) << got.status();
  const auto* weight = got->Find("columns.weight")->get_if<TensorValue>();
  EXPECT_TRUE(at::equal(weight->locals()[0], at::full({200, 100}, 3.f)));
}

// --- Ranks that are processes ---

// The argument: the backend and directories.
DSD_RANK_PROGRAM(StateDictsOverABackend) {
  const std::vector<std::string> words = absl::StrSplit(rank.argument(), ' ');
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(words[0]));
  DSD_RETURN_IF_ERROR(ExpectEqual(*comm, words[1], words[2]));
  return comm->Shutdown();
}

DSD_RANK_PROGRAM(ShardedJobOverABackend) {
  const std::vector<std::string> words = absl::StrSplit(rank.argument(), ' ');
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(words[0]));
  DSD_ASSIGN_OR_RETURN(
      const std::string bits,
      test::BitsOfShardedJob(*comm, words[1], DeviceUnderTest()));
  rank.Record("bits", bits);
  return comm->Shutdown();
}

class CudaBackendTest
    : public testing::TestWithParam<std::tuple<std::string, int>> {
 protected:
  void SetUp() override {
    const auto [backend, ranks] = GetParam();
    if (backend != "nccl") return;
    const absl::Status status = NcclIsAvailable(ranks);
    if (!status.ok()) GTEST_SKIP() << status.message();
  }
};

TEST_P(CudaBackendTest, StateDictsEqualTheCpu) {
  const auto [backend, ranks] = GetParam();
  RankRunOptions options;
  options.argument =
      absl::StrCat(backend, " ", NewDirectory(ranks), " ", NewDirectory(ranks));
  EXPECT_THAT(RunRanks(ranks, "StateDictsOverABackend", options), AllRanksOk());
}

INSTANTIATE_TEST_SUITE_P(All, CudaBackendTest,
                         testing::Combine(testing::Values("gloo", "nccl"),
                                          testing::Values(1, 2, 3)));

// Ranks that share a device are processes: FullyShardContext.
class CudaTrainingTest : public testing::TestWithParam<int> {};

TEST_P(CudaTrainingTest, HasTheSameBitsOverEveryBackend) {
  const int ranks = GetParam();
  std::vector<std::string> bits[2];
  for (const std::string backend : {"gloo", "nccl"}) {
    if (backend == "nccl") {
      const absl::Status status = NcclIsAvailable(ranks);
      if (!status.ok()) GTEST_SKIP() << status.message();
    }
    RankRunOptions options;
    options.argument = absl::StrCat(backend, " ", NewDirectory(ranks));
    const std::vector<RankResult> results =
        RunRanks(ranks, "ShardedJobOverABackend", options);
    ASSERT_THAT(results, AllRanksOk()) << backend;
    for (const RankResult& result : results) {
      bits[backend == "nccl"].push_back(result.values.at("bits"));
    }
  }
  EXPECT_EQ(bits[0], bits[1]);
}

INSTANTIATE_TEST_SUITE_P(Ranks, CudaTrainingTest, testing::Values(1, 2, 3));

}  // namespace
}  // namespace dsd
