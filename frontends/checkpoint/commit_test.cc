// SPDX-License-Identifier: Apache-2.0
//
// What is left of a save that fails or dies at any operation: the checkpoint
// that was there or the new one, whole.

#include <stdlib.h>

#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/directory_lock.h"
#include "dsd/core/base/fake_env.h"
#include "dsd/core/base/own_files_env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/export.h"
#include "dsd/frontends/checkpoint/save_job.h"
#include "dsd/frontends/checkpoint/steps.h"
#include "dsd/frontends/checkpoint/test_state.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

using ::testing::AnyOf;
using ::testing::Each;
using ::testing::Not;

constexpr char kDir[] = "/parent/job";
constexpr uint64_t kOld = 1;
constexpr uint64_t kNew = 2;

std::vector<TestTensor> Tensors(int ranks) {
  const DeviceMesh mesh = DeviceMesh::Iota({ranks});
  return {{{std::string("w")},
           DType::kFloat32,
           *Layout::FromPlacements({64, 8}, mesh, {Shard(0)})},
          {{std::string("b")},
           DType::kBFloat16,
           *Layout::FromPlacements({6}, mesh, {Replicate()})}};
}

std::vector<ObjectEntry> Objects(uint64_t seed) {
  return {{{std::string("step")}, Object(static_cast<int64_t>(seed))}};
}

// In the foreground, or in the background of a Saver.
std::vector<absl::Status> SaveTo(const std::string& directory, int ranks,
                                 FakeEnv& env, uint64_t seed, bool background,
                                 std::optional<Retention> retention = {}) {
  return StatusOfRanks(ranks, [&](Communicator& comm) -> absl::Status {
    TestState state =
        TestState::Filled(Tensors(ranks), comm.rank(), seed, Objects(seed));
    SaveOptions options;
    options.env = &env;
    options.retention = retention;
    if (!background) {
      return Save(directory, state.state(), &comm, options).status();
    }
    DSD_ASSIGN_OR_RETURN(const std::unique_ptr<Saver> saver,
                         Saver::Create(&comm, "saves", &env));
    DSD_RETURN_IF_ERROR(saver->Start(directory, state.state(), options));
    return saver->Wait().status();
  });
}

// Which save the directory holds: 0 for none. Fails for anything in between.
uint64_t Holds(FakeEnv& env, const std::string& directory = kDir) {
  TestState state = TestState::Blank(Tensors(1), 0, Objects(0));
  LoadOptions options;
  options.env = &env;
  const auto report = Load(directory, state.state(), nullptr, options);
  if (absl::IsNotFound(report.status())) return 0;
  EXPECT_TRUE(report.ok()) << report.status();
  if (!report.ok()) return 99;
  EXPECT_TRUE(report->verified);
  for (const uint64_t seed : {kOld, kNew, uint64_t{3}, uint64_t{4}}) {
    if (state.Difference(seed).empty()) {
      EXPECT_TRUE(state.state().objects[0].value ==
                  Object(static_cast<int64_t>(seed)));
      return seed;
    }
  }
  ADD_FAILURE() << "a mixture";
  return 99;
}

class CommitTest : public testing::TestWithParam<std::tuple<bool, bool>> {
 protected:
  bool overwrite() const { return std::get<0>(GetParam()); }
  bool background() const { return std::get<1>(GetParam()); }
  std::vector<absl::Status> SaveOn(int ranks, FakeEnv& env, uint64_t seed) {
    return SaveTo(kDir, ranks, env, seed, background());
  }
  uint64_t before() const { return overwrite() ? kOld : 0; }

  void Prepare(FakeEnv& env, int ranks) {
    if (!overwrite()) return;
    ASSERT_THAT(SaveOn(ranks, env, kOld), AllOk());
    ASSERT_EQ(Holds(env), kOld);
  }
};

INSTANTIATE_TEST_SUITE_P(
    Ways, CommitTest, testing::Combine(testing::Bool(), testing::Bool()),
    [](const testing::TestParamInfo<std::tuple<bool, bool>>& info) {
      return absl::StrCat(std::get<0>(info.param) ? "Overwrite" : "Fresh",
                          std::get<1>(info.param) ? "InBackground" : "");
    });

