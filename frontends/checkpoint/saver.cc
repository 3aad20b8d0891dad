// SPDX-License-Identifier: Apache-2.0

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/aligned_buffer.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/live_state.h"
#include "dsd/frontends/checkpoint/save_job.h"

namespace dsd::checkpoint {

struct Saver::Impl {
  std::unique_ptr<Communicator> lane;
  Env* env = nullptr;

  std::shared_ptr<const SavePlan> plan;
  AlignedBuffer staging;
  std::atomic<bool> cancel = false;
  std::atomic<int64_t> bytes_done = 0;
  std::atomic<int64_t> bytes_total = 0;
  bool reported = true;  // how the last one ended

  std::unique_ptr<SaveJob> job;
  std::unique_ptr<EnvThread> thread;

  absl::Mutex mu;
  bool running ABSL_GUARDED_BY(mu) = false;
  std::optional<absl::StatusOr<SaveReport>> result ABSL_GUARDED_BY(mu);

  // Until nothing is under way.
  absl::Status AwaitEnd(const CallOptions& options) {
    // Cancellation is looked at now and then: nobody wakes us for it.
    constexpr absl::Duration kLook = absl::Milliseconds(20);
    const Deadline deadline(env, options);
    absl::MutexLock lock(&mu);
    const auto ended = [](bool* is_running) { return !*is_running; };
    while (running) {
      DSD_RETURN_IF_ERROR(deadline.Check());
      env->Await(mu, absl::Condition(+ended, &running),
                 options.cancel == nullptr
                     ? deadline.end()
                     : std::min(deadline.end(), env->Now() + kLook));
    }
    return absl::OkStatus();
  }

  // How the last save in the background ended, if nobody has been told.
  absl::Status TakeUnreported() {
    if (std::exchange(reported, true)) return absl::OkStatus();
    absl::MutexLock lock(&mu);
    return result.has_value()
               ? Annotate(result->status(), "the save before in the background")
               : absl::OkStatus();
  }
};

Saver::Saver(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Saver::~Saver() {
  Cancel();
  impl_->thread.reset();
}

absl::StatusOr<std::unique_ptr<Saver>> Saver::Create(Communicator* comm,
                                                     const std::string& name,
                                                     Env* env) {
  auto impl = std::make_unique<Impl>();
  impl->env = ChooseEnv(env, comm);
  if (comm != nullptr && comm->size() > 1) {
    DSD_ASSIGN_OR_RETURN(impl->lane, comm->OpenLane(name));
  }
  return std::unique_ptr<Saver>(new Saver(std::move(impl)));
}

Communicator* Saver::comm() const { return impl_->lane.get(); }

absl::StatusOr<SaveReport> Saver::Save(const std::string& directory,
                                       const State& state,
                                       const SaveOptions& options) {
  SaveOptions own = options;
  own.env = impl_->env;
  DSD_RETURN_IF_ERROR(impl_->AwaitEnd(options.call));
  SaveJob job(directory, impl_->lane.get(), own);
  DSD_RETURN_IF_ERROR(job.Begin(impl_->TakeUnreported(), state, &impl_->plan));
  return job.Finish(absl::OkStatus(), state.tensors);
}

absl::Status Saver::Start(const std::string& directory, const State& state,
                          const SaveOptions& options) {
  Impl& impl = *impl_;
  DSD_RETURN_IF_ERROR(impl.AwaitEnd(options.call));
  impl.thread.reset();
  impl.cancel = false;
  SaveOptions own = options;
  own.env = impl.env;
  own.call.cancel = &impl.cancel;
  own.call.progress = [&impl,
                       progress = options.call.progress](const Progress& now) {
    impl.bytes_done = now.bytes_done;
    if (progress) progress(now);
  };
  auto job = std::make_unique<SaveJob>(directory, impl.lane.get(), own);
  DSD_RETURN_IF_ERROR(job->Begin(impl.TakeUnreported(), state, &impl.plan));

  // From here on all ranks write, or hear why one of them does not.
  absl::Status local;
  const int64_t bytes = job->snapshot_bytes();
  if (impl.staging.size_bytes() < bytes) {
    impl.staging = AlignedBuffer();
    impl.staging = AlignedBuffer(bytes);
  }
  if (bytes > 0 && impl.staging.data() == nullptr) {
    local = absl::ResourceExhaustedError(absl::StrCat(
        "no memory for the copy of ", bytes, " bytes that this rank stores"));
  } else {
    local = job->Snapshot(state.tensors,
                          absl::MakeSpan(impl.staging.data(), bytes));
  }
  impl.bytes_done = 0;
  impl.bytes_total = bytes;
  impl.reported = false;
  impl.job = std::move(job);
  {
    absl::MutexLock lock(&impl.mu);
    impl.running = true;
    impl.result.reset();
  }
  const auto finish = [&impl, local] {
    absl::StatusOr<SaveReport> result = impl.job->Finish(local, nullptr);
    absl::MutexLock lock(&impl.mu);
    impl.result = std::move(result);
    impl.running = false;
  };
  impl.thread = impl.env->StartThread("dsd_save", finish);
  // The others write already: late is better than an error for all.
  if (impl.thread == nullptr) finish();
  return absl::OkStatus();
}

absl::StatusOr<SaveReport> Saver::Wait(const CallOptions& options) {
  DSD_RETURN_IF_ERROR(impl_->AwaitEnd(options));
  absl::MutexLock lock(&impl_->mu);
  if (!impl_->result.has_value()) {
    return absl::FailedPreconditionError(
        "no save was started in the background");
  }
  impl_->reported = true;
  return *impl_->result;
}

absl::Status Saver::AwaitEnd(const CallOptions& options) {
  return impl_->AwaitEnd(options);
}

Progress Saver::progress() const {
  return {impl_->bytes_done, impl_->bytes_total};
}

bool Saver::running() const {
  absl::MutexLock lock(&impl_->mu);
  return impl_->running;
}

void Saver::Cancel() { impl_->cancel = true; }

}  // namespace dsd::checkpoint
