// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/checkpoint.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/fake_env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/random_layout.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/dcp/metadata.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/tensor_item.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"
#include "dsd/frontends/checkpoint/digests_file.h"
#include "dsd/frontends/checkpoint/file_names.h"
#include "dsd/frontends/checkpoint/test_state.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

constexpr char kDir[] = "/job/checkpoint";

SaveOptions SaveTo(FakeEnv& env) {
  SaveOptions options;
  options.env = &env;
  return options;
}
LoadOptions LoadFrom(FakeEnv& env) {
  LoadOptions options;
  options.env = &env;
  return options;
}

Layout Whole(Dims shape, int ranks = 1) {
  std::vector<Holder> holders;
  for (int rank = 0; rank < ranks; ++rank) holders.push_back(rank);
  return Layout::Replicated(std::move(shape), std::move(holders));
}

Layout Rows(Dims shape, int ranks) {
  return *Layout::FromPlacements(std::move(shape), DeviceMesh::Iota({ranks}),
                                 {Shard(0)});
}

Layout Columns(Dims shape, int ranks) {
  return *Layout::FromPlacements(std::move(shape), DeviceMesh::Iota({ranks}),
                                 {Shard(1)});
}

std::vector<ObjectEntry> SomeObjects() {
  Object::Dict nested;
  nested.Set(PathSegment(std::string("a")), Object(int64_t{1} << 40));
  nested.Set(PathSegment(int64_t{7}),
             Object(Bytes{std::string("\x00\xff", 2)}));
  return {
      {{std::string("step")}, Object(17)},
      {{std::string("optim"), std::string("param_groups"), int64_t{0},
        std::string("betas")},
       Object(Object::Tuple{{Object(0.9), Object(0.999)}})},
      {{std::string("names")}, Object(Object::List{Object("x"), Object()})},
      {{std::string("nested")}, Object(std::move(nested))},
  };
}

std::vector<ObjectEntry> WithoutValues(std::vector<ObjectEntry> objects) {
  for (ObjectEntry& object : objects) object.value = Object();
  return objects;
}

std::vector<absl::Status> SaveOnTwoRanks(const std::vector<TestTensor>& tensors,
                                         FakeEnv& env) {
  return StatusOfRanks(2, [&](Communicator& comm) {
    TestState state = TestState::Filled(tensors, comm.rank(), 1);
    return Save(kDir, state.state(), &comm, SaveTo(env)).status();
  });
}

TEST(CheckpointTest, OneRankWithEveryDTypeAndShape) {
  FakeEnv env;
  std::vector<TestTensor> tensors;
  for (int i = 0; i < kNumDTypes; ++i) {
    const DType dtype = static_cast<DType>(i);
    tensors.push_back({{std::string("model"), std::string(DTypeName(dtype))},
                       dtype,
                       Whole({3, 5})});
  }
  tensors.push_back({{std::string("scalar")}, DType::kFloat32, Whole({})});
  tensors.push_back({{std::string("empty")}, DType::kInt64, Whole({0, 4})});
  tensors.push_back(
      {{std::string("deep")}, DType::kInt8, Whole({2, 1, 3, 1, 2})});
  tensors.push_back(
      {{std::string("large")}, DType::kFloat32, Whole({700, 1000})});
  TestState saved = TestState::Filled(tensors, 0, 1, SomeObjects());
  const auto report = Save(kDir, saved.state(), nullptr, SaveTo(env));
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->tensors, static_cast<int64_t>(tensors.size()));
  EXPECT_EQ(report->objects, 4);
  EXPECT_THAT(report->leftovers, IsEmpty());

  TestState loaded = TestState::Blank(tensors, 0, WithoutValues(SomeObjects()));
  const auto load = Load(kDir, loaded.state(), nullptr, LoadFrom(env));
  ASSERT_TRUE(load.ok()) << load.status();
  EXPECT_EQ(loaded.Difference(1), "");
  EXPECT_TRUE(load->verified);
  EXPECT_EQ(load->save_id, report->save_id);
  EXPECT_EQ(load->payload_bytes_all, report->payload_bytes_all);
  const std::vector<ObjectEntry> expected = SomeObjects();
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(loaded.state().objects[i].value == expected[i].value) << i;
  }

  const auto checkpoint = Checkpoint::Open(kDir, {true, &env});
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_THAT((*checkpoint)->tensor_path(0),
              ElementsAre(PathSegment(std::string("model")),
                          PathSegment(std::string("float32"))));
  const VerifyReport verified = Verify(**checkpoint);
  EXPECT_EQ(verified.problems.size(), 0u);
  EXPECT_EQ(verified.compared, static_cast<int64_t>(tensors.size()) + 4);
  // Payloads lie where they can be mapped.
  for (const StoredChunk& chunk : (*checkpoint)->Chunks(tensors.size() - 1)) {
    EXPECT_EQ(chunk.offset_bytes % 64, 0);
  }
}

TEST(CheckpointTest, NothingAtAll) {
  FakeEnv env;
  State empty;
  ASSERT_TRUE(Save(kDir, empty, nullptr, SaveTo(env)).ok());
  const auto load = Load(kDir, empty, nullptr, LoadFrom(env));
  ASSERT_TRUE(load.ok()) << load.status();
  EXPECT_EQ(load->payload_bytes_all, 0);
}

