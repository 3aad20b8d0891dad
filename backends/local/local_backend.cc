// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/local/local_backend.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/base/no_destructor.h"
#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/store.h"

namespace dsd {
namespace {

enum class OpState { kPosted, kCopying, kDone, kWithdrawn };

// One end of a message. Guarded by the hub's mutex, but for the bytes.
struct Op {
  OpState state = OpState::kPosted;
  bool is_send = false;
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  size_t size = 0;
};

// What the ranks of one group share. Whoever comes second to a message copies
// it: so neither side ever waits for the other to wait.
class Hub {
 public:
  using Key = std::tuple<int, int, uint64_t>;  // from, to, tag

  // Takes part in a message; returns when it is posted or copied.
  void Post(const Key& key, const std::shared_ptr<Op>& op) {
    std::shared_ptr<Op> other;
    {
      absl::MutexLock lock(&mu_);
      const auto [it, is_first] = posted_.try_emplace(key, op);
      if (is_first) return;
      other = std::move(it->second);
      posted_.erase(it);
      op->state = other->state = OpState::kCopying;
    }
    const Op& send = op->is_send ? *op : *other;
    const Op& recv = op->is_send ? *other : *op;
    if (send.size > 0) std::memcpy(recv.to, send.from, send.size);
    absl::MutexLock lock(&mu_);
    op->state = other->state = OpState::kDone;
  }

  // Returns when nobody touches the memory of `op` any more.
  void Withdraw(const Key& key, const std::shared_ptr<Op>& op) {
    absl::MutexLock lock(&mu_);
    if (op->state == OpState::kPosted) {
      posted_.erase(key);
      op->state = OpState::kWithdrawn;
    }
    // Only for the length of a memcpy.
    const auto still = [&] { return op->state != OpState::kCopying; };
    mu_.Await(absl::Condition(&still));
  }

  absl::Mutex& mu() ABSL_LOCK_RETURNED(mu_) { return mu_; }

 private:
  absl::Mutex mu_;
  absl::flat_hash_map<Key, std::shared_ptr<Op>> posted_ ABSL_GUARDED_BY(mu_);
};

// Hubs by number, while somebody uses them.
struct Hubs {
  absl::Mutex mu;
  uint64_t next ABSL_GUARDED_BY(mu) = 1;
  absl::flat_hash_map<uint64_t, std::weak_ptr<Hub>> hubs ABSL_GUARDED_BY(mu);
};

Hubs& AllHubs() {
  static absl::NoDestructor<Hubs> hubs;
  return *hubs;
}

class LocalEngine final : public Engine {
 public:
  explicit LocalEngine(const EngineOptions& options) : options_(options) {}

  absl::Status Connect(absl::Time deadline) override;
  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override;

  void Cancel() override {
    cancelled_ = true;
    std::shared_ptr<Hub> hub;
    {
      absl::MutexLock lock(&mu_);
      hub = hub_;
    }
    // Those who wait look again when the mutex is released.
    if (hub != nullptr) absl::MutexLock lock(&hub->mu());
  }

 private:
  class Batch;

  const EngineOptions options_;
  std::atomic<bool> cancelled_{false};
  absl::Mutex mu_;
  std::shared_ptr<Hub> hub_ ABSL_GUARDED_BY(mu_);
};

class LocalEngine::Batch final : public EngineBatch {
 public:
  struct Posted {
    Hub::Key key;
    std::shared_ptr<Op> op;
  };

  Batch(LocalEngine* engine, std::shared_ptr<Hub> hub)
      : engine_(engine), hub_(std::move(hub)) {}

  ~Batch() override {
    for (const auto& [key, op] : recvs) hub_->Withdraw(key, op);
    for (const auto& [key, op] : sends) hub_->Withdraw(key, op);
  }

  absl::Status Wait(absl::Time deadline) override {
    for (const auto& [key, op] : recvs) {
      DSD_RETURN_IF_ERROR(WaitFor(*op, deadline));
    }
    for (const auto& [key, op] : sends) {
      DSD_RETURN_IF_ERROR(WaitFor(*op, deadline));
    }
    return absl::OkStatus();
  }

