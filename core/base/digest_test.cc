// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/digest.h"

#include <vector>

#include "gtest/gtest.h"

namespace dsd {
namespace {

TEST(DigestTest, FieldsDoNotRunTogether) {
  EXPECT_NE(DigestBuilder().Add("ab").Add("c").Finish(),
            DigestBuilder().Add("a").Add("bc").Finish());
  EXPECT_NE(DigestBuilder().Add("").Finish(), DigestBuilder().Finish());
  const std::vector<int64_t> one = {1}, two = {1, 2};
  EXPECT_NE(DigestBuilder()
                .Add(absl::MakeConstSpan(one))
                .Add(absl::MakeConstSpan(two))
                .Finish(),
            DigestBuilder()
                .Add(absl::MakeConstSpan(two))
                .Add(absl::MakeConstSpan(one))
                .Finish());
}

TEST(DigestTest, EqualFieldsGiveEqualDigests) {
  const auto make = [] {
    return DigestBuilder().Add("name").Add(int64_t{-3}).Finish();
  };
  EXPECT_EQ(make(), make());
  EXPECT_EQ(make().Hex().size(), 64u);
  EXPECT_NE(make(), DigestBuilder().Add(make()).Finish());
  EXPECT_EQ(Digest().Hex(), std::string(64, '0'));
}

}  // namespace
}  // namespace dsd
