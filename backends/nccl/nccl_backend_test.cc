// SPDX-License-Identifier: Apache-2.0
//
// What goes wrong, against the fake libraries (fake_nccl.cc says what its
// script can do). What all backends must do is in testing/conformance.

#include "dsd/backends/nccl/nccl_backend.h"

#include <signal.h>
#include <stdlib.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/backends/gloo/gloo_backend.h"
#include "dsd/backends/local/local_backend.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/testing/conformance/conformance.h"
#include "dsd/testing/conformance/device_memory.h"
#include "dsd/testing/harness/abort_storm.h"
#include "dsd/testing/harness/rank_processes.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;

constexpr size_t kMiB = size_t{1} << 20;
// By when all survivors know of a death, on a machine that is busy with other
// tests; testing/fault holds backends to less.
constexpr absl::Duration kBound = absl::Seconds(20);

using Environment = std::vector<std::pair<std::string, std::string>>;

std::vector<RankResult> RunIn(int ranks, absl::string_view program,
                              const Environment& environment,
                              absl::Duration timeout = absl::Seconds(50)) {
  RankRunOptions options;
  options.environment = environment;
  options.timeout = timeout;
  return RunRanks(ranks, program, options);
}

void ExpectAll(const std::vector<RankResult>& results, absl::StatusCode code,
               const std::vector<std::string>& parts) {
  for (size_t rank = 0; rank < results.size(); ++rank) {
    const RankResult& result = results[rank];
    EXPECT_EQ(result.end, RankResult::End::kReturned) << "rank " << rank;
    EXPECT_EQ(result.status.code(), code)
        << "rank " << rank << ": " << result.status;
    for (const std::string& part : parts) {
      EXPECT_THAT(std::string(result.status.message()), HasSubstr(part))
          << "rank " << rank;
    }
  }
}

// A ring of device messages, over and over; ends as the group ends.
absl::Status RingFor(Communicator& comm, int rounds, size_t size,
                     absl::Duration timeout) {
  // Outlives the buffers, whose end is the end of copies from it.
  std::vector<std::byte> mine;
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  DSD_ASSIGN_OR_RETURN(DeviceBuffer out, DeviceBuffer::Create(*stream, size));
  DSD_ASSIGN_OR_RETURN(DeviceBuffer in, DeviceBuffer::Create(*stream, size));
  CallOptions options;
  options.timeout = timeout;
  for (int round = 0; round < rounds; ++round) {
    mine = Pattern(round + comm.rank(), size);
    DSD_RETURN_IF_ERROR(out.CopyFrom(mine));
    const int previous = (comm.rank() + comm.size() - 1) % comm.size();
    DSD_RETURN_IF_ERROR(comm.Exchange(
        {{(comm.rank() + 1) % comm.size(), out.bytes(), stream->space()}},
        {{previous, in.bytes(), stream->space()}}, "ring", options));
    DSD_ASSIGN_OR_RETURN(const std::vector<std::byte> found, in.Read());
    DSD_RETURN_IF_ERROR(
        Check(found == Pattern(round + previous, size), "wrong bytes"));
  }
  return absl::OkStatus();
}

DSD_RANK_PROGRAM(Connect) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("nccl"));
  return comm->Shutdown();
}

DSD_RANK_PROGRAM(ConnectInTime) {
  return rank.Connect("nccl", absl::Seconds(2)).status();
}

DSD_RANK_PROGRAM(Ring) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("nccl"));
  DSD_RETURN_IF_ERROR(RingFor(*comm, 5, 3 * kMiB, absl::Seconds(40)));
  return comm->Shutdown();
}

DSD_RANK_PROGRAM(RingInTime) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("nccl"));
  return RingFor(*comm, 1000, 3 * kMiB, absl::Seconds(2));
}

DSD_RANK_PROGRAM(LongRing) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("nccl"));
  return RingFor(*comm, 1000, 3 * kMiB, absl::Minutes(5));
}

// --- Libraries ---

