// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/cli.h"

#include <unistd.h>

#include <cmath>
#include <fstream>
#include <iterator>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/fake_env.h"
#include "dsd/core/base/version.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/cli/progress.h"
#include "dsd/frontends/cli/test_checkpoint.h"
#include "dsd/frontends/cli/text_table.h"
#include "dsd/frontends/cli/value_text.h"
#include "dsd/frontends/cli/verb.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace dsd::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

using Result = RunResult;

// A checkpoint of two tensors and three objects, in a directory of its own.
std::string MakeCheckpoint() {
  static int number = 0;
  const std::string dir =
      absl::StrCat(testing::TempDir(), "/cli_", getpid(), "_", number++);
  std::vector<float> weight(600), bias(3);
  std::iota(weight.begin(), weight.end(), 0);
  MemoryEndpoint endpoint;
  EXPECT_TRUE(endpoint
                  .AddLocal({"model.layer.weight", DType::kFloat32,
                             Layout::Replicated({3, 200}, {0})},
                            0, reinterpret_cast<std::byte*>(weight.data()))
                  .ok());
  EXPECT_TRUE(endpoint
                  .AddLocal({"model.layer.bias", DType::kFloat32,
                             Layout::Replicated({3}, {0})},
                            0, reinterpret_cast<std::byte*>(bias.data()))
                  .ok());
  checkpoint::State state;
  state.tensors = &endpoint;
  state.tensor_paths = {{std::string("model"), std::string("layer.weight")},
                        {std::string("model"), std::string("layer.bias")}};
  state.objects = {{{std::string("step")}, Object(1234)},
                   {{std::string("optim"), std::string("param_groups"),
                     int64_t{0}, std::string("betas")},
                    Object(Object::Tuple{{Object(0.9), Object(0.999)}})},
                   {{std::string("note")}, Object("two\nlines")}};
  EXPECT_TRUE(checkpoint::Save(dir, state).ok());
  return dir;
}

TEST(CliTest, ListsAsATable) {
  const Result result = RunDsd({"ls", MakeCheckpoint()});
  EXPECT_EQ(result.exit_code, kExitOk);
  const std::vector<std::string> lines = absl::StrSplit(result.out, '\n');
  EXPECT_EQ(lines[0],
            "KEY                         TYPE     SHAPE         SIZE  SHARDS  "
            "VALUE");
  EXPECT_EQ(lines[1],
            "model.layer.bias            float32  [3]           12 B       1");
  EXPECT_EQ(lines[2],
            "model.layer.weight          float32  [3, 200]  2.34 KiB       1");
  EXPECT_EQ(lines[3],
            "note                        str                                  "
            "'two\\nlines'");
  EXPECT_EQ(lines[4],
            "optim.param_groups.0.betas  tuple                                "
            "(0.9, 0.999)");
  EXPECT_EQ(lines[5],
            "step                        int                                  "
            "1234");
  EXPECT_THAT(result.out,
              HasSubstr("2 tensors, 2.36 KiB (603 elements in 2 shards); 3 "
                        "objects; 1 data file\n"));
}

TEST(CliTest, ListsAsATree) {
  const Result result = RunDsd({"ls", "--tree", MakeCheckpoint()});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_THAT(result.out, AllOf(HasSubstr("\nmodel\n├─ layer.weight "),
                                HasSubstr("\n└─ layer.bias "),
                                HasSubstr("\n└─ param_groups\n   └─ [0]\n"
                                          "      └─ betas ")));
}

TEST(CliTest, ListsAsJson) {
  const Result result =
      RunDsd({"ls", "--json", "--match", "e", MakeCheckpoint()});
  EXPECT_EQ(result.exit_code, kExitOk);
  const auto json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json["tensors"][0]["key"], "model.layer.weight");
  EXPECT_EQ(json["tensors"][0]["shape"], nlohmann::json({3, 200}));
  EXPECT_EQ(json["tensors"][0]["path"],
            nlohmann::json({"model", "layer.weight"}));
  EXPECT_EQ(json["tensors"][0]["chunks"][0]["offsets"], nlohmann::json({0, 0}));
  EXPECT_EQ(json["totals"]["bytes"], 2412);
  EXPECT_EQ(json["objects"][0]["value"], 1234);
  EXPECT_EQ(json["digests"], true);
}

