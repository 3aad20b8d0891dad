// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/small_float.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "gtest/gtest.h"

namespace dsd {
namespace {

struct Type {
  const char* name;
  std::function<float(uint8_t)> to_float;
  int bits;        // with the sign
  float smallest;  // above 0
  uint8_t bits_of_one;
  float largest;
  int num_nan;
  int num_infinite;
  bool has_negative_zero;
};

std::vector<Type> Types() {
  return {
      {"e4m3fn", Float8E4M3FNToFloat, 8, 0x1p-9f, 0x38, 448, 2, 0, true},
      {"e5m2", Float8E5M2ToFloat, 8, 0x1p-16f, 0x3c, 57344, 6, 2, true},
      {"e4m3fnuz", Float8E4M3FNUZToFloat, 8, 0x1p-10f, 0x40, 240, 1, 0, false},
      {"e5m2fnuz", Float8E5M2FNUZToFloat, 8, 0x1p-17f, 0x40, 57344, 1, 0,
       false},
      {"e2m1fn", Float4E2M1FNToFloat, 4, 0.5f, 0x2, 6, 0, 0, true},
  };
}

TEST(SmallFloatTest, ValuesOfTheTypes) {
  for (const Type& type : Types()) {
    SCOPED_TRACE(type.name);
    const int half = 1 << (type.bits - 1);
    EXPECT_EQ(type.to_float(0), 0.0f);
    EXPECT_FALSE(std::signbit(type.to_float(0)));
    EXPECT_EQ(type.to_float(1), type.smallest);
    EXPECT_EQ(type.to_float(type.bits_of_one), 1.0f);
    int num_nan = 0, num_infinite = 0;
    float largest = 0;
    for (int i = 0; i < 2 * half; ++i) {
      const float value = type.to_float(static_cast<uint8_t>(i));
      num_nan += std::isnan(value);
      num_infinite += std::isinf(value);
      if (!std::isfinite(value)) continue;
      largest = std::max(largest, value);
      // Positive numbers are in the order of their bits; negative ones mirror
      // them.
      if (i > 0 && i < half) {
        EXPECT_GT(value, type.to_float(static_cast<uint8_t>(i - 1))) << i;
      }
      if (i >= half) {
        EXPECT_EQ(value, -type.to_float(static_cast<uint8_t>(i - half))) << i;
        EXPECT_TRUE(std::signbit(value));
      }
    }
    EXPECT_EQ(largest, type.largest);
    EXPECT_EQ(num_nan, type.num_nan);
    EXPECT_EQ(num_infinite, type.num_infinite);
    const float at_half = type.to_float(static_cast<uint8_t>(half));
    EXPECT_EQ(at_half == 0, type.has_negative_zero);
  }
}

// Between two neighbours lies their midpoint: it goes to the even one, and what
// is next to it to the nearer one.
TEST(SmallFloatTest, RoundsToNearestTiesToEven) {
  const std::vector<std::function<uint8_t(float)>> from_float = {
      FloatToFloat8E4M3FN, FloatToFloat8E5M2, FloatToFloat8E4M3FNUZ,
      FloatToFloat8E5M2FNUZ};
  for (size_t t = 0; t < from_float.size(); ++t) {
    const Type type = Types()[t];
    SCOPED_TRACE(type.name);
    const auto round = from_float[t];
    for (int i = 0; i < 256; ++i) {
      const float value = type.to_float(static_cast<uint8_t>(i));
      if (std::isnan(value)) {
        EXPECT_TRUE(std::isnan(type.to_float(round(value)))) << i;
      } else {
        EXPECT_EQ(round(value), i);
      }
    }
    for (int i = 0; i < 127; ++i) {
      const float low = type.to_float(static_cast<uint8_t>(i));
      const float high = type.to_float(static_cast<uint8_t>(i + 1));
      if (!std::isfinite(high)) break;
      const float middle = (low + high) / 2;
      EXPECT_EQ(round(middle), i % 2 == 0 ? i : i + 1) << i;
      EXPECT_EQ(round(std::nextafter(middle, low)), i) << i;
      EXPECT_EQ(round(std::nextafter(middle, high)), i + 1) << i;
      if (i > 0) {
        EXPECT_EQ(round(-std::nextafter(middle, low)), 128 + i) << i;
      }
    }
    const bool has_infinity = type.num_infinite > 0;
    for (const float beyond : {type.largest * 1.5f, HUGE_VALF}) {
      const float value = type.to_float(round(beyond));
      EXPECT_TRUE(has_infinity ? std::isinf(value) : std::isnan(value));
    }
    EXPECT_EQ(round(-type.smallest / 4), type.has_negative_zero ? 0x80 : 0);
  }
}

TEST(SmallFloatTest, RoundsToPowersOfTwo) {
  for (int i = 0; i < 255; ++i) {
    EXPECT_EQ(
        FloatToFloat8E8M0FNU(Float8E8M0FNUToFloat(static_cast<uint8_t>(i))), i);
  }
  EXPECT_EQ(FloatToFloat8E8M0FNU(1.5f), 128);
  EXPECT_EQ(FloatToFloat8E8M0FNU(std::nextafter(1.5f, 1.0f)), 127);
  EXPECT_EQ(FloatToFloat8E8M0FNU(-2.0f), 128);
  EXPECT_EQ(FloatToFloat8E8M0FNU(0), 0);
  EXPECT_EQ(FloatToFloat8E8M0FNU(HUGE_VALF), 255);
  EXPECT_EQ(FloatToFloat8E8M0FNU(std::nanf("")), 255);
}

TEST(SmallFloatTest, PowersOfTwo) {
  EXPECT_EQ(Float8E8M0FNUToFloat(0), 0x1p-127f);
  EXPECT_EQ(Float8E8M0FNUToFloat(127), 1.0f);
  EXPECT_EQ(Float8E8M0FNUToFloat(254), 0x1p127f);
  EXPECT_TRUE(std::isnan(Float8E8M0FNUToFloat(255)));
}

TEST(SmallFloatTest, TheHighBitsOfAFloat4DoNotCount) {
  EXPECT_EQ(Float4E2M1FNToFloat(0xf7), 6.0f);
}

}  // namespace
}  // namespace dsd
