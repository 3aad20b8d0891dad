// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/layout/layout.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "dsd/core/layout/element_map.h"
#include "dsd/core/layout/random_layout.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using test::LayoutSpec;
using test::Random;
using test::Uniform;

// Row-major indices, in a tensor of `shape`, of the elements of `box`.
std::vector<int64_t> Elements(const Dims& shape, const Box& box) {
  std::vector<int64_t> out;
  if (box.empty()) return out;
  Dims at = box.lo;
  while (true) {
    out.push_back(FlatIndex(shape, at));
    int d = box.ndim() - 1;
    while (d >= 0 && ++at[d] == box.hi[d]) at[d] = box.lo[d], --d;
    if (d < 0) return out;
  }
}

Box RandomQuery(Random& random, const Dims& shape) {
  Box box = Box::Whole(shape);
  if (Uniform(random, 0, 2) == 0) return box;
  for (int d = 0; d < box.ndim(); ++d) {
    box.lo[d] = Uniform(random, 0, shape[d]);
    box.hi[d] = Uniform(random, box.lo[d], shape[d]);
  }
  return box;
}

std::vector<Holder> List(const HolderSet& set) {
  std::vector<Holder> out;
  for (int64_t i = 0; i < set.size(); ++i) out.push_back(set.At(i));
  std::sort(out.begin(), out.end());
  return out;
}

// Checks all that `layout` says against the brute-force map of `spec`.
void CheckAgainstMap(const Layout& layout, const LayoutSpec& spec,
                     Random& random) {
  const Dims& shape = layout.shape();
  const std::vector<std::vector<int64_t>> expected =
      test::HoldersByElement(spec);

  // Cells: each element once, with its holders, whatever the query; and a cell
  // clipped by a query is the part of a cell of the whole.
  std::map<int64_t, Box> cell_of;
  layout.ForEachCell(layout.whole(), [&](const Cell& cell) {
    for (int64_t e : Elements(shape, cell.box)) cell_of[e] = cell.box;
  });
  for (int i = 0; i < 4; ++i) {
    const Box query = RandomQuery(random, shape);
    std::set<int64_t> seen;
    std::optional<Dims> previous;
    int64_t operations = 0;
    layout.ForEachCell(
        query,
        [&](const Cell& cell) {
          ASSERT_FALSE(cell.box.empty());
          ASSERT_TRUE(query.Contains(cell.box));
          if (layout.kind() == Layout::Kind::kMesh) {
            if (previous.has_value()) {
              ASSERT_LT(*previous, cell.box.lo);
            }
            previous = cell.box.lo;
          }
          for (int64_t e : Elements(shape, cell.box)) {
            ASSERT_TRUE(seen.insert(e).second);
            ASSERT_EQ(List(cell.holders), expected[e]);
            ASSERT_EQ(cell.box, *Intersect(cell_of[e], query));
          }
        },
        &operations);
    for (int64_t e : Elements(shape, query)) {
      ASSERT_EQ(seen.count(e), expected[e].empty() ? 0 : 1);
    }
    EXPECT_GE(operations, seen.empty() ? 0 : 1);
  }

  // Boxes of each holder, where they lie, local shape.
  std::vector<Holder> holders;
  layout.ForEachHolder([&](Holder holder) { holders.push_back(holder); });
  std::sort(holders.begin(), holders.end());
  ASSERT_EQ(std::adjacent_find(holders.begin(), holders.end()), holders.end());
  for (int64_t holder : test::HoldersOf(spec)) {
    const std::vector<int64_t> local = test::LocalElements(spec, holder);
    if (!local.empty()) {
      ASSERT_TRUE(std::binary_search(holders.begin(), holders.end(), holder));
      if (holder == kAnyHolder) {
        EXPECT_TRUE(layout.HasAnyHolder());
      } else {
        EXPECT_LE(layout.HolderBounds()->first, holder);
        EXPECT_GE(layout.HolderBounds()->second, holder);
      }
    }
    const std::optional<Dims> local_shape = layout.LocalShape(holder);
    ASSERT_EQ(local_shape.has_value(), layout.kind() != Layout::Kind::kBoxes);
    std::vector<int64_t> found;
    int64_t previous = -1;
    std::vector<bool> placed(local.size(), false);
    for (const LocalBox& part : layout.BoxesOf(holder)) {
      ASSERT_FALSE(part.box.empty());
      ASSERT_LT(previous, FlatIndex(shape, part.box.lo));
      previous = FlatIndex(shape, part.box.lo);
      const std::vector<int64_t> elements = Elements(shape, part.box);
      found.insert(found.end(), elements.begin(), elements.end());
      for (int64_t e : elements) {
        if (layout.kind() == Layout::Kind::kBoxes) continue;
        // Element e's place in local memory.
        size_t at = 0;
        if (layout.kind() == Layout::Kind::kFlat) {
          at = part.local_lo[0] +
               (std::find(elements.begin(), elements.end(), e) -
                elements.begin());
        } else {
          Dims coords(shape.size());
          int64_t rest = e;
          for (size_t d = shape.size(); d-- > 0;) {
            coords[d] = rest % shape[d] - part.box.lo[d] + part.local_lo[d];
            rest /= shape[d];
          }
          at = FlatIndex(*local_shape, coords);
        }
        ASSERT_LT(at, local.size());
        ASSERT_EQ(local[at], e);
        ASSERT_FALSE(placed[at]);
        placed[at] = true;
      }
    }
    if (layout.kind() == Layout::Kind::kBoxes) {
      ASSERT_EQ(found, local);
    } else {
      std::vector<int64_t> sorted = local;
      std::sort(sorted.begin(), sorted.end());
      std::sort(found.begin(), found.end());
      ASSERT_EQ(found, sorted);
    }
    if (spec.kind == LayoutSpec::Kind::kPlacements ||
        spec.kind == LayoutSpec::Kind::kHistory) {
      const auto lists = test::LocalIndices(spec, holder);
      for (size_t d = 0; d < lists.size(); ++d) {
        ASSERT_EQ((*local_shape)[d], lists[d].size());
      }
    }
  }

  int64_t uncovered = 0;
  for (const auto& element : expected) uncovered += element.empty();
  EXPECT_EQ(layout.NumUncovered(), uncovered);
}

