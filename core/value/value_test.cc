// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/value/value.h"

#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

PathSegment Key(const char* text) { return std::string(text); }

TEST(DictTest, KeepsOrderAndFindsByTextAndNumber) {
  Object::Dict dict;
  dict.Set(Key("b"), Object(1));
  dict.Set(Key("a"), Object(2));
  dict.Set(PathSegment(int64_t{7}), Object(3));
  ASSERT_EQ(dict.size(), 3u);
  EXPECT_EQ(dict.key_text(0), "b");
  EXPECT_EQ(dict.key_text(1), "a");
  EXPECT_EQ(dict.key_text(2), "7");
  EXPECT_TRUE(*dict.Find("a") == Object(2));
  EXPECT_TRUE(*dict.Find(PathSegment(int64_t{7})) == Object(3));
  // The text "7" is another key than the number.
  EXPECT_EQ(dict.Find("7"), nullptr);
  EXPECT_FALSE(dict.contains("c"));

  // A key that is there keeps its place.
  dict.Set(Key("b"), Object("new"));
  EXPECT_EQ(dict.size(), 3u);
  EXPECT_TRUE(dict.value(0) == Object("new"));
}

TEST(DictTest, EraseKeepsTheOthersFindable) {
  Object::Dict dict;
  for (const char* key : {"a", "b", "c", "d"}) dict.Set(Key(key), Object(key));
  EXPECT_TRUE(dict.Erase(Key("b")));
  EXPECT_FALSE(dict.Erase(Key("b")));
  ASSERT_EQ(dict.size(), 3u);
  for (const char* key : {"a", "c", "d"}) {
    ASSERT_NE(dict.Find(key), nullptr) << key;
    EXPECT_TRUE(*dict.Find(key) == Object(key));
  }
  EXPECT_EQ(dict.key_text(1), "c");
}

TEST(DictTest, ManyKeysWithAnIndex) {
  Object::Dict dict;
  dict.Reserve(1000);
  for (int i = 0; i < 500; ++i) {
    dict.Append(absl::StrCat("key.", i), Object(i));
    dict.Append(int64_t{i}, Object(-i));
  }
  const Object::Dict& read = dict;
  for (int i = 0; i < 500; ++i) {
    EXPECT_TRUE(*read.Find(absl::StrCat("key.", i)) == Object(i));
    EXPECT_TRUE(*read.Find(PathSegment(int64_t{i})) == Object(-i));
    EXPECT_FALSE(read.contains(absl::StrCat(i)));
  }
  // The index follows changes.
  dict.Set("more", Object("x"));
  EXPECT_TRUE(*dict.Find("more") == Object("x"));
  EXPECT_TRUE(dict.Erase(PathSegment(int64_t{0})));
  EXPECT_FALSE(dict.Erase(PathSegment(int64_t{0})));
  EXPECT_EQ(dict.size(), 1000u);
  for (int i = 1; i < 500; ++i) {
    EXPECT_TRUE(*dict.Find(PathSegment(int64_t{i})) == Object(-i));
  }
  EXPECT_TRUE(*dict.Find("key.499") == Object(499));
  EXPECT_TRUE(*dict.Find("more") == Object("x"));
}

TEST(DictTest, FindsNearWhereItFoundBefore) {
  for (const int size : {0, 3, 8, 9, 200}) {
    Object::Dict dict;
    for (int i = 0; i < size; ++i) {
      dict.Append(absl::StrCat("key.", i), Object(i));
      dict.Append(int64_t{i}, Object(-i));
    }
    const Object::Dict& read = dict;
    size_t position = 0;
    for (int i = 0; i < size; ++i) {
      EXPECT_EQ(read.FindNear("absent", &position), nullptr);
      const Object* const found =
          read.FindNear(absl::StrCat("key.", i), &position);
      ASSERT_NE(found, nullptr) << i;
      EXPECT_TRUE(*found == Object(i));
      EXPECT_EQ(position, 2u * i + 1);
    }
    // In any order, and from behind the end.
    for (int i = size - 1; i >= 0; i -= 2) {
      EXPECT_TRUE(*read.FindNear(absl::StrCat("key.", i), &position) ==
                  Object(i));
    }
    EXPECT_EQ(read.FindNear("1", &position), nullptr) << "a text, no number";
  }
}

Object::Dict Nested() {
  Object::Dict inner;
  inner.Set("x", Object(1));
  Object::Dict outer;
  outer.Set("inner", Object(inner));
  outer.Set("list", Object(Object::List{Object(inner)}));
  return outer;
}

// Python's copy.deepcopy: what one of them does is not seen in the other.
TEST(DictTest, CopiesAreIndependent) {
  for (const bool share : {false, true}) {
    Object::Dict a = Nested();
    if (share) a.Share();
    Object::Dict b = a;
    const Object::Dict c = b;
    EXPECT_EQ(a.IsSharedWith(b), share);
    EXPECT_EQ(b.IsSharedWith(c), share);
    b.Find("inner")->get_if<Object::Dict>()->Set("x", Object(2));
    b.Set("new", Object(3));
    EXPECT_TRUE(b.Erase(std::string("list")));
    EXPECT_TRUE(a == Nested());
    EXPECT_TRUE(c == Nested());
    // References taken from what is one's own stay one's own.
    Object& own = b.Set("own", Object(4));
    const Object::Dict d = b;
    own = Object(5);
    EXPECT_TRUE(*d.Find("own") == Object(4));
    EXPECT_TRUE(*b.Find("own") == Object(5));
  }
}

