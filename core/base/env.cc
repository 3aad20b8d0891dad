// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/env.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <random>
#include <system_error>
#include <thread>  // NOLINT: the one place that starts threads
#include <utility>

#include "absl/base/call_once.h"
#include "absl/base/no_destructor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {
namespace {

absl::Status ErrnoStatus(int error, absl::string_view what,
                         absl::string_view path) {
  const std::string text = absl::StrCat(what, " \"", path, "\"");
  // "<text>: <what the system says>"
  const std::string message(absl::ErrnoToStatus(error, text).message());
  switch (error) {
    case EDQUOT:
    case EFBIG:
      return absl::ResourceExhaustedError(message);
    case EIO:
      return absl::UnavailableError(absl::StrCat(text, ": I/O error"));
    case ENOTDIR:
    case EISDIR:
    case ENOTEMPTY:
      return absl::FailedPreconditionError(message);
    default:
      return absl::ErrnoToStatus(error, text);
  }
}

class PosixReadable final : public ReadableFile {
 public:
  PosixReadable(std::string path, int fd, int64_t size)
      : path_(std::move(path)), fd_(fd), size_(size) {}
  ~PosixReadable() override { close(fd_); }

  int64_t size_bytes() const override { return size_; }

  absl::Status ReadAt(int64_t offset, absl::Span<std::byte> out) override {
    while (!out.empty()) {
      const ssize_t n = pread(fd_, out.data(), out.size(), offset);
      if (n < 0) {
        if (errno == EINTR) continue;
        return ErrnoStatus(errno, "read", path_);
      }
      if (n == 0) {
        return absl::OutOfRangeError(
            absl::StrCat("read \"", path_, "\": the file ends at byte ", offset,
                         ", ", out.size(), " more bytes expected"));
      }
      offset += n;
      out.remove_prefix(n);
    }
    return absl::OkStatus();
  }

 private:
  const std::string path_;
  const int fd_;
  const int64_t size_;
};

// Smaller writes gain nothing past the page cache.
constexpr size_t kMinDirectBytes = size_t{256} << 10;
constexpr uint64_t kDirectAlignment = 4096;

class PosixWritable final : public WritableFile {
 public:
  PosixWritable(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}
  ~PosixWritable() override {
    if (fd_ >= 0) close(fd_);
    if (direct_fd_ >= 0) close(direct_fd_);
  }

  absl::Status WriteAt(int64_t offset,
                       absl::Span<const std::byte> data) override {
    int direct = data.size() >= kMinDirectBytes ? DirectDescriptor() : -1;
    while (!data.empty()) {
      const bool is_direct =
          direct >= 0 && (reinterpret_cast<uint64_t>(data.data()) |
                          static_cast<uint64_t>(offset) | data.size()) %
                                 kDirectAlignment ==
                             0;
      const ssize_t n =
          pwrite(is_direct ? direct : fd_, data.data(), data.size(), offset);
      if (n < 0) {
        if (errno == EINTR) continue;
        if (is_direct && errno == EINVAL) {  // not on this file system
          direct = -1;
          continue;
        }
        return ErrnoStatus(errno, "write", path_);
      }
      offset += n;
      data.remove_prefix(n);
    }
    return absl::OkStatus();
  }

  absl::Status Reserve(int64_t bytes) override {
    // Not posix_fallocate, which writes all of it where the file system cannot.
    while (bytes > 0 && fallocate(fd_, 0, 0, bytes) != 0) {
      if (errno == EINTR) continue;
      if (errno == EOPNOTSUPP || errno == ENOSYS) break;
      return ErrnoStatus(errno, "allocate", path_);
    }
    return absl::OkStatus();
  }

  absl::Status Sync() override {
    if (fsync(fd_) != 0) return ErrnoStatus(errno, "fsync", path_);
    return absl::OkStatus();
  }

  absl::Status Close() override {
    for (int* descriptor : {&direct_fd_, &fd_}) {
      const int fd = std::exchange(*descriptor, -1);
      if (fd >= 0 && close(fd) != 0) return ErrnoStatus(errno, "close", path_);
    }
    return absl::OkStatus();
  }

 private:
  // A descriptor of the same file that goes past the page cache; -1 where there
  // is no such thing.
  int DirectDescriptor() {
    absl::call_once(direct_once_, [this] {
      const int fd = open(path_.c_str(), O_WRONLY | O_DIRECT | O_CLOEXEC);
      if (fd < 0) return;
      struct stat mine, other;
      if (fstat(fd_, &mine) == 0 && fstat(fd, &other) == 0 &&
          mine.st_dev == other.st_dev && mine.st_ino == other.st_ino) {
        direct_fd_ = fd;
      } else {
        close(fd);
      }
    });
    return direct_fd_;
  }

  const std::string path_;
  int fd_;
  absl::once_flag direct_once_;
  int direct_fd_ = -1;
};

class PosixFileSystem final : public FileSystem {
 public:
  absl::StatusOr<std::unique_ptr<ReadableFile>> OpenReadable(
      const std::string& path) override {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return ErrnoStatus(errno, "open", path);
    struct stat info;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
      close(fd);
      return absl::FailedPreconditionError(
          absl::StrCat("open \"", path, "\": not a regular file"));
    }
    return std::make_unique<PosixReadable>(path, fd, info.st_size);
  }

