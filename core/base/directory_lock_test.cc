// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/directory_lock.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/fake_env.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

class DirectoryLockTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = absl::StrCat(testing::TempDir(), "/directory_lock_XXXXXX");
    ASSERT_NE(mkdtemp(directory_.data()), nullptr);
  }
  void TearDown() override { files_.Remove(directory_).IgnoreError(); }

  FileSystem& files_ = Env::Real()->files();
  std::string directory_;
};

TEST_F(DirectoryLockTest, OneAtATime) {
  auto first = DirectoryLock::Try(files_, directory_);
  ASSERT_TRUE(first.ok()) << first.status();
  if (*first == nullptr) GTEST_SKIP() << "no locks on this file system";
  const auto second = DirectoryLock::Try(files_, directory_);
  EXPECT_TRUE(absl::IsFailedPrecondition(second.status())) << second.status();
  // Nothing of it is to be seen.
  EXPECT_TRUE(files_.List(directory_)->empty());
  first->reset();
  const auto third = DirectoryLock::Try(files_, directory_);
  ASSERT_TRUE(third.ok()) << third.status();
  EXPECT_NE(*third, nullptr);
}

TEST_F(DirectoryLockTest, DiesWithItsProcess) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    close(ends[0]);
    const auto lock = DirectoryLock::Try(files_, directory_);
    const char has = lock.ok() && *lock != nullptr ? 'y' : 'n';
    if (write(ends[1], &has, 1) != 1) _exit(1);
    while (true) pause();
  }
  close(ends[1]);
  char has = 0;
  ASSERT_EQ(read(ends[0], &has, 1), 1);
  close(ends[0]);
  const auto during = DirectoryLock::Try(files_, directory_);
  kill(child, SIGKILL);
  int status;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  if (has != 'y') GTEST_SKIP() << "no locks on this file system";
  EXPECT_TRUE(absl::IsFailedPrecondition(during.status())) << during.status();
  const auto after = DirectoryLock::Try(files_, directory_);
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_NE(*after, nullptr);
}

TEST_F(DirectoryLockTest, ChildrenDoNotKeepIt) {
  auto lock = DirectoryLock::Try(files_, directory_);
  ASSERT_TRUE(lock.ok()) << lock.status();
  if (*lock == nullptr) GTEST_SKIP() << "no locks on this file system";
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    while (true) pause();
  }
  lock->reset();
  const auto next = DirectoryLock::Try(files_, directory_);
  kill(child, SIGKILL);
  int status;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(next.ok()) << next.status();
}

TEST_F(DirectoryLockTest, WhereThereIsNothingToLock) {
  const auto gone = DirectoryLock::Try(files_, directory_ + "/nothing");
  EXPECT_TRUE(absl::IsNotFound(gone.status())) << gone.status();
  FakeEnv env;
  ASSERT_TRUE(env.files().CreateDirs("/d").ok());
  const auto fake = DirectoryLock::Try(env.files(), "/d");
  ASSERT_TRUE(fake.ok()) << fake.status();
  EXPECT_EQ(*fake, nullptr);
}

}  // namespace
}  // namespace dsd
