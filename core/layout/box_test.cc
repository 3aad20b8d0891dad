// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/layout/box.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <set>
#include <vector>

#include "dsd/core/layout/box_index.h"
#include "dsd/core/layout/random_layout.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using test::Random;
using test::RandomShape;
using test::Uniform;

// Row-major indices, in a tensor of `shape`, of the elements of `box`.
std::vector<int64_t> Elements(const Dims& shape, const Box& box) {
  std::vector<int64_t> out;
  Dims at = box.lo;
  if (box.empty()) return out;
  while (true) {
    out.push_back(FlatIndex(shape, at));
    int d = box.ndim() - 1;
    while (d >= 0 && ++at[d] == box.hi[d]) at[d] = box.lo[d], --d;
    if (d < 0) return out;
  }
}

Box RandomBox(Random& random, const Dims& shape) {
  Box box;
  for (int64_t extent : shape) {
    box.lo.push_back(Uniform(random, 0, extent));
    box.hi.push_back(Uniform(random, 0, extent));
  }
  return box;
}

Dims RandomDims(Random& random, int64_t max_elements) {
  const std::vector<int64_t> shape = RandomShape(random, max_elements);
  return Dims(shape.begin(), shape.end());
}

TEST(BoxTest, ZeroDimensionalBoxHasOneElement) {
  const Box box = Box::Whole({});
  EXPECT_EQ(box.num_elements(), 1);
  EXPECT_FALSE(box.empty());
  EXPECT_EQ(box.ToString(), "[]");
  EXPECT_TRUE(box.ContainsPoint({}));
  EXPECT_EQ(*Intersect(box, box), box);
}

TEST(BoxTest, EmptyBox) {
  const Box box{{0, 4}, {3, 4}};
  EXPECT_TRUE(box.empty());
  EXPECT_EQ(box.num_elements(), 0);
  EXPECT_TRUE((Box{{7, 7}, {8, 8}}).Contains(box));
  EXPECT_FALSE(Intersect(box, Box::Whole({9, 9})).has_value());
}

TEST(BoxTest, Text) {
  EXPECT_EQ((Box{{0, 3}, {2, 5}}).ToString(), "[0:2, 3:5]");
  EXPECT_EQ(DimsToString({2, 3}), "[2, 3]");
}

TEST(BoxTest, RowMajor) {
  EXPECT_EQ(RowMajorStrides({2, 3, 4}), (Dims{12, 4, 1}));
  EXPECT_EQ(RowMajorStrides({2, 0, 4}), (Dims{4, 4, 1}));
  EXPECT_EQ(FlatIndex({2, 3, 4}, {1, 2, 3}), 23);
}

TEST(LowerFlatIntervalTest, CoversTheIntervalInOrder) {
  Random random(test::TestSeed());
  for (int round = 0; round < 2000; ++round) {
    const Dims shape = RandomDims(random, 200);
    const int64_t size = Box::Whole(shape).num_elements();
    const int64_t begin = Uniform(random, 0, size);
    const int64_t end = Uniform(random, begin, size);
    const std::vector<Box> boxes = LowerFlatInterval(shape, begin, end);
    EXPECT_LE(boxes.size(), std::max<size_t>(1, 2 * shape.size() - 1));
    int64_t next = begin;
    for (const Box& box : boxes) {
      ASSERT_FALSE(box.empty());
      for (int64_t element : Elements(shape, box)) ASSERT_EQ(element, next++);
    }
    ASSERT_EQ(next, end) << DimsToString(shape) << " " << begin;
  }
}

TEST(SplitBoxTest, PartsCoverTheBoxOnce) {
  Random random(test::TestSeed());
  for (int round = 0; round < 2000; ++round) {
    const Dims shape = RandomDims(random, 300);
    if (shape.empty()) continue;
    const Box box = RandomBox(random, shape);
    if (box.empty()) continue;
    const int64_t count = Uniform(random, 1, 9);
    std::vector<int64_t> covered;
    for (int64_t i = 0; i < count; ++i) {
      const Box part = SplitBox(box, i, count);
      ASSERT_TRUE(box.Contains(part));
      for (int64_t element : Elements(shape, part)) covered.push_back(element);
    }
    std::sort(covered.begin(), covered.end());
    ASSERT_EQ(covered, Elements(shape, box));
  }
}

TEST(SplitBoxTest, PartsAreEven) {
  // No dimension divides by 64, but two together nearly do.
  const Box box = Box::Whole({100, 100, 3});
  int64_t largest = 0;
  for (int64_t i = 0; i < 64; ++i) {
    largest = std::max(largest, SplitBox(box, i, 64).num_elements());
  }
  EXPECT_LE(largest, 30000 / 64 * 1.1);
}

TEST(SplitBoxTest, PrefersTheOutermostDimensionThatIsEven) {
  // 4 rows divide evenly by 2, 5 do not; 33 / 2 is within 1/16.
  EXPECT_EQ(SplitBox(Box::Whole({4, 1000}), 1, 2), (Box{{2, 0}, {4, 1000}}));
  EXPECT_EQ(SplitBox(Box::Whole({5, 1000}), 1, 2), (Box{{0, 500}, {5, 1000}}));
  EXPECT_EQ(SplitBox(Box::Whole({33, 1000}), 0, 2), (Box{{0, 0}, {17, 1000}}));
  EXPECT_EQ(SplitBox(Box{}, 0, 1), Box{});
}

TEST(SubtractTest, LeavesTheRestInDisjointBoxes) {
  Random random(test::TestSeed());
  for (int round = 0; round < 2000; ++round) {
    const Dims shape = RandomDims(random, 200);
    const Box a = RandomBox(random, shape);
    const Box b = RandomBox(random, shape);
    std::vector<int64_t> expected;
    const std::vector<int64_t> cut = Elements(shape, b);
    for (int64_t element : Elements(shape, a)) {
      if (!std::binary_search(cut.begin(), cut.end(), element)) {
        expected.push_back(element);
      }
    }
    std::vector<int64_t> found;
    const std::vector<Box> rest = Subtract(a, b);
    EXPECT_LE(rest.size(), std::max<size_t>(1, 2 * shape.size()));
    for (const Box& box : rest) {
      ASSERT_FALSE(box.empty());
      for (int64_t element : Elements(shape, box)) found.push_back(element);
    }
    std::sort(found.begin(), found.end());
    ASSERT_EQ(found, expected) << a.ToString() << " - " << b.ToString();
  }
}

TEST(BoxIndexTest, FindsWhatOverlaps) {
  Random random(test::TestSeed());
  for (int round = 0; round < 200; ++round) {
    const Dims shape = RandomDims(random, 2000);
    BoxIndex index(shape.size());
    std::vector<Box> boxes;
    for (int64_t i = Uniform(random, 0, 300); i > 0; --i) {
      const Box box = RandomBox(random, shape);
      if (box.empty()) continue;
      index.Add(box);
      boxes.push_back(box);
    }
    index.Build();
    ASSERT_EQ(index.size(), boxes.size());
    std::vector<uint32_t> found = {99};
    for (int query = 0; query < 20; ++query) {
      const Box box = RandomBox(random, shape);
      if (box.empty()) continue;
      std::vector<uint32_t> expected;
      for (uint32_t i = 0; i < boxes.size(); ++i) {
        ASSERT_EQ(index.box(i), boxes[i]);
        if (Intersect(boxes[i], box).has_value()) expected.push_back(i);
      }
      index.FindOverlapping(box, found);
      ASSERT_EQ(found, expected);
    }
  }
}

}  // namespace
}  // namespace dsd
