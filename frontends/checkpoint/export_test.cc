// SPDX-License-Identifier: Apache-2.0
//
// Whole tensors in safetensors files and archives of torch.save: written by
// ranks, read by others, and never by halves.

#include "dsd/frontends/checkpoint/export.h"

#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/fake_env.h"
#include "dsd/core/base/half.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/test_state.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

using ::testing::AnyOf;
using ::testing::Contains;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

constexpr uint64_t kSeed = 5;
constexpr uint64_t kOtherSeed = 6;

PathSegment T(const char* text) { return std::string(text); }

// Tensors of many dtypes and all kinds of layouts over `ranks`.
std::vector<TestTensor> Tensors(int ranks) {
  const DeviceMesh mesh = DeviceMesh::Iota({ranks});
  const auto placed = [&](Dims shape, Placement placement) {
    return *Layout::FromPlacements(std::move(shape), mesh, {placement});
  };
  std::vector<FlatInterval> flat;
  for (int rank = 0; rank < ranks; ++rank) {
    flat.push_back({rank, 35 * rank / ranks, 35 * (rank + 1) / ranks});
  }
  std::vector<TestTensor> tensors = {
      {{T("model"), T("rows")}, DType::kFloat32, placed({9, 7}, Shard(0))},
      {{T("model"), T("columns")}, DType::kBFloat16, placed({6, 11}, Shard(1))},
      {{T("model"), T("flat")},
       DType::kInt8,
       *Layout::FromFlatIntervals({5, 7}, flat)},
      {{T("copy")}, DType::kFloat64, placed({3}, Replicate())},
      {{T("empty")}, DType::kInt64, placed({0, 2}, Replicate())},
      {{T("scalar")}, DType::kUInt16, placed({}, Replicate())},
  };
  for (int i = 0; i < kNumDTypes; ++i) {
    const DType dtype = static_cast<DType>(i);
    if (dtype == DType::kComplex32 || dtype == DType::kComplex128) continue;
    tensors.push_back({{T("dtypes"), std::string(DTypeName(dtype))},
                       dtype,
                       placed({4, 2}, Shard(0))});
  }
  return tensors;
}

std::vector<ObjectEntry> Objects() {
  return {{{T("step")}, Object(1234)},
          {{T("optim"), T("param_groups"), int64_t{0}, T("betas")},
           Object(Object::Tuple{{Object(0.9), Object(0.999)}})}};
}

// Keys of files lie flat in those who read them.
std::vector<TestTensor> Flat(std::vector<TestTensor> tensors) {
  for (TestTensor& tensor : tensors) {
    std::string key;
    for (const PathSegment& segment : tensor.path) {
      absl::StrAppend(&key, key.empty() ? "" : ".",
                      std::get<std::string>(segment));
    }
    tensor.path = {key};
  }
  return tensors;
}

class ExportTest : public testing::Test {
 protected:
  ExportOptions Options() {
    ExportOptions options;
    options.env = &env_;
    return options;
  }

  std::vector<absl::Status> ExportBy(int ranks, const std::string& path,
                                     Format format,
                                     const ExportOptions& options,
                                     uint64_t seed = kSeed) {
    return StatusOfRanks(ranks, [&](Communicator& comm) {
      TestState state = TestState::Filled(Tensors(ranks), comm.rank(), seed,
                                          format == Format::kTorchArchive
                                              ? Objects()
                                              : std::vector<ObjectEntry>());
      return Export(path, format, state.state(), &comm, options).status();
    });
  }

  // Loads with `ranks` and compares.
  void ExpectHas(const std::string& path, int ranks, uint64_t seed = kSeed,
                 bool objects = false) {
    EXPECT_THAT(StatusOfRanks(
                    ranks,
                    [&](Communicator& comm) -> absl::Status {
                      std::vector<ObjectEntry> blank;
                      if (objects) {
                        blank = Objects();
                        for (ObjectEntry& object : blank)
                          object.value = Object();
                      }
                      TestState target = TestState::Blank(
                          Tensors(ranks), comm.rank(), std::move(blank));
                      LoadOptions options;
                      options.env = &env_;
                      DSD_RETURN_IF_ERROR(
                          Load(path, target.state(), &comm, options).status());
                      EXPECT_EQ(target.Difference(seed), "");
                      if (objects) {
                        for (size_t i = 0; i < Objects().size(); ++i) {
                          EXPECT_TRUE(target.state().objects[i].value ==
                                      Objects()[i].value);
                        }
                      }
                      return absl::OkStatus();
                    }),
                AllOk());
  }

  std::vector<std::string> Names(const std::string& directory) {
    const auto names = env_.files().List(directory);
    return names.ok() ? *names : std::vector<std::string>();
  }

  FakeEnv env_;
};

