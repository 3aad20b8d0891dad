// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/nccl/nccl_lane.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/log/log.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {
namespace {

constexpr absl::Duration kFirstPause = absl::Microseconds(5);
constexpr absl::Duration kLongestPause = absl::Milliseconds(1);
// Of waits that end by Cancel.
constexpr absl::Duration kForever = absl::Hours(24 * 365);
// Of an orderly end, which needs the others.
constexpr absl::Duration kFinalizePatience = absl::Seconds(5);
// Of an abort.
constexpr absl::Duration kAbortPatience = absl::Seconds(30);

absl::Status CancelledStatus() { return absl::AbortedError("cancelled"); }

enum class Hello : uint64_t { kFromSender = 1, kFromReceiver = 2 };

// The companion's name for an announcement. `number`: of the message among
// those of its lane from one rank to another.
uint64_t HelloTag(uint64_t tag, uint64_t number, Hello from) {
  uint64_t x = tag ^ (number * 0x9e3779b97f4a7c15u) ^
               (static_cast<uint64_t>(from) << 62);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31) ^ 0x6c63636e;  // "nccl"
}

}  // namespace

bool NcclLane::IsCancelled() {
  absl::MutexLock lock(&mu_);
  return cancelled_;
}

absl::Status NcclLane::StatusIfCancelled() {
  return IsCancelled() ? CancelledStatus() : absl::OkStatus();
}

void NcclLane::Rest(absl::Duration& pause) {
  absl::MutexLock lock(&mu_);
  options_.env->Await(mu_, absl::Condition(&cancelled_),
                      options_.env->Now() + pause);
  pause = std::min(pause * 3 / 2, kLongestPause);
}

absl::Status NcclLane::LookForErrors() {
  nccl_mu_.AssertHeld();
  if (comm_ == nullptr) return CancelledStatus();
  NcclResult error = kNcclSuccess;
  DSD_RETURN_IF_ERROR(options_.nccl->Check(
      options_.nccl->CommGetAsyncError(comm_, &error), "look for errors"));
  return options_.nccl->Check(error, "communication");
}

absl::Status NcclLane::Settle(absl::string_view what, absl::Time deadline) {
  absl::Duration pause = kFirstPause;
  while (true) {
    NcclResult state = kNcclSuccess;
    {
      absl::MutexLock lock(&nccl_mu_);
      DSD_RETURN_IF_ERROR(options_.nccl->Check(
          options_.nccl->CommGetAsyncError(comm_, &state), what));
    }
    if (state != kNcclInProgress) return options_.nccl->Check(state, what);
    DSD_RETURN_IF_ERROR(StatusIfCancelled());
    if (options_.env->Now() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat(
          what, ": NCCL is not ready in time; not all ranks have come"));
    }
    Rest(pause);
  }
}

absl::StatusOr<CudaEvent> NcclLane::TakeEvent() {
  {
    absl::MutexLock lock(&mu_);
    if (!free_events_.empty()) {
      const CudaEvent event = free_events_.back();
      free_events_.pop_back();
      return event;
    }
  }
  CudaEvent event = nullptr;
  DSD_RETURN_IF_ERROR(options_.cuda->Check(
      options_.cuda->EventCreateWithFlags(&event, kCudaEventDisableTiming),
      "create an event"));
  return event;
}

void NcclLane::ReturnEvents(NcclTransfer& transfer) {
  absl::MutexLock lock(&mu_);
  for (const CudaEvent gate : transfer.gates) free_events_.push_back(gate);
  transfer.gates.clear();
  if (transfer.done != nullptr) free_events_.push_back(transfer.done);
  transfer.done = nullptr;
}

// --- Opening ---

absl::Status NcclLane::Open(absl::Time deadline) {
  sent_.assign(options_.world_size, 0);
  received_.assign(options_.world_size, 0);
  thread_ = options_.env->StartThread("dsd_nccl",
                                      [this, deadline] { Run(deadline); });
  if (thread_ == nullptr) return NoThread("dsd_nccl");
  absl::MutexLock lock(&mu_);
  const auto over = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return opened_ || cancelled_;
  };
  if (!options_.env->Await(mu_, absl::Condition(&over), deadline)) {
    cancelled_ = true;
    return absl::DeadlineExceededError(
        "NCCL has not connected the ranks in time");
  }
  return opened_ ? open_status_ : CancelledStatus();
}

