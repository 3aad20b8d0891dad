// SPDX-License-Identifier: Apache-2.0
//
// More threads for walks over many tensors, which mostly wait for memory.

#ifndef DSD_CORE_STATE_DICT_THREADS_H_
#define DSD_CORE_STATE_DICT_THREADS_H_

#include <cstddef>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {

// How many threads pay for a walk over `size` tensors, of those that LibTorch
// may use (at::set_num_threads, OMP_NUM_THREADS). One in inference mode, which
// is of the thread and makes other tensors.
int ThreadsFor(size_t size);

// Calls both and returns when both are done; `second`, which does not throw, in
// a thread of its own if `threads` > 1.
void RunBoth(Env* env, int threads, absl::FunctionRef<void()> first,
             absl::FunctionRef<void()> second);

// Calls `body` for ranges [begin, end) that make up [0, size), at the same time
// in up to `threads` threads, in ascending order within each. Returns an error
// of the first range that has one; the ranges after it may be left out.
// Exceptions of LibTorch are errors.
absl::Status ForRanges(Env* env, int threads, size_t size,
                       absl::FunctionRef<absl::Status(size_t, size_t)> body);

// The same with something made of each range, which `body` adds to: in
// ascending order of the ranges.
template <class T>
absl::StatusOr<std::vector<T>> MapRanges(
    Env* env, int threads, size_t size,
    absl::FunctionRef<absl::Status(size_t, size_t, T&)> body) {
  absl::Mutex mu;
  absl::btree_map<size_t, T> parts;  // by the begin of the range
  DSD_RETURN_IF_ERROR(ForRanges(env, threads, size,
                                [&](size_t begin, size_t end) -> absl::Status {
                                  T part;
                                  DSD_RETURN_IF_ERROR(body(begin, end, part));
                                  const absl::MutexLock lock(&mu);
                                  parts.emplace(begin, std::move(part));
                                  return absl::OkStatus();
                                }));
  std::vector<T> all;
  for (auto& [begin, part] : parts) all.push_back(std::move(part));
  return all;
}

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_THREADS_H_