TEST_F(ExportTest, EveryFormatFromAndToAnyNumberOfRanks) {
  for (const int writers : {1, 2, 3}) {
    ExportOptions small = Options();
    small.max_file_bytes = 100;
    const std::string dir = absl::StrCat("/job/", writers);
    ASSERT_TRUE(env_.files().CreateDirs(dir).ok());
    EXPECT_THAT(ExportBy(writers, dir + "/one.safetensors",
                         Format::kSafetensors, Options()),
                AllOk());
    EXPECT_THAT(
        ExportBy(writers, dir + "/whole", Format::kSafetensors, Options()),
        AllOk());
    EXPECT_THAT(ExportBy(writers, dir + "/many", Format::kSafetensors, small),
                AllOk());
    EXPECT_THAT(
        ExportBy(writers, dir + "/archive.pt", Format::kTorchArchive, small),
        AllOk());
    EXPECT_THAT(Names(dir),
                ElementsAre("archive.pt", "many", "one.safetensors", "whole"));
    EXPECT_THAT(Names(dir + "/whole"), ElementsAre("model.safetensors"));
    EXPECT_THAT(Names(dir + "/many"), Contains("model.safetensors.index.json"));
    for (const int readers : {1, 2, 5}) {
      ExpectHas(dir + "/one.safetensors", readers);
      ExpectHas(dir + "/whole", readers);
      ExpectHas(dir + "/many", readers);
      ExpectHas(dir + "/many/model.safetensors.index.json", readers);
      ExpectHas(dir + "/archive.pt", readers, kSeed, /*objects=*/true);
    }
  }
  // The same bytes, whoever writes them.
  for (const std::string name : {"one.safetensors", "archive.pt"}) {
    EXPECT_EQ(*env_.fake_files().Content("/job/1/" + name),
              *env_.fake_files().Content("/job/3/" + name));
  }
}

// Every format, with other layouts, through the bytes of the smaller type.
TEST_F(ExportTest, LoadsCastOnRequest) {
  constexpr int64_t kRows = 6, kColumns = 9;
  const auto value = [](int64_t i) {
    return static_cast<float>(i - 20) / 7 * (i % 5 == 0 ? 3e4f : 1.f);
  };
  std::vector<float> wide(kRows * kColumns);
  std::vector<uint16_t> narrow(kRows * kColumns), half(kRows * kColumns);
  std::vector<int64_t> whole(kRows * kColumns);
  for (int64_t i = 0; i < kRows * kColumns; ++i) {
    wide[i] = value(i);
    narrow[i] = FloatToBFloat16(value(i));
    half[i] = FloatToFloat16(value(i));
    whole[i] = i;
  }
  const Dims shape = {kRows, kColumns};
  MemoryEndpoint endpoint;
  const auto add = [&](const char* name, DType dtype, auto& values) {
    ASSERT_TRUE(endpoint
                    .AddLocal({name, dtype, Layout::Replicated(shape, {0})}, 0,
                              reinterpret_cast<std::byte*>(values.data()))
                    .ok());
  };
  add("wide", DType::kFloat32, wide);
  add("narrow", DType::kBFloat16, narrow);
  add("half", DType::kFloat16, half);
  add("whole", DType::kInt64, whole);
  State state;
  state.tensors = &endpoint;
  SaveOptions save;
  save.env = &env_;
  ASSERT_TRUE(Save("/dcp", state, nullptr, save).ok());
  ASSERT_TRUE(
      Export("/x.safetensors", Format::kSafetensors, state, nullptr, Options())
          .ok());
  ASSERT_TRUE(
      Export("/x.pt", Format::kTorchArchive, state, nullptr, Options()).ok());

  for (const std::string path : {"/dcp", "/x.safetensors", "/x.pt"}) {
    SCOPED_TRACE(path);
    const auto load = [&](Communicator& comm,
                          const LoadOptions& options) -> absl::Status {
      const Layout layout = *Layout::FromPlacements(
          shape, DeviceMesh::Iota({comm.size()}), {Shard(1)});
      const Box box = layout.BoxesOf(comm.rank())[0].box;
      const int64_t columns = box.extent(1);
      std::vector<uint16_t> to_narrow(kRows * columns), to_other(to_narrow);
      std::vector<float> to_wide(kRows * columns);
      std::vector<int64_t> to_whole(kRows * columns);
      MemoryEndpoint target;
      const auto want = [&](const char* name, DType dtype, auto& values) {
        return target.AddLocal({name, dtype, layout}, comm.rank(),
                               reinterpret_cast<std::byte*>(values.data()));
      };
      DSD_RETURN_IF_ERROR(want("wide", DType::kBFloat16, to_narrow));
      DSD_RETURN_IF_ERROR(want("narrow", DType::kFloat32, to_wide));
      DSD_RETURN_IF_ERROR(want("half", DType::kBFloat16, to_other));
      DSD_RETURN_IF_ERROR(want("whole", DType::kInt64, to_whole));
      State into;
      into.tensors = &target;
      DSD_ASSIGN_OR_RETURN(const LoadReport report,
                           Load(path, into, &comm, options));
      EXPECT_EQ(report.cast, 3);
      for (int64_t i = 0; i < kRows * columns; ++i) {
        const int64_t at = i / columns * kColumns + box.lo[1] + i % columns;
        EXPECT_EQ(to_narrow[i], FloatToBFloat16(wide[at]));
        EXPECT_EQ(to_wide[i], BFloat16ToFloat(narrow[at]));
        EXPECT_EQ(to_other[i], FloatToBFloat16(Float16ToFloat(half[at])));
        EXPECT_EQ(to_whole[i], at);
      }
      return absl::OkStatus();
    };
    const auto on_three_ranks = [&](DTypePolicy policy) {
      LoadOptions options;
      options.env = &env_;
      options.dtype_policy = policy;
      return StatusOfRanks(
          3, [&](Communicator& comm) { return load(comm, options); });
    };
    EXPECT_THAT(on_three_ranks(DTypePolicy::kCast), AllOk());
    for (const DTypePolicy policy :
         {DTypePolicy::kDefault, DTypePolicy::kError}) {
      EXPECT_THAT(
          on_three_ranks(policy),
          Each(IsStatus(absl::StatusCode::kFailedPrecondition,
                        "\"wide\": dtype in the checkpoint is float32, in the "
                        "target bfloat16; dtype_policy = kCast converts it")));
    }
    EXPECT_THAT(on_three_ranks(DTypePolicy::kKeep),
                Each(IsStatus(absl::StatusCode::kInvalidArgument, "kKeep")));
  }
  // Integers do not become numbers of another kind.
  std::vector<float> number(kRows * kColumns);
  MemoryEndpoint target;
  ASSERT_TRUE(
      target
          .AddLocal({"whole", DType::kFloat32, Layout::Replicated(shape, {0})},
                    0, reinterpret_cast<std::byte*>(number.data()))
          .ok());
  State into;
  into.tensors = &target;
  LoadOptions options;
  options.env = &env_;
  options.allow_unexpected = true;
  options.dtype_policy = DTypePolicy::kCast;
  EXPECT_THAT(Load("/dcp", into, nullptr, options).status(),
              IsStatus(absl::StatusCode::kFailedPrecondition,
                       "dtype in the checkpoint is int64"));
}