TEST(DictTest, SharedPartsStaySharedAndOutliveTheWhole) {
  Object::Dict kept;
  {
    Object::Dict a = Nested();
    a.Share();
    Object::Dict b = a;
    b.Set("new", Object(3));
    EXPECT_TRUE(a.Find("inner")->is<Object::Dict>());
    const Object::Dict& read_a = a;
    const Object::Dict& read_b = b;
    EXPECT_TRUE(read_a.Find("inner")->get_if<Object::Dict>()->IsSharedWith(
        *read_b.Find("inner")->get_if<Object::Dict>()));
    kept = *read_b.Find("inner")->get_if<Object::Dict>();
  }
  EXPECT_TRUE(*kept.Find("x") == Object(1));
  // The last owner changes it in place.
  const Object* const before = static_cast<const Object::Dict&>(kept).Find("x");
  kept.Set("x", Object(9));
  EXPECT_EQ(static_cast<const Object::Dict&>(kept).Find("x"), before);
}

TEST(DictTest, MovesAndAssignments) {
  Object::Dict a = Nested();
  Object::Dict& alias = a;
  a = alias;
  EXPECT_TRUE(a == Nested());
  a = std::move(*a.Find("inner")->get_if<Object::Dict>());
  ASSERT_EQ(a.size(), 1u);
  EXPECT_TRUE(*a.Find("x") == Object(1));
  Object::Dict b = std::move(a);
  EXPECT_TRUE(a.empty());  // NOLINT: a moved-from dict is empty
  EXPECT_EQ(a.Find("x"), nullptr);
  a.Set("y", Object(2));
  EXPECT_EQ(a.size(), 1u);
  EXPECT_EQ(b.size(), 1u);
  EXPECT_TRUE(Object::Dict() == Object::Dict());
}

// Reading one dict from several threads needs no lock, copying it neither.
TEST(DictTest, SharedDictsOnSeveralThreads) {
  Object::Dict shared;
  for (int i = 0; i < 100; ++i) shared.Set(absl::StrCat(i), Object(i));
  shared.Share();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([copy = shared, t]() mutable {
      for (int i = 0; i < 100; ++i) {
        const Object::Dict& read = copy;
        EXPECT_TRUE(*read.Find(absl::StrCat(i)) == Object(i));
      }
      copy.Set("0", Object(t));
      EXPECT_TRUE(*copy.Find("0") == Object(t));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(*shared.Find("0") == Object(0));
}

TEST(ValueTest, KindsAreToldApart) {
  EXPECT_EQ(Object().kind_name(), "None");
  EXPECT_EQ(Object(true).kind_name(), "bool");
  EXPECT_EQ(Object(1).kind_name(), "int");
  EXPECT_EQ(Object(1.0).kind_name(), "float");
  EXPECT_EQ(Object("x").kind_name(), "str");
  EXPECT_EQ(Object(Bytes{"x"}).kind_name(), "bytes");
  EXPECT_EQ(Object(Object::List{}).kind_name(), "list");
  EXPECT_EQ(Object(Object::Tuple{}).kind_name(), "tuple");
  EXPECT_EQ(Object(Object::Dict{}).kind_name(), "dict");
  EXPECT_EQ(Object(Complex(1, 2)).kind_name(), "complex");
  EXPECT_EQ(Object(WideInt{std::string(9, '\1')}).kind_name(), "int");
  EXPECT_EQ(Object(Object::Set{}).kind_name(), "set");
  EXPECT_EQ(Object(Object::Set{{}, true}).kind_name(), "frozenset");
  EXPECT_EQ(Object(Object::Map{}).kind_name(), "dict");
  EXPECT_EQ(Object(Opaque{"m.C"}).kind_name(), "m.C");
  EXPECT_EQ(Object(HostTensor()).kind_name(), "tensor");
  EXPECT_TRUE(Object(Object::Tuple{}).is_container());
  EXPECT_FALSE(Object("x").is_container());
}

TEST(ValueTest, EqualityIsByKindAndContent) {
  EXPECT_TRUE(Object(1) == Object(int64_t{1}));
  EXPECT_TRUE(Object(1) != Object(1.0));
  EXPECT_TRUE(Object(1) != Object(true));
  EXPECT_TRUE(Object("x") != Object(Bytes{"x"}));
  const Object::List items = {Object(1), Object("two")};
  EXPECT_TRUE(Object(items) == Object(items));
  EXPECT_TRUE(Object(items) != Object(Object::Tuple{items}));
  EXPECT_TRUE(Object(Object::Set{items}) == Object(Object::Set{items}));
  EXPECT_TRUE(Object(Object::Set{items}) != Object(Object::Set{items, true}));
  EXPECT_TRUE(Object(Object::Map{items, items}) ==
              Object(Object::Map{items, items}));
  EXPECT_TRUE(Object(Object::Map{items, items}) !=
              Object(Object::Map{items, {Object(1), Object(2)}}));
  EXPECT_TRUE(Object(Complex(1, 0)) != Object(1.0));
  // As Python's, but for the order, which matters here.
  Object::Dict ab, ba;
  ab.Set(Key("a"), Object(1));
  ab.Set(Key("b"), Object(2));
  ba.Set(Key("b"), Object(2));
  ba.Set(Key("a"), Object(1));
  EXPECT_TRUE(Object(ab) == Object(ab));
  EXPECT_TRUE(Object(ab) != Object(ba));
}

}  // namespace
}  // namespace dsd
