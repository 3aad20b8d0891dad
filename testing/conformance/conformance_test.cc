// SPDX-License-Identifier: Apache-2.0
//
// Runs the cases on the backend DSD_BACKEND. Ranks are processes; threads of
// the test if the backend or DSD_TEST_RANK_THREADS=1 asks for it.

#include "dsd/testing/conformance/conformance.h"

#include <algorithm>
#include <cstdlib>
#include <ostream>
#include <string>
#include <vector>

#include "absl/log/check.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/registry.h"
#include "dsd/testing/harness/rank_processes.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

// Of cases that do not ask for more.
constexpr int kMaxRanks = 4;

absl::Status RunCase(absl::string_view name, Communicator& comm) {
  for (const ConformanceCase& one : ConformanceCases()) {
    if (name != one.name) continue;
    DSD_RETURN_IF_ERROR(one.body(comm));
    // A case that ends well leaves the group alive, or has failed it on
    // purpose.
    return comm.status().ok() ? comm.Shutdown() : absl::OkStatus();
  }
  return absl::NotFoundError(absl::StrCat("no case ", name));
}

DSD_RANK_PROGRAM(Conformance) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(DSD_BACKEND));
  DSD_RETURN_IF_ERROR(rank.Pause("connected"));
  return RunCase(rank.argument(), *comm);
}

DSD_RANK_PROGRAM(ConnectWithinASecond) {
  return rank.Connect(DSD_BACKEND, absl::Seconds(1)).status();
}

const BackendDescriptor& Descriptor() {
  const auto descriptor = FindBackend(DSD_BACKEND);
  CHECK(descriptor.ok()) << descriptor.status();
  return **descriptor;
}

bool VariableIs(const char* name, absl::string_view text) {
  const char* const value = std::getenv(name);
  return value != nullptr && value == text;
}

bool RanksAreThreads() {
  return Descriptor().in_process || VariableIs("DSD_TEST_RANK_THREADS", "1");
}

struct Parameter {
  ConformanceCase one;
  int ranks;
};

void PrintTo(const Parameter& parameter, std::ostream* os) {
  *os << parameter.one.name << " on " << parameter.ranks << " ranks";
}

std::vector<Parameter> Parameters() {
  // Set to 0, each case runs in one of its world sizes, in turn.
  const bool every_world_size = !VariableIs("DSD_EVERY_WORLD_SIZE", "0");
  int turn = 0;
  std::vector<Parameter> parameters;
  for (const ConformanceCase& one : ConformanceCases()) {
    if (one.needs_device_memory && !Descriptor().cuda_memory) continue;
    const int most =
        std::max(one.min_ranks, std::min(kMaxRanks, one.max_ranks));
    if (!every_world_size) {
      parameters.push_back(
          {one, one.min_ranks + turn++ % (most - one.min_ranks + 1)});
      continue;
    }
    for (int ranks = one.min_ranks; ranks <= most; ++ranks) {
      parameters.push_back({one, ranks});
    }
  }
  return parameters;
}

class ConformanceTest : public ::testing::TestWithParam<Parameter> {};

// A case starts when all ranks have returned from connecting: one that fails
// the group at once would else sometimes fail the others' connecting.
TEST_P(ConformanceTest, Passes) {
  const auto& [one, ranks] = GetParam();
  if (const absl::Status status =
          CheckConformanceRequirement(DSD_BACKEND, ranks);
      !status.ok()) {
    GTEST_SKIP() << status.message();
  }
  if (RanksAreThreads()) {
    absl::Mutex mu;
    int connected = 0;
    RankThreadsOptions options;
    options.descriptor = &Descriptor();
    options.shutdown = false;
    EXPECT_THAT(RunRankThreads(
                    ranks,
                    [&](Communicator& comm) {
                      const auto all = [&] { return connected == ranks; };
                      mu.Lock();
                      ++connected;
                      mu.Await(absl::Condition(&all));
                      mu.Unlock();
                      return RunCase(one.name, comm);
                    },
                    options),
                AllOk());
    return;
  }
  RankRunOptions options;
  options.argument = one.name;
  RankProcesses processes(ranks, "Conformance", options);
  for (int rank = 0; rank < ranks; ++rank) {
    EXPECT_TRUE(processes.WaitFor(rank, "connected")) << "rank " << rank;
  }
  for (int rank = 0; rank < ranks; ++rank) processes.Release(rank);
  EXPECT_THAT(processes.Wait(), AllRanksOk());
}

INSTANTIATE_TEST_SUITE_P(All, ConformanceTest,
                         ::testing::ValuesIn(Parameters()),
                         [](const auto& info) {
                           return absl::StrCat(info.param.one.name, "_",
                                               info.param.ranks);
                         });

TEST(ConformanceConnectTest, EachAbsentRankIsNamed) {
  if (const absl::Status status = CheckConformanceRequirement(DSD_BACKEND, 3);
      !status.ok()) {
    GTEST_SKIP() << status.message();
  }
  if (RanksAreThreads()) {
    for (int absent = 0; absent < 3; ++absent) {
      RankThreadsOptions options;
      options.descriptor = &Descriptor();
      options.absent = {absent};
      options.connect_timeout = absl::Milliseconds(100);
      const auto statuses = RunRankThreads(
          3, [](Communicator& comm) { return comm.Barrier(); }, options);
      for (int rank = 0; rank < 3; ++rank) {
        if (rank == absent) continue;
        EXPECT_THAT(statuses[rank],
                    IsStatus(absl::StatusCode::kDeadlineExceeded,
                             absl::StrCat("rank ", absent, " of 3")));
      }
    }
    return;
  }
  for (int absent = 0; absent < 3; ++absent) {
    RankRunOptions options;
    options.absent = {absent};
    const auto results = RunRanks(3, "ConnectWithinASecond", options);
    for (int rank = 0; rank < 3; ++rank) {
      if (rank == absent) continue;
      // Without rank 0 there is nobody to ask.
      EXPECT_THAT(results[rank].status,
                  absent == 0 ? ::testing::Matcher<absl::Status>(IsStatus(
                                    absl::StatusCode::kDeadlineExceeded,
                                    "nobody answers"))
                              : ::testing::Matcher<absl::Status>(IsStatus(
                                    absl::StatusCode::kDeadlineExceeded,
                                    absl::StrCat("rank ", absent, " of 3"))));
    }
  }
}

}  // namespace
}  // namespace dsd
