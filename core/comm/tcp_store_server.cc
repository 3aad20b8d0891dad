// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/base/version.h"
#include "dsd/core/comm/group_table.h"
#include "dsd/core/comm/job_token.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store.h"
#include "dsd/core/comm/store_protocol.h"
#include "dsd/core/comm/tcp_store.h"

namespace dsd {
namespace {

// Who has not greeted is a stranger. Ranks greet at once, and try again.
constexpr size_t kMaxStrangers = 256;
constexpr absl::Duration kFlushPatience = absl::Seconds(1);
// After running out of descriptors.
constexpr absl::Duration kAcceptPause = absl::Milliseconds(100);
constexpr absl::Duration kIdle = absl::Hours(1);
// A client that reads nothing is as good as gone.
constexpr size_t kMaxUnsentBytes = size_t{64} << 20;
constexpr size_t kReadBytes = size_t{256} << 10;

}  // namespace

// Everything below Run is of the one thread.
class TcpStoreServer::Impl {
 public:
  Impl(Env* env, TcpStoreServerOptions options, Socket listener, int port,
       Waker waker)
      : env_(env),
        options_(std::move(options)),
        listener_(std::move(listener)),
        port_(port),
        waker_(std::move(waker)),
        beats_(options_.heartbeat_bound) {
    thread_ = env_->StartThread("dsd_store", [this] { Run(); });
  }

  ~Impl() {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
    }
    waker_.Wake();
    thread_.reset();
  }

  int port() const { return port_; }

 private:
  enum class Stage { kHello, kProof, kGreeted };
  struct Connection {
    Socket socket;
    std::string in;
    std::string out;
    Stage stage = Stage::kHello;
    std::string job;  // that it says it belongs to
    uint64_t generation = 0;
    std::string client_nonce;
    std::string server_nonce;
    bool closing = false;  // after what is in `out`
    bool rank_0 = false;
    bool silent = false;  // was given up
    absl::Time hello_deadline;
    absl::Time heard;  // a sign of life
    std::vector<GroupTable::MemberId> members;
  };
  using ConnectionId = uint64_t;
  // A request that is not answered yet.
  struct Asker {
    ConnectionId connection;
    uint64_t request;
  };
  struct Member {
    ConnectionId connection;
    uint64_t join_request;   // the client's name for it
    uint64_t leave_request;  // 0: none
  };
  struct Question {
    Asker asker;
    absl::Time deadline;
    std::vector<std::optional<std::string>> answers;
    std::map<ConnectionId, int> rank_of;  // who has yet to answer
  };

  void Run();
  bool Stopping() {
    absl::MutexLock lock(&mu_);
    return stopping_;
  }
  absl::Time NextEvent() const;
  void Accept();
  void Read(ConnectionId id, Connection& connection);
  void Write(ConnectionId id, Connection& connection);
  // Returns false for a frame that is not understood.
  bool Handle(ConnectionId id, Connection& connection, absl::string_view body);
  // These return false for a frame that is not understood.
  bool Greet(Connection& connection, FrameReader& reader);
  bool CheckProof(Connection& connection, FrameReader& reader);
  void Welcome(Connection& connection);
  void Refuse(Connection& connection, const absl::Status& verdict);
  void DropStrangers();
  void Send(ConnectionId id, std::string frame);
  void Reply(const Asker& asker, const absl::Status& status,
             absl::string_view value = "");
  void Deliver(const std::vector<GroupTable::Event>& events);
  void FinishQuestion(uint64_t id);
  // Forgets those who wait for keys.
  template <class Predicate>
  void StopWaiting(Predicate who) {
    absl::erase_if(waiting_, [&](auto& entry) {
      std::vector<Asker>& askers = entry.second;
      askers.erase(std::remove_if(askers.begin(), askers.end(), who),
                   askers.end());
      return askers.empty();
    });
  }
  // Gives up those who give no sign of life.
  void Listen(absl::Time now);
  // Forgets connections marked as broken; their members have died.
  void Reap();

  Env* const env_;
  const TcpStoreServerOptions options_;
  Socket listener_;
  const int port_;
  Waker waker_;
  absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;