// One operation fails, on whatever rank makes it; the machine lives on.
TEST_P(CommitTest, AnErrorAtAnyOperation) {
  for (const int ranks : {1, 2}) {
    for (int64_t at = 0;; ++at) {
      FakeEnv env;
      Prepare(env, ranks);
      const int64_t start = env.fake_files().num_operations();
      std::atomic<bool> hit = false;
      std::atomic<bool> in_removal = false;
      env.fake_files().SetFault([&](const FileOperation& operation) {
        if (operation.index != start + at) return absl::OkStatus();
        hit = true;
        in_removal = operation.kind == FileOperation::Kind::kRemove;
        return absl::UnavailableError("I/O error");
      });
      const std::vector<absl::Status> statuses = SaveOn(ranks, env, kNew);
      env.fake_files().SetFault(nullptr);
      if (!hit) {
        EXPECT_THAT(statuses, AllOk());
        EXPECT_EQ(Holds(env), kNew);
        EXPECT_GT(at, 10);
        break;
      }
      const uint64_t holds = Holds(env);
      if (in_removal) {
        // Of the old files, after the commit.
        EXPECT_THAT(statuses, AllOk()) << ranks << " ranks, operation " << at;
        EXPECT_EQ(holds, kNew);
      } else {
        EXPECT_THAT(statuses,
                    Each(IsStatus(absl::StatusCode::kUnavailable, "I/O error")))
            << ranks << " ranks, operation " << at;
        EXPECT_THAT(holds, AnyOf(before(), kNew));
        if (holds == before()) {
          // Own files are gone.
          const auto names = env.files().List(kDir);
          EXPECT_EQ(names.ok() ? names->size() : 0,
                    overwrite() ? 2u + ranks : 0u)
              << ranks << " ranks, operation " << at;
        }
      }
      // And the next save is not in the way of anything.
      EXPECT_THAT(SaveOn(ranks, env, kNew), AllOk());
      EXPECT_EQ(Holds(env), kNew);
      EXPECT_EQ(env.files().List(kDir)->size(), 2u + ranks);
    }
  }
}

// The machine dies in the operation; what was not synced is lost or kept.
TEST_P(CommitTest, ACrashAtAnyOperation) {
  for (const int ranks : {1, 2}) {
    bool done = false;
    for (int64_t at = 0; !done; ++at) {
      for (uint64_t seed = 0; seed < 20; ++seed) {
        FakeEnv env;
        Prepare(env, ranks);
        env.fake_files().CrashAt(env.fake_files().num_operations() + at);
        const std::vector<absl::Status> statuses = SaveOn(ranks, env, kNew);
        const bool succeeded = statuses[0].ok();
        env.fake_files().CrashAt(env.fake_files().num_operations());
        env.fake_files().Recover(seed);
        const uint64_t holds = Holds(env);
        if (succeeded) {
          EXPECT_EQ(holds, kNew) << ranks << " ranks, operation " << at;
        } else {
          EXPECT_THAT(holds, AnyOf(before(), kNew))
              << ranks << " ranks, operation " << at << ", seed " << seed;
        }
        EXPECT_THAT(SaveOn(ranks, env, kNew), AllOk());
        EXPECT_EQ(Holds(env), kNew);
        EXPECT_EQ(env.files().List(kDir)->size(), 2u + ranks);
        // Crashes in the removals at the end do not matter any more.
        done = succeeded && at > 40;
      }
    }
  }
}

TEST_P(CommitTest, AFullDiskAtAnyByte) {
  constexpr int kRanks = 2;
  bool fits = false;
  int64_t used = 0;
  {
    FakeEnv env;
    Prepare(env, kRanks);
    const auto names = env.files().List(kDir);
    for (const std::string& name : names.value_or(std::vector<std::string>())) {
      used += env.files().Stat(absl::StrCat(kDir, "/", name))->size_bytes;
    }
  }
  for (int64_t room = 0; !fits; room += 97) {
    FakeEnv env;
    Prepare(env, kRanks);
    env.fake_files().SetCapacity(used + room);
    const std::vector<absl::Status> statuses = SaveOn(kRanks, env, kNew);
    env.fake_files().SetCapacity(-1);
    fits = statuses[0].ok();
    if (fits) {
      EXPECT_EQ(Holds(env), kNew);
      EXPECT_GT(room, 5000);
    } else {
      EXPECT_THAT(statuses, Each(IsStatus(absl::StatusCode::kResourceExhausted,
                                          "no space left")));
      EXPECT_THAT(
          statuses,
          Each(Not(IsStatus(absl::StatusCode::kResourceExhausted, "#"))));
      EXPECT_EQ(Holds(env), before());
      const auto names = env.files().List(kDir);
      EXPECT_EQ(names.ok() ? names->size() : 0, overwrite() ? 4u : 0u);
    }
  }
}

