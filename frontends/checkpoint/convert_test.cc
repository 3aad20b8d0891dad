// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/convert.h"

#include <cmath>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/fake_env.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/export.h"
#include "dsd/frontends/checkpoint/rename_rules.h"
#include "dsd/frontends/checkpoint/test_state.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

constexpr uint64_t kSeed = 3;

PathSegment T(const char* text) { return std::string(text); }

TEST(RenameRulesTest, StarsStandForTheShortestTexts) {
  const auto apply = [](std::vector<std::string> rules, const char* key) {
    RenameRules all;
    for (const std::string& rule : rules) {
      EXPECT_TRUE(all.Add(rule).ok()) << rule;
    }
    return all.Apply(key);
  };
  EXPECT_EQ(apply({"model.*=*"}, "model.a.b"), "a.b");
  EXPECT_EQ(apply({"model.*=*"}, "models.a"), "models.a");
  EXPECT_EQ(apply({"*=model.*"}, "a"), "model.a");
  EXPECT_EQ(apply({"a=b"}, "a"), "b");
  EXPECT_EQ(apply({"a=b"}, "aa"), "aa");
  EXPECT_EQ(apply({"*.attn.qkv.*=*.attention.*"}, "h.0.attn.qkv.weight"),
            "h.0.attention.weight");
  EXPECT_EQ(apply({"*.w*=*.v*"}, "a.w.b.w.c"), "a.v.b.w.c");
  EXPECT_EQ(apply({"a*a=*"}, "a"), "a");  // the two are not one
  EXPECT_EQ(apply({"a*a=x*"}, "aa"), "x");
  EXPECT_EQ(apply({"*b*=*"}, "abc"), "a");
  EXPECT_EQ(apply({"x*=1", "*=2"}, "x1"), "1");
  EXPECT_EQ(apply({"x*=1", "*=2"}, "y"), "2");
  EXPECT_EQ(apply({"a=b=c"}, "a"), "b=c");
  RenameRules rules;
  for (const char* bad : {"", "a", "=", "=b", "a=", "a=*", "*=**"}) {
    EXPECT_EQ(rules.Add(bad).code(), absl::StatusCode::kInvalidArgument) << bad;
  }
  EXPECT_TRUE(rules.empty());
}

TEST(RenameRulesTest, PathsKeepWhatHasNotChanged) {
  const Path path = {T("model"), T("layers.0"), T("weight")};
  const auto renamed = [&](const char* key) { return RenamedPath(path, key); };
  EXPECT_EQ(renamed("model.layers.0.weight"), path);
  EXPECT_EQ(renamed("net.layers.0.weight"),
            Path({T("net"), T("layers.0"), T("weight")}));
  EXPECT_EQ(renamed("layers.0.weight"), Path({T("layers.0"), T("weight")}));
  EXPECT_EQ(renamed("model.blocks.0.weight"),
            Path({T("model"), T("blocks.0"), T("weight")}));
  EXPECT_EQ(renamed("model.layers.0.w"),
            Path({T("model"), T("layers.0"), T("w")}));
  EXPECT_EQ(renamed("x.model.layers.0.weight"),
            Path({T("x"), T("model"), T("layers.0"), T("weight")}));
  EXPECT_EQ(renamed("q"), Path({T("q")}));
  for (const char* key : {"model.weight", "weight", "model.layers.0", "model",
                          "model.model.weight", "x.weight.weight"}) {
    EXPECT_EQ(JoinPath(renamed(key)), key);
  }
  const Path list = {T("groups"), int64_t{0}, T("lr")};
  EXPECT_EQ(RenamedPath(list, "all.0.lr"),
            Path({T("all"), int64_t{0}, T("lr")}));
}