TEST(CliTest, ListsKeys) {
  const std::string dir = MakeCheckpoint();
  EXPECT_EQ(RunDsd({"ls", "--keys", dir}).out,
            "model.layer.bias\nmodel.layer.weight\nnote\n"
            "optim.param_groups.0.betas\nstep\n");
  EXPECT_EQ(RunDsd({"ls", "--keys", "--match", "bias", dir}).out,
            "model.layer.bias\n");
}

TEST(CliTest, Summarizes) {
  const std::string dir = MakeCheckpoint();
  const Result result = RunDsd({"info", "--top", "1", dir});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_THAT(
      result.out,
      AllOf(HasSubstr("tensors  2, 2.36 KiB, 603 elements, 2 shards (none in "
                      "several)\n"),
            HasSubstr("float32        2       603  2.36 KiB  100.0%\n"),
            HasSubstr("model.layer.weight  float32  [3, 200]  2.34 KiB"),
            Not(HasSubstr("model.layer.bias"))));
  const auto json = nlohmann::json::parse(RunDsd({"info", "--json", dir}).out);
  EXPECT_EQ(json["dtypes"]["float32"]["elements"], 603);
  EXPECT_EQ(json["objects"], 3);
  EXPECT_EQ(json["largest"].size(), 2u);
  const std::string file = json["files"].begin().key();
  ASSERT_TRUE(Env::Real()->files().Remove(dir + "/" + file).ok());
  const Result torn = RunDsd({"info", dir});
  EXPECT_EQ(torn.exit_code, kExitProblems);
  EXPECT_THAT(torn.out, HasSubstr("1, 0 B, 1 MISSING"));
}

TEST(CliTest, NumbersOutOfRange) {
  const std::string dir = MakeCheckpoint();
  const struct {
    std::vector<std::string> arguments;  // the last one is refused
    const char* expected;
  } kCases[] = {
      {{"info", dir, "--top", "-1"}, "\"-1\", expected a number of 0 or more"},
      {{"info", dir, "--top", "1.5"},
       "\"1.5\", expected a number of 0 or more"},
      {{"plan", dir, "--to", "4", "--moves", "x"},
       "\"x\", expected a number of 0 or more"},
      {{"plan", dir, "--to", "4", "--ranks-per-host", "0"},
       "\"0\", expected a number of 1 or more"},
      {{"convert", dir, "/tmp/x", "--max-shard-size", "0"},
       "\"0\", expected a number of 1 or more"},
      {{"convert", dir, "/tmp/x", "--max-shard-size", "-1"},
       "\"-1\", expected a number of 1 or more"},
  };
  for (const auto& c : kCases) {
    const Result result = RunDsd(c.arguments);
    EXPECT_EQ(result.exit_code, kExitUsage);
    EXPECT_THAT(result.err, AllOf(HasSubstr(*std::prev(c.arguments.end(), 2)),
                                  HasSubstr(c.expected)));
  }
}

TEST(CliTest, ErrorsAreTextAndJson) {
  const Result result = RunDsd({"ls", "--json", "/no/such/place"});
  EXPECT_THAT(result.err, StartsWith("dsd: no checkpoint at"));
  EXPECT_EQ(nlohmann::json::parse(result.out)["code"], "NOT_FOUND");
}

TEST(ProgressTest, IsForTerminalsAndForWhatTakesLong) {
  FakeEnv env;
  std::ostringstream out, err;
  Context context{out, err};
  context.env = &env;
  {
    ProgressBar silent(context, "reading", 100);
    env.Advance(absl::Seconds(9));
    silent.Add(50);
  }
  EXPECT_EQ(err.str(), "");
  context.terminal.progress = true;
  {
    ProgressBar bar(context, "reading", 4 << 20);
    bar.Add(1 << 20);
    EXPECT_EQ(err.str(), "");
    env.Advance(absl::Seconds(2));
    bar.Add(1 << 20);
    EXPECT_THAT(err.str(),
                HasSubstr("\r\033[Kreading ████████████░░░░░░░░░░░░  50%  2.00 "
                          "MiB of 4.00 MiB  1.00 MiB/s"));
  }
  EXPECT_TRUE(absl::EndsWith(err.str(), "\r\033[K"));
  {
    ProgressBar bar(context, "verifying");
    env.Advance(absl::Seconds(2));
    bar.Show({1 << 20, 2 << 20});
    EXPECT_THAT(err.str(), HasSubstr(" 50%  1.00 MiB of 2.00 MiB  512 KiB/s"));
    env.Advance(absl::Seconds(2));
    bar.Show({2 << 20, 2 << 20});
    EXPECT_THAT(err.str(), HasSubstr("100%  2.00 MiB of 2.00 MiB  512 KiB/s"));
  }
  EXPECT_EQ(out.str(), "");
}

