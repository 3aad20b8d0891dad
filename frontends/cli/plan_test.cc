// SPDX-License-Identifier: Apache-2.0

#include <sys/stat.h>

#include <cmath>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "dsd/core/layout/random_layout.h"
#include "dsd/frontends/cli/named_layout.h"
#include "dsd/frontends/cli/test_checkpoint.h"
#include "dsd/frontends/cli/traffic.h"
#include "dsd/frontends/cli/treemap.h"
#include "dsd/testing/harness/test_seed.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace dsd::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

std::string Model() {
  static const std::string* const directory = new std::string(SaveCheckpoint({
      FloatTensor("layers.0.weight", Dims{64, 32}),
      FloatTensor("layers.0.bias", Dims{64}),
      FloatTensor("layers.1.weight", Dims{32, 64}),
      FloatTensor("step", Dims{}),
  }));
  return *directory;
}

TEST(NamedLayoutTest, MeansWhatItSays) {
  const auto text = [](std::vector<std::string> names, const std::string& key,
                       Dims shape) {
    const auto layouts = NamedLayouts::Parse(names);
    EXPECT_TRUE(layouts.ok()) << layouts.status();
    return layouts->For(key, shape)->ToString();
  };
  EXPECT_EQ(text({"4"}, "w", {8, 4}), "[8, 4] mesh[4] S(0)");
  EXPECT_EQ(text({"4:R"}, "w", {8, 4}), "[8, 4] mesh[4] R");
  EXPECT_EQ(text({"2x4:R,S-1"}, "w", {8, 4}), "[8, 4] mesh[2, 4] R,S(1)");
  EXPECT_EQ(text({"2x4:ss0/4,s0"}, "w", {8, 4}),
            "[8, 4] mesh[2, 4] SS(0, 4),S(0)");
  // Dimensions that a tensor lacks.
  EXPECT_EQ(text({"2x4:S0,S1"}, "b", {8}), "[8] mesh[2, 4] S(0),R");
  EXPECT_EQ(text({"4"}, "step", {}), "[] mesh[4] R");
  // The last that fits.
  const std::vector<std::string> rules = {"4", "*.bias=4:R", "a.*=2:S1"};
  EXPECT_EQ(text(rules, "a.bias", {8, 4}), "[8, 4] mesh[2] S(1)");
  EXPECT_EQ(text(rules, "b.bias", {8, 4}), "[8, 4] mesh[4] R");
  EXPECT_EQ(NamedLayouts::Parse({"2x4:R,S0", "x=9:R"})->num_ranks(), 9);
}

TEST(NamedLayoutTest, RefusesWhatIsNone) {
  for (const char* text :
       {"", "0", "-1", "x", "2x", "2x4", "4:", "4:Q", "4:S", "4:S0,S1",
        "4:S0:R", "4:SS0", "4:S0/2", "99999999999", "1000x1000:R,R", "65537"}) {
    const auto layouts = NamedLayouts::Parse({text});
    EXPECT_TRUE(absl::IsInvalidArgument(layouts.status())) << text;
    EXPECT_THAT(std::string(layouts.status().message()),
                HasSubstr("is no layout"))
        << text;
  }
  EXPECT_THAT(std::string(NamedLayouts::Parse({"a*=4"}).status().message()),
              HasSubstr("a layout for all keys is missing"));
}

TEST(PlanTest, ReshardsBetweenRanks) {
  const RunResult result =
      RunDsd({"plan", Model(), "--from", "4:S0", "--to", "2:S1"});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("4 tensors, 16.3 KiB: from 4:S0 to 2:S1"),
                    HasSubstr("FROM \\ TO"), HasSubstr("busiest: rank "),
                    HasSubstr("lower bound")));
  const auto json = nlohmann::json::parse(
      RunDsd({"plan", Model(), "--from", "4:S0", "--to", "2:S1", "--json"})
          .out);
  // Of each weight rank r has a quarter of the rows, and ranks 0 and 1 need
  // half of the columns; 4096 B of each weight stay. Each rank keeps or gets
  // the bias and the step as a whole.
  int64_t sent = 0, received = 0, pairs = 0;
  for (const auto& rank : json["ranks"]) {
    sent += rank["sent"].get<int64_t>();
    received += rank["received"].get<int64_t>();
    EXPECT_EQ(rank["read"], 0);
  }
  for (const auto& pair : json["pairs"]) {
    pairs += pair["bytes"].get<int64_t>();
    EXPECT_NE(pair["from"], pair["to"]);
  }
  EXPECT_EQ(sent, json["bytes_between_ranks"]);
  EXPECT_EQ(received, sent);
  EXPECT_EQ(pairs, sent);
  EXPECT_EQ(json["ranks"][0]["needs"], 4096 + 256 + 4096 + 4);
  EXPECT_EQ(json["ranks"][3]["needs"], 0);
  EXPECT_LE(json["busiest"]["lower_bound"], json["busiest"]["bytes"]);
}

