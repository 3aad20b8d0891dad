// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/value/tree.h"

#include <cstdint>
#include <iostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/value/value.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct FakeTensor {
  int id = 0;
  friend bool operator==(FakeTensor a, FakeTensor b) { return a.id == b.id; }
};
using Tree = BasicValue<FakeTensor>;
using Leaf = TreeLeaf<FakeTensor>;

Tree RandomTree(std::mt19937& random, int depth) {
  const auto upto = [&](int n) { return static_cast<int>(random() % n); };
  switch (upto(depth > 0 ? 8 : 5)) {
    case 0:
      return Tree();
    case 1:
      return Tree(upto(10));
    case 2:
      return Tree(absl::StrCat("text ", upto(10)));
    case 3:
      return Tree(FakeTensor{upto(10)});
    case 4:
      return Tree(upto(10) / 4.0);
    case 5: {
      Tree::List list;
      for (int i = upto(4); i > 0; --i)
        list.push_back(RandomTree(random, depth - 1));
      return Tree(std::move(list));
    }
    case 6: {
      Tree::Tuple tuple;
      for (int i = upto(4); i > 0; --i) {
        tuple.items.push_back(RandomTree(random, depth - 1));
      }
      return Tree(std::move(tuple));
    }
    default: {
      Tree::Dict dict;
      for (int i = upto(4); i > 0; --i) {
        // "1" and 1 are different keys.
        const int key = upto(5);
        dict.Set(upto(2) == 0 ? PathSegment(absl::StrCat(key))
                              : PathSegment(int64_t{key}),
                 RandomTree(random, depth - 1));
      }
      return Tree(std::move(dict));
    }
  }
}

TEST(TreeTest, UnflattenIsTheInverseOfFlatten) {
  std::mt19937 random(7);
  for (int i = 0; i < 2000; ++i) {
    const Tree tree = RandomTree(random, 4);
    const auto rebuilt = UnflattenTree(FlattenTree(tree));
    ASSERT_TRUE(rebuilt.ok()) << rebuilt.status();
    ASSERT_TRUE(*rebuilt == tree) << "tree " << i;
  }
}

TEST(TreeTest, LeavesInOrderWithTypedSteps) {
  Tree::Dict inner;
  inner.Set(PathSegment(int64_t{3}), Tree(FakeTensor{1}));
  inner.Set("3", Tree(Tree::List{}));
  Tree::Dict dict;
  dict.Set("a", Tree(std::move(inner)));
  dict.Set("t", Tree(Tree::Tuple{{Tree(1), Tree(Tree::List{Tree(2)})}}));
  std::vector<std::string> texts;
  std::vector<TreePath> paths;
  VisitTree<FakeTensor>(Tree(std::move(dict)),
                        [&](const TreePath& path, const Tree&) {
                          texts.push_back(TreePathText(path));
                          paths.push_back(path);
                        });
  EXPECT_THAT(texts, ElementsAre("a.3", "a.3", "t.0", "t.1.0"));
  EXPECT_EQ(paths[0], (TreePath{"a", int64_t{3}}));
  EXPECT_EQ(paths[1], (TreePath{"a", "3"}));
  EXPECT_EQ(paths[3], (TreePath{"t", TupleIndex{1}, ListIndex{0}}));
}

TEST(TreeTest, LeavesCanBeChangedInPlace) {
  Tree tree(Tree::List{Tree(1), Tree(Tree::Tuple{{Tree(2)}})});
  VisitTree<FakeTensor>(tree, [](const TreePath&, Tree& value) {
    value = Tree(*value.get_if<int64_t>() + 10);
  });
  EXPECT_TRUE(tree ==
              Tree(Tree::List{Tree(11), Tree(Tree::Tuple{{Tree(12)}})}));
}

TEST(TreeTest, RefusesLeavesThatDoNotFitTogether) {
  const auto error = [](std::vector<Leaf> leaves) {
    const auto result = UnflattenTree(std::move(leaves));
    EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(result.status().message());
  };
  EXPECT_THAT(error({{{"a"}, Tree(1)}, {{"a", "b"}, Tree(2)}}),
              HasSubstr("\"a.b\": there is a value above it"));
  EXPECT_THAT(error({{{"a"}, Tree()}, {{"a", "b"}, Tree(2)}}),
              HasSubstr("\"a.b\": there is a value above it"));
  EXPECT_THAT(error({{{"a", "b"}, Tree(2)}, {{"a"}, Tree(1)}}),
              HasSubstr("\"a\": it is there already"));
  EXPECT_THAT(error({{{"a", "b"}, Tree(2)}, {{"a", ListIndex{0}}, Tree(1)}}),
              HasSubstr("expected a list"));
  EXPECT_THAT(error({{{ListIndex{1}}, Tree(1)}}),
              HasSubstr("expected item 0 next"));
  EXPECT_THAT(error({{{ListIndex{-1}}, Tree(1)}}),
              HasSubstr("expected item 0"));
  EXPECT_THAT(error({{{}, Tree(1)}, {{}, Tree(1)}}), HasSubstr("already"));
}

TEST(TreeTest, FindAtPath) {
  Tree::Dict dict;
  dict.Set("l", Tree(Tree::List{Tree(1), Tree(Tree::Tuple{{Tree(2)}})}));
  dict.Set(PathSegment(int64_t{7}), Tree("seven"));
  const Tree tree(std::move(dict));
  const auto find = [&](Path path) { return FindAtPath(tree, path); };
  EXPECT_EQ(find({}), &tree);
  ASSERT_NE(find({"l", int64_t{1}, int64_t{0}}), nullptr);
  EXPECT_TRUE(*find({"l", int64_t{1}, int64_t{0}}) == Tree(2));
  EXPECT_TRUE(*find({int64_t{7}}) == Tree("seven"));
  // The last one is one past the end.
  for (const Path& path :
       {Path{"x"}, Path{"7"}, Path{"l", "0"}, Path{"l", int64_t{-1}},
        Path{"l", int64_t{0}, "x"}, Path{"l", int64_t{2}}}) {
    EXPECT_EQ(find(path), nullptr);
  }
}

}  // namespace
}  // namespace dsd
