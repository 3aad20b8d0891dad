// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/value/value_text.h"

#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "dsd/core/value/value.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

// The right sides are what Python 3.11 prints.
TEST(ValueTextTest, FloatsAsPythons) {
  EXPECT_EQ(FloatText(0.1), "0.1");
  EXPECT_EQ(FloatText(3), "3.0");
  EXPECT_EQ(FloatText(-0.0), "-0.0");
  EXPECT_EQ(FloatText(1e-8), "1e-08");
  EXPECT_EQ(FloatText(0.0001), "0.0001");
  EXPECT_EQ(FloatText(0.00001), "1e-05");
  EXPECT_EQ(FloatText(100000), "100000.0");
  EXPECT_EQ(FloatText(1e15), "1000000000000000.0");
  EXPECT_EQ(FloatText(1e16), "1e+16");
  EXPECT_EQ(FloatText(1.5e300), "1.5e+300");
  EXPECT_EQ(FloatText(5e-324), "5e-324");
  EXPECT_EQ(FloatText(0.30000000000000004), "0.30000000000000004");
  EXPECT_EQ(FloatText(std::numeric_limits<double>::quiet_NaN()), "nan");
  EXPECT_EQ(FloatText(-std::numeric_limits<double>::infinity()), "-inf");
}

TEST(ValueTextTest, ContainersAsPythons) {
  Object::Dict dict;
  dict.Set("lr", Object(0.1));
  dict.Set("betas", Object(Object::Tuple{{Object(0.9), Object(0.999)}}));
  dict.Set("one", Object(Object::Tuple{{Object(1)}}));
  dict.Set("names", Object(Object::List{Object("a"), Object(None())}));
  dict.Set(PathSegment(int64_t{5}), Object(true));
  dict.Set("raw", Object(Bytes{"abc"}));
  dict.Set("other", Object(Opaque{"numpy.dtype"}));
  EXPECT_EQ(ValueText(Object(dict)),
            "{'lr': 0.1, 'betas': (0.9, 0.999), 'one': (1,), 'names': ['a', "
            "None], 5: True, 'raw': <3 bytes>, 'other': <numpy.dtype>}");
}

TEST(ValueTextTest, TensorsAreWrittenByTheCaller) {
  using Tree = BasicValue<int*>;
  int tensor = 3;
  EXPECT_EQ(
      ValueText<int*>(Tree(Tree::List{Tree(&tensor), Tree(1)}),
                      [](int* const& t) { return absl::StrCat("<", *t, ">"); }),
      "[<3>, 1]");
}

TEST(ValueTextTest, IsCutAtACharacter) {
  ValueTextOptions options;
  options.max_size = 6;
  EXPECT_EQ(ValueText(Object("abcdefghij"), options), "'abcde...");
  // Four bytes of quote and letters, then a letter of two bytes.
  EXPECT_EQ(ValueText(Object("abcd\xC3\xA9"
                             "f"),
                      options),
            "'abcd...");
  Object::List many(100000, Object(7));
  EXPECT_EQ(ValueText(Object(std::move(many)), options), "[7, 7,...");
}

TEST(ValueTextTest, ControlCharactersAreEscaped) {
  EXPECT_EQ(ValueText(Object("a\x1b[2J\n")), "'a\\033[2J\\n'");
}

}  // namespace
}  // namespace dsd
