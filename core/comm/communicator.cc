// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/communicator.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/memory/memory.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator_internal.h"
#include "dsd/core/comm/duration_text.h"
#include "dsd/core/comm/envelope.h"
#include "dsd/core/comm/rank_list.h"
#include "dsd/core/comm/rebuild.h"
#include "dsd/core/comm/registry.h"
#include "dsd/core/comm/whereabouts.h"
#include "dsd/core/comm/world_size.h"
#include "xxhash.h"

namespace dsd {
namespace {

constexpr absl::Duration kAskPatience = absl::Seconds(1);
// Data connections often break a moment before the store knows who died, and
// while a rank whose time is over still asks the others.
constexpr absl::Duration kVerdictPatience = absl::Seconds(5);
// Beyond a call's deadline.
constexpr absl::Duration kVerdictGrace = absl::Milliseconds(500);
constexpr absl::Duration kGoodbyePatience = absl::Seconds(1);
constexpr absl::Duration kCancelPeriod = absl::Milliseconds(20);
constexpr absl::Duration kMaxTimeout = absl::Hours(24);

std::string Quoted(absl::string_view text) {
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(text), "\"");
}

std::string ExchangeText(absl::string_view label) {
  return absl::StrCat("exchange ", Quoted(label));
}

size_t CallBytes(const Call& call) {
  return std::min(call.text.size(), kMaxEnvelopeCall);
}

// Of a payload that rides in the envelope. The receiver's call is the sender's,
// by digest, when it looks there.
size_t PayloadOffset(const Call& call) {
  return sizeof(EnvelopeHead) + CallBytes(call);
}

template <class Op>
bool RidesInEnvelope(const Op& op) {
  return op.space.type == DeviceType::kCpu &&
         op.data.size() <= kMaxInlinePayload;
}

template <class Op>
size_t EnvelopeBytes(const Call& call, const Op& op) {
  return PayloadOffset(call) + (RidesInEnvelope(op) ? op.data.size() : 0);
}

}  // namespace

// What an engine sees of the store: its own keys, and waits that end when the
// group fails, since a rank that has died sets no key.
class Communicator::EngineStore final : public ForwardingStore {
 public:
  EngineStore(Core* core, absl::string_view prefix,
              const std::shared_ptr<Store>& store)
      : ForwardingStore(MakePrefixStore(prefix, store)), core_(core) {}

  absl::StatusOr<std::string> Get(absl::string_view key,
                                  absl::Time deadline) override {
    const absl::Time start = core_->env->Now();
    while (true) {
      const absl::Time until =
          std::min(deadline, core_->env->Now() + kCancelPeriod);
      absl::StatusOr<std::string> value = to_->Get(key, until);
      if (!absl::IsDeadlineExceeded(value.status())) return value;
      if (!core_->status().ok()) return absl::AbortedError("cancelled");
      if (until == deadline) {
        return absl::DeadlineExceededError(
            absl::StrCat("key \"", key, "\" was not set within ",
                         DurationText(deadline - start)));
      }
    }
  }

 private:
  Core* const core_;  // owns the engine that has this store
};

Call::Call(std::string t, absl::Span<const int64_t> terms)
    : text(std::move(t)),
      digest(XXH3_64bits_withSeed(terms.data(), terms.size() * sizeof(int64_t),
                                  XXH3_64bits(text.data(), text.size()))) {}

// --- Core ---

Communicator::Core::~Core() {
  std::unique_ptr<EnvThread> thread;
  {
    absl::MutexLock lock(&mu);
    stopping = true;
    thread = std::move(watcher);
  }
  thread.reset();
  // Ends the callbacks into this object.
  membership.reset();
  absl::MutexLock lock(&mu);
  cancellable = nullptr;
}

std::string Communicator::Core::Here() const {
  return absl::StrCat("on rank ", rank, " of group ", Quoted(group));
}

absl::Status Communicator::Core::status() {
  absl::MutexLock lock(&mu);
  return error;
}

absl::Status Communicator::Core::Cancelled(absl::string_view call) const {
  return absl::CancelledError(absl::StrCat(call, " was cancelled ", Here()));
}

