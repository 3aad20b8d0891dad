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

TEST(ValueTextTest, ComplexNumbersAsPythons) {
  EXPECT_EQ(ComplexText({1, 2}), "(1+2j)");
  EXPECT_EQ(ComplexText({0, 2.5}), "2.5j");
  EXPECT_EQ(ComplexText({-0.0, -1}), "(-0-1j)");
  EXPECT_EQ(ComplexText({1e16, 1e-8}), "(1e+16+1e-08j)");
  EXPECT_EQ(ComplexText({0, -0.0}), "-0j");
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(ComplexText({nan, -inf}), "(nan-infj)");
}

TEST(ValueTextTest, WideIntsInDecimal) {
  const auto text = [](std::string bytes) {
    return WideIntText(WideInt{std::move(bytes)});
  };
  EXPECT_EQ(text(std::string(8, '\xff') + std::string(1, '\0')),
            "18446744073709551615");
  EXPECT_EQ(text(std::string(8, '\0') + "\xff"), "-18446744073709551616");
  EXPECT_EQ(text(std::string(12, '\0') + "\x10"),
            "1267650600228229401496703205376");  // 1 << 100
  EXPECT_EQ(text("\1" + std::string(11, '\0') + "\xf0"),
            "-1267650600228229401496703205375");
  // As they never come, but no error.
  EXPECT_EQ(text(""), "0");
  EXPECT_EQ(text(std::string(9, '\0')), "0");
  EXPECT_EQ(text("\xff"), "-1");
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
  dict.Set("sets", Object(Object::List{
                       Object(Object::Set{{Object(1), Object("a")}}),
                       Object(Object::Set{}),
                       Object(Object::Set{{Object(Complex(0, 1))}, true}),
                       Object(Object::Set{{}, true})}));
  dict.Set("keys",
           Object(Object::Map{{Object(Object::Tuple{{Object(1)}}), Object()},
                              {Object("a"), Object(Object::List{Object(2)})}}));
  EXPECT_EQ(ValueText(Object(dict)),
            "{'lr': 0.1, 'betas': (0.9, 0.999), 'one': (1,), 'names': ['a', "
            "None], 5: True, 'raw': <3 bytes>, 'other': <numpy.dtype>, "
            "'sets': [{1, 'a'}, set(), frozenset({1j}), frozenset()], "
            "'keys': {(1,): 'a', None: [2]}}");
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