  ConnectionId next_connection_ = 1;
  absl::btree_map<ConnectionId, Connection> connections_;
  std::vector<ConnectionId> broken_;
  absl::Time accept_after_ = absl::InfinitePast();
  BeatWatch beats_;
  absl::flat_hash_map<std::string, std::string> values_;
  absl::flat_hash_map<std::string, std::vector<Asker>> waiting_;  // by key
  GroupTable groups_;
  GroupTable::MemberId next_member_ = 1;
  absl::flat_hash_map<GroupTable::MemberId, Member> members_;
  uint64_t next_question_ = 1;
  absl::btree_map<uint64_t, Question> questions_;

  std::unique_ptr<EnvThread> thread_;
};

absl::Time TcpStoreServer::Impl::NextEvent() const {
  absl::Time next = std::min(groups_.NextExpiry(), env_->Now() + kIdle);
  for (const auto& [id, question] : questions_) {
    next = std::min(next, question.deadline);
  }
  for (const auto& [id, connection] : connections_) {
    if (connection.stage != Stage::kGreeted) {
      next = std::min(next, connection.hello_deadline);
    }
  }
  if (accept_after_ > env_->Now()) next = std::min(next, accept_after_);
  if (beats_.on()) next = std::min(next, env_->Now() + beats_.period());
  return next;
}

void TcpStoreServer::Impl::Run() {
  std::optional<absl::Time> end;
  bool last_look = false;  // at what clients said before the end
  while (true) {
    if (!end.has_value() && Stopping()) {
      end = env_->Now() + kFlushPatience;
      last_look = true;
    } else if (end.has_value()) {
      const bool unsent = std::any_of(
          connections_.begin(), connections_.end(),
          [](const auto& entry) { return !entry.second.out.empty(); });
      if (!unsent || env_->Now() >= *end) return;
    }

    std::vector<pollfd> polls = {{waker_.fd(), POLLIN, 0}};
    std::vector<ConnectionId> ids = {0};
    if (listener_.valid() && !end.has_value() && accept_after_ <= env_->Now()) {
      polls.push_back({listener_.fd(), POLLIN, 0});
      ids.push_back(0);
    }
    const size_t first = polls.size();
    for (const auto& [id, connection] : connections_) {
      polls.push_back(
          {connection.socket.fd(),
           static_cast<short>(POLLIN | (connection.out.empty() ? 0 : POLLOUT)),
           0});
      ids.push_back(id);
    }
    const absl::StatusOr<int> ready = env_->Poll(
        absl::MakeSpan(polls), std::exchange(last_look, false) ? env_->Now()
                               : end.has_value()               ? *end
                                                               : NextEvent());
    if (!ready.ok()) continue;
    waker_.Clear();
    if (first == 2 && polls[1].revents != 0) Accept();
    for (size_t i = first; i < polls.size(); ++i) {
      const auto it = connections_.find(ids[i]);
      if (it == connections_.end()) continue;
      if ((polls[i].revents & (POLLIN | POLLHUP | POLLERR)) != 0) {
        Read(ids[i], it->second);
      }
    }
    const absl::Time now = env_->Now();
    Listen(now);
    Deliver(groups_.Expire(now));
    std::vector<uint64_t> due;
    for (const auto& [id, question] : questions_) {
      if (question.deadline <= now) due.push_back(id);
    }
    for (const uint64_t id : due) FinishQuestion(id);
    for (auto& [id, connection] : connections_) {
      if (connection.stage != Stage::kGreeted &&
          connection.hello_deadline <= now) {
        broken_.push_back(id);
      }
    }
    Reap();
    // Rank 0 last: once it knows the end of a group its process may go, and the
    // server with it.
    for (const bool rank_0 : {false, true}) {
      for (auto& [id, connection] : connections_) {
        if (connection.rank_0 == rank_0) Write(id, connection);
      }
    }
    Reap();
  }
}

void TcpStoreServer::Impl::Write(ConnectionId id, Connection& connection) {
  if (!connection.socket.WriteSome(connection.out).ok() ||
      connection.out.size() > kMaxUnsentBytes ||
      (connection.closing && connection.out.empty())) {
    broken_.push_back(id);
  }
}