absl::Status Communicator::Core::ErrorDuring(absl::string_view call,
                                             absl::string_view found) {
  const absl::Status first = status();
  absl::Status out(
      first.code(),
      absl::StrCat(first.message(), " during ", call, " ", Here(),
                   found.empty() ? "" : ", which had found: ", found));
  first.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    out.SetPayload(url, payload);
  });
  return out;
}

absl::Status Communicator::Core::CheckAlive(absl::string_view call) {
  absl::MutexLock lock(&mu);
  if (!error.ok()) {
    return absl::Status(error.code(),
                        absl::StrCat(error.message(), "; ", call, " ", Here(),
                                     " was not started"));
  }
  if (shut_down) {
    return absl::FailedPreconditionError(
        absl::StrCat(call, " ", Here(), ": after Shutdown"));
  }
  return absl::OkStatus();
}

bool Communicator::Core::Fail(const absl::Status& status, bool tell) {
  {
    absl::MutexLock lock(&mu);
    if (!error.ok()) return false;
    error = status;
    if (cancellable != nullptr) cancellable->Cancel();
  }
  if (tell && membership != nullptr) membership->Fail(status);
  return true;
}

absl::Status Communicator::Core::FailDuring(const absl::Status& status,
                                            absl::string_view call) {
  return Fail(status, /*tell=*/true) ? status : ErrorDuring(call);
}

absl::Status Communicator::Core::Refuse(absl::string_view call,
                                        absl::string_view why,
                                        absl::StatusCode code) {
  DSD_RETURN_IF_ERROR(CheckAlive(call));
  return FailDuring(
      absl::Status(code, absl::StrCat(call, " ", Here(), ": ", why)), call);
}

absl::Status Communicator::Core::EngineFailed(const absl::Status& found,
                                              absl::string_view call,
                                              absl::Time deadline) {
  // Other errors are of this rank's own making.
  const bool may_be_a_death =
      absl::IsUnavailable(found) || absl::IsAborted(found);
  bool known;
  {
    absl::MutexLock lock(&mu);
    const auto failed = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu) {
      return !error.ok();
    };
    const absl::Time now = env->Now();
    known = env->Await(mu, absl::Condition(&failed),
                       may_be_a_death
                           ? std::min(now + kVerdictPatience,
                                      std::max(now, deadline) + kVerdictGrace)
                           : now);
  }
  // Those who went on without this rank may only have said that they left.
  if (known) {
    return ErrorDuring(call, absl::IsUnavailable(found) ? found.message() : "");
  }
  return FailDuring(
      absl::Status(found.code(),
                   absl::StrCat(found.message(), " (", call, " ", Here(), ")")),
      call);
}

std::string Communicator::Core::Answer(absl::string_view question) {
  uint64_t lane;
  if (!absl::SimpleHexAtoi(question, &lane)) return "";
  const absl::Time now = env->Now();
  absl::MutexLock lock(&mu);
  return position.On(lane, now).Encode();
}

void Communicator::Core::WaitFor(uint64_t lane, int peer) {
  const absl::Time now = env->Now();
  absl::MutexLock lock(&mu);
  position.WaitFor(lane, peer, now);
}

absl::Status Communicator::Core::TimeIsOver(const ActiveCall& active,
                                            std::string missing,
                                            std::vector<int> peers) {
  const absl::Time now = env->Now();
  std::vector<std::optional<Whereabouts>> ranks(size);
  {
    absl::MutexLock lock(&mu);
    ranks[rank] = position.On(active.lane, now);
  }
  if (!status().ok()) return ErrorDuring(active.call.text);
  if (membership != nullptr) {
    const std::vector<std::optional<std::string>> answers = membership->Ask(
        absl::StrCat(absl::Hex(active.lane)), now + kAskPatience);
    for (int r = 0; r < size; ++r) {
      if (r != rank && answers[r].has_value()) {
        ranks[r] = Whereabouts::Decode(*answers[r], size);
      }
    }
  }
  return FailDuring(
      ExplainLateCall(
          {active.call.text, active.collective, active.timeout, rank, Here(),
           active.members, std::move(missing), std::move(peers)},
          ranks),
      active.call.text);
}