TEST_F(ExportTest, OpenSaysWhatIsThere) {
  ExportOptions options = Options();
  options.max_file_bytes = 100;
  options.attributes = {{"format", "pt"}, {"author", "n. n."}};
  ASSERT_THAT(ExportBy(2, "/job/m", Format::kSafetensors, options), AllOk());
  const auto opened = Checkpoint::Open("/job/m", {true, &env_});
  ASSERT_TRUE(opened.ok()) << opened.status();
  const Checkpoint& stored = **opened;
  EXPECT_EQ(stored.format(), Format::kSafetensors);
  EXPECT_EQ(stored.path(), "/job/m");
  EXPECT_EQ(stored.directory(), "/job/m");
  EXPECT_NE(stored.save_id(), "");
  EXPECT_TRUE(stored.has_digests());
  EXPECT_THAT(stored.attributes(),
              ElementsAre(Pair("author", "n. n."), Pair("format", "pt")));
  EXPECT_EQ(stored.catalog().size(), Tensors(2).size());
  EXPECT_TRUE(stored.objects().empty());
  for (size_t i = 0; i < stored.catalog().size(); ++i) {
    const std::vector<StoredChunk> chunks = stored.Chunks(i);
    ASSERT_EQ(chunks.size(), 1u);
    EXPECT_TRUE(absl::StartsWith(chunks[0].file, "model-0"));
    EXPECT_EQ(chunks[0].length_bytes, chunks[0].box.num_elements() *
                                          ItemSize(stored.catalog()[i].dtype));
  }
  EXPECT_THAT(Verify(stored).problems, testing::IsEmpty());
  // What is read is read once.
  const auto endpoint = stored.MakeEndpoint();
  ASSERT_TRUE(endpoint.ok());
  const auto digests = ComputeDigests(stored);
  ASSERT_TRUE(digests.ok()) << digests.status();
}

