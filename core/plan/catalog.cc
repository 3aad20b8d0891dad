// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/plan/catalog.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/checked_int.h"

namespace dsd {

absl::Status Catalog::Add(TensorSpec spec) {
  const std::optional<int64_t> elements = CheckedProduct(spec.shape());
  if (!elements.has_value() ||
      !CheckedMul(*elements, kLargestItemBytes).has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "catalog: tensor \"", spec.fqn, "\" of shape ",
        DimsToString(spec.shape()),
        ": extents must be >= 0 and their product at most 2^59 - 1"));
  }
  if (!index_.try_emplace(spec.fqn, tensors_.size()).second) {
    return absl::AlreadyExistsError(absl::StrCat(
        "catalog: there are two tensors named \"", spec.fqn, "\""));
  }
  tensors_.push_back(std::move(spec));
  return absl::OkStatus();
}

std::optional<size_t> Catalog::Find(absl::string_view fqn) const {
  const auto it = index_.find(fqn);
  if (it == index_.end()) return std::nullopt;
  return it->second;
}

Digest Catalog::Fingerprint() const {
  DigestBuilder digest;
  digest.Add(static_cast<int64_t>(tensors_.size()));
  for (const TensorSpec& spec : tensors_) {
    digest.Add(spec.fqn)
        .Add(static_cast<int64_t>(spec.dtype))
        .Add(spec.layout.symbols());
  }
  return digest.Finish();
}

}  // namespace dsd