// Random layouts on one number of ranks, loaded into others on another number.
TEST(CheckpointTest, AnyLayoutToAnyLayout) {
  test::Random random(test::TestSeed());
  for (int round = 0; round < 40; ++round) {
    const int save_ranks = static_cast<int>(test::Uniform(random, 1, 4));
    const int load_ranks = static_cast<int>(test::Uniform(random, 1, 4));
    const auto holders = [](int ranks) {
      test::RandomLayoutOptions options;
      for (int rank = 0; rank < ranks; ++rank) options.holders.push_back(rank);
      return options;
    };
    std::vector<TestTensor> from, to;
    int64_t payload = 0;
    for (int i = 0; i < 6; ++i) {
      // Fewer elements than it takes for short runs to be read with their gaps.
      const std::vector<int64_t> shape = test::RandomShape(random, 1000);
      const DType dtype = static_cast<DType>(test::Uniform(random, 0, 21));
      const Path path = {std::string("t"), int64_t{i}};
      from.push_back({path, dtype,
                      *test::BuildLayout(test::RandomLayoutSpec(
                          random, shape, holders(save_ranks)))});
      to.push_back({path, dtype,
                    *test::BuildLayout(test::RandomLayoutSpec(
                        random, shape, holders(load_ranks)))});
      payload += from.back().layout.whole().num_elements() * ItemSize(dtype);
    }
    FakeEnv env;
    ASSERT_THAT(StatusOfRanks(save_ranks,
                              [&](Communicator& comm) -> absl::Status {
                                TestState state = TestState::Filled(
                                    from, comm.rank(), round, SomeObjects());
                                DSD_ASSIGN_OR_RETURN(const SaveReport report,
                                                     Save(kDir, state.state(),
                                                          &comm, SaveTo(env)));
                                EXPECT_EQ(report.payload_bytes_all, payload);
                                return absl::OkStatus();
                              }),
                AllOk())
        << "round " << round;
    ASSERT_THAT(StatusOfRanks(
                    load_ranks,
                    [&](Communicator& comm) -> absl::Status {
                      TestState state = TestState::Blank(
                          to, comm.rank(), WithoutValues(SomeObjects()));
                      DSD_ASSIGN_OR_RETURN(
                          const LoadReport report,
                          Load(kDir, state.state(), &comm, LoadFrom(env)));
                      EXPECT_EQ(state.Difference(round), "");
                      EXPECT_TRUE(report.verified);
                      // Each stored byte once, over all ranks.
                      EXPECT_EQ(report.payload_bytes_all, payload);
                      EXPECT_TRUE(state.state().objects[0].value == Object(17));
                      return absl::OkStatus();
                    }),
                AllOk())
        << "round " << round;
    const auto checkpoint = Checkpoint::Open(kDir, {true, &env});
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_EQ(Verify(**checkpoint).problems.size(), 0u);

    // The digest is that of the content, not of how it is cut.
    const auto stored = ComputeDigests(**checkpoint);
    ASSERT_TRUE(stored.ok()) << stored.status();
    EXPECT_THAT(StatusOfRanks(load_ranks,
                              [&](Communicator& comm) -> absl::Status {
                                TestState state = TestState::Filled(
                                    to, comm.rank(), round, SomeObjects());
                                DSD_ASSIGN_OR_RETURN(
                                    const CheckpointDigests live,
                                    ComputeDigests(state.state(), &comm));
                                EXPECT_EQ(live.whole, stored->whole);
                                return absl::OkStatus();
                              }),
                AllOk());
    for (const KeyDigest& key : stored->keys) {
      EXPECT_EQ((*checkpoint)->StoredDigest(key.key), key.digest) << key.key;
    }
  }
}

TEST(CheckpointTest, ManyShortColumnsAreReadWithWhatIsBetween) {
  FakeEnv env;
  const std::vector<TestTensor> whole = {
      {{std::string("w")}, DType::kFloat32, Whole({5000, 8})}};
  TestState saved = TestState::Filled(whole, 0, 3);
  ASSERT_TRUE(Save(kDir, saved.state(), nullptr, SaveTo(env)).ok());
  const std::vector<TestTensor> columns = {
      {{std::string("w")}, DType::kFloat32, Columns({5000, 8}, 4)}};
  EXPECT_THAT(
      StatusOfRanks(4,
                    [&](Communicator& comm) -> absl::Status {
                      TestState state = TestState::Blank(columns, comm.rank());
                      DSD_ASSIGN_OR_RETURN(
                          const LoadReport report,
                          Load(kDir, state.state(), &comm, LoadFrom(env)));
                      EXPECT_EQ(state.Difference(3), "");
                      EXPECT_TRUE(report.verified);
                      EXPECT_LE(report.payload_bytes, 5000 * 8 * 4);
                      return absl::OkStatus();
                    }),
      AllOk());
}