absl::Status NcclLane::OpenInThread(absl::Time deadline) {
  const CudaApi& cuda = *options_.cuda;
  const NcclApi& nccl = *options_.nccl;
  DSD_RETURN_IF_ERROR(cuda.Check(cuda.SetDevice(options_.device),
                                 absl::StrCat("device ", options_.device)));
  int least = 0;
  int greatest = 0;
  DSD_RETURN_IF_ERROR(
      cuda.Check(cuda.DeviceGetStreamPriorityRange(&least, &greatest),
                 "priorities of streams"));
  DSD_RETURN_IF_ERROR(cuda.Check(
      cuda.StreamCreateWithPriority(&stream_, kCudaStreamNonBlocking, greatest),
      "create a stream"));
  DSD_RETURN_IF_ERROR(cuda.Check(cuda.Malloc(&scratch_, 2), "2 bytes"));

  // Each lane has a communicator from an id of its own: ncclCommSplit would be
  // a collective call on a communicator that another thread is using.
  NcclUniqueId id;
  const std::string key = absl::StrCat("id/", absl::Hex(options_.lane));
  if (options_.rank == 0) {
    {
      absl::MutexLock lock(&nccl_mu_);
      DSD_RETURN_IF_ERROR(
          nccl.Check(nccl.GetUniqueId(&id), "listen for the other ranks"));
    }
    if (options_.world_size > 1) {
      DSD_RETURN_IF_ERROR(options_.store->Set(
          key,
          absl::StrCat(nccl.version, " ",
                       absl::string_view(id.internal, sizeof(id.internal))),
          deadline));
    }
  } else {
    DSD_ASSIGN_OR_RETURN(const std::string value,
                         options_.store->Get(key, deadline));
    const std::vector<absl::string_view> fields =
        absl::StrSplit(value, absl::MaxSplits(' ', 1));
    int version = 0;
    if (fields.size() != 2 || fields[1].size() != sizeof(id.internal) ||
        !absl::SimpleAtoi(fields[0], &version)) {
      return absl::InternalError("rank 0 has published no id of NCCL");
    }
    if (version != nccl.version) {
      return absl::FailedPreconditionError(
          absl::StrCat("rank ", options_.rank, " runs NCCL ",
                       NcclVersionText(nccl.version), ", but rank 0 runs NCCL ",
                       NcclVersionText(version), "; all ranks need the same"));
    }
    std::memcpy(id.internal, fields[1].data(), sizeof(id.internal));
  }
  {
    NcclConfig config;
    absl::MutexLock lock(&nccl_mu_);
    DSD_RETURN_IF_ERROR(
        nccl.Check(nccl.CommInitRankConfig(&comm_, options_.world_size, id,
                                           options_.rank, &config),
                   "initialize"));
  }
  DSD_RETURN_IF_ERROR(Settle("initialize", deadline));
  return WarmUp(deadline);
}

// NCCL connects two ranks at their first message, which takes long, and may be
// where it finds that it cannot.
absl::Status NcclLane::WarmUp(absl::Time deadline) {
  const int world = options_.world_size;
  std::byte* const bytes = static_cast<std::byte*>(scratch_);
  NcclTransfer ring;
  EngineSend send;
  send.peer = (options_.rank + 1) % world;
  send.data = absl::MakeConstSpan(bytes, 1);
  EngineRecv recv;
  recv.peer = (options_.rank + world - 1) % world;
  recv.data = absl::MakeSpan(bytes + 1, 1);
  ring.sends.push_back(send);
  ring.recvs.push_back(recv);
  ring.peers = "all ranks";
  DSD_ASSIGN_OR_RETURN(ring.done, TakeEvent());
  absl::Status status = Launch(ring);
  absl::Duration pause = kFirstPause;
  while (status.ok()) {
    const absl::StatusOr<bool> reached = options_.cuda->IsReached(ring.done);
    status = reached.status();
    if (!status.ok() || *reached) break;
    {
      absl::MutexLock lock(&nccl_mu_);
      status = LookForErrors();
    }
    if (status.ok()) status = StatusIfCancelled();
    if (status.ok() && options_.env->Now() >= deadline) {
      status = absl::DeadlineExceededError(
          "the first message through NCCL did not arrive in time");
    }
    Rest(pause);
  }
  ReturnEvents(ring);
  return status;
}