absl::Status Communicator::Core::WatchCancel(const std::atomic<bool>* cancel,
                                             absl::string_view call) {
  absl::MutexLock lock(&mu);
  if (watcher == nullptr && !stopping) {
    watcher = env->StartThread("dsd_cancel", [this] { CancelLoop(); });
    if (watcher == nullptr) {
      return Annotate(NoThread("dsd_cancel"), absl::StrCat(call, " ", Here()));
    }
  }
  watched.push_back({cancel, std::string(call)});
  return absl::OkStatus();
}

void Communicator::Core::UnwatchCancel(const std::atomic<bool>* cancel) {
  absl::MutexLock lock(&mu);
  for (auto it = watched.begin(); it != watched.end(); ++it) {
    if (it->cancel == cancel) {
      watched.erase(it);
      return;
    }
  }
}

void Communicator::Core::CancelLoop() {
  while (true) {
    std::string cancelled;
    {
      absl::MutexLock lock(&mu);
      const auto needed = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu) {
        return stopping || !watched.empty();
      };
      env->Await(mu, absl::Condition(&needed), env->Now() + kMaxTimeout);
      const auto stop = [this]()
                            ABSL_SHARED_LOCKS_REQUIRED(mu) { return stopping; };
      if (env->Await(mu, absl::Condition(&stop), env->Now() + kCancelPeriod)) {
        return;
      }
      for (const Watched& one : watched) {
        if (one.cancel->load()) cancelled = one.call;
      }
    }
    if (!cancelled.empty()) {
      Fail(Cancelled(cancelled), /*tell=*/true);
    }
  }
}

// --- ActiveCall ---

Communicator::ActiveCall::ActiveCall(const Lane& l, Call what,
                                     const CallOptions& options,
                                     bool collective)
    : core(l.core),
      lane(l.id),
      members(l.members),
      call(std::move(what)),
      collective(collective),
      timeout(std::clamp(options.timeout, absl::ZeroDuration(), kMaxTimeout)),
      deadline(core->env->Now() + timeout),
      cancel(options.cancel) {
  absl::MutexLock lock(&core->mu);
  core->position.Begin(lane, call.text, collective, deadline - timeout,
                       timeout);
}

Communicator::ActiveCall::~ActiveCall() {
  absl::MutexLock lock(&core->mu);
  core->position.End(lane);
}

// --- PendingExchange ---

struct PendingExchange::Impl {
  using ActiveCall = Communicator::ActiveCall;

  struct Incoming {
    RecvOp op;
    const Call* call;
    uint64_t sequence;
    const std::byte* envelope;
    // Where its messages stand in the list given to the engine.
    size_t envelope_index;
    size_t payload_index;  // kNone: rides in the envelope
  };
  static constexpr size_t kNone = ~size_t{0};

  // That of the message alone, or that of the exchange.
  const Call* MakeCall(absl::string_view label) {
    return label.empty() ? &active->call
                         : &labelled.emplace_back(ExchangeText(label));
  }

  ~Impl() {
    if (!finished) {
      core->Fail(absl::AbortedError(absl::StrCat(
                     active->call.text, " ", core->Here(),
                     " was given up: its PendingExchange was destroyed before "
                     "Wait")),
                 /*tell=*/true);
    }
  }

  absl::Status Wait();
  absl::Status WaitForAll();
  absl::Status Check(const Incoming& incoming);
  absl::Status Explain(const absl::Status& status, int peer);

  std::shared_ptr<Communicator::Core> core;
  Communicator::Lane* lane = nullptr;
  std::unique_ptr<ActiveCall> own;  // if it is a call by itself
  const ActiveCall* active = nullptr;
  bool finished = false;
  std::deque<Call> labelled;  // of MakeCall
  std::unique_ptr<std::byte[]> envelopes;
  std::vector<Incoming> incoming;
  std::vector<int> receivers;  // of what this rank sends
  std::vector<std::shared_ptr<bool>> self_done;
  // Destroyed first: until then the engine may touch all of the above.
  std::unique_ptr<EngineBatch> batch;
};

absl::Status PendingExchange::Impl::Explain(const absl::Status& status,
                                            int peer) {
  if (absl::IsDeadlineExceeded(status)) {
    return core->TimeIsOver(
        *active, absl::StrCat("no message came from rank ", peer), {peer});
  }
  return core->EngineFailed(status, active->call.text, active->deadline);
}