TEST(CheckpointTest, AllMismatchesAtOnceAndNothingChanges) {
  FakeEnv env;
  std::vector<TestTensor> tensors = {
      {{std::string("same")}, DType::kFloat32, Rows({4, 2}, 2)},
      {{std::string("shape")}, DType::kFloat32, Rows({4, 2}, 2)},
      {{std::string("dtype")}, DType::kFloat32, Rows({4}, 2)},
      {{std::string("kind")}, DType::kFloat32, Rows({4}, 2)},
      {{std::string("gone")}, DType::kFloat32, Rows({4}, 2)},
  };
  const std::vector<ObjectEntry> objects = {
      {{std::string("was_object")}, Object(1)},
      {{std::string("gone_object")}, Object(1)}};
  ASSERT_THAT(
      StatusOfRanks(
          2,
          [&](Communicator& comm) {
            TestState state =
                TestState::Filled(tensors, comm.rank(), 5, objects);
            return Save(kDir, state.state(), &comm, SaveTo(env)).status();
          }),
      AllOk());
  const std::vector<TestTensor> wanted = {
      {{std::string("same")}, DType::kFloat32, Rows({4, 2}, 2)},
      {{std::string("shape")}, DType::kFloat32, Rows({2, 4}, 2)},
      {{std::string("dtype")}, DType::kFloat64, Rows({4}, 2)},
      {{std::string("was_object")}, DType::kFloat32, Rows({4}, 2)},
      {{std::string("extra")}, DType::kFloat32, Rows({4}, 2)},
  };
  const std::vector<ObjectEntry> wanted_objects = {
      {{std::string("kind")}, Object("unchanged")}};
  std::vector<std::string> texts(2);
  const std::vector<absl::Status> statuses =
      StatusOfRanks(2, [&](Communicator& comm) {
        TestState state = TestState::Blank(wanted, comm.rank(), wanted_objects);
        const absl::Status status =
            Load(kDir, state.state(), &comm, LoadFrom(env)).status();
        EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
        EXPECT_TRUE(state.IsBlank());
        EXPECT_TRUE(state.state().objects[0].value == Object("unchanged"));
        texts[comm.rank()] = std::string(status.message());
        return absl::OkStatus();
      });
  EXPECT_THAT(statuses, AllOk());
  EXPECT_EQ(texts[0], texts[1]);
  EXPECT_THAT(
      texts[0],
      AllOf(HasSubstr("missing in the checkpoint (1): \"extra\""),
            HasSubstr("not in the target (2): \"gone\", \"gone_object\""),
            HasSubstr("\"shape\": shape in the checkpoint is [4, 2], in the "
                      "target [2, 4]"),
            HasSubstr("\"dtype\": dtype in the checkpoint is float32, in the "
                      "target float64"),
            HasSubstr("\"was_object\": an object in the checkpoint"),
            HasSubstr("\"kind\": a tensor in the checkpoint")));
}

TEST(CheckpointTest, MissingAndUnexpectedMayBeAllowed) {
  FakeEnv env;
  const std::vector<TestTensor> a = {
      {{std::string("a")}, DType::kInt32, Whole({4})},
      {{std::string("b")}, DType::kInt32, Whole({4})}};
  const std::vector<TestTensor> b = {
      {{std::string("b")}, DType::kInt32, Whole({4})}};
  TestState saved = TestState::Filled(a, 0, 6);
  ASSERT_TRUE(Save(kDir, saved.state(), nullptr, SaveTo(env)).ok());
  TestState partial =
      TestState::Blank(b, 0, {{{std::string("new")}, Object("default")}});
  LoadOptions options = LoadFrom(env);
  options.allow_missing = true;
  options.allow_unexpected = true;
  const auto report = Load(kDir, partial.state(), nullptr, options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(report->missing, ElementsAre("new"));
  EXPECT_THAT(report->unexpected, ElementsAre("a"));
  EXPECT_EQ(partial.Difference(6), "");
  EXPECT_TRUE(partial.state().objects[0].value == Object("default"));
}

// A part of the checkpoint under other names, onto other layouts.
TEST(CheckpointTest, KeysAreStoredUnderOtherNames) {
  FakeEnv env;
  const std::string model = "model";
  const std::vector<TestTensor> tensors = {
      {{model, std::string("w")}, DType::kFloat32, Rows({64, 8}, 2)},
      {{model, std::string("b")}, DType::kFloat32, Whole({8}, 2)},
      {{std::string("optim"), std::string("w")},
       DType::kFloat32,
       Rows({64, 8}, 2)}};
  ASSERT_THAT(
      StatusOfRanks(
          2,
          [&](Communicator& comm) {
            TestState state =
                TestState::Filled(tensors, comm.rank(), 1, SomeObjects());
            return Save(kDir, state.state(), &comm, SaveTo(env)).status();
          }),
      AllOk());
  // "w" comes from "model.w", "count" from "step"; "other" is not looked for.
  const auto stored_key =
      [](absl::string_view key) -> std::optional<std::string> {
    if (key == "count") return "step";
    if (key == "other") return std::nullopt;
    return absl::StrCat("model.", key);
  };
  ASSERT_THAT(
      StatusOfRanks(
          3,
          [&](Communicator& comm) -> absl::Status {
            std::vector<std::byte> bytes(64 * 8 * 4), other(24);
            const Layout columns = Columns({64, 8}, 3);
            MemoryEndpoint endpoint;
            DSD_RETURN_IF_ERROR(
                endpoint.AddLocal({"other", DType::kInt64, Whole({3}, 3)},
                                  comm.rank(), other.data()));
            DSD_RETURN_IF_ERROR(endpoint.AddLocal(
                {"w", DType::kFloat32, columns}, comm.rank(), bytes.data()));
            State state;
            state.tensors = &endpoint;
            state.objects = {{{std::string("count")}, Object()}};
            LoadOptions options = LoadFrom(env);
            options.stored_key = stored_key;
            options.allow_unexpected = true;
            DSD_ASSIGN_OR_RETURN(const LoadReport report,
                                 Load(kDir, state, &comm, options));
            EXPECT_TRUE(report.verified);
            EXPECT_THAT(report.unexpected, Contains(std::string("optim.w")));
            EXPECT_THAT(report.unexpected,
                        Not(Contains(std::string("model.w"))));
            EXPECT_TRUE(state.objects[0].value == Object(17));
            EXPECT_TRUE(other == std::vector<std::byte>(24));
            const std::vector<std::byte> whole =
                TestBytes(1, "model.w", 64 * 8 * 4);
            size_t at = 0;
            for (const LocalBox& local : columns.BoxesOf(comm.rank())) {
              for (int64_t row = 0; row < 64; ++row) {
                const int64_t count = local.box.extent(1) * 4;
                EXPECT_TRUE(
                    std::equal(bytes.begin() + at, bytes.begin() + at + count,
                               whole.begin() + row * 32 + local.box.lo[1] * 4));
                at += count;
              }
            }
            return absl::OkStatus();
          }),
      AllOk());

  // Errors have both names; one stored key is for one key.
  TestState state =
      TestState::Blank({{{std::string("w")}, DType::kFloat32, Whole({64, 9})},
                        {{std::string("x")}, DType::kFloat32, Whole({64, 9})}},
                       0);
  LoadOptions options = LoadFrom(env);
  options.allow_unexpected = true;
  options.stored_key = [](absl::string_view) { return "model.w"; };
  const absl::Status status =
      Load(kDir, state.state(), nullptr, options).status();
  EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                               "\"model.w\" is wanted for two keys"));
  EXPECT_THAT(
      status,
      IsStatus(absl::StatusCode::kFailedPrecondition,
               "\"w\" (stored as \"model.w\"): shape in the checkpoint"));
}

