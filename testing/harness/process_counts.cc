// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/harness/process_counts.h"

#include <dirent.h>

#include <fstream>
#include <string>

#include "absl/time/time.h"
#include "dsd/core/base/env.h"

namespace dsd::test {
namespace {

int CountEntries(const char* path) {
  DIR* const folder = opendir(path);
  if (folder == nullptr) return -1;
  int count = -2;  // "." and ".."
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count;
}

double StatusMiB(const std::string& field) {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word && word != field) {
  }
  double kib = 0;
  status >> kib;
  return kib / 1024;
}

}  // namespace

int OpenDescriptors() {
  return CountEntries("/proc/self/fd") - 1;  // that of looking
}

int RunningThreads(int expected) {
  Env* const env = Env::Real();
  const absl::Time end =
      env->Now() + (expected > 0 ? absl::Seconds(20) : absl::ZeroDuration());
  while (true) {
    const int count = CountEntries("/proc/self/task");
    if (count <= expected || env->Now() >= end) return count;
    env->SleepUntil(env->Now() + absl::Milliseconds(1));
  }
}

double PeakMiB() { return StatusMiB("VmHWM:"); }

double ResetPeakMiB() {
  std::ofstream("/proc/self/clear_refs") << "5";
  return MemoryMiB();
}

double MemoryMiB() { return StatusMiB("VmRSS:"); }

}  // namespace dsd::test
