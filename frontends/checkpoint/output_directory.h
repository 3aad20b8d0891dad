// SPDX-License-Identifier: Apache-2.0
//
// The directory that a save or an export writes to, on one rank.

#ifndef DSD_FRONTENDS_CHECKPOINT_OUTPUT_DIRECTORY_H_
#define DSD_FRONTENDS_CHECKPOINT_OUTPUT_DIRECTORY_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "dsd/core/base/directory_lock.h"
#include "dsd/core/base/env.h"

namespace dsd::checkpoint {

// Thread-compatible.
class OutputDirectory {
 public:
  explicit OutputDirectory(FileSystem* files) : files_(*files) {}

  // Makes it, with those above it; OK if it is there.
  absl::Status Make(const std::string& path);

  // Makes it and keeps other saves out of it until Release, where the storage
  // has locks. For rank 0. FailedPrecondition if another save is under way.
  absl::Status Claim(const std::string& path);
  void Release() { lock_.reset(); }

  // The names of directories that were made are on storage then.
  absl::Status Sync();

  // Removes directories that were made, unless there is something in them.
  void RemoveMade();

 private:
  FileSystem& files_;
  std::vector<std::string> made_;  // innermost first
  std::unique_ptr<DirectoryLock> lock_;
};

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_OUTPUT_DIRECTORY_H_