std::vector<TestTensor> Tensors(int ranks) {
  const DeviceMesh mesh = DeviceMesh::Iota({ranks});
  return {{{T("model"), T("w")},
           DType::kFloat32,
           *Layout::FromPlacements({9, 7}, mesh, {Shard(0)})},
          {{T("model"), T("b")},
           DType::kBFloat16,
           *Layout::FromPlacements({4, 2, 3}, mesh, {Shard(2)})},
          {{T("empty")},
           DType::kInt64,
           *Layout::FromPlacements({0, 2}, mesh, {Replicate()})},
          {{T("scalar")},
           DType::kFloat64,
           *Layout::FromPlacements({}, mesh, {Replicate()})}};
}

std::vector<ObjectEntry> Objects() {
  return {{{T("step")}, Object(1234)},
          {{T("optim"), T("param_groups"), int64_t{0}, T("betas")},
           Object(Object::Tuple{{Object(0.9), Object(0.999)}})},
          {{T("dtype")}, Object(Opaque{"torch.bfloat16"})}};
}

class ConvertTest : public testing::Test {
 protected:
  void SetUp() override {
    SaveOptions options;
    options.env = &env_;
    ASSERT_THAT(
        StatusOfRanks(
            3,
            [&](Communicator& comm) {
              TestState state =
                  TestState::Filled(Tensors(3), comm.rank(), kSeed, Objects());
              return Save("/dcp", state.state(), &comm, options).status();
            }),
        AllOk());
  }

  ConvertOptions Options(std::optional<Format> format = std::nullopt) {
    ConvertOptions options;
    options.env = &env_;
    options.format = format;
    return options;
  }

  absl::Status Run(const std::string& from, const std::string& to,
                   const ConvertOptions& options) {
    return Convert(from, to, options).status();
  }

  std::string Whole(const std::string& path) {
    const auto opened = Checkpoint::Open(path, {true, &env_});
    if (!opened.ok()) return std::string(opened.status().message());
    const auto digests = ComputeDigests(**opened);
    return digests.ok() ? absl::StrCat(absl::StrJoin(
                              digests->keys, "\n",
                              [](std::string* out, const KeyDigest& key) {
                                absl::StrAppend(out, key.key, " ",
                                                DigestHex(key.digest));
                              }))
                        : std::string(digests.status().message());
  }

  FakeEnv env_;
};

TEST_F(ConvertTest, AllFormatsIntoAllAndBack) {
  const std::string original = Whole("/dcp");
  ConvertOptions drop = Options(Format::kSafetensors);
  drop.drop_objects = true;
  const auto report = Convert("/dcp", "/s.safetensors", drop);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->from, Format::kDcp);
  EXPECT_EQ(report->to, Format::kSafetensors);
  EXPECT_EQ(report->tensors, 4);
  EXPECT_THAT(report->dropped_objects,
              ElementsAre("dtype", "optim.param_groups.0.betas", "step"));
  const std::string tensors = Whole("/s.safetensors");
  EXPECT_NE(tensors, original);

  const std::vector<std::pair<std::string, Format>> targets = {
      {"a.pt", Format::kTorchArchive},
      {"d", Format::kDcp},
      {"dir", Format::kSafetensors},
      {"b.pth", Format::kTorchArchive}};
  int number = 0;
  // To a place of its own; checks what is there.
  const auto convert = [&](const std::string& from,
                           const std::pair<std::string, Format>& target,
                           bool objects) {
    ConvertOptions options = Options(target.second);
    options.drop_objects = target.second == Format::kSafetensors;
    options.max_file_bytes = 100;
    const std::string to = absl::StrCat("/out/", number++, "/", target.first);
    const absl::Status status = Run(from, to, options);
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(Whole(to), objects ? original : tensors) << from << " " << to;
    EXPECT_THAT(Verify(**Checkpoint::Open(to, {true, &env_})).problems,
                IsEmpty());
    return to;
  };
  for (const std::string from : {"/dcp", "/s.safetensors"}) {
    for (const auto& middle : targets) {
      const bool kept = from == "/dcp" && middle.second != Format::kSafetensors;
      const std::string to = convert(from, middle, kept);
      for (const auto& last : targets) {
        convert(to, last, kept && last.second != Format::kSafetensors);
      }
    }
  }
}