TEST(LayoutPropertyTest, AgreesWithTheElementMap) {
  const uint64_t seed = test::TestSeed();
  for (int round = 0; round < 3000; ++round) {
    Random random(seed + round);
    test::RandomLayoutOptions options;
    for (int64_t h = Uniform(random, 1, 12); h > 0; --h) {
      options.holders.push_back(2 * h);
    }
    options.any = true;
    options.holes = Uniform(random, 0, 1) == 0;
    const LayoutSpec spec =
        test::RandomLayoutSpec(random, test::RandomShape(random, 150), options);
    SCOPED_TRACE("DSD_TEST_SEED=" + std::to_string(seed + round) + " " +
                 spec.ToString());
    const auto layout = test::BuildLayout(spec);
    ASSERT_TRUE(layout.ok()) << layout.status();
    ASSERT_NO_FATAL_FAILURE(CheckAgainstMap(*layout, spec, random));
  }
}

TEST(LayoutPropertyTest, MeshCellsAreMaximal) {
  const uint64_t seed = test::TestSeed();
  for (int round = 0; round < 1000; ++round) {
    Random random(seed + round);
    test::RandomLayoutOptions options;
    for (int64_t h = 0; h < 12; ++h) options.holders.push_back(h);
    const LayoutSpec spec =
        test::RandomLayoutSpec(random, {Uniform(random, 0, 60)}, options);
    if (spec.kind != LayoutSpec::Kind::kPlacements &&
        spec.kind != LayoutSpec::Kind::kHistory) {
      continue;
    }
    SCOPED_TRACE("DSD_TEST_SEED=" + std::to_string(seed + round) + " " +
                 spec.ToString());
    const auto layout = test::BuildLayout(spec);
    ASSERT_TRUE(layout.ok()) << layout.status();
    std::vector<Holder> previous;
    layout->ForEachCell(layout->whole(), [&](const Cell& cell) {
      std::vector<Holder> holders = List(cell.holders);
      EXPECT_NE(holders, previous) << cell.box.ToString();
      previous = std::move(holders);
    });
  }
}

