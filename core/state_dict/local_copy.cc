// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/local_copy.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "ATen/core/Tensor.h"
#include "ATen/core/grad_mode.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/state_dict/threads.h"
#include "dsd/core/tensor/tensor_memory.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {
namespace {

bool IsPlainMemory(const at::Tensor& tensor) {
  return tensor.defined() && tensor.layout() == c10::Layout::Strided &&
         !tensor.is_meta() && ToDType(tensor.scalar_type()).ok() &&
         ToDevice(tensor.device()).ok();
}

// Whether both have their elements in the same order without gaps, as bytes
// that mean the same.
bool HaveSameBytes(const at::Tensor& from, const at::Tensor& to) {
  if (from.scalar_type() != to.scalar_type() || !from.is_cpu() ||
      !to.is_cpu() || from.is_conj() != to.is_conj() ||
      from.is_neg() != to.is_neg()) {
    return false;
  }
  return (from.is_contiguous() && to.is_contiguous()) ||
         (from.is_non_overlapping_and_dense() &&
          from.strides() == to.strides());
}

void Copy(const at::Tensor& from, const at::Tensor& to) {
  if (!HaveSameBytes(from, to)) {
    to.copy_(from);
    return;
  }
  // May be the same memory: a dict with aliases is set where it is from.
  if (to.numel() > 0 && from.const_data_ptr() != to.const_data_ptr()) {
    std::memmove(to.mutable_data_ptr(), from.const_data_ptr(), to.nbytes());
  }
  to.unsafeGetTensorImpl()->bump_version();
}

bool IsLocalCopy(const TensorPair& pair) {
  const absl::Span<const at::Tensor> from = pair.source.locals();
  const absl::Span<const at::Tensor> to = pair.target.locals();
  if (pair.source.is_plain() != pair.target.is_plain() ||
      from.size() != to.size()) {
    return false;
  }
  if (!pair.source.is_plain() &&
      (pair.source.holder() != pair.target.holder() ||
       !Layout::SameGeometry(pair.source.layout(), pair.target.layout()))) {
    return false;
  }
  for (size_t i = 0; i < from.size(); ++i) {
    if (!IsPlainMemory(from[i]) || !IsPlainMemory(to[i]) ||
        to[i].is_inference() || from[i].sizes() != to[i].sizes()) {
      return false;
    }
  }
  return true;
}

}  // namespace

void PrefetchPairs(absl::Span<const TensorPair> pairs, size_t current,
                   bool with_memory) {
  constexpr size_t kAhead = 4;
  const auto visit = [&](size_t index, auto prefetch) {
    if (index >= pairs.size()) return;
    for (const TensorValue* value :
         {&pairs[index].source, &pairs[index].target}) {
      for (const at::Tensor& local : value->locals()) prefetch(local);
    }
  };
  visit(current + 3 * kAhead, PrefetchTensor);
  if (!with_memory) return;
  visit(current + 2 * kAhead, PrefetchStorage);
  visit(current + kAhead, PrefetchMemory);
}

std::string PairName::Text() const {
  if (own_ != nullptr) return *own_;
  return absl::StrCat(prefix_, ".", *fqn_, suffix_ == nullptr ? "" : ".",
                      suffix_ == nullptr ? "" : *suffix_);
}

bool AreLocalCopies(Env* env, int threads, absl::Span<const TensorPair> pairs) {
  std::atomic<bool> all{true};
  const absl::Status status =
      ForRanges(env, threads, pairs.size(), [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end && all; ++i) {
          PrefetchPairs(pairs.first(end), i, /*with_memory=*/false);
          if (!IsLocalCopy(pairs[i])) all = false;
        }
        return absl::OkStatus();
      });
  return status.ok() && all;
}

absl::StatusOr<TransferStats> CopyLocally(Env* env, int threads,
                                          absl::Span<TensorPair> pairs,
                                          const CallOptions& call) {
  int64_t total = 0;
  if (call.progress) {
    threads = 1;
    for (const TensorPair& pair : pairs) {
      for (const at::Tensor& to : pair.target.locals()) total += to.nbytes();
    }
  }
  std::atomic<int64_t> all_bytes{0};
  const auto copy = [&](size_t begin, size_t end) -> absl::Status {
    const at::NoGradGuard no_grad;
    int64_t bytes = 0;
    for (size_t k = begin; k < end; ++k) {
      PrefetchPairs(pairs.first(end), k, /*with_memory=*/true);
      TensorPair& pair = pairs[k];
      const absl::Span<const at::Tensor> from = pair.source.locals();
      const absl::Span<const at::Tensor> to = pair.target.locals();
      const absl::Status copied = TorchToStatus([&] {
        for (size_t i = 0; i < to.size(); ++i) {
          Copy(from[i], to[i]);
          bytes += static_cast<int64_t>(to[i].nbytes());
        }
      });
      DSD_RETURN_IF_ERROR(copied) << "\"" << pair.name.Text() << "\"";
      // Now, when their counts are near.
      pair.source = TensorValue(at::Tensor());
      pair.target = TensorValue(at::Tensor());
      if (call.progress) call.progress({all_bytes + bytes, total});
      if (call.cancel != nullptr && *call.cancel) {
        return absl::CancelledError("set cancelled");
      }
    }
    all_bytes += bytes;
    return absl::OkStatus();
  };
  DSD_RETURN_IF_ERROR(ForRanges(env, threads, pairs.size(), copy));
  TransferStats stats;
  stats.bytes_local = all_bytes;
  return stats;
}

}  // namespace dsd
