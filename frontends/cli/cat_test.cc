// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <cstdint>
#include <fstream>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/layout/layout.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/cli/selection.h"
#include "dsd/frontends/cli/statistics.h"
#include "dsd/frontends/cli/test_checkpoint.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace dsd::cli {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

nlohmann::json JsonOf(std::vector<std::string> arguments) {
  arguments.push_back("--json");
  return nlohmann::json::parse(RunDsd(arguments).out);
}

TEST(CatTest, ShowsATensorAsPython) {
  const std::string dir =
      SaveCheckpoint({FloatTensor("layer.weight", Dims{2, 3}, -1)});
  const RunResult result = RunDsd({"cat", dir, "layer.weight"});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_EQ(result.out,
            "layer.weight  float32 [2, 3], 24 B in 1 shard\n"
            "min -1, max 4, mean 1.5, std 1.70783; 1 zero, 0 NaN, 0 Inf\n"
            "tensor([[-1.,  0.,  1.],\n"
            "        [ 2.,  3.,  4.]])\n");
}

TEST(CatTest, ShowsSlices) {
  const std::string dir = SaveCheckpoint({FloatTensor("w", Dims{4, 5})});
  const auto values = [&](const std::string& key) {
    const nlohmann::json json = JsonOf({"cat", dir, key});
    return json["entries"][0]["values"].dump();
  };
  EXPECT_EQ(values("w[0:2,:]"),
            "[[0.0,1.0,2.0,3.0,4.0],[5.0,6.0,7.0,8.0,9.0]]");
  EXPECT_EQ(values("w[-1]"), "[15.0,16.0,17.0,18.0,19.0]");
  EXPECT_EQ(values("w[..., 0]"), "[0.0,5.0,10.0,15.0]");
  EXPECT_EQ(values("w[1,-2]"), "8.0");
  EXPECT_EQ(values("w[3:1]"), "[]");
  EXPECT_EQ(values("w[2:99, -1:]"), "[[14.0],[19.0]]");
  EXPECT_THAT(RunDsd({"cat", dir, "w[0:2,1]"}).out,
              AllOf(HasSubstr("w[0:2,1]  float32 [2], 8 B"),
                    HasSubstr("min 1, max 6, mean 3.5")));
}

TEST(CatTest, RefusesSlicesThatAreNone) {
  const std::string dir = SaveCheckpoint({FloatTensor("w", Dims{4, 5})},
                                         {{{std::string("step")}, Object(1)}});
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"w[4]", "index 4 is outside a dimension of 4"},
      {"w[0,0,0]", "3 dimensions, but the tensor has shape [4, 5]"},
      {"w[::2]", "without a step"},
      {"w[x]", "\"x\" is no number"},
      {"w[...,...]", "stands twice"},
      {"w[99999999999999999999]", "is no number"},
      {"step[0]", "\"step\" is not a tensor"},
  };
  for (const auto& [key, error] : cases) {
    const RunResult result = RunDsd({"cat", dir, key});
    EXPECT_EQ(result.exit_code, kExitUsage) << key;
    EXPECT_THAT(result.err, HasSubstr(error)) << key;
    EXPECT_EQ(result.out, "");
  }
}

TEST(CatTest, SuggestsNearKeys) {
  const std::string dir = SaveCheckpoint({
      FloatTensor("model.layer.weight", Dims{2}),
      FloatTensor("model.layer.bias", Dims{2}),
  });
  RunResult result = RunDsd({"cat", dir, "model.layer.wieght"});
  EXPECT_EQ(result.exit_code, kExitUsage);
  EXPECT_EQ(result.err,
            absl::StrCat("dsd: the checkpoint at \"", dir,
                         "\" has no key \"model.layer.wieght\"; did you mean "
                         "\"model.layer.weight\"?\n"));
  EXPECT_THAT(RunDsd({"cat", dir, "bias[0]"}).err,
              HasSubstr("did you mean \"model.layer.bias\"?"));
  EXPECT_THAT(RunDsd({"cat", dir, "entirely different"}).err,
              Not(HasSubstr("did you mean")));
}

