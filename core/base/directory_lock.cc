// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/directory_lock.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "absl/memory/memory.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace dsd {

absl::StatusOr<std::unique_ptr<DirectoryLock>> DirectoryLock::Try(
    FileSystem& files, const std::string& path) {
  if (&files != &Env::Real()->files()) return nullptr;
  const absl::Status removed = absl::NotFoundError(
      absl::StrCat("lock \"", path, "\": the directory was removed meanwhile"));
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) {
    if (errno == ENOENT) return removed;
    return nullptr;  // whoever writes there will hear why
  }
  auto lock = absl::WrapUnique(new DirectoryLock(fd));
  // Not of the process, as those of fcntl are: threads exclude each other, too.
  int result;
  do {
    result = flock(fd, LOCK_EX | LOCK_NB);
  } while (result != 0 && errno == EINTR);
  if (result != 0) {
    if (errno != EWOULDBLOCK) return nullptr;
    return absl::FailedPreconditionError(
        absl::StrCat("\"", path, "\" is locked"));
  }
  // Who had the lock before may have removed the directory.
  struct stat mine, there;
  if (fstat(fd, &mine) != 0 || stat(path.c_str(), &there) != 0 ||
      mine.st_dev != there.st_dev || mine.st_ino != there.st_ino) {
    return removed;
  }
  return lock;
}

DirectoryLock::~DirectoryLock() {
  // Closing is not enough where a child process has inherited the descriptor.
  flock(fd_, LOCK_UN);
  close(fd_);
}

}  // namespace dsd
