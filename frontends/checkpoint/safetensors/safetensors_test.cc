// SPDX-License-Identifier: Apache-2.0

#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "dsd/core/base/dtype.h"
#include "dsd/frontends/checkpoint/dcp/memory_file.h"
#include "dsd/frontends/checkpoint/safetensors/header.h"
#include "dsd/frontends/checkpoint/safetensors/index.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::safetensors {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

std::string File(const std::string& json, const std::string& data,
                 int64_t length = -1) {
  const uint64_t bytes =
      length >= 0 ? length : static_cast<int64_t>(json.size());
  std::string out(reinterpret_cast<const char*>(&bytes), sizeof(bytes));
  return out + json + data;
}

absl::StatusOr<Header> Read(std::string bytes) {
  dcp::MemoryFile file(std::move(bytes));
  return ReadHeader(file);
}

// The example of the format's description: two tensors and a padded header.
constexpr char kExample[] =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],)"
    R"("data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[],)"
    R"("data_offsets":[8,10]}}     )";

TEST(HeaderTest, Reads) {
  const auto header = Read(File(kExample, "0123456789"));
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_EQ(header->data_at, 152);
  EXPECT_THAT(header->metadata, ElementsAre(Pair("format", "pt")));
  ASSERT_EQ(header->tensors.size(), 2u);
  EXPECT_EQ(header->tensors[0].name, "a");
  EXPECT_EQ(header->tensors[0].dtype, DType::kFloat32);
  EXPECT_EQ(header->tensors[0].shape, Dims({2}));
  EXPECT_EQ(header->tensors[1].name, "b");
  EXPECT_EQ(header->tensors[1].dtype, DType::kBFloat16);
  EXPECT_TRUE(header->tensors[1].shape.empty());
  EXPECT_EQ(header->tensors[1].begin_bytes, 8);
  EXPECT_EQ(header->tensors[1].end_bytes, 10);
}

TEST(HeaderTest, EmptyOnesAndOrderAndFieldsOfLaterVersions) {
  EXPECT_TRUE(Read(File("{}", "")).ok());
  const auto header = Read(File(
      R"({"z":{"data_offsets":[4,8],"shape":[1],"dtype":"I32","new":{"x":[1]}},)"
      R"("empty":{"dtype":"F64","shape":[0,7],"data_offsets":[4,4]},)"
      R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
      R"("later":{"dtype":"F3","shape":[3],"data_offsets":[8,10]}})",
      "0123456789"));
  ASSERT_TRUE(header.ok()) << header.status();
  ASSERT_EQ(header->tensors.size(), 4u);
  EXPECT_EQ(header->tensors[0].name, "a");
  EXPECT_EQ(header->tensors[1].name, "empty");
  EXPECT_EQ(header->tensors[2].name, "z");
  EXPECT_EQ(header->tensors[3].dtype, std::nullopt);
  EXPECT_EQ(header->tensors[3].dtype_name, "F3");
}

TEST(HeaderTest, PairsOfFourBitNumbers) {
  const auto header = Read(
      File(R"({"a":{"dtype":"F4","shape":[3,4],"data_offsets":[0,6]},)"
           R"("odd":{"dtype":"F4","shape":[4,1],"data_offsets":[6,8]},)"
           R"("six":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[8,11]}})",
           std::string(11, 'x')));
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_EQ(header->tensors[0].dtype, DType::kFloat4E2M1FNX2);
  EXPECT_EQ(header->tensors[0].shape, Dims({3, 2}));
  EXPECT_EQ(header->tensors[1].dtype, std::nullopt);
  EXPECT_EQ(header->tensors[2].dtype, std::nullopt);
}

TEST(HeaderTest, WritesWhatItReads) {
  Header header;
  header.metadata = {{"format", "pt"}, {"note", "\"quoted\"\n\u00e9"}};
  int64_t at = 0;
  int named = 0;
  for (int i = 0; i < kNumDTypes; ++i) {
    const DType dtype = static_cast<DType>(i);
    if (NameOfDType(dtype).empty()) continue;
    ++named;
    HeaderTensor tensor;
    tensor.name = absl::StrCat("t\"", i, "\\");
    tensor.dtype = dtype;
    tensor.shape = {3, 2};
    tensor.begin_bytes = at;
    at += 6 * ItemSize(dtype);
    tensor.end_bytes = at;
    header.tensors.push_back(tensor);
  }
  EXPECT_EQ(named, kNumDTypes - 2);  // all but complex32 and complex128
  const auto bytes = EncodeHeader(header);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_EQ(bytes->size() % 64, 0u);
  const auto read = Read(*bytes + std::string(at, 'x'));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->metadata, header.metadata);
  EXPECT_EQ(read->data_at, static_cast<int64_t>(bytes->size()));
  ASSERT_EQ(read->tensors.size(), header.tensors.size());
  for (size_t i = 0; i < header.tensors.size(); ++i) {
    EXPECT_EQ(read->tensors[i].name, header.tensors[i].name);
    EXPECT_EQ(read->tensors[i].dtype, header.tensors[i].dtype);
    EXPECT_EQ(read->tensors[i].shape, header.tensors[i].shape);
    EXPECT_EQ(read->tensors[i].begin_bytes, header.tensors[i].begin_bytes);
  }
}