TEST(LayoutPropertyTest, GeometryMapAndDigest) {
  const uint64_t seed = test::TestSeed();
  int same = 0;
  for (int round = 0; round < 2000; ++round) {
    Random random(seed + round);
    test::RandomLayoutOptions options;
    for (int64_t h = 0; h < 3; ++h) options.holders.push_back(h);
    options.any = true;
    const std::vector<int64_t> shape = test::RandomShape(random, 12);
    const LayoutSpec spec_a = test::RandomLayoutSpec(random, shape, options);
    const LayoutSpec spec_b = test::RandomLayoutSpec(random, shape, options);
    SCOPED_TRACE("DSD_TEST_SEED=" + std::to_string(seed + round) + " " +
                 spec_a.ToString() + " and " + spec_b.ToString());
    const auto a = test::BuildLayout(spec_a);
    const auto b = test::BuildLayout(spec_b);
    ASSERT_TRUE(a.ok() && b.ok()) << a.status() << b.status();
    const bool equal =
        test::HoldersByElement(spec_a) == test::HoldersByElement(spec_b);
    same += equal;
    EXPECT_EQ(Layout::SameGeometry(*a, *b), equal);
    EXPECT_TRUE(equal || a->symbols() != b->symbols());
    EXPECT_EQ(a->symbols(), test::BuildLayout(spec_a)->symbols());

    const auto moved = a->MapHolders([](Holder h) { return 20 - 7 * h; });
    ASSERT_TRUE(moved.ok()) << moved.status();
    EXPECT_EQ(moved->HasAnyHolder(), a->HasAnyHolder());
    for (Holder h = 0; h < 3; ++h) {
      const auto from = a->BoxesOf(h);
      const auto to = moved->BoxesOf(20 - 7 * h);
      ASSERT_EQ(from.size(), to.size());
      for (size_t i = 0; i < from.size(); ++i) {
        EXPECT_EQ(from[i].box, to[i].box);
        EXPECT_EQ(from[i].local_lo, to[i].local_lo);
      }
    }
    const auto back = moved->MapHolders([](Holder h) { return (20 - h) / 7; });
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(back->symbols(), a->symbols());
    if (a->HolderBounds().has_value()) {
      EXPECT_EQ(a->MapHolders([](Holder h) { return -1 - h; }).status().code(),
                absl::StatusCode::kInvalidArgument);
    }
    int64_t holders = 0;
    a->ForEachHolder([&](Holder h) { holders += h != kAnyHolder; });
    if (holders > 1) {
      EXPECT_EQ(a->MapHolders([](Holder) { return 5; }).status().code(),
                absl::StatusCode::kInvalidArgument);
    }
  }
  EXPECT_GT(same, 20);
}

// What each holder of a mesh has of a 1-dim tensor.
std::vector<std::vector<std::pair<int64_t, int64_t>>> Parts(
    const Layout& layout, int num_holders) {
  std::vector<std::vector<std::pair<int64_t, int64_t>>> out(num_holders);
  for (int h = 0; h < num_holders; ++h) {
    for (const LocalBox& part : layout.BoxesOf(h)) {
      out[h].push_back({part.box.lo[0], part.box.hi[0]});
    }
  }
  return out;
}

TEST(PlacementGoldenTest, ChunkSizes) {
  const std::vector<std::pair<int64_t, std::vector<int64_t>>> cases = {
      {10, {3, 3, 3, 1}}, {9, {3, 3, 3, 0}}, {5, {2, 2, 1, 0}},
      {2, {1, 1, 0, 0}},  {0, {0, 0, 0, 0}},
  };
  for (const auto& [size, sizes] : cases) {
    const auto layout =
        Layout::FromPlacements({size, 2}, DeviceMesh::Iota({4}), {Shard(0)});
    ASSERT_TRUE(layout.ok()) << layout.status();
    for (int h = 0; h < 4; ++h) {
      // An empty shard keeps the other dimensions.
      EXPECT_EQ(*layout->LocalShape(h), (Dims{sizes[h], 2})) << size;
    }
    EXPECT_FALSE(layout->LocalShape(4).has_value());
  }
}

