// SPDX-License-Identifier: Apache-2.0
//
// An Env for tests: a clock that stands still until it is moved, and files in
// memory that fail where the test asks and lose, in a crash, what was not
// synced.

#ifndef DSD_CORE_BASE_FAKE_ENV_H_
#define DSD_CORE_BASE_FAKE_ENV_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "dsd/core/base/env.h"

namespace dsd {

// One operation that changes files, as fault points see it.
struct FileOperation {
  enum class Kind {
    kCreate,
    kWrite,
    kSync,
    kRename,
    kRemove,
    kMkdir,
    kSyncDir
  };
  Kind kind;
  std::string path;
  int64_t index = 0;  // from 0, over all operations of the file system
};
std::string ToString(const FileOperation& operation);

// Files in memory. Thread-safe.
//
// What a crash leaves: of each file the bytes of its last Sync, and of what was
// written since a random part; of the names in each directory those of its last
// SyncDir, and of the changes since a random part, each whole or not at all.
class FakeFileSystem final : public FileSystem {
 public:
  FakeFileSystem();
  ~FakeFileSystem() override;

  // Called before each operation that changes files; an error takes its place.
  // A write that fails so has first written a random prefix of its data. Null:
  // none.
  void SetFault(std::function<absl::Status(const FileOperation&)> fault);

  // Bytes of all files together; what is beyond ends with ResourceExhausted,
  // when it is written or, before, when it is reserved. Negative: no limit.
  void SetCapacity(int64_t bytes);

  // Operation `index` and all after it fail with Unavailable, as if the machine
  // had died in it; num_operations(): from now on.
  void CrashAt(int64_t index);
  // The machine comes back with what the crash left, chosen by `seed`.
  void Recover(uint64_t seed);

  // Operations so far that change files.
  int64_t num_operations() const;

  // For tests: the bytes of a file, and replacing them.
  absl::StatusOr<std::string> Content(const std::string& path);
  void SetContent(const std::string& path, std::string content);

  absl::StatusOr<std::unique_ptr<ReadableFile>> OpenReadable(
      const std::string& path) override;
  absl::StatusOr<std::unique_ptr<WritableFile>> CreateWritable(
      const std::string& path) override;
  absl::Status Rename(const std::string& from, const std::string& to) override;
  absl::Status Remove(const std::string& path) override;
  absl::Status CreateDirs(const std::string& path) override;
  absl::StatusOr<std::vector<std::string>> List(
      const std::string& path) override;
  absl::StatusOr<FileInfo> Stat(const std::string& path) override;
  absl::Status SyncDir(const std::string& path) override;

 private:
  struct Node;
  class Readable;
  class Writable;
  using NodePtr = std::shared_ptr<Node>;
  // A name and what it became; null: gone.
  struct NameChange {
    std::vector<std::pair<std::string, NodePtr>> names;
  };

  absl::Status Begin(FileOperation::Kind kind, const std::string& path)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<NodePtr> Find(const std::string& path)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<NodePtr> FindDir(const std::string& path)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static void Change(Node& directory, NameChange change);
  void RecoverNode(Node& node, std::mt19937_64& random)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int64_t BytesIn(const Node& node) const;

  mutable absl::Mutex mu_;
  NodePtr root_ ABSL_GUARDED_BY(mu_);
  std::function<absl::Status(const FileOperation&)> fault_ ABSL_GUARDED_BY(mu_);
  int64_t capacity_bytes_ ABSL_GUARDED_BY(mu_) = -1;
  int64_t num_operations_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t crash_at_ ABSL_GUARDED_BY(mu_) = std::numeric_limits<int64_t>::max();
  bool crashed_ ABSL_GUARDED_BY(mu_) = false;
  std::mt19937_64 torn_writes_ ABSL_GUARDED_BY(mu_);
};

// Real threads, fake clock and files. Time moves by Advance, and by SleepUntil,
// which returns at once; Await waits until its condition holds or the clock has
// been moved past its deadline. Thread-safe.
class FakeEnv final : public Env {
 public:
  // Random seeds follow from `seed`.
  explicit FakeEnv(uint64_t seed = 1);

  void Advance(absl::Duration duration);
  FakeFileSystem& fake_files() { return files_; }

  absl::Time Now() override;
  absl::Time WallTime() override;
  bool Await(absl::Mutex& mu, const absl::Condition& condition,
             absl::Time deadline) override ABSL_SHARED_LOCKS_REQUIRED(mu);
  void SleepUntil(absl::Time time) override;
  absl::StatusOr<int> Poll(absl::Span<struct pollfd> fds,
                           absl::Time deadline) override;
  std::unique_ptr<EnvThread> StartThread(
      absl::string_view name, absl::AnyInvocable<void()> body) override;
  uint64_t RandomSeed() override;
  FileSystem& files() override { return files_; }

 private:
  mutable absl::Mutex mu_;
  absl::Time now_ ABSL_GUARDED_BY(mu_);
  std::mt19937_64 random_ ABSL_GUARDED_BY(mu_);
  FakeFileSystem files_;
};

}  // namespace dsd

#endif  // DSD_CORE_BASE_FAKE_ENV_H_
