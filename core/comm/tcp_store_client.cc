// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/node_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/base/version.h"
#include "dsd/core/comm/duration_text.h"
#include "dsd/core/comm/job_token.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store_protocol.h"
#include "dsd/core/comm/tcp_relay.h"
#include "dsd/core/comm/tcp_store.h"

namespace dsd {
namespace {

constexpr absl::Duration kFlushPatience = absl::Seconds(1);
constexpr absl::Duration kIdle = absl::Hours(1);
// For the server's own answer that a deadline has passed, which says more.
constexpr absl::Duration kGrace = absl::Seconds(1);
// Whoever asks where the others are is late already.
constexpr absl::Duration kAskGrace = absl::Milliseconds(100);
constexpr absl::Duration kRetry = absl::Milliseconds(50);
constexpr absl::Duration kLastRetry = absl::Seconds(1);  // for relays
constexpr size_t kReadBytes = size_t{256} << 10;

struct Answer {
  absl::Status status;
  std::string value;
};

class TcpStore final : public Store,
                       public std::enable_shared_from_this<TcpStore> {
 public:
  // `host`: of rank 0. `server_rank`: to whom `socket` leads.
  TcpStore(Env* env, TcpStoreOptions options, std::string host, int server_rank,
           Socket socket, Waker waker, absl::Duration heartbeat_bound)
      : env_(env),
        options_(std::move(options)),
        host_(std::move(host)),
        server_rank_(server_rank),
        waker_(std::move(waker)),
        socket_(std::move(socket)),
        beats_(heartbeat_bound) {
    thread_ = env_->StartThread("dsd_store_io", [this] { Run(); });
  }

  ~TcpStore() override {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
    }
    waker_.Wake();
    thread_.reset();
  }

  bool has_thread() const { return thread_ != nullptr; }

