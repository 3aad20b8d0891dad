// SPDX-License-Identifier: Apache-2.0
//
// A backend of somebody else's, as backends/WRITING_A_BACKEND.md describes it.
// Ranks are processes on one host, and each message is a file: written under
// another name and renamed by the sender, read and removed by the receiver.

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/engine.h"
#include "dsd/core/comm/registry.h"
#include "dsd/core/comm/store.h"

namespace {

absl::Status FileError(const std::string& path) {
  return absl::UnavailableError(absl::StrCat(path, ": ", strerror(errno)));
}

class PigeonEngine final : public dsd::Engine {
 public:
  explicit PigeonEngine(const dsd::EngineOptions& options)
      : options_(options) {}
  ~PigeonEngine() override;

  absl::Status Connect(absl::Time deadline) override;
  absl::StatusOr<std::unique_ptr<dsd::EngineBatch>> Start(
      absl::Span<const dsd::EngineSend> sends,
      absl::Span<const dsd::EngineRecv> recvs) override;
  void Cancel() override { cancelled_ = true; }

 private:
  class Batch;

  std::string PathOf(int from, int to, uint64_t tag) const {
    return absl::StrCat(folder_, "/", from, "_", to, "_", tag);
  }
  absl::Status Send(const dsd::EngineSend& send) const;
  // False if it has not come yet.
  absl::StatusOr<bool> Receive(const dsd::EngineRecv& recv) const;

  const dsd::EngineOptions options_;
  std::atomic<bool> cancelled_{false};
  std::string folder_;
};

// Sends are done when Start returns, and receives happen in the waits: so
// nothing touches the caller's memory at any other time.
class PigeonEngine::Batch final : public dsd::EngineBatch {
 public:
  Batch(PigeonEngine* engine, absl::Span<const dsd::EngineRecv> recvs)
      : engine_(engine),
        recvs_(recvs.begin(), recvs.end()),
        came_(recvs.size(), false) {}

  absl::Status Wait(absl::Time deadline) override {
    for (size_t i = 0; i < recvs_.size(); ++i) {
      absl::Status status = WaitReceived(i, deadline);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::Status WaitReceived(size_t index, absl::Time deadline) override {
    dsd::Env* const env = engine_->options_.env;
    while (!came_[index]) {
      if (engine_->cancelled_) return absl::AbortedError("cancelled");
      absl::StatusOr<bool> came = engine_->Receive(recvs_[index]);
      if (!came.ok()) return came.status();
      came_[index] = *came;
      if (*came) break;
      if (env->Now() >= deadline) {
        return absl::DeadlineExceededError(
            absl::StrCat("no pigeon from rank ", recvs_[index].peer));
      }
      env->SleepUntil(env->Now() + absl::Microseconds(50));
    }
    return absl::OkStatus();
  }

 private:
  PigeonEngine* const engine_;
  const std::vector<dsd::EngineRecv> recvs_;
  std::vector<bool> came_;
};

PigeonEngine::~PigeonEngine() {
  if (options_.rank != 0 || folder_.empty()) return;
  if (DIR* const folder = opendir(folder_.c_str())) {
    while (const dirent* const entry = readdir(folder)) {
      unlink(absl::StrCat(folder_, "/", entry->d_name).c_str());
    }
    closedir(folder);
  }
  rmdir(folder_.c_str());
}

absl::Status PigeonEngine::Connect(absl::Time deadline) {
  if (options_.rank != 0) {
    absl::StatusOr<std::string> folder =
        options_.store->Get("pigeon", deadline);
    if (!folder.ok()) return folder.status();
    folder_ = *std::move(folder);
    return absl::OkStatus();
  }
  const char* const tmp = getenv("TEST_TMPDIR");
  std::string folder =
      absl::StrCat(tmp != nullptr ? tmp : "/tmp", "/pigeon_XXXXXX");
  if (mkdtemp(folder.data()) == nullptr) return FileError(folder);
  folder_ = folder;
  return options_.store->Set("pigeon", folder_, deadline);
}

absl::Status PigeonEngine::Send(const dsd::EngineSend& send) const {
  const std::string path = PathOf(options_.rank, send.peer, send.tag);
  const std::string unfinished = path + "~";
  FILE* const file = fopen(unfinished.c_str(), "wb");
  if (file == nullptr) return FileError(unfinished);
  const size_t written = fwrite(send.data.data(), 1, send.data.size(), file);
  if (fclose(file) != 0 || written != send.data.size() ||
      rename(unfinished.c_str(), path.c_str()) != 0) {
    return FileError(path);
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> PigeonEngine::Receive(const dsd::EngineRecv& recv) const {
  const std::string path = PathOf(recv.peer, options_.rank, recv.tag);
  FILE* const file = fopen(path.c_str(), "rb");
  if (file == nullptr) {
    if (errno == ENOENT) return false;
    return FileError(path);
  }
  // A message may be shorter than its receive.
  fread(recv.data.data(), 1, recv.data.size(), file);
  const bool failed = ferror(file) != 0;
  fclose(file);
  unlink(path.c_str());
  if (failed) return FileError(path);
  return true;
}

absl::StatusOr<std::unique_ptr<dsd::EngineBatch>> PigeonEngine::Start(
    absl::Span<const dsd::EngineSend> sends,
    absl::Span<const dsd::EngineRecv> recvs) {
  if (cancelled_) return absl::AbortedError("cancelled");
  for (const dsd::EngineSend& send : sends) {
    absl::Status status = Send(send);
    if (!status.ok()) return status;
  }
  return std::make_unique<Batch>(this, recvs);
}

absl::StatusOr<std::unique_ptr<dsd::Engine>> CreatePigeon(
    const dsd::EngineOptions& options) {
  return std::make_unique<PigeonEngine>(options);
}

constexpr dsd::BackendDescriptor kDescriptor = {
    /*name=*/"pigeon",    dsd::kEngineApiVersion,
    /*host_memory=*/true, /*cuda_memory=*/false,
    /*in_process=*/false, &CreatePigeon};

const dsd::BackendRegistration registration(kDescriptor);

}  // namespace
