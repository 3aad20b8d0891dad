// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/parallel/fully_shard_context.h"

#include <cstring>
#include <string>
#include <utility>

#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/torch_boundary.h"

namespace dsd {
namespace {

// The copy that a collective of one rank is.
void CopyBytes(absl::Span<const std::byte> from, absl::Span<std::byte> to) {
  if (!from.empty() && from.data() != to.data()) {
    std::memcpy(to.data(), from.data(), from.size());
  }
}

}  // namespace

FullyShardContext::FullyShardContext(Communicator* comm,
                                     FullyShardOptions options)
    : comm_(comm), options_(std::move(options)) {}

absl::Status FullyShardContext::status() const {
  absl::MutexLock lock(&mu_);
  return status_;
}

void FullyShardContext::AllGather(absl::Span<const std::byte> mine,
                                  absl::Span<const absl::Span<std::byte>> parts,
                                  absl::FunctionRef<std::string()> what) {
  if (comm_ == nullptr) return CopyBytes(mine, parts[0]);
  Check(comm_->AllGather(mine, parts, options_.call), what);
}

void FullyShardContext::ReduceScatterSum(
    absl::Span<const std::byte> input, absl::Span<const int64_t> counts,
    absl::Span<std::byte> output, DType dtype,
    absl::FunctionRef<std::string()> what) {
  if (comm_ == nullptr) return CopyBytes(input, output);
  Check(comm_->ReduceScatter(input, counts, output, dtype, ReduceOp::kSum,
                             options_.call),
        what);
}

void FullyShardContext::Check(const absl::Status& status,
                              absl::FunctionRef<std::string()> what) {
  if (status.ok()) return;
  absl::Status annotated = Annotate(status, what());
  {
    absl::MutexLock lock(&mu_);
    status_.Update(annotated);
  }
  throw StatusError(std::move(annotated));
}

}  // namespace dsd
