// SPDX-License-Identifier: Apache-2.0
//
// 64-bit arithmetic that reports overflow, for sizes that come from files,
// peers or users.

#ifndef DSD_CORE_BASE_CHECKED_INT_H_
#define DSD_CORE_BASE_CHECKED_INT_H_

#include <cstdint>
#include <optional>

#include "absl/types/span.h"

namespace dsd {

// a + b, or nullopt on overflow.
inline std::optional<int64_t> CheckedAdd(int64_t a, int64_t b) {
  int64_t out;
  if (__builtin_add_overflow(a, b, &out)) return std::nullopt;
  return out;
}

// a * b, or nullopt on overflow.
inline std::optional<int64_t> CheckedMul(int64_t a, int64_t b) {
  int64_t out;
  if (__builtin_mul_overflow(a, b, &out)) return std::nullopt;
  return out;
}

// The product of non-negative `factors` (1 if empty), or nullopt on overflow
// or on a negative factor. A zero factor gives 0 whatever the others are.
std::optional<int64_t> CheckedProduct(absl::Span<const int64_t> factors);

}  // namespace dsd

#endif  // DSD_CORE_BASE_CHECKED_INT_H_