  absl::Status Set(absl::string_view key, absl::string_view value,
                   absl::Time deadline) override {
    DSD_RETURN_IF_ERROR(CheckKey(key));
    if (value.size() > kMaxValueBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "store: the value of key \"", key, "\" has ", value.size(),
          " bytes, expected at most ", kMaxValueBytes));
    }
    return Ask(key, deadline,
               [&](uint64_t id) {
                 return FrameWriter(FrameKind::kSet, id).Put(key).Put(value);
               })
        .status;
  }

  absl::StatusOr<std::string> Get(absl::string_view key,
                                  absl::Time deadline) override {
    DSD_RETURN_IF_ERROR(CheckKey(key));
    Answer answer = Ask(key, deadline, [&](uint64_t id) {
      return FrameWriter(FrameKind::kGet, id).Put(key);
    });
    DSD_RETURN_IF_ERROR(answer.status);
    return std::move(answer.value);
  }

  absl::StatusOr<int64_t> Add(absl::string_view key, int64_t delta,
                              absl::Time deadline) override {
    DSD_RETURN_IF_ERROR(CheckKey(key));
    const Answer answer = Ask(key, deadline, [&](uint64_t id) {
      return FrameWriter(FrameKind::kAdd, id).Put(key).Put(delta);
    });
    DSD_RETURN_IF_ERROR(answer.status);
    int64_t sum;
    if (!absl::SimpleAtoi(answer.value, &sum)) {
      return absl::InternalError("store: the answer to Add is no number");
    }
    return sum;
  }

  absl::StatusOr<std::unique_ptr<Membership>> Join(
      const MemberOptions& options, absl::Time deadline) override;

  std::string server_host() const override { return host_; }

 private:
  class Handle;

  struct Member {
    MemberOptions options;
    // Held while a callback runs; `deaf` when none may run any more.
    absl::Mutex callback_mu;
    bool deaf ABSL_GUARDED_BY(callback_mu) = false;
    bool told ABSL_GUARDED_BY(callback_mu) = false;

    void Tell(const absl::Status& status) {
      absl::MutexLock lock(&callback_mu);
      if (deaf || told) return;
      told = true;
      options.on_failure(status);
    }
  };
  struct Request {
    std::optional<Answer> answer;
  };

  static absl::Status CheckKey(absl::string_view key) {
    if (key.size() <= kMaxKeyBytes) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("store: a key has ", key.size(),
                     " bytes, expected at most ", kMaxKeyBytes));
  }

  std::string Where() const {
    return absl::StrCat(
        "the store of rank 0 at ", HostPort(host_, options_.port),
        server_rank_ == 0 ? "" : absl::StrCat(", through rank ", server_rank_));
  }

  // Sends the frame that `make` writes for a new id, and waits for the reply.
  template <class Make>
  Answer Ask(absl::string_view what, absl::Time deadline, Make make,
             uint64_t* id_out = nullptr) {
    const absl::Time start = env_->Now();
    absl::MutexLock lock(&mu_);
    const uint64_t id = next_id_++;
    if (id_out != nullptr) *id_out = id;
    if (!lost_.ok()) return {lost_, ""};
    out_ += make(id).Finish();
    Request& request = requests_[id];
    waker_.Wake();
    const auto answered = [&] { return request.answer.has_value(); };
    if (!env_->Await(mu_, absl::Condition(&answered), deadline)) {
      requests_.erase(id);
      out_ += FrameWriter(FrameKind::kForget, id).Finish();
      waker_.Wake();
      return {absl::DeadlineExceededError(
                  absl::StrCat(Where(), " gave no answer about \"", what,
                               "\" within ", DurationText(deadline - start))),
              ""};
    }
    Answer answer = std::move(*request.answer);
    requests_.erase(id);
    return answer;
  }

  void Post(FrameWriter& writer) {
    absl::MutexLock lock(&mu_);
    if (!lost_.ok()) return;
    out_ += writer.Finish();
    waker_.Wake();
  }

  void Run();
  // Returns false for a frame that is not understood.
  bool Receive(absl::string_view body);
  // The server is gone. `verdict`: in the words of all members of all groups.
  void Lose(const absl::Status& verdict);
  void LoseConnection(absl::string_view why);
  // `out`: what is left of what was being sent.
  void GiveUp(absl::Duration silence, std::string out);
  std::shared_ptr<Member> FindMember(uint64_t id) {
    absl::MutexLock lock(&mu_);
    const auto it = members_.find(id);
    return it == members_.end() ? nullptr : it->second;
  }

  Env* const env_;
  const TcpStoreOptions options_;
  const std::string host_;
  const int server_rank_;
  Waker waker_;
  // Of the thread.
  Socket socket_;
  BeatWatch beats_;
  absl::Status said_lost_;  // what a relay says of rank 0

  absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status lost_ ABSL_GUARDED_BY(mu_);
  std::string out_ ABSL_GUARDED_BY(mu_);
  uint64_t next_id_ ABSL_GUARDED_BY(mu_) = 1;
  // Node-based, so that a waiting thread may keep a reference.
  absl::node_hash_map<uint64_t, Request> requests_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint64_t, std::shared_ptr<Member>> members_
      ABSL_GUARDED_BY(mu_);  // by the id of their join

  std::unique_ptr<EnvThread> thread_;
};

void TcpStore::Run() {
  std::string in;
  std::string out;
  std::optional<absl::Time> end;
  absl::Time heard = env_->Now();
  absl::Time next_beat = heard;
  beats_.Ran(heard);
  while (true) {
    if (beats_.on() && env_->Now() >= next_beat) {
      out += FrameWriter(FrameKind::kBeat, 0).Finish();
      next_beat = env_->Now() + beats_.period();
    }
    {
      absl::MutexLock lock(&mu_);
      out += std::exchange(out_, "");
      if (stopping_ && !end.has_value()) end = env_->Now() + kFlushPatience;
    }
    if (const absl::Status status = socket_.WriteSome(out); !status.ok()) {
      // What the server said last may still be there to read.
      out.clear();
    }
    if (end.has_value() && (out.empty() || env_->Now() >= *end)) return;

    pollfd polls[] = {
        {waker_.fd(), POLLIN, 0},
        {socket_.fd(), static_cast<short>(POLLIN | (out.empty() ? 0 : POLLOUT)),
         0}};
    const absl::StatusOr<int> ready =
        env_->Poll(absl::MakeSpan(polls), end.has_value() ? *end
                                          : beats_.on()   ? next_beat
                                                        : env_->Now() + kIdle);
    if (!ready.ok()) continue;
    waker_.Clear();
    const size_t before = in.size();
    const absl::StatusOr<bool> open = socket_.ReadSome(in, kReadBytes);
    const absl::Time now = env_->Now();
    if (in.size() > before) heard = now;
    absl::string_view left = in;
    absl::string_view body;
    while (true) {
      const std::optional<bool> whole = TakeFrame(left, kMaxFrameBytes, body);
      if (whole.has_value() && !*whole) break;
      if (!whole.has_value() || !Receive(body)) {
        return LoseConnection("it sent what is not understood");
      }
    }
    in.erase(0, in.size() - left.size());
    if (!said_lost_.ok()) return Lose(said_lost_);
    if (!open.ok()) return LoseConnection(open.status().message());
    if (!*open) return LoseConnection("");
    if (beats_.on() && !beats_.Ran(now)) heard = now;
    if (now - heard >= beats_.bound()) {
      return GiveUp(now - heard, std::move(out));
    }
  }
}

