// SPDX-License-Identifier: Apache-2.0
//
// For a storage of one's own: the world as it is, but for files.

#ifndef DSD_CORE_BASE_OWN_FILES_ENV_H_
#define DSD_CORE_BASE_OWN_FILES_ENV_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"

namespace dsd {

// Env::Real() with the files of `files`, which must outlive it.
class OwnFilesEnv final : public Env {
 public:
  explicit OwnFilesEnv(FileSystem* files) : files_(*files) {}

  absl::Time Now() override { return real_.Now(); }
  absl::Time WallTime() override { return real_.WallTime(); }
  bool Await(absl::Mutex& mu, const absl::Condition& condition,
             absl::Time deadline) override ABSL_NO_THREAD_SAFETY_ANALYSIS {
    return real_.Await(mu, condition, deadline);
  }
  void SleepUntil(absl::Time time) override { real_.SleepUntil(time); }
  absl::StatusOr<int> Poll(absl::Span<struct pollfd> fds,
                           absl::Time deadline) override {
    return real_.Poll(fds, deadline);
  }
  std::unique_ptr<EnvThread> StartThread(
      absl::string_view name, absl::AnyInvocable<void()> body) override {
    return real_.StartThread(name, std::move(body));
  }
  uint64_t RandomSeed() override { return real_.RandomSeed(); }
  std::string HostId() override { return real_.HostId(); }
  FileSystem& files() override { return files_; }

 private:
  Env& real_ = *Env::Real();
  FileSystem& files_;
};

}  // namespace dsd

#endif  // DSD_CORE_BASE_OWN_FILES_ENV_H_