// What does not fit is known before the first byte is written.
TEST(FullDiskTest, IsKnownAhead) {
  for (const char* const what : {"dcp", "a.safetensors", "a.pt"}) {
    SCOPED_TRACE(what);
    FakeEnv env;
    const std::vector<TestTensor> tensors = {
        {{std::string("w")},
         DType::kFloat32,
         Layout::Replicated({3000, 1000}, {0})}};
    TestState state = TestState::Filled(tensors, 0, 1);
    int64_t writes = 0;
    env.fake_files().SetFault([&](const FileOperation& operation) {
      writes += operation.kind == FileOperation::Kind::kWrite;
      return absl::OkStatus();
    });
    env.fake_files().SetCapacity(11'000'000);
    absl::Status status;
    if (std::string(what) == "dcp") {
      SaveOptions options;
      options.env = &env;
      status = Save("/job", state.state(), nullptr, options).status();
    } else {
      ExportOptions options;
      options.env = &env;
      status = Export(absl::StrCat("/job/", what),
                      std::string(what) == "a.pt" ? Format::kTorchArchive
                                                  : Format::kSafetensors,
                      state.state(), nullptr, options)
                   .status();
    }
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kResourceExhausted,
                                 "no space left"));
    EXPECT_EQ(writes, 0);
  }
}

// Files in memory, on which something happens before the rename to `to`.
class FilesWithAHook final : public FileSystem {
 public:
  FilesWithAHook(FileSystem* files, std::string to, std::function<void()> hook)
      : files_(*files), to_(std::move(to)), hook_(std::move(hook)) {}

  absl::StatusOr<std::unique_ptr<ReadableFile>> OpenReadable(
      const std::string& path) override {
    return files_.OpenReadable(path);
  }
  absl::StatusOr<std::unique_ptr<WritableFile>> CreateWritable(
      const std::string& path) override {
    return files_.CreateWritable(path);
  }
  absl::Status Rename(const std::string& from, const std::string& to) override {
    if (to == to_) std::exchange(hook_, [] {})();
    return files_.Rename(from, to);
  }
  absl::Status Remove(const std::string& path) override {
    return files_.Remove(path);
  }
  absl::Status CreateDirs(const std::string& path) override {
    return files_.CreateDirs(path);
  }
  absl::StatusOr<std::vector<std::string>> List(
      const std::string& path) override {
    return files_.List(path);
  }
  absl::StatusOr<FileInfo> Stat(const std::string& path) override {
    return files_.Stat(path);
  }
  absl::Status SyncDir(const std::string& path) override {
    return files_.SyncDir(path);
  }

 private:
  FileSystem& files_;
  const std::string to_;
  std::function<void()> hook_;
};

// Storage without locks, on which two saves begin at the same time: each leaves
// the other's files alone, and the one that ends last is there.
TEST(TwoSavesTest, ThatBeginTogetherLeaveTheLastOne) {
  FakeEnv env;
  ASSERT_THAT(SaveTo(kDir, 1, env, 3, false), AllOk());
  TestState early = TestState::Filled(Tensors(1), 0, kOld, Objects(kOld));
  TestState late = TestState::Filled(Tensors(1), 0, kNew, Objects(kNew));
  SaveOptions options;
  options.env = &env;
  SaveJob early_job(kDir, nullptr, options);
  std::shared_ptr<const SavePlan> plan;
  ASSERT_TRUE(early_job.Begin(absl::OkStatus(), early.state(), &plan).ok());
  FilesWithAHook files(&env.files(), absl::StrCat(kDir, "/.metadata"), [&] {
    const auto report =
        early_job.Finish(absl::OkStatus(), early.state().tensors);
    EXPECT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(Holds(env), kOld);
  });
  OwnFilesEnv late_env(&files);
  options.env = &late_env;
  const auto report = Save(kDir, late.state(), nullptr, options);
  EXPECT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(Holds(env), kNew);
  // The next one takes away what is of no use.
  EXPECT_THAT(SaveTo(kDir, 1, env, 4, false), AllOk());
  EXPECT_EQ(Holds(env), 4u);
  EXPECT_EQ(env.files().List(kDir)->size(), 3u);
}

