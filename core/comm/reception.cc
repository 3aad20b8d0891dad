// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/reception.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/log/log.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/base/version.h"
#include "dsd/core/comm/job_token.h"

namespace dsd {
namespace {

// Who has not greeted is a stranger. Ranks greet at once, and try again.
constexpr size_t kMaxStrangers = 256;
constexpr absl::Duration kFlushPatience = absl::Seconds(1);
// After running out of descriptors.
constexpr absl::Duration kAcceptPause = absl::Milliseconds(100);
// Who is not let in tries again in less.
constexpr absl::Duration kHinderedFor = absl::Seconds(1);
constexpr absl::Duration kIdle = absl::Hours(1);
// A client that reads nothing is as good as gone.
constexpr size_t kMaxUnsentBytes = size_t{64} << 20;
constexpr size_t kReadBytes = size_t{256} << 10;

}  // namespace

Reception::Reception(Env* env, const ReceptionOptions& options, Socket listener,
                     Waker waker)
    : env_(env),
      options_(options),
      listener_(std::move(listener)),
      waker_(std::move(waker)),
      beats_(options.heartbeat_bound),
      spare_(SpareDescriptor()) {}

void Reception::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  }
  waker_.Wake();
}

absl::Time Reception::NextEvent(Host& host) const {
  const absl::Time now = env_->Now();
  absl::Time next = std::min(host.NextWork(), now + kIdle);
  for (const auto& [id, connection] : connections_) {
    if (connection.stage != Stage::kWelcome || connection.closing) {
      next = std::min(next, connection.deadline);
    }
  }
  if (accept_after_ > now) next = std::min(next, accept_after_);
  if (beats_.on()) next = std::min(next, now + beats_.period());
  return next;
}

void Reception::Run(Host& host) {
  std::optional<absl::Time> end;
  bool last_look = false;  // at what clients said before the end
  while (true) {
    if (!end.has_value() && Stopping()) {
      end = env_->Now() + kFlushPatience;
      last_look = true;
    } else if (end.has_value()) {
      const bool may_end = host.MayEnd();
      const bool unsent = std::any_of(
          connections_.begin(), connections_.end(),
          [](const auto& entry) { return !entry.second.out.empty(); });
      if ((may_end && !unsent) || env_->Now() >= *end) return;
    }

    if (!spare_.valid()) spare_ = SpareDescriptor();
    std::vector<pollfd> polls = {{waker_.fd(), POLLIN, 0}};
    std::vector<Id> ids = {0};
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
                                                 : NextEvent(host));
    if (!ready.ok()) continue;
    waker_.Clear();
    if (first == 2 && polls[1].revents != 0) Accept();
    for (size_t i = first; i < polls.size(); ++i) {
      const auto it = connections_.find(ids[i]);
      if (it == connections_.end()) continue;
      if ((polls[i].revents & (POLLIN | POLLHUP | POLLERR)) != 0) {
        Read(host, ids[i], it->second);
      }
    }
    const absl::Time now = env_->Now();
    GiveUpSilent(host, now);
    host.Work(now);
    for (auto& [id, connection] : connections_) {
      if ((connection.stage != Stage::kWelcome || connection.closing) &&
          connection.deadline <= now) {
        broken_.push_back(id);
      }
    }
    Reap(host);
    for (const bool last : {false, true}) {
      for (auto& [id, connection] : connections_) {
        if (connection.last == last) Write(id, connection);
      }
    }
    Reap(host);
  }
}

Reception::Id Reception::Adopt(Socket socket) {
  const Id id = NewId();
  Connection& connection = connections_[id];
  connection.socket = std::move(socket);
  connection.stage = Stage::kWelcome;
  connection.max_frame_bytes = kMaxPassedBytes;
  connection.heard = env_->Now();
  return id;
}

void Reception::Send(Id id, absl::string_view frame) {
  const auto it = connections_.find(id);
  if (it == connections_.end() || it->second.closing) return;
  absl::StrAppend(&it->second.out, frame);
}

void Reception::Close(Id id) {
  const auto it = connections_.find(id);
  if (it == connections_.end() || it->second.closing) return;
  it->second.closing = true;
  it->second.deadline = env_->Now() + kFlushPatience;
}

void Reception::WriteLast(Id id) {
  const auto it = connections_.find(id);
  if (it != connections_.end()) it->second.last = true;
}

void Reception::Write(Id id, Connection& connection) {
  if (!connection.socket.WriteSome(connection.out).ok() ||
      connection.out.size() > kMaxUnsentBytes ||
      (connection.closing && connection.out.empty())) {
    broken_.push_back(id);
  }
}

void Reception::Accept() {
  while (true) {
    const absl::Time now = env_->Now();
    absl::Duration patience = options_.greeting_patience;
    absl::Status refusal;
    absl::StatusOr<Socket> socket = AcceptFrom(listener_);
    if (!socket.ok()) {
      const std::string why(socket.status().message());
      // One is told, who may come again; then the next.
      const bool has_room = spare_.valid();
      spare_.Close();
      if (has_room) socket = AcceptFrom(listener_);
      // Without room the system does not say that nobody is waiting.
      if (socket.ok() && !socket->valid()) return;
      hindrance_ =
          absl::StrCat("rank ", options_.rank, " cannot let ranks in: ", why,
                       "; raise ulimit -n there");
      hindered_at_ = now;
      LOG_FIRST_N(ERROR, 1) << hindrance_;
      if (!socket.ok()) {
        accept_after_ = now + kAcceptPause;
        return;
      }
      refusal = absl::ResourceExhaustedError(hindrance_);
      patience = std::min(patience, kFlushPatience);
    }
    if (!socket->valid()) return;
    Connection& connection = connections_[NewId()];
    connection.socket = *std::move(socket);
    connection.refusal = std::move(refusal);
    connection.heard = now;
    connection.deadline = now + patience;
    DropStrangers();
  }
}

