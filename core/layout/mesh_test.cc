// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/layout/mesh.h"

#include <algorithm>
#include <cstdint>
#include <set>
#include <vector>

#include "absl/status/status.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/layout/random_layout.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using test::Random;
using test::Uniform;

Digest DigestOf(const DeviceMesh& mesh) {
  DigestBuilder digest;
  mesh.AddTo(digest);
  return digest.Finish();
}

TEST(DeviceMeshTest, IotaIsRowMajor) {
  const DeviceMesh mesh = DeviceMesh::Iota({2, 3}, 10, {"dp", "tp"});
  EXPECT_EQ(mesh.size(), 6);
  EXPECT_EQ(mesh.At({1, 2}), 15);
  EXPECT_EQ(*mesh.CoordsOf(14), (Dims{1, 1}));
  EXPECT_FALSE(mesh.CoordsOf(9).has_value());
  EXPECT_FALSE(mesh.CoordsOf(16).has_value());
  EXPECT_FALSE(mesh.CoordsOf(kAnyHolder).has_value());
  EXPECT_EQ(mesh.bounds(), (std::pair<Holder, Holder>(10, 15)));
  EXPECT_EQ(mesh.ToString(), "mesh[2, 3](dp, tp)");
}

TEST(DeviceMeshTest, ExplicitHolders) {
  const auto mesh = DeviceMesh::Create({2, 2}, {7, 0, 3, 9});
  ASSERT_TRUE(mesh.ok()) << mesh.status();
  EXPECT_FALSE(mesh->is_iota());
  EXPECT_EQ(mesh->At({1, 0}), 3);
  EXPECT_EQ(*mesh->CoordsOf(9), (Dims{1, 1}));
  EXPECT_FALSE(mesh->CoordsOf(1).has_value());
  EXPECT_EQ(mesh->bounds(), (std::pair<Holder, Holder>(0, 9)));
}

TEST(DeviceMeshTest, ConsecutiveHoldersAreIota) {
  const auto mesh = DeviceMesh::Create({2, 2}, {4, 5, 6, 7}, {"a", "b"});
  ASSERT_TRUE(mesh.ok()) << mesh.status();
  EXPECT_TRUE(mesh->is_iota());
  EXPECT_EQ(*mesh, DeviceMesh::Iota({2, 2}, 4));
  EXPECT_EQ(DigestOf(*mesh), DigestOf(DeviceMesh::Iota({2, 2}, 4)));
}

TEST(DeviceMeshTest, ComparesHoldersAndShape) {
  const auto a = DeviceMesh::Create({2, 2}, {7, 0, 3, 9});
  const auto b = DeviceMesh::Create({2, 2}, {7, 0, 3, 9}, {"x", "y"});
  const auto c = DeviceMesh::Create({2, 2}, {7, 3, 0, 9});
  EXPECT_EQ(*a, *b);
  EXPECT_EQ(DigestOf(*a), DigestOf(*b));
  EXPECT_NE(*a, *c);
  EXPECT_NE(DigestOf(*a), DigestOf(*c));
  EXPECT_NE(DeviceMesh::Iota({2, 3}), DeviceMesh::Iota({3, 2}));
  EXPECT_NE(DeviceMesh::Iota({2, 2}), *a);
  EXPECT_NE(DigestOf(DeviceMesh::Iota({4})),
            DigestOf(DeviceMesh::Iota({4}, 1)));
}