// A save that begins while another one ends takes its files for leftovers: the
// one that loses them says so.
TEST(TwoSavesTest, AnIndexThatIsGoneIsNotInPlace) {
  FakeEnv env;
  FilesWithAHook files(&env.files(), absl::StrCat(kDir, "/.metadata"), [&] {
    EXPECT_THAT(SaveTo(kDir, 1, env, kNew, false), AllOk());
  });
  OwnFilesEnv own(&files);
  TestState state = TestState::Filled(Tensors(1), 0, kOld, Objects(kOld));
  SaveOptions options;
  options.env = &own;
  const absl::Status status =
      Save(kDir, state.state(), nullptr, options).status();
  EXPECT_THAT(status, IsStatus(absl::StatusCode::kNotFound, kDir));
  EXPECT_THAT(status.message(), Not(testing::HasSubstr("in place")));
  EXPECT_EQ(Holds(env), kNew);
}

TEST(TwoSavesTest, AnExportThatIsGoneIsNotInPlace) {
  for (const std::string path : {"/e/a.safetensors", "/e/a.pt", "/e/d"}) {
    SCOPED_TRACE(path);
    const bool is_directory = path == "/e/d";
    const Format format =
        path == "/e/a.pt" ? Format::kTorchArchive : Format::kSafetensors;
    FakeEnv env;
    const auto write = [&](uint64_t seed, Env* over) {
      TestState state = TestState::Filled(Tensors(1), 0, seed);
      ExportOptions options;
      options.env = over;
      options.max_file_bytes = 100;
      return Export(path, format, state.state(), nullptr, options).status();
    };
    FilesWithAHook files(
        &env.files(),
        is_directory ? path + "/model.safetensors.index.json" : path,
        [&] { EXPECT_TRUE(write(kNew, &env).ok()); });
    OwnFilesEnv own(&files);
    const absl::Status status = write(kOld, &own);
    EXPECT_THAT(status, IsStatus(absl::StatusCode::kNotFound, path));
    EXPECT_THAT(status.message(), Not(testing::HasSubstr("in place")));
    TestState state = TestState::Blank(Tensors(1), 0);
    LoadOptions options;
    options.env = &env;
    const auto loaded = Load(path, state.state(), nullptr, options);
    EXPECT_TRUE(loaded.ok()) << loaded.status();
    EXPECT_EQ(state.Difference(kNew), "");
  }
}

// Where the storage has locks there is one save at a time.
TEST(TwoSavesTest, TheSecondIsRefused) {
  std::string root = absl::StrCat(testing::TempDir(), "/two_saves_XXXXXX");
  ASSERT_NE(mkdtemp(root.data()), nullptr);
  FileSystem& files = Env::Real()->files();
  if (*DirectoryLock::Try(files, root) == nullptr) {
    GTEST_SKIP() << "no locks on this file system";
  }
  const std::string directory = root + "/job/checkpoint";
  TestState state = TestState::Filled(Tensors(1), 0, kOld);
  const auto save = [&] {
    return Save(directory, state.state(), nullptr, {}).status();
  };
  const auto write = [&] {
    return Export(directory, Format::kSafetensors, state.state()).status();
  };
  {
    SaveJob job(directory, nullptr, {});
    std::shared_ptr<const SavePlan> plan;
    ASSERT_TRUE(job.Begin(absl::OkStatus(), state.state(), &plan).ok());
    for (const absl::Status& status : {save(), write()}) {
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kFailedPrecondition,
                                   "is under way"));
      EXPECT_THAT(status,
                  IsStatus(absl::StatusCode::kFailedPrecondition, directory));
    }
    const auto report = job.Finish(absl::OkStatus(), state.state().tensors);
    EXPECT_TRUE(report.ok()) << report.status();
    // It is over, though the job is still there.
    EXPECT_TRUE(save().ok());
  }
  // In the background, too; and what fails leaves no lock.
  const auto saver = *Saver::Create();
  ASSERT_TRUE(saver->Start(directory, state.state()).ok());
  ASSERT_TRUE(saver->Wait().ok());
  SaveOptions careful;
  careful.overwrite = false;
  EXPECT_TRUE(absl::IsAlreadyExists(
      Save(directory, state.state(), nullptr, careful).status()));
  EXPECT_TRUE(save().ok());
  EXPECT_EQ(files.List(directory)->size(), 3u);
  std::filesystem::remove_all(root);
}