// Digests speak of content, whatever the format.
TEST_F(ExportTest, DigestsAreThoseOfTheState) {
  TestState state = TestState::Filled(Flat(Tensors(1)), 0, kSeed);
  ASSERT_TRUE(Export("/a.safetensors", Format::kSafetensors, state.state(),
                     nullptr, Options())
                  .ok());
  ASSERT_TRUE(
      Export("/a.pt", Format::kTorchArchive, state.state(), nullptr, Options())
          .ok());
  SaveOptions save;
  save.env = &env_;
  ASSERT_TRUE(Save("/dcp", state.state(), nullptr, save).ok());
  std::vector<CheckpointDigests> all;
  for (const std::string path : {"/a.safetensors", "/a.pt", "/dcp"}) {
    const auto opened = Checkpoint::Open(path, {true, &env_});
    ASSERT_TRUE(opened.ok()) << opened.status();
    const auto digests = ComputeDigests(**opened);
    ASSERT_TRUE(digests.ok()) << digests.status();
    all.push_back(*digests);
  }
  EXPECT_EQ(all[0].whole, all[1].whole);
  EXPECT_EQ(all[0].whole, all[2].whole);
}

// The files carry them, and what is read is compared.
TEST_F(ExportTest, StoredDigestsFindWhatIsDamaged) {
  ExportOptions options = Options();
  options.max_file_bytes = 100;
  TestState state = TestState::Filled(Tensors(1), 0, kSeed);
  ASSERT_TRUE(
      Export("/d", Format::kSafetensors, state.state(), nullptr, options).ok());
  ASSERT_TRUE(
      Export("/a.pt", Format::kTorchArchive, state.state(), nullptr, options)
          .ok());
  for (const std::string path : {"/d", "/a.pt"}) {
    SCOPED_TRACE(path);
    const auto load = [&](bool verify) {
      TestState target = TestState::Blank(Tensors(1), 0);
      LoadOptions options;
      options.env = &env_;
      options.verify = verify;
      const auto report = Load(path, target.state(), nullptr, options);
      if (report.ok()) {
        EXPECT_EQ(report->verified, verify);
      }
      return report.status();
    };
    EXPECT_TRUE(load(true).ok());
    EXPECT_TRUE(load(false).ok());
    const auto opened = Checkpoint::Open(path, {true, &env_});
    ASSERT_TRUE(opened.ok()) << opened.status();
    EXPECT_TRUE((*opened)->has_digests());
    const VerifyReport whole = Verify(**opened);
    EXPECT_THAT(whole.problems, testing::IsEmpty());
    EXPECT_EQ(whole.compared, static_cast<int64_t>(Tensors(1).size()));
    const auto digests = ComputeDigests(**opened);
    ASSERT_TRUE(digests.ok()) << digests.status();
    for (const KeyDigest& key : digests->keys) {
      EXPECT_EQ((*opened)->StoredDigest(key.key), key.digest) << key.key;
    }
    EXPECT_FALSE((*Checkpoint::Open(path, {false, &env_}))->has_digests());

    // One bit of an element.
    const size_t tensor = *(*opened)->catalog().Find("model.rows");
    const StoredChunk chunk = (*opened)->Chunks(tensor)[0];
    const std::string file =
        path == "/d" ? absl::StrCat("/d/", chunk.file) : path;
    const std::string bytes = *env_.fake_files().Content(file);
    std::string damaged = bytes;
    damaged[chunk.offset_bytes + 5] ^= 4;
    env_.fake_files().SetContent(file, damaged);
    EXPECT_THAT(load(true), IsStatus(absl::StatusCode::kDataLoss,
                                     "\"model.rows\" has content digest"));
    EXPECT_TRUE(load(false).ok());
    const VerifyReport found = Verify(**Checkpoint::Open(path, {true, &env_}));
    ASSERT_EQ(found.problems.size(), 1u);
    EXPECT_EQ(found.problems[0].key, "model.rows");

    // One of the digests; and the name of a tensor.
    for (const auto& [from, to] :
         std::vector<std::pair<std::string, std::string>>{
             {"dsd digests", "dsd_digests"}, {"model.rows", "model.cows"}}) {
      damaged = bytes;
      const size_t at = damaged.find(from);
      ASSERT_NE(at, std::string::npos);
      damaged.replace(at, from.size(), to);
      env_.fake_files().SetContent(file, damaged);
      EXPECT_EQ(load(true).code(), absl::StatusCode::kDataLoss) << from;
    }
    env_.fake_files().SetContent(file, bytes);
  }
}

// A program that changes tensors and copies `__metadata__`.
TEST_F(ExportTest, DigestsOfOtherTensorsAreRefused) {
  TestState state = TestState::Filled(Tensors(1), 0, kSeed);
  ASSERT_TRUE(Export("/a.safetensors", Format::kSafetensors, state.state(),
                     nullptr, Options())
                  .ok());
  std::string bytes = *env_.fake_files().Content("/a.safetensors");
  const std::string name = "\"scalar\":{";
  bytes.replace(bytes.find(name), name.size(), "\"scaled\":{");
  env_.fake_files().SetContent("/a.safetensors", bytes);
  EXPECT_THAT(Checkpoint::Open("/a.safetensors", {true, &env_}).status(),
              IsStatus(absl::StatusCode::kDataLoss,
                       "changed by a program that kept \"dsd_digests\""));
  EXPECT_TRUE(Checkpoint::Open("/a.safetensors", {false, &env_}).ok());
  ExportOptions options = Options();
  options.attributes = {{"dsd_digests", "x"}};
  EXPECT_THAT(Export("/b.safetensors", Format::kSafetensors, state.state(),
                     nullptr, options)
                  .status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "by dsd itself"));
}