bool TcpStore::Receive(absl::string_view body) {
  FrameReader reader(body);
  const auto kind = static_cast<FrameKind>(reader.Get<uint8_t>());
  const uint64_t id = reader.Get<uint64_t>();
  switch (kind) {
    case FrameKind::kReply: {
      const absl::Status status = reader.GetStatus();
      const absl::string_view value = reader.GetText();
      if (!reader.ok()) return false;
      absl::MutexLock lock(&mu_);
      const auto it = requests_.find(id);
      if (it != requests_.end()) {
        it->second.answer = Answer{status, std::string(value)};
      }
      return true;
    }
    case FrameKind::kFailed: {
      const uint64_t member = reader.Get<uint64_t>();
      const absl::Status status = reader.GetStatus();
      if (!reader.ok() || status.ok()) return false;
      const std::shared_ptr<Member> found = FindMember(member);
      if (found != nullptr) found->Tell(status);
      return true;
    }
    case FrameKind::kQuestion: {
      const uint64_t member = reader.Get<uint64_t>();
      const absl::string_view question = reader.GetText();
      if (!reader.ok()) return false;
      std::string answer;
      if (const std::shared_ptr<Member> found = FindMember(member);
          found != nullptr) {
        absl::MutexLock lock(&found->callback_mu);
        if (!found->deaf && found->options.on_question) {
          answer = found->options.on_question(question);
        }
      }
      Post(FrameWriter(FrameKind::kAnswer, id)
               .Put(absl::string_view(answer).substr(0, kMaxValueBytes)));
      return true;
    }
    case FrameKind::kLost: {
      said_lost_ = reader.GetStatus();
      return reader.ok() && !said_lost_.ok();
    }
    default:
      return false;
  }
}

void TcpStore::LoseConnection(absl::string_view why) {
  Lose(absl::UnavailableError(absl::StrCat(
      "rank ", server_rank_, " died (its connection to rank ", options_.rank,
      " closed", why.empty() ? "" : ": ", why, ")")));
}

void TcpStore::GiveUp(absl::Duration silence, std::string out) {
  const absl::Status verdict = absl::UnavailableError(
      absl::StrCat("rank ", server_rank_, " ", BeatWatch::HowLong(silence)));
  // For it to find, should it go on: else it would blame those who left.
  out += FrameWriter(FrameKind::kFailAll, 0).Put(verdict).Finish();
  socket_.WriteSome(out).IgnoreError();
  Lose(verdict);
}

void TcpStore::Lose(const absl::Status& lost) {
  std::vector<std::shared_ptr<Member>> members;
  {
    absl::MutexLock lock(&mu_);
    lost_ = lost;
    for (auto& [id, request] : requests_) {
      if (!request.answer.has_value()) request.answer = Answer{lost, ""};
    }
    for (const auto& [id, member] : members_) members.push_back(member);
  }
  for (const std::shared_ptr<Member>& member : members) member->Tell(lost);
  socket_.Close();
}

class TcpStore::Handle final : public Membership {
 public:
  Handle(std::shared_ptr<TcpStore> store, uint64_t id,
         std::shared_ptr<Member> member)
      : store_(std::move(store)), id_(id), member_(std::move(member)) {}

  ~Handle() override {
    {
      absl::MutexLock lock(&member_->callback_mu);
      member_->deaf = true;
    }
    {
      absl::MutexLock lock(&store_->mu_);
      store_->members_.erase(id_);
    }
    store_->Post(FrameWriter(FrameKind::kGone, 0).Put(id_));
  }

  void Fail(const absl::Status& status) override {
    store_->Post(FrameWriter(FrameKind::kFail, 0).Put(id_).Put(status));
  }

  absl::Status Leave(absl::Time deadline) override {
    return store_
        ->Ask("goodbye", deadline,
              [&](uint64_t id) {
                return FrameWriter(FrameKind::kLeave, id).Put(id_);
              })
        .status;
  }

