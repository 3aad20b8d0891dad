// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/checked_int.h"

namespace dsd {

std::optional<int64_t> CheckedProduct(absl::Span<const int64_t> factors) {
  bool zero = false;
  for (int64_t factor : factors) {
    if (factor < 0) return std::nullopt;
    zero |= factor == 0;
  }
  if (zero) return 0;
  std::optional<int64_t> product = 1;
  for (int64_t factor : factors) {
    product = CheckedMul(*product, factor);
    if (!product.has_value()) return std::nullopt;
  }
  return product;
}

}  // namespace dsd