void TcpStoreServer::Impl::Accept() {
  while (true) {
    absl::StatusOr<Socket> socket = AcceptFrom(listener_);
    if (!socket.ok()) {
      accept_after_ = env_->Now() + kAcceptPause;
      return;
    }
    if (!socket->valid()) return;
    Connection& connection = connections_[next_connection_++];
    connection.socket = *std::move(socket);
    connection.heard = env_->Now();
    connection.hello_deadline = connection.heard + options_.greeting_patience;
    DropStrangers();
  }
}

void TcpStoreServer::Impl::DropStrangers() {
  size_t strangers = 0;
  auto oldest = connections_.end();
  for (auto it = connections_.begin(); it != connections_.end(); ++it) {
    if (it->second.stage == Stage::kGreeted) continue;
    if (++strangers == 1) oldest = it;
  }
  // It has no members, and nobody asks it anything.
  if (strangers > kMaxStrangers) connections_.erase(oldest);
}

void TcpStoreServer::Impl::Read(ConnectionId id, Connection& connection) {
  const size_t before = connection.in.size();
  const size_t most = connection.stage == Stage::kGreeted
                          ? kReadBytes
                          : kFrameHeaderBytes + kMaxHelloBytes -
                                std::min(before, kMaxHelloBytes);
  const absl::StatusOr<bool> open =
      connection.socket.ReadSome(connection.in, most);
  if (connection.in.size() > before) {
    connection.heard = env_->Now();
    connection.silent = false;
  }
  absl::string_view left = connection.in;
  absl::string_view body;
  while (!connection.closing) {
    const std::optional<bool> whole = TakeFrame(
        left,
        connection.stage == Stage::kGreeted ? kMaxFrameBytes : kMaxHelloBytes,
        body);
    if (!whole.has_value() || (*whole && !Handle(id, connection, body))) {
      broken_.push_back(id);
      return;
    }
    if (!*whole) break;
  }
  connection.in.erase(0, connection.in.size() - left.size());
  if (!open.ok() || !*open) broken_.push_back(id);
}

bool TcpStoreServer::Impl::Greet(Connection& connection, FrameReader& reader) {
  const uint32_t magic = reader.Get<uint32_t>();
  const uint32_t version = reader.Get<uint32_t>();
  if (!reader.ok() || magic != kStoreMagic) return false;
  if (version != kStoreVersion) {
    Refuse(connection, absl::FailedPreconditionError(absl::StrCat(
                           "the store speaks version ", kStoreVersion,
                           " of its protocol, the client version ", version,
                           "; use the same dsd on all ranks")));
    return true;
  }
  const absl::string_view library = reader.GetText();
  connection.client_nonce = std::string(reader.GetText());
  connection.job = std::string(reader.GetText());
  connection.generation = reader.Get<uint64_t>();
  if (!reader.ok() || connection.client_nonce.size() != kNonceBytes) {
    return false;
  }
  if (library != kLibraryVersion) {
    Refuse(connection,
           absl::FailedPreconditionError(absl::StrCat(
               "the store is of dsd ", kLibraryVersion, ", the client of dsd ",
               absl::Utf8SafeCHexEscape(library),
               "; use the same dsd on all ranks")));
  } else if (options_.token.empty()) {
    Welcome(connection);
  } else {
    connection.server_nonce = NewNonce(env_);
    connection.stage = Stage::kProof;
    connection.out += FrameWriter(FrameKind::kChallenge, 0)
                          .Put(absl::string_view(connection.server_nonce))
                          .Finish();
  }
  return true;
}

bool TcpStoreServer::Impl::CheckProof(Connection& connection,
                                      FrameReader& reader) {
  const absl::string_view proof = reader.GetText();
  if (!reader.ok()) return false;
  const absl::StatusOr<std::string> expected =
      TokenProof(options_.token, TokenSide::kClient, connection.job,
                 connection.client_nonce, connection.server_nonce);
  if (!expected.ok()) {
    Refuse(connection, expected.status());
  } else if (!SameProof(proof, *expected)) {
    Refuse(connection, absl::PermissionDeniedError(
                           "the token of the client is not that of the store; "
                           "give all ranks the same DSD_TOKEN"));
  } else {
    Welcome(connection);
  }
  return true;
}

