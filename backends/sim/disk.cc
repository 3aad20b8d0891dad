// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/sim/disk.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"

namespace dsd::sim {
namespace {

class SimFileSystem final : public FileSystem {
 public:
  SimFileSystem(FileSystem* disk, Scheduler* scheduler,
                Scheduler::Process process, const DiskOptions* options)
      : disk_(*disk),
        scheduler_(*scheduler),
        process_(process),
        options_(*options) {}

  absl::StatusOr<std::unique_ptr<ReadableFile>> OpenReadable(
      const std::string& path) override;
  absl::StatusOr<std::unique_ptr<WritableFile>> CreateWritable(
      const std::string& path) override;

  absl::Status Rename(const std::string& from, const std::string& to) override {
    DSD_RETURN_IF_ERROR(Begin("rename", to));
    return disk_.Rename(from, to);
  }
  absl::Status Remove(const std::string& path) override {
    DSD_RETURN_IF_ERROR(Begin("remove", path));
    return disk_.Remove(path);
  }
  absl::Status CreateDirs(const std::string& path) override {
    DSD_RETURN_IF_ERROR(Begin("create directory", path));
    return disk_.CreateDirs(path);
  }
  absl::StatusOr<std::vector<std::string>> List(
      const std::string& path) override {
    DSD_RETURN_IF_ERROR(Begin("list", path));
    return disk_.List(path);
  }
  absl::StatusOr<FileInfo> Stat(const std::string& path) override {
    DSD_RETURN_IF_ERROR(Begin("stat", path));
    return disk_.Stat(path);
  }
  absl::Status SyncDir(const std::string& path) override {
    DSD_RETURN_IF_ERROR(Begin("fsync directory", path));
    return disk_.SyncDir(path);
  }

 private:
  class Readable;
  class Writable;

  // The time that an operation takes, and its fault.
  absl::Status Begin(const char* what, const std::string& path) {
    return Begin(what, path, {}, nullptr, 0);
  }

  absl::Status Begin(const char* what, const std::string& path,
                     absl::Span<const std::byte> data, WritableFile* file,
                     int64_t offset) {
    scheduler_.SleepUntil(scheduler_.now() +
                          scheduler_.RandomDuration(options_.latency));
    DiskOperation operation;
    operation.process = process_;
    operation.number = operations_++;
    operation.write_number = file == nullptr ? -1 : writes_++;
    operation.what = what;
    operation.path = path;
    operation.bytes = static_cast<int64_t>(data.size());
    absl::Status status;
    if (!scheduler_.IsRunningOut() && options_.fault) {
      status = options_.fault(operation);
      if (!status.ok() && operation.torn_bytes > 0) {
        file->WriteAt(offset, data.subspan(0, operation.torn_bytes))
            .IgnoreError();
      }
      // The fault may have been this process's end.
      if (scheduler_.IsDead(process_)) scheduler_.Yield();
    }
    if (scheduler_.IsRunningOut()) {
      return absl::UnavailableError(
          absl::StrCat(what, " \"", path, "\": the process is dead"));
    }
    return status;
  }

  FileSystem& disk_;
  Scheduler& scheduler_;
  const Scheduler::Process process_;
  const DiskOptions& options_;
  int64_t operations_ = 0;
  int64_t writes_ = 0;
};

class SimFileSystem::Readable final : public ReadableFile {
 public:
  Readable(SimFileSystem* files, std::string path,
           std::unique_ptr<ReadableFile> file)
      : files_(*files), path_(std::move(path)), file_(std::move(file)) {}

  int64_t size_bytes() const override { return file_->size_bytes(); }
  absl::Status ReadAt(int64_t offset, absl::Span<std::byte> out) override {
    DSD_RETURN_IF_ERROR(files_.Begin("read", path_));
    return file_->ReadAt(offset, out);
  }

 private:
  SimFileSystem& files_;
  const std::string path_;
  const std::unique_ptr<ReadableFile> file_;
};

class SimFileSystem::Writable final : public WritableFile {
 public:
  Writable(SimFileSystem* files, std::string path,
           std::unique_ptr<WritableFile> file)
      : files_(*files), path_(std::move(path)), file_(std::move(file)) {}

  absl::Status WriteAt(int64_t offset,
                       absl::Span<const std::byte> data) override {
    DSD_RETURN_IF_ERROR(
        files_.Begin("write", path_, data, file_.get(), offset));
    return file_->WriteAt(offset, data);
  }
  absl::Status Reserve(int64_t bytes) override { return file_->Reserve(bytes); }
  absl::Status Sync() override {
    DSD_RETURN_IF_ERROR(files_.Begin("fsync", path_));
    return file_->Sync();
  }
  absl::Status Close() override { return file_->Close(); }

 private:
  SimFileSystem& files_;
  const std::string path_;
  const std::unique_ptr<WritableFile> file_;
};

absl::StatusOr<std::unique_ptr<ReadableFile>> SimFileSystem::OpenReadable(
    const std::string& path) {
  DSD_RETURN_IF_ERROR(Begin("open", path));
  DSD_ASSIGN_OR_RETURN(std::unique_ptr<ReadableFile> file,
                       disk_.OpenReadable(path));
  return std::make_unique<Readable>(this, path, std::move(file));
}

absl::StatusOr<std::unique_ptr<WritableFile>> SimFileSystem::CreateWritable(
    const std::string& path) {
  DSD_RETURN_IF_ERROR(Begin("create", path));
  DSD_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file,
                       disk_.CreateWritable(path));
  return std::make_unique<Writable>(this, path, std::move(file));
}

}  // namespace

std::unique_ptr<FileSystem> MakeSimFileSystem(FileSystem* disk,
                                              Scheduler* scheduler,
                                              Scheduler::Process process,
                                              const DiskOptions* options) {
  return std::make_unique<SimFileSystem>(disk, scheduler, process, options);
}

}  // namespace dsd::sim