TEST(PlacementGoldenTest, NestedShardsOfOneDimension) {
  const auto layout = Layout::FromPlacements({3, 5}, DeviceMesh::Iota({2, 2}),
                                             {Shard(1), Shard(-1)});
  ASSERT_TRUE(layout.ok()) << layout.status();
  const std::vector<int64_t> sizes = {2, 1, 1, 1};
  const std::vector<int64_t> offsets = {0, 2, 3, 4};
  for (int h = 0; h < 4; ++h) {
    const auto boxes = layout->BoxesOf(h);
    ASSERT_EQ(boxes.size(), 1);
    EXPECT_EQ(boxes[0].box, (Box{{0, offsets[h]}, {3, offsets[h] + sizes[h]}}));
  }
}

TEST(PlacementGoldenTest, StridedShard) {
  // FSDP over TP: ranks (0,0), (0,1), (1,0), (1,1).
  const auto layout = Layout::FromPlacements({8}, DeviceMesh::Iota({2, 2}),
                                             {StridedShard(0, 2), Shard(0)});
  ASSERT_TRUE(layout.ok()) << layout.status();
  EXPECT_EQ(Parts(*layout, 4),
            (std::vector<std::vector<std::pair<int64_t, int64_t>>>{
                {{0, 2}}, {{4, 6}}, {{2, 4}}, {{6, 8}}}));
}

TEST(PlacementGoldenTest, StridedLastIsAUnionOfRanges) {
  const auto layout = Layout::FromPlacements({8}, DeviceMesh::Iota({2, 2}),
                                             {Shard(0), StridedShard(0, 2)});
  ASSERT_TRUE(layout.ok()) << layout.status();
  EXPECT_EQ(Parts(*layout, 4),
            (std::vector<std::vector<std::pair<int64_t, int64_t>>>{
                {{0, 1}, {2, 3}},
                {{1, 2}, {3, 4}},
                {{4, 5}, {6, 7}},
                {{5, 6}, {7, 8}}}));
  EXPECT_EQ(layout->BoxesOf(0)[1].local_lo, (Dims{1}));
}

TEST(PlacementGoldenTest, HistoryDiffersFromPlacementsForUnevenSizes) {
  // dp 3, tp 2, 7 rows: FSDP over TP cuts by tp, then by dp. Physically dp rank
  // 2 has nothing for tp 0 and row 6 for tp 1; the placements that Python
  // records give row 6 to tp 0.
  const DeviceMesh mesh = DeviceMesh::Iota({3, 2}, 0, {"dp", "tp"});
  const auto physical = Layout::FromHistory({7}, mesh, {{1, 0}, {0, 0}});
  const auto recorded =
      Layout::FromPlacements({7}, mesh, {StridedShard(0, 2), Shard(0)});
  ASSERT_TRUE(physical.ok() && recorded.ok());
  const int dp2_tp0 = 4;
  const int dp2_tp1 = 5;
  EXPECT_TRUE(physical->BoxesOf(dp2_tp0).empty());
  EXPECT_EQ(physical->BoxesOf(dp2_tp1)[0].box, (Box{{6}, {7}}));
  EXPECT_EQ(recorded->BoxesOf(dp2_tp0)[0].box, (Box{{6}, {7}}));
  EXPECT_TRUE(recorded->BoxesOf(dp2_tp1).empty());
  EXPECT_FALSE(Layout::SameGeometry(*physical, *recorded));

  // No size up to 29 tells them apart for dp 2.
  for (int64_t rows = 0; rows < 30; ++rows) {
    for (int64_t tp = 1; tp <= 5; ++tp) {
      const DeviceMesh even = DeviceMesh::Iota({2, tp});
      const auto a = Layout::FromHistory({rows}, even, {{1, 0}, {0, 0}});
      const auto b =
          Layout::FromPlacements({rows}, even, {StridedShard(0, tp), Shard(0)});
      ASSERT_TRUE(a.ok() && b.ok());
      EXPECT_TRUE(Layout::SameGeometry(*a, *b)) << rows << " rows, tp " << tp;
      EXPECT_FALSE(a->symbols() == b->symbols());
    }
  }
}

