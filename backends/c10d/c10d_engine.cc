// SPDX-License-Identifier: Apache-2.0
//
// A process group's tags have 31 bits and no say in sizes: Gloo's ends the
// process if a message is longer than its receive. So tags of messages travel
// in frames of a fixed size, which one thread of each rank receives from all
// others. A small message is in the frame. A large one waits until the receiver
// says that it is ready, in a frame that names the tag (here: slot) under which
// it now expects just these bytes in the caller's own memory.
//
// A rank keeps small messages that it does not expect yet, of each sender up to
// kWindow: it says what has found its receive, and a sender that has more under
// way sends only a frame that says so, and the message, in a frame, too, when
// the receiver is ready for it.
//
// Only Gloo promises that a transfer whose wait was ended, by an abort or since
// its time was over, touches the memory no more (and then closes all
// connections, so that no wait of a healthy group may be a short one). Of other
// groups, which may wrap Gloo's, a work may never end: they get memory that is
// the engine's own, and so may the thread that waits for one be left behind.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/from_blob.h"
#include "absl/base/no_destructor.h"
#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/backends/c10d/c10d_backend.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/store.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "torch/csrc/distributed/c10d/Backend.hpp"

namespace dsd {
namespace {

using Work = c10::intrusive_ptr<c10d::Work>;
using Message = std::pair<int, uint64_t>;  // peer, tag

// Every envelope of Communicator fits.
constexpr size_t kMaxFramedBytes = size_t{20} << 10;
// Small messages to one peer that have not found their receives; each also
// costs a place.
constexpr size_t kWindow = size_t{512} << 10;
constexpr size_t kFrameOverhead = 128;
constexpr absl::Duration kByePatience = absl::Seconds(2);
constexpr absl::Duration kThreadPatience = absl::Seconds(1);
// For what has happened already, in a process that may be stopped.
constexpr absl::Duration kTellPatience = absl::Minutes(1);
constexpr std::chrono::milliseconds kForever = std::chrono::hours(24 * 365);

// Tags of the process group; its user's own are small numbers.
constexpr int kFirstSlot = 1 << 29;
constexpr int kFirstFrameTag = 1 << 30;
constexpr char kFrameTagKey[] = "c10d/frame_tag";

constexpr char kGlooName[] = "gloo";

enum class FrameKind : uint32_t {
  kSmall = 1,
  kReady = 2,
  kBye = 3,
  kWaits = 4,    // a small message that is beyond the window
  kInvited = 5,  // it, after kReady
  kTaken = 6,    // `tag` bytes of the window
};

struct FrameHead {
  static constexpr uint32_t kMagic = 0x32647364;  // "dsd2"
  uint32_t magic = kMagic;
  FrameKind kind = FrameKind::kBye;
  int32_t source = 0;
  int32_t slot = 0;   // kReady, for a large message
  uint64_t tag = 0;   // of the message
  uint64_t size = 0;  // kSmall, kInvited: bytes that follow
};

size_t FrameCost(size_t bytes) { return bytes + kFrameOverhead; }

at::Tensor BytesAt(const std::byte* data, size_t size) {
  return at::from_blob(const_cast<std::byte*>(data),
                       {static_cast<int64_t>(size)}, at::kByte);
}

// Numbers of this process and not of a group, of which only an address could
// tell whether it is the same, and that may be another's later. They begin
// again when so many are taken that none of the first is in use.
std::atomic<uint32_t> next_communicator{0};
std::atomic<uint32_t> next_slot{0};

int TakeSlot() {
  constexpr uint32_t kSlots = kFirstFrameTag - kFirstSlot;
  return kFirstSlot + static_cast<int>(next_slot++ % kSlots);
}

// Keeps what a group may still touch, in memory that is its own, for good.
void Abandon(Work work) {
  struct All {
    absl::Mutex mu;
    std::vector<Work> works ABSL_GUARDED_BY(mu);
  };
  static absl::NoDestructor<All> all;
  if (work == nullptr) return;
  absl::MutexLock lock(&all->mu);
  all->works.push_back(std::move(work));
}

// Lets a thread that may never end be, with what it has.
void Abandon(std::unique_ptr<EnvThread> thread) {
  struct All {
    absl::Mutex mu;
    std::vector<std::unique_ptr<EnvThread>> threads ABSL_GUARDED_BY(mu);
  };
  static absl::NoDestructor<All> all;
  absl::MutexLock lock(&all->mu);
  all->threads.push_back(std::move(thread));
}

absl::Status CancelledStatus() { return absl::AbortedError("cancelled"); }

// Shared with its thread. End is the last call.
class C10dEngine final : public Engine,
                         public std::enable_shared_from_this<C10dEngine> {
 public:
  C10dEngine(const EngineOptions& options,
             const c10::intrusive_ptr<c10d::Backend>& group)
      : options_(options),
        group_(group),
        lends_(group->getBackendName() == kGlooName),
        peers_(options.world_size) {}

  void End();

  absl::Status Connect(absl::Time deadline) override;
  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override;
  void Cancel() override;

 private:
  class Batch;

  // One message of a batch. What is not constant is guarded by mu_.
  struct Op {
    bool is_send;
    Message message;
    std::byte* data;
    size_t size;
    bool framed;
    at::Tensor copy;  // of a large message, unless the group gets `data`
    Work work;        // moves the message, or its frame; null: not posted yet
    Work announced;   // the frame kReady or kWaits, if there is one
    bool arrived = false;
    bool done = false;  // only for the batch's thread
  };

  struct Peer {
    size_t under_way = 0;  // of the window
    size_t taken = 0;      // that it has not been told
    std::array<Work, 2> told;
    size_t next_told = 0;
  };

  absl::Status PostRecv(const std::shared_ptr<Op>& op)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status PostSend(const std::shared_ptr<Op>& op)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<Work> SendFrame(int peer, const FrameHead& head,
                                 const std::byte* data)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<Work> SendFrameOf(FrameKind kind, const Message& message,
                                   int slot = 0)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status SendSmall(Op& op, FrameKind kind)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status SendLarge(Op& op, int slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // A message kSmall of the peer has found its receive.
  absl::Status Taken(int rank, size_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // What the group may touch instead of the memory of `op`, or that.
  at::Tensor MemoryOf(Op& op) const;

  void CancelLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Ends the waits for it; few works can do that.
  static absl::Status AbortWork(c10d::Work& work) {
    return TorchToStatus([&] { work.abort(); });
  }
  // The same when nothing of the group is used any more: a wait of Gloo's that
  // times out ends all others. The first one may only hear of an abort, or that
  // the work is done, which the others do not hear then.
  static void TimeOut(c10d::Work& work) {
    for (int i = 0; i < 2; ++i) {
      TorchToStatus([&] {
        work.wait(std::chrono::milliseconds(1));
      }).IgnoreError();
    }
  }

  // OK, or why nothing works any more.
  absl::Status CheckUsable() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return cancelled_ ? CancelledStatus() : error_;
  }
  absl::Status WaitForWork(const Work& work, const Op& op, absl::Time deadline);
  absl::Status WaitFor(Op& op, absl::Time deadline);

  void ReceiveFrames();
  // Returns false after the last frame.
  absl::StatusOr<bool> TakeFrame(const at::Tensor& frame);
  void EndFrames();

  const EngineOptions options_;
  const c10::intrusive_ptr<c10d::Backend> group_;
  const bool lends_;  // memory of its callers to the group
  int frame_tag_ = 0;

  absl::Mutex mu_;  // also: one call of the group at a time
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  bool frames_over_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status error_ ABSL_GUARDED_BY(mu_);
  Work frame_work_ ABSL_GUARDED_BY(mu_);
  // Works that somebody waits for.
  absl::flat_hash_map<c10d::Work*, int> waited_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<Message, std::shared_ptr<Op>> recvs_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<Message, std::shared_ptr<Op>> sends_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<Message, std::string> early_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_set<Message> waiting_ ABSL_GUARDED_BY(mu_);  // kWaits
  absl::flat_hash_map<Message, int> ready_ ABSL_GUARDED_BY(mu_);
  std::vector<Peer> peers_ ABSL_GUARDED_BY(mu_);
  int byes_ ABSL_GUARDED_BY(mu_) = 0;
  std::unique_ptr<EnvThread> thread_;
};

class C10dEngine::Batch final : public EngineBatch {
 public:
  explicit Batch(C10dEngine* engine) : engine_(engine) {}

  ~Batch() override {
    absl::MutexLock lock(&engine_->mu_);
    for (const std::shared_ptr<Op>& op : ops_) {
      if (op->done) continue;
      // What was not finished is never finished.
      engine_->CancelLocked();
      auto& waiting = op->is_send ? engine_->sends_ : engine_->recvs_;
      const auto it = waiting.find(op->message);
      if (it != waiting.end() && it->second == op) waiting.erase(it);
      Abandon(std::move(op->announced));
      if (op->framed || !engine_->lends_) {
        Abandon(std::move(op->work));
      } else if (op->work != nullptr) {
        TimeOut(*op->work);
        op->work.reset();
      }
    }
  }

  absl::Status Wait(absl::Time deadline) override {
    for (const std::shared_ptr<Op>& op : ops_) {
      DSD_RETURN_IF_ERROR(engine_->WaitFor(*op, deadline));
    }
    return absl::OkStatus();
  }

  absl::Status WaitReceived(size_t index, absl::Time deadline) override {
    return engine_->WaitFor(*ops_[index], deadline);  // the receives come first
  }

  const std::shared_ptr<Op>& Add(bool is_send, int peer, uint64_t tag,
                                 const std::byte* data, size_t size) {
    ops_.push_back(std::make_shared<Op>(Op{is_send,
                                           {peer, tag},
                                           const_cast<std::byte*>(data),
                                           size,
                                           size <= kMaxFramedBytes,
                                           at::Tensor(),
                                           nullptr,
                                           nullptr}));
    return ops_.back();
  }

 private:
  C10dEngine* const engine_;
  std::vector<std::shared_ptr<Op>> ops_;
};

void C10dEngine::End() {
  EndFrames();
  bool over = true;
  if (thread_ != nullptr) {
    absl::MutexLock lock(&mu_);
    over = options_.env->Await(mu_, absl::Condition(&frames_over_),
                               options_.env->Now() + kThreadPatience);
  }
  if (over) {
    thread_.reset();
  } else {
    Abandon(std::move(thread_));
  }
}

absl::Status C10dEngine::Connect(absl::Time deadline) {
  if (group_->getRank() != options_.rank ||
      group_->getSize() != options_.world_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("the process group has rank ", group_->getRank(), " of ",
                     group_->getSize(), ", expected ", options_.rank, " of ",
                     options_.world_size));
  }
  // Rank 0 of all communicators over the group is one process, whose numbers
  // differ.
  constexpr uint32_t kFrameTags = uint32_t{1} << 30;
  uint32_t number = 0;
  if (options_.rank == 0) {
    number = next_communicator++ % kFrameTags;
    DSD_RETURN_IF_ERROR(
        options_.store->Set(kFrameTagKey, absl::StrCat(number), deadline));
  } else {
    const absl::StatusOr<std::string> text =
        options_.store->Get(kFrameTagKey, deadline);
    if (!text.ok()) {
      return Annotate(text.status(), "wait for rank 0 to choose a tag");
    }
    if (!absl::SimpleAtoi(*text, &number) || number >= kFrameTags) {
      return absl::InternalError(
          absl::StrCat("rank 0 has chosen \"", *text, "\" for a tag"));
    }
  }
  frame_tag_ = kFirstFrameTag + static_cast<int>(number);
  thread_ = options_.env->StartThread(
      "dsd_c10d", [self = shared_from_this()] { self->ReceiveFrames(); });
  return thread_ == nullptr ? NoThread("dsd_c10d") : absl::OkStatus();
}

absl::StatusOr<Work> C10dEngine::SendFrame(int peer, const FrameHead& head,
                                           const std::byte* data) {
  return TorchToStatus([&] {
    const at::Tensor frame =
        at::empty({static_cast<int64_t>(sizeof(head) + head.size)}, at::kByte);
    std::memcpy(frame.data_ptr(), &head, sizeof(head));
    if (head.size > 0) {
      std::memcpy(frame.mutable_data_ptr<uint8_t>() + sizeof(head), data,
                  head.size);
    }
    std::vector<at::Tensor> tensors = {frame};
    return group_->send(tensors, peer, frame_tag_);
  });
}

absl::StatusOr<Work> C10dEngine::SendFrameOf(FrameKind kind,
                                             const Message& message, int slot) {
  FrameHead head;
  head.kind = kind;
  head.source = options_.rank;
  head.slot = slot;
  head.tag = message.second;
  return SendFrame(message.first, head, nullptr);
}

absl::Status C10dEngine::SendSmall(Op& op, FrameKind kind) {
  FrameHead head;
  head.kind = kind;
  head.source = options_.rank;
  head.tag = op.message.second;
  head.size = op.size;
  DSD_ASSIGN_OR_RETURN(op.work, SendFrame(op.message.first, head, op.data));
  return absl::OkStatus();
}

at::Tensor C10dEngine::MemoryOf(Op& op) const {
  if (lends_) return BytesAt(op.data, op.size);
  // Of a receive, too: what comes may be shorter.
  op.copy = BytesAt(op.data, op.size).clone();
  return op.copy;
}

absl::Status C10dEngine::SendLarge(Op& op, int slot) {
  DSD_ASSIGN_OR_RETURN(op.work, TorchToStatus([&] {
                         std::vector<at::Tensor> tensors = {MemoryOf(op)};
                         return group_->send(tensors, op.message.first, slot);
                       }));
  return absl::OkStatus();
}

absl::Status C10dEngine::PostRecv(const std::shared_ptr<Op>& op) {
  const auto early = early_.find(op->message);
  if (early != early_.end()) {
    if (early->second.size() > op->size) {
      return absl::InternalError(absl::StrCat(
          "rank ", op->message.first, " sent ", early->second.size(),
          " bytes for a receive of ", op->size));
    }
    if (!early->second.empty()) {
      std::memcpy(op->data, early->second.data(), early->second.size());
    }
    const size_t bytes = early->second.size();
    early_.erase(early);
    op->arrived = true;
    return Taken(op->message.first, bytes);
  }
  recvs_[op->message] = op;
  const bool waits = waiting_.erase(op->message) > 0;
  int slot = 0;
  if (op->framed) {
    if (!waits) return absl::OkStatus();
  } else {
    slot = TakeSlot();
    DSD_ASSIGN_OR_RETURN(op->work, TorchToStatus([&] {
                           std::vector<at::Tensor> tensors = {MemoryOf(*op)};
                           return group_->recv(tensors, op->message.first,
                                               slot);
                         }));
  }
  DSD_ASSIGN_OR_RETURN(op->announced,
                       SendFrameOf(FrameKind::kReady, op->message, slot));
  return absl::OkStatus();
}

absl::Status C10dEngine::PostSend(const std::shared_ptr<Op>& op) {
  const auto ready = ready_.find(op->message);
  if (ready != ready_.end()) {
    const int slot = ready->second;
    ready_.erase(ready);
    return op->framed ? SendSmall(*op, FrameKind::kInvited)
                      : SendLarge(*op, slot);
  }
  if (op->framed) {
    size_t& under_way = peers_[op->message.first].under_way;
    if (under_way + FrameCost(op->size) <= kWindow) {
      under_way += FrameCost(op->size);
      return SendSmall(*op, FrameKind::kSmall);
    }
    DSD_ASSIGN_OR_RETURN(op->announced,
                         SendFrameOf(FrameKind::kWaits, op->message));
  }
  sends_[op->message] = op;
  return absl::OkStatus();
}

absl::Status C10dEngine::Taken(int rank, size_t bytes) {
  Peer& peer = peers_[rank];
  peer.taken += FrameCost(bytes);
  if (peer.taken < kWindow / 2) return absl::OkStatus();
  // The peer has received the one before the last, or it could not have sent so
  // much since: nothing is waited for.
  Work& told = peer.told[peer.next_told++ % peer.told.size()];
  if (told != nullptr) {
    DSD_RETURN_IF_ERROR(TorchToStatus([&] {
                          return told->wait(
                              absl::ToChronoMilliseconds(kTellPatience));
                        }).status());
  }
  DSD_ASSIGN_OR_RETURN(
      told, SendFrameOf(FrameKind::kTaken,
                        Message(rank, std::exchange(peer.taken, 0))));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<EngineBatch>> C10dEngine::Start(
    absl::Span<const EngineSend> sends, absl::Span<const EngineRecv> recvs) {
  auto batch = std::make_unique<Batch>(this);
  std::vector<std::shared_ptr<Op>> posted;
  for (const EngineRecv& recv : recvs) {
    posted.push_back(batch->Add(/*is_send=*/false, recv.peer, recv.tag,
                                recv.data.data(), recv.data.size()));
  }
  for (const EngineSend& send : sends) {
    posted.push_back(batch->Add(/*is_send=*/true, send.peer, send.tag,
                                send.data.data(), send.data.size()));
  }
  absl::Status status;
  {
    absl::MutexLock lock(&mu_);
    status = CheckUsable();
    for (const std::shared_ptr<Op>& op : posted) {
      if (!status.ok()) break;
      status = op->is_send ? PostSend(op) : PostRecv(op);
    }
  }
  // The batch, which locks, is destroyed outside of the lock.
  if (absl::IsAborted(status)) return status;
  if (!status.ok()) return absl::UnavailableError(status.message());
  return batch;
}

absl::Status C10dEngine::WaitForWork(const Work& work, const Op& op,
                                     absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    DSD_RETURN_IF_ERROR(CheckUsable());
    ++waited_[work.get()];
  }
  const absl::Duration left =
      std::max(deadline - options_.env->Now(), absl::ZeroDuration());
  const absl::StatusOr<bool> completed = TorchToStatus([&] {
    return work->wait(std::max(
        std::chrono::milliseconds(1),
        absl::ToChronoMilliseconds(absl::Ceil(left, absl::Milliseconds(1)))));
  });
  {
    absl::MutexLock lock(&mu_);
    if (--waited_[work.get()] == 0) waited_.erase(work.get());
    if (completed.ok() && *completed) return absl::OkStatus();
    if (op.arrived) return absl::OkStatus();
    if (cancelled_) return CancelledStatus();
  }
  const std::string what =
      absl::StrCat(op.is_send ? "send to rank " : "receive from rank ",
                   op.message.first, ": ");
  if (completed.ok()) return CancelledStatus();
  if (options_.env->Now() >= deadline) {
    return absl::DeadlineExceededError(
        absl::StrCat(what, completed.status().message()));
  }
  return absl::UnavailableError(
      absl::StrCat(what, completed.status().message()));
}

absl::Status C10dEngine::WaitFor(Op& op, absl::Time deadline) {
  if (op.done) return absl::OkStatus();
  Work work;
  {
    absl::MutexLock lock(&mu_);
    const auto moves = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
      return op.arrived || op.work != nullptr || !CheckUsable().ok();
    };
    if (!options_.env->Await(mu_, absl::Condition(&moves), deadline)) {
      return absl::DeadlineExceededError(
          absl::StrCat(op.is_send ? "send to" : "receive from", " rank ",
                       op.message.first, ": not in time"));
    }
    if (!op.arrived) DSD_RETURN_IF_ERROR(CheckUsable());
    work = op.work;
  }
  if (op.announced != nullptr) {
    DSD_RETURN_IF_ERROR(WaitForWork(op.announced, op, deadline));
  }
  if (op.is_send || !op.framed) {
    if (work != nullptr) {
      DSD_RETURN_IF_ERROR(WaitForWork(work, op, deadline));
    }
    if (!op.is_send) {
      absl::MutexLock lock(&mu_);
      const auto it = recvs_.find(op.message);
      if (it != recvs_.end() && it->second.get() == &op) recvs_.erase(it);
      if (op.copy.defined() && !op.arrived) {
        std::memcpy(op.data, op.copy.const_data_ptr(), op.size);
      }
    }
  }
  op.done = true;
  return absl::OkStatus();
}

absl::StatusOr<bool> C10dEngine::TakeFrame(const at::Tensor& frame) {
  FrameHead head;
  const std::byte* const bytes =
      static_cast<const std::byte*>(frame.const_data_ptr());
  std::memcpy(&head, bytes, sizeof(head));
  if (head.magic != FrameHead::kMagic || head.size > kMaxFramedBytes ||
      head.source < 0 || head.source >= options_.world_size) {
    return absl::InternalError(
        "a message of somebody else came through the process group");
  }
  const Message message(head.source, head.tag);
  const std::byte* const data = bytes + sizeof(head);
  absl::MutexLock lock(&mu_);
  switch (head.kind) {
    case FrameKind::kBye:
      return ++byes_ < options_.world_size - 1;
    case FrameKind::kSmall:
    case FrameKind::kInvited: {
      const auto it = recvs_.find(message);
      if (it == recvs_.end()) {
        early_[message].assign(reinterpret_cast<const char*>(data), head.size);
        return true;
      }
      Op& op = *it->second;
      if (head.size > op.size) {
        return absl::InternalError(
            absl::StrCat("rank ", head.source, " sent ", head.size,
                         " bytes for a receive of ", op.size));
      }
      if (head.size > 0) std::memcpy(op.data, data, head.size);
      op.arrived = true;
      // Nothing will come under its slot.
      if (op.work != nullptr) AbortWork(*op.work).IgnoreError();
      recvs_.erase(it);
      if (head.kind == FrameKind::kSmall) {
        DSD_RETURN_IF_ERROR(Taken(head.source, head.size));
      }
      return true;
    }
    case FrameKind::kWaits: {
      const auto it = recvs_.find(message);
      if (it == recvs_.end()) {
        waiting_.insert(message);
      } else if (it->second->framed) {
        DSD_ASSIGN_OR_RETURN(it->second->announced,
                             SendFrameOf(FrameKind::kReady, message));
      }
      return true;
    }
    case FrameKind::kTaken: {
      size_t& under_way = peers_[head.source].under_way;
      under_way -= std::min<size_t>(under_way, head.tag);
      return true;
    }
    case FrameKind::kReady: {
      const auto it = sends_.find(message);
      if (it == sends_.end()) {
        ready_[message] = head.slot;
        return true;
      }
      const std::shared_ptr<Op> op = std::move(it->second);
      sends_.erase(it);
      DSD_RETURN_IF_ERROR(op->framed ? SendSmall(*op, FrameKind::kInvited)
                                     : SendLarge(*op, head.slot));
      return true;
    }
  }
  return absl::InternalError("a frame of a kind that nobody knows");
}

void C10dEngine::ReceiveFrames() {
  absl::Status status;
  while (true) {
    at::Tensor frame;
    Work work;
    {
      absl::MutexLock lock(&mu_);
      if (cancelled_) break;
      status = TorchToStatus([&] {
        frame = at::empty(
            {static_cast<int64_t>(sizeof(FrameHead) + kMaxFramedBytes)},
            at::kByte);
        std::vector<at::Tensor> tensors = {frame};
        work = group_->recvAnysource(tensors, frame_tag_);
      });
      if (!status.ok()) break;
      frame_work_ = work;
    }
    const absl::StatusOr<bool> came =
        TorchToStatus([&] { return work->wait(kForever); });
    {
      absl::MutexLock lock(&mu_);
      frame_work_.reset();
    }
    if (!came.ok() || !*came) {
      status = came.ok() ? CancelledStatus() : came.status();
      Abandon(std::move(work));
      break;
    }
    const absl::StatusOr<bool> more = TakeFrame(frame);
    status = more.status();
    if (!more.ok() || !*more) break;
  }
  absl::MutexLock lock(&mu_);
  frames_over_ = true;
  if (!status.ok() && error_.ok()) {
    error_ = absl::UnavailableError(
        absl::StrCat("the process group failed: ", status.message()));
    for (const auto& [waiting, count] : waited_) {
      if (!AbortWork(*waiting).ok()) TimeOut(*waiting);
    }
  }
}

// All ranks have left, and each tells the others to listen no more, behind all
// that it has sent them: what stays posted would spoil the group for its user.
void C10dEngine::EndFrames() {
  std::vector<Work> works;
  const absl::Time until = options_.env->Now() + kByePatience;
  bool usable = false;
  {
    absl::MutexLock lock(&mu_);
    if (thread_ == nullptr) return;
    for (Peer& peer : peers_) {
      for (Work& told : peer.told) {
        if (told != nullptr) works.push_back(std::move(told));
      }
    }
    usable = CheckUsable().ok();
    if (usable) {
      for (int i = 1; i < options_.world_size; ++i) {
        absl::StatusOr<Work> bye =
            SendFrameOf(FrameKind::kBye,
                        Message((options_.rank + i) % options_.world_size, 0));
        if (bye.ok()) works.push_back(*std::move(bye));
      }
      const auto over = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
        return frames_over_ || cancelled_;
      };
      options_.env->Await(mu_, absl::Condition(&over), until);
    }
    CancelLocked();
  }
  for (Work& work : works) {
    const absl::Duration left =
        std::max(until - options_.env->Now(), absl::Milliseconds(1));
    if (!usable || !TorchToStatus([&] {
                      return work->wait(absl::ToChronoMilliseconds(left));
                    }).ok()) {
      Abandon(std::move(work));
    }
  }
}

void C10dEngine::CancelLocked() {
  cancelled_ = true;
  if (frame_work_ != nullptr) AbortWork(*frame_work_).IgnoreError();
  for (const auto& [work, count] : waited_) {
    if (!AbortWork(*work).ok()) TimeOut(*work);
  }
}

void C10dEngine::Cancel() {
  absl::MutexLock lock(&mu_);
  CancelLocked();
}

class EngineOfCommunicator final : public Engine {
 public:
  explicit EngineOfCommunicator(std::shared_ptr<C10dEngine> engine)
      : engine_(std::move(engine)) {}
  ~EngineOfCommunicator() override { engine_->End(); }

  absl::Status Connect(absl::Time deadline) override {
    return engine_->Connect(deadline);
  }
  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override {
    return engine_->Start(sends, recvs);
  }
  void Cancel() override { engine_->Cancel(); }

 private:
  const std::shared_ptr<C10dEngine> engine_;
};

}  // namespace

std::unique_ptr<Engine> MakeC10dEngine(
    const EngineOptions& options,
    const c10::intrusive_ptr<c10d::Backend>& group) {
  return std::make_unique<EngineOfCommunicator>(
      std::make_shared<C10dEngine>(options, group));
}

}  // namespace dsd
