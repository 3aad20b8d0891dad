// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/frontends/checkpoint/dcp/pickle_reader.h"
#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"
#include "gtest/gtest.h"

namespace dsd::dcp {
namespace {

using Kind = PickleValue::Kind;
using namespace std::string_literals;  // NOLINT: texts with zero bytes

absl::StatusOr<Pickle> Parse(absl::string_view bytes,
                             PickleLimits limits = {}) {
  return Pickle::Parse(bytes, limits);
}

absl::StatusCode CodeOf(absl::string_view bytes, PickleLimits limits = {}) {
  return Parse(bytes, limits).status().code();
}

constexpr absl::StatusCode kDataLoss = absl::StatusCode::kDataLoss;
constexpr absl::StatusCode kTooBig = absl::StatusCode::kResourceExhausted;

TEST(PickleTest, IntegersAndFloatsOfEverySize) {
  std::vector<int64_t> numbers = {0, -1, std::numeric_limits<int64_t>::max(),
                                  std::numeric_limits<int64_t>::min()};
  for (int bit = 0; bit < 63; ++bit) {
    for (const int64_t near : {-1, 0, 1}) {
      numbers.push_back((int64_t{1} << bit) + near);
      numbers.push_back(-(int64_t{1} << bit) + near);
    }
  }
  for (const int protocol : {2, 4}) {
    for (const int64_t number : numbers) {
      std::string bytes;
      PickleWriter writer(protocol, &bytes);
      writer.Int(number);
      writer.Stop();
      const auto pickle = Parse(bytes);
      ASSERT_TRUE(pickle.ok()) << number << ": " << pickle.status();
      EXPECT_EQ(pickle->root().AsInt(), number);
    }
    for (const double number : {0.0, -1.5, 1e300, 0.9, HUGE_VAL}) {
      std::string bytes;
      PickleWriter writer(protocol, &bytes);
      writer.Float(number);
      writer.Stop();
      EXPECT_EQ(Parse(bytes)->root().AsFloat(), number);
    }
  }
  // As CPython writes them.
  EXPECT_EQ(Parse("\x80\x02\x8a\x05\x00\x00\x00\x80\x00."s)->root().AsInt(),
            int64_t{1} << 31);
  EXPECT_EQ(Parse("\x80\x02\x8a\x00."s)->root().AsInt(), 0);
  EXPECT_EQ(Parse("\x80\x02\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00."s)
                ->root()
                .kind(),
            Kind::kBigInt);
  EXPECT_EQ(CodeOf("\x80\x02\x8a\x0a"s + std::string(10, '\1') + "."),
            kDataLoss);
}

TEST(PickleTest, TheMemoSharesValues) {
  // [a, a] with a = [] memoized; protocol 2 and 4 forms.
  for (const std::string& bytes :
       {"\x80\x02](]q\x00h\x00"
        "e."s,
        "\x80\x04](]\x94h\x00"
        "e."s,
        "\x80\x02](]r\x00\x00\x00\x00j\x00\x00\x00\x00"
        "e."s}) {
    const auto pickle = Parse(bytes);
    ASSERT_TRUE(pickle.ok()) << pickle.status();
    std::vector<uint32_t> ids;
    pickle->root().ForEachItem([&](PickleValue item) {
      EXPECT_EQ(item.kind(), Kind::kList);
      ids.push_back(item.id());
      return true;
    });
    ASSERT_EQ(ids.size(), 2u);
    EXPECT_EQ(ids[0], ids[1]);
  }
}

TEST(PickleTest, ContainersGrowAndKeepTheirOrder) {
  std::string bytes;
  PickleWriter writer(4, &bytes);
  writer.EmptyDict();
  for (int batch = 0; batch < 3; ++batch) {
    writer.Mark();
    for (int i = 0; i < 1000; ++i) {
      writer.Text(absl::StrCat(batch, ".", i));
      writer.Int(i);
    }
    writer.SetItems();
  }
  writer.Stop();
  const auto pickle = Parse(bytes);
  ASSERT_TRUE(pickle.ok()) << pickle.status();
  EXPECT_EQ(pickle->root().size(), 3000u);
  EXPECT_EQ(pickle->root().Find("2.999")->AsInt(), 999);
  EXPECT_FALSE(pickle->root().Find("3.0").has_value());

  // Tuples of any length.
  for (const int count : {0, 1, 2, 3, 4, 64, 65, 5000}) {
    std::string tuple;
    PickleWriter out(2, &tuple);
    if (count > 3) out.Mark();
    for (int i = 0; i < count; ++i) out.Int(i);
    out.Tuple(count);
    out.Stop();
    const auto parsed = Parse(tuple);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(parsed->root().kind(), Kind::kTuple);
    const auto items = parsed->root().AsTuple(count);
    ASSERT_TRUE(items.has_value());
    for (int i = 0; i < count; ++i) EXPECT_EQ((*items)[i].AsInt(), i);
    if (count > 0) {
      EXPECT_FALSE(parsed->root().AsTuple(count - 1).has_value());
    }
  }
}

// os.system("true"), in all its ways: data, not calls.
TEST(PickleTest, NothingIsExecuted) {
  const auto call = Parse(
      "\x80\x02"
      "cos\nsystem\nX\x04\x00\x00\x00true\x85R."s);
  ASSERT_TRUE(call.ok()) << call.status();
  EXPECT_EQ(call->root().kind(), Kind::kCall);
  EXPECT_TRUE(call->root().callee().IsGlobal("os", "system"));
  const auto args = call->root().args().AsTuple(1);
  EXPECT_EQ((*args)[0].AsString(), "true");

  const auto instance = Parse(
      "\x80\x04\x8c\x01m\x8c\x01"
      "C\x93)\x81}\x8c\x01xK\x05sb."s);
  ASSERT_TRUE(instance.ok()) << instance.status();
  EXPECT_EQ(instance->root().kind(), Kind::kInstance);
  EXPECT_EQ(instance->root().state()->Find("x")->AsInt(), 5);
  // OrderedDict and deque: calls that are filled.
  const auto filled = Parse(
      "\x80\x02"
      "ccollections\nOrderedDict\n)RX\x01\x00\x00\x00kK\x01s."s);
  ASSERT_TRUE(filled.ok()) << filled.status();
  EXPECT_EQ(filled->root().Find("k")->AsInt(), 1);
  EXPECT_EQ(filled->root().size(), 1u);

  // i (INST), o (OBJ), extension codes, by-value globals and the like.
  for (const char op : "iop0\x82\x83\x84PIL\x92\x8b\x96\x97\x98"s) {
    if (op == '\0') continue;
    EXPECT_EQ(CodeOf("\x80\x04(K\x01K\x01"s + op + "1\n1\n1234567."), kDataLoss)
        << static_cast<int>(op);
  }
}

TEST(PickleTest, RefusesWhatDoesNotFitTogether) {
  for (const std::string& bytes : {
           ""s,             // nothing
           "\x80\x01."s,    // protocol
           "\x80\x06N."s,   //
           "\x80\x02."s,    // nothing on the stack
           "\x80\x02NN."s,  // too much on it
           "\x80\x02(N."s,  // an open mark
           "\x80\x02N"s,    // no STOP
           "\x80\x02"
           "e."s,  // no mark
           "\x80\x02K\x01(K\x02"
           "e."s,  // append to a number
           "\x80\x02}K\x01"
           "a."s,                     // append to a dict
           "\x80\x02]K\x01K\x02s."s,  // set in a list
           "\x80\x02}(K\x01u."s,      // a key without a value
           "\x80\x02]K\x01"
           "b."s,               // state of a list
           "\x80\x02h\x00."s,   // memo is empty
           "\x80\x02Nq\x07."s,  // memo index ahead
           "\x80\x02Nr\xff\xff\xff\xff."s,
           "\x80\x02\x85."s,            // tuple of nothing
           "\x80\x02(\x85."s,           // tuple below the mark
           "\x80\x02K\x01R."s,          // call without a function
           "\x80\x04K\x01K\x02\x93."s,  // names that are numbers
           "\x80\x02X\x04\x00\x00\x00"
           "abc."s,  // cut off
           "\x80\x02"
           "cabc"s,         // no newline
           "\x80\x02NQ."s,  // persistent id not allowed
       }) {
    EXPECT_EQ(CodeOf(bytes), kDataLoss) << bytes;
  }
}

TEST(PickleTest, LimitsHold) {
  PickleLimits limits;
  limits.max_string_bytes = 8;
  EXPECT_EQ(CodeOf("\x80\x04\x8c\x09"
                   "123456789."s,
                   limits),
            kTooBig);
  // A length that the input does not have is no reason to allocate.
  EXPECT_EQ(CodeOf("\x80\x02X\xff\xff\xff\x3f"
                   "abc."s),
            kDataLoss);
  EXPECT_EQ(CodeOf("\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f"
                   "abc."s),
            kTooBig);
  limits = {};
  limits.max_memory_bytes = 1 << 16;
  EXPECT_EQ(CodeOf("\x80\x02]("s + std::string(100000, ']') + "e.", limits),
            kTooBig);
  EXPECT_EQ(CodeOf("\x80\x02"s + std::string(100000, '('), limits), kTooBig);
  std::string memo = "\x80\x04N";
  for (int i = 0; i < 100000; ++i) memo += '\x94';
  EXPECT_EQ(CodeOf(memo, limits), kTooBig);
}

TEST(PickleTest, ValuesMayContainThemselves) {
  const auto pickle = Parse(
      "\x80\x02]q\x00h\x00"
      "a."s);
  ASSERT_TRUE(pickle.ok()) << pickle.status();
  pickle->root().ForEachItem([&](PickleValue item) {
    EXPECT_EQ(item.id(), pickle->root().id());
    return true;
  });
}

TEST(PickleTest, BytesOfEitherProtocol) {
  std::string all;
  for (int c = 0; c < 256; ++c) all.push_back(static_cast<char>(c));
  std::string bytes;
  PickleWriter four(4, &bytes);
  four.Bytes(all);
  four.Stop();
  EXPECT_EQ(Parse(bytes)->root().AsBytes(), all);
  bytes.clear();
  PickleWriter two(2, &bytes);
  two.Bytes(all);
  two.Stop();
  EXPECT_TRUE(Parse(bytes)->root().callee().IsGlobal("_codecs", "encode"));
}

TEST(PickleTest, SharedTextsAndGlobalsAreWrittenOnce) {
  std::string bytes;
  PickleWriter writer(4, &bytes);
  writer.EmptyList();
  writer.Mark();
  for (int i = 0; i < 600; ++i) writer.SharedText(absl::StrCat("text", i));
  const size_t first = bytes.size();
  for (int i = 0; i < 600; ++i) writer.SharedText(absl::StrCat("text", i));
  EXPECT_LE(bytes.size() - first, 5 * 600u);
  writer.Global("m", "C");
  writer.Global("m", "C");
  writer.Appends();
  writer.Stop();
  const auto pickle = Parse(bytes);
  ASSERT_TRUE(pickle.ok()) << pickle.status();
  std::vector<PickleValue> items;
  pickle->root().ForEachItem([&](PickleValue item) {
    items.push_back(item);
    return true;
  });
  ASSERT_EQ(items.size(), 1202u);
  for (int i = 0; i < 600; ++i) {
    EXPECT_EQ(items[600 + i].AsString(), absl::StrCat("text", i));
  }
  EXPECT_EQ(items[1200].id(), items[1201].id());
}

TEST(PickleTest, Utf8) {
  EXPECT_TRUE(IsUtf8("plain \xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"));
  for (const absl::string_view bad :
       {"\x80", "\xc3", "\xc0\x80", "\xe0\x80\x80", "\xed\xa0\x80",
        "\xf4\x90\x80\x80", "\xf8\x88\x80\x80\x80", "a\xff"}) {
    EXPECT_FALSE(IsUtf8(bad)) << bad;
  }
}

}  // namespace
}  // namespace dsd::dcp
