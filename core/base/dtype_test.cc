// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/dtype.h"

#include <set>
#include <string>

#include "gtest/gtest.h"

namespace dsd {
namespace {

TEST(DTypeTest, NamesReadBackAndDiffer) {
  std::set<std::string> names;
  for (int i = 0; i < kNumDTypes; ++i) {
    const DType dtype = static_cast<DType>(i);
    EXPECT_EQ(ParseDType(DTypeName(dtype)), dtype);
    names.insert(std::string(DTypeName(dtype)));
    const int64_t size = ItemSize(dtype);
    EXPECT_TRUE(size == 1 || size == 2 || size == 4 || size == 8 || size == 16)
        << DTypeName(dtype);
  }
  EXPECT_EQ(names.size(), static_cast<size_t>(kNumDTypes));
  EXPECT_EQ(ParseDType("float31"), std::nullopt);
  EXPECT_EQ(ParseDType(""), std::nullopt);
  EXPECT_EQ(ParseDType("torch.float32"), std::nullopt);
}

TEST(DTypeTest, SizesAreTorchs) {
  EXPECT_EQ(ItemSize(DType::kBool), 1);
  EXPECT_EQ(ItemSize(DType::kBFloat16), 2);
  EXPECT_EQ(ItemSize(DType::kComplex32), 4);
  EXPECT_EQ(ItemSize(DType::kComplex128), 16);
  EXPECT_EQ(ItemSize(DType::kFloat4E2M1FNX2), 1);
}

}  // namespace
}  // namespace dsd