TEST(LayoutTest, CellsOfAReplicatedMeshAreCosets) {
  const auto layout =
      Layout::FromPlacements({8, 4}, DeviceMesh::Iota({2, 2}, 0, {"dp", "tp"}),
                             {Replicate(), Shard(0)});
  ASSERT_TRUE(layout.ok()) << layout.status();
  EXPECT_EQ(layout->ToString(), "[8, 4] mesh[2, 2](dp, tp) R,S(0)");
  std::vector<std::vector<Holder>> holders;
  layout->ForEachCell(layout->whole(), [&](const Cell& cell) {
    holders.push_back(List(cell.holders));
  });
  EXPECT_EQ(holders, (std::vector<std::vector<Holder>>{{0, 2}, {1, 3}}));
}

TEST(LayoutTest, CellsCostNothingPerHolder) {
  // The same query over few and over very many holders.
  std::vector<int64_t> counts;
  for (int64_t holders : {int64_t{64}, int64_t{1} << 40}) {
    const auto layout = Layout::FromPlacements(
        {16 * holders, 4}, DeviceMesh::Iota({holders}), {Shard(0)});
    ASSERT_TRUE(layout.ok()) << layout.status();
    int64_t operations = 0;
    layout->ForEachCell(
        {{16 * (holders - 3), 0}, {16 * holders, 4}}, [](const Cell&) {},
        &operations);
    counts.push_back(operations);
    EXPECT_EQ(layout->BoxesOf(holders - 1)[0].box,
              (Box{{16 * (holders - 1), 0}, {16 * holders, 4}}));
  }
  EXPECT_EQ(counts[0], 3);
  EXPECT_EQ(counts[0], counts[1]);
}

TEST(LayoutTest, ColumnsOfAFlatLayoutJumpOverCells) {
  // 1000 rows of 100, one cell per row; the query touches one column of two
  // rows.
  std::vector<FlatInterval> intervals;
  for (int64_t h = 0; h < 1000; ++h) {
    intervals.push_back({h, 100 * h, 100 * h + 100});
  }
  const auto layout = Layout::FromFlatIntervals({1000, 100}, intervals);
  ASSERT_TRUE(layout.ok()) << layout.status();
  int64_t operations = 0;
  std::vector<Holder> holders;
  layout->ForEachCell(
      {{500, 7}, {502, 8}},
      [&](const Cell& cell) { holders.push_back(cell.holders.At(0)); },
      &operations);
  EXPECT_EQ(holders, (std::vector<Holder>{500, 501}));
  EXPECT_EQ(operations, 2);
}

TEST(LayoutTest, AFlatCellBetweenTwoRowsOfTheQueryIsNotVisited) {
  // The query is element (500, 3, 7) and (501, 3, 7) of [1000, 10, 10].
  const auto layout = Layout::FromFlatIntervals(
      {1000, 10, 10}, {{0, 0, 50038}, {1, 50038, 50100}, {2, 50100, 100000}});
  ASSERT_TRUE(layout.ok()) << layout.status();
  int64_t operations = 0;
  std::vector<Holder> holders;
  layout->ForEachCell(
      {{500, 3, 7}, {502, 4, 8}},
      [&](const Cell& cell) { holders.push_back(cell.holders.At(0)); },
      &operations);
  EXPECT_EQ(holders, (std::vector<Holder>{0, 2}));
  EXPECT_EQ(operations, 2);
}

TEST(LayoutTest, FlatIntervals) {
  const auto layout = Layout::FromFlatIntervals(
      {4, 5}, {{2, 10, 20}, {0, 0, 7}, {1, 7, 12}, {5, 3, 3}});
  ASSERT_TRUE(layout.ok()) << layout.status();
  EXPECT_EQ(layout->kind(), Layout::Kind::kFlat);
  EXPECT_EQ(layout->IntervalOf(1)->begin, 7);
  EXPECT_FALSE(layout->IntervalOf(3).has_value());
  EXPECT_EQ(*layout->LocalShape(2), (Dims{10}));
  EXPECT_EQ(*layout->LocalShape(5), (Dims{0}));
  EXPECT_EQ(layout->NumUncovered(), 0);
  EXPECT_EQ(layout->ToString(),
            "[4, 5] flat 0:[0:7] 1:[7:12] 2:[10:20] 5:[3:3]");
  const auto boxes = layout->BoxesOf(1);
  ASSERT_EQ(boxes.size(), 2);
  EXPECT_EQ(boxes[0].box, (Box{{1, 2}, {2, 5}}));
  EXPECT_EQ(boxes[1].box, (Box{{2, 0}, {3, 2}}));
  EXPECT_EQ(boxes[1].local_lo, (Dims{3}));

  std::vector<std::pair<int64_t, std::vector<Holder>>> cells;
  layout->ForEachFlatCell(
      8, 15, [&](int64_t begin, int64_t end, const HolderSet& set) {
        EXPECT_LT(begin, end);
        cells.push_back({begin, List(set)});
      });
  EXPECT_EQ(cells, (std::vector<std::pair<int64_t, std::vector<Holder>>>{
                       {8, {1}}, {10, {1, 2}}, {12, {2}}}));
}