TEST(CheckpointTest, SaysWhyThereIsNoCheckpoint) {
  FakeEnv env;
  State state;
  const auto load = [&](const std::string& dir) {
    return Load(dir, state, nullptr, LoadFrom(env)).status();
  };
  EXPECT_THAT(load("/nowhere"), IsStatus(absl::StatusCode::kNotFound,
                                         "there is no such directory"));
  ASSERT_TRUE(env.files().CreateDirs("/empty").ok());
  EXPECT_THAT(load("/empty"),
              IsStatus(absl::StatusCode::kNotFound, "it has no index"));
  ASSERT_TRUE(env.files().CreateDirs("/torn").ok());
  env.fake_files().SetContent("/torn/__0_0.distcp", "x");
  EXPECT_THAT(load("/torn"),
              IsStatus(absl::StatusCode::kNotFound, "is not complete"));
  env.fake_files().SetContent("/torn/__0.metadata", "x");
  EXPECT_THAT(load("/torn"),
              IsStatus(absl::StatusCode::kDataLoss, "/torn/__0.metadata"));
  env.fake_files().SetContent("/file", "x");
  EXPECT_THAT(load("/file"),
              IsStatus(absl::StatusCode::kNotFound, "it is not a directory"));
  EXPECT_THAT(load(""), IsStatus(absl::StatusCode::kInvalidArgument, "empty"));
}

TEST(CheckpointTest, RefusesBadStates) {
  FakeEnv env;
  const auto save = [&](std::vector<TestTensor> tensors,
                        std::vector<ObjectEntry> objects) {
    TestState state = TestState::Filled(tensors, 0, 1, std::move(objects));
    return Save(kDir, state.state(), nullptr, SaveTo(env)).status();
  };
  const TestTensor a = {{std::string("a")}, DType::kInt8, Whole({1})};
  EXPECT_THAT(
      save({a}, {{{std::string("a")}, Object(1)}}),
      IsStatus(absl::StatusCode::kInvalidArgument, "keys occur twice: \"a\""));
  EXPECT_THAT(save({}, {{{std::string("o")},
                         Object(Object::List{Object(Opaque{"my.Class"})})}}),
              IsStatus(absl::StatusCode::kInvalidArgument, "my.Class"));
  EXPECT_THAT(save({}, {{{std::string("o")}, Object("\xff")}}),
              IsStatus(absl::StatusCode::kInvalidArgument, "UTF-8"));
  EXPECT_THAT(save({{{std::string("\xff")}, DType::kInt8, Whole({1})}}, {}),
              IsStatus(absl::StatusCode::kInvalidArgument, "UTF-8"));
  const Layout holes = *Layout::FromBoxes({4}, {{0, {{1}, {3}}}});
  EXPECT_THAT(save({{{std::string("h")}, DType::kInt8, holes}}, {}),
              IsStatus(absl::StatusCode::kFailedPrecondition, "h"));
  EXPECT_THAT(*env.files().List("/"), IsEmpty());
}

TEST(CheckpointTest, VerifyAndDigestsTellHowFarTheyAre) {
  FakeEnv env;
  const std::vector<TestTensor> tensors = {
      {{std::string("a")}, DType::kFloat32, Rows({700, 1000}, 2)},
      {{std::string("b")}, DType::kInt8, Whole({9}, 2)}};
  ASSERT_THAT(SaveOnTwoRanks(tensors, env), AllOk());
  const auto opened = Checkpoint::Open(kDir, {true, &env});
  ASSERT_TRUE(opened.ok()) << opened.status();
  constexpr int64_t kBytes = 700 * 1000 * 4 + 9;
  for (const bool verify : {true, false}) {
    int64_t calls = 0, done = 0;
    const auto note = [&](const Progress& progress) {
      EXPECT_EQ(progress.bytes_total, kBytes);
      EXPECT_GT(progress.bytes_done, done);
      done = progress.bytes_done;
      ++calls;
    };
    if (verify) {
      EXPECT_THAT(Verify(**opened, note).problems, IsEmpty());
    } else {
      EXPECT_TRUE(ComputeDigests(**opened, note).ok());
    }
    EXPECT_EQ(done, kBytes);
    EXPECT_GT(calls, 2);
  }
}

