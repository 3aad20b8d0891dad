// SPDX-License-Identifier: Apache-2.0
//
// What the backends move between two ranks of one host, beside what the host
// can do: a memcpy, and bytes over a TCP connection of 127.0.0.1, both measured
// in the same ranks and rounds. Machines differ and are busy: compare ratios.

#include <time.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/testing/benchmarks/raw_tcp.h"
#include "dsd/testing/harness/rank_processes.h"

namespace dsd {
namespace {

constexpr size_t kBytes = size_t{64} << 20;
constexpr int kRounds = 12;
constexpr int kBarriers = 200;

absl::Duration CpuTime() {
  timespec time = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return absl::DurationFromTimespec(time);
}

DSD_RANK_PROGRAM(Measure) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(rank.argument()));
  DSD_ASSIGN_OR_RETURN(RawTcp raw, RawTcp::Connect(*comm, 0, 1));
  Env* const env = comm->env();
  // Touched before: the first use of a page costs more than any transport.
  std::vector<std::byte> from(kBytes, std::byte{1});
  std::vector<std::byte> to(kBytes, std::byte{2});
  const bool sends = comm->rank() == 0;

  const std::pair<const char*, std::function<absl::Status()>> works[] = {
      {"memcpy",
       [&] {
         if (!sends) std::memcpy(to.data(), from.data(), kBytes);
         return absl::OkStatus();
       }},
      {"tcp",
       [&] {
         return sends ? RawTcp::Exchange({{&raw, from, {}}})
                      : RawTcp::Exchange({{&raw, {}, absl::MakeSpan(to)}});
       }},
      {"send",
       [&] {
         return sends ? comm->Exchange({{1, from}}, {}, "send")
                      : comm->Exchange({}, {{0, absl::MakeSpan(to)}}, "send");
       }},
      {"broadcast",
       [&] { return comm->Broadcast(absl::MakeSpan(sends ? from : to), 0); }},
  };
  absl::Duration best[std::size(works)];
  std::fill(std::begin(best), std::end(best), absl::InfiniteDuration());
  absl::Duration least_cpu[std::size(works)];
  std::fill(std::begin(least_cpu), std::end(least_cpu),
            absl::InfiniteDuration());
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < std::size(works); ++i) {
      DSD_RETURN_IF_ERROR(comm->Barrier());
      const absl::Time start = env->Now();
      const absl::Duration cpu_start = CpuTime();
      DSD_RETURN_IF_ERROR(works[i].second());
      best[i] = std::min(best[i], env->Now() - start);
      least_cpu[i] = std::min(least_cpu[i], CpuTime() - cpu_start);
    }
  }
  // At rank 1 all bytes have arrived.
  for (size_t i = 0; i < std::size(works); ++i) {
    rank.Record(works[i].first,
                absl::StrCat(kBytes / absl::ToDoubleNanoseconds(best[i])));
    rank.Record(absl::StrCat(works[i].first, " cpu"),
                absl::StrCat(absl::ToDoubleMilliseconds(least_cpu[i])));
  }
  if (to != from && !sends) return absl::InternalError("other bytes arrived");

  absl::Duration least = absl::InfiniteDuration();
  for (int round = 0; round < kRounds; ++round) {
    const absl::Time start = env->Now();
    for (int i = 0; i < kBarriers; ++i) DSD_RETURN_IF_ERROR(comm->Barrier());
    least = std::min(least, (env->Now() - start) / kBarriers);
  }
  rank.Record("barrier", absl::StrCat(absl::ToDoubleMicroseconds(least)));
  return comm->Shutdown();
}

struct Row {
  const char* name;
  const char* backend;
  const char* transports;  // UCX_TLS; null: not set
  const char* peer;        // what it is compared with
  double goal;
};

// `only`: the line to measure; empty: all.
int Run(const std::string& only) {
  constexpr Row kRows[] = {
      {"gloo", "gloo", nullptr, "tcp", 0.8},
      {"ucx-posix", "ucx", "posix,self", "memcpy", 0.6},
      {"ucx-tcp", "ucx", "tcp,self", "tcp", 0.8},
      {"ucx", "ucx", nullptr, "memcpy", 0.6},
  };
  absl::PrintF("2 ranks, %d MiB, GB/s, best of %d\n", kBytes >> 20, kRounds);
  absl::PrintF("%-16s %8s %8s %8s %10s  %-14s %6s %6s %6s  %-20s %12s\n",
               "backend", "memcpy", "raw tcp", "send", "broadcast",
               "compared with", "send", "bcast", "goal", "CPU ms tcp, send",
               "barrier (us)");
  for (const Row& row : kRows) {
    if (!only.empty() && row.name != only) continue;
    RankRunOptions options;
    options.argument = row.backend;
    options.timeout = absl::Minutes(3);
    if (row.transports != nullptr) {
      options.environment.emplace_back("UCX_TLS", row.transports);
    }
    const std::vector<RankResult> results = RunRanks(2, "Measure", options);
    for (const RankResult& result : results) {
      if (result.end != RankResult::End::kReturned || !result.status.ok()) {
        std::cerr << row.name << ": " << result.status << "\n"
                  << result.output << std::endl;
        return 1;
      }
    }
    const auto of = [&](int rank, const std::string& name) {
      double number = 0;
      if (!absl::SimpleAtod(results[rank].values.at(name), &number)) return 0.0;
      return number;
    };
    const auto value = [&](const char* name) { return of(1, name); };
    const auto cpu = [&](const std::string& name) {
      return of(0, name + " cpu") + of(1, name + " cpu");
    };
    absl::PrintF(
        "%-16s %8.2f %8.2f %8.2f %10.2f  %-14s %6.2f %6.2f %6.2f  %-20s "
        "%12.1f\n",
        row.name, value("memcpy"), value("tcp"), value("send"),
        value("broadcast"), row.peer, value("send") / value(row.peer),
        value("broadcast") / value(row.peer), row.goal,
        absl::StrFormat("%.1f, %.1f", cpu("tcp"), cpu("send")),
        value("barrier"));
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace dsd

// comm_benchmark [name of a line]
int main(int argc, char** argv) {
  const std::string program = dsd::RequestedRankProgram();
  if (!program.empty()) return dsd::RankMain(program);
  dsd::AllowRankProcesses();
  return dsd::Run(argc > 1 ? argv[1] : "");
}
