// SPDX-License-Identifier: Apache-2.0
//
// What benchmarks share: seconds, and the peer that runs beside.

#ifndef DSD_TESTING_BENCHMARKS_MEASURE_H_
#define DSD_TESTING_BENCHMARKS_MEASURE_H_

#include <cstdlib>
#include <iostream>
#include <string>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "dsd/testing/harness/process_counts.h"
#include "nlohmann/json.hpp"

namespace dsd {

// What the benchmarks beside a peer are started with: the two words of the
// command that runs the peer, and --quick. They add options of their own to
// `app` before CLI11_PARSE(app, argc, argv).
struct CommandLine {
  explicit CommandLine(const std::string& what) : app(what) {
    app.add_option("python", python, "runs the peer")->required();
    app.add_option("peer", script, "the peer's program")->required();
    app.add_flag("--quick", quick, "a fraction of the sizes");
  }

  std::string peer() const { return python + " " + script; }

  CLI::App app;
  std::string python;
  std::string script;
  bool quick = false;
};

struct Seconds {
  double wall = 0;
  double cpu = 0;
};

// Of this process, all threads.
double CpuSeconds();

using test::MemoryMiB;
using test::PeakMiB;
using test::ResetPeakMiB;

template <class Fn>
Seconds Measure(Fn&& fn) {
  const double cpu = CpuSeconds();
  const absl::Time start = absl::Now();
  fn();
  return {absl::ToDoubleSeconds(absl::Now() - start), CpuSeconds() - cpu};
}

// The run with the least wall time. `prepare` is not measured.
template <class Prepare, class Work>
Seconds LeastOf(int runs, Prepare&& prepare, Work&& work) {
  Seconds least;
  for (int run = 0; run < runs; ++run) {
    prepare();
    const Seconds now = Measure(work);
    if (run == 0 || now.wall < least.wall) least = now;
  }
  return least;
}

// The value, or the end of the program.
inline void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::cerr << status << std::endl;
  std::exit(1);
}
template <class T>
T Must(absl::StatusOr<T> result) {
  Must(result.status());
  return *std::move(result);
}

// Runs a command of the shell that prints JSON; the end of the program if it
// fails.
nlohmann::json RunPeer(const std::string& command);

}  // namespace dsd

#endif  // DSD_TESTING_BENCHMARKS_MEASURE_H_