TEST(NcclLibraryTest, OneThatIsNotThereIsNamed) {
  ExpectAll(
      RunIn(2, "Connect", {{"DSD_NCCL_LIBRARY", "/nowhere/libnccl.so.2"}}),
      absl::StatusCode::kFailedPrecondition,
      {"DSD_NCCL_LIBRARY=/nowhere/libnccl.so.2"});
  ExpectAll(RunIn(2, "Connect", {{"DSD_CUDART_LIBRARY", "/nowhere/cudart"}}),
            absl::StatusCode::kFailedPrecondition,
            {"DSD_CUDART_LIBRARY=/nowhere/cudart"});
}

TEST(NcclLibraryTest, AnotherLibraryIsNotTakenForIt) {
  ExpectAll(
      RunIn(2, "Connect", {{"DSD_NCCL_LIBRARY", getenv("DSD_CUDART_LIBRARY")}}),
      absl::StatusCode::kFailedPrecondition, {"is not NCCL"});
  ExpectAll(
      RunIn(2, "Connect", {{"DSD_CUDART_LIBRARY", getenv("DSD_NCCL_LIBRARY")}}),
      absl::StatusCode::kFailedPrecondition, {"has no cuda"});
}

TEST(NcclLibraryTest, AnOldOneIsRefused) {
  const std::string old = getenv("DSD_FAKE_OLD_NCCL");
  ExpectAll(
      RunIn(2, "Connect",
            {{"DSD_NCCL_LIBRARY", old}, {"DSD_FAKE_NCCL", "version=21304"}}),
      absl::StatusCode::kFailedPrecondition,
      {"is NCCL 2.13.4, needed is 2.14.0 or newer"});
  // One that lacks what its version should have.
  ExpectAll(
      RunIn(2, "Connect",
            {{"DSD_NCCL_LIBRARY", old}, {"DSD_FAKE_NCCL", "version=22005"}}),
      absl::StatusCode::kFailedPrecondition,
      {"is NCCL 2.20.5 but has no ncclCommInitRankConfig"});
}

TEST(NcclLibraryTest, DifferentVersionsAreRefused) {
  ExpectAll(RunIn(3, "Connect", {{"DSD_FAKE_NCCL", "version@2=22809"}}),
            absl::StatusCode::kFailedPrecondition,
            {"rank 2 runs NCCL 2.28.9, but rank 0 runs NCCL 2.30.7"});
}

TEST(NcclLibraryTest, TheOldestThatIsGoodEnoughWorks) {
  EXPECT_THAT(RunIn(2, "Ring", {{"DSD_FAKE_NCCL", "version=21400,polls=20"}}),
              AllRanksOk());
}

TEST(NcclLibraryTest, BlockingCommunicatorsAreWarnedOfOnce) {
  const auto results = RunIn(2, "Ring", {{"NCCL_COMM_BLOCKING", "1"}});
  ASSERT_THAT(results, AllRanksOk());
  const std::string& output = results[1].output;
  const size_t first = output.find("NCCL_COMM_BLOCKING=1");
  ASSERT_NE(first, std::string::npos);
  EXPECT_EQ(output.find("NCCL_COMM_BLOCKING=1", first + 1), std::string::npos);
}

TEST(NcclLibraryTest, AMachineWithoutADeviceIsSaidToBeOne) {
  ExpectAll(RunIn(2, "Connect", {{"DSD_FAKE_CUDA_DEVICES", "0"}}),
            absl::StatusCode::kFailedPrecondition,
            {"no CUDA device can be used", "no CUDA-capable device"});
}

// --- Devices ---

// The device of the memory that the backend takes.
DSD_RANK_PROGRAM(WhichDevice) {
  DSD_ASSIGN_OR_RETURN(const CudaApi* const cuda, LoadCuda());
  if (rank.argument() == "slurm") {
    for (const char* name :
         {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}) {
      unsetenv(name);
    }
    setenv("SLURM_STEP_ID", "0", 1);
    setenv("SLURM_NTASKS", "2", 1);
    for (const char* name : {"SLURM_PROCID", "SLURM_LOCALID"}) {
      setenv(name, absl::StrCat(rank.rank()).c_str(), 1);
    }
  } else if (!rank.argument().empty()) {
    cuda->SetDevice(atoi(rank.argument().c_str()));
  }
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("nccl"));
  cuda->SetDevice(7);
  void* memory = nullptr;
  cuda->Malloc(&memory, 100);
  const absl::Span<std::byte> bytes(static_cast<std::byte*>(memory), 100);
  const absl::Status status =
      comm->Exchange({}, {{1 - comm->rank(), bytes, {DeviceType::kCuda}}}, "x");
  cuda->Free(memory);
  return status;
}

