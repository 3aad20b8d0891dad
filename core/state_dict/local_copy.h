// SPDX-License-Identifier: Apache-2.0
//
// Tensors from a dict to live ones where both are whole on this rank, or the
// same shards: nothing has to be planned then.

#ifndef DSD_CORE_STATE_DICT_LOCAL_COPY_H_
#define DSD_CORE_STATE_DICT_LOCAL_COPY_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/env.h"
#include "dsd/core/tensor/tensor_value.h"
#include "dsd/core/transfer/transfer.h"

namespace dsd {

// What a pair is called: up to three texts in a row, which are only put
// together where somebody asks. Small, since there are many.
class PairName {
 public:
  PairName(std::string name)  // NOLINT
      : own_(std::make_shared<const std::string>(std::move(name))) {}
  // Borrows the texts.
  PairName(const char* prefix, const std::string* fqn,
           const std::string* suffix = nullptr)
      : prefix_(prefix), fqn_(fqn), suffix_(suffix) {}

  // "prefix.fqn", or "prefix.fqn.suffix"
  std::string Text() const;

 private:
  std::shared_ptr<const std::string> own_;
  const char* prefix_ = nullptr;
  const std::string* fqn_ = nullptr;
  const std::string* suffix_ = nullptr;
};

// A tensor of a dict and the live one that it is to fill.
struct TensorPair {
  PairName name;
  TensorValue source;
  TensorValue target;
};

// For a walk over `pairs` that is at `current`: asks for the tensors of those
// that follow, and for their memory.
void PrefetchPairs(absl::Span<const TensorPair> pairs, size_t current,
                   bool with_memory);

// Whether CopyLocally can do it: the parts are the same, and all tensors dense,
// with memory and of types that endpoints know.
bool AreLocalCopies(Env* env, int threads, absl::Span<const TensorPair> pairs);

// Fills the targets, cast to their types as Tensor::copy_ does, in order if
// `threads` is 1 or progress is reported. Pairs that are done have no tensors
// any more.
// Errors: Cancelled; what LibTorch reports, with the pair's name. Some targets
// may then be filled.
absl::StatusOr<TransferStats> CopyLocally(Env* env, int threads,
                                          absl::Span<TensorPair> pairs,
                                          const CallOptions& call);

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_LOCAL_COPY_H_