TEST(PlanTest, LoadsFromFiles) {
  const auto json = nlohmann::json::parse(
      RunDsd({"plan", Model(), "--to", "4", "--json"}).out);
  EXPECT_EQ(json["from"], nullptr);
  // Each byte once; those of the step go on to three ranks.
  EXPECT_EQ(json["bytes_read"], json["bytes"]);
  EXPECT_EQ(json["bytes_between_ranks"], 3 * 4);
  const RunResult text = RunDsd({"plan", Model(), "--to", "4"});
  EXPECT_THAT(text.out, AllOf(HasSubstr("from the checkpoint's files to 4"),
                              HasSubstr("READS")));
}

TEST(PlanTest, NothingMoves) {
  const RunResult result =
      RunDsd({"plan", Model(), "--from", "4:R", "--to", "4:S0"});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_THAT(result.out, HasSubstr("nothing moves between ranks"));
}

TEST(PlanTest, ManyRanks) {
  const RunResult result =
      RunDsd({"plan", Model(), "--from", "64:S0", "--to", "64:S1",
              "--ranks-per-host", "8", "--moves", "2"});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("and 32 more ranks"),
                    HasSubstr("pairs with less"), HasSubstr("moves:")));
}

TEST(PlanTest, WrongArguments) {
  EXPECT_EQ(RunDsd({"plan", Model()}).exit_code, kExitUsage);
  const RunResult result = RunDsd({"plan", Model(), "--to", "2x2"});
  EXPECT_EQ(result.exit_code, kExitUsage);
  EXPECT_THAT(result.err, HasSubstr("needs placements"));
  EXPECT_EQ(
      RunDsd({"plan", Model(), "--to", "4", "--ranks-per-host", "0"}).exit_code,
      kExitUsage);
  EXPECT_EQ(RunDsd({"plan", "/no/such/place", "--to", "4"}).exit_code,
            kExitUnreadable);
}

// What ranks have and need, and a bound that no plan beats, counted element by
// element.
TEST(TrafficTest, BoundHoldsForRandomLayouts) {
  test::Random random(test::TestSeed());
  for (int round = 0; round < 60; ++round) {
    constexpr int kWorld = 5;
    Catalog source, target;
    const int tensors = static_cast<int>(test::Uniform(random, 1, 3));
    for (int t = 0; t < tensors; ++t) {
      const std::vector<int64_t> shape = test::RandomShape(random, 400);
      test::RandomLayoutOptions options;
      options.holders = {0, 1, 2, 3, 4};
      for (Catalog* side : {&source, &target}) {
        const auto layout =
            test::BuildLayout(test::RandomLayoutSpec(random, shape, options));
        ASSERT_TRUE(layout.ok()) << layout.status();
        ASSERT_TRUE(
            side->Add({absl::StrCat("t", t), DType::kFloat32, *layout}).ok());
      }
    }
    const auto traffic = TrafficOf(source, target, Binding(kWorld));
    ASSERT_TRUE(traffic.ok()) << traffic.status();
    int64_t in = 0, out = 0, busiest = 0;
    for (int rank = 0; rank < kWorld; ++rank) {
      const RankTraffic& r = traffic->ranks[rank];
      EXPECT_EQ(r.needs, r.kept + r.received);
      EXPECT_EQ(r.read, 0);
      in += r.received;
      out += r.sent;
      busiest = std::max(busiest, r.busy());
    }
    EXPECT_EQ(in, traffic->between);
    EXPECT_EQ(out, traffic->between);
    EXPECT_LE(traffic->bound, busiest);
    EXPECT_EQ(traffic->busiest >= 0, traffic->between > 0);
  }
}

// Every rank has a quarter and needs all: the bound is what is lacking.
TEST(TrafficTest, BoundOfAnAllGather) {
  Catalog source, target;
  ASSERT_TRUE(source
                  .Add({"w", DType::kFloat32,
                        *Layout::FromPlacements({64, 64}, DeviceMesh::Iota({4}),
                                                {Shard(0)})})
                  .ok());
  ASSERT_TRUE(target
                  .Add({"w", DType::kFloat32,
                        *Layout::FromPlacements({64, 64}, DeviceMesh::Iota({4}),
                                                {Replicate()})})
                  .ok());
  const auto traffic = TrafficOf(source, target, Binding(4));
  ASSERT_TRUE(traffic.ok());
  EXPECT_EQ(traffic->bound, 3 * 4096);
  EXPECT_EQ(traffic->ranks[0].has, 4096);
  EXPECT_EQ(traffic->ranks[0].needs, 4 * 4096);
}