TEST(NcclDeviceChoiceTest, FollowsTheLauncherTheProgramOrTheVariable) {
  // Rank 0 is heard first or last.
  const auto text = [](const std::vector<RankResult>& results) {
    return std::string(results[1].status.message());
  };
  EXPECT_THAT(
      text(RunIn(2, "WhichDevice", {})),
      ::testing::ContainsRegex("rank (0 uses device 0|1 uses device 1)"));
  RankRunOptions options;
  options.argument = "5";
  EXPECT_THAT(text(RunRanks(2, "WhichDevice", options)),
              HasSubstr("uses device 5;"));
  options.argument = "slurm";
  EXPECT_THAT(text(RunRanks(2, "WhichDevice", options)),
              ::testing::ContainsRegex("rank (0 uses device 0|1 uses device "
                                       "1)"));
  EXPECT_THAT(text(RunIn(2, "WhichDevice", {{"DSD_NCCL_DEVICE", "3"}})),
              HasSubstr("memory of device 7, but rank"));
  ExpectAll(RunIn(2, "Connect", {{"DSD_NCCL_DEVICE", "8"}}),
            absl::StatusCode::kInvalidArgument,
            {"DSD_NCCL_DEVICE=8: expected 0 to 7"});
  ExpectAll(RunIn(2, "Connect", {{"DSD_NCCL_DEVICE", "the first"}}),
            absl::StatusCode::kInvalidArgument, {"DSD_NCCL_DEVICE=the first"});
}

// --- Companions ---

TEST(NcclCompanionTest, AnUnknownOneIsNamed) {
  ExpectAll(RunIn(2, "Connect", {{"DSD_NCCL_COMPANION", "pigeon"}}),
            absl::StatusCode::kNotFound,
            {"DSD_NCCL_COMPANION=pigeon", "no backend \"pigeon\" is linked"});
  ExpectAll(RunIn(2, "Connect", {{"DSD_NCCL_COMPANION", "nccl"}}),
            absl::StatusCode::kInvalidArgument,
            {"DSD_NCCL_COMPANION=nccl: not a backend that carries"});
}

// --- Connecting ---

TEST(NcclConnectTest, EndsAtItsDeadlineIfNcclDoesNotComeToAnything) {
  const absl::Time start = Env::Real()->Now();
  ExpectAll(RunIn(3, "ConnectInTime", {{"DSD_FAKE_NCCL", "init_hangs@1=1"}}),
            absl::StatusCode::kDeadlineExceeded, {"connect"});
  EXPECT_LT(Env::Real()->Now() - start, absl::Seconds(20));
}

TEST(NcclConnectTest, WhatNcclRefusesIsToldToAll) {
  ExpectAll(RunIn(3, "Connect", {{"DSD_FAKE_NCCL", "init_error@1=5"}}),
            absl::StatusCode::kFailedPrecondition,
            {"initialize: NCCL: invalid usage: as the script says",
             "NCCL 2.30.7 on device 1"});
}

TEST(NcclConnectTest, ADeviceThatDoesNotComeToTheFirstMessage) {
  ExpectAll(RunIn(2, "ConnectInTime", {{"DSD_FAKE_NCCL", "hangs@0=1,after=0"}}),
            absl::StatusCode::kDeadlineExceeded, {"connect"});
}

// --- Messages ---