absl::Status PendingExchange::Impl::Check(const Incoming& in) {
  EnvelopeHead e;
  std::memcpy(&e, in.envelope, sizeof(e));
  if (e.magic != EnvelopeHead::kMagic || e.version != EnvelopeHead::kVersion) {
    return absl::FailedPreconditionError(absl::StrCat(
        "rank ", in.op.peer, " sends messages of format ", absl::Hex(e.magic),
        " ", e.version, ", expected ", absl::Hex(EnvelopeHead::kMagic), " ",
        EnvelopeHead::kVersion, "; use the same dsd on all ranks"));
  }
  if (e.generation != core->generation || e.lane != lane->id ||
      e.sequence != in.sequence || e.call_size > kMaxEnvelopeCall) {
    return absl::InternalError(absl::StrCat(
        "message ", in.sequence, " from rank ", in.op.peer, " on lane ",
        Quoted(lane->name), " says that it is message ", e.sequence,
        " of lane ", absl::Hex(e.lane), ", generation ", e.generation));
  }
  if (e.call_digest != in.call->digest || e.payload_size != in.op.data.size() ||
      e.memory != in.op.space.type) {
    const absl::string_view call(
        reinterpret_cast<const char*>(in.envelope + sizeof(e)), e.call_size);
    return lane->Mismatch(in.op.peer, {call, e.payload_size, e.memory},
                          {in.call->text, in.op.data.size(), in.op.space.type},
                          in.sequence);
  }
  return absl::OkStatus();
}

absl::Status PendingExchange::Impl::WaitForAll() {
  const absl::Cleanup waits_no_more = [&] { core->WaitFor(active->lane, -1); };
  for (const Incoming& in : incoming) {
    core->WaitFor(active->lane, in.op.peer);
    if (const absl::Status status =
            batch->WaitReceived(in.envelope_index, active->deadline);
        !status.ok()) {
      return Explain(status, in.op.peer);
    }
    if (const absl::Status status = Check(in); !status.ok()) {
      core->Fail(status, /*tell=*/true);
      return core->ErrorDuring(active->call.text);
    }
    if (in.payload_index == kNone) {
      if (!in.op.data.empty()) {
        std::memcpy(in.op.data.data(), in.envelope + PayloadOffset(*in.call),
                    in.op.data.size());
      }
    } else if (const absl::Status status =
                   batch->WaitReceived(in.payload_index, active->deadline);
               !status.ok()) {
      return Explain(status, in.op.peer);
    }
  }
  if (batch != nullptr) {
    std::sort(receivers.begin(), receivers.end());
    receivers.erase(std::unique(receivers.begin(), receivers.end()),
                    receivers.end());
    // Of several it is not known whose turn it is.
    core->WaitFor(active->lane, receivers.size() == 1 ? receivers[0] : -1);
    const absl::Status status = batch->Wait(active->deadline);
    if (absl::IsDeadlineExceeded(status)) {
      return core->TimeIsOver(*active,
                              absl::StrCat("not all messages to ",
                                           RankList(receivers), " were taken"),
                              receivers);
    }
    if (!status.ok()) return Explain(status, -1);
  }
  // Only this thread could bring the counterpart.
  for (const std::shared_ptr<bool>& done : self_done) {
    if (*done) continue;
    core->Fail(absl::FailedPreconditionError(absl::StrCat(
                   active->call.text, " ", core->Here(),
                   ": a message to the rank itself has no counterpart")),
               /*tell=*/true);
    return core->ErrorDuring(active->call.text);
  }
  return absl::OkStatus();
}

absl::Status PendingExchange::Impl::Wait() {
  absl::Status status;
  if (active->cancel == nullptr) {
    status = WaitForAll();
  } else {
    status = core->WatchCancel(active->cancel, active->call.text);
    if (status.ok()) {
      status = WaitForAll();
      core->UnwatchCancel(active->cancel);
    } else {
      status = core->FailDuring(status, active->call.text);
    }
  }
  finished = true;
  batch.reset();
  own.reset();
  return status;
}

PendingExchange::PendingExchange(std::unique_ptr<Impl> impl)
    : impl_(std::move(impl)) {}
