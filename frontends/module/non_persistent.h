// SPDX-License-Identifier: Apache-2.0
//
// Buffers that are not part of the state: register_buffer(...,
// persistent=False) in Python, which LibTorch does not have.

#ifndef DSD_FRONTENDS_MODULE_NON_PERSISTENT_H_
#define DSD_FRONTENDS_MODULE_NON_PERSISTENT_H_

#include <cstdint>
#include <string>

#include "ATen/core/Tensor.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace torch::nn {
class Module;
}  // namespace torch::nn

namespace dsd {

// Registers a buffer that is in no state dict and no checkpoint, whatever wraps
// the module:
//
//   MaskedImpl()
//       : mask(dsd::RegisterNonPersistentBuffer(*this, "mask",
//                                               at::ones({8, 8}).tril())) {}
//
// Throws what register_buffer throws.
at::Tensor RegisterNonPersistentBuffer(torch::nn::Module& module,
                                       const std::string& name,
                                       at::Tensor tensor);

// The same for a buffer that the module has: its own, not one of a child. Holds
// as long as it is registered: also after to(), not for another tensor that is
// registered under the name later (clone() calls reset(): say it there). Weak:
// nothing is kept alive. NotFound if there is no such buffer. Thread-safe.
absl::Status SetNonPersistent(const torch::nn::Module& module,
                              absl::string_view name);

// Whether SetNonPersistent was called for `buffer`, registered as `name` in
// `module`.
bool IsNonPersistent(const torch::nn::Module& module, absl::string_view name,
                     const at::Tensor& buffer);

// Grows with each SetNonPersistent.
int64_t NonPersistentRevision();

}  // namespace dsd

#endif  // DSD_FRONTENDS_MODULE_NON_PERSISTENT_H_
