// SPDX-License-Identifier: Apache-2.0
//
// Each rank listens, and connects to those below it. Its place in the store
// says where, and has two secrets: who connects shows the first and its rank,
// and is shown the second.

#include "dsd/backends/gloo/peer_connections.h"

#include <poll.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <optional>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/job_token.h"
#include "dsd/core/comm/store.h"

namespace dsd {
namespace {

constexpr size_t kHelloBytes = kNonceBytes + sizeof(uint32_t);
// Ranks greet at once; of who does not, the last ones are waited for.
constexpr size_t kMaxStrangers = 256;
// An attempt to connect does not hear of a cancel.
constexpr absl::Duration kAttempt = absl::Seconds(1);

absl::Status CancelledStatus() { return absl::AbortedError("cancelled"); }

struct Place {
  std::string question;
  std::string answer;
  std::string local_name;  // of a Unix socket; empty: none
  Address address;
};

std::string PlaceText(const Place& place) {
  return absl::StrCat(absl::BytesToHexString(place.question), " ",
                      absl::BytesToHexString(place.answer), " ",
                      absl::BytesToHexString(place.local_name), " ",
                      AddressText(place.address));
}

absl::StatusOr<Place> ParsePlace(absl::string_view text) {
  const std::vector<absl::string_view> fields =
      absl::StrSplit(text, absl::MaxSplits(' ', 3));
  Place place;
  if (fields.size() != 4 ||
      !absl::HexStringToBytes(fields[0], &place.question) ||
      !absl::HexStringToBytes(fields[1], &place.answer) ||
      !absl::HexStringToBytes(fields[2], &place.local_name)) {
    return absl::DataLossError("no place of a rank");
  }
  DSD_ASSIGN_OR_RETURN(place.address, ParseAddress(fields[3]));
  return place;
}

socklen_t LocalAddress(absl::string_view name, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  std::memcpy(address->sun_path, name.data(),
              std::min(name.size(), sizeof(address->sun_path)));
  return offsetof(sockaddr_un, sun_path) +
         std::min(name.size(), sizeof(address->sun_path));
}

Socket NewLocalSocket() {
  return Socket(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
}

// Invalid if there can be none: the network will do.
Socket ListenLocally(std::string* name) {
  Socket listener = NewLocalSocket();
  // Without a name the kernel finds a free one that is in no file system.
  sockaddr_un address;
  socklen_t size = LocalAddress("", &address);
  if (!listener.valid() ||
      bind(listener.fd(), reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      listen(listener.fd(), SOMAXCONN) != 0) {
    return Socket();
  }
  size = sizeof(address);
  if (getsockname(listener.fd(), reinterpret_cast<sockaddr*>(&address),
                  &size) != 0) {
    return Socket();
  }
  name->assign(address.sun_path, size - offsetof(sockaddr_un, sun_path));
  return listener;
}

Socket ConnectLocally(absl::string_view name) {
  Socket connection = NewLocalSocket();
  sockaddr_un address;
  const socklen_t size = LocalAddress(name, &address);
  if (!connection.valid() ||
      connect(connection.fd(), reinterpret_cast<sockaddr*>(&address), size) !=
          0) {
    return Socket();
  }
  return connection;
}

class PeerConnector {
 public:
  PeerConnector(const EngineOptions& options, const std::string& host,
                const std::atomic<bool>& cancelled, Waker& waker,
                absl::Time deadline)
      : options_(options),
        host_(host),
        cancelled_(cancelled),
        waker_(waker),
        deadline_(deadline),
        connected_(options.world_size) {}

  absl::StatusOr<std::vector<Socket>> Run() {
    DSD_RETURN_IF_ERROR(Listen());
    for (int peer = 0; peer < options_.rank; ++peer) {
      DSD_RETURN_IF_ERROR(Dial(peer));
    }
    missing_ = options_.world_size - 1;
    while (missing_ > 0) DSD_RETURN_IF_ERROR(Step());
    return std::move(connected_);
  }

 private:
  // A connection that has not shown yet whose it is.
  struct Unproved {
    Socket socket;
    int peer;            // who it should be; -1: any rank above this one
    std::string answer;  // that it owes
    std::string in;
    bool over = false;
  };

  absl::Status Listen();
  absl::Status Dial(int peer);
  absl::Status Step();
  absl::Status Accept(const Socket& listener);
  absl::Status Read(Unproved& from);
  absl::Status Late() const;

  const EngineOptions& options_;
  const std::string& host_;
  const std::atomic<bool>& cancelled_;
  Waker& waker_;
  const absl::Time deadline_;

  Place place_;
  Socket listener_;
  Socket local_listener_;
  std::vector<Socket> connected_;
  int missing_ = 0;
  std::deque<Unproved> unproved_;  // the oldest first
};

absl::Status PeerConnector::Listen() {
  Env* const env = options_.env;
  DSD_ASSIGN_OR_RETURN(listener_, ListenAt(env, host_, 0, deadline_));
  DSD_ASSIGN_OR_RETURN(place_.address.port, listener_.LocalPort());
  place_.address.host = host_;
  local_listener_ = ListenLocally(&place_.local_name);
  place_.question = NewNonce(env);
  place_.answer = NewNonce(env);
  return options_.store->Set(absl::StrCat("gloo/", options_.rank),
                             PlaceText(place_), deadline_);
}

absl::Status PeerConnector::Dial(int peer) {
  const absl::StatusOr<std::string> text =
      options_.store->Get(absl::StrCat("gloo/", peer), deadline_);
  if (cancelled_) return CancelledStatus();
  if (absl::IsDeadlineExceeded(text.status())) {
    return absl::DeadlineExceededError(
        absl::StrCat("rank ", peer, " has not said where it listens"));
  }
  DSD_RETURN_IF_ERROR(text);
  DSD_ASSIGN_OR_RETURN(Place place, ParsePlace(*text));

  Unproved dialed;
  dialed.peer = peer;
  dialed.answer = std::move(place.answer);
  if (place.address.host == host_ && !place.local_name.empty()) {
    dialed.socket = ConnectLocally(place.local_name);
  }
  Env* const env = options_.env;
  while (!dialed.socket.valid()) {
    const absl::Time end = std::min(deadline_, env->Now() + kAttempt);
    absl::StatusOr<Socket> connection =
        ConnectOnce(env, place.address.host, place.address.port, end);
    if (cancelled_) return CancelledStatus();
    if (connection.ok()) {
      dialed.socket = *std::move(connection);
    } else if (env->Now() >= deadline_) {
      return absl::DeadlineExceededError(
          absl::StrCat("no connection to rank ", peer,
                       " in time: ", connection.status().message()));
    } else if (env->Now() < end) {
      return absl::Status(connection.status().code(),
                          absl::StrCat("connect to rank ", peer, ": ",
                                       connection.status().message()));
    }
  }
  const uint32_t rank = options_.rank;
  std::string hello = place.question;
  hello.append(reinterpret_cast<const char*>(&rank), sizeof(rank));
  DSD_RETURN_IF_ERROR(dialed.socket.WriteAll(env, std::move(hello), deadline_))
      << "connect to rank " << peer;
  unproved_.push_back(std::move(dialed));
  return absl::OkStatus();
}

absl::Status PeerConnector::Step() {
  std::vector<pollfd> polls = {{waker_.fd(), POLLIN, 0},
                               {listener_.fd(), POLLIN, 0},
                               // Left out if it is none.
                               {local_listener_.fd(), POLLIN, 0}};
  const size_t first = polls.size();
  const size_t count = unproved_.size();
  for (const Unproved& one : unproved_) {
    polls.push_back({one.socket.fd(), POLLIN, 0});
  }
  DSD_ASSIGN_OR_RETURN(const int ready,
                       options_.env->Poll(absl::MakeSpan(polls), deadline_));
  if (cancelled_) return CancelledStatus();
  if (ready == 0 && options_.env->Now() >= deadline_) return Late();
  for (size_t i = 0; i < count; ++i) {
    if (polls[first + i].revents != 0) {
      DSD_RETURN_IF_ERROR(Read(unproved_[i]));
    }
  }
  if (polls[1].revents != 0) DSD_RETURN_IF_ERROR(Accept(listener_));
  if (polls[2].revents != 0) DSD_RETURN_IF_ERROR(Accept(local_listener_));

  unproved_.erase(std::remove_if(unproved_.begin(), unproved_.end(),
                                 [](const Unproved& one) { return one.over; }),
                  unproved_.end());
  size_t strangers =
      std::count_if(unproved_.begin(), unproved_.end(),
                    [](const Unproved& one) { return one.peer < 0; });
  for (auto it = unproved_.begin(); strangers > kMaxStrangers;) {
    if (it->peer < 0) {
      it = unproved_.erase(it);
      --strangers;
    } else {
      ++it;
    }
  }
  return absl::OkStatus();
}

absl::Status PeerConnector::Accept(const Socket& listener) {
  while (true) {
    absl::StatusOr<Socket> socket = AcceptFrom(listener);
    DSD_RETURN_IF_ERROR(socket) << "let the other ranks in";
    if (!socket->valid()) return absl::OkStatus();
    Unproved caller;
    caller.socket = *std::move(socket);
    caller.peer = -1;
    // Mostly its greeting is there already.
    DSD_RETURN_IF_ERROR(Read(caller));
    if (!caller.over) unproved_.push_back(std::move(caller));
  }
}

absl::Status PeerConnector::Read(Unproved& from) {
  const bool dialed = from.peer >= 0;
  const size_t bytes = dialed ? kNonceBytes : kHelloBytes;
  const absl::StatusOr<bool> open =
      from.socket.ReadSome(from.in, bytes - from.in.size());
  if (from.in.size() < bytes) {
    if (open.ok() && *open) return absl::OkStatus();
    from.over = true;
    if (!dialed) return absl::OkStatus();
    return absl::UnavailableError(
        absl::StrCat("rank ", from.peer, " has ended the connection"));
  }
  from.over = true;
  int peer = from.peer;
  if (dialed) {
    if (!SameProof(from.in, from.answer)) {
      return absl::UnavailableError(
          absl::StrCat("at the address of rank ", peer, " is somebody else"));
    }
  } else {
    uint32_t rank;
    std::memcpy(&rank, from.in.data() + kNonceBytes, sizeof(rank));
    const absl::string_view question(from.in.data(), kNonceBytes);
    if (!SameProof(question, place_.question) ||
        rank >= static_cast<uint32_t>(options_.world_size) ||
        static_cast<int>(rank) <= options_.rank || connected_[rank].valid()) {
      return absl::OkStatus();
    }
    peer = static_cast<int>(rank);
    // Into an empty connection.
    std::string answer = place_.answer;
    const absl::Status status = from.socket.WriteSome(answer);
    if (!status.ok() || !answer.empty()) {
      return absl::UnavailableError(
          absl::StrCat("rank ", peer, " has ended the connection"));
    }
  }
  connected_[peer] = std::move(from.socket);
  --missing_;
  return absl::OkStatus();
}

absl::Status PeerConnector::Late() const {
  for (int peer = 0; peer < options_.world_size; ++peer) {
    if (peer == options_.rank || connected_[peer].valid()) continue;
    return absl::DeadlineExceededError(
        absl::StrCat("no connection to rank ", peer, " in time"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<Socket>> ConnectPeers(
    const EngineOptions& options, const std::string& host,
    const std::atomic<bool>& cancelled, Waker& waker, absl::Time deadline) {
  return PeerConnector(options, host, cancelled, waker, deadline).Run();
}

}  // namespace dsd
