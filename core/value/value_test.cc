// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/value/value.h"

#include <string>
#include <vector>

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
  EXPECT_EQ(Object(Opaque{"m.C"}).kind_name(), "m.C");
  EXPECT_EQ(Object(NoTensor()).kind_name(), "tensor");
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