void NcclLane::Run(absl::Time deadline) {
  absl::Status status = OpenInThread(deadline);
  {
    absl::MutexLock lock(&mu_);
    opened_ = true;
    open_status_ = status;
  }
  if (status.ok()) status = Serve();
  {
    absl::MutexLock lock(&mu_);
    stopped_ = true;
    failure_ = status;
    if (!status.ok()) {
      // An abort must come on all ranks at about the same time: when the group
      // has been told.
      const auto told = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
        return cancelled_ || closing_;
      };
      mu_.Await(absl::Condition(&told));
    }
  }
  End(/*in_order=*/status.ok());
}

// --- Transfers ---

absl::Status NcclLane::RecordGates(NcclTransfer& transfer) {
  std::vector<CudaStream> streams;
  for (const EngineSend& send : transfer.sends) {
    streams.push_back(send.space.stream);
  }
  for (const EngineRecv& recv : transfer.recvs) {
    streams.push_back(recv.space.stream);
  }
  std::sort(streams.begin(), streams.end());
  streams.erase(std::unique(streams.begin(), streams.end()), streams.end());
  for (const CudaStream stream : streams) {
    DSD_ASSIGN_OR_RETURN(const CudaEvent gate, TakeEvent());
    transfer.gates.push_back(gate);
    DSD_RETURN_IF_ERROR(options_.cuda->Check(
        options_.cuda->EventRecord(gate, stream), "record an event"));
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> NcclLane::GatesArePassed(const NcclTransfer& transfer) {
  for (const CudaEvent gate : transfer.gates) {
    DSD_ASSIGN_OR_RETURN(const bool passed, options_.cuda->IsReached(gate));
    if (!passed) return false;
  }
  return true;
}

void NcclLane::PrepareHandshake(NcclTransfer& transfer) {
  std::vector<int> peers;
  const auto add = [&](int peer, uint64_t tag, uint64_t number, Hello mine,
                       Hello theirs) {
    EngineSend send;
    send.peer = peer;
    send.tag = HelloTag(tag, number, mine);
    transfer.hello_sends.push_back(send);
    EngineRecv recv;
    recv.peer = peer;
    recv.tag = HelloTag(tag, number, theirs);
    transfer.hello_recvs.push_back(recv);
    peers.push_back(peer);
  };
  for (const EngineRecv& recv : transfer.recvs) {
    if (recv.peer == options_.rank) continue;
    add(recv.peer, recv.tag, received_[recv.peer]++, Hello::kFromReceiver,
        Hello::kFromSender);
  }
  for (const EngineSend& send : transfer.sends) {
    if (send.peer == options_.rank) continue;
    add(send.peer, send.tag, sent_[send.peer]++, Hello::kFromSender,
        Hello::kFromReceiver);
  }
  // A byte each; what is in it does not matter.
  transfer.hellos.resize(2 * transfer.hello_sends.size());
  size_t at = 0;
  for (EngineSend& send : transfer.hello_sends) {
    send.data = absl::MakeConstSpan(&transfer.hellos[at++], 1);
  }
  for (EngineRecv& recv : transfer.hello_recvs) {
    recv.data = absl::MakeSpan(&transfer.hellos[at++], 1);
  }
  std::sort(peers.begin(), peers.end());
  peers.erase(std::unique(peers.begin(), peers.end()), peers.end());
  transfer.peers = absl::StrCat("rank ", absl::StrJoin(peers, ", "));
}

absl::StatusOr<bool> NcclLane::Announce(NcclTransfer& transfer) {
  if (transfer.handshake != nullptr) return true;
  DSD_ASSIGN_OR_RETURN(const bool passed, GatesArePassed(transfer));
  if (!passed) return false;
  if (transfer.hello_sends.empty()) return true;
  DSD_ASSIGN_OR_RETURN(
      transfer.handshake,
      options_.companion->Start(transfer.hello_sends, transfer.hello_recvs));
  return true;
}

absl::StatusOr<std::unique_ptr<NcclTransfer>> NcclLane::Start(
    std::vector<EngineSend> sends, std::vector<EngineRecv> recvs) {
  const CudaDeviceScope device(*options_.cuda, options_.device);
  DSD_RETURN_IF_ERROR(device.status());
  auto transfer = std::make_unique<NcclTransfer>();
  transfer->sends = std::move(sends);
  transfer->recvs = std::move(recvs);
  absl::Status status = RecordGates(*transfer);
  if (status.ok()) {
    PrepareHandshake(*transfer);
    absl::StatusOr<CudaEvent> done = TakeEvent();
    if (done.ok()) transfer->done = *done;
    status = done.status();
  }
  // Mostly the streams are there already; if not, the thread looks again.
  if (status.ok()) status = Announce(*transfer).status();
  if (status.ok()) {
    absl::MutexLock lock(&mu_);
    status = cancelled_ ? CancelledStatus() : failure_;
    if (status.ok()) queue_.push_back(transfer.get());
  }
  if (!status.ok()) {
    ReturnEvents(*transfer);
    return status;
  }
  return transfer;
}

absl::Status NcclLane::Serve() {
  std::vector<NcclTransfer*> queued;
  absl::Duration pause = kFirstPause;
  while (true) {
    {
      absl::MutexLock lock(&mu_);
      const auto needed = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
        return cancelled_ || closing_ || !queue_.empty();
      };
      mu_.Await(absl::Condition(&needed));
      if (cancelled_) return CancelledStatus();
      if (queue_.empty()) return absl::OkStatus();
      queued.assign(queue_.begin(), queue_.end());
    }
    // Those behind the first, too: their peers may be waiting for that.
    bool first_is_announced = false;
    for (NcclTransfer* transfer : queued) {
      DSD_ASSIGN_OR_RETURN(const bool announced, Announce(*transfer));
      if (transfer == queued.front()) first_is_announced = announced;
    }
    if (!first_is_announced) {
      Rest(pause);
      continue;
    }
    pause = kFirstPause;
    NcclTransfer& first = *queued.front();
    if (first.handshake != nullptr) {
      DSD_RETURN_IF_ERROR(
          first.handshake->Wait(options_.env->Now() + kForever));
      first.handshake.reset();
    }
    {
      absl::MutexLock lock(&mu_);
      first.state = State::kLaunching;
    }
    DSD_RETURN_IF_ERROR(Launch(first));
    absl::MutexLock lock(&mu_);
    queue_.pop_front();
    first.state = State::kLaunched;
  }
}

absl::Status NcclLane::Launch(NcclTransfer& transfer) {
  const NcclApi& nccl = *options_.nccl;
  const auto check = [&](NcclResult result, const char* what) {
    return nccl.Check(result, absl::StrCat(what, " (", transfer.peers, ")"));
  };
  {
    absl::MutexLock lock(&nccl_mu_);
    DSD_RETURN_IF_ERROR(check(nccl.GroupStart(), "begin a group"));
    absl::Status status;
    for (const EngineRecv& recv : transfer.recvs) {
      if (!status.ok()) break;
      status = check(nccl.Recv(recv.data.data(), recv.data.size(), kNcclUint8,
                               recv.peer, comm_, stream_),
                     "receive");
    }
    for (const EngineSend& send : transfer.sends) {
      if (!status.ok()) break;
      status = check(nccl.Send(send.data.data(), send.data.size(), kNcclUint8,
                               send.peer, comm_, stream_),
                     "send");
    }
    // Also after an error: a group is a state of the thread.
    const NcclResult ended = nccl.GroupEnd();
    DSD_RETURN_IF_ERROR(status);
    DSD_RETURN_IF_ERROR(check(ended, "send and receive"));
  }
  DSD_RETURN_IF_ERROR(
      Settle(absl::StrCat("send and receive (", transfer.peers, ")"),
             absl::InfiniteFuture()));
  return options_.cuda->Check(
      options_.cuda->EventRecord(transfer.done, stream_), "record an event");
}

absl::Status NcclLane::Wait(NcclTransfer& transfer, absl::Time deadline) {
  absl::Duration pause = kFirstPause;
  while (true) {
    State state;
    {
      absl::MutexLock lock(&mu_);
      const auto launched = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
        return cancelled_ || stopped_ || transfer.state >= State::kLaunched;
      };
      options_.env->Await(mu_, absl::Condition(&launched), deadline);
      state = transfer.state;
      if (state == State::kDone) return absl::OkStatus();
      if (cancelled_) return CancelledStatus();
      if (!failure_.ok()) return failure_;
    }
    if (state == State::kLaunched) {
      DSD_ASSIGN_OR_RETURN(const bool done,
                           options_.cuda->IsReached(transfer.done));
      if (done) {
        absl::MutexLock lock(&mu_);
        transfer.state = State::kDone;
        return absl::OkStatus();
      }
      // Not while the thread is in a call, which finds them itself.
      if (nccl_mu_.TryLock()) {
        const absl::Status found = LookForErrors();
        nccl_mu_.Unlock();
        if (!found.ok()) return IsCancelled() ? CancelledStatus() : found;
      }
    }
    if (options_.env->Now() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat(
          "device memory has not come or gone in time (", transfer.peers, ")"));
    }
    Rest(pause);
  }
}