std::string Reception::Hindrance(absl::Time now) const {
  return now - hindered_at_ < kHinderedFor ? hindrance_ : "";
}

void Reception::DropStrangers() {
  size_t strangers = 0;
  auto oldest = connections_.end();
  for (auto it = connections_.begin(); it != connections_.end(); ++it) {
    if (it->second.stage == Stage::kWelcome) continue;
    if (++strangers == 1) oldest = it;
  }
  // The host does not know it.
  if (strangers > kMaxStrangers) connections_.erase(oldest);
}

void Reception::Read(Host& host, Id id, Connection& connection) {
  const size_t before = connection.in.size();
  const size_t most = connection.stage == Stage::kWelcome
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
    const std::optional<bool> whole =
        TakeFrame(left, connection.max_frame_bytes, body);
    if (!whole.has_value() || (*whole && !Handle(host, id, connection, body))) {
      broken_.push_back(id);
      return;
    }
    if (!*whole) break;
  }
  connection.in.erase(0, connection.closing
                             ? connection.in.size()
                             : connection.in.size() - left.size());
  if (!open.ok() || !*open) broken_.push_back(id);
}

bool Reception::Handle(Host& host, Id id, Connection& connection,
                       absl::string_view body) {
  if (connection.stage == Stage::kWelcome) return host.Handle(id, body);
  FrameReader reader(body);
  const auto kind = static_cast<FrameKind>(reader.Get<uint8_t>());
  reader.Get<uint64_t>();
  return connection.stage == Stage::kHello
             ? kind == FrameKind::kHello && Greet(host, id, connection, reader)
             : kind == FrameKind::kProof &&
                   CheckProof(host, id, connection, reader);
}

bool Reception::Greet(Host& host, Id id, Connection& connection,
                      FrameReader& reader) {
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
  connection.rank = reader.Get<int32_t>();
  if (!reader.ok() || connection.client_nonce.size() != kNonceBytes) {
    return false;
  }
  if (library != kLibraryVersion) {
    Refuse(connection,
           absl::FailedPreconditionError(absl::StrCat(
               "the store is of dsd ", kLibraryVersion, ", the client of dsd ",
               absl::Utf8SafeCHexEscape(library),
               "; use the same dsd on all ranks")));
  } else if (!connection.refusal.ok()) {
    Refuse(connection, connection.refusal);
  } else if (options_.token.empty()) {
    Welcome(host, id, connection);
  } else {
    connection.server_nonce = NewNonce(env_);
    connection.stage = Stage::kProof;
    connection.out += FrameWriter(FrameKind::kChallenge, 0)
                          .Put(absl::string_view(connection.server_nonce))
                          .Finish();
  }
  return true;
}

bool Reception::CheckProof(Host& host, Id id, Connection& connection,
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
    Welcome(host, id, connection);
  }
  return true;
}

void Reception::Welcome(Host& host, Id id, Connection& connection) {
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
  const Place place = host.Welcome(id, connection.rank);
  connection.out +=
      FrameWriter(FrameKind::kReply, 0)
          .Put(absl::OkStatus())
          .Put(beats_.on() ? absl::ToInt64Nanoseconds(beats_.bound()) : 0)
          .Put(absl::string_view(proof))
          .Put(static_cast<uint8_t>(place.role))
          .Put(static_cast<int32_t>(place.relay_rank))
          .Put(absl::string_view(place.address))
          .Finish();
  if (place.role == StoreRole::kElsewhere) {
    connection.closing = true;
    return;
  }
  connection.stage = Stage::kWelcome;
  connection.max_frame_bytes =
      place.role == StoreRole::kRelay ? kMaxPassedBytes : kMaxFrameBytes;
}

void Reception::Refuse(Connection& connection, const absl::Status& verdict) {
  connection.closing = true;
  connection.out += FrameWriter(FrameKind::kReply, 0).Put(verdict).Finish();
}

// After all that has arrived was read: a process that was stopped for a while
// finds the others' signs waiting.
void Reception::GiveUpSilent(Host& host, absl::Time now) {
  if (!beats_.on()) return;
  if (!beats_.Ran(now)) {
    for (auto& [id, connection] : connections_) connection.heard = now;
    return;
  }
  for (auto& [id, connection] : connections_) {
    const absl::Duration silence = now - connection.heard;
    if (connection.stage != Stage::kWelcome || connection.closing ||
        connection.silent || silence < beats_.bound()) {
      continue;
    }
    connection.silent = true;
    host.Silent(id, BeatWatch::HowLong(silence));
  }
}

void Reception::Reap(Host& host) {
  for (const Id id : std::exchange(broken_, {})) {
    const auto it = connections_.find(id);
    if (it == connections_.end()) continue;
    const bool known = it->second.stage == Stage::kWelcome;
    // There is room for the next one.
    if (!it->second.refusal.ok()) accept_after_ = absl::InfinitePast();
    connections_.erase(it);
    if (known) host.Gone(id);
  }
}

}  // namespace dsd