void TcpStoreServer::Impl::Welcome(Connection& connection) {
  if (connection.job != options_.job_id) {
    return Refuse(connection,
                  absl::FailedPreconditionError(absl::StrCat(
                      "this is the store of job \"", options_.job_id,
                      "\", the client belongs to job \"", connection.job,
                      "\"; give the jobs different values of MASTER_PORT")));
  }
  // It tries again, or finds another.
  if (connection.generation != options_.generation) {
    return Refuse(connection,
                  absl::UnavailableError(absl::StrCat(
                      "this is the store of generation ", options_.generation,
                      " of the job, the client means generation ",
                      connection.generation)));
  }
  std::string proof;
  if (!options_.token.empty()) {
    absl::StatusOr<std::string> own =
        TokenProof(options_.token, TokenSide::kServer, connection.job,
                   connection.client_nonce, connection.server_nonce);
    if (!own.ok()) return Refuse(connection, own.status());
    proof = *std::move(own);
  }
  connection.stage = Stage::kGreeted;
  connection.out +=
      FrameWriter(FrameKind::kReply, 0)
          .Put(absl::OkStatus())
          .Put(beats_.on() ? absl::ToInt64Nanoseconds(beats_.bound()) : 0)
          .Put(absl::string_view(proof))
          .Finish();
}

void TcpStoreServer::Impl::Refuse(Connection& connection,
                                  const absl::Status& verdict) {
  connection.closing = true;
  connection.out += FrameWriter(FrameKind::kReply, 0).Put(verdict).Finish();
}