bool NcclLane::IsLetGo(NcclTransfer& transfer) {
  State state;
  {
    absl::MutexLock lock(&mu_);
    if (over_) return true;
    state = transfer.state;
    if (state == State::kQueued) return stopped_;
  }
  if (state != State::kLaunched) return state == State::kDone;
  // Before the abort returns, perhaps: it waits for more of the device.
  const absl::StatusOr<bool> reached = options_.cuda->IsReached(transfer.done);
  return reached.ok() && *reached;
}

void NcclLane::Release(std::unique_ptr<NcclTransfer> transfer) {
  const absl::Time end = options_.env->Now() + kAbortPatience;
  absl::Duration pause = kFirstPause;
  while (!IsLetGo(*transfer)) {
    if (options_.env->Now() >= end) {
      // To return would let the device write into memory of somebody else.
      LOG(FATAL) << "NCCL has not ended a transfer (" << transfer->peers << ") "
                 << kAbortPatience
                 << " after it was aborted; the device still uses its memory";
    }
    options_.env->SleepUntil(options_.env->Now() + pause);
    pause = std::min(pause * 3 / 2, kLongestPause);
  }
  ReturnEvents(*transfer);
}

// --- The end ---

void NcclLane::Cancel() {
  absl::MutexLock lock(&mu_);
  cancelled_ = true;
}