// What fails leaves no directory that it has made, and no other one goes.
TEST(FailedSaveTest, TakesItsDirectoriesAway) {
  for (const bool background : {false, true}) {
    FakeEnv env;
    ASSERT_TRUE(env.files().CreateDirs("/there").ok());
    for (const std::string directory : {"/there", "/there/made/too"}) {
      env.fake_files().SetCapacity(100);
      EXPECT_THAT(
          SaveTo(directory, 2, env, kNew, background),
          Each(IsStatus(absl::StatusCode::kResourceExhausted, directory)));
      env.fake_files().SetCapacity(-1);
      EXPECT_THAT(*env.files().List("/there"), testing::IsEmpty());
    }
    // What is refused has made nothing.
    TestState state = TestState::Filled(Tensors(1), 0, kNew);
    SaveOptions options;
    options.env = &env;
    options.retention = Retention{1, 0};
    EXPECT_THAT(Save("/there/made", state.state(), nullptr, options).status(),
                IsStatus(absl::StatusCode::kInvalidArgument, "number"));
    EXPECT_THAT(*env.files().List("/there"), testing::IsEmpty());
  }
}

// One of a series: what is older is removed when the new one is in place. The
// machine dies in any operation of it, removals included.
TEST(SeriesTest, ACrashAtAnyOperationLeavesAWholeCheckpoint) {
  constexpr char kSeries[] = "/runs/7/step-";
  const auto save = [&](FakeEnv& env, uint64_t step, bool background) {
    return SaveTo(absl::StrCat(kSeries, step), 2, env, step, background,
                  Retention{1, 0});
  };
  int crashes = 0;
  int removals = 0;
  for (const bool background : {false, true}) {
    bool done = false;
    for (int64_t at = 0; !done; ++at) {
      for (uint64_t seed = 0; seed < 10; ++seed) {
        FakeEnv env;
        ASSERT_THAT(SaveTo(absl::StrCat(kSeries, 1), 2, env, 1, false),
                    AllOk());
        ASSERT_THAT(SaveTo(absl::StrCat(kSeries, 2), 2, env, 2, false),
                    AllOk());
        const int64_t start = env.fake_files().num_operations();
        env.fake_files().CrashAt(start + at);
        const std::vector<absl::Status> statuses = save(env, 3, background);
        done = env.fake_files().num_operations() <= start + at;
        env.fake_files().CrashAt(env.fake_files().num_operations());
        env.fake_files().Recover(seed);
        crashes += !done;

        const auto latest = FindLatest(kSeries, nullptr, {}, &env);
        ASSERT_TRUE(latest.ok()) << at << ": " << latest.status();
        EXPECT_THAT(latest->step.number, AnyOf(2, 3));
        if (statuses[0].ok()) {
          EXPECT_EQ(latest->step.number, 3);
        }
        EXPECT_EQ(Holds(env, latest->step.directory),
                  static_cast<uint64_t>(latest->step.number));
        // Whatever else is listed is whole as well, and what has no index is
        // taken for nothing.
        const auto steps = ListSteps(kSeries, &env);
        ASSERT_TRUE(steps.ok()) << steps.status();
        for (const Step& step : *steps) {
          const uint64_t holds = Holds(env, step.directory);
          EXPECT_EQ(holds, static_cast<uint64_t>(step.number));
          removals += step.number == 1;
        }
        // The next one cleans up.
        EXPECT_THAT(save(env, 4, background), AllOk());
        EXPECT_EQ(Holds(env, absl::StrCat(kSeries, 4)), 4u);
        EXPECT_THAT(*env.files().List("/runs/7"),
                    testing::ElementsAre("step-4", "step-latest"));
      }
    }
  }
  EXPECT_GT(crashes, 400);
  EXPECT_GT(removals, 0);
}

}  // namespace
}  // namespace dsd::checkpoint
