// SPDX-License-Identifier: Apache-2.0

#include <cmath>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/core/layout/random_layout.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/cli/compare.h"
#include "dsd/frontends/cli/test_checkpoint.h"
#include "dsd/testing/harness/test_seed.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace dsd::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

nlohmann::json JsonOf(std::vector<std::string> arguments) {
  arguments.push_back("--json");
  return nlohmann::json::parse(RunDsd(arguments).out);
}

Layout Rows(Dims shape, int ranks, int dim = 0) {
  return *Layout::FromPlacements(std::move(shape), DeviceMesh::Iota({ranks}),
                                 {Shard(dim)});
}

std::vector<checkpoint::ObjectEntry> Step(int step) {
  return {{{std::string("step")}, Object(step)}};
}

TEST(DiffTest, LayoutsDoNotMatter) {
  const std::string a =
      SaveCheckpoint({FloatTensor("w", Dims{10, 300})}, Step(3));
  const std::string b =
      SaveCheckpoint({FloatTensor("w", Rows({10, 300}, 4))}, Step(3), 4);
  const std::string c =
      SaveCheckpoint({FloatTensor("w", Rows({10, 300}, 3, 1))}, Step(3), 3);
  for (const auto& [x, y] :
       {std::make_pair(a, b), std::make_pair(b, c), std::make_pair(c, a)}) {
    const RunResult result = RunDsd({"diff", x, y});
    EXPECT_EQ(result.exit_code, kExitOk);
    EXPECT_EQ(result.out,
              "the same; 1 tensor (11.7 KiB) and 1 object compared bit by "
              "bit\n");
    EXPECT_EQ(RunDsd({"diff", "-q", x, y}).exit_code, kExitOk);
    EXPECT_EQ(JsonOf({"diff", x, y})["same"], true);
  }
}

TEST(DiffTest, ListsWhatDiffers) {
  TestTensor changed = FloatTensor("changed", Dims{3, 200});
  auto* values = reinterpret_cast<float*>(changed.bytes.data());
  values[205] = 206.5;
  values[599] = 0;
  std::string bits = Floats(4);
  const std::string a = SaveCheckpoint(
      {FloatTensor("changed", Dims{3, 200}),
       FloatTensor("gone", Dims{2, 2}),
       FloatTensor("same", Dims{5}),
       FloatTensor("shape", Dims{2, 3}),
       {"type", DType::kFloat32, Layout::Replicated({4}, {0}), bits},
       FloatTensor("x", Dims{1})},
      Step(3));
  const std::string b = SaveCheckpoint(
      {changed,
       FloatTensor("new", Dims{7}),
       FloatTensor("same", Dims{5}),
       FloatTensor("shape", Dims{3, 2}),
       {"type", DType::kInt32, Layout::Replicated({4}, {0}), bits}},
      {{{std::string("step")}, Object(4)}, {{std::string("x")}, Object(1)}});
  const RunResult result = RunDsd({"diff", a, b});
  EXPECT_EQ(result.exit_code, kExitProblems);
  EXPECT_EQ(result.out,
            "   KEY      DIFFERENCE\n"
            "~  changed  2 of 600 elements differ, first [1, 5]: 205.0, in B "
            "206.5; at most by 599, relative 0.00726\n"
            "-  gone     only in A: float32 [2, 2]\n"
            "+  new      only in B: float32 [7]\n"
            "~  shape    shape [2, 3], in B [3, 2]\n"
            "~  step     3, in B 4\n"
            "~  type     float32, in B int32\n"
            "~  x        float32 [1], in B an object\n"
            "\n"
            "7 keys differ; 4 tensors (2.36 KiB) and 1 object compared bit by "
            "bit\n");
  const nlohmann::json json = JsonOf({"diff", a, b});
  EXPECT_EQ(json["same"], false);
  EXPECT_EQ(json["differences"].size(), 7u);
  EXPECT_EQ(json["differences"][0]["what"], "values");
  EXPECT_EQ(json["differences"][0]["elements"], 2);
  EXPECT_EQ(json["differences"][0]["first"], nlohmann::json({1, 5}));
  EXPECT_EQ(json["differences"][0]["max_abs"], 599.0);
  EXPECT_EQ(json["differences"][3]["what"], "shape");
  const RunResult quiet = RunDsd({"diff", "--quiet", a, b});
  EXPECT_EQ(quiet.exit_code, kExitProblems);
  EXPECT_EQ(quiet.out, "");
  EXPECT_EQ(RunDsd({"diff", a, b, "--match", "same"}).exit_code, kExitOk);
}

