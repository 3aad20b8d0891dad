// SPDX-License-Identifier: Apache-2.0
//
// PyTorch's test_nested_dict.py and test_traverse.py, by the names of its
// tests.

#include "dsd/core/value/tree.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "dsd/core/value/flatten.h"
#include "dsd/core/value/value.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::ElementsAre;

struct FakeTensor {
  int id = 0;
  friend bool operator==(FakeTensor a, FakeTensor b) { return a.id == b.id; }
};
using Tree = BasicValue<FakeTensor>;

Tree Dict(std::vector<std::pair<PathSegment, Tree>> entries) {
  Tree::Dict dict;
  for (auto& [key, value] : entries) dict.Set(key, std::move(value));
  return Tree(std::move(dict));
}
Tree List(std::vector<Tree> items) { return Tree(std::move(items)); }

const Tree kTensor(FakeTensor{1});

std::vector<Path> LeafPaths(const Tree& tree) {
  std::vector<Path> paths;
  VisitLeaves<FakeTensor>(
      tree, [&](const Path& path, const Tree&) { paths.push_back(path); });
  return paths;
}

TEST(TestFlattening, test_flattening_round_trip) {
  const Tree tree =
      Dict({{"key0", Tree(1)},
            {"key1", List({Tree(1), Tree(2)})},
            {"key2", Dict({{"1", Tree(2)}, {"2", Tree(3)}})},
            {"key3", kTensor},
            {"key4", List({List({kTensor, Tree("x")}),
                           List({Tree(1), Tree(2), Tree(3)}),
                           Dict({{"key6", List({Tree(44)})}})})}});
  Tree rebuilt;
  std::vector<std::string> keys;
  VisitLeaves<FakeTensor>(tree, [&](const Path& path, const Tree& value) {
    keys.push_back(JoinPath(path));
    EXPECT_EQ(SetAtPath(rebuilt, path, value), absl::OkStatus());
  });
  EXPECT_TRUE(rebuilt == tree);
  EXPECT_THAT(
      keys, ElementsAre("key0", "key1", "key2.1", "key2.2", "key3", "key4.0.0",
                        "key4.0.1", "key4.1", "key4.2.key6"));
  const auto exact = UnflattenTree(FlattenTree(tree));
  ASSERT_TRUE(exact.ok()) << exact.status();
  EXPECT_TRUE(*exact == tree);
}

TEST(TestFlattening, test_mapping) {
  const Tree tree = Dict(
      {{"k0", List({Tree(1)})},
       {"k2", List({kTensor, Tree(99), List({Dict({{"k3", kTensor}})})})},
       {"k3", List({Tree("x"), Tree(99), List({Dict({{"k3", Tree("y")}})})})}});
  EXPECT_THAT(
      LeafPaths(tree),
      ElementsAre(Path{"k0"}, Path{"k2", int64_t{0}}, Path{"k2", int64_t{1}},
                  Path{"k2", int64_t{2}, int64_t{0}, "k3"},
                  Path{"k3", int64_t{0}}, Path{"k3", int64_t{1}},
                  Path{"k3", int64_t{2}, int64_t{0}, "k3"}));
}

TEST(TestTraverse, test_traverse_shallow) {
  const Tree tree =
      Dict({{"key0", Tree(1)},
            {"key1", List({Tree(1), Tree(2)})},
            {"key2", Dict({{int64_t{1}, Tree(2)}, {int64_t{2}, Tree(1)}})},
            {"key3", kTensor}});
  EXPECT_THAT(LeafPaths(tree),
              ElementsAre(Path{"key0"}, Path{"key1"}, Path{"key2", "1"},
                          Path{"key2", "2"}, Path{"key3"}));
}

TEST(TestTraverse, test_traverse_nested_list) {
  const Tree tree = Dict(
      {{"key1",
        List({kTensor, List({Tree(33), kTensor, List({Tree(44), Tree(55)})}),
              List({Tree(66), Tree(77)})})}});
  EXPECT_THAT(LeafPaths(tree), ElementsAre(Path{"key1", int64_t{0}},
                                           Path{"key1", int64_t{1}, int64_t{0}},
                                           Path{"key1", int64_t{1}, int64_t{1}},
                                           Path{"key1", int64_t{1}, int64_t{2}},
                                           Path{"key1", int64_t{2}}));
}

TEST(TestTraverse, test_traverse_nested_dict) {
  const Tree tree =
      Dict({{"key0", Dict({{"key1", Tree(99)}, {"key2", kTensor}})}});
  EXPECT_THAT(LeafPaths(tree),
              ElementsAre(Path{"key0", "key1"}, Path{"key0", "key2"}));
}

TEST(TestTraverse, test_traverse_doesnt_ignore_intermediate_collections) {
  const Tree tree =
      Dict({{"key0", List({Dict({{"key1", Dict({{"key2", kTensor}})}})})}});
  EXPECT_THAT(LeafPaths(tree),
              ElementsAre(Path{"key0", int64_t{0}, "key1", "key2"}));
}

// Dicts here always have an order.
TEST(TestTraverse, test_traverse_with_ordered_dict) {
  const Tree tree = Dict({{"key1", List({Tree(99), kTensor})}});
  EXPECT_THAT(LeafPaths(tree),
              ElementsAre(Path{"key1", int64_t{0}}, Path{"key1", int64_t{1}}));
}

TEST(TestTraverse, test_set_element) {
  Tree root = Tree(Tree::Dict());
  ASSERT_EQ(SetAtPath(root, {"k"}, Tree(10)), absl::OkStatus());
  EXPECT_TRUE(*FindAtPath(root, {"k"}) == Tree(10));
  ASSERT_EQ(SetAtPath(root, {"k1", int64_t{2}}, Tree(1)), absl::OkStatus());
  EXPECT_TRUE(*FindAtPath(root, {"k1"}) == List({Tree(), Tree(), Tree(1)}));
  ASSERT_EQ(SetAtPath(root, {"k1", int64_t{1}}, Tree(99)), absl::OkStatus());
  EXPECT_TRUE(*FindAtPath(root, {"k1"}) == List({Tree(), Tree(99), Tree(1)}));
  ASSERT_EQ(SetAtPath(root, {"k2", int64_t{0}, int64_t{0}, "k3"}, Tree(99)),
            absl::OkStatus());
  EXPECT_TRUE(*FindAtPath(root, {"k2"}) ==
              List({List({Dict({{"k3", Tree(99)}})})}));
}

TEST(TestTraverse, test_get_element) {
  const Tree tree =
      Dict({{"a", List({Tree(0), Tree(1)})}, {"b", Dict({{"c", kTensor}})}});
  EXPECT_TRUE(*FindAtPath(tree, {"a"}) == List({Tree(0), Tree(1)}));
  EXPECT_TRUE(*FindAtPath(tree, {"a", int64_t{1}}) == Tree(1));
  EXPECT_TRUE(*FindAtPath(tree, {"b", "c"}) == kTensor);
  EXPECT_EQ(FindAtPath(tree, {"c"}), nullptr);
  EXPECT_EQ(FindAtPath(tree, {"a", int64_t{33}}), nullptr);
  EXPECT_EQ(FindAtPath(tree, {"a", int64_t{2}}), nullptr);  // one past the end
  EXPECT_EQ(FindAtPath(tree, {"a", "x"}), nullptr);
}

}  // namespace
}  // namespace dsd