TEST_F(ConvertTest, NestingComesThrough) {
  ASSERT_TRUE(Run("/dcp", "/a.pt", Options()).ok());
  const auto opened = Checkpoint::Open("/a.pt", {true, &env_});
  ASSERT_TRUE(opened.ok());
  EXPECT_EQ((*opened)->format(), Format::kTorchArchive);
  std::vector<Path> paths;
  for (size_t i = 0; i < (*opened)->catalog().size(); ++i) {
    paths.push_back((*opened)->tensor_path(i));
  }
  for (const StoredObject& object : (*opened)->objects()) {
    paths.push_back(object.path);
  }
  EXPECT_THAT(paths,
              UnorderedElementsAre(
                  Path({T("model"), T("w")}), Path({T("model"), T("b")}),
                  Path({T("empty")}), Path({T("scalar")}), Path({T("step")}),
                  Path({T("optim"), T("param_groups"), int64_t{0}, T("betas")}),
                  Path({T("dtype")})));
}

TEST_F(ConvertTest, RenamesAndCasts) {
  ConvertOptions options = Options();
  options.dtype = DType::kBFloat16;
  ASSERT_TRUE(options.rename.Add("model.*=*").ok());
  ASSERT_TRUE(options.rename.Add("scalar=one.scalar").ok());
  const auto report = Convert("/dcp", "/a.pt", options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->renamed, 3);
  EXPECT_EQ(report->cast, 2);
  const auto opened = Checkpoint::Open("/a.pt", {true, &env_});
  ASSERT_TRUE(opened.ok());
  std::map<std::string, DType> dtypes;
  for (const TensorSpec& spec : (*opened)->catalog().tensors()) {
    dtypes[spec.fqn] = spec.dtype;
  }
  EXPECT_EQ(dtypes,
            (std::map<std::string, DType>{{"w", DType::kBFloat16},
                                          {"b", DType::kBFloat16},
                                          {"empty", DType::kInt64},
                                          {"one.scalar", DType::kBFloat16}}));
}

TEST_F(ConvertTest, CastsValues) {
  std::vector<float> values = {1, -2.5f, 1e-8f, 65504, 3e38f};
  MemoryEndpoint endpoint;
  ASSERT_TRUE(
      endpoint
          .AddLocal({"x", DType::kFloat32, Layout::Replicated({5}, {0})}, 0,
                    reinterpret_cast<std::byte*>(values.data()))
          .ok());
  State state;
  state.tensors = &endpoint;
  ExportOptions save;
  save.env = &env_;
  ASSERT_TRUE(
      Export("/x.safetensors", Format::kSafetensors, state, nullptr, save)
          .ok());
  ConvertOptions options = Options();
  options.dtype = DType::kFloat16;
  ASSERT_TRUE(Run("/x.safetensors", "/h.safetensors", options).ok());
  options.dtype = DType::kFloat64;
  ASSERT_TRUE(Run("/h.safetensors", "/d.safetensors", options).ok());
  const auto opened = Checkpoint::Open("/d.safetensors", {true, &env_});
  ASSERT_TRUE(opened.ok());
  double read[5];
  ASSERT_TRUE((*(*opened)->MakeEndpoint())
                  ->Read(0, Box::Whole({5}), 0, 5, DType::kFloat64,
                         absl::MakeSpan(reinterpret_cast<std::byte*>(read),
                                        sizeof(read)))
                  .ok());
  EXPECT_THAT(read, ElementsAre(1, -2.5, 0, 65504, HUGE_VAL));
}