TEST(DiffTest, Tolerances) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const auto save = [](std::vector<float> values) {
    const int64_t count = static_cast<int64_t>(values.size());
    return SaveCheckpoint(
        {{"w", DType::kFloat32, Layout::Replicated({count}, {0}),
          BytesOf(values)}});
  };
  const std::string a = save({1, 100, 0, nan, inf});
  const std::string b = save({1.001f, 100.1f, -0.0f, -nan, inf});
  const auto code = [](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "diff");
    return RunDsd(arguments).exit_code;
  };
  EXPECT_EQ(code({a, b}), kExitProblems);
  EXPECT_EQ(code({a, b, "--rtol", "0.0011"}), kExitOk);
  EXPECT_EQ(code({a, b, "--rtol", "0.0009"}), kExitProblems);
  EXPECT_EQ(code({a, b, "--atol", "0.2"}), kExitOk);
  EXPECT_EQ(code({a, b, "--atol", "0.05"}), kExitProblems);
  EXPECT_EQ(code({a, b, "--atol", "0.05", "--rtol", "0.0006"}), kExitOk);
  EXPECT_EQ(code({a, save({1, 100, 0, nan, -inf}), "--rtol", "1e300"}),
            kExitProblems);
  EXPECT_EQ(code({a, b, "--atol", "inf"}), kExitUsage);
  EXPECT_EQ(code({a, save({1, 100, 0, 0, inf}), "--atol", "9"}), kExitProblems);
  EXPECT_EQ(code({a, b, "--rtol", "-1"}), kExitUsage);
  EXPECT_EQ(code({a, b, "--rtol", "nan"}), kExitUsage);
}

TEST(DiffTest, NumbersOfOtherTypes) {
  const std::string a = SaveCheckpoint({FloatTensor("w", Dims{4})});
  const std::string b =
      SaveCheckpoint({{"w", DType::kBFloat16, Layout::Replicated({4}, {0}),
                       BytesOf<uint16_t>({0, 0x3f80, 0x4000, 0x4040})}});
  EXPECT_EQ(RunDsd({"diff", a, b}).exit_code, kExitProblems);
  EXPECT_EQ(RunDsd({"diff", a, b, "--ignore-dtype"}).exit_code, kExitOk);
  const std::string c =
      SaveCheckpoint({{"w", DType::kInt64, Layout::Replicated({4}, {0}),
                       BytesOf<int64_t>({0, 1, 2, 4})}});
  EXPECT_THAT(RunDsd({"diff", b, c, "--ignore-dtype"}).out,
              HasSubstr("1 of 4 elements differs, first [3]: 3.0, in B 4; at "
                        "most by 1, relative 0.25"));
}

TEST(DiffTest, PrefixesOfKeys) {
  const std::string a = SaveCheckpoint(
      {FloatTensor("model.w", Dims{4}), FloatTensor("optim.w", Dims{4}, 9)});
  const std::string b = SaveCheckpoint({FloatTensor("w", Dims{4})});
  EXPECT_EQ(RunDsd({"diff", a, b}).exit_code, kExitProblems);
  EXPECT_EQ(RunDsd({"diff", a, b, "--a-prefix", "model."}).exit_code, kExitOk);
  EXPECT_EQ(RunDsd({"diff", b, a, "--b-prefix", "optim."}).exit_code,
            kExitProblems);
}

// A difference is told from trouble by the exit code.
TEST(DiffTest, TroubleIsNoDifference) {
  const std::string a = SaveCheckpoint(
      {FloatTensor("w", Dims{600}), FloatTensor("v", Dims{600})});
  const std::string b = SaveCheckpoint(
      {FloatTensor("w", Dims{600}), FloatTensor("v", Dims{600})});
  EXPECT_EQ(RunDsd({"diff", a, "/no/such/place"}).exit_code, kExitUnreadable);
  EXPECT_THAT(RunDsd({"diff", "/no/such/place", b}).err,
              HasSubstr("no checkpoint at \"/no/such/place\""));
  const auto opened = checkpoint::Checkpoint::Open(b);
  ASSERT_TRUE(opened.ok());
  const checkpoint::StoredChunk chunk = (*opened)->Chunks(0)[0];
  const std::string file = absl::StrCat(b, "/", chunk.file);
  {
    std::fstream out(file, std::ios::in | std::ios::out | std::ios::binary);
    out.seekp(chunk.offset_bytes + 704);
    out.put('\x7f');
  }
  RunResult result = RunDsd({"diff", a, b});
  EXPECT_EQ(result.exit_code, kExitUnreadable);
  EXPECT_THAT(result.err, AllOf(HasSubstr("dsd: B: "), HasSubstr("\"w\"")));
  ASSERT_TRUE(Env::Real()->files().Remove(file).ok());
  result = RunDsd({"diff", a, b});
  EXPECT_EQ(result.exit_code, kExitUnreadable);
  EXPECT_THAT(result.out, HasSubstr("?  w    not compared: B: "));
}

