// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/fake_env.h"

#include <memory>
#include <set>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

absl::Span<const std::byte> AsBytes(absl::string_view text) {
  return absl::MakeConstSpan(reinterpret_cast<const std::byte*>(text.data()),
                             text.size());
}

void WriteFile(FileSystem& files, const std::string& path,
               absl::string_view text, bool sync) {
  auto file = files.CreateWritable(path);
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_TRUE((*file)->WriteAt(0, AsBytes(text)).ok());
  if (sync) {
    ASSERT_TRUE((*file)->Sync().ok());
  }
}

TEST(FakeFileSystemTest, BehavesLikeFiles) {
  FakeEnv env;
  FileSystem& files = env.files();
  ASSERT_TRUE(files.CreateDirs("/a/b").ok());
  WriteFile(files, "/a/b/x", "hello", true);
  EXPECT_EQ(files.Stat("/a/b/x")->size_bytes, 5);
  EXPECT_EQ(files.Stat("/a/b")->kind, FileKind::kDirectory);
  EXPECT_EQ(files.CreateWritable("/a/b/x").status().code(),
            absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(files.Remove("/a/b").code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(files.Rename("/a/b/x", "/a/b/y").ok());
  EXPECT_EQ(files.OpenReadable("/a/b/x").status().code(),
            absl::StatusCode::kNotFound);
  auto file = files.OpenReadable("/a/b/y");
  ASSERT_TRUE(file.ok());
  std::string text(3, ' ');
  ASSERT_TRUE((*file)
                  ->ReadAt(2, absl::MakeSpan(
                                  reinterpret_cast<std::byte*>(text.data()), 3))
                  .ok());
  EXPECT_EQ(text, "llo");
  EXPECT_EQ((*file)
                ->ReadAt(3, absl::MakeSpan(
                                reinterpret_cast<std::byte*>(text.data()), 3))
                .code(),
            absl::StatusCode::kOutOfRange);
  EXPECT_EQ(files.OpenReadable("/a").status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(*files.List("/a/b"), std::vector<std::string>{"y"});
}

TEST(FakeFileSystemTest, ACrashLosesWhatWasNotSynced) {
  std::set<std::string> found;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    FakeEnv env;
    FakeFileSystem& files = env.fake_files();
    ASSERT_TRUE(files.CreateDirs("/d").ok());
    ASSERT_TRUE(files.SyncDir("/").ok());
    WriteFile(files, "/d/safe", "safe", true);
    ASSERT_TRUE(files.SyncDir("/d").ok());
    WriteFile(files, "/d/loose", "loose", false);
    files.CrashAt(files.num_operations());
    EXPECT_EQ(files.Remove("/d/safe").code(), absl::StatusCode::kUnavailable);
    files.Recover(seed);
    EXPECT_EQ(*files.Content("/d/safe"), "safe");
    const auto loose = files.Content("/d/loose");
    found.insert(loose.ok() ? *loose : "no name");
    EXPECT_EQ(files.Remove("/d/safe"), absl::OkStatus());
  }
  // Gone, there without its bytes, whole, and torn.
  EXPECT_EQ(found.count("no name"), 1u);
  EXPECT_EQ(found.count(""), 1u);
  EXPECT_EQ(found.count("loose"), 1u);
  EXPECT_GE(found.size(), 5u);
}

TEST(FakeFileSystemTest, ARenameIsWholeOrNotAtAll) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    FakeEnv env;
    FakeFileSystem& files = env.fake_files();
    WriteFile(files, "/old", "old", true);
    WriteFile(files, "/new", "new", true);
    ASSERT_TRUE(files.SyncDir("/").ok());
    ASSERT_TRUE(files.Rename("/new", "/old").ok());
    files.CrashAt(files.num_operations());
    files.Recover(seed);
    const bool renamed = !files.Stat("/new").ok();
    EXPECT_EQ(*files.Content("/old"), renamed ? "new" : "old");
  }
}

TEST(FakeFileSystemTest, FaultsAndAFullDisk) {
  FakeEnv env;
  FakeFileSystem& files = env.fake_files();
  files.SetFault([](const FileOperation& operation) {
    return operation.index == 1 ? absl::UnavailableError("I/O error")
                                : absl::OkStatus();
  });
  auto file = files.CreateWritable("/x");
  ASSERT_TRUE(file.ok());
  EXPECT_EQ((*file)->WriteAt(0, AsBytes("12345678")).code(),
            absl::StatusCode::kUnavailable);
  ASSERT_TRUE((*file)->WriteAt(0, AsBytes("12345678")).ok());
  files.SetCapacity(10);
  EXPECT_TRUE((*file)->WriteAt(8, AsBytes("90")).ok());
  EXPECT_EQ((*file)->WriteAt(10, AsBytes("1")).code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(FakeEnvTest, TheClockMovesWhenTold) {
  FakeEnv env;
  const absl::Time start = env.Now();
  EXPECT_EQ(env.Now(), start);
  env.SleepUntil(start + absl::Hours(3));
  EXPECT_EQ(env.Now(), start + absl::Hours(3));

  absl::Mutex mu;
  bool done = false;
  std::unique_ptr<EnvThread> mover = env.StartThread("mover", [&] {
    absl::MutexLock lock(&mu);
    done = true;
    env.Advance(absl::Hours(10));
  });
  absl::MutexLock lock(&mu);
  EXPECT_TRUE(env.Await(mu, absl::Condition(&done), start + absl::Hours(5)));
  const bool never = false;
  EXPECT_FALSE(env.Await(mu, absl::Condition(&never), start + absl::Hours(12)));
}

}  // namespace
}  // namespace dsd
