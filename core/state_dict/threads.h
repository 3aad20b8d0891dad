// SPDX-License-Identifier: Apache-2.0
//
// More threads for walks over many tensors, which mostly wait for memory.

#ifndef DSD_CORE_STATE_DICT_THREADS_H_
#define DSD_CORE_STATE_DICT_THREADS_H_

#include <cstddef>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "dsd/core/base/env.h"

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

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_THREADS_H_