PendingExchange::PendingExchange(PendingExchange&&) noexcept = default;
PendingExchange& PendingExchange::operator=(PendingExchange&&) noexcept =
    default;
PendingExchange::~PendingExchange() = default;

absl::Status PendingExchange::Wait() {
  if (impl_ == nullptr || impl_->finished) {
    return absl::FailedPreconditionError("Wait: the exchange is finished");
  }
  return impl_->Wait();
}

// --- Lane ---

Communicator::Lane::Lane(std::shared_ptr<Core> c, std::string n, bool main)
    : core(std::move(c)),
      name(std::move(n)),
      id(XXH3_64bits(name.data(), name.size())),
      is_main(main),
      rank(core->rank),
      size(core->size),
      host_of_rank(core->size, 0),
      next_send(core->size, 0),
      next_recv(core->size, 0) {}

// Seeded, so that no lane of OpenLane has its number.
Communicator::Lane::Lane(std::shared_ptr<Core> c, std::string n, int own_rank,
                         std::vector<int> ranks)
    : core(std::move(c)),
      name(std::move(n)),
      id(XXH3_64bits_withSeed(name.data(), name.size(), 1)),
      rank(own_rank),
      size(static_cast<int>(ranks.size())),
      members(std::move(ranks)),
      next_send(core->size, 0),
      next_recv(core->size, 0) {}

absl::Status Communicator::Lane::Mismatch(int from, const Described& sent,
                                          const Described& expected,
                                          uint64_t sequence) const {
  const auto text = [&](const Described& message) {
    return absl::StrCat(
        message.size, " bytes ",
        sent.memory == expected.memory
            ? ""
            : (message.memory == DeviceType::kCpu ? "of host memory "
                                                  : "of device memory "),
        "in ", message.call);
  };
  return absl::FailedPreconditionError(absl::StrCat(
      "ranks disagree: rank ", from, " sends ", text(sent), ", but rank ",
      core->rank, " expects ", text(expected), " (message ", sequence,
      " between them on lane ", Quoted(name), " of group ", Quoted(core->group),
      "); all ranks must make the same calls in the same order"));
}