TEST(CheckpointTest, OverwritingReplacesAllFilesOrIsRefused) {
  FakeEnv env;
  const std::vector<TestTensor> tensors = {
      {{std::string("w")}, DType::kInt32, Whole({8})}};
  TestState first = TestState::Filled(tensors, 0, 1);
  const auto one = Save(kDir, first.state(), nullptr, SaveTo(env));
  ASSERT_TRUE(one.ok());
  // What Python and interrupted saves leave, and what is not ours.
  env.fake_files().SetContent(JoinFile(kDir, "__3_0.distcp"), "old");
  env.fake_files().SetContent(JoinFile(kDir, "notes.txt"), "mine");
  SaveOptions options = SaveTo(env);
  options.overwrite = false;
  TestState second = TestState::Filled(tensors, 0, 2);
  EXPECT_THAT(Save(kDir, second.state(), nullptr, options).status(),
              IsStatus(absl::StatusCode::kAlreadyExists, "allow overwriting"));
  const auto two = Save(kDir, second.state(), nullptr, SaveTo(env));
  ASSERT_TRUE(two.ok());
  const std::string id = FileId(two->save_id);
  EXPECT_THAT(*env.files().List(kDir),
              ElementsAre(DigestsFile(id), kIndexFile, DataFile(0, 0, id),
                          "notes.txt"));
  TestState loaded = TestState::Blank(tensors, 0);
  ASSERT_TRUE(Load(kDir, loaded.state(), nullptr, LoadFrom(env)).ok());
  EXPECT_EQ(loaded.Difference(2), "");
}

TEST(CheckpointTest, PerRankObjectsAndObjectsThatDiffer) {
  FakeEnv env;
  ASSERT_THAT(
      StatusOfRanks(
          3,
          [&](Communicator& comm) {
            TestState state =
                TestState::Filled({}, comm.rank(), 0,
                                  {{{std::string("step")}, Object(3)},
                                   {{absl::StrCat("rng@rank", comm.rank())},
                                    Object(comm.rank())}});
            return Save(kDir, state.state(), &comm, SaveTo(env)).status();
          }),
      AllOk());
  const auto checkpoint = Checkpoint::Open(kDir, {true, &env});
  ASSERT_TRUE(checkpoint.ok());
  absl::flat_hash_map<std::string, std::string> files;
  for (const StoredObject& object : (*checkpoint)->objects()) {
    files[object.key] = object.file;
  }
  EXPECT_EQ(files.size(), 4u);
  EXPECT_TRUE(absl::StartsWith(files["rng@rank2"], "__2_0"));
  EXPECT_TRUE(absl::StartsWith(files["step"], "__0_0"));

  EXPECT_THAT(
      StatusOfRanks(
          3,
          [&](Communicator& comm) {
            TestState state = TestState::Filled(
                {}, comm.rank(), 0,
                {{{std::string("lr")}, Object(comm.rank() == 2 ? 0.1 : 0.2)}});
            return Save("/other", state.state(), &comm, SaveTo(env)).status();
          }),
      Each(IsStatus(absl::StatusCode::kFailedPrecondition,
                    "objects differ between ranks: \"lr@rank2\"")));
}

TEST(CheckpointTest, ADirectoryThatRank0DoesNotSee) {
  FakeEnv shared, apart;
  const std::vector<TestTensor> tensors = {
      {{std::string("w")}, DType::kInt32, Rows({8}, 3)}};
  EXPECT_THAT(
      StatusOfRanks(3,
                    [&](Communicator& comm) {
                      TestState state =
                          TestState::Filled(tensors, comm.rank(), 1);
                      return Save(kDir, state.state(), &comm,
                                  SaveTo(comm.rank() == 2 ? apart : shared))
                          .status();
                    }),
      Each(AllOf(
          IsStatus(absl::StatusCode::kFailedPrecondition, kDir),
          IsStatus(absl::StatusCode::kFailedPrecondition, "rank 2 wrote"))));
  // Nothing is left anywhere, not even the directory.
  for (FakeEnv* const env : {&shared, &apart}) {
    EXPECT_EQ(env->files().Stat(kDir).status().code(),
              absl::StatusCode::kNotFound);
  }
}

TEST(CheckpointTest, RanksThatDisagree) {
  FakeEnv env;
  const auto run = [&](absl::FunctionRef<std::string(int)> dir,
                       absl::FunctionRef<Dims(int)> shape) {
    return StatusOfRanks(2, [&](Communicator& comm) {
      TestState state = TestState::Filled(
          {{{std::string("w")}, DType::kInt8, Whole(shape(comm.rank()), 2)}},
          comm.rank(), 1);
      return Save(dir(comm.rank()), state.state(), &comm, SaveTo(env)).status();
    });
  };
  EXPECT_THAT(
      run([](int rank) { return absl::StrCat("/d", rank); },
          [](int) { return Dims{4}; }),
      Each(IsStatus(absl::StatusCode::kFailedPrecondition, "ranks disagree")));
  EXPECT_THAT(
      run([](int) { return "/d"; }, [](int rank) { return Dims{4 + rank}; }),
      Each(IsStatus(absl::StatusCode::kFailedPrecondition, "ranks disagree")));
  EXPECT_THAT(*env.files().List("/"), IsEmpty());
}

