// SPDX-License-Identifier: Apache-2.0
//
// kill -9, at every stage, of every rank: each survivor gets an error within
// two seconds, and its own text says who died. (Other ways to go are in
// departure_test.cc.) Compiled once per backend, with its name in DSD_BACKEND.

#include <signal.h>

#include <algorithm>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/registry.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/testing/harness/rank_processes.h"
#include "dsd/testing/harness/test_seed.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;

constexpr int kRanks = 4;
constexpr absl::Duration kBound = absl::Seconds(2);

uint64_t Seed() {
  static const uint64_t seed = test::TestSeed();
  return seed;
}

// 128 MiB from rows to columns, of which 24 MiB come to each rank from the
// others, in chunks of 1 MiB: whoever dies has some under way.
DSD_RANK_PROGRAM(Transfer) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(DSD_BACKEND));
  const DeviceMesh mesh = DeviceMesh::Iota({kRanks});
  std::vector<std::byte> local[2];
  MemoryEndpoint endpoints[2];
  for (const int dim : {0, 1}) {
    DSD_ASSIGN_OR_RETURN(Layout layout, Layout::FromPlacements(
                                            {4096, 8192}, mesh, {Shard(dim)}));
    local[dim].resize(size_t{32} << 20);
    DSD_RETURN_IF_ERROR(
        endpoints[dim].AddLocal({"model.w", DType::kFloat32, std::move(layout)},
                                comm->rank(), local[dim].data()));
  }
  TransferOptions options;
  options.chunk_bytes = int64_t{1} << 20;
  int64_t reached = 0;
  options.call.progress = [&](const Progress& progress) {
    while (reached < progress.bytes_done >> 20) {
      rank.Reach(absl::StrCat("MiB ", ++reached));
    }
  };
  DSD_RETURN_IF_ERROR(
      Redistribute(endpoints[0], endpoints[1], comm.get(), options).status());
  return comm->Shutdown();
}

DSD_RANK_PROGRAM(ReduceOf64MiB) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(DSD_BACKEND));
  std::vector<std::byte> data(size_t{64} << 20);
  CallOptions options;
  options.progress = [&](const Progress& progress) {
    rank.Reach(absl::StrCat("step ", progress.bytes_done >> 22));
  };
  DSD_RETURN_IF_ERROR(comm->AllReduce(absl::MakeSpan(data), DType::kFloat32,
                                      ReduceOp::kSum, options));
  return comm->Shutdown();
}

DSD_RANK_PROGRAM(IdleBarriers) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(DSD_BACKEND));
  DSD_RETURN_IF_ERROR(comm->Barrier());
  rank.Reach("between");
  DSD_RETURN_IF_ERROR(comm->Barrier());
  return comm->Shutdown();
}

// Dies after the store knows it, while the others connect to it.
DSD_RANK_PROGRAM(DieWhileConnecting) {
  static RankContext* const context = &rank;
  DSD_ASSIGN_OR_RETURN(static const BackendDescriptor* const backend,
                       FindBackend(DSD_BACKEND));
  static BackendDescriptor descriptor = *backend;
  descriptor.create = [](const EngineOptions& options) {
    context->Reach("connecting");
    return backend->create(options);
  };
  WorldOptions options;
  options.descriptor = &descriptor;
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectWorld(rank.launch(), options));
  return comm->Shutdown();
}

// Each survivor: Unavailable, naming the dead. Returns when the last one knew.
absl::Duration ExpectDeathReported(const std::vector<RankResult>& results,
                                   int dead, absl::string_view what) {
  EXPECT_EQ(results[dead].end, RankResult::End::kKilled);
  EXPECT_EQ(results[dead].signal, SIGKILL);
  absl::Duration slowest = absl::ZeroDuration();
  for (int rank = 0; rank < static_cast<int>(results.size()); ++rank) {
    if (rank == dead) continue;
    const RankResult& result = results[rank];
    SCOPED_TRACE(absl::StrCat("rank ", rank, ", after the death of ", dead));
    EXPECT_EQ(result.end, RankResult::End::kReturned);
    EXPECT_EQ(result.status.code(), absl::StatusCode::kUnavailable)
        << result.status;
    EXPECT_THAT(std::string(result.status.message()),
                HasSubstr(absl::StrCat("rank ", dead, " died")));
    const absl::Duration latency = result.ended_at - results[dead].killed_at;
    slowest = std::max(slowest, latency);
  }
  std::cout << what << ": rank " << dead << " killed; slowest survivor after "
            << absl::FormatDuration(absl::Trunc(slowest, absl::Microseconds(1)))
            << "; rank " << (dead + 1) % results.size() << " says: "
            << results[(dead + 1) % results.size()].status.message()
            << std::endl;
  return slowest;
}

// Kills rank `dead` at `place` of `program`. A machine with more to do than it
// can may keep any process from running for seconds, so the bound counts as
// kept if one kill of three keeps it: what is too slow by design never does.
void ExpectDeathReportedInTime(absl::string_view program, int dead,
                               const std::string& place) {
  constexpr int kAttempts = 3;
  absl::Duration soonest = absl::InfiniteDuration();
  for (int i = 0; i < kAttempts && soonest >= kBound; ++i) {
    RankRunOptions options;
    options.kill_at[dead] = place;
    soonest = std::min(
        soonest, ExpectDeathReported(RunRanks(kRanks, program, options), dead,
                                     absl::StrCat(program, ", ", place)));
  }
  EXPECT_LT(soonest, kBound);
}

class DeathTest : public ::testing::TestWithParam<int> {};

TEST_P(DeathTest, InATransferAtARandomChunk) {
  std::mt19937_64 random(Seed() + GetParam());
  for (int round = 0; round < 3; ++round) {
    ExpectDeathReportedInTime("Transfer", GetParam(),
                              absl::StrCat("MiB ", 1 + random() % 20));
  }
}

TEST_P(DeathTest, InAReduction) {
  ExpectDeathReportedInTime("ReduceOf64MiB", GetParam(), "step 8");
}

TEST_P(DeathTest, WhileTheOthersWaitInABarrier) {
  ExpectDeathReportedInTime("IdleBarriers", GetParam(), "between");
}

TEST_P(DeathTest, WhileConnecting) {
  ExpectDeathReportedInTime("DieWhileConnecting", GetParam(), "connecting");
}

INSTANTIATE_TEST_SUITE_P(Rank, DeathTest, ::testing::Range(0, kRanks),
                         [](const auto& info) {
                           return absl::StrCat(info.param);
                         });

}  // namespace
}  // namespace dsd