  std::vector<std::optional<std::string>> Ask(absl::string_view question,
                                              absl::Time deadline) override {
    std::vector<std::optional<std::string>> answers(member_->options.size);
    const int64_t patience =
        absl::ToInt64Nanoseconds(deadline - store_->env_->Now());
    const Answer answer =
        store_->Ask("ranks", deadline + kAskGrace, [&](uint64_t id) {
          return FrameWriter(FrameKind::kAsk, id)
              .Put(id_)
              .Put(question)
              .Put(patience);
        });
    FrameReader reader(answer.value);
    const size_t count = reader.Get<uint32_t>();
    for (size_t i = 0; i < std::min(count, answers.size()); ++i) {
      if (reader.Get<uint8_t>() == 0) continue;
      const absl::string_view text = reader.GetText();
      if (reader.ok()) answers[i] = std::string(text);
    }
    return answers;
  }

 private:
  const std::shared_ptr<TcpStore> store_;
  const uint64_t id_;
  const std::shared_ptr<Member> member_;
};

absl::StatusOr<std::unique_ptr<Membership>> TcpStore::Join(
    const MemberOptions& options, absl::Time deadline) {
  const auto member = std::make_shared<Member>();
  member->options = options;
  const int64_t patience = absl::ToInt64Nanoseconds(deadline - env_->Now());
  uint64_t id;
  const Answer answer = Ask(
      options.group, deadline + kGrace,
      [&](uint64_t new_id) ABSL_NO_THREAD_SAFETY_ANALYSIS {
        members_[new_id] = member;  // before the first event can come
        return FrameWriter(FrameKind::kJoin, new_id)
            .Put(options.group)
            .Put(static_cast<int32_t>(options.rank))
            .Put(static_cast<int32_t>(options.size))
            .Put(options.facts)
            .Put(patience);
      },
      &id);
  if (!answer.status.ok()) {
    // Takes it out of the group, here and there.
    const Handle handle(shared_from_this(), id, member);
    return answer.status;
  }
  return std::make_unique<Handle>(shared_from_this(), id, member);
}

// A new connection, and what the server says that this client is to be.
struct Arrival {
  Socket socket;
  absl::Status full;  // if not OK, why nobody is let in at present; come again
  std::string host;   // of the other end
  absl::Duration heartbeat_bound;
  StoreRole role = StoreRole::kClient;
  int relay_rank = 0;  // of kElsewhere
  std::string relay;
};

// The two ends of a new connection, until they know each other.
class Greeting {
 public:
  Greeting(Env* env, const TcpStoreOptions& options, const std::string& where,
           Socket& socket, absl::Time deadline)
      : env_(env),
        options_(options),
        where_(where),
        socket_(socket),
        deadline_(deadline),
        nonce_(NewNonce(env)) {}

  // Unavailable if the server went away before it said anything.
  absl::StatusOr<Arrival> Run() {
    DSD_RETURN_IF_ERROR(
        Send(FrameWriter(FrameKind::kHello, 0)
                 .Put(kStoreMagic)
                 .Put(kStoreVersion)
                 .Put(absl::string_view(kLibraryVersion))
                 .Put(absl::string_view(nonce_))
                 .Put(absl::string_view(options_.job_id))
                 .Put(options_.generation)
                 .Put(static_cast<int32_t>(options_.may_relay ? options_.rank
                                                              : -1))));
    DSD_ASSIGN_OR_RETURN(std::string body, Receive());
    if (KindOf(body) == FrameKind::kChallenge) {
      DSD_RETURN_IF_ERROR(Answer(body));
      DSD_ASSIGN_OR_RETURN(body, Receive());
    }
    if (KindOf(body) != FrameKind::kReply) return Foreign();
    FrameReader reader = FieldsOf(body);
    const absl::Status verdict = reader.GetStatus();
    Arrival arrival;
    if (absl::IsResourceExhausted(verdict)) {
      arrival.full = Annotate(verdict, where_);
      return arrival;
    }
    if (!verdict.ok()) return Annotate(verdict, where_);
    arrival.heartbeat_bound = absl::Nanoseconds(reader.Get<int64_t>());
    const absl::string_view proof = reader.GetText();
    arrival.role = static_cast<StoreRole>(reader.Get<uint8_t>());
    arrival.relay_rank = reader.Get<int32_t>();
    arrival.relay = std::string(reader.GetText());
    if (!reader.ok()) return Foreign();
    DSD_RETURN_IF_ERROR(CheckServer(proof));
    return arrival;
  }

