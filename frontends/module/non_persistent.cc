// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/module/non_persistent.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/no_destructor.h"
#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "torch/nn/module.h"

namespace dsd {
namespace {

// Keyed by the buffer, which is what can be watched weakly: a module does not
// know its owner while it is built. Module and name tell apart the places where
// one buffer is registered.
struct Entry {
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> impl;
  std::vector<std::pair<const torch::nn::Module*, std::string>> places;
};

class Registry {
 public:
  static Registry& Global() {
    static absl::NoDestructor<Registry> registry;
    return *registry;
  }

  void Add(const torch::nn::Module* module, absl::string_view name,
           const at::Tensor& buffer) {
    absl::MutexLock lock(&mu_);
    ++revision_;
    if (entries_.size() >= sweep_at_) {
      absl::erase_if(entries_, [](const auto& entry) {
        return entry.second.impl.expired();
      });
      sweep_at_ = std::max<size_t>(64, 2 * entries_.size());
    }
    const auto [it, is_new] = entries_.try_emplace(
        buffer.unsafeGetTensorImpl(),
        Entry{
            c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(
                buffer.getIntrusivePtr()),
            {}});
    it->second.places.emplace_back(module, std::string(name));
  }

  bool Has(const torch::nn::Module* module, absl::string_view name,
           const at::Tensor& buffer) {
    absl::ReaderMutexLock lock(&mu_);
    const auto it = entries_.find(buffer.unsafeGetTensorImpl());
    return it != entries_.end() &&
           std::any_of(it->second.places.begin(), it->second.places.end(),
                       [&](const auto& place) {
                         return place.first == module && place.second == name;
                       });
  }

  int64_t revision() {
    absl::ReaderMutexLock lock(&mu_);
    return revision_;
  }

 private:
  absl::Mutex mu_;
  absl::flat_hash_map<const c10::TensorImpl*, Entry> entries_
      ABSL_GUARDED_BY(mu_);
  size_t sweep_at_ ABSL_GUARDED_BY(mu_) = 64;  // drop dead entries at this size
  int64_t revision_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace

at::Tensor RegisterNonPersistentBuffer(torch::nn::Module& module,
                                       const std::string& name,
                                       at::Tensor tensor) {
  const at::Tensor& buffer = module.register_buffer(name, std::move(tensor));
  Registry::Global().Add(&module, name, buffer);
  return buffer;
}

absl::Status SetNonPersistent(const torch::nn::Module& module,
                              absl::string_view name) {
  for (const auto& buffer : module.named_buffers(/*recurse=*/false)) {
    if (buffer.key() != name) continue;
    Registry::Global().Add(&module, name, buffer.value());
    return absl::OkStatus();
  }
  return absl::NotFoundError(
      absl::StrCat("SetNonPersistent: the module has no buffer \"", name,
                   "\" of its own; call it after register_buffer"));
}

bool IsNonPersistent(const torch::nn::Module& module, absl::string_view name,
                     const at::Tensor& buffer) {
  return Registry::Global().Has(&module, name, buffer);
}

int64_t NonPersistentRevision() { return Registry::Global().revision(); }

}  // namespace dsd