  absl::StatusOr<std::unique_ptr<WritableFile>> CreateWritable(
      const std::string& path) override {
    const int fd =
        open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0) return ErrnoStatus(errno, "create", path);
    return std::make_unique<PosixWritable>(path, fd);
  }

  absl::Status Rename(const std::string& from, const std::string& to) override {
    if (rename(from.c_str(), to.c_str()) != 0) {
      return ErrnoStatus(errno, absl::StrCat("rename \"", from, "\" to"), to);
    }
    return absl::OkStatus();
  }

  absl::Status Remove(const std::string& path) override {
    if (remove(path.c_str()) != 0) return ErrnoStatus(errno, "remove", path);
    return absl::OkStatus();
  }

  absl::Status CreateDirs(const std::string& path) override {
    if (path.empty()) {
      return absl::InvalidArgumentError("create directory: the path is empty");
    }
    for (size_t end = path.find('/', 1);; end = path.find('/', end + 1)) {
      const std::string part = path.substr(0, end);
      if (mkdir(part.c_str(), 0777) != 0) {
        const int error = errno;
        struct stat info;
        if (stat(part.c_str(), &info) != 0) {
          return ErrnoStatus(error, "create directory", part);
        }
        if (!S_ISDIR(info.st_mode)) {
          return ErrnoStatus(ENOTDIR, "create directory", part);
        }
      }
      if (end == std::string::npos) return absl::OkStatus();
    }
  }

  absl::StatusOr<std::vector<std::string>> List(
      const std::string& path) override {
    DIR* dir = opendir(path.c_str());
    if (dir == nullptr) return ErrnoStatus(errno, "list", path);
    std::vector<std::string> names;
    errno = 0;
    while (const dirent* entry = readdir(dir)) {
      const absl::string_view name = entry->d_name;
      if (name != "." && name != "..") names.emplace_back(name);
    }
    const int error = errno;
    closedir(dir);
    if (error != 0) return ErrnoStatus(error, "list", path);
    std::sort(names.begin(), names.end());
    return names;
  }

  absl::StatusOr<FileInfo> Stat(const std::string& path) override {
    struct stat info;
    if (lstat(path.c_str(), &info) != 0) {
      return ErrnoStatus(errno, "stat", path);
    }
    FileInfo out;
    out.size_bytes = info.st_size;
    out.kind = S_ISREG(info.st_mode)   ? FileKind::kRegular
               : S_ISDIR(info.st_mode) ? FileKind::kDirectory
                                       : FileKind::kOther;
    return out;
  }

  absl::Status SyncDir(const std::string& path) override {
    const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return ErrnoStatus(errno, "open directory", path);
    const int result = fsync(fd);
    const int error = errno;
    close(fd);
    if (result != 0) return ErrnoStatus(error, "fsync directory", path);
    return absl::OkStatus();
  }
};

class RealThread final : public EnvThread {
 public:
  explicit RealThread(std::thread thread) : thread_(std::move(thread)) {}
  ~RealThread() override { thread_.join(); }

 private:
  std::thread thread_;
};

class RealEnv final : public Env {
 public:
  absl::Time Now() override {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return absl::TimeFromTimespec(now);
  }

  absl::Time WallTime() override { return absl::Now(); }

  // Abseil counts a timeout given as a duration on the monotonic clock.
  bool Await(absl::Mutex& mu, const absl::Condition& condition,
             absl::Time deadline) override ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return mu.AwaitWithTimeout(condition, deadline - Now());
  }

  void SleepUntil(absl::Time time) override { absl::SleepFor(time - Now()); }

  absl::StatusOr<int> Poll(absl::Span<struct pollfd> fds,
                           absl::Time deadline) override {
    while (true) {
      const absl::Duration left =
          std::max(deadline - Now(), absl::ZeroDuration());
      const timespec timeout =
          absl::ToTimespec(std::min(left, absl::Hours(24)));
      const int n = ppoll(fds.data(), fds.size(), &timeout, nullptr);
      if (n >= 0) return n;
      if (errno != EINTR) return absl::ErrnoToStatus(errno, "poll");
    }
  }

  std::unique_ptr<EnvThread> StartThread(
      absl::string_view name, absl::AnyInvocable<void()> body) override {
    try {
      return std::make_unique<RealThread>(
          std::thread([name = std::string(name.substr(0, 15)),
                       body = std::move(body)]() mutable {
            pthread_setname_np(pthread_self(), name.c_str());
            body();
          }));
    } catch (const std::system_error&) {
      return nullptr;
    }
  }

  uint64_t RandomSeed() override {
    std::random_device device;
    return (static_cast<uint64_t>(device()) << 32) | device();
  }

  std::string HostId() override {
    char text[64];
    // Of the running kernel: containers differ in their host names, copies of a
    // virtual machine in nothing else.
    const int fd =
        open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t bytes = -1;
    if (fd >= 0) {
      bytes = read(fd, text, sizeof(text));
      close(fd);
    }
    if (bytes <= 0)
      bytes = gethostname(text, sizeof(text)) == 0 ? strnlen(text, sizeof(text))
                                                   : 0;
    return std::string(
        absl::StripAsciiWhitespace({text, static_cast<size_t>(bytes)}));
  }

  FileSystem& files() override { return files_; }

 private:
  PosixFileSystem files_;
};

}  // namespace

absl::Status NoThread(absl::string_view name) {
  return absl::ResourceExhaustedError(absl::StrCat(
      "the system cannot start thread ", name,
      "; raise ulimit -u and the limit of the container or service (pids.max), "
      "or start fewer processes"));
}

Env* Env::Real() {
  static absl::NoDestructor<RealEnv> env;
  return env.get();
}

}  // namespace dsd
