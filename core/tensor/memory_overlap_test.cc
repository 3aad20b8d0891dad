// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/tensor/memory_overlap.h"

#include <cstdint>
#include <optional>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "ATen/ops/empty.h"
#include "ATen/ops/zeros.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using Pair = std::optional<std::pair<size_t, size_t>>;

TEST(MemoryOverlapTest, ViewsOfOneStorage) {
  const at::Tensor whole = at::zeros({4, 6});
  const at::Tensor left = whole.slice(1, 0, 3);
  const at::Tensor right = whole.slice(1, 3, 6);
  const at::Tensor top = whole.slice(0, 0, 2);
  EXPECT_EQ(FindOverlap({left, right}), std::nullopt);
  EXPECT_EQ(FindOverlap({right, top, left}), Pair({0, 1}));
  EXPECT_EQ(FindOverlap({left, at::zeros({4}), whole}), Pair({0, 2}));
  EXPECT_EQ(FindOverlap({top, whole.slice(0, 2, 4)}), std::nullopt);
  EXPECT_EQ(FindOverlap({whole.view(-1).view(at::kInt), top}), Pair({0, 1}));
}

TEST(MemoryOverlapTest, TensorsWithoutMemoryDoNotOverlap) {
  const at::Tensor whole = at::zeros({4});
  EXPECT_EQ(FindOverlap({whole, whole.slice(0, 2, 2), at::Tensor(),
                         at::empty({4}, at::kMeta)}),
            std::nullopt);
  EXPECT_EQ(FindOverlap({at::zeros({0}), at::zeros({0})}), std::nullopt);
}

TEST(MemoryOverlapTest, WithinOneTensor) {
  EXPECT_FALSE(OverlapsItself(at::zeros({4, 5})));
  EXPECT_FALSE(OverlapsItself(at::zeros({4, 5}).t()));
  EXPECT_FALSE(OverlapsItself(at::zeros({8, 5}).slice(0, 0, 8, 2)));
  EXPECT_FALSE(OverlapsItself(at::zeros({1}).expand({0, 4})));
  EXPECT_TRUE(OverlapsItself(at::zeros({1}).expand({4})));
  EXPECT_TRUE(OverlapsItself(at::zeros({10}).unfold(0, 4, 2)));
  EXPECT_FALSE(OverlapsItself(at::zeros({10}).unfold(0, 4, 4)));
}

TEST(MemoryOverlapTest, RandomStridesEqualSetsOfPlaces) {
  std::mt19937 random(11);
  for (int round = 0; round < 3000; ++round) {
    const at::Tensor storage = at::zeros({400});
    std::vector<at::Tensor> tensors;
    std::vector<std::multiset<int64_t>> places(2);
    for (int i = 0; i < 2; ++i) {
      std::vector<int64_t> sizes;
      std::vector<int64_t> strides;
      for (int d = 0; d < 2; ++d) {
        sizes.push_back(1 + random() % 4);
        strides.push_back(random() % 12);
      }
      const int64_t offset = random() % 40;
      tensors.push_back(storage.as_strided(sizes, strides, offset));
      for (int64_t x = 0; x < sizes[0]; ++x) {
        for (int64_t y = 0; y < sizes[1]; ++y) {
          places[i].insert(offset + x * strides[0] + y * strides[1]);
        }
      }
    }
    bool repeats[2];
    bool shared = false;
    for (int i = 0; i < 2; ++i) {
      repeats[i] =
          std::set<int64_t>(places[i].begin(), places[i].end()).size() !=
          places[i].size();
      EXPECT_EQ(OverlapsItself(tensors[i]), repeats[i]) << round;
    }
    for (const int64_t place : places[0]) shared |= places[1].count(place) > 0;
    EXPECT_EQ(FindOverlap(tensors).has_value(), shared) << round;
  }
}

}  // namespace
}  // namespace dsd
