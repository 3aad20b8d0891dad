// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/checked_int.h"

#include <limits>

#include "gtest/gtest.h"

namespace dsd {
namespace {

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
constexpr int64_t kMin = std::numeric_limits<int64_t>::min();

TEST(CheckedIntTest, AddsAndMultipliesWithinRange) {
  EXPECT_EQ(CheckedAdd(kMax - 1, 1), kMax);
  EXPECT_EQ(CheckedAdd(kMax, 1), std::nullopt);
  EXPECT_EQ(CheckedAdd(kMin, -1), std::nullopt);
  EXPECT_EQ(CheckedMul(int64_t{1} << 31, int64_t{1} << 31), int64_t{1} << 62);
  EXPECT_EQ(CheckedMul(int64_t{1} << 32, int64_t{1} << 31), std::nullopt);
  EXPECT_EQ(CheckedMul(kMin, -1), std::nullopt);
}

TEST(CheckedIntTest, Products) {
  EXPECT_EQ(CheckedProduct({}), 1);
  EXPECT_EQ(CheckedProduct({2, 3, 4}), 24);
  EXPECT_EQ(CheckedProduct({kMax, 2}), std::nullopt);
  EXPECT_EQ(CheckedProduct({2, -3}), std::nullopt);
  // A zero wins, wherever it stands.
  EXPECT_EQ(CheckedProduct({kMax, kMax, 0}), 0);
  EXPECT_EQ(CheckedProduct({0, kMax, kMax}), 0);
}

}  // namespace
}  // namespace dsd
