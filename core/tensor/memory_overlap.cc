// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/tensor/memory_overlap.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "ATen/MemoryOverlap.h"
#include "ATen/core/Tensor.h"
#include "absl/types/span.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {
namespace {

// The bytes of a storage that a tensor lies within. Strides of LibTorch are
// never negative.
struct Range {
  size_t index;
  int64_t begin;
  int64_t end;
};

Range RangeOf(const at::Tensor& tensor, size_t index) {
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  const int64_t item = tensor.element_size();
  return {index, tensor.storage_offset() * item, (last + 1) * item};
}

// Calls `visit` for the place of each element, in bytes of the storage, until
// it returns false. Returns whether it never did.
template <class Visit>
bool ForEachPlace(const at::Tensor& tensor, const Visit& visit) {
  const int64_t item = tensor.element_size();
  Dims position(tensor.dim(), 0);
  int64_t at = tensor.storage_offset() * item;
  while (visit(at)) {
    int64_t d = tensor.dim() - 1;
    for (; d >= 0; --d) {
      at += tensor.stride(d) * item;
      if (++position[d] < tensor.size(d)) break;
      at -= tensor.size(d) * tensor.stride(d) * item;
      position[d] = 0;
    }
    if (d < 0) return true;
  }
  return false;
}

bool Overlap(const at::Tensor& a, const Range& in_a, const at::Tensor& b) {
  if (a.is_non_overlapping_and_dense() && b.is_non_overlapping_and_dense()) {
    return true;  // the ranges do
  }
  std::vector<bool> marked(in_a.end - in_a.begin);
  ForEachPlace(a, [&](int64_t at) {
    for (int64_t i = 0; i < a.element_size(); ++i) {
      marked[at + i - in_a.begin] = true;
    }
    return true;
  });
  return !ForEachPlace(b, [&](int64_t at) {
    const int64_t end = std::min(at + b.element_size(), in_a.end);
    for (int64_t i = std::max(at, in_a.begin); i < end; ++i) {
      if (marked[i - in_a.begin]) return false;
    }
    return true;
  });
}

}  // namespace

bool OverlapsItself(const at::Tensor& tensor) {
  switch (at::has_internal_overlap(tensor)) {
    case at::MemOverlap::No:
      return false;
    case at::MemOverlap::Yes:
      return true;
    case at::MemOverlap::TooHard:
      break;
  }
  if (tensor.numel() == 0) return false;
  const Range range = RangeOf(tensor, 0);
  std::vector<bool> marked(range.end - range.begin);
  return !ForEachPlace(tensor, [&](int64_t at) {
    const bool is_new = !marked[at - range.begin];
    marked[at - range.begin] = true;
    return is_new;
  });
}

std::optional<std::pair<size_t, size_t>> FindOverlap(
    absl::Span<const at::Tensor> tensors) {
  // Most tensors have a storage of their own.
  struct Place {
    const void* storage;
    Range range;
  };
  std::vector<Place> places;
  places.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    if (!tensor.defined() || !tensor.has_storage() || tensor.numel() == 0 ||
        tensor.is_meta()) {
      continue;
    }
    places.push_back(
        {tensor.storage().unsafeGetStorageImpl(), RangeOf(tensor, i)});
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) {
    return std::tie(a.storage, a.range.begin, a.range.index) <
           std::tie(b.storage, b.range.begin, b.range.index);
  });
  std::optional<std::pair<size_t, size_t>> first;
  for (size_t i = 0; i < places.size(); ++i) {
    const Range& a = places[i].range;
    for (size_t j = i + 1; j < places.size(); ++j) {
      const Range& b = places[j].range;
      if (places[j].storage != places[i].storage || b.begin >= a.end) break;
      const std::pair<size_t, size_t> pair = std::minmax(a.index, b.index);
      if (first.has_value() && *first < pair) continue;
      if (Overlap(tensors[a.index], a, tensors[b.index])) first = pair;
    }
  }
  return first;
}

}  // namespace dsd