// Damage at any byte of any file is found.
TEST(CheckpointTest, EveryFlippedByteFailsTheLoad) {
  FakeEnv env;
  const std::vector<TestTensor> tensors = {
      {{std::string("w")}, DType::kFloat32, Rows({6, 3}, 2)},
      {{std::string("b")}, DType::kBFloat16, Whole({5}, 2)},
      {{std::string("s")}, DType::kInt64, Whole({}, 2)},
      {{std::string("e")}, DType::kInt64, Whole({0}, 2)}};
  ASSERT_THAT(
      StatusOfRanks(
          2,
          [&](Communicator& comm) {
            TestState state =
                TestState::Filled(tensors, comm.rank(), 1, SomeObjects());
            return Save(kDir, state.state(), &comm, SaveTo(env)).status();
          }),
      AllOk());
  std::vector<TestTensor> whole = tensors;
  whole[0].layout = Whole({6, 3});
  for (TestTensor& tensor : whole) {
    tensor.layout = Whole(tensor.layout.shape());
  }
  const auto load = [&] {
    TestState state = TestState::Blank(whole, 0, WithoutValues(SomeObjects()));
    return Load(kDir, state.state(), nullptr, LoadFrom(env)).status();
  };
  ASSERT_TRUE(load().ok()) << load();
  int64_t flips = 0;
  const std::vector<std::string> names = *env.files().List(kDir);
  for (const std::string& name : names) {
    const std::string path = JoinFile(kDir, name);
    const std::string good = *env.fake_files().Content(path);
    for (size_t at = 0; at < good.size(); ++at) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 << (at % 8)));
      env.fake_files().SetContent(path, bad);
      const absl::Status status = load();
      EXPECT_FALSE(status.ok()) << path << " byte " << at;
      EXPECT_THAT(status.message(), HasSubstr(kDir));
      ++flips;
    }
    // A file that ends early or goes on.
    for (const size_t size : {size_t{0}, good.size() / 2, good.size() - 1}) {
      env.fake_files().SetContent(path, good.substr(0, size));
      EXPECT_FALSE(load().ok()) << path << " cut to " << size;
    }
    env.fake_files().SetContent(path, good + "x");
    EXPECT_FALSE(load().ok()) << path << " longer by one";
    env.fake_files().SetContent(path, good);
  }
  EXPECT_TRUE(load().ok()) << load();
  EXPECT_GT(flips, 10000);
}

TEST(CheckpointTest, ADamagedByteIsNamedOnEveryRank) {
  FakeEnv env;
  const std::vector<TestTensor> tensors = {
      {{std::string("big")}, DType::kFloat32, Rows({64, 1024}, 2)},
      {{std::string("fine")}, DType::kFloat32, Rows({64}, 2)}};
  ASSERT_THAT(SaveOnTwoRanks(tensors, env), AllOk());
  const auto checkpoint = Checkpoint::Open(kDir, {true, &env});
  const StoredChunk chunk = (*checkpoint)->Chunks(0)[1];
  const std::string path = JoinFile(kDir, chunk.file);
  std::string bytes = *env.fake_files().Content(path);
  bytes[chunk.offset_bytes + chunk.length_bytes / 2] ^= 0x40;
  env.fake_files().SetContent(path, bytes);

  std::vector<TestTensor> columns = tensors;
  columns[0].layout = Columns({64, 1024}, 2);
  std::vector<std::string> texts(2);
  ASSERT_THAT(
      StatusOfRanks(
          2,
          [&](Communicator& comm) {
            TestState state = TestState::Blank(columns, comm.rank());
            const absl::Status status =
                Load(kDir, state.state(), &comm, LoadFrom(env)).status();
            EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
            texts[comm.rank()] = std::string(status.message());
            return absl::OkStatus();
          }),
      AllOk());
  EXPECT_EQ(texts[0], texts[1]);
  EXPECT_THAT(texts[0],
              AllOf(HasSubstr("\"big\""), HasSubstr(path),
                    HasSubstr("unspecified"), Not(HasSubstr("\"fine\""))));

  const VerifyReport verified = Verify(**checkpoint);
  ASSERT_EQ(verified.problems.size(), 1u);
  EXPECT_EQ(verified.problems[0].key, "big");
  EXPECT_EQ(verified.problems[0].file, chunk.file);

  // Unverified it loads: the caller asked for it.
  LoadOptions options = LoadFrom(env);
  options.verify = false;
  TestState state = TestState::Blank(
      {{{std::string("big")}, DType::kFloat32, Whole({64, 1024})},
       {{std::string("fine")}, DType::kFloat32, Whole({64})}},
      0);
  const auto report = Load(kDir, state.state(), nullptr, options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_FALSE(report->verified);
}

TEST(CheckpointTest, WhatIsOpenIsLoadedWithoutBeingOpenedAgain) {
  FakeEnv env;
  const std::vector<TestTensor> tensors = {
      {{std::string("w")}, DType::kFloat32, Whole({64, 3})}};
  TestState saved = TestState::Filled(tensors, 0, 1, SomeObjects());
  ASSERT_TRUE(Save(kDir, saved.state(), nullptr, SaveTo(env)).ok());
  std::vector<std::shared_ptr<const Checkpoint>> opened;
  for (const bool verify : {false, true}) {
    opened.push_back(*Checkpoint::Open(kDir, {verify, &env}));
  }
  ASSERT_TRUE(env.files().Remove(JoinFile(kDir, kIndexFile)).ok());
  for (const bool verify : {false, true}) {
    TestState loaded =
        TestState::Blank(tensors, 0, WithoutValues(SomeObjects()));
    const auto report = Load(opened[verify], loaded.state());
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(report->verified, verify);
    EXPECT_EQ(loaded.Difference(1), "");
  }
}

TEST(CheckpointTest, LayoutsAreThoseOfTheStoredBoxes) {
  const std::vector<std::pair<Dims, std::vector<Box>>> tensors = {
      {{}, {{{}, {}}}},
      {{}, {}},
      {{4}, {{{0}, {4}}}},
      {{4}, {{{0}, {2}}}},
      {{4}, {{{0}, {2}}, {{2}, {4}}}},
      {{4}, {{{2}, {4}}, {{0}, {2}}}},
      {{5}, {{{0}, {2}}, {{2}, {4}}}},
  };
  dcp::Metadata index;
  index.files = {"__0_0.distcp"};
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string key = absl::StrCat("t", i);
    index.AddTensor(key, {key}, DType::kFloat32, tensors[i].first);
    for (const Box& box : tensors[i].second) index.AddChunk(box, {0, 0, 100});
  }
  std::string bytes;
  ASSERT_TRUE(dcp::EncodeMetadata(index, [&](absl::string_view piece) {
                absl::StrAppend(&bytes, piece);
                return absl::OkStatus();
              }).ok());
  FakeEnv env;
  ASSERT_TRUE(env.files().CreateDirs(kDir).ok());
  env.fake_files().SetContent(JoinFile(kDir, kIndexFile), bytes);
  const auto checkpoint = Checkpoint::Open(kDir, {false, &env});
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const Catalog& catalog = (*checkpoint)->catalog();
  ASSERT_EQ(catalog.size(), tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    std::vector<Box> boxes;
    for (const LocalBox& local : catalog[i].layout.BoxesOf(kAnyHolder)) {
      boxes.push_back(local.box);
    }
    EXPECT_EQ(catalog[i].shape(), tensors[i].first) << i;
    EXPECT_THAT(boxes, testing::UnorderedElementsAreArray(tensors[i].second))
        << i;
  }
}

