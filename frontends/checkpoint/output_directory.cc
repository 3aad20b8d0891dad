// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/output_directory.h"

#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/file_names.h"

namespace dsd::checkpoint {

absl::Status OutputDirectory::Make(const std::string& path) {
  std::vector<std::string> missing = MissingDirectories(files_, path);
  if (!missing.empty()) made_ = std::move(missing);
  return files_.CreateDirs(path);
}

absl::Status OutputDirectory::Claim(const std::string& path) {
  DSD_RETURN_IF_ERROR(Make(path));
  absl::StatusOr<std::unique_ptr<DirectoryLock>> lock =
      DirectoryLock::Try(files_, path);
  if (lock.ok()) {
    lock_ = *std::move(lock);
    return absl::OkStatus();
  }
  // It is the other's now, whoever made it.
  made_.clear();
  if (!absl::IsFailedPrecondition(lock.status())) return lock.status();
  return absl::FailedPreconditionError(
      absl::StrCat("another save to \"", path,
                   "\" is under way, in this process or another one; wait "
                   "for its end or choose another directory"));
}

absl::Status OutputDirectory::Sync() {
  for (const std::string& made : made_) {
    DSD_RETURN_IF_ERROR(files_.SyncDir(ParentOf(made)));
  }
  return absl::OkStatus();
}

void OutputDirectory::RemoveMade() {
  for (const std::string& made : made_) files_.Remove(made).IgnoreError();
  made_.clear();
}

}  // namespace dsd::checkpoint