bool TcpStoreServer::Impl::Handle(ConnectionId id, Connection& connection,
                                  absl::string_view body) {
  FrameReader reader(body);
  const auto kind = static_cast<FrameKind>(reader.Get<uint8_t>());
  const uint64_t request = reader.Get<uint64_t>();
  const Asker asker = {id, request};
  switch (connection.stage) {
    case Stage::kHello:
      return kind == FrameKind::kHello && Greet(connection, reader);
    case Stage::kProof:
      return kind == FrameKind::kProof && CheckProof(connection, reader);
    case Stage::kGreeted:
      break;
  }
  // The member of this connection that a client names by its join.
  const auto member_of =
      [&](uint64_t join) -> std::optional<GroupTable::MemberId> {
    for (const GroupTable::MemberId member : connection.members) {
      if (members_.at(member).join_request == join) return member;
    }
    return std::nullopt;
  };
  switch (kind) {
    case FrameKind::kSet: {
      const std::string key(reader.GetText());
      const std::string value(reader.GetText());
      if (!reader.ok()) return false;
      values_[key] = value;
      Reply(asker, absl::OkStatus());
      const auto waiting = waiting_.extract(key);
      if (!waiting.empty()) {
        for (const Asker& other : waiting.mapped()) {
          Reply(other, absl::OkStatus(), value);
        }
      }
      return true;
    }
    case FrameKind::kGet: {
      const std::string key(reader.GetText());
      if (!reader.ok()) return false;
      const auto it = values_.find(key);
      if (it != values_.end()) {
        Reply(asker, absl::OkStatus(), it->second);
      } else {
        waiting_[key].push_back(asker);
      }
      return true;
    }
    case FrameKind::kAdd: {
      const std::string key(reader.GetText());
      const int64_t delta = reader.Get<int64_t>();
      if (!reader.ok()) return false;
      std::string& value = values_[key];
      const absl::Status status = AddToCounter(key, delta, value);
      Reply(asker, status, value);
      return true;
    }
    case FrameKind::kForget: {
      StopWaiting([&](const Asker& other) {
        return other.connection == id && other.request == request;
      });
      return true;
    }
    case FrameKind::kJoin: {
      const std::string group(reader.GetText());
      const int rank = reader.Get<int32_t>();
      const int size = reader.Get<int32_t>();
      const std::string facts(reader.GetText());
      const int64_t patience = reader.Get<int64_t>();
      if (!reader.ok()) return false;
      const GroupTable::MemberId member = next_member_++;
      members_[member] = {id, request, 0};
      connection.members.push_back(member);
      connection.rank_0 |= rank == 0;
      Deliver(groups_.Join(member, group, rank, size, facts,
                           absl::Nanoseconds(patience), env_->Now()));
      return true;
    }
    case FrameKind::kLeave: {
      const auto member = member_of(reader.Get<uint64_t>());
      if (!reader.ok()) return false;
      if (!member.has_value()) {
        Reply(asker, absl::FailedPreconditionError("not a member"));
        return true;
      }
      members_.at(*member).leave_request = request;
      Deliver(groups_.Leave(*member));
      if (!options_.last_group.empty() &&
          groups_.WasDissolved(options_.last_group)) {
        listener_.Close();
      }
      return true;
    }
    case FrameKind::kFail: {
      const auto member = member_of(reader.Get<uint64_t>());
      const absl::Status status = reader.GetStatus();
      if (!reader.ok()) return false;
      if (member.has_value() && !status.ok()) {
        Deliver(groups_.Fail(*member, status));
      }
      return true;
    }
    case FrameKind::kGone: {
      const auto member = member_of(reader.Get<uint64_t>());
      if (!reader.ok()) return false;
      if (member.has_value()) {
        Deliver(groups_.Remove(*member, "left the group without Shutdown"));
        members_.erase(*member);
        connection.members.erase(std::find(connection.members.begin(),
                                           connection.members.end(), *member));
      }
      return true;
    }
    case FrameKind::kAsk: {
      const auto member = member_of(reader.Get<uint64_t>());
      const std::string text(reader.GetText());
      const int64_t patience = reader.Get<int64_t>();
      if (!reader.ok()) return false;
      const uint64_t number = next_question_++;
      Question& question = questions_[number];
      question.asker = asker;
      question.deadline = env_->Now() + absl::Nanoseconds(patience);
      if (member.has_value()) {
        for (const GroupTable::Member& peer : groups_.Peers(*member)) {
          const auto place = members_.find(peer.id);
          if (place == members_.end()) continue;
          question.answers.resize(
              std::max<size_t>(question.answers.size(), peer.rank + 1));
          question.rank_of[place->second.connection] = peer.rank;
          Send(place->second.connection,
               FrameWriter(FrameKind::kQuestion, number)
                   .Put(place->second.join_request)
                   .Put(text)
                   .Finish());
        }
      }
      if (question.rank_of.empty()) FinishQuestion(number);
      return true;
    }
    case FrameKind::kAnswer: {
      const std::string text(reader.GetText());
      if (!reader.ok()) return false;
      const auto question = questions_.find(request);
      if (question == questions_.end()) return true;  // too late
      const auto rank = question->second.rank_of.find(id);
      if (rank == question->second.rank_of.end()) return true;
      question->second.answers[rank->second] = text;
      question->second.rank_of.erase(rank);
      if (question->second.rank_of.empty()) FinishQuestion(request);
      return true;
    }
    case FrameKind::kBeat: {
      Reply(asker, absl::OkStatus());
      return true;
    }
    default:
      return false;
  }
}

void TcpStoreServer::Impl::Send(ConnectionId id, std::string frame) {
  const auto it = connections_.find(id);
  if (it != connections_.end()) it->second.out += frame;
}

void TcpStoreServer::Impl::Reply(const Asker& asker, const absl::Status& status,
                                 absl::string_view value) {
  Send(asker.connection, FrameWriter(FrameKind::kReply, asker.request)
                             .Put(status)
                             .Put(value)
                             .Finish());
}

void TcpStoreServer::Impl::FinishQuestion(uint64_t id) {
  const Question question = std::move(questions_.at(id));
  questions_.erase(id);
  std::string value;
  // As fields of a frame, without the frame's head.
  FrameWriter writer(FrameKind::kReply, 0);
  writer.Put(static_cast<uint32_t>(question.answers.size()));
  size_t room = kMaxValueBytes;
  for (const std::optional<std::string>& answer : question.answers) {
    const bool fits = answer.has_value() && answer->size() < room;
    writer.Put(static_cast<uint8_t>(fits));
    if (!fits) continue;
    room -= answer->size();
    writer.Put(*answer);
  }
  const std::string frame = writer.Finish();
  Reply(question.asker, absl::OkStatus(),
        absl::string_view(frame).substr(kFrameHeaderBytes + 1 + 8));
}