TEST(DeviceMeshTest, RefusesBadInput) {
  for (const auto& bad :
       {DeviceMesh::Create({2, 2}, {0, 1, 2}), DeviceMesh::Create({2}, {5, 5}),
        DeviceMesh::Create({2}, {0, -1}), DeviceMesh::Create({0}, {}),
        DeviceMesh::Create({-1}, {0}),
        DeviceMesh::Create({int64_t{1} << 40, int64_t{1} << 40}, {0}),
        DeviceMesh::Create({2}, {0, 1}, {"a", "b"})}) {
    EXPECT_EQ(bad.status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(DeviceMesh::Create({3}, {4, 8, 4}).status().message(),
            "mesh of shape [3]: holder 4 is at positions 0 and 2");
}

// A random coset and its holders, by walking the mesh.
struct Coset {
  DeviceMesh mesh;
  Dims coords;
  Dims free;
  std::vector<Holder> holders;
};

Coset RandomCoset(Random& random) {
  Dims shape;
  int64_t size = 1;
  for (int64_t d = Uniform(random, 0, 3); d > 0; --d) {
    shape.push_back(Uniform(random, 1, 4));
    size *= shape.back();
  }
  Coset out{DeviceMesh::Iota(shape, Uniform(random, 0, 3)), {}, {}, {}};
  if (Uniform(random, 0, 2) == 0) {
    std::vector<Holder> holders;
    for (int64_t i = 0; i < size; ++i) holders.push_back(2 * i + 1);
    std::shuffle(holders.begin(), holders.end(), random);
    out.mesh = *DeviceMesh::Create(shape, holders);
  }
  for (int64_t extent : shape) {
    out.coords.push_back(Uniform(random, 0, extent - 1));
    out.free.push_back(Uniform(random, 0, 1));
  }
  for (int64_t i = 0; i < size; ++i) {
    Dims at(shape.size());
    int64_t rest = i;
    for (size_t d = shape.size(); d-- > 0;) {
      at[d] = rest % shape[d];
      rest /= shape[d];
    }
    bool inside = true;
    for (size_t d = 0; d < shape.size(); ++d) {
      inside &= out.free[d] != 0 || at[d] == out.coords[d];
    }
    if (inside) out.holders.push_back(out.mesh.At(at));
  }
  return out;
}

TEST(HolderSetTest, CosetsAreTheirHoldersInOrder) {
  Random random(test::TestSeed());
  for (int round = 0; round < 2000; ++round) {
    const Coset coset = RandomCoset(random);
    const HolderSet set(&coset.mesh, coset.coords, coset.free);
    ASSERT_EQ(set.size(), coset.holders.size());
    for (int64_t i = 0; i < set.size(); ++i) {
      ASSERT_EQ(set.At(i), coset.holders[i]);
      ASSERT_EQ(set.PositionOf(set.At(i)), i);
    }
    const std::set<Holder> all(coset.holders.begin(), coset.holders.end());
    for (Holder holder = -2; holder < 140; ++holder) {
      ASSERT_EQ(set.Contains(holder), all.count(holder) == 1);
    }
    EXPECT_LE(set.bounds().first, *all.begin());
    EXPECT_GE(set.bounds().second, *all.rbegin());
    EXPECT_FALSE(set.IsAny());

    const HolderSet list({coset.holders.begin(), coset.holders.end()});
    const Holder low = Uniform(random, 0, 40);
    const Holder high = Uniform(random, low, low + 8);
    bool has = true;
    for (Holder h = low; h <= high; ++h) has &= all.count(h) == 1;
    EXPECT_EQ(list.IsKnownToHave(low, high), has);
    EXPECT_TRUE(has || !set.IsKnownToHave(low, high));
  }
}

TEST(HolderSetTest, KnownSubsetsAndEqualKeysAreTrue) {
  Random random(test::TestSeed());
  int subsets = 0;
  int equal = 0;
  for (int round = 0; round < 20000; ++round) {
    const Coset a = RandomCoset(random);
    const Coset b = RandomCoset(random);
    const std::set<Holder> b_all(b.holders.begin(), b.holders.end());
    const bool subset =
        std::all_of(a.holders.begin(), a.holders.end(),
                    [&](Holder h) { return b_all.count(h) == 1; });
    const HolderSet coset_a(&a.mesh, a.coords, a.free);
    const HolderSet coset_b(&b.mesh, b.coords, b.free);
    const HolderSet list_a({a.holders.begin(), a.holders.end()});
    const HolderSet list_b({b.holders.begin(), b.holders.end()});
    for (const HolderSet* x : {&coset_a, &list_a}) {
      for (const HolderSet* y : {&coset_b, &list_b}) {
        if (x->IsKnownSubsetOf(*y)) {
          ASSERT_TRUE(subset);
          ++subsets;
        }
      }
    }
    EXPECT_EQ(list_a.IsKnownSubsetOf(list_b), subset);
    if (coset_a.key() == coset_b.key()) {
      EXPECT_EQ(a.holders, b.holders);
      ++equal;
    }
    ASSERT_TRUE(coset_a.IsKnownSubsetOf(coset_a));
  }
  EXPECT_GT(subsets, 100);
  EXPECT_GT(equal, 100);
}

TEST(HolderSetTest, SeesThroughTheShapeOfAMesh) {
  // The same 8 holders as one dimension and as two.
  const DeviceMesh line = DeviceMesh::Iota({16});
  const DeviceMesh square = DeviceMesh::Iota({2, 4, 2});
  const HolderSet all(&line, {0}, {1});
  const HolderSet also_all(&square, {0, 0, 0}, {1, 1, 1});
  const HolderSet half(&square, {1, 0, 0}, {0, 1, 1});
  EXPECT_EQ(all.key(), also_all.key());
  EXPECT_TRUE(all.IsKnownSubsetOf(also_all));
  EXPECT_TRUE(half.IsKnownSubsetOf(all));
  EXPECT_FALSE(all.IsKnownSubsetOf(half));
  EXPECT_TRUE(also_all.IsKnownToHave(0, 15));
  EXPECT_TRUE(half.IsKnownToHave(8, 15));
  EXPECT_FALSE(half.IsKnownToHave(7, 15));
}

TEST(HolderSetTest, ListsAreSorted) {
  const HolderSet set({9, 3, 9, 5});
  ASSERT_EQ(set.size(), 3);
  EXPECT_EQ(set.At(0), 3);
  EXPECT_EQ(set.PositionOf(9), 2);
  EXPECT_FALSE(set.Contains(4));
  EXPECT_TRUE(HolderSet({kAnyHolder}).IsAny());
  EXPECT_FALSE(HolderSet({0}).IsAny());
}

}  // namespace
}  // namespace dsd