absl::Status Communicator::Lane::MatchSelf() {
  while (!self_sends.empty() && !self_recvs.empty()) {
    const SelfMessage send = std::move(self_sends.front());
    const SelfMessage recv = std::move(self_recvs.front());
    self_sends.pop_front();
    self_recvs.pop_front();
    if (send.size != recv.size || send.call.digest != recv.call.digest) {
      core->Fail(Mismatch(core->rank, {send.call.text, send.size},
                          {recv.call.text, recv.size}, 0),
                 /*tell=*/true);
      return core->ErrorDuring(recv.call.text);
    }
    if (send.size > 0) std::memmove(recv.to, send.from, send.size);
    *send.done = *recv.done = true;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Communicator::ActiveCall>>
Communicator::Lane::Begin(Call call, const CallOptions& options,
                          bool collective) {
  DSD_RETURN_IF_ERROR(core->CheckAlive(call.text));
  auto active =
      std::make_unique<ActiveCall>(*this, std::move(call), options, collective);
  if (active->timeout <= absl::ZeroDuration()) {
    return core->TimeIsOver(*active);
  }
  if (active->cancel != nullptr && active->cancel->load()) {
    return core->FailDuring(core->Cancelled(active->call.text),
                            active->call.text);
  }
  return active;
}

absl::StatusOr<PendingExchange> Communicator::Lane::Post(
    absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
    const ActiveCall& active) {
  if (members.empty()) return Start(sends, recvs, active);
  std::vector<SendOp> group_sends(sends.begin(), sends.end());
  std::vector<RecvOp> group_recvs(recvs.begin(), recvs.end());
  for (SendOp& op : group_sends) op.peer = GroupRank(op.peer);
  for (RecvOp& op : group_recvs) op.peer = GroupRank(op.peer);
  return Start(group_sends, group_recvs, active);
}

absl::StatusOr<PendingExchange> Communicator::Lane::Start(
    absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
    const ActiveCall& active) {
  if (!core->status().ok()) return core->ErrorDuring(active.call.text);

  auto impl = std::make_unique<PendingExchange::Impl>();
  impl->core = core;
  impl->lane = this;
  impl->active = &active;
  impl->finished = true;  // until something is posted
  // A receive must have room for what another call of its peer might send.
  size_t room = recvs.size() * kMaxEnvelopeBytes;
  std::vector<const Call*> calls;  // of the sends
  calls.reserve(sends.size());
  for (const SendOp& op : sends) {
    calls.push_back(impl->MakeCall(op.label));
    room += EnvelopeBytes(*calls.back(), op);
  }
  impl->envelopes.reset(new std::byte[room]);
  std::byte* envelope = impl->envelopes.get();
  const auto take = [&](size_t bytes) {
    return absl::MakeSpan(std::exchange(envelope, envelope + bytes), bytes);
  };

  std::vector<EngineRecv> engine_recvs;
  engine_recvs.reserve(2 * recvs.size());
  for (const RecvOp& op : recvs) {
    const Call* const call = impl->MakeCall(op.label);
    if (op.peer == core->rank) {
      self_recvs.push_back({*call, nullptr, op.data.data(), op.data.size()});
      impl->self_done.push_back(self_recvs.back().done);
      continue;
    }
    const uint64_t sequence = next_recv[op.peer]++;
    PendingExchange::Impl::Incoming in{op,
                                       call,
                                       sequence,
                                       envelope,
                                       engine_recvs.size(),
                                       PendingExchange::Impl::kNone};
    engine_recvs.push_back({op.peer,
                            MessageTag(id, sequence, MessagePart::kEnvelope, 0),
                            take(kMaxEnvelopeBytes)});
    if (!RidesInEnvelope(op)) {
      in.payload_index = engine_recvs.size();
      engine_recvs.push_back(
          {op.peer,
           MessageTag(id, sequence, MessagePart::kPayload, op.data.size()),
           op.data, op.space, id});
    }
    impl->incoming.push_back(in);
  }

  std::vector<EngineSend> engine_sends;
  engine_sends.reserve(2 * sends.size());
  impl->receivers.reserve(sends.size());
  for (size_t i = 0; i < sends.size(); ++i) {
    const SendOp& op = sends[i];
    const Call& call = *calls[i];
    if (op.peer == core->rank) {
      self_sends.push_back({call, op.data.data(), nullptr, op.data.size()});
      impl->self_done.push_back(self_sends.back().done);
      continue;
    }
    impl->receivers.push_back(op.peer);
    const uint64_t sequence = next_send[op.peer]++;
    EnvelopeHead e;
    e.call_size = static_cast<uint8_t>(CallBytes(call));
    e.memory = op.space.type;
    e.generation = core->generation;
    e.lane = id;
    e.sequence = sequence;
    e.payload_size = op.data.size();
    e.call_digest = call.digest;
    const absl::Span<std::byte> bytes = take(EnvelopeBytes(call, op));
    std::memcpy(bytes.data(), &e, sizeof(e));
    std::memcpy(bytes.data() + sizeof(e), call.text.data(), e.call_size);
    engine_sends.push_back(
        {op.peer, MessageTag(id, sequence, MessagePart::kEnvelope, 0), bytes});
    if (!RidesInEnvelope(op)) {
      engine_sends.push_back(
          {op.peer,
           MessageTag(id, sequence, MessagePart::kPayload, op.data.size()),
           op.data, op.space, id});
    } else if (!op.data.empty()) {
      std::memcpy(bytes.data() + PayloadOffset(call), op.data.data(),
                  op.data.size());
    }
  }

  DSD_RETURN_IF_ERROR(MatchSelf());
  if (!engine_recvs.empty() || !engine_sends.empty()) {
    absl::StatusOr<std::unique_ptr<EngineBatch>> batch =
        core->engine->Start(engine_sends, engine_recvs);
    if (!batch.ok()) {
      return core->EngineFailed(batch.status(), active.call.text,
                                active.deadline);
    }
    impl->batch = *std::move(batch);
  }
  impl->finished = false;
  return PendingExchange(std::move(impl));
}

absl::Status Communicator::Lane::Run(absl::Span<const SendOp> sends,
                                     absl::Span<const RecvOp> recvs,
                                     const ActiveCall& active) {
  DSD_ASSIGN_OR_RETURN(PendingExchange pending, Post(sends, recvs, active));
  return pending.Wait();
}

// --- Communicator ---

absl::StatusOr<std::unique_ptr<Communicator>> Communicator::Create(
    const CommunicatorOptions& options) {
  if (options.world_size < 1 || options.rank < 0 ||
      options.rank >= options.world_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("communicator: rank ", options.rank, " is not in [0, ",
                     options.world_size, ")"));
  }
  if (options.world_size > kMaxWorldSize) {
    return absl::InvalidArgumentError(
        absl::StrCat("communicator: ", options.world_size,
                     " ranks, expected at most ", kMaxWorldSize));
  }
  if (options.env == nullptr) {
    return absl::InvalidArgumentError("communicator: env is null");
  }
  const BackendDescriptor* descriptor = options.descriptor;
  if (descriptor == nullptr &&
      (options.world_size > 1 || !options.backend.empty())) {
    DSD_ASSIGN_OR_RETURN(descriptor, FindBackend(options.backend));
  }

  auto core = std::make_shared<Core>();
  core->rank = options.rank;
  core->size = options.world_size;
  core->backend = descriptor == nullptr ? "" : std::string(descriptor->name);
  core->has_cuda_memory = descriptor != nullptr && descriptor->cuda_memory;
  core->group = options.group;
  core->generation = options.generation;
  core->env = options.env;
  core->store = options.store;
  auto communicator = absl::WrapUnique(
      new Communicator(std::make_unique<Lane>(core, "main", /*is_main=*/true)));
  {
    absl::MutexLock lock(&core->mu);
    core->lane_names.insert("main");
  }
  if (options.world_size == 1) return communicator;

  if (options.store == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "communicator: ", options.world_size,
        " ranks need a store to find each other, but store is null"));
  }
  CallOptions call_options;
  call_options.timeout = options.connect_timeout;
  const ActiveCall active(*communicator->lane_, Call("connect"), call_options,
                          /*collective=*/true);
  MemberOptions member;
  member.group = absl::StrCat(options.group, "#", options.generation);
  member.rank = options.rank;
  member.size = options.world_size;
  member.facts =
      absl::StrCat("backend \"", descriptor->name, "\", messages of format ",
                   EnvelopeHead::kVersion);
  Core* const raw = core.get();
  member.on_failure = [raw](const absl::Status& status) {
    raw->Fail(status, /*tell=*/false);
  };
  member.on_question = [raw](absl::string_view question) {
    return raw->Answer(question);
  };
  absl::StatusOr<std::unique_ptr<Membership>> joined =
      options.store->Join(member, active.deadline);
  if (!joined.ok()) {
    return Annotate(joined.status(), absl::StrCat("connect ", core->Here()));
  }
  core->membership = *std::move(joined);

  EngineOptions engine;
  engine.rank = options.rank;
  engine.world_size = options.world_size;
  engine.env = options.env;
  engine.store =
      std::make_shared<EngineStore>(raw, member.group, options.store);
  engine.bind_address = options.bind_address;
  engine.context = options.backend_context;
  absl::StatusOr<std::unique_ptr<Engine>> made = descriptor->create(engine);
  if (!made.ok()) {
    core->Fail(Annotate(made.status(), absl::StrCat("connect ", core->Here())),
               /*tell=*/true);
    return communicator->status();
  }
  core->engine = *std::move(made);
  {
    absl::MutexLock lock(&core->mu);
    core->cancellable = core->engine.get();
    if (!core->error.ok()) core->engine->Cancel();
  }
  if (const absl::Status status = core->engine->Connect(active.deadline);
      !status.ok()) {
    return absl::IsDeadlineExceeded(status)
               ? core->TimeIsOver(active, std::string(status.message()))
               : core->EngineFailed(status, "connect", active.deadline);
  }
  // Everybody is connected to everybody when it returns, or nobody uses it.
  const std::string host =
      options.host.empty() ? options.env->HostId() : options.host;
  DSD_ASSIGN_OR_RETURN(const std::vector<uint64_t> hosts,
                       communicator->lane_->BarrierWithWord(
                           XXH3_64bits(host.data(), host.size()), active));
  communicator->lane_->SetHosts(absl::MakeConstSpan(hosts));
  return communicator;
}