 private:
  static FrameKind KindOf(const std::string& body) {
    return static_cast<FrameKind>(FrameReader(body).Get<uint8_t>());
  }
  static FrameReader FieldsOf(const std::string& body) {
    FrameReader reader(body);
    reader.Get<uint8_t>();
    reader.Get<uint64_t>();
    return reader;
  }

  absl::Status Send(FrameWriter& frame) {
    return socket_.WriteAll(env_, frame.Finish(), deadline_);
  }

  absl::StatusOr<std::string> Receive() {
    absl::StatusOr<std::string> head =
        socket_.ReadExactly(env_, kFrameHeaderBytes, deadline_);
    if (absl::IsDeadlineExceeded(head.status())) {
      return absl::DeadlineExceededError(
          absl::StrCat("connected to ", where_,
                       ", but no store answers there; is the port of "
                       "another program?"));
    }
    DSD_RETURN_IF_ERROR(head);
    uint32_t size;
    std::memcpy(&size, head->data(), sizeof(size));
    if (size > kMaxHelloBytes) return Foreign();
    return socket_.ReadExactly(env_, size, deadline_);
  }

  absl::Status Answer(const std::string& challenge) {
    FrameReader reader = FieldsOf(challenge);
    server_nonce_ = std::string(reader.GetText());
    if (!reader.ok() || server_nonce_.size() != kNonceBytes) return Foreign();
    if (options_.token.empty()) {
      return absl::PermissionDeniedError(absl::StrCat(
          where_,
          ": the store asks for the token of its job, and this rank has none; "
          "set DSD_TOKEN or DSD_TOKEN_FILE as for rank 0"));
    }
    DSD_ASSIGN_OR_RETURN(const std::string proof,
                         TokenProof(options_.token, TokenSide::kClient,
                                    options_.job_id, nonce_, server_nonce_));
    return Send(
        FrameWriter(FrameKind::kProof, 0).Put(absl::string_view(proof)));
  }

  absl::Status CheckServer(absl::string_view proof) const {
    if (options_.token.empty()) return absl::OkStatus();
    if (server_nonce_.empty()) {
      return absl::PermissionDeniedError(absl::StrCat(
          where_,
          ": this rank has a token, and the store does not ask for it; set "
          "DSD_TOKEN or DSD_TOKEN_FILE for rank 0, too"));
    }
    DSD_ASSIGN_OR_RETURN(const std::string expected,
                         TokenProof(options_.token, TokenSide::kServer,
                                    options_.job_id, nonce_, server_nonce_));
    if (SameProof(proof, expected)) return absl::OkStatus();
    return absl::PermissionDeniedError(absl::StrCat(
        where_, ": what answers there does not know the token of this job"));
  }

  absl::Status Foreign() const {
    return absl::FailedPreconditionError(
        absl::StrCat("what answers at ", where_,
                     " is no store of dsd; is MASTER_PORT the port "
                     "of another program?"));
  }

  Env* const env_;
  const TcpStoreOptions& options_;
  const std::string& where_;
  Socket& socket_;
  const absl::Time deadline_;
  const std::string nonce_;
  std::string server_nonce_;  // empty: there was no challenge
};

// One attempt; Unavailable if the server went away before it said anything.
absl::StatusOr<Arrival> Greet(Env* env, const TcpStoreOptions& options,
                              absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(Socket socket,
                       (options.wait_for_server ? ConnectTo : ConnectOnce)(
                           env, options.host, options.port, deadline));
  DSD_ASSIGN_OR_RETURN(std::string host, socket.PeerHost());
  const std::string where = HostPort(host, options.port);
  DSD_ASSIGN_OR_RETURN(Arrival arrival,
                       Greeting(env, options, where, socket, deadline).Run());
  arrival.socket = std::move(socket);
  arrival.host = std::move(host);
  return arrival;
}

// `host`: of rank 0.
absl::StatusOr<std::shared_ptr<Store>> Enter(Env* env,
                                             const TcpStoreOptions& options,
                                             const std::string& host,
                                             int server_rank, Arrival arrival) {
  DSD_ASSIGN_OR_RETURN(Waker waker, Waker::Create());
  auto store = std::make_shared<TcpStore>(
      env, options, host, server_rank, std::move(arrival.socket),
      std::move(waker), arrival.heartbeat_bound);
  if (!store->has_thread()) return NoThread("dsd_store_io");
  return store;
}