void NcclLane::End(bool in_order) {
  const NcclApi& nccl = *options_.nccl;
  const CudaApi& cuda = *options_.cuda;
  NcclComm comm;
  {
    absl::MutexLock lock(&nccl_mu_);
    comm = comm_;
    if (comm != nullptr && in_order) {
      in_order = nccl.Check(nccl.CommFinalize(comm), "finalize").ok();
    }
  }
  if (comm != nullptr && in_order) {
    in_order = Settle("finalize", options_.env->Now() + kFinalizePatience).ok();
  }
  {
    absl::MutexLock lock(&nccl_mu_);
    comm_ = nullptr;
    if (comm != nullptr) {
      // Ends what the GPU does for the communicator, and waits for that.
      const NcclResult result =
          in_order ? nccl.CommDestroy(comm) : nccl.CommAbort(comm);
      if (!in_order && result != kNcclSuccess) {
        LOG(WARNING) << nccl.Check(result, "abort");
      }
    }
  }
  if (stream_ != nullptr) {
    absl::Duration pause = kFirstPause;
    int result;
    while ((result = cuda.StreamQuery(stream_)) == kCudaNotReady) {
      options_.env->SleepUntil(options_.env->Now() + pause);
      pause = std::min(pause * 3 / 2, kLongestPause);
    }
    cuda.GetLastError();
  }
  {
    absl::MutexLock lock(&mu_);
    // The companion's memory that handshakes use goes before their transfers.
    over_ = true;
  }
  // This may wait for other work of the program on the device.
  if (scratch_ != nullptr) cuda.Free(scratch_);
  if (stream_ != nullptr) cuda.StreamDestroy(stream_);
  absl::MutexLock lock(&mu_);
  ended_ = true;
}

bool NcclLane::Close() {
  if (thread_ == nullptr) return true;
  {
    absl::MutexLock lock(&mu_);
    closing_ = true;
    const auto ended = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return ended_; };
    if (!options_.env->Await(
            mu_, absl::Condition(&ended),
            options_.env->Now() + kFinalizePatience + kAbortPatience)) {
      LOG(ERROR) << "NCCL does not return from ending a communicator; its "
                    "memory and a thread are left behind";
      return false;
    }
    for (const CudaEvent event : free_events_) {
      options_.cuda->EventDestroy(event);
    }
    free_events_.clear();
  }
  thread_.reset();
  return true;
}

}  // namespace dsd
