// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/parallel/fully_shard_context.h"

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/_foreach_copy.h"
#include "ATen/ops/empty.h"
#include "c10/core/impl/VirtualGuardImpl.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/torch_boundary.h"

namespace dsd {
namespace {

absl::Span<std::byte> SpanOf(const at::Tensor& tensor) {
  return absl::MakeSpan(static_cast<std::byte*>(tensor.mutable_data_ptr()),
                        tensor.nbytes());
}

// Memory of a device as what is enqueued on it now leaves it.
MemorySpace SpaceOf(const at::Tensor& tensor) {
  const c10::Device device = tensor.device();
  return {DeviceType::kCuda, c10::impl::VirtualGuardImpl(device.type())
                                 .getStream(device)
                                 .native_handle()};
}

void CopyUnlessSame(const at::Tensor& from, const at::Tensor& to) {
  if (from.const_data_ptr() != to.const_data_ptr()) to.copy_(from);
}

at::Tensor InHost(const at::Tensor& like) {
  return at::empty(like.sizes(), like.options().device(c10::kCPU).pinned_memory(
                                     like.is_cuda()));
}

}  // namespace

FullyShardContext::FullyShardContext(Communicator* comm,
                                     FullyShardOptions options)
    : comm_(comm), options_(std::move(options)) {}

absl::Status FullyShardContext::status() const {
  absl::MutexLock lock(&mu_);
  return status_;
}

void FullyShardContext::AllGather(const at::Tensor& mine,
                                  absl::Span<const at::Tensor> parts,
                                  absl::FunctionRef<std::string()> what) {
  if (world_size() == 1) return CopyUnlessSame(mine, parts[0]);
  if (mine.is_cpu()) {
    std::vector<absl::Span<std::byte>> spans;
    for (const at::Tensor& part : parts) spans.push_back(SpanOf(part));
    return Check(comm_->AllGather(SpanOf(mine), spans, options_.call), what);
  }
  if (comm_->has_cuda_memory()) return AllGatherOnDevice(mine, parts, what);
  std::vector<at::Tensor> in_host;
  for (const at::Tensor& part : parts) in_host.push_back(InHost(part));
  in_host[rank()].copy_(mine);
  AllGather(in_host[rank()], in_host, what);
  at::_foreach_copy_(at::TensorList(parts.data(), parts.size()), in_host,
                     /*non_blocking=*/true);
}

void FullyShardContext::AllGatherOnDevice(
    const at::Tensor& mine, absl::Span<const at::Tensor> parts,
    absl::FunctionRef<std::string()> what) {
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  for (int peer = 0; peer < world_size(); ++peer) {
    if (peer == rank()) continue;
    if (mine.numel() > 0) sends.push_back({peer, SpanOf(mine), SpaceOf(mine)});
    if (parts[peer].numel() == 0) continue;
    recvs.push_back({peer, SpanOf(parts[peer]), SpaceOf(mine)});
  }
  CopyUnlessSame(mine, parts[rank()]);
  Check(comm_->Exchange(sends, recvs, what(), options_.call), what);
}

void FullyShardContext::ReduceScatterSum(
    const at::Tensor& input, absl::Span<const int64_t> counts,
    const at::Tensor& output, DType dtype,
    absl::FunctionRef<std::string()> what) {
  if (world_size() == 1) return CopyUnlessSame(input, output);
  if (input.is_cpu()) {
    return Check(comm_->ReduceScatter(SpanOf(input), counts, SpanOf(output),
                                      dtype, ReduceOp::kSum, options_.call),
                 what);
  }
  if (comm_->has_cuda_memory()) {
    return ReduceScatterSumOnDevice(input, counts, output, what);
  }
  const at::Tensor host_input = InHost(input);
  const at::Tensor host_output = InHost(output);
  host_input.copy_(input);
  ReduceScatterSum(host_input, counts, host_output, dtype, what);
  output.copy_(host_output, /*non_blocking=*/true);
}

void FullyShardContext::ReduceScatterSumOnDevice(
    const at::Tensor& input, absl::Span<const int64_t> counts,
    const at::Tensor& output, absl::FunctionRef<std::string()> what) {
  const int64_t count = counts[rank()];
  const at::Tensor arrived = at::empty({world_size(), count}, output.options());
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  int64_t begin = 0;
  for (int peer = 0; peer < world_size(); begin += counts[peer++]) {
    const at::Tensor part = input.narrow(0, begin, counts[peer]);
    if (peer == rank()) {
      arrived.select(0, peer).copy_(part);
      continue;
    }
    if (counts[peer] > 0) sends.push_back({peer, SpanOf(part), SpaceOf(part)});
    if (count == 0) continue;
    recvs.push_back({peer, SpanOf(arrived.select(0, peer)), SpaceOf(input)});
  }
  Check(comm_->Exchange(sends, recvs, what(), options_.call), what);
  // As Communicator::ReduceScatter does.
  const bool is_short = output.element_size() < 4;
  at::Tensor sum =
      arrived.select(0, 0).to(is_short ? c10::kFloat : output.scalar_type());
  for (int from = 1; from < world_size(); ++from) {
    sum.add_(arrived.select(0, from));
  }
  output.copy_(sum);
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