TEST(CliTest, VerifiesAndNamesDamage) {
  const std::string dir = MakeCheckpoint();
  Result result = RunDsd({"verify", dir});
  EXPECT_EQ(result.exit_code, kExitOk);
  EXPECT_THAT(result.out, HasSubstr("no problems"));
  EXPECT_THAT(result.out, HasSubstr("5 content digests"));

  const auto opened = checkpoint::Checkpoint::Open(dir);
  ASSERT_TRUE(opened.ok());
  for (const checkpoint::StoredChunk& chunk :
       {(*opened)->Chunks(0)[0], (*opened)->Chunks(1)[0]}) {
    std::fstream file(absl::StrCat(dir, "/", chunk.file),
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(chunk.offset_bytes + 704);
    file.put('\x7f');
  }
  result = RunDsd({"verify", dir});
  EXPECT_EQ(result.exit_code, kExitProblems);
  EXPECT_THAT(result.out, AllOf(HasSubstr("\"model.layer.weight\""),
                                HasSubstr("\"model.layer.bias\""),
                                HasSubstr("__0_0_"), HasSubstr("2 problems")));
  const auto json =
      nlohmann::json::parse(RunDsd({"verify", "--json", dir}).out);
  EXPECT_EQ(json["ok"], false);
  EXPECT_EQ(json["problems"].size(), 2u);
  EXPECT_EQ(json["problems"][0]["code"], "DATA_LOSS");
  EXPECT_EQ(RunDsd({"digest", dir}).exit_code, kExitProblems);

  // Damage of the index is a problem, and the rest is looked at all the same.
  {
    std::fstream file(
        absl::StrCat(dir, "/.metadata"),
        std::ios::in | std::ios::out | std::ios::binary | std::ios::ate);
    file.put('\0');
  }
  result = RunDsd({"verify", dir});
  EXPECT_EQ(result.exit_code, kExitProblems);
  EXPECT_THAT(result.out,
              AllOf(HasSubstr(".metadata"), HasSubstr("3 problems")));
  result = RunDsd({"ls", dir});
  EXPECT_EQ(result.exit_code, kExitProblems);
  EXPECT_THAT(result.err, HasSubstr("differs from what was written"));
  EXPECT_THAT(result.out, HasSubstr("2 tensors, 2.36 KiB"));
}

TEST(CliTest, DigestsDependOnContentOnly) {
  const Result a = RunDsd({"digest", MakeCheckpoint()});
  const Result b = RunDsd({"digest", MakeCheckpoint()});
  EXPECT_EQ(a.exit_code, kExitOk);
  EXPECT_EQ(a.out, b.out);
  const std::vector<std::string> lines = absl::StrSplit(a.out, '\n');
  ASSERT_EQ(lines.size(), 7u);
  EXPECT_THAT(lines[0], HasSubstr("  model.layer.bias"));
  EXPECT_THAT(lines[5], HasSubstr("  (all of it)"));
  const auto json =
      nlohmann::json::parse(RunDsd({"digest", "--json", MakeCheckpoint()}).out);
  EXPECT_EQ(json["whole"], lines[5].substr(0, 32));
  EXPECT_EQ(json["keys"]["model.layer.bias"], lines[0].substr(0, 32));
}

TEST(CliTest, SaysWhyThereIsNothing) {
  for (const char* verb : {"ls", "verify", "digest"}) {
    const Result nowhere = RunDsd({verb, "/no/such/place"});
    EXPECT_EQ(nowhere.exit_code, kExitUnreadable);
    EXPECT_EQ(nowhere.err,
              "dsd: no checkpoint at \"/no/such/place\": there is no such "
              "directory\n");
    EXPECT_EQ(nowhere.out, "");
  }
  const std::string dir = MakeCheckpoint();
  ASSERT_TRUE(Env::Real()->files().Remove(dir + "/.metadata").ok());
  const Result torn = RunDsd({"ls", dir});
  EXPECT_EQ(torn.exit_code, kExitUnreadable);
  EXPECT_THAT(torn.err, HasSubstr("is not complete: 1 data file but no index"));
}

TEST(CliTest, HelpAndUsage) {
  const Result help = RunDsd({"--help"});
  EXPECT_EQ(help.exit_code, kExitOk);
  EXPECT_THAT(help.out, AllOf(HasSubstr("ls"), HasSubstr("verify"),
                              HasSubstr("digest"), HasSubstr("Exit codes:")));
  EXPECT_THAT(RunDsd({"ls", "--help"}).out, HasSubstr("--tree"));
  const Result version = RunDsd({"--version"});
  EXPECT_EQ(version.exit_code, kExitOk);
  EXPECT_EQ(version.out, absl::StrCat("dsd ", kLibraryVersion, "\n"));
  EXPECT_EQ(RunDsd({}).exit_code, kExitUsage);
  EXPECT_EQ(RunDsd({"ls"}).exit_code, kExitUsage);
  const Result unknown = RunDsd({"explode", "x"});
  EXPECT_EQ(unknown.exit_code, kExitUsage);
  EXPECT_EQ(unknown.err,
            "dsd: there is no command \"explode\"; dsd --help lists all\n");
  EXPECT_EQ(RunDsd({"verfy", "x"}).err,
            "dsd: there is no command \"verfy\"; did you mean \"verify\"?\n");
  EXPECT_EQ(RunDsd({"ls"}).err,
            "dsd: checkpoint is required; see dsd ls --help\n");
  EXPECT_EQ(RunDsd({"ls", "x", "--frobnicate"}).exit_code, kExitUsage);
}

TEST(TextTest, SizesAndCounts) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1536), "1.50 KiB");
  EXPECT_EQ(FormatBytes(int64_t{1} << 30), "1.00 GiB");
  EXPECT_EQ(FormatBytes((int64_t{1} << 30) - 1), "1.00 GiB");
  EXPECT_EQ(FormatBytes(123456789), "118 MiB");
  EXPECT_EQ(FormatCount(0), "0");
  EXPECT_EQ(FormatCount(999), "999");
  EXPECT_EQ(FormatCount(1000), "1,000");
  EXPECT_EQ(FormatCount(-1234567), "-1,234,567");
  EXPECT_EQ(Plural(1, "shard"), "1 shard");
  EXPECT_EQ(Plural(2000, "shard"), "2,000 shards");
}