void TcpStoreServer::Impl::Deliver(
    const std::vector<GroupTable::Event>& events) {
  for (const GroupTable::Event& event : events) {
    const auto it = members_.find(event.member);
    if (it == members_.end()) continue;
    const Member member = it->second;
    switch (event.kind) {
      case GroupTable::EventKind::kJoined:
        Reply({member.connection, member.join_request}, event.status);
        break;
      case GroupTable::EventKind::kLeft:
        Reply({member.connection, member.leave_request}, event.status);
        break;
      case GroupTable::EventKind::kFailed:
        Send(member.connection, FrameWriter(FrameKind::kFailed, 0)
                                    .Put(member.join_request)
                                    .Put(event.status)
                                    .Finish());
        break;
    }
  }
}

// After all that has arrived was read: a process that was stopped for a while
// finds the others' signs waiting.
void TcpStoreServer::Impl::Listen(absl::Time now) {
  if (!beats_.on()) return;
  if (!beats_.Ran(now)) {
    for (auto& [id, connection] : connections_) connection.heard = now;
    return;
  }
  for (auto& [id, connection] : connections_) {
    const absl::Duration silence = now - connection.heard;
    if (connection.stage != Stage::kGreeted || connection.silent ||
        silence < beats_.bound()) {
      continue;
    }
    // It stays connected, so that it hears of this should it go on.
    connection.silent = true;
    for (const GroupTable::MemberId member : connection.members) {
      Deliver(groups_.Silence(member, BeatWatch::HowLong(silence)));
    }
  }
}

void TcpStoreServer::Impl::Reap() {
  for (const ConnectionId id : std::exchange(broken_, {})) {
    const auto it = connections_.find(id);
    if (it == connections_.end()) continue;
    const std::vector<GroupTable::MemberId> members =
        std::move(it->second.members);
    connections_.erase(it);
    StopWaiting([&](const Asker& asker) { return asker.connection == id; });
    for (const GroupTable::MemberId member : members) {
      Deliver(groups_.Remove(member, "died (its connection to rank 0 closed)"));
      members_.erase(member);
    }
    std::vector<uint64_t> answered;
    for (auto& [number, question] : questions_) {
      question.rank_of.erase(id);
      if (question.rank_of.empty()) answered.push_back(number);
    }
    for (const uint64_t number : answered) FinishQuestion(number);
  }
}

TcpStoreServer::TcpStoreServer(std::unique_ptr<Impl> impl)
    : impl_(std::move(impl)) {}
TcpStoreServer::~TcpStoreServer() = default;
int TcpStoreServer::port() const { return impl_->port(); }

absl::StatusOr<std::unique_ptr<TcpStoreServer>> TcpStoreServer::Start(
    Env* env, const TcpStoreServerOptions& options, absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(Socket listener, options.listen_fd >= 0
                                            ? AdoptListener(options.listen_fd)
                                            : ListenAt(env, options.host,
                                                       options.port, deadline));
  DSD_ASSIGN_OR_RETURN(const int port, listener.LocalPort());
  DSD_ASSIGN_OR_RETURN(Waker waker, Waker::Create());
  return absl::WrapUnique(new TcpStoreServer(std::make_unique<Impl>(
      env, options, std::move(listener), port, std::move(waker))));
}

namespace {

class ServedStore final : public ForwardingStore {
 public:
  ServedStore(std::unique_ptr<TcpStoreServer> server,
              std::shared_ptr<Store> client)
      : ForwardingStore(std::move(client)), server_(std::move(server)) {}
  // The client goes first and says what it has left to say.
  ~ServedStore() override { to_.reset(); }

 private:
  const std::unique_ptr<TcpStoreServer> server_;
};

}  // namespace

std::shared_ptr<Store> MakeServedStore(std::unique_ptr<TcpStoreServer> server,
                                       std::shared_ptr<Store> client) {
  return std::make_shared<ServedStore>(std::move(server), std::move(client));
}

}  // namespace dsd