// Stored once in archives, by whatever way; twice elsewhere.
TEST_F(ConvertTest, TiedTensorsStayTied) {
  const auto whole = [](Dims shape) {
    return Layout::Replicated(std::move(shape), {0});
  };
  std::vector<float> one(6, 1.5f), other(6, 2.5f);
  MemoryEndpoint endpoint;
  for (const auto& [name, values] :
       {std::pair("embed", &one), std::pair("other", &other),
        std::pair("head", &one)}) {
    ASSERT_TRUE(endpoint
                    .AddLocal({name, DType::kFloat32, whole({2, 3})}, 0,
                              reinterpret_cast<std::byte*>(values->data()))
                    .ok());
  }
  State state;
  state.tensors = &endpoint;
  ExportOptions save;
  save.env = &env_;
  const auto apart =
      Export("/apart.pt", Format::kTorchArchive, state, nullptr, save);
  ASSERT_TRUE(apart.ok()) << apart.status();
  EXPECT_EQ(apart->payload_bytes, 72);
  state.same_as = {0, 1, 0};
  const auto tied =
      Export("/tied.pt", Format::kTorchArchive, state, nullptr, save);
  ASSERT_TRUE(tied.ok()) << tied.status();
  EXPECT_EQ(tied->payload_bytes, 48);
  EXPECT_EQ(Whole("/tied.pt"), Whole("/apart.pt"));
  const auto same = [&](const std::string& path) {
    const auto opened = Checkpoint::Open(path, {true, &env_});
    EXPECT_TRUE(opened.ok()) << opened.status();
    EXPECT_THAT(Verify(**opened).problems, IsEmpty());
    std::vector<std::pair<std::string, std::string>> pairs;
    const std::vector<size_t>& same_as = (*opened)->same_as();
    for (size_t i = 0; i < same_as.size(); ++i) {
      if (same_as[i] == i) continue;
      pairs.emplace_back((*opened)->catalog()[same_as[i]].fqn,
                         (*opened)->catalog()[i].fqn);
    }
    return pairs;
  };
  EXPECT_THAT(same("/apart.pt"), IsEmpty());
  EXPECT_THAT(same("/tied.pt"), ElementsAre(testing::Pair("embed", "head")));
  ConvertOptions cast = Options();
  cast.dtype = DType::kBFloat16;
  const auto half = Convert("/tied.pt", "/half.pt", cast);
  ASSERT_TRUE(half.ok()) << half.status();
  EXPECT_EQ(half->payload_bytes, 24);
  EXPECT_THAT(same("/half.pt"), ElementsAre(testing::Pair("embed", "head")));
  ASSERT_TRUE(Run("/tied.pt", "/s.safetensors", Options()).ok());
  EXPECT_EQ(Whole("/s.safetensors"), Whole("/apart.pt"));

  for (const std::vector<size_t>& bad :
       std::vector<std::vector<size_t>>{{0}, {2, 1, 2}, {0, 0, 1}}) {
    state.same_as = bad;
    EXPECT_EQ(Export("/bad.pt", Format::kTorchArchive, state, nullptr, save)
                  .status()
                  .code(),
              absl::StatusCode::kInvalidArgument);
  }
  // Damage is found in the source, also if one of the two is not read.
  std::string bytes = *env_.fake_files().Content("/tied.pt");
  bytes[bytes.find(
      std::string(reinterpret_cast<const char*>(one.data()), 24))] ^= 1;
  env_.fake_files().SetContent("/tied.pt", bytes);
  EXPECT_EQ(Run("/tied.pt", "/again.pt", Options()).code(),
            absl::StatusCode::kDataLoss);
}