TEST(HeaderTest, NamesWhatIsWrong) {
  const auto tensor = [](absl::string_view fields) {
    return absl::StrCat("{\"a\":{", fields, "}}");
  };
  struct Case {
    std::string json;
    std::string data;
    std::string text;
  };
  const Case cases[] = {
      {"", "", "begin with '{'"},
      {" {}", "", "begin with '{'"},
      {"[]", "", "begin with '{'"},
      {"{", "", "no JSON at byte"},
      {"{}{}", "", "no JSON at byte"},
      {"{\"\xff\":1}", "", "no JSON at byte"},
      {R"({"a":1})", "", "tensor \"a\": number"},
      {R"({"a":null})", "", "tensor \"a\": no object"},
      {R"({"a":[]})", "", "tensor \"a\": no object"},
      {R"({"__metadata__":{"a":1}})", "", "\"a\" is no text"},
      {R"({"__metadata__":{"a":{}}})", "", "\"a\" is no text"},
      {R"({"__metadata__":{"a":"x","a":"y"}})", "", "\"a\" is there twice"},
      {tensor(""), "", "it needs dtype, shape and data_offsets"},
      {tensor(R"("dtype":"U8","shape":[1])"), "x", "it needs dtype"},
      {tensor(R"("dtype":"U8","shape":1,"data_offsets":[0,1])"), "x",
       "a number for shape"},
      {tensor(R"("dtype":1,"shape":[1],"data_offsets":[0,1])"), "x",
       "a number for dtype"},
      {tensor(R"("dtype":["U8"],"shape":[1],"data_offsets":[0,1])"), "x",
       "no such value: dtype"},
      {tensor(R"("dtype":"U8","shape":[-1],"data_offsets":[0,1])"), "x",
       "neither text nor a number"},
      {tensor(R"("dtype":"U8","shape":[1.0],"data_offsets":[0,1])"), "x",
       "neither text nor a number"},
      {tensor(R"("dtype":"U8","shape":["1"],"data_offsets":[0,1])"), "x",
       "text in shape"},
      {tensor(R"("dtype":"U8","shape":[[1]],"data_offsets":[0,1])"), "x",
       "nested in a field"},
      {tensor(R"("dtype":"U8","shape":[18446744073709551615],)"
              R"("data_offsets":[0,1])"),
       "x", "out of range"},
      {tensor(R"("dtype":"U8","shape":[1],"data_offsets":[0])"), "x",
       "it needs"},
      {tensor(R"("dtype":"U8","shape":[1],"data_offsets":[0,1,2])"), "x",
       "more than two"},
      {tensor(R"("dtype":"U8","shape":[2],"data_offsets":[0,1])"), "x",
       "takes 2 bytes, data_offsets are [0, 1]"},
      {tensor(R"("dtype":"U8","shape":[1],"data_offsets":[1,0])"), "x",
       "takes 1 bytes"},
      {tensor(R"("dtype":"F4","shape":[3],"data_offsets":[0,1])"), "x",
       "no whole number of bytes"},
      {tensor(R"("dtype":"F64","shape":[4294967296,4294967296],)"
              R"("data_offsets":[0,0])"),
       "", "no whole number of bytes"},
      {tensor(R"("dtype":"U8","shape":[1],"data_offsets":[0,1])"), "",
       "take 1 bytes, the file has 0 after its header (truncated?)"},
      {tensor(R"("dtype":"U8","shape":[1],"data_offsets":[0,1])"), "xy",
       "take 1 bytes, the file has 2"},
      {tensor(R"("dtype":"U8","shape":[1],"data_offsets":[1,2])"), "xy",
       "begins at byte 1 of the data, expected 0 (a hole)"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
       R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       "xyz", "\"b\" begins at byte 1 of the data, expected 2 (it overlaps"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
       R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       "xy", "\"a\" is there twice"},
      {R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
       "x", "\"dtype\" is there twice"},
      {tensor(absl::StrCat(R"("dtype":"U8","data_offsets":[0,1],"shape":[)",
                           std::string(200, '1'), "]")),
       "x", "neither text nor a number"},
      {tensor(absl::StrCat(R"("x":)", std::string(100, '['))), "",
       "nested more than 32 deep"},
  };
  for (const Case& c : cases) {
    const auto header = Read(File(c.json, c.data));
    EXPECT_EQ(header.status().code(), absl::StatusCode::kDataLoss) << c.json;
    EXPECT_THAT(std::string(header.status().message()), HasSubstr(c.text))
        << c.json;
  }
  std::string many = "1";
  for (int i = 0; i < 64; ++i) many += ",1";
  EXPECT_THAT(Read(File(tensor(absl::StrCat(R"("shape":[)", many, "]")), ""))
                  .status()
                  .message(),
              HasSubstr("more than 64 dimensions"));
}

