// SPDX-License-Identifier: Apache-2.0
//
// A process that is killed at any operation on files, of a save, of one over an
// older checkpoint, of one that removes older ones, in the foreground and in
// the background: what is there afterwards is the checkpoint that was there or
// the new one, whole. On a real file system; for machines that die, and lose
// what was not synced, see commit_test.

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/own_files_env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/steps.h"
#include "dsd/frontends/checkpoint/test_state.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

using ::testing::AnyOf;

int rounds = 1;  // NOLINT: the test's argument, set once by main

// Which part of a checkpoint a file is.
std::string PartOf(const std::string& path) {
  const std::string name = std::filesystem::path(path).filename().string();
  if (absl::EndsWith(name, ".distcp")) return "data";
  if (absl::StartsWith(name, ".dsd_digests")) return "digests";
  if (absl::StartsWith(name, ".metadata_")) return "new index";
  if (name == ".metadata") return "index";
  if (absl::StrContains(name, "latest")) return "latest";
  return absl::StrContains(name, "step-") ? "step" : "directory";
}

// Where the process dies: at operation `at` of those that change files, before
// it, in it (half of what is written) or after it.
class Killer {
 public:
  enum class When { kBefore, kIn, kAfter };

  Killer(int64_t at, When when, int report_fd)
      : at_(at), when_(when), report_fd_(report_fd) {}

  // Runs `half` if the process is to die in the operation, else `whole`.
  template <class Fn, class HalfFn>
  auto Do(const char* operation, const std::string& path, const Fn& whole,
          const HalfFn& half) {
    const bool here = count_++ == at_;
    const std::string name = absl::StrCat(operation, " ", PartOf(path));
    if (here && when_ == When::kBefore) Die("before", name);
    if (here && when_ == When::kIn) {
      half();
      Die("in", name);
    }
    auto result = whole();
    if (here) Die("after", name);
    return result;
  }
  template <class Fn>
  auto Do(const char* operation, const std::string& path, const Fn& whole) {
    return Do(operation, path, whole, [] {});
  }

 private:
  void Die(const char* when, const std::string& name) const {
    const std::string text = absl::StrCat(when, " ", name);
    if (write(report_fd_, text.data(), text.size()) < 0) _exit(3);
    kill(getpid(), SIGKILL);
    pause();
  }

  const int64_t at_;
  const When when_;
  const int report_fd_;
  int64_t count_ = 0;  // operations are in the order of one thread
};

class DeadlyFile final : public WritableFile {
 public:
  DeadlyFile(std::unique_ptr<WritableFile> file, std::string path,
             Killer* killer)
      : file_(std::move(file)), path_(std::move(path)), killer_(*killer) {}

  absl::Status WriteAt(int64_t offset,
                       absl::Span<const std::byte> data) override {
    return killer_.Do(
        "write", path_, [&] { return file_->WriteAt(offset, data); },
        [&] {
          file_->WriteAt(offset, data.first(data.size() / 2)).IgnoreError();
        });
  }
  absl::Status Reserve(int64_t bytes) override { return file_->Reserve(bytes); }
  absl::Status Sync() override {
    return killer_.Do("sync", path_, [&] { return file_->Sync(); });
  }
  absl::Status Close() override { return file_->Close(); }

 private:
  const std::unique_ptr<WritableFile> file_;
  const std::string path_;
  Killer& killer_;
};

class DeadlyFiles final : public FileSystem {
 public:
  explicit DeadlyFiles(Killer* killer) : killer_(*killer) {}

  absl::StatusOr<std::unique_ptr<ReadableFile>> OpenReadable(
      const std::string& path) override {
    return real_.OpenReadable(path);
  }
  absl::StatusOr<std::unique_ptr<WritableFile>> CreateWritable(
      const std::string& path) override {
    DSD_ASSIGN_OR_RETURN(
        std::unique_ptr<WritableFile> file,
        killer_.Do("create", path, [&] { return real_.CreateWritable(path); }));
    return std::make_unique<DeadlyFile>(std::move(file), path, &killer_);
  }
  absl::Status Rename(const std::string& from, const std::string& to) override {
    return killer_.Do("rename", to, [&] { return real_.Rename(from, to); });
  }
  absl::Status Remove(const std::string& path) override {
    return killer_.Do("remove", path, [&] { return real_.Remove(path); });
  }
  absl::Status CreateDirs(const std::string& path) override {
    return killer_.Do("mkdir", path, [&] { return real_.CreateDirs(path); });
  }
  absl::StatusOr<std::vector<std::string>> List(
      const std::string& path) override {
    return real_.List(path);
  }
  absl::StatusOr<FileInfo> Stat(const std::string& path) override {
    return real_.Stat(path);
  }
  absl::Status SyncDir(const std::string& path) override {
    return killer_.Do("syncdir", path, [&] { return real_.SyncDir(path); });
  }

 private:
  FileSystem& real_ = Env::Real()->files();
  Killer& killer_;
};

std::vector<TestTensor> Tensors() {
  return {
      {{std::string("w")}, DType::kFloat32, Layout::Replicated({64, 8}, {0})},
      {{std::string("b")}, DType::kBFloat16, Layout::Replicated({6}, {0})}};
}
std::vector<ObjectEntry> Objects(uint64_t seed) {
  return {{{std::string("step")}, Object(static_cast<int64_t>(seed))}};
}

