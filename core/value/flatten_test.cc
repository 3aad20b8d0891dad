// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/value/flatten.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "dsd/core/value/value.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

struct FakeTensor {
  int id = 0;
  friend bool operator==(FakeTensor a, FakeTensor b) { return a.id == b.id; }
};
using Tree = BasicValue<FakeTensor>;

PathSegment Key(const char* text) { return std::string(text); }

Tree Dict(std::vector<std::pair<PathSegment, Tree>> entries) {
  Tree::Dict dict;
  for (auto& [key, value] : entries) dict.Set(key, std::move(value));
  return Tree(std::move(dict));
}

std::vector<std::string> Keys(const Tree& tree) {
  std::vector<std::string> keys;
  VisitLeaves<FakeTensor>(tree, [&](const Path& path, const Tree&) {
    keys.push_back(JoinPath(path));
  });
  return keys;
}

const Tree kTensor(FakeTensor{1});

// {"a": {"b": T, "c": [1, 2]}, "l": [T, {"x": 3}], "t": (T, T), "e": {}, 5: 1}
Tree Example() {
  return Dict(
      {{Key("a"), Dict({{Key("b"), kTensor},
                        {Key("c"), Tree(Tree::List{Tree(1), Tree(2)})}})},
       {Key("l"), Tree(Tree::List{kTensor, Dict({{Key("x"), Tree(3)}})})},
       {Key("t"), Tree(Tree::Tuple{{kTensor, kTensor}})},
       {Key("e"), Tree(Tree::Dict())},
       {PathSegment(int64_t{5}), Tree(1)}});
}

TEST(FlattenTest, PythonsGrammar) {
  EXPECT_THAT(Keys(Example()),
              ElementsAre("a.b", "a.c", "l.0", "l.1.x", "t", "5"));
}

TEST(FlattenTest, ListsAreDescendedIfSomethingIsInThem) {
  const auto in = [](Tree value) { return Keys(Dict({{Key("k"), value}})); };
  EXPECT_THAT(in(Tree(Tree::List{})), ElementsAre("k"));
  EXPECT_THAT(in(Tree(Tree::List{Tree(1), Tree("x")})), ElementsAre("k"));
  EXPECT_THAT(in(Tree(Tree::List{Tree(1), kTensor})),
              ElementsAre("k.0", "k.1"));
  // A dict counts even without entries, and then leaves no key.
  EXPECT_THAT(in(Tree(Tree::List{Tree(1), Tree(Tree::Dict())})),
              ElementsAre("k.0"));
  EXPECT_THAT(in(Tree(Tree::List{Tree(Tree::List{kTensor}), Tree(2)})),
              ElementsAre("k.0.0", "k.1"));
  EXPECT_THAT(in(Tree(Tree::List{Tree(Tree::Tuple{{kTensor}})})),
              ElementsAre("k"));
  EXPECT_THAT(Keys(Tree(Tree::Dict())), IsEmpty());
}

TEST(FlattenTest, LeavesCanBeChangedInPlace) {
  Tree tree = Example();
  VisitLeaves<FakeTensor>(tree, [](const Path& path, Tree& value) {
    if (JoinPath(path) == "l.1.x") value = Tree("changed");
  });
  const Tree* list = tree.get_if<Tree::Dict>()->Find("l");
  const Tree& inner = (*list->get_if<Tree::List>())[1];
  EXPECT_TRUE(*inner.get_if<Tree::Dict>()->Find("x") == Tree("changed"));
}

TEST(FlattenTest, UnflattensWhatItFlattened) {
  Tree rebuilt;
  VisitLeaves<FakeTensor>(Example(), [&](const Path& path, const Tree& value) {
    EXPECT_TRUE(SetAtPath(rebuilt, path, value).ok());
  });
  // What Python loses too: empty dicts, and that a key was a number.
  Tree expected = Example();
  expected.get_if<Tree::Dict>()->Erase(Key("e"));
  expected.get_if<Tree::Dict>()->Erase(PathSegment(int64_t{5}));
  expected.get_if<Tree::Dict>()->Set(Key("5"), Tree(1));
  EXPECT_TRUE(rebuilt == expected);
}