// The header is written last, whatever its length.
TEST_F(ExportTest, HeadersOfSeveralPieces) {
  for (const int64_t rows : {1, 3000}) {
    for (const size_t size : {size_t{4'000'000}, size_t{9'000'000}}) {
      const std::vector<TestTensor> tensors = {
          {{T("w")}, DType::kFloat32, Layout::Replicated({rows, 1000}, {0})}};
      TestState state = TestState::Filled(tensors, 0, kSeed);
      ExportOptions options = Options();
      options.attributes = {{"notes", std::string(size, 'n')}};
      const absl::Status written =
          Export("/a.safetensors", Format::kSafetensors, state.state(), nullptr,
                 options)
              .status();
      ASSERT_TRUE(written.ok()) << written;
      TestState target = TestState::Blank(tensors, 0);
      LoadOptions load;
      load.env = &env_;
      const auto report = Load("/a.safetensors", target.state(), nullptr, load);
      ASSERT_TRUE(report.ok()) << report.status();
      EXPECT_TRUE(report->verified);
      EXPECT_EQ(target.Difference(kSeed), "");
    }
  }
}

TEST_F(ExportTest, LargeTensorsGoInWindows) {
  // More than the 32 MiB of a window.
  const std::vector<TestTensor> tensors = {
      {{T("a")},
       DType::kFloat32,
       *Layout::FromPlacements({1000, 9000}, DeviceMesh::Iota({2}),
                               {Shard(1)})},
      {{T("b")},
       DType::kFloat32,
       *Layout::FromPlacements({100, 3}, DeviceMesh::Iota({2}), {Shard(0)})}};
  ExportOptions options = Options();
  options.max_file_bytes = 1'000;
  for (const std::string path : {"/w/two", "/w/a.pt"}) {
    const Format format = absl::EndsWith(path, ".pt") ? Format::kTorchArchive
                                                      : Format::kSafetensors;
    EXPECT_THAT(StatusOfRanks(2,
                              [&](Communicator& comm) {
                                TestState state = TestState::Filled(
                                    tensors, comm.rank(), kSeed);
                                return Export(path, format, state.state(),
                                              &comm, options)
                                    .status();
                              }),
                AllOk());
    std::vector<TestTensor> whole = tensors;
    for (TestTensor& tensor : whole) {
      tensor.layout = Layout::Replicated(tensor.layout.shape(), {0});
    }
    TestState target = TestState::Blank(whole, 0);
    LoadOptions load;
    load.env = &env_;
    const auto report = Load(path, target.state(), nullptr, load);
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(target.Difference(kSeed), "");
    EXPECT_EQ(report->payload_bytes_all, (1000 * 9000 + 300) * 4);
  }
}

TEST_F(ExportTest, RefusesWhatHasNoPlace) {
  const DeviceMesh mesh = DeviceMesh::Iota({1});
  TestState state =
      TestState::Filled({{{T("x")},
                          DType::kComplex128,
                          *Layout::FromPlacements({2}, mesh, {Replicate()})}},
                        0, kSeed, Objects());
  absl::Status status = Export("/a.safetensors", Format::kSafetensors,
                               state.state(), nullptr, Options())
                            .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              testing::AllOf(HasSubstr("\"step\""),
                             HasSubstr("\"optim.param_groups.0.betas\"")));
  state.state().objects.clear();
  status = Export("/a.safetensors", Format::kSafetensors, state.state(),
                  nullptr, Options())
               .status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("x: complex128"));
  EXPECT_EQ(Export("/a", Format::kDcp, state.state(), nullptr, Options())
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(Names("/").empty());
  EXPECT_TRUE(
      Export("/a.pt", Format::kTorchArchive, state.state(), nullptr, Options())
          .ok());
}

