// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/natural_order.h"

#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::cli {
namespace {

using ::testing::ElementsAre;

TEST(NaturalOrderTest, NumbersCount) {
  const std::set<std::string, NaturalOrder> names = {
      "10", "9", "norm", "9a", "-1", "", "010", "99999999999999999999"};
  EXPECT_THAT(names, ElementsAre("-1", "9", "010", "10", "",
                                 "99999999999999999999", "9a", "norm"));
}

// What a map needs, or it loses keys: 2 < 10 < "1a" < 2 is no order.
TEST(NaturalOrderTest, IsAnOrder) {
  const std::vector<std::string> names = {
      "2", "10", "1a", "02", "a", "", "-1", "-", "9223372036854775808"};
  const NaturalOrder less;
  for (const std::string& a : names) {
    EXPECT_FALSE(less(a, a)) << a;
    for (const std::string& b : names) {
      if (a != b) {
        EXPECT_NE(less(a, b), less(b, a)) << a << " " << b;
      }
      for (const std::string& c : names) {
        if (less(a, b) && less(b, c)) {
          EXPECT_TRUE(less(a, c)) << a << " " << b << " " << c;
        }
      }
    }
  }
}

}  // namespace
}  // namespace dsd::cli