TEST(CatTest, StatisticsOfAllTensorsAsATable) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const std::string dir = SaveCheckpoint({
      FloatTensor("b", Dims{2, 2}),
      {"a", DType::kFloat32, Layout::Replicated({6}, {0}),
       BytesOf<float>({nan, 1, -inf, 0, 3, inf})},
      {"none", DType::kFloat32, Layout::Replicated({0, 3}, {0}), ""},
      {"lost", DType::kFloat32, Layout::Replicated({1}, {0}),
       BytesOf<float>({nan})},
  });
  const RunResult result = RunDsd({"cat", dir});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_EQ(
      result.out,
      "KEY   TYPE     SHAPE   MIN  MAX     MEAN      STD  ZEROS  NAN  INF\n"
      "b     float32  [2, 2]    0    3      1.5  1.11803      1    0    0\n"
      "a     float32  [6]       0    3  1.33333  1.24722      1    1    2\n"
      "none  float32  [0, 3]    -    -        -        -      0    0    0\n"
      "lost  float32  [1]       -    -        -        -      0    1    0\n");
  EXPECT_THAT(RunDsd({"cat", dir, "--match", "o"}).out,
              Not(HasSubstr("float32  [6]")));
  const nlohmann::json json = JsonOf({"cat", dir, "lost", "a"});
  EXPECT_EQ(json["entries"][0]["statistics"]["min"], nullptr);
  EXPECT_EQ(json["entries"][1]["statistics"]["inf"], 2);
  EXPECT_EQ(json["entries"][1]["values"],
            nlohmann::json({"nan", 1.0, "-inf", 0.0, 3.0, "inf"}));
}

TEST(CatTest, ShowsObjects) {
  Object::Dict group;
  group.Set(PathSegment(std::string("lr")), Object(0.01));
  group.Set(PathSegment(std::string("betas")),
            Object(Object::Tuple{{Object(0.9), Object(0.999)}}));
  const std::string dir = SaveCheckpoint(
      {}, {{{std::string("group")}, Object(Object::List{Object(group)})},
           {{std::string("note")}, Object("two\nlines")}});
  const RunResult result = RunDsd({"cat", dir, "note", "group"});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_EQ(result.out,
            "note  str\n"
            "'two\\nlines'\n"
            "\n"
            "group  list\n"
            "[{'lr': 0.01, 'betas': (0.9, 0.999)}]\n");
  EXPECT_EQ(JsonOf({"cat", dir, "group"})["entries"][0]["value"][0]["betas"],
            nlohmann::json({0.9, 0.999}));
}

// Three rows on each of four ranks, read as one.
TEST(CatTest, ReadsShards) {
  const auto layout =
      Layout::FromPlacements({10, 300}, DeviceMesh::Iota({4}), {Shard(0)});
  const auto columns =
      Layout::FromPlacements({10, 300}, DeviceMesh::Iota({4}), {Shard(1)});
  ASSERT_TRUE(layout.ok() && columns.ok());
  const std::string whole = SaveCheckpoint({FloatTensor("w", Dims{10, 300})});
  for (const Layout& sharded : {*layout, *columns}) {
    const std::string dir = SaveCheckpoint({FloatTensor("w", sharded)}, {}, 4);
    const std::string text = RunDsd({"cat", dir, "w"}).out;
    EXPECT_THAT(text, HasSubstr("float32 [10, 300], 11.7 KiB in 4 shards\n"));
    const auto body = [](const std::string& out) {
      return out.substr(out.find('\n'));
    };
    EXPECT_EQ(body(text), body(RunDsd({"cat", whole, "w"}).out));
    EXPECT_EQ(JsonOf({"cat", dir, "w[2:8,100:250]", "--full"})["entries"],
              JsonOf({"cat", whole, "w[2:8,100:250]", "--full"})["entries"]);
  }
}