// Checkpoints from before version 2 of the digests.
TEST(CheckpointTest, OldDigestsAreCheckedAsTheyWereMade) {
  FakeEnv env;
  const std::vector<TestTensor> tensors = {
      {{std::string("w")}, DType::kFloat32, Rows({64, 3}, 2)}};
  const std::vector<ObjectEntry> objects = {
      {{std::string("step")}, Object(17)}};
  ASSERT_THAT(
      StatusOfRanks(
          2,
          [&](Communicator& comm) {
            TestState state =
                TestState::Filled(tensors, comm.rank(), 1, objects);
            return Save(kDir, state.state(), &comm, SaveTo(env)).status();
          }),
      AllOk());
  const std::string path = JoinFile(
      kDir,
      DigestsFile(FileId((*Checkpoint::Open(kDir, {true, &env}))->save_id())));
  const auto now = DecodeDigests(*env.fake_files().Content(path));
  ASSERT_TRUE(now.ok()) << now.status();
  StoredDigests old;
  old.version = DigestVersion::k1;
  old.index_bytes = now->index_bytes;
  old.index_crc = now->index_crc;
  const std::vector<std::byte> bytes = TestBytes(1, "w", 64 * 3 * 4);
  ContentDigest digest(bytes.size(), DigestVersion::k1);
  digest.AddRun(0, bytes);
  old.tensors["w"] = digest.Finish(DType::kFloat32, {64, 3});
  old.objects["step"] =
      DigestOfBytes(*dcp::EncodeStoredObject(Object(17)), DigestVersion::k1);
  const auto load = [&](const StoredDigests& digests) {
    env.fake_files().SetContent(path, EncodeDigests(digests));
    TestState state = TestState::Blank(
        {{{std::string("w")}, DType::kFloat32, Whole({64, 3})}}, 0,
        WithoutValues(objects));
    const auto report = Load(kDir, state.state(), nullptr, LoadFrom(env));
    if (report.ok()) {
      EXPECT_TRUE(report->verified);
    }
    return report.status();
  };
  EXPECT_TRUE(load(old).ok()) << load(old);
  EXPECT_TRUE(Verify(**Checkpoint::Open(kDir, {true, &env})).problems.empty());
  StoredDigests other = old;
  other.tensors["w"].low ^= 1;
  EXPECT_THAT(load(other),
              IsStatus(absl::StatusCode::kDataLoss,
                       DigestHex(old.tensors["w"], DigestVersion::k1)));
  other = old;
  other.objects["step"].low ^= 1;
  EXPECT_THAT(load(other), IsStatus(absl::StatusCode::kDataLoss, "step"));

  std::string text = EncodeDigests(*now);
  text.replace(text.find('2'), 1, "3");
  env.fake_files().SetContent(path, text);
  EXPECT_THAT(Checkpoint::Open(kDir, {true, &env}).status(),
              IsStatus(absl::StatusCode::kUnimplemented, "newer"));
}