TEST(HeaderTest, LengthsAreChecked) {
  EXPECT_THAT(Read("1234567").status().message(), HasSubstr("at least 8"));
  EXPECT_THAT(Read(File("{}", "", 3)).status().message(),
              HasSubstr("it is to have 3 bytes, the file has 2"));
  std::string huge(16, '\xff');
  EXPECT_EQ(Read(huge).status().code(), absl::StatusCode::kDataLoss);
  // A length that the file has room for and the format has not.
  const std::string large(kMaxHeaderBytes + 1, ' ');
  EXPECT_EQ(Read(File(large, "")).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(HeaderTest, EveryTruncationAndEveryFlippedBit) {
  const std::string file = File(kExample, "0123456789");
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_EQ(Read(file.substr(0, size)).status().code(),
              absl::StatusCode::kDataLoss)
        << size;
  }
  int readable = 0;
  for (size_t bit = 0; bit < file.size() * 8; ++bit) {
    std::string damaged = file;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
    const auto header = Read(damaged);
    readable += header.ok();
    if (header.ok()) continue;
    EXPECT_THAT(header.status().code(),
                ::testing::AnyOf(absl::StatusCode::kDataLoss,
                                 absl::StatusCode::kResourceExhausted))
        << bit;
  }
  // In names, in dtypes of one size and in the data.
  EXPECT_GT(readable, 80);
}

TEST(IndexTest, ReadsAndWrites) {
  Index index;
  index.weight_map = {{"b.weight", "model-00002-of-00002.safetensors"},
                      {"a\"", "model-00001-of-00002.safetensors"}};
  const std::string json = EncodeIndex(index, 1234);
  EXPECT_THAT(json, HasSubstr("\"total_size\": 1234"));
  const auto read = ParseIndex(json);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_THAT(
      read->weight_map,
      UnorderedElementsAre(Pair("b.weight", "model-00002-of-00002.safetensors"),
                           Pair("a\"", "model-00001-of-00002.safetensors")));
  EXPECT_TRUE(ParseIndex(R"({"metadata":{"total_size":1.5,"x":[null]},)"
                         R"("weight_map":{},"other":{"weight_map":1}})")
                  .ok());
}

TEST(IndexTest, RefusesPathsAndOtherForms) {
  for (const std::string file :
       {"../x", "/etc/passwd", "a/b", "..", ".", "", "a\\\\b", "a\\u0000b"}) {
    const auto index =
        ParseIndex(absl::StrCat("{\"weight_map\":{\"k\":\"", file, "\"}}"));
    EXPECT_EQ(index.status().code(), absl::StatusCode::kDataLoss) << file;
    EXPECT_THAT(std::string(index.status().message()),
                HasSubstr("expected a name in the directory"))
        << file;
  }
  for (const std::string json :
       {"", "[]", "1", "{}", R"({"weight_map":1})", R"({"weight_map":"a"})",
        R"({"weight_map":[]})", R"({"weight_map":{"a":1}})",
        R"({"weight_map":{"a":{}}})", R"({"weight_map":{"a":"x","a":"y"}})",
        R"({"weight_map":{"a":"x"})", "null", "\"weight_map\""}) {
    EXPECT_EQ(ParseIndex(json).status().code(), absl::StatusCode::kDataLoss)
        << json;
  }
}

TEST(ShardingTest, Reads) {
  const auto places = ParseSharding(
      R"({"a":{"saved_offsets":[2,0]},"s":{"saved_offsets":[]},)"
      R"("b":{"saved_offsets":[4],"global_shape":[9],"more":{"x":1}}})");
  ASSERT_TRUE(places.ok()) << places.status();
  EXPECT_EQ(places->at("a").offsets, Dims({2, 0}));
  EXPECT_TRUE(places->at("s").offsets.empty());
  EXPECT_EQ(places->at("b").global_shape, Dims({9}));
  for (const std::string json :
       {"", "[]", "7", R"({"a":1})", R"({"a":[]})", R"({"a":"x"})",
        R"({"a":{"saved_offsets":1}})", R"({"a":{"saved_offsets":[-1]}})",
        R"({"a":{"saved_offsets":{}}})", R"({"a":{"saved_offsets":[[1]]}})",
        R"({"a":{"saved_offsets":["1"]}})", R"({"a":{"saved_offsets":null}})",
        R"({"a":{"saved_offsets":[99999999999999999999]}})"}) {
    EXPECT_EQ(ParseSharding(json).status().code(), absl::StatusCode::kDataLoss)
        << json;
  }
}

}  // namespace
}  // namespace dsd::safetensors