TEST(NcclMessageTest, AnErrorOfOneRankIsToldToAll) {
  // One that may be the death of another rank: the store is given time to say
  // so. And one that is not.
  ExpectAll(
      RunIn(3, "LongRing", {{"DSD_FAKE_NCCL", "async_error@1=6,after=2"}}),
      absl::StatusCode::kUnavailable,
      {"remote process exited or there was a network error",
       "exchange \"ring\" on rank"});
  ExpectAll(RunIn(3, "Ring", {{"DSD_FAKE_NCCL", "group_error@2=5,after=2"}}),
            absl::StatusCode::kFailedPrecondition,
            {"send and receive (rank 0, 1): NCCL: invalid usage",
             "exchange \"ring\" on rank"});
}

TEST(NcclMessageTest, AKernelThatSpinsEndsAtTheDeadline) {
  ExpectAll(RunIn(3, "RingInTime", {{"DSD_FAKE_NCCL", "hangs@1=1,after=3"}}),
            absl::StatusCode::kDeadlineExceeded,
            {"exchange \"ring\"", "did not finish within 2s"});
}

// In the middle of a message in device memory, of which NCCL tells nothing over
// NVLink, and an error over a network.
TEST(NcclMessageTest, TheDeathOfARankIsToldToTheOthers) {
  for (const std::string& script :
       {std::string("dies@1=1,after=2"),
        std::string("dies@1=1,after=2,tells_of_death=1")}) {
    const auto results = RunIn(4, "LongRing", {{"DSD_FAKE_NCCL", script}});
    EXPECT_EQ(results[1].end, RankResult::End::kKilled);
    for (const int rank : {0, 2, 3}) {
      const RankResult& result = results[rank];
      EXPECT_EQ(result.end, RankResult::End::kReturned) << "rank " << rank;
      EXPECT_EQ(result.status.code(), absl::StatusCode::kUnavailable)
          << "rank " << rank << ": " << result.status;
      EXPECT_THAT(std::string(result.status.message()), HasSubstr("rank 1"))
          << "rank " << rank;
      EXPECT_LT(result.ended_at - results[1].ended_at, kBound);
    }
  }
}

// The device still uses the memory: to go on would let it write anywhere.
TEST(NcclMessageTest, AnAbortThatDoesNotEndAKernelEndsTheProcess) {
  const auto results = RunIn(
      2, "RingInTime", {{"DSD_FAKE_NCCL", "hangs=1,abort_hangs@0=1,after=2"}});
  EXPECT_EQ(results[0].end, RankResult::End::kKilled);
  EXPECT_EQ(results[0].signal, SIGABRT);
  EXPECT_THAT(results[0].output, HasSubstr("the device still uses its memory"));
  EXPECT_EQ(results[1].status.code(), absl::StatusCode::kDeadlineExceeded);
}

// --- Ranks as threads, so that leaks can be counted ---

BackendDescriptor Over(
    absl::StatusOr<std::unique_ptr<Engine>> (*create)(const EngineOptions&)) {
  return {"nccl over another", kEngineApiVersion, true, true, true, create};
}

TEST(NcclThreadsTest, AnyBackendOfHostMemoryCanBeTheCompanion) {
  const BackendDescriptor over_local = Over([](const EngineOptions& options) {
    return CreateNcclEngine(options, LocalBackend());
  });
  RankThreadsOptions options;
  options.descriptor = &over_local;
  EXPECT_THAT(RunRankThreads(
                  3,
                  [](Communicator& comm) {
                    return RingFor(comm, 5, 100000, absl::Minutes(1));
                  },
                  options),
              AllOk());
}

// The fake NCCL ends the process if its communicators are used or ended
// wrongly.
TEST(NcclThreadsTest, AbortsAtAnyTimeLeaveNothingBehind) {
  const BackendDescriptor over_gloo = Over([](const EngineOptions& options) {
    return CreateNcclEngine(options, GlooBackend());
  });
  test::AbortStormOptions options;
  options.threads.descriptor = &over_gloo;
  options.rounds = 60;
  options.max_delay = absl::Milliseconds(30);
  options.talk = [](Communicator& comm) {
    return RingFor(comm, 100000, 700000, absl::Minutes(1));
  };
  test::AbortStorm(options);
}

}  // namespace
}  // namespace dsd
