// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/threads.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "ATen/Parallel.h"
#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "c10/core/InferenceMode.h"
#include "dsd/core/tensor/torch_boundary.h"

namespace dsd {
namespace {

// A thread costs as much as a walk over some hundred tensors.
constexpr size_t kManyTensors = 8192;
constexpr int kMaxThreads = 8;  // there is not more memory than for some
constexpr size_t kRange = 1024;

}  // namespace

int ThreadsFor(size_t size) {
  if (size < kManyTensors || c10::InferenceMode::is_enabled()) return 1;
  return std::min(at::get_num_threads(), kMaxThreads);
}

void RunBoth(Env* env, int threads, absl::FunctionRef<void()> first,
             absl::FunctionRef<void()> second) {
  std::unique_ptr<EnvThread> thread;
  if (threads > 1) thread = env->StartThread("dsd_walk", [&] { second(); });
  first();
  if (thread == nullptr) second();
}

absl::Status ForRanges(Env* env, int threads, size_t size,
                       absl::FunctionRef<absl::Status(size_t, size_t)> body) {
  absl::Mutex mu;
  size_t first_error = size;
  absl::Status status;
  std::atomic<size_t> next{0};
  const auto work = [&] {
    while (true) {
      const size_t begin = next.fetch_add(kRange);
      if (begin >= size) return;
      const absl::Status result = TorchToStatus(
          [&] { return body(begin, std::min(begin + kRange, size)); });
      if (result.ok()) continue;
      next = size;
      const absl::MutexLock lock(&mu);
      if (begin > first_error) return;
      first_error = begin;
      status = result;
      return;
    }
  };
  {
    const int useful = static_cast<int>(
        std::min<size_t>(threads, (size + kRange - 1) / kRange));
    std::vector<std::unique_ptr<EnvThread>> others;
    for (int i = 1; i < useful; ++i) {  // null if there can be no more
      others.push_back(env->StartThread("dsd_walk", work));
    }
    work();
  }
  return status;
}

}  // namespace dsd
