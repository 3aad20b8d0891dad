// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/plan/catalog.h"

#include <utility>

#include "absl/hash/hash.h"
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
  const auto last =
      by_hash_.try_emplace(absl::HashOf(absl::string_view(spec.fqn)), kNone)
          .first;
  if (FindFrom(last->second, spec.fqn).has_value()) {
    return absl::AlreadyExistsError(absl::StrCat(
        "catalog: there are two tensors named \"", spec.fqn, "\""));
  }
  before_.push_back(last->second);
  last->second = tensors_.size();
  tensors_.push_back(std::move(spec));
  return absl::OkStatus();
}

void Catalog::Reserve(size_t size) {
  tensors_.reserve(size);
  by_hash_.reserve(size);
  before_.reserve(size);
}

std::optional<size_t> Catalog::Find(absl::string_view fqn) const {
  const auto last = by_hash_.find(absl::HashOf(fqn));
  return FindFrom(last == by_hash_.end() ? kNone : last->second, fqn);
}

std::optional<size_t> Catalog::FindFrom(size_t index,
                                        absl::string_view fqn) const {
  for (; index != kNone; index = before_[index]) {
    if (tensors_[index].fqn == fqn) return index;
  }
  return std::nullopt;
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