  absl::Status WaitReceived(size_t index, absl::Time deadline) override {
    return WaitFor(*recvs[index].op, deadline);
  }

  std::vector<Posted> recvs;
  std::vector<Posted> sends;

 private:
  absl::Status WaitFor(const Op& op, absl::Time deadline) {
    absl::MutexLock lock(&hub_->mu());
    const auto over = [&] {
      return op.state == OpState::kDone || engine_->cancelled_;
    };
    if (!engine_->options_.env->Await(hub_->mu(), absl::Condition(&over),
                                      deadline)) {
      return absl::DeadlineExceededError("a message did not come in time");
    }
    if (op.state != OpState::kDone) return absl::AbortedError("cancelled");
    return absl::OkStatus();
  }

  LocalEngine* const engine_;
  const std::shared_ptr<Hub> hub_;
};

// Rank 0 makes the hub and tells the others its number, with a number of this
// process, so that a rank in another one notices.
absl::Status LocalEngine::Connect(absl::Time deadline) {
  static const uint64_t process = options_.env->RandomSeed();
  Hubs& all = AllHubs();
  std::shared_ptr<Hub> hub;
  if (options_.rank == 0) {
    hub = std::make_shared<Hub>();
    uint64_t number;
    {
      absl::MutexLock lock(&all.mu);
      absl::erase_if(all.hubs,
                     [](const auto& entry) { return entry.second.expired(); });
      number = all.next++;
      all.hubs[number] = hub;
    }
    DSD_RETURN_IF_ERROR(options_.store->Set(
        "hub", absl::StrCat(process, " ", number), deadline));
  } else {
    DSD_ASSIGN_OR_RETURN(const std::string value,
                         options_.store->Get("hub", deadline));
    const std::vector<absl::string_view> fields = absl::StrSplit(value, ' ');
    uint64_t number = 0;
    if (fields.size() != 2 || fields[0] != absl::StrCat(process) ||
        !absl::SimpleAtoi(fields[1], &number)) {
      return absl::FailedPreconditionError(absl::StrCat(
          "backend \"local\" serves ranks that are threads of one process, but "
          "rank ",
          options_.rank, " is in another process than rank 0"));
    }
    absl::MutexLock lock(&all.mu);
    const auto it = all.hubs.find(number);
    if (it != all.hubs.end()) hub = it->second.lock();
    if (hub == nullptr) return absl::UnavailableError("rank 0 has left");
  }
  absl::MutexLock lock(&mu_);
  hub_ = std::move(hub);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<EngineBatch>> LocalEngine::Start(
    absl::Span<const EngineSend> sends, absl::Span<const EngineRecv> recvs) {
  std::shared_ptr<Hub> hub;
  {
    absl::MutexLock lock(&mu_);
    hub = hub_;
  }
  if (cancelled_ || hub == nullptr) return absl::AbortedError("cancelled");
  auto batch = std::make_unique<Batch>(this, hub);
  for (const EngineRecv& recv : recvs) {
    auto op = std::make_shared<Op>();
    op->to = recv.data.data();
    op->size = recv.data.size();
    batch->recvs.push_back(
        {{recv.peer, options_.rank, recv.tag}, std::move(op)});
  }
  for (const EngineSend& send : sends) {
    auto op = std::make_shared<Op>();
    op->is_send = true;
    op->from = send.data.data();
    op->size = send.data.size();
    batch->sends.push_back(
        {{options_.rank, send.peer, send.tag}, std::move(op)});
  }
  for (const auto& [key, op] : batch->recvs) hub->Post(key, op);
  for (const auto& [key, op] : batch->sends) hub->Post(key, op);
  return batch;
}

absl::StatusOr<std::unique_ptr<Engine>> CreateLocal(
    const EngineOptions& options) {
  return std::make_unique<LocalEngine>(options);
}

}  // namespace

const BackendDescriptor& LocalBackend() {
  static constexpr BackendDescriptor kDescriptor = {
      /*name=*/"local",     kEngineApiVersion,
      /*host_memory=*/true, /*cuda_memory=*/false,
      /*in_process=*/true,  &CreateLocal};
  return kDescriptor;
}

}  // namespace dsd
