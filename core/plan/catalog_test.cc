// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/plan/catalog.h"

#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/plan/binding.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

Layout Whole(Dims shape, std::vector<Holder> holders = {0}) {
  return Layout::Replicated(std::move(shape), std::move(holders));
}

TEST(CatalogTest, KeepsOrderAndFindsNames) {
  Catalog catalog;
  ASSERT_TRUE(catalog.Add({"b", DType::kFloat32, Whole({2})}).ok());
  ASSERT_TRUE(catalog.Add({"a", DType::kInt8, Whole({})}).ok());
  ASSERT_EQ(catalog.size(), 2);
  EXPECT_EQ(catalog[0].fqn, "b");
  EXPECT_EQ(catalog.Find("a"), 1);
  EXPECT_FALSE(catalog.Find("c").has_value());
  const absl::Status again = catalog.Add({"b", DType::kInt8, Whole({2})});
  EXPECT_EQ(again.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(again.message(), "catalog: there are two tensors named \"b\"");
  EXPECT_EQ(catalog.size(), 2);
}

TEST(CatalogTest, ManyNamesAndACopy) {
  Catalog catalog;
  catalog.Reserve(10);
  const auto name = [](int i) { return absl::StrCat("layers.", i, ".weight"); };
  for (int i = 0; i < 5000; ++i) {
    ASSERT_TRUE(catalog.Add({name(i), DType::kInt8, Whole({1})}).ok());
  }
  const Catalog copy = catalog;
  catalog = Catalog();
  EXPECT_FALSE(catalog.Find(name(0)).has_value());
  for (int i = 0; i < 5000; ++i) ASSERT_EQ(copy.Find(name(i)), i);
  EXPECT_FALSE(copy.Find(name(5000)).has_value());
}

TEST(CatalogTest, RefusesTensorsTooLargeToCount) {
  Catalog catalog;
  for (const Dims& shape :
       {Dims{int64_t{1} << 59}, Dims{int64_t{1} << 40, int64_t{1} << 40},
        Dims{-1}}) {
    EXPECT_EQ(catalog.Add({"w", DType::kInt8, Layout::Anywhere(shape)}).code(),
              absl::StatusCode::kInvalidArgument);
  }
  EXPECT_TRUE(catalog.empty());
  EXPECT_TRUE(
      catalog.Add({"w", DType::kInt8, Layout::Anywhere({0, int64_t{1} << 62})})
          .ok());
}

TEST(CatalogTest, FingerprintCoversNamesOrderTypesAndSymbols) {
  const auto fingerprint = [](std::vector<TensorSpec> specs) {
    Catalog catalog;
    for (TensorSpec& spec : specs) {
      EXPECT_TRUE(catalog.Add(std::move(spec)).ok());
    }
    return catalog.Fingerprint();
  };
  const TensorSpec a{"a", DType::kFloat32, Whole({2})};
  const TensorSpec b{"b", DType::kFloat32, Whole({2})};
  TensorSpec other_dtype = a;
  other_dtype.dtype = DType::kFloat64;
  TensorSpec other_holders = a;
  other_holders.layout = Whole({2}, {1});
  TensorSpec other_shape = a;
  other_shape.layout = Whole({3});
  const Digest base = fingerprint({a, b});
  EXPECT_EQ(base, fingerprint({a, b}));
  EXPECT_NE(base, fingerprint({b, a}));
  EXPECT_NE(base, fingerprint({a}));
  EXPECT_NE(base, fingerprint({other_dtype, b}));
  EXPECT_NE(base, fingerprint({other_holders, b}));
  EXPECT_NE(base, fingerprint({other_shape, b}));
}

TEST(BindingTest, Identity) {
  const Binding binding(4);
  EXPECT_EQ(binding.RankOf(3), 3);
  EXPECT_EQ(binding.RankOf(4), -1);
  EXPECT_EQ(binding.RankOf(kAnyHolder), -1);
  EXPECT_EQ(binding.HoldersOn(2), (std::vector<Holder>{2}));
  EXPECT_TRUE(binding.PlacesAll(0, 3));
  EXPECT_FALSE(binding.PlacesAll(0, 4));
  EXPECT_TRUE(binding.OneToOne());
  EXPECT_TRUE(binding.SingleHost());

  const auto same = Binding::Create(2, {{0, 0}, {1, 1}}, {7, 7});
  ASSERT_TRUE(same.ok()) << same.status();
  EXPECT_EQ(*same, Binding(2));
  EXPECT_TRUE(same->SingleHost());
}

TEST(BindingTest, SeveralHoldersAndHosts) {
  const auto binding =
      Binding::Create(3, {{10, 0}, {11, 2}, {12, 0}, {20, 1}}, {5, 3, 5});
  ASSERT_TRUE(binding.ok()) << binding.status();
  EXPECT_EQ(binding->HoldersOn(0), (std::vector<Holder>{10, 12}));
  EXPECT_EQ(binding->FirstHolderOn(0), 10);
  EXPECT_EQ(binding->RankOf(11), 2);
  EXPECT_FALSE(binding->OneToOne());
  EXPECT_TRUE(binding->PlacesAll(10, 12));
  EXPECT_FALSE(binding->PlacesAll(10, 13));
  EXPECT_FALSE(binding->SingleHost());
  EXPECT_EQ(binding->HostOf(0), binding->HostOf(2));
  EXPECT_NE(binding->HostOf(0), binding->HostOf(1));
  EXPECT_EQ(std::vector<int>(binding->RanksOnHostOf(2).begin(),
                             binding->RanksOnHostOf(2).end()),
            (std::vector<int>{0, 2}));

  const auto other = Binding::Create(3, {{10, 0}}, {0, 1, 0});
  EXPECT_TRUE(binding->SameHosts(*other));
  EXPECT_FALSE(binding->SameHosts(Binding(3)));
  EXPECT_FALSE(*binding == *other);
  EXPECT_EQ(other->FirstHolderOn(1), -1);
}

TEST(BindingTest, RefusesBadInput) {
  for (const auto& bad :
       {Binding::Create(0, {}), Binding::Create(2, {{0, 2}}),
        Binding::Create(2, {{0, -1}}), Binding::Create(2, {{-1, 0}}),
        Binding::Create(2, {}, {0, 1, 2})}) {
    EXPECT_EQ(bad.status().code(), absl::StatusCode::kInvalidArgument);
  }
}

}  // namespace
}  // namespace dsd