TEST_F(ExportTest, ReplacesOnlyWhenItMayAndOnlyItsKind) {
  ExportOptions careful = Options();
  careful.overwrite = false;
  for (const std::string path : {"/o/a.safetensors", "/o/dir", "/o/a.pt"}) {
    const Format format = absl::EndsWith(path, ".pt") ? Format::kTorchArchive
                                                      : Format::kSafetensors;
    EXPECT_THAT(ExportBy(2, path, format, careful), AllOk());
    EXPECT_THAT(ExportBy(2, path, format, careful, kOtherSeed),
                Each(IsStatus(absl::StatusCode::kAlreadyExists, path)));
    ExpectHas(path, 1, kSeed, format == Format::kTorchArchive);
    EXPECT_THAT(ExportBy(2, path, format, Options(), kOtherSeed), AllOk());
    ExpectHas(path, 1, kOtherSeed, format == Format::kTorchArchive);
  }
  TestState state = TestState::Filled(Tensors(1), 0, kSeed);
  SaveOptions save;
  save.env = &env_;
  ASSERT_TRUE(Save("/o/dcp", state.state(), nullptr, save).ok());
  EXPECT_EQ(
      Export("/o/dcp", Format::kSafetensors, state.state(), nullptr, Options())
          .status()
          .code(),
      absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(
      Export("/o/dcp", Format::kTorchArchive, state.state(), nullptr, Options())
          .status()
          .code(),
      absl::StatusCode::kFailedPrecondition);
}

// One file, several, and back: the index decides, old files go.
TEST_F(ExportTest, ReplacesADirectoryWhateverTheNumberOfFiles) {
  ExportOptions small = Options();
  small.max_file_bytes = 100;
  uint64_t seed = 10;
  for (const ExportOptions& options :
       {Options(), small, small, Options(), Options(), small}) {
    ASSERT_THAT(ExportBy(2, "/r", Format::kSafetensors, options, ++seed),
                AllOk());
    ExpectHas("/r", 2, seed);
    const std::vector<std::string> names = Names("/r");
    const bool has_index =
        absl::c_linear_search(names, "model.safetensors.index.json");
    // Once there is an index it decides.
    EXPECT_EQ(has_index, seed > 11);
    const auto opened = Checkpoint::Open("/r", {true, &env_});
    ASSERT_TRUE(opened.ok());
    absl::flat_hash_set<std::string> files;
    for (size_t i = 0; i < (*opened)->catalog().size(); ++i) {
      files.insert((*opened)->Chunks(i)[0].file);
    }
    EXPECT_EQ(names.size(), files.size() + (has_index ? 1 : 0));
  }
}

// A directory is what its index names: what else lies there is not ours.
TEST_F(ExportTest, ReplacesOnlyWhatTheIndexNames) {
  ExportOptions small = Options();
  small.max_file_bytes = 100;
  ASSERT_THAT(ExportBy(2, "/m", Format::kSafetensors, small), AllOk());
  const std::vector<std::string> old = Names("/m");
  ASSERT_GT(old.size(), 3u);
  const std::vector<std::string> others = {
      "adapter_model.safetensors", "consolidated.safetensors",
      "diffusion.safetensors.index.json", "model.safetensors",
      "model-00001-of-00002.safetensors"};
  for (const std::string& name : others) {
    env_.fake_files().SetContent("/m/" + name, name);
  }
  // Of an interrupted export.
  env_.fake_files().SetContent(
      "/m/model-0123456789abcdef-00001-of-00002.safetensors", "x");
  uint64_t seed = 10;
  for (const ExportOptions& options : {small, Options(), small}) {
    ASSERT_THAT(ExportBy(2, "/m", Format::kSafetensors, options, ++seed),
                AllOk());
    ExpectHas("/m", 1, seed);
    for (const std::string& name : others) {
      EXPECT_EQ(env_.fake_files().Content("/m/" + name).value_or(""), name);
    }
  }
  EXPECT_EQ(Names("/m").size(), old.size() + others.size());

  // Without knowing what it names nothing is replaced.
  env_.fake_files().SetContent("/m/model.safetensors.index.json", "{");
  const std::vector<std::string> before = Names("/m");
  EXPECT_THAT(ExportBy(2, "/m", Format::kSafetensors, small),
              Each(IsStatus(absl::StatusCode::kFailedPrecondition,
                            "/m/model.safetensors.index.json")));
  EXPECT_EQ(Names("/m"), before);
}

TEST_F(ExportTest, RefusesADirectoryOfOtherFilesWithoutAnIndex) {
  ASSERT_THAT(ExportBy(2, "/m", Format::kSafetensors, Options()), AllOk());
  env_.fake_files().SetContent("/m/model-00001-of-00002.safetensors", "x");
  env_.fake_files().SetContent("/m/adapter_model.safetensors", "x");
  env_.fake_files().SetContent("/m/config.json", "{}");
  const std::vector<std::string> before = Names("/m");
  for (const char* const words : {"names: \"adapter_model.safetensors\";",
                                  "model.safetensors.index.json"}) {
    EXPECT_THAT(ExportBy(2, "/m", Format::kSafetensors, Options(), kOtherSeed),
                Each(IsStatus(absl::StatusCode::kFailedPrecondition, words)));
  }
  EXPECT_EQ(Names("/m"), before);
  ASSERT_TRUE(env_.files().Remove("/m/adapter_model.safetensors").ok());
  EXPECT_THAT(ExportBy(2, "/m", Format::kSafetensors, Options(), kOtherSeed),
              AllOk());
  ExpectHas("/m", 1, kOtherSeed);
}

// The machine dies at each step: the old one, the new one, or a word that it is
// not complete; never a mixture.
TEST_F(ExportTest, ACrashAtAnyStepMixesNothing) {
  struct Case {
    std::string path;
    Format format;
    int64_t before;  // max_file_bytes of what is there; 0: nothing
    int64_t after;
  };
  const int64_t large = int64_t{1} << 40;
  const std::vector<TestTensor> all = Tensors(1);
  const std::vector<TestTensor> tensors(all.begin(), all.begin() + 4);
  for (const Case& c : std::vector<Case>{
           {"/c/a.safetensors", Format::kSafetensors, 0, large},
           {"/c/a.safetensors", Format::kSafetensors, large, large},
           {"/c/a.pt", Format::kTorchArchive, large, large},
           {"/c/d", Format::kSafetensors, 0, 100},
           {"/c/d", Format::kSafetensors, 100, 100},
           {"/c/d", Format::kSafetensors, large, 100},
           {"/c/d", Format::kSafetensors, 100, large}}) {
    SCOPED_TRACE(absl::StrCat(c.path, " ", c.before, " ", c.after));
    int crashes = 0, old_ones = 0, new_ones = 0;
    bool done = false;
    for (int64_t at = 0; !done; ++at) {
      // What of the last changes has reached storage.
      for (const uint64_t tear : {1, 2, 3, 4, 5}) {
        FakeEnv env;
        const auto write = [&](uint64_t seed, int64_t max_file_bytes) {
          TestState state = TestState::Filled(tensors, 0, seed);
          ExportOptions options;
          options.env = &env;
          options.max_file_bytes = max_file_bytes;
          return Export(c.path, c.format, state.state(), nullptr, options)
              .status();
        };
        if (c.before > 0) {
          ASSERT_TRUE(write(kSeed, c.before).ok());
        }
        env.fake_files().CrashAt(env.fake_files().num_operations() + at);
        done = write(kOtherSeed, c.after).ok();
        if (done) break;
        ++crashes;
        env.fake_files().Recover(tear);
        TestState target = TestState::Blank(tensors, 0);
        LoadOptions options;
        options.env = &env;
        const auto loaded = Load(c.path, target.state(), nullptr, options);
        if (!loaded.ok()) {
          EXPECT_THAT(
              loaded.status().code(),
              AnyOf(absl::StatusCode::kNotFound, absl::StatusCode::kDataLoss))
              << loaded.status();
          // What was there is never gone.
          EXPECT_EQ(c.before, 0) << at << ": " << loaded.status();
          continue;
        }
        const bool is_new = target.Difference(kOtherSeed).empty();
        new_ones += is_new;
        old_ones += !is_new;
        if (!is_new) {
          EXPECT_EQ(target.Difference(kSeed), "") << at;
        }
      }
    }
    EXPECT_GT(crashes, 20);
    EXPECT_EQ(old_ones > 0, c.before > 0);
    EXPECT_GT(new_ones, 0);
  }
}

TEST_F(ExportTest, AFullDiskLeavesNothing) {
  ExportOptions small = Options();
  small.max_file_bytes = 300;
  for (const std::string path : {"/f/a.safetensors", "/f/d", "/f/a.pt"}) {
    const Format format = absl::EndsWith(path, ".pt") ? Format::kTorchArchive
                                                      : Format::kSafetensors;
    for (const int64_t capacity : {0, 1000, 1700}) {
      env_.fake_files().SetCapacity(capacity);
      EXPECT_THAT(ExportBy(2, path, format, small),
                  Each(IsStatus(absl::StatusCode::kResourceExhausted, "")));
      env_.fake_files().SetCapacity(-1);
      EXPECT_THAT(Names("/f"), testing::IsEmpty());
    }
  }
}

TEST_F(ExportTest, LayoutsOfOthers) {
  const auto put = [&](const std::string& name, const std::string& json,
                       const std::string& data) {
    const uint64_t size = json.size();
    std::string bytes(reinterpret_cast<const char*>(&size), sizeof(size));
    env_.fake_files().SetContent(name, bytes + json + data);
  };
  const auto open = [&](const std::string& path) {
    return Checkpoint::Open(path, {true, &env_});
  };
  ASSERT_TRUE(env_.files().CreateDirs("/x").ok());

  // Shards of torch.distributed.checkpoint: rows of one tensor in two files.
  const auto shard = [&](int number, const std::string& offsets,
                         const std::string& data, const std::string& more) {
    put(absl::StrCat("/x/shard-0000", number,
                     "-model-00001-of-00001.safetensors"),
        absl::StrCat(R"({"__metadata__":{"DCP_SHARDING_INFO":"{\"w\":)",
                     R"({\"saved_offsets\":[)", offsets, "]", more,
                     R"(}}","DCP_VERSION":"1.0","format":"pt"},)",
                     R"("w":{"dtype":"U8","shape":[2,3],)",
                     R"("data_offsets":[0,6]}})"),
        data);
  };
  shard(1, "0,0", "abcdef", "");
  shard(2, "2,0", "ghijkl", "");
  const auto sharded = open("/x");
  ASSERT_TRUE(sharded.ok()) << sharded.status();
  EXPECT_EQ((*sharded)->catalog()[0].shape(), Dims({4, 3}));
  EXPECT_EQ((*sharded)->Chunks(0).size(), 2u);
  std::string read(12, '\0');
  const auto endpoint = (*sharded)->MakeEndpoint();
  ASSERT_TRUE(
      (*endpoint)
          ->Read(0, Box::Whole({4, 3}), 0, 12, DType::kUInt8,
                 absl::MakeSpan(reinterpret_cast<std::byte*>(read.data()), 12))
          .ok());
  EXPECT_EQ(read, "abcdefghijkl");
  // A shard that is there twice counts once; one that overlaps does not.
  shard(3, "2,0", "ghijkl", "");
  EXPECT_EQ((*open("/x"))->Chunks(0).size(), 2u);
  shard(3, "1,0", "ghijkl", "");
  EXPECT_EQ(open("/x").status().code(), absl::StatusCode::kDataLoss);
  shard(3, "9223372036854775807,0", "ghijkl", "");
  EXPECT_EQ(open("/x").status().code(), absl::StatusCode::kDataLoss);
  shard(3, "4", "ghijkl", "");
  EXPECT_EQ(open("/x").status().code(), absl::StatusCode::kDataLoss);
  // What is missing at the end is seen where the whole shape is recorded.
  shard(3, "4,0", "ghijkl", R"(,\"global_shape\":[8,3])");
  const auto holey = open("/x");
  ASSERT_TRUE(holey.ok()) << holey.status();
  EXPECT_EQ((*holey)->catalog()[0].shape(), Dims({8, 3}));
  EXPECT_THAT(Verify(**holey).problems[0].status.message(),
              HasSubstr("6 of 24 elements are in no chunk"));

  // Two files with one key, and nothing that says why.
  ASSERT_TRUE(env_.files().CreateDirs("/y").ok());
  const std::string one = R"({"k":{"dtype":"U8","shape":[1],)"
                          R"("data_offsets":[0,1]}})";
  put("/y/a.safetensors", one, "1");
  EXPECT_TRUE(open("/y").ok());
  put("/y/b.safetensors", one, "2");
  EXPECT_THAT(std::string(open("/y").status().message()),
              HasSubstr("it is in \"a.safetensors\" and in"));

  // An index that names one of them, none that is there, and another place.
  const auto index = [&](const std::string& map) {
    env_.fake_files().SetContent("/y/model.safetensors.index.json",
                                 absl::StrCat("{\"weight_map\":{", map, "}}"));
  };
  index(R"("k":"b.safetensors")");
  EXPECT_EQ((*open("/y"))->Chunks(0)[0].file, "b.safetensors");
  index(R"("k":"c.safetensors")");
  EXPECT_EQ(open("/y").status().code(), absl::StatusCode::kNotFound);
  index(R"("j":"b.safetensors")");
  EXPECT_THAT(std::string(open("/y").status().message()), HasSubstr("\"j\""));
  index(R"("k":"../y/b.safetensors")");
  EXPECT_EQ(open("/y").status().code(), absl::StatusCode::kDataLoss);

  // Parts that are missing.
  ASSERT_TRUE(env_.files().CreateDirs("/z").ok());
  put("/z/model-00001-of-00002.safetensors", one, "1");
  EXPECT_THAT(std::string(open("/z").status().message()),
              HasSubstr("file 2 of 2 is not there"));

  // Neither of them.
  env_.fake_files().SetContent("/n.txt", "hello, world");
  EXPECT_EQ(open("/n.txt").status().code(), absl::StatusCode::kNotFound);
  env_.fake_files().SetContent("/n.pt", std::string("\x80\x02\x8a\x0alx", 6));
  EXPECT_THAT(open("/n.pt").status(),
              IsStatus(absl::StatusCode::kUnimplemented, "before PyTorch 1.6"));
  env_.fake_files().SetContent("/n.safetensors", "");
  EXPECT_EQ(open("/n.safetensors").status().code(),
            absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace dsd::checkpoint