// Random layouts on both sides, with a few elements changed: the count, the
// first and the greatest difference are those of a plain loop.
TEST(DiffTest, EqualsAPlainLoop) {
  test::Random random(test::TestSeed());
  for (int round = 0; round < 20; ++round) {
    const std::vector<int64_t> shape = test::RandomShape(random, 3000);
    const auto layout = [&] {
      test::RandomLayoutOptions options;
      options.holders = {0, 1};
      return *test::BuildLayout(test::RandomLayoutSpec(random, shape, options));
    };
    TestTensor a = FloatTensor("w", layout());
    TestTensor b = FloatTensor("w", layout());
    const int64_t count = a.layout.whole().num_elements();
    int64_t first = -1, different = 0;
    double max_abs = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (test::Uniform(random, 0, 99) > 2) continue;
      auto* value = reinterpret_cast<float*>(b.bytes.data()) + i;
      const float before = *value;
      *value += static_cast<float>(test::Uniform(random, 1, 100));
      ++different;
      if (first < 0) first = i;
      max_abs = std::max(max_abs, static_cast<double>(*value - before));
    }
    const nlohmann::json json = JsonOf(
        {"diff", SaveCheckpoint({a}, {}, 2), SaveCheckpoint({b}, {}, 2)});
    EXPECT_EQ(json["same"], different == 0);
    if (different == 0) continue;
    const nlohmann::json& found = json["differences"][0];
    EXPECT_EQ(found["elements"], different);
    EXPECT_EQ(found["max_abs"], max_abs);
    const std::vector<int64_t> at = found["first"];
    EXPECT_EQ(FlatIndex(shape, at), first);
  }
}

TEST(CompareTest, IntegersAreNotRounded) {
  const int64_t most = std::numeric_limits<int64_t>::max();
  const auto compare = [](DType a, const std::string& bytes_a, DType b,
                          const std::string& bytes_b) {
    Comparison comparison(a, b, {1}, {});
    const auto span = [](const std::string& bytes) {
      return absl::MakeConstSpan(
          reinterpret_cast<const std::byte*>(bytes.data()), bytes.size());
    };
    comparison.Add(Box::Whole({1}), 0, span(bytes_a), span(bytes_b));
    return comparison.difference();
  };
  Difference d = compare(DType::kInt64, BytesOf<int64_t>({most}), DType::kInt64,
                         BytesOf<int64_t>({most - 1}));
  EXPECT_EQ(d.elements, 1);
  EXPECT_EQ(*d.max_abs, 1);
  d = compare(DType::kInt64, BytesOf<int64_t>({-most}), DType::kUInt64,
              BytesOf<uint64_t>({1}));
  EXPECT_EQ(*d.max_abs, 0x1p63);
  d = compare(DType::kInt64, BytesOf<int64_t>({most}), DType::kUInt64,
              BytesOf<uint64_t>({static_cast<uint64_t>(most)}));
  EXPECT_EQ(d.elements, 0);
}

TEST(CompareTest, Objects) {
  const auto dict = [](Object value) {
    Object::Dict out;
    out.Set(PathSegment(std::string("betas")),
            Object(Object::Tuple{{Object(0.9), std::move(value)}}));
    return Object(std::move(out));
  };
  std::string where;
  EXPECT_EQ(CompareObjects(dict(0.99), dict(0.99), {}, &where),
            ObjectVerdict::kSame);
  EXPECT_EQ(CompareObjects(dict(0.99), dict(0.95), {}, &where),
            ObjectVerdict::kDifferent);
  EXPECT_EQ(where, "['betas'][1]: 0.99, in B 0.95");
  EXPECT_EQ(CompareObjects(dict(0.99), dict(0.95), {0.1, {}}, &where),
            ObjectVerdict::kSame);
  EXPECT_EQ(CompareObjects(dict(std::nan("")), dict(std::nan("")), {}, &where),
            ObjectVerdict::kSame);
  EXPECT_EQ(CompareObjects(dict(1), dict(1.0), {}, &where),
            ObjectVerdict::kDifferent);
  EXPECT_EQ(where, "['betas'][1]: 1, in B 1.0");
  EXPECT_EQ(CompareObjects(Object(Object::List{}), Object(Object::Tuple{}), {},
                           &where),
            ObjectVerdict::kDifferent);
  EXPECT_EQ(where, "[], in B ()");
  EXPECT_EQ(CompareObjects(dict(1), Object(Object::Dict()), {}, &where),
            ObjectVerdict::kDifferent);
  EXPECT_EQ(where, "['betas']: missing in B");
  const Object opaque = dict(Object(Opaque{"a.B"}));
  EXPECT_EQ(CompareObjects(opaque, opaque, {}, &where),
            ObjectVerdict::kUnknown);
  const Object dtype = dict(Object(Opaque{"torch.float32"}));
  EXPECT_EQ(CompareObjects(dtype, dtype, {}, &where), ObjectVerdict::kSame);
  EXPECT_EQ(
      CompareObjects(dtype, dict(Object(Opaque{"torch.float16"})), {}, &where),
      ObjectVerdict::kDifferent);
}

}  // namespace
}  // namespace dsd::cli