TEST(TextTest, ValuesAsPythonShowsThem) {
  Object::Dict dict;
  dict.Set(PathSegment(std::string("a")), Object(Object::Tuple{{Object(1)}}));
  dict.Set(PathSegment(int64_t{2}), Object(Bytes{"xyz"}));
  dict.Set(PathSegment(std::string("c")), Object(Opaque{"numpy.ndarray"}));
  const Object value(std::move(dict));
  EXPECT_EQ(ValueText(value, 100),
            "{'a': (1,), 2: <3 bytes>, 'c': <numpy.ndarray>}");
  EXPECT_EQ(ValueText(value, 9), "{'a': (1,...");
  EXPECT_EQ(ValueText(Object(0.001), 100), "0.001");
  EXPECT_EQ(ValueText(Object(-HUGE_VAL), 100), "-inf");
  EXPECT_EQ(ValueText(Object(std::string(1000, 'x')), 10), "'xxxxxxxxx...");
  EXPECT_EQ(Printable("\x1b[31mred"), "\\033[31mred");
  EXPECT_EQ(Printable("h\xc3\xa9"), "h\xc3\xa9");
  EXPECT_EQ(Printable("bad \xff"), "bad \\xff");
  EXPECT_EQ(Printable("it's \"it\""), "it's \"it\"");
  EXPECT_EQ(ValueJson(value).dump(),
            "{\"a\":[1],\"2\":{\"bytes\":\"78797a\"},\"c\":{\"class\":\"numpy."
            "ndarray\"}}");
  EXPECT_EQ(ValueJson(Object(Object::Map{{Object(2.5)}, {Object("x")}})).dump(),
            "[[2.5,\"x\"]]");
}

}  // namespace
}  // namespace dsd::cli