Communicator::Communicator(std::unique_ptr<Lane> lane)
    : lane_(std::move(lane)) {}

Communicator::~Communicator() {
  if (!lane_->is_main) return;
  Core& core = *lane_->core;
  // Nobody watches over lanes that are left: the ranks' deaths are not reported
  // any more. None of them can come to be now.
  const absl::Cleanup end_lanes = [&] {
    if (lane_->core.use_count() == 1) return;
    core.Fail(absl::FailedPreconditionError(
                  absl::StrCat("the communicator of group ", Quoted(core.group),
                               " was destroyed on rank ", core.rank,
                               ", and its lanes end with it")),
              /*tell=*/false);
  };
  {
    absl::MutexLock lock(&core.mu);
    if (core.shut_down || !core.error.ok()) return;
  }
  // Ranks that give up together, over an error that all of them know, have no
  // Shutdown; none may take the end of another for the cause, or miss a message
  // that is under way.
  if (core.membership == nullptr ||
      core.membership->Leave(core.env->Now() + kGoodbyePatience).ok()) {
    return;
  }
  core.Fail(absl::UnavailableError(
                absl::StrCat("rank ", core.rank, " left group ",
                             Quoted(core.group), " without Shutdown")),
            /*tell=*/true);
}

int Communicator::rank() const { return lane_->rank; }
int Communicator::size() const { return lane_->size; }
absl::string_view Communicator::backend() const { return lane_->core->backend; }
bool Communicator::has_cuda_memory() const {
  return lane_->core->has_cuda_memory && lane_->members.empty();
}
uint64_t Communicator::generation() const { return lane_->core->generation; }
Env* Communicator::env() const { return lane_->core->env; }
absl::Span<const int> Communicator::host_of_rank() const {
  return lane_->host_of_rank;
}