TEST(FlattenTest, WhatKeysDoNotSay) {
  const auto texts = [](const std::vector<Path>& paths) {
    std::vector<std::string> out;
    for (const Path& path : paths) out.push_back(JoinPath(path));
    return out;
  };
  Nesting nesting = NestingOf(Example());
  EXPECT_THAT(texts(nesting.number_keyed), ElementsAre(""));
  EXPECT_THAT(texts(nesting.empty), ElementsAre("e"));
  EXPECT_THAT(nesting.tuples, IsEmpty());

  const PathSegment number(int64_t{-7});
  nesting = NestingOf(Dict(
      {{Key("a"), Dict({{number, Dict({{number, kTensor}})}})},
       {Key("b"), Dict({{number, Tree(1)}, {Key("3"), Tree(1)}})},
       {Key("c"), Dict({{number, Tree(1)}, {Key("03"), Tree(1)}})},
       {Key("l"), Tree(Tree::List{Dict({{number, Tree(Tree::Dict())}})})}}));
  EXPECT_THAT(texts(nesting.number_keyed),
              ElementsAre("a", "a.-7", "c", "l.0"));
  EXPECT_THAT(texts(nesting.empty), ElementsAre("l.0.-7"));
  EXPECT_THAT(NestingOf(Tree(Tree::Dict())).empty, IsEmpty());
}

TEST(FlattenTest, NestingIsRestored) {
  const PathSegment number(int64_t{-7});
  const Tree tree =
      Dict({{Key("a"), Dict({{number, Dict({{number, kTensor}})}})},
            {Key("c"), Dict({{number, Tree(1)}, {Key("03"), Tree(1)}})},
            {Key("e"), Tree(Tree::Dict())},
            {Key("l"),
             Tree(Tree::List{Dict({{number, Tree(Tree::Dict())}}), kTensor})}});
  Nesting nesting = NestingOf(tree);
  // Not there, or of another kind.
  nesting.number_keyed.push_back({Key("x")});
  nesting.number_keyed.push_back({Key("a"), Key("x"), Key("y")});
  nesting.empty.push_back({Key("a")});
  nesting.empty.push_back({Key("c"), Key("03"), Key("z")});
  nesting.tuples.push_back({Key("c"), Key("03")});
  Tree rebuilt{Tree::Dict()};
  VisitLeaves<FakeTensor>(tree, [&](const Path& path, const Tree& value) {
    EXPECT_TRUE(SetAtPath(rebuilt, path, value).ok());
  });
  RestoreNesting(nesting, rebuilt);
  EXPECT_TRUE(*rebuilt.get_if<Tree::Dict>()->Find("a") ==
              *tree.get_if<Tree::Dict>()->Find("a"));
  for (const char* key : {"a", "c", "e", "l"}) {
    EXPECT_TRUE(*rebuilt.get_if<Tree::Dict>()->Find(key) ==
                *tree.get_if<Tree::Dict>()->Find(key))
        << key;
  }

  nesting = Nesting();
  nesting.tuples = {{Key("l")}};
  RestoreNesting(nesting, rebuilt);
  EXPECT_TRUE(rebuilt.get_if<Tree::Dict>()->Find("l")->is<Tree::Tuple>());
}

TEST(FlattenTest, ListsArePadded) {
  Tree root;
  ASSERT_TRUE(SetAtPath(root, {Key("l"), int64_t{2}}, Tree("x")).ok());
  EXPECT_TRUE(*root.get_if<Tree::Dict>()->Find("l") ==
              Tree(Tree::List{Tree(), Tree(), Tree("x")}));
}

TEST(FlattenTest, RefusesPathsThatDoNotFit) {
  Tree root = Dict({{Key("a"), Tree(1)}, {Key("l"), Tree(Tree::List{})}});
  const auto code = [&](Path path, int64_t max_index = 1000) {
    return SetAtPath(root, path, Tree(2), max_index).code();
  };
  EXPECT_EQ(code({Key("a"), Key("b")}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({Key("a"), int64_t{0}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({Key("l"), Key("b")}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({Key("l"), int64_t{-1}}), absl::StatusCode::kInvalidArgument);
  // An index is no reason to allocate what it says.
  EXPECT_EQ(code({Key("l"), int64_t{1} << 60}),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace dsd