TEST(LayoutTest, OverlappingBoxesAreCutIntoCells) {
  const auto layout = Layout::FromBoxes(
      {6}, {{0, {{0}, {4}}}, {1, {{2}, {6}}}, {2, {{2}, {6}}}});
  ASSERT_TRUE(layout.ok()) << layout.status();
  std::map<int64_t, std::vector<Holder>> cells;
  layout->ForEachCell(layout->whole(), [&](const Cell& cell) {
    cells[cell.box.lo[0]] = List(cell.holders);
  });
  EXPECT_EQ(cells, (std::map<int64_t, std::vector<Holder>>{
                       {0, {0}}, {2, {0, 1, 2}}, {4, {1, 2}}}));
  EXPECT_EQ(layout->ToString(), "[6] boxes 0:[0:4] 1:[2:6] 2:[2:6]");
}

TEST(LayoutTest, OrderOfBoxesDoesNotMatter) {
  const auto a = Layout::FromBoxes({6}, {{0, {{0}, {4}}}, {1, {{4}, {6}}}});
  const auto b = Layout::FromBoxes(
      {6}, {{1, {{4}, {6}}}, {3, {{5}, {5}}}, {0, {{0}, {4}}}});
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(a->symbols(), b->symbols());
}

TEST(LayoutTest, ReplicatedAndAnywhere) {
  const Layout some = Layout::Replicated({2, 3}, {4, 1, 4});
  EXPECT_EQ(some.BoxesOf(4)[0].box, some.whole());
  EXPECT_TRUE(some.BoxesOf(0).empty());
  EXPECT_EQ(*some.HolderBounds(), (std::pair<Holder, Holder>(1, 4)));
  EXPECT_EQ(some.NumUncovered(), 0);

  const Layout none = Layout::Replicated({2, 3}, {});
  EXPECT_EQ(none.NumUncovered(), 6);
  EXPECT_FALSE(none.HolderBounds().has_value());

  const Layout any = Layout::Anywhere({2, 3});
  EXPECT_TRUE(any.HasAnyHolder());
  EXPECT_FALSE(any.HolderBounds().has_value());
  EXPECT_EQ(any.BoxesOf(kAnyHolder)[0].box, any.whole());
  EXPECT_EQ(any.ToString(), "[2, 3] boxes any:[0:2, 0:3]");
  any.ForEachCell(any.whole(),
                  [](const Cell& cell) { EXPECT_TRUE(cell.holders.IsAny()); });

  // Of no elements, and of one.
  EXPECT_TRUE(Layout::Anywhere({0, 3}).BoxesOf(kAnyHolder).empty());
  EXPECT_EQ(Layout::Replicated({}, {0}).BoxesOf(0).size(), 1);
  EXPECT_EQ(Layout::Replicated({}, {0, 1}).ToString(), "[] mesh[2] R");
}

TEST(LayoutTest, NegativeExtentsMakeAnEmptyTensor) {
  for (const Layout& layout :
       {Layout::Replicated({-2, 3}, {0}), Layout::Anywhere({-2, 3}),
        Layout::Replicated({-2, 3}, {-5})}) {
    EXPECT_TRUE(layout.BoxesOf(0).empty());
    layout.ForEachCell(layout.whole(),
                       [](const Cell& cell) { FAIL() << cell.box.ToString(); });
  }
}

