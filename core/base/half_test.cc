// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/half.h"

#include <cmath>
#include <limits>

#include "gtest/gtest.h"

namespace dsd {
namespace {

// A float16 has sign, 5 bits of exponent and 10 of fraction.
double ReferenceFloat16(uint16_t bits) {
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  const int exponent = (bits >> 10) & 31;
  const int fraction = bits & 0x3ff;
  if (exponent == 31) {
    return fraction != 0 ? std::nan("") : sign * HUGE_VAL;
  }
  return exponent == 0 ? sign * std::ldexp(fraction, -24)
                       : sign * std::ldexp(1024 + fraction, exponent - 25);
}

TEST(HalfTest, EveryFloat16IsItsDefinitionAndComesBack) {
  for (int i = 0; i < 65536; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    const float value = Float16ToFloat(bits);
    const double expected = ReferenceFloat16(bits);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_TRUE(std::isnan(Float16ToFloat(FloatToFloat16(value))));
      continue;
    }
    ASSERT_EQ(value, expected) << i;
    ASSERT_EQ(std::signbit(value), (bits & 0x8000) != 0) << i;
    ASSERT_EQ(FloatToFloat16(value), bits) << i;
  }
}

TEST(HalfTest, EveryBFloat16ComesBack) {
  for (int i = 0; i < 65536; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    const float value = BFloat16ToFloat(bits);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(BFloat16ToFloat(FloatToBFloat16(value))));
      continue;
    }
    ASSERT_EQ(FloatToBFloat16(value), bits) << i;
  }
}

// Between two neighbours lies their midpoint: it goes to the even one, and what
// is next to it to the nearer one.
TEST(HalfTest, RoundsToNearestTiesToEven) {
  for (int i = 0; i < 0x7bff; ++i) {
    const float low = Float16ToFloat(static_cast<uint16_t>(i));
    const float high = Float16ToFloat(static_cast<uint16_t>(i + 1));
    const float middle = (low + high) / 2;
    ASSERT_EQ(FloatToFloat16(middle), i % 2 == 0 ? i : i + 1) << i;
    ASSERT_EQ(FloatToFloat16(std::nextafter(middle, low)), i) << i;
    ASSERT_EQ(FloatToFloat16(std::nextafter(middle, high)), i + 1) << i;
  }
  for (int i = 0; i < 0x7f7f; ++i) {
    const float low = BFloat16ToFloat(static_cast<uint16_t>(i));
    const float high = BFloat16ToFloat(static_cast<uint16_t>(i + 1));
    const float middle = low / 2 + high / 2;
    if (i == 0 || middle == low) continue;  // subnormals cannot be halved
    ASSERT_EQ(FloatToBFloat16(middle), i % 2 == 0 ? i : i + 1) << i;
    ASSERT_EQ(FloatToBFloat16(std::nextafter(middle, low)), i) << i;
    ASSERT_EQ(FloatToBFloat16(std::nextafter(middle, high)), i + 1) << i;
  }
}

TEST(HalfTest, OverflowIsInfinity) {
  EXPECT_EQ(FloatToFloat16(65519.0f), 0x7bff);
  EXPECT_EQ(FloatToFloat16(65520.0f), 0x7c00);
  EXPECT_EQ(FloatToFloat16(-1e10f), 0xfc00);
  EXPECT_EQ(FloatToBFloat16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(FloatToFloat16(1e-10f), 0);
}

}  // namespace
}  // namespace dsd