// Every rank has saved for itself (use_collectives=False in Python).
TEST(CheckpointTest, AnIndexPerRankIsOneCheckpoint) {
  FakeEnv env;
  std::vector<TestTensor> tensors = {
      {{std::string("w")}, DType::kFloat32, Rows({7, 3}, 2)},
      {{std::string("r")}, DType::kFloat32, Whole({5}, 2)}};
  const auto own_index = [](int rank) {
    return JoinFile(kDir, absl::StrCat("__", rank, ".metadata"));
  };
  // What `rank` alone would write, under names of its own.
  const auto write = [&](int rank, int64_t seen) {
    TestState state =
        TestState::Filled(tensors, rank, 1,
                          {{{std::string("step")}, Object(17)},
                           {{std::string("seen")}, Object(seen)}});
    dcp::Metadata index;
    index.save_id = "id";
    index.files = {absl::StrCat("__", rank, "_0.distcp")};
    std::string file;
    for (size_t t = 0; t < tensors.size(); ++t) {
      const TensorSpec& spec = state.state().tensors->catalog()[t];
      index.AddTensor(spec.fqn, {spec.fqn}, spec.dtype, spec.shape());
      for (const LocalBox& local : spec.layout.BoxesOf(rank)) {
        std::string bytes(local.box.num_elements() * 4, '\0');
        ASSERT_TRUE(
            state.state()
                .tensors
                ->Read(
                    t, local.box, 0, local.box.num_elements(), spec.dtype,
                    absl::MakeSpan(reinterpret_cast<std::byte*>(bytes.data()),
                                   bytes.size()))
                .ok());
        const dcp::TensorArchive archive(spec.dtype, local.box.extents());
        index.AddChunk(local.box, {0, static_cast<int64_t>(file.size()),
                                   archive.total_bytes()});
        absl::StrAppend(&file, archive.head(), bytes,
                        archive.Tail(dcp::Crc32(0, bytes)));
      }
    }
    for (const ObjectEntry& object : state.state().objects) {
      const std::string archive =
          dcp::ObjectArchive(*dcp::EncodeStoredObject(object.value));
      dcp::ObjectEntryInfo info;
      info.key = JoinPath(object.path);
      info.path = object.path;
      info.location = {0, static_cast<int64_t>(file.size()),
                       static_cast<int64_t>(archive.size())};
      index.objects.push_back(std::move(info));
      file += archive;
    }
    std::string encoded;
    ASSERT_TRUE(dcp::EncodeMetadata(index, [&](absl::string_view bytes) {
                  encoded.append(bytes.data(), bytes.size());
                  return absl::OkStatus();
                }).ok());
    env.fake_files().SetContent(JoinFile(kDir, index.files[0]), file);
    env.fake_files().SetContent(own_index(rank), encoded);
  };
  ASSERT_TRUE(env.files().CreateDirs(kDir).ok());
  write(0, 100);
  write(1, 101);
  const auto load = [&] {
    TestState state =
        TestState::Blank({{{std::string("w")}, DType::kFloat32, Whole({7, 3})},
                          {{std::string("r")}, DType::kFloat32, Whole({5})}},
                         0,
                         {{{std::string("step")}, Object()},
                          {{std::string("seen@rank0")}, Object()},
                          {{std::string("seen@rank1")}, Object()}});
    const absl::Status status =
        Load(kDir, state.state(), nullptr, LoadFrom(env)).status();
    if (status.ok()) {
      EXPECT_EQ(state.Difference(1), "");
      EXPECT_TRUE(state.state().objects[0].value == Object(17));
      EXPECT_TRUE(state.state().objects[1].value == Object(100));
      EXPECT_TRUE(state.state().objects[2].value == Object(101));
    }
    return status;
  };
  EXPECT_TRUE(load().ok()) << load();
  const auto opened = Checkpoint::Open(kDir, {true, &env});
  ASSERT_TRUE(opened.ok()) << opened.status();
  // A replica counts once.
  EXPECT_EQ((*opened)->Chunks(*(*opened)->catalog().Find("r")).size(), 1u);
  const VerifyReport verified = Verify(**opened);
  EXPECT_TRUE(verified.problems.empty());
  EXPECT_TRUE(verified.unreferenced.empty());

  // There are no digests, but a CRC of each record.
  const StoredChunk chunk =
      (*opened)->Chunks(*(*opened)->catalog().Find("w"))[1];
  const std::string path = JoinFile(kDir, chunk.file);
  const std::string data = *env.fake_files().Content(path);
  std::string damaged = data;
  damaged[chunk.offset_bytes + 704] ^= 1;
  env.fake_files().SetContent(path, damaged);
  EXPECT_THAT(load(), IsStatus(absl::StatusCode::kDataLoss,
                               "the CRC of its elements differs"));
  EXPECT_THAT(load(), IsStatus(absl::StatusCode::kDataLoss, path));
  env.fake_files().SetContent(path, data);

  // Ranks that contradict each other, and one that is not there.
  tensors[0].layout = Rows({8, 3}, 2);
  write(1, 101);
  EXPECT_THAT(load(), IsStatus(absl::StatusCode::kDataLoss,
                               "\"w\" is float32 [7, 3] for rank 0 and float32 "
                               "[8, 3] for rank 1"));
  tensors[0].layout = Rows({7, 3}, 2);
  write(1, 101);
  EXPECT_TRUE(load().ok());
  ASSERT_TRUE(env.files().Rename(own_index(1), own_index(2)).ok());
  EXPECT_THAT(load(), IsStatus(absl::StatusCode::kNotFound, "none of rank 1"));
}

TEST(CheckpointTest, AMissingFileIsEverybodysError) {
  FakeEnv env;
  const std::vector<TestTensor> tensors = {
      {{std::string("w")}, DType::kFloat32, Rows({64}, 2)}};
  ASSERT_THAT(SaveOnTwoRanks(tensors, env), AllOk());
  const auto checkpoint = Checkpoint::Open(kDir, {true, &env});
  const std::string file = (*checkpoint)->Chunks(0)[1].file;
  ASSERT_TRUE(env.files().Remove(JoinFile(kDir, file)).ok());
  ASSERT_THAT(
      StatusOfRanks(
          2,
          [&](Communicator& comm) {
            TestState state = TestState::Blank(tensors, comm.rank());
            EXPECT_THAT(
                Load(kDir, state.state(), &comm, LoadFrom(env)).status(),
                IsStatus(absl::StatusCode::kNotFound, file));
            return absl::OkStatus();
          }),
      AllOk());
}

}  // namespace
}  // namespace dsd::checkpoint