TEST(CatTest, FullShowsEverything) {
  const std::string dir = SaveCheckpoint({FloatTensor("w", Dims{1001})});
  const std::string summary = RunDsd({"cat", dir, "w"}).out;
  EXPECT_THAT(summary, HasSubstr("tensor([   0.,    1.,    2.,  ...,  998.,  "
                                 "999., 1000.])\n"));
  const std::string full = RunDsd({"cat", dir, "w", "--full"}).out;
  EXPECT_THAT(full, AllOf(HasSubstr(" 500.,"), Not(HasSubstr("..."))));
  EXPECT_EQ(JsonOf({"cat", dir, "w"})["entries"][0].count("values"), 0);
  EXPECT_EQ(JsonOf({"cat", dir, "w", "--full"})["entries"][0]["values"].size(),
            1001);
}

// A summary of many dimensions would be millions of numbers.
TEST(CatTest, RefusesASummaryThatIsNone) {
  const std::string dir =
      SaveCheckpoint({{"w", DType::kUInt8, Layout::Replicated(Dims(22, 2), {0}),
                       std::string(size_t{1} << 22, '\1')}});
  const RunResult result = RunDsd({"cat", dir, "w"});
  EXPECT_EQ(result.exit_code, kExitUsage);
  EXPECT_THAT(result.err, HasSubstr("choose a slice"));
  EXPECT_EQ(RunDsd({"cat", dir, "w", "--stats"}).exit_code, kExitOk);
  EXPECT_EQ(RunDsd({"cat", dir, "w[0,0,0,0,0,0,0,0,0,0,0,0,0]"}).exit_code,
            kExitOk);
}

TEST(CatTest, NamesDamage) {
  const std::string dir = SaveCheckpoint(
      {FloatTensor("good", Dims{600}), FloatTensor("bad", Dims{600})});
  const auto opened = checkpoint::Checkpoint::Open(dir);
  ASSERT_TRUE(opened.ok());
  const checkpoint::StoredChunk chunk = (*opened)->Chunks(1)[0];
  {
    std::fstream file(absl::StrCat(dir, "/", chunk.file),
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(chunk.offset_bytes + 704);
    file.put('\x7f');
  }
  const RunResult result = RunDsd({"cat", dir, "good", "bad"});
  EXPECT_EQ(result.exit_code, kExitProblems);
  EXPECT_THAT(result.out, HasSubstr("good  float32 [600]"));
  EXPECT_THAT(result.err, AllOf(HasSubstr("\"bad\""), HasSubstr(chunk.file),
                                Not(HasSubstr("\"good\""))));
  EXPECT_EQ(RunDsd({"cat", dir}).exit_code, kExitProblems);
  EXPECT_EQ(RunDsd({"cat", dir, "good"}).exit_code, kExitOk);
}

Statistics StatisticsOf(DType dtype, const std::string& bytes) {
  StatisticsBuilder builder(dtype);
  // In uneven parts.
  const size_t item = ItemSize(dtype);
  size_t part = item;
  for (size_t at = 0; at < bytes.size();) {
    const size_t size = std::min(part, bytes.size() - at);
    builder.Add(absl::MakeConstSpan(
        reinterpret_cast<const std::byte*>(bytes.data()) + at, size));
    at += size;
    part += 1000 * item;
  }
  return builder.Finish();
}

TEST(StatisticsTest, IntegersAreExact) {
  const int64_t big = std::numeric_limits<int64_t>::max();
  const Statistics s = StatisticsOf(
      DType::kInt64, BytesOf<int64_t>({big, -big - 1, big - 1, 0}));
  EXPECT_EQ(*s.min, Number(-big - 1));
  EXPECT_EQ(*s.max, Number(big));
  EXPECT_EQ(s.zeros, 1);
  const uint64_t most = std::numeric_limits<uint64_t>::max();
  EXPECT_EQ(*StatisticsOf(DType::kUInt64, BytesOf<uint64_t>({most, 1})).max,
            Number(most));
  const Statistics flags = StatisticsOf(DType::kBool, {"\1\0\1\1", 4});
  EXPECT_EQ(*flags.mean, Number(0.75));
  EXPECT_EQ(*flags.min, Number(false));
}

TEST(StatisticsTest, SquaresDoNotOverflow) {
  const double most = std::numeric_limits<double>::max();
  const Statistics s = StatisticsOf(
      DType::kFloat64, BytesOf<double>({most, -most, most, -most}));
  EXPECT_EQ(*s.mean, Number(0.0));
  EXPECT_EQ(*s.std, Number(most));
}

TEST(StatisticsTest, ComplexAndPacked) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Statistics s = StatisticsOf(
      DType::kComplex64,
      BytesOf<float>({3, 4, 0, 0, inf, 1, 0, nan, nan, inf, -3, -4}));
  EXPECT_EQ(s.count, 6);
  EXPECT_EQ(s.zeros, 1);
  EXPECT_EQ(s.inf, 1);
  EXPECT_EQ(s.nan, 2);
  EXPECT_EQ(*s.min, Number(0.0));
  EXPECT_EQ(*s.max, Number(5.0));
  EXPECT_EQ(*s.mean, Number(std::complex<double>(0, 0)));
  EXPECT_NEAR(std::get<double>(*s.std), std::sqrt(50.0 / 3), 1e-12);

  // 6 and -0.5 in one byte.
  const Statistics packed = StatisticsOf(DType::kFloat4E2M1FNX2, "\x97");
  EXPECT_EQ(packed.count, 2);
  EXPECT_EQ(*packed.min, Number(-0.5));
  EXPECT_EQ(*packed.max, Number(6.0));
  EXPECT_EQ(*packed.mean, Number(2.75));
}

