// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/harness/process_counts.h"

#include <dirent.h>

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

}  // namespace dsd::test