struct Scenario {
  const char* name;
  bool overwrite;
  bool series;
  bool background;
};

absl::Status SaveTo(const std::string& directory, uint64_t seed, Env* env,
                    const Scenario& scenario) {
  TestState state = TestState::Filled(Tensors(), 0, seed, Objects(seed));
  SaveOptions options;
  options.env = env;
  if (scenario.series) options.retention = Retention{1, 0};
  if (!scenario.background) {
    return Save(directory, state.state(), nullptr, options).status();
  }
  DSD_ASSIGN_OR_RETURN(const std::unique_ptr<Saver> saver,
                       Saver::Create(nullptr, "saves", env));
  DSD_RETURN_IF_ERROR(saver->Start(directory, state.state(), options));
  return saver->Wait().status();
}

// Which save the directory holds: 0 for none. Fails for anything in between.
uint64_t Holds(const std::string& directory) {
  TestState state = TestState::Blank(Tensors(), 0, Objects(0));
  const auto report = Load(directory, state.state());
  if (absl::IsNotFound(report.status())) return 0;
  EXPECT_TRUE(report.ok()) << report.status();
  for (uint64_t seed = 1; seed <= 3 && report.ok(); ++seed) {
    if (!state.Difference(seed).empty()) continue;
    EXPECT_TRUE(state.state().objects[0].value ==
                Object(static_cast<int64_t>(seed)));
    return seed;
  }
  ADD_FAILURE() << "a mixture in " << directory;
  return 99;
}

TEST(KillTest, TheOldOrTheNewCheckpointWhereverTheProcessDies) {
  constexpr Scenario kScenarios[] = {
      {"fresh", false, false, false},
      {"over an older one", true, false, false},
      {"one of a series", false, true, false},
      {"fresh, in the background", false, false, true},
      {"over an older one, in the background", true, false, true},
      {"one of a series, in the background", false, true, true}};
  constexpr Killer::When kWhen[] = {Killer::When::kBefore, Killer::When::kIn,
                                    Killer::When::kAfter};
  const std::string root =
      absl::StrCat(testing::TempDir(), "/kill_test_", getpid());
  std::set<std::string> places;
  int kills = 0;
  for (int round = 0; round < rounds; ++round) {
    for (const Scenario& scenario : kScenarios) {
      bool done = false;
      for (int64_t at = 0; !done; ++at) {
        for (const Killer::When when : kWhen) {
          std::filesystem::remove_all(root);
          const std::string series = root + "/step-";
          const std::string before = series + "1";
          const std::string directory =
              scenario.overwrite ? before : series + "2";
          if (scenario.overwrite || scenario.series) {
            ASSERT_TRUE(SaveTo(before, 1, Env::Real(), {}).ok());
          }
          int ends[2];
          ASSERT_EQ(pipe(ends), 0);
          const pid_t child = fork();
          ASSERT_GE(child, 0);
          if (child == 0) {
            close(ends[0]);
            Killer killer(at, when, ends[1]);
            DeadlyFiles files(&killer);
            OwnFilesEnv env(&files);
            _exit(SaveTo(directory, 2, &env, scenario).ok() ? 0 : 1);
          }
          close(ends[1]);
          char place[256];
          const ssize_t size = read(ends[0], place, sizeof(place));
          close(ends[0]);
          int status = 0;
          ASSERT_EQ(waitpid(child, &status, 0), child);
          const std::string where(place, size > 0 ? size : 0);
          SCOPED_TRACE(absl::StrCat(scenario.name, ": ", where));
          done = WIFEXITED(status);
          if (done) {
            ASSERT_EQ(WEXITSTATUS(status), 0);
          } else {
            ASSERT_EQ(WTERMSIG(status), SIGKILL);
            ++kills;
            places.insert(where);
          }
          if (scenario.series) {
            const auto latest = FindLatest(series);
            ASSERT_TRUE(latest.ok()) << latest.status();
            EXPECT_THAT(latest->step.number, AnyOf(1, 2));
            EXPECT_EQ(Holds(latest->step.directory),
                      static_cast<uint64_t>(latest->step.number));
          } else if (done) {
            EXPECT_EQ(Holds(directory), 2u);
          } else {
            EXPECT_THAT(Holds(directory),
                        AnyOf(scenario.overwrite ? 1u : 0u, 2u));
          }
          // The next save goes over what was left.
          ASSERT_TRUE(SaveTo(directory, 3, Env::Real(), scenario).ok());
          EXPECT_EQ(Holds(directory), 3u);
          EXPECT_EQ(Env::Real()->files().List(directory)->size(), 3u);
          if (done) break;
        }
      }
    }
  }
  std::filesystem::remove_all(root);
  std::printf("%d kills at %zu places\n", kills, places.size());
  EXPECT_GE(places.size(), 20u);
}

}  // namespace
}  // namespace dsd::checkpoint

// Argument: how often to go through all of it.
int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (argc == 2) dsd::checkpoint::rounds = std::atoi(argv[1]);
  return RUN_ALL_TESTS();
}