TEST(StatisticsTest, EqualsTwoPassesOverManyNumbers) {
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal(1e6, 1);  // far from 0
  std::vector<double> values(30000);
  for (double& value : values) value = normal(random);
  long double sum = 0, squares = 0;
  for (const double value : values) sum += value;
  const long double mean = sum / values.size();
  for (const double value : values) {
    squares += (value - mean) * (value - mean);
  }
  const Statistics s = StatisticsOf(DType::kFloat64, BytesOf(values));
  EXPECT_NEAR(std::get<double>(*s.mean), static_cast<double>(mean), 1e-9);
  EXPECT_NEAR(std::get<double>(*s.std),
              static_cast<double>(std::sqrt(squares / values.size())), 1e-9);
}

TEST(SliceTest, AsPython) {
  const auto parse = [](absl::string_view text) {
    const absl::StatusOr<Slice> slice = ParseSlice(text, {4, 5, 6});
    EXPECT_TRUE(slice.ok()) << slice.status();
    return slice->box.ToString();
  };
  EXPECT_EQ(parse(""), "[0:4, 0:5, 0:6]");
  EXPECT_EQ(parse("1,"), "[1:2, 0:5, 0:6]");
  EXPECT_EQ(parse("..., -1"), "[0:4, 0:5, 5:6]");
  EXPECT_EQ(parse("1:-1, ..., :2"), "[1:3, 0:5, 0:2]");
  EXPECT_EQ(parse("-99:99:1"), "[0:4, 0:5, 0:6]");
  EXPECT_EQ(parse("9223372036854775807:"), "[4:4, 0:5, 0:6]");
  EXPECT_EQ(parse("-9223372036854775808:"), "[0:4, 0:5, 0:6]");
  EXPECT_THAT(ParseSlice("0,:,1", {4, 5, 6})->dims, ElementsAre(1));
  EXPECT_FALSE(ParseSlice(",", {4, 5, 6}).ok());
  EXPECT_FALSE(ParseSlice("0", {}).ok());
  EXPECT_TRUE(ParseSlice("...", {}).ok());
}

}  // namespace
}  // namespace dsd::cli
