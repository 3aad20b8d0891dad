// SPDX-License-Identifier: Apache-2.0
//
// What benchmarks share: seconds, and the peer that runs beside.

#ifndef DSD_TESTING_BENCHMARKS_MEASURE_H_
#define DSD_TESTING_BENCHMARKS_MEASURE_H_

#include <cstdlib>
#include <iostream>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "nlohmann/json.hpp"

namespace dsd {

struct Seconds {
  double wall = 0;
  double cpu = 0;
};

// Of this process, all threads.
double CpuSeconds();

// The largest memory that this process has had, since the last reset if there
// was one.
double PeakMiB();
// Returns the memory that it has now.
double ResetPeakMiB();

template <class Fn>
Seconds Measure(Fn&& fn) {
  const double cpu = CpuSeconds();
  const absl::Time start = absl::Now();
  fn();
  return {absl::ToDoubleSeconds(absl::Now() - start), CpuSeconds() - cpu};
}

// The value, or the end of the program.
template <class T>
T Must(absl::StatusOr<T> result) {
  if (result.ok()) return *std::move(result);
  std::cerr << result.status() << std::endl;
  std::exit(1);
}

// Runs a command of the shell that prints JSON; the end of the program if it
// fails.
nlohmann::json RunPeer(const std::string& command);

}  // namespace dsd

#endif  // DSD_TESTING_BENCHMARKS_MEASURE_H_
