// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/env.h"

#include <sys/stat.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "dsd/testing/harness/no_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

TEST(EnvTest, WithoutThreadsThereIsNone) {
  bool ran = false;
  {
    const NoThreads none;
    EXPECT_EQ(Env::Real()->StartThread("t", [&] { ran = true; }), nullptr);
  }
  EXPECT_FALSE(ran);
  Env::Real()->StartThread("t", [&] { ran = true; }).reset();
  EXPECT_TRUE(ran);
  const absl::Status status = NoThread("dsd_t");
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(absl::StrContains(status.message(), "dsd_t")) << status;
}

using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;

class RealFilesTest : public testing::Test {
 protected:
  RealFilesTest()
      : files_(Env::Real()->files()),
        dir_(absl::StrCat(
            testing::TempDir(), "/env_", getpid(), "_",
            testing::UnitTest::GetInstance()->current_test_info()->name())) {
    EXPECT_TRUE(files_.CreateDirs(dir_).ok());
  }

  std::string In(absl::string_view name) {
    return absl::StrCat(dir_, "/", name);
  }

  void Write(const std::string& path, absl::string_view text,
             int64_t offset = 0) {
    auto file = files_.CreateWritable(path);
    ASSERT_TRUE(file.ok()) << file.status();
    ASSERT_TRUE((*file)
                    ->WriteAt(offset, absl::MakeConstSpan(
                                          reinterpret_cast<const std::byte*>(
                                              text.data()),
                                          text.size()))
                    .ok());
    ASSERT_TRUE((*file)->Sync().ok());
    ASSERT_TRUE((*file)->Close().ok());
  }

  absl::StatusOr<std::string> Read(const std::string& path, int64_t offset,
                                   size_t size) {
    auto file = files_.OpenReadable(path);
    if (!file.ok()) return file.status();
    std::string out(size, ' ');
    const absl::Status status = (*file)->ReadAt(
        offset,
        absl::MakeSpan(reinterpret_cast<std::byte*>(out.data()), out.size()));
    if (!status.ok()) return status;
    return out;
  }

  FileSystem& files_;
  const std::string dir_;
};

TEST_F(RealFilesTest, WritesAndReadsRanges) {
  Write(In("x"), "hello", 3);
  EXPECT_EQ(*Read(In("x"), 0, 8), std::string("\0\0\0hello", 8));
  EXPECT_EQ(*Read(In("x"), 5, 2), "ll");
  EXPECT_EQ(Read(In("x"), 5, 4).status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(files_.Stat(In("x"))->size_bytes, 8);
}

TEST_F(RealFilesTest, ReservedBytesChangeNothingOfWhatIsWritten) {
  auto file = files_.CreateWritable(In("a"));
  ASSERT_TRUE(file.ok()) << file.status();
  const absl::Status reserved = (*file)->Reserve(1 << 20);
  ASSERT_TRUE(reserved.ok()) << reserved;
  const std::string text((1 << 20) + 5, 'x');
  ASSERT_TRUE(
      (*file)
          ->WriteAt(0, absl::MakeConstSpan(
                           reinterpret_cast<const std::byte*>(text.data()),
                           text.size()))
          .ok());
  ASSERT_TRUE((*file)->Close().ok());
  EXPECT_EQ(files_.Stat(In("a"))->size_bytes, (1 << 20) + 5);
  EXPECT_EQ(*Read(In("a"), 0, text.size()), text);
}

TEST_F(RealFilesTest, NamesPathsInErrors) {
  EXPECT_EQ(Read(In("no"), 0, 1).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(Read(In("no"), 0, 1).status().message()),
              HasSubstr(In("no")));
  Write(In("x"), "1");
  EXPECT_EQ(files_.CreateWritable(In("x")).status().code(),
            absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(files_.CreateDirs(In("x/y")).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(files_.CreateDirs("").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(files_.Remove(dir_).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(Read(In("x/y"), 0, 1).status().message()),
              EndsWith(absl::StrCat(In("x/y"), "\": Not a directory")));
}

TEST_F(RealFilesTest, OpensOnlyRegularFilesAndNeverBlocks) {
  ASSERT_EQ(mkfifo(In("fifo").c_str(), 0600), 0);
  EXPECT_EQ(files_.OpenReadable(In("fifo")).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(files_.OpenReadable(dir_).status().code(),
            absl::StatusCode::kFailedPrecondition);
  ASSERT_EQ(symlink("nowhere", In("link").c_str()), 0);
  EXPECT_EQ(files_.Stat(In("link"))->kind, FileKind::kOther);
}

TEST_F(RealFilesTest, RenamesReplaceAndListsAreSorted) {
  Write(In("b"), "new");
  Write(In("a"), "old");
  EXPECT_THAT(*files_.List(dir_), ElementsAre("a", "b"));
  ASSERT_TRUE(files_.Rename(In("b"), In("a")).ok());
  EXPECT_THAT(*files_.List(dir_), ElementsAre("a"));
  EXPECT_EQ(*Read(In("a"), 0, 3), "new");
  EXPECT_TRUE(files_.SyncDir(dir_).ok());
  ASSERT_TRUE(files_.CreateDirs(In("p/q/r")).ok());
  EXPECT_TRUE(files_.CreateDirs(In("p/q/r")).ok());
  EXPECT_EQ(files_.Stat(In("p/q"))->kind, FileKind::kDirectory);
}

TEST(RealEnvTest, SeedsDifferAndThreadsJoin) {
  EXPECT_NE(Env::Real()->RandomSeed(), Env::Real()->RandomSeed());
  int value = 0;
  {
    auto thread = Env::Real()->StartThread("t", [&value] { value = 5; });
  }
  EXPECT_EQ(value, 5);
}

TEST(RealEnvTest, HostsHaveNames) {
  const std::string name = Env::Real()->HostId();
  EXPECT_NE(name, "");
  EXPECT_EQ(name, Env::Real()->HostId());
  EXPECT_EQ(name.find_first_of(" \n"), std::string::npos) << name;
}

TEST(RealEnvTest, AwaitEndsWithTheConditionOrTheDeadline) {
  Env* const env = Env::Real();
  absl::Mutex mu;
  bool done = false;
  auto thread = env->StartThread("t", [&] {
    absl::MutexLock lock(&mu);
    done = true;
  });
  absl::MutexLock lock(&mu);
  EXPECT_TRUE(
      env->Await(mu, absl::Condition(&done), env->Now() + absl::Minutes(1)));
  const bool never = false;
  EXPECT_FALSE(env->Await(mu, absl::Condition(&never), env->Now()));
}

}  // namespace
}  // namespace dsd