void ExpectRefused(const absl::StatusOr<Layout>& layout,
                   const std::string& text) {
  ASSERT_FALSE(layout.ok()) << layout->ToString();
  EXPECT_EQ(layout.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(layout.status().message().find(text), std::string::npos)
      << layout.status();
}

TEST(LayoutTest, RefusesBadPlacements) {
  const DeviceMesh mesh = DeviceMesh::Iota({2, 2}, 0, {"dp", "tp"});
  ExpectRefused(Layout::FromPlacements({4}, mesh, {Shard(0)}),
                "needs 2 placements");
  ExpectRefused(Layout::FromPlacements({4}, mesh, {Shard(0), Shard(1)}),
                "placement S(1) of mesh dimension 1, tensor [4]: tensor "
                "dimension 1 is out of range for 1 dimensions");
  ExpectRefused(Layout::FromPlacements({4}, mesh, {Shard(-2), Replicate()}),
                "out of range");
  ExpectRefused(Layout::FromPlacements({}, mesh, {Shard(0), Replicate()}),
                "out of range");
  ExpectRefused(
      Layout::FromPlacements({4}, mesh, {StridedShard(0, 0), Replicate()}),
      "split_factor");
  ExpectRefused(Layout::FromPlacements({4}, mesh, {Partial(), Replicate()}),
                "reduce it first");
  ExpectRefused(Layout::FromPlacements({-4}, mesh, {Shard(0), Replicate()}),
                "extents must be >= 0");
  ExpectRefused(Layout::FromPlacements({int64_t{1} << 32, int64_t{1} << 32},
                                       mesh, {Shard(0), Replicate()}),
                "at most 2^63 - 1");
  ExpectRefused(Layout::FromPlacements({4}, DeviceMesh::Iota({0}), {Shard(0)}),
                "extents must be >= 1");
  ExpectRefused(Layout::FromHistory({4}, mesh, {{2, 0}}),
                "mesh dimension 2 is out of range");
  ExpectRefused(Layout::FromHistory({4}, mesh, {{0, 0}, {0, 0}}),
                "a second time");
  ExpectRefused(Layout::FromHistory({4}, mesh, {{0, 1}}), "out of range");
}

TEST(LayoutTest, RefusesBadIntervals) {
  ExpectRefused(Layout::FromFlatIntervals({4}, {{0, 0, 5}}),
                "[0:5] is not an interval of 4 elements");
  ExpectRefused(Layout::FromFlatIntervals({4}, {{0, -1, 2}}), "interval");
  ExpectRefused(Layout::FromFlatIntervals({4}, {{0, 3, 2}}), "interval");
  ExpectRefused(Layout::FromFlatIntervals({4}, {{0, 0, 1}, {0, 2, 3}}),
                "holder 0: has");
  ExpectRefused(Layout::FromFlatIntervals({4}, {{-2, 0, 1}}), "holder");
  ExpectRefused(Layout::FromFlatIntervals({4}, {{-1, 0, 3}, {1, 2, 3}}),
                "element 2 is both on kAnyHolder and on holder 1");
}

TEST(LayoutTest, RefusesBadBoxes) {
  ExpectRefused(Layout::FromBoxes({4}, {{0, {{0}, {5}}}}), "not inside");
  ExpectRefused(Layout::FromBoxes({4}, {{0, {{-1}, {2}}}}), "not inside");
  ExpectRefused(Layout::FromBoxes({4}, {{0, {{0, 0}, {1}}}}),
                "expected 1 dimensions");
  ExpectRefused(Layout::FromBoxes({4}, {{0, {{0}, {}}}}),
                "expected 1 dimensions");
  ExpectRefused(Layout::FromBoxes({4}, {{-2, {{0}, {1}}}}), "holder");
  ExpectRefused(Layout::FromBoxes({4}, {{3, {{0}, {2}}}, {3, {{1}, {4}}}}),
                "boxes of tensor [4]: [0:2] and [1:4] of holder 3 overlap");
  ExpectRefused(Layout::FromBoxes({4}, {{3, {{0}, {2}}}, {3, {{0}, {2}}}}),
                "overlap");
  ExpectRefused(
      Layout::FromBoxes({4}, {{kAnyHolder, {{0}, {2}}}, {3, {{0}, {2}}}}),
      "kAnyHolder");
  ExpectRefused(
      Layout::FromBoxes({4}, {{kAnyHolder, {{0}, {2}}}, {3, {{1}, {3}}}}),
      "kAnyHolder");
  ExpectRefused(Layout::FromBoxes({-4}, {}), "extents");
}

}  // namespace
}  // namespace dsd