absl::Status Communicator::status() const { return lane_->core->status(); }

absl::StatusOr<PendingExchange> Communicator::StartExchange(
    absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
    absl::string_view label, const CallOptions& options) {
  Core& core = *lane_->core;
  const auto check = [&](int peer, const MemorySpace& space) {
    const auto error = [&](const auto&... why) {
      return core.Refuse(ExchangeText(label), absl::StrCat(why...));
    };
    if (peer < 0 || peer >= size()) {
      return error("peer ", peer, " is not in [0, ", size(), ")");
    }
    if (space.type == DeviceType::kCpu) return absl::OkStatus();
    if (peer == rank()) {
      return error("a message to the rank itself must be in host memory");
    }
    if (!has_cuda_memory()) {
      return error("backend ", Quoted(core.backend),
                   " moves host memory only; copy there first");
    }
    return absl::OkStatus();
  };
  for (const SendOp& op : sends) DSD_RETURN_IF_ERROR(check(op.peer, op.space));
  for (const RecvOp& op : recvs) DSD_RETURN_IF_ERROR(check(op.peer, op.space));
  DSD_ASSIGN_OR_RETURN(
      std::unique_ptr<ActiveCall> active,
      lane_->Begin(Call(ExchangeText(label)), options, /*collective=*/false));
  DSD_ASSIGN_OR_RETURN(PendingExchange pending,
                       lane_->Post(sends, recvs, *active));
  pending.impl_->own = std::move(active);
  return pending;
}

absl::Status Communicator::Exchange(absl::Span<const SendOp> sends,
                                    absl::Span<const RecvOp> recvs,
                                    absl::string_view label,
                                    const CallOptions& options) {
  DSD_ASSIGN_OR_RETURN(PendingExchange pending,
                       StartExchange(sends, recvs, label, options));
  return pending.Wait();
}

void Communicator::Abort(const absl::Status& reason) {
  Core& core = *lane_->core;
  // A call that is cancelled ends with Cancelled on all ranks.
  core.Fail(
      absl::Status(
          absl::IsCancelled(reason) ? absl::StatusCode::kCancelled
                                    : absl::StatusCode::kAborted,
          absl::StrCat(
              "rank ", core.rank, " aborted group ", Quoted(core.group), ": ",
              reason.ToString(absl::StatusToStringMode::kWithNoExtraData))),
      /*tell=*/true);
}

}  // namespace dsd