// The options with which to ask a relay.
TcpStoreOptions AskingAt(const TcpStoreOptions& options,
                         const Address& address) {
  TcpStoreOptions relayed = options;
  relayed.host = address.host;
  relayed.port = address.port;
  relayed.wait_for_server = false;
  return relayed;
}

absl::StatusOr<std::shared_ptr<Store>> EnterThroughRelay(
    Env* env, const TcpStoreOptions& options, const Arrival& sent,
    absl::Time deadline) {
  if (sent.relay.empty()) return absl::UnavailableError("it has not come");
  DSD_ASSIGN_OR_RETURN(const Address address, ParseAddress(sent.relay));
  DSD_ASSIGN_OR_RETURN(Arrival arrival,
                       Greet(env, AskingAt(options, address), deadline));
  DSD_RETURN_IF_ERROR(arrival.full);
  return Enter(env, options, sent.host, sent.relay_rank, std::move(arrival));
}

absl::StatusOr<std::shared_ptr<Store>> EnterAsRelay(
    Env* env, const TcpStoreOptions& options, Arrival root,
    absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(std::shared_ptr<TcpRelay> relay,
                       TcpRelay::Start(env, options, std::move(root.socket),
                                       root.heartbeat_bound, deadline));
  DSD_ASSIGN_OR_RETURN(
      Arrival arrival,
      Greet(env, AskingAt(options, relay->address()), deadline));
  DSD_RETURN_IF_ERROR(arrival.full);
  DSD_ASSIGN_OR_RETURN(
      std::shared_ptr<Store> client,
      Enter(env, options, root.host, options.rank, std::move(arrival)));
  return MakeServedStore(std::move(relay), std::move(client));
}

}  // namespace

absl::StatusOr<std::shared_ptr<Store>> ConnectTcpStore(
    Env* env, const TcpStoreOptions& given, absl::Time deadline) {
  const absl::Time start = env->Now();
  absl::Time relays_end = absl::InfinitePast();  // not sent to one yet
  absl::Duration pause = kRetry;  // before a relay is tried again
  TcpStoreOptions options = given;
  absl::Status full;  // what the server said last
  while (true) {
    absl::Status why;
    absl::Time again;
    absl::StatusOr<Arrival> arrival = Greet(env, options, deadline);
    if (arrival.ok()) full = arrival->full;
    if (arrival.ok() && !full.ok()) {
      arrival->socket.Close();
      why = full;
      again = env->Now() + kRetry;
    } else if (arrival.ok() && arrival->role == StoreRole::kElsewhere) {
      arrival->socket.Close();
      if (relays_end == absl::InfinitePast()) {
        relays_end = env->Now() + (deadline - env->Now()) / 2;
      }
      absl::StatusOr<std::shared_ptr<Store>> store =
          EnterThroughRelay(env, options, *arrival, relays_end);
      if (store.ok()) return store;
      why = Annotate(store.status(), absl::StrCat("rank ", arrival->relay_rank,
                                                  ", through which rank ",
                                                  options.rank, " connects"));
      again = std::min(env->Now() + pause, relays_end);
      pause = std::min(2 * pause, kLastRetry);
      options.may_relay = again < relays_end;
    } else if (arrival.ok()) {
      const std::string host = arrival->host;
      return arrival->role == StoreRole::kRelay
                 ? EnterAsRelay(env, options, *std::move(arrival), deadline)
                 : Enter(env, options, host, 0, *std::move(arrival));
    } else if (!full.ok() && absl::IsDeadlineExceeded(arrival.status())) {
      return full;  // it waits for room, and has none for this answer either
    } else if (!absl::IsUnavailable(arrival.status()) ||
               !options.wait_for_server) {
      return arrival.status();
    } else {
      // The server of an earlier job at this address may be just closing.
      why = arrival.status();
      full = absl::OkStatus();
      again = env->Now() + kRetry;
    }
    if (again >= deadline) {
      if (!full.ok()) return full;
      // A connection that ends before the greeting is no answer either.
      return absl::DeadlineExceededError(absl::StrCat(
          "nobody answers at ", HostPort(options.host, options.port),
          " within ", DurationText(deadline - start), " (", why.message(),
          ")"));
    }
    env->SleepUntil(again);
  }
}

}  // namespace dsd
