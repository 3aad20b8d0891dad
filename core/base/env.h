// SPDX-License-Identifier: Apache-2.0
//
// The world outside: clock, waiting, threads, randomness, files. Code in `core`
// and `frontends/checkpoint` reaches them only through an Env, so that tests
// can run it with a fake clock and a file system that fails where they ask.

#ifndef DSD_CORE_BASE_ENV_H_
#define DSD_CORE_BASE_ENV_H_

#include <poll.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace dsd {

// A file open for reading. Thread-safe.
class ReadableFile {
 public:
  virtual ~ReadableFile() = default;

  // Length in bytes when the file was opened.
  virtual int64_t size_bytes() const = 0;

  // Fills all of `out` from byte `offset`.
  // Errors: OutOfRange if the file ends before; Unavailable or DataLoss for
  // what the system reports.
  virtual absl::Status ReadAt(int64_t offset, absl::Span<std::byte> out) = 0;
};

// A file open for writing. Writes of parts that do not overlap may come from
// several threads at once, else thread-compatible. The destructor closes
// without reporting; call Close() to learn of errors.
class WritableFile {
 public:
  virtual ~WritableFile() = default;

  // Writes all of `data` at byte `offset`; a gap before it reads as zeros. Data
  // whose address, offset and length are multiples of 4096 may go past the page
  // cache, which is faster where much is written and not read soon.
  // Errors: ResourceExhausted for a full disk or quota; Unavailable otherwise.
  virtual absl::Status WriteAt(int64_t offset,
                               absl::Span<const std::byte> data) = 0;

  // Before the first write: the file will have so many bytes, or more. What is
  // not written of them reads as zeros, or is not there. A file system that
  // knows whether there is room for them says so now; others do nothing.
  // Errors: ResourceExhausted.
  virtual absl::Status Reserve(int64_t /*bytes*/) { return absl::OkStatus(); }

  // Returns when the content is on stable storage (fsync).
  virtual absl::Status Sync() = 0;

  virtual absl::Status Close() = 0;
};

enum class FileKind { kRegular, kDirectory, kOther };

struct FileInfo {
  FileKind kind = FileKind::kOther;
  int64_t size_bytes = 0;
};

// Errors of all calls: NotFound, AlreadyExists, PermissionDenied,
// ResourceExhausted (space, descriptors), FailedPrecondition (not a directory,
// directory not empty), Unavailable (I/O). Each text names the path.
class FileSystem {
 public:
  virtual ~FileSystem() = default;

  // Opens a regular file; never blocks on a FIFO, refuses devices.
  virtual absl::StatusOr<std::unique_ptr<ReadableFile>> OpenReadable(
      const std::string& path) = 0;

  // Creates a new file; AlreadyExists if the name is taken.
  virtual absl::StatusOr<std::unique_ptr<WritableFile>> CreateWritable(
      const std::string& path) = 0;

  // Replaces `to` atomically.
  virtual absl::Status Rename(const std::string& from,
                              const std::string& to) = 0;
  virtual absl::Status Remove(const std::string& path) = 0;

  // Creates `path` and missing parents; OK if it is a directory already.
  virtual absl::Status CreateDirs(const std::string& path) = 0;

  // Names in a directory, sorted, without "." and "..".
  virtual absl::StatusOr<std::vector<std::string>> List(
      const std::string& path) = 0;

  // Follows no symbolic link in the last component: a link is kOther.
  virtual absl::StatusOr<FileInfo> Stat(const std::string& path) = 0;

  // Makes names created, renamed or removed in the directory durable.
  virtual absl::Status SyncDir(const std::string& path) = 0;
};

// A running thread; the destructor joins.
class EnvThread {
 public:
  virtual ~EnvThread() = default;
};

// Thread-safe.
class Env {
 public:
  virtual ~Env() = default;

  // The operating system's; never destroyed.
  static Env* Real();

  // Monotonic: never jumps, comparable only with other values of this Env. All
  // deadlines in dsd are such times.
  virtual absl::Time Now() = 0;

  // The calendar time, for names and time stamps only.
  virtual absl::Time WallTime() = 0;

  // Waits until `condition` holds or `deadline` passes; `mu` is held on entry
  // and return. Returns whether the condition holds.
  virtual bool Await(absl::Mutex& mu, const absl::Condition& condition,
                     absl::Time deadline) ABSL_SHARED_LOCKS_REQUIRED(mu) = 0;

  virtual void SleepUntil(absl::Time time) = 0;

  // poll(2) with a deadline, restarted after signals. Returns the number of
  // ready descriptors, 0 when the deadline passed.
  virtual absl::StatusOr<int> Poll(absl::Span<struct pollfd> fds,
                                   absl::Time deadline) = 0;

  // `name` (at most 15 bytes are shown by the system) is for debuggers. Null if
  // the system can start none, since threads or memory have run out: see
  // NoThread.
  virtual std::unique_ptr<EnvThread> StartThread(
      absl::string_view name, absl::AnyInvocable<void()> body) = 0;

  // A fresh seed, different for each call.
  virtual uint64_t RandomSeed() = 0;

  // The same in all processes of a machine, in its containers too, and nowhere
  // else; empty: unknown.
  virtual std::string HostId() { return ""; }

  virtual FileSystem& files() = 0;
};

// ResourceExhausted: StartThread gave none for `name`.
absl::Status NoThread(absl::string_view name);

}  // namespace dsd

#endif  // DSD_CORE_BASE_ENV_H_