TEST(TreemapTest, AreasAreInProportionAndDisjoint) {
  test::Random random(test::TestSeed());
  for (int round = 0; round < 50; ++round) {
    std::vector<double> sizes;
    double sum = 0;
    for (int64_t n = test::Uniform(random, 1, 40); n > 0; --n) {
      sizes.push_back(static_cast<double>(test::Uniform(random, 1, 1000)));
      sum += sizes.back();
    }
    std::sort(sizes.rbegin(), sizes.rend());
    const Area whole = {10, 20, 300, 200};
    const std::vector<Area> areas = Squarify(sizes, whole);
    ASSERT_EQ(areas.size(), sizes.size());
    for (size_t i = 0; i < areas.size(); ++i) {
      const Area& a = areas[i];
      EXPECT_NEAR(a.width * a.height, 300 * 200 * sizes[i] / sum, 1e-6);
      EXPECT_GE(a.x, whole.x - 1e-6);
      EXPECT_GE(a.y, whole.y - 1e-6);
      EXPECT_LE(a.x + a.width, whole.x + whole.width + 1e-6);
      EXPECT_LE(a.y + a.height, whole.y + whole.height + 1e-6);
      for (size_t j = 0; j < i; ++j) {
        const Area& b = areas[j];
        const bool apart =
            a.x + a.width <= b.x + 1e-6 || b.x + b.width <= a.x + 1e-6 ||
            a.y + a.height <= b.y + 1e-6 || b.y + b.height <= a.y + 1e-6;
        EXPECT_TRUE(apart) << i << " " << j;
      }
    }
  }
}

TEST(PlotTest, DrawsFilesAndRanks) {
  const std::string path = NewPath("plot") + ".svg";
  RunResult result = RunDsd({"plot", Model(), "-o", path});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_EQ(result.out, absl::StrCat("wrote ", path, "\n"));
  EXPECT_THAT(ReadFile(path),
              AllOf(StartsWith("<svg "), HasSubstr("layers.0.weight"),
                    HasSubstr("float32 [64, 32]"), HasSubstr(".distcp")));
  // Again, over what is there, and as a page.
  EXPECT_EQ(RunDsd({"plot", Model(), "-o", path, "--to", "2x2:R,S0"}).exit_code,
            kExitOk);
  EXPECT_THAT(ReadFile(path),
              AllOf(HasSubstr("replicated, ranks 0 and 1 more"),
                    HasSubstr("on several ranks"), HasSubstr("rank 3")));
  const std::string page = NewPath("plot") + ".html";
  EXPECT_EQ(RunDsd({"plot", Model(), "-o", page}).exit_code, kExitOk);
  EXPECT_THAT(ReadFile(page), AllOf(StartsWith("<!DOCTYPE html>"),
                                    HasSubstr("</svg>\n</body>")));
  result = RunDsd({"plot", Model(), "-o", "-"});
  EXPECT_THAT(result.out, StartsWith("<svg "));
  EXPECT_EQ(RunDsd({"plan", Model(), "--to", "4", "-o", path}).exit_code,
            kExitOk);
  EXPECT_THAT(ReadFile(path), HasSubstr("lower bound"));
}

TEST(PlotTest, KeysAreText) {
  const std::string dir =
      SaveCheckpoint({FloatTensor("a<script>&\"\x1b[31m", Dims{64, 64}),
                      FloatTensor("b", Dims{64})});
  const RunResult result = RunDsd({"plot", dir, "-o", "-"});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_THAT(result.out,
              AllOf(Not(HasSubstr("<script>")), Not(HasSubstr("\x1b")),
                    HasSubstr("a&lt;script&gt;&amp;&quot;\\033[31m")));
}

// However many tensors there are, the picture is of a size that can be looked
// at.
TEST(PlotTest, ManyTensors) {
  std::vector<TestTensor> tensors;
  for (int i = 0; i < 20000; ++i) {
    tensors.push_back(
        FloatTensor(absl::StrCat("layers.", i % 10, ".experts.", i), Dims{1}));
  }
  const RunResult result = RunDsd({"plot", SaveCheckpoint(tensors), "-o", "-"});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_LT(result.out.size(), 200000u);
}

TEST(PlotTest, OutputThatCannotBeWritten) {
  const RunResult result =
      RunDsd({"plot", Model(), "-o", "/no/such/place/plot.svg"});
  EXPECT_EQ(result.exit_code, kExitOutput);
  EXPECT_THAT(result.err, HasSubstr("/no/such/place/plot.svg"));
  EXPECT_EQ(RunDsd({"plot", Model()}).exit_code, kExitUsage);
  EXPECT_EQ(RunDsd({"plot", Model(), "-o", testing::TempDir()}).exit_code,
            kExitOutput);
}

// A file is put in the place of another one only.
TEST(PlotTest, OutputThatIsNoRegularFile) {
  const std::string path = absl::StrCat(testing::TempDir(), "/fifo.svg");
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  for (const RunResult& result :
       {RunDsd({"plot", Model(), "-o", path}),
        RunDsd({"plan", Model(), "--to", "4", "-o", path})}) {
    EXPECT_EQ(result.exit_code, kExitOutput);
    EXPECT_THAT(result.err,
                AllOf(HasSubstr(path), HasSubstr("no regular file")));
  }
  struct stat info = {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_TRUE(S_ISFIFO(info.st_mode));
}

TEST(PlotTest, NothingToDraw) {
  const std::string dir = SaveCheckpoint({FloatTensor("none", Dims{0, 3})});
  const RunResult result = RunDsd({"plot", dir, "-o", "-"});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_THAT(result.out, HasSubstr("no elements"));
}

}  // namespace
}  // namespace dsd::cli