TEST_F(ConvertTest, SaysWhatIsInTheWay) {
  const auto refused = [&](const std::string& to, const ConvertOptions& options,
                           absl::StatusCode code, const std::string& text,
                           const std::string& from = "/dcp") {
    const absl::Status status = Run(from, to, options);
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  };
  using Code = absl::StatusCode;
  refused("/out", Options(), Code::kInvalidArgument, "give a format");
  refused("/out.safetensors", Options(), Code::kFailedPrecondition,
          "3 objects, for which safetensors has no place: dtype, "
          "optim.param_groups.0.betas, step");
  refused("/dcp", Options(Format::kDcp), Code::kAlreadyExists,
          "is there already");
  refused("/out.pt", Options(), Code::kNotFound, "no checkpoint", "/nowhere");
  ConvertOptions merge = Options();
  ASSERT_TRUE(merge.rename.Add("model.*=x").ok());
  refused("/out.pt", merge, Code::kFailedPrecondition, "model.w, model.b -> x");
  ConvertOptions integers = Options();
  integers.dtype = DType::kInt8;
  refused("/out.pt", integers, Code::kInvalidArgument, "cannot be cast");
  ConvertOptions conflict = Options();
  ASSERT_TRUE(conflict.rename.Add("scalar=model").ok());
  refused("/out.pt", conflict, Code::kInvalidArgument, "lie inside it");
  // Nothing of all that is there.
  EXPECT_THAT(*env_.files().List("/"), ElementsAre("dcp"));

  ASSERT_TRUE(Run("/dcp", "/out.pt", Options()).ok());
  ConvertOptions over = Options(Format::kDcp);
  over.overwrite = true;
  refused("/out.pt", over, Code::kFailedPrecondition, "no directory of a DCP");
  over.format = Format::kSafetensors;
  over.drop_objects = true;
  refused("/dcp", over, Code::kFailedPrecondition, "has a DCP checkpoint");
  // In place.
  over.format = std::nullopt;
  over.dtype = DType::kFloat16;
  ASSERT_TRUE(Run("/out.pt", "/out.pt", over).ok());
  EXPECT_EQ((*Checkpoint::Open("/out.pt", {true, &env_}))->catalog()[0].dtype,
            DType::kFloat16);
}

// What stored digests do not confirm is not passed on.
TEST_F(ConvertTest, DamageStaysBehind) {
  const auto opened = Checkpoint::Open("/dcp", {true, &env_});
  ASSERT_TRUE(opened.ok());
  const StoredChunk chunk = (*opened)->Chunks(0)[1];
  const std::string file = absl::StrCat("/dcp/", chunk.file);
  std::string bytes = *env_.fake_files().Content(file);
  bytes[chunk.offset_bytes + 704] ^= 1;
  env_.fake_files().SetContent(file, bytes);
  ConvertOptions options = Options();
  options.drop_objects = true;
  for (const std::string to : {"/out.pt", "/out.safetensors"}) {
    EXPECT_EQ(Run("/dcp", to, options).code(), absl::StatusCode::kDataLoss);
  }
  options.format = Format::kDcp;
  EXPECT_EQ(Run("/dcp", "/out", options).code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(*env_.files().List("/"), ElementsAre("dcp"));
  options.verify = false;
  EXPECT_TRUE(Run("/dcp", "/out", options).ok());
}

TEST_F(ConvertTest, AttributesGoWithSafetensorsOnly) {
  TestState state = TestState::Filled(Tensors(1), 0, kSeed);
  ExportOptions save;
  save.env = &env_;
  save.attributes = {{"format", "np"}, {"author", "n. n."}};
  ASSERT_TRUE(Export("/a.safetensors", Format::kSafetensors, state.state(),
                     nullptr, save)
                  .ok());
  ASSERT_TRUE(Run("/a.safetensors", "/b.safetensors", Options()).ok());
  EXPECT_EQ((*Checkpoint::Open("/b.safetensors", {true, &env_}))->attributes(),
            (*Checkpoint::Open("/a.safetensors", {true, &env_}))->attributes());
  const auto report = Convert("/a.safetensors", "/b.pt", Options());
  ASSERT_TRUE(report.ok());
  EXPECT_THAT(report->dropped_attributes, ElementsAre("author"));
}

}  // namespace
}  // namespace dsd::checkpoint
