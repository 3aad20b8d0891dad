// SPDX-License-Identifier: Apache-2.0
//
// What the sharded units of one model share: the ranks among which parameters
// are cut, and the first error of a collective.

#ifndef DSD_FRONTENDS_PARALLEL_FULLY_SHARD_CONTEXT_H_
#define DSD_FRONTENDS_PARALLEL_FULLY_SHARD_CONTEXT_H_

#include <cstdint>
#include <string>

#include "ATen/core/Tensor.h"
#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/comm/communicator.h"

namespace dsd {

struct FullyShardOptions {
  // Parameters of a unit of at most this many bytes (whole, not the shard)
  // travel in one message of the unit, larger ones on their own and without a
  // copy.
  int64_t bucket_bytes = int64_t{256} << 10;
  // Of each collective.
  CallOptions call;
};

// Made once per model and communicator, shared by its units. Thread-compatible;
// status() may come from any thread.
class FullyShardContext {
 public:
  // On CUDA, ranks that share a device must be processes: autograd has one
  // thread per device and process, in which no two ranks can wait for each
  // other.
  //
  // `comm` must outlive the context and is used by forward() and backward() of
  // the units, in that order: other collective calls on the same lane must come
  // between them in the same order on all ranks. Null: a world of one.
  explicit FullyShardContext(Communicator* comm,
                             FullyShardOptions options = {});

  int rank() const { return comm_ == nullptr ? 0 : comm_->rank(); }
  int world_size() const { return comm_ == nullptr ? 1 : comm_->size(); }
  const FullyShardOptions& options() const { return options_; }

  // OK, or the first error of a collective that a unit made. It also left
  // forward() or backward() as a StatusError.
  absl::Status status() const;

  // Communicator's calls of the same names, for units: on tensors of one
  // dimension without gaps, all in host memory or all on one CUDA device. What
  // is on a device goes through host memory where the backend moves only that;
  // the results are the same. Throw StatusError (core/tensor/torch_boundary.h),
  // whose text begins with `what()`.
  void AllGather(const at::Tensor& mine, absl::Span<const at::Tensor> parts,
                 absl::FunctionRef<std::string()> what);
  void ReduceScatterSum(const at::Tensor& input,
                        absl::Span<const int64_t> counts,
                        const at::Tensor& output, DType dtype,
                        absl::FunctionRef<std::string()> what);

 private:
  // The same on tensors in memory of the device, which the backend moves.
  void AllGatherOnDevice(const at::Tensor& mine,
                         absl::Span<const at::Tensor> parts,
                         absl::FunctionRef<std::string()> what);
  void ReduceScatterSumOnDevice(const at::Tensor& input,
                                absl::Span<const int64_t> counts,
                                const at::Tensor& output,
                                absl::FunctionRef<std::string()> what);
  void Check(const absl::Status& status, absl::FunctionRef<std::string()> what);

  Communicator* const comm_;
  const FullyShardOptions options_;
  mutable absl::Mutex mu_;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dsd

#endif  // DSD_FRONTENDS_PARALLEL_FULLY_SHARD_CONTEXT_H_
