// SPDX-License-Identifier: Apache-2.0
//
// Keeps programs that write files which belong together out of each other's
// way.

#ifndef DSD_CORE_BASE_DIRECTORY_LOCK_H_
#define DSD_CORE_BASE_DIRECTORY_LOCK_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "dsd/core/base/env.h"

namespace dsd {

// A lock of a directory against others who ask for it. Held until it is
// destroyed or the process ends, in whatever way: nothing of it is on storage.
class DirectoryLock {
 public:
  // Takes the lock of a directory that is there, or says at once that somebody
  // has it, in this process or another one. Null where there are no such locks:
  // of files that are not those of Env::Real(), and on file systems without
  // them (NFS).
  // Errors: FailedPrecondition (somebody has it); NotFound (the directory was
  // removed).
  static absl::StatusOr<std::unique_ptr<DirectoryLock>> Try(
      FileSystem& files, const std::string& path);

  ~DirectoryLock();
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  explicit DirectoryLock(int fd) : fd_(fd) {}

  const int fd_;
};

}  // namespace dsd

#endif  // DSD_CORE_BASE_DIRECTORY_LOCK_H_
