// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/socket.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

#include "absl/base/attributes.h"
#include "absl/base/no_destructor.h"
#include "absl/base/thread_annotations.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/duration_text.h"

namespace dsd {
namespace {

constexpr absl::Duration kFirstRetry = absl::Milliseconds(10);
constexpr absl::Duration kLastRetry = absl::Milliseconds(500);
// For one address of several.
constexpr absl::Duration kAttempt = absl::Seconds(5);
constexpr int kBacklog = 4096;
// When a silent connection is asked for a sign of life, how often, and how many
// times in vain.
constexpr int kKeepAliveIdleSeconds = 20;
constexpr int kKeepAlivePeriodSeconds = 5;
constexpr int kKeepAliveProbes = 4;

std::string ErrnoText(int error) {
  const absl::Status status = absl::ErrnoToStatus(error, "");
  return std::string(absl::StripPrefix(status.message(), ": "));
}

absl::Status ConnectionLost(int error) {
  return absl::UnavailableError(
      absl::StrCat("connection lost: ", ErrnoText(error)));
}

ABSL_CONST_INIT std::atomic<Resolver> resolver_for_testing{nullptr};

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

absl::StatusOr<AddressList> LookUp(const std::string& host, int port,
                                   int flags) {
  addrinfo hints = {};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | flags;
  addrinfo* found = nullptr;
  const Resolver other = resolver_for_testing.load();
  const int error = (other == nullptr ? getaddrinfo : other)(
      host.c_str(), absl::StrCat(port).c_str(), &hints, &found);
  if (error != 0) {
    return absl::UnavailableError(
        absl::StrCat("host \"", host, "\" is unknown: ", gai_strerror(error)));
  }
  return AddressList(found, &freeaddrinfo);
}

// The system's resolver takes its own time and cannot be interrupted.
struct LookUpThread {
  struct State {
    absl::Mutex mu;
    absl::StatusOr<AddressList> result ABSL_GUARDED_BY(mu) =
        AddressList(nullptr, &freeaddrinfo);
    bool done ABSL_GUARDED_BY(mu) = false;

    bool IsDone() {
      absl::MutexLock lock(&mu);
      return done;
    }
  };
  std::shared_ptr<State> state;
  std::unique_ptr<EnvThread> thread;
};

// Those that outlived who asked. Joined when they have ended, by whoever leaves
// the next.
struct AbandonedLookUps {
  absl::Mutex mu;
  std::vector<LookUpThread> threads ABSL_GUARDED_BY(mu);

  void Add(LookUpThread thread) {
    absl::MutexLock lock(&mu);
    threads.erase(
        std::remove_if(threads.begin(), threads.end(),
                       [](const LookUpThread& t) { return t.state->IsDone(); }),
        threads.end());
    threads.push_back(std::move(thread));
  }
};

absl::StatusOr<AddressList> Resolve(Env* env, absl::string_view host_view,
                                    int port, absl::Time deadline) {
  const std::string host(host_view);
  absl::StatusOr<AddressList> number = LookUp(host, port, AI_NUMERICHOST);
  if (number.ok()) return number;

  LookUpThread look_up;
  look_up.state = std::make_shared<LookUpThread::State>();
  const absl::Time start = env->Now();
  look_up.thread =
      env->StartThread("dsd_resolve", [state = look_up.state, host, port] {
        absl::StatusOr<AddressList> result = LookUp(host, port, 0);
        absl::MutexLock lock(&state->mu);
        state->result = std::move(result);
        state->done = true;
      });
  if (look_up.thread == nullptr) {
    return Annotate(NoThread("dsd_resolve"),
                    absl::StrCat("look for host \"", host, "\""));
  }
  {
    LookUpThread::State& state = *look_up.state;
    absl::MutexLock lock(&state.mu);
    if (env->Await(state.mu, absl::Condition(&state.done), deadline)) {
      return std::move(state.result);
    }
  }
  static absl::NoDestructor<AbandonedLookUps> abandoned;
  abandoned->Add(std::move(look_up));
  return absl::DeadlineExceededError(
      absl::StrCat("the system has not found the address of host \"", host,
                   "\" within ", DurationText(deadline - start)));
}

absl::StatusOr<std::string> HostOf(const sockaddr_storage& address,
                                   socklen_t size) {
  char host[NI_MAXHOST];
  const int error =
      getnameinfo(reinterpret_cast<const sockaddr*>(&address), size, host,
                  sizeof(host), nullptr, 0, NI_NUMERICHOST);
  if (error != 0) {
    return absl::InternalError(
        absl::StrCat("address of a socket: ", gai_strerror(error)));
  }
  return std::string(host);
}

Socket NewSocket(int family, int type) {
  return Socket(socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
}

// Small messages go at once, and a host that is gone is noticed.
void Prepare(const Socket& connection) {
  const auto set = [&](int level, int option, int value) {
    setsockopt(connection.fd(), level, option, &value, sizeof(value));
  };
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, kKeepAliveIdleSeconds);
  set(IPPROTO_TCP, TCP_KEEPINTVL, kKeepAlivePeriodSeconds);
  set(IPPROTO_TCP, TCP_KEEPCNT, kKeepAliveProbes);
  set(IPPROTO_TCP, TCP_USER_TIMEOUT,
      1000 *
          (kKeepAliveIdleSeconds + kKeepAlivePeriodSeconds * kKeepAliveProbes));
}

// One attempt at one address.
absl::Status TryConnect(Env* env, const addrinfo& address, absl::Time deadline,
                        Socket& out) {
  Socket connection = NewSocket(address.ai_family, SOCK_STREAM);
  if (!connection.valid()) return absl::ErrnoToStatus(errno, "socket");
  if (connect(connection.fd(), address.ai_addr, address.ai_addrlen) != 0) {
    if (errno != EINPROGRESS) {
      return absl::UnavailableError(ErrnoText(errno));
    }
    pollfd poll = {connection.fd(), POLLOUT, 0};
    DSD_ASSIGN_OR_RETURN(const int ready,
                         env->Poll(absl::MakeSpan(&poll, 1),
                                   std::min(deadline, env->Now() + kAttempt)));
    if (ready == 0) return absl::DeadlineExceededError("no answer");
    int error = 0;
    socklen_t size = sizeof(error);
    getsockopt(connection.fd(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) return absl::UnavailableError(ErrnoText(error));
  }
  if (IsConnectedToItself(connection)) {
    return absl::UnavailableError("nobody listens");
  }
  Prepare(connection);
  out = std::move(connection);
  return absl::OkStatus();
}

}  // namespace

Socket::Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

Socket& Socket::operator=(Socket&& other) noexcept {
  if (this != &other) {
    Close();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

void Socket::Close() {
  if (fd_ >= 0) close(std::exchange(fd_, -1));
}

absl::StatusOr<bool> Socket::ReadSome(std::string& buffer, size_t max_bytes) {
  char chunk[16384];
  while (max_bytes > 0) {
    const ssize_t n =
        recv(fd_, chunk, std::min(sizeof(chunk), max_bytes), MSG_DONTWAIT);
    if (n > 0) {
      buffer.append(chunk, n);
      max_bytes -= n;
    } else if (n == 0) {
      return false;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      break;
    } else if (errno != EINTR) {
      return ConnectionLost(errno);
    }
  }
  return true;
}

absl::Status Socket::WriteSome(std::string& buffer) {
  size_t sent = 0;
  while (sent < buffer.size()) {
    const ssize_t n = send(fd_, buffer.data() + sent, buffer.size() - sent,
                           MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0) {
      sent += n;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      break;
    } else if (errno != EINTR) {
      return ConnectionLost(errno);
    }
  }
  buffer.erase(0, sent);
  return absl::OkStatus();
}

absl::Status Socket::WriteAll(Env* env, std::string buffer,
                              absl::Time deadline) {
  while (true) {
    DSD_RETURN_IF_ERROR(WriteSome(buffer));
    if (buffer.empty()) return absl::OkStatus();
    pollfd poll = {fd_, POLLOUT, 0};
    DSD_ASSIGN_OR_RETURN(const int ready,
                         env->Poll(absl::MakeSpan(&poll, 1), deadline));
    if (ready == 0)
      return absl::DeadlineExceededError("the peer reads nothing");
  }
}

absl::StatusOr<std::string> Socket::ReadExactly(Env* env, size_t bytes,
                                                absl::Time deadline) {
  std::string buffer;
  while (true) {
    DSD_ASSIGN_OR_RETURN(const bool open,
                         ReadSome(buffer, bytes - buffer.size()));
    if (buffer.size() == bytes) return buffer;
    if (!open) return absl::UnavailableError("the peer closed the connection");
    pollfd poll = {fd_, POLLIN, 0};
    DSD_ASSIGN_OR_RETURN(const int ready,
                         env->Poll(absl::MakeSpan(&poll, 1), deadline));
    if (ready == 0) return absl::DeadlineExceededError("the peer is silent");
  }
}

absl::StatusOr<int> Socket::LocalPort() const {
  sockaddr_storage address;
  socklen_t size = sizeof(address);
  if (getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    return absl::ErrnoToStatus(errno, "address of a socket");
  }
  if (address.ss_family == AF_INET) {
    return ntohs(reinterpret_cast<const sockaddr_in&>(address).sin_port);
  }
  if (address.ss_family == AF_INET6) {
    return ntohs(reinterpret_cast<const sockaddr_in6&>(address).sin6_port);
  }
  return absl::FailedPreconditionError("the socket is not a TCP socket");
}

absl::StatusOr<std::string> Socket::PeerHost() const {
  sockaddr_storage address;
  socklen_t size = sizeof(address);
  if (getpeername(fd_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    return absl::ErrnoToStatus(errno, "address of a peer");
  }
  return HostOf(address, size);
}

absl::StatusOr<std::string> Socket::LocalHost() const {
  sockaddr_storage address;
  socklen_t size = sizeof(address);
  if (getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    return absl::ErrnoToStatus(errno, "address of a socket");
  }
  return HostOf(address, size);
}

absl::StatusOr<Waker> Waker::Create() {
  Waker waker;
  waker.socket_ = Socket(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!waker.socket_.valid()) return absl::ErrnoToStatus(errno, "eventfd");
  return waker;
}

Socket SpareDescriptor() { return Socket(eventfd(0, EFD_CLOEXEC)); }

void Waker::Wake() { eventfd_write(socket_.fd(), 1); }

void Waker::Clear() {
  eventfd_t value;
  eventfd_read(socket_.fd(), &value);
}

std::string HostPort(absl::string_view host, int port) {
  return absl::StrContains(host, ':') ? absl::StrCat("[", host, "]:", port)
                                      : absl::StrCat(host, ":", port);
}

std::string AddressText(const Address& address) {
  return absl::StrCat(address.port, " ", address.host);
}

absl::StatusOr<Address> ParseAddress(absl::string_view text) {
  Address address;
  const size_t space = text.find(' ');
  if (space == absl::string_view::npos ||
      !absl::SimpleAtoi(text.substr(0, space), &address.port)) {
    return absl::DataLossError("no address");
  }
  address.host = std::string(text.substr(space + 1));
  return address;
}

absl::StatusOr<Socket> ListenAt(Env* env, absl::string_view host, int port,
                                absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(const AddressList addresses,
                       Resolve(env, host, port, deadline));
  absl::Status last;
  for (const addrinfo* a = addresses.get(); a != nullptr; a = a->ai_next) {
    Socket listener = NewSocket(a->ai_family, SOCK_STREAM);
    if (!listener.valid()) {
      last = absl::ErrnoToStatus(errno, "socket");
      continue;
    }
    // A port whose former connections have not timed out yet is free.
    const int on = 1;
    setsockopt(listener.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (bind(listener.fd(), a->ai_addr, a->ai_addrlen) == 0 &&
        listen(listener.fd(), kBacklog) == 0) {
      return listener;
    }
    const std::string where = absl::StrCat("listen at ", HostPort(host, port));
    switch (errno) {
      case EADDRINUSE:
        last = absl::FailedPreconditionError(
            absl::StrCat(where, ": the port is in use"));
        break;
      case EADDRNOTAVAIL:
        last = absl::FailedPreconditionError(
            absl::StrCat(where, ": this host does not have that address"));
        break;
      default:
        last = absl::ErrnoToStatus(errno, where);
    }
  }
  return last;
}

absl::StatusOr<Socket> AdoptListener(int fd) {
  Socket listener(fcntl(fd, F_DUPFD_CLOEXEC, 3));
  if (!listener.valid()) {
    return absl::ErrnoToStatus(errno, absl::StrCat("descriptor ", fd));
  }
  int listening = 0;
  socklen_t size = sizeof(listening);
  if (getsockopt(listener.fd(), SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) !=
          0 ||
      listening == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("descriptor ", fd, " is not a listening socket"));
  }
  fcntl(listener.fd(), F_SETFL, fcntl(listener.fd(), F_GETFL) | O_NONBLOCK);
  return listener;
}

absl::StatusOr<Socket> AcceptFrom(const Socket& listener) {
  while (true) {
    Socket connection(
        accept4(listener.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (connection.valid()) {
      Prepare(connection);
      return connection;
    }
    switch (errno) {
      case EINTR:
      case ECONNABORTED:
        continue;
      case EAGAIN:
        return connection;
      default:
        return absl::ErrnoToStatus(errno, "accept");
    }
  }
}

absl::StatusOr<Socket> ConnectOnce(Env* env, absl::string_view host, int port,
                                   absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(const AddressList addresses,
                       Resolve(env, host, port, deadline));
  absl::Status status;
  for (const addrinfo* a = addresses.get(); a != nullptr; a = a->ai_next) {
    Socket connection;
    status = TryConnect(env, *a, deadline, connection);
    if (status.ok()) return connection;
  }
  // Of this process, and no matter of who listens.
  if (absl::IsResourceExhausted(status)) return status;
  return absl::UnavailableError(status.message());
}

absl::StatusOr<Socket> ConnectTo(Env* env, absl::string_view host, int port,
                                 absl::Time deadline) {
  const absl::Time start = env->Now();
  absl::Duration pause = kFirstRetry;
  while (true) {
    // A name may become known while the job starts.
    absl::StatusOr<Socket> connection = ConnectOnce(env, host, port, deadline);
    if (connection.ok() || absl::IsResourceExhausted(connection.status())) {
      return connection;
    }
    if (env->Now() + pause >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("nobody answers at ", HostPort(host, port), " within ",
                       DurationText(deadline - start), " (",
                       connection.status().message(), ")"));
    }
    env->SleepUntil(env->Now() + pause);
    pause = std::min(2 * pause, kLastRetry);
  }
}

absl::StatusOr<std::string> AddressTowards(Env* env, absl::string_view host,
                                           absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(const AddressList addresses,
                       Resolve(env, host, 9, deadline));
  for (const addrinfo* a = addresses.get(); a != nullptr; a = a->ai_next) {
    // Connecting a datagram socket sends nothing; it only picks a route.
    const Socket probe = NewSocket(a->ai_family, SOCK_DGRAM);
    if (!probe.valid() && (errno == EMFILE || errno == ENFILE)) {
      return absl::ErrnoToStatus(errno, "socket");
    }
    if (probe.valid() && connect(probe.fd(), a->ai_addr, a->ai_addrlen) == 0) {
      return probe.LocalHost();
    }
  }
  return absl::UnavailableError(
      absl::StrCat("there is no route to \"", host, "\""));
}

bool IsConnectedToItself(const Socket& connection) {
  sockaddr_storage ends[2] = {};
  socklen_t sizes[2] = {sizeof(ends[0]), sizeof(ends[1])};
  return getsockname(connection.fd(), reinterpret_cast<sockaddr*>(&ends[0]),
                     &sizes[0]) == 0 &&
         getpeername(connection.fd(), reinterpret_cast<sockaddr*>(&ends[1]),
                     &sizes[1]) == 0 &&
         memcmp(&ends[0], &ends[1], sizeof(ends[0])) == 0;
}

Resolver SetResolverForTesting(Resolver resolver) {
  return resolver_for_testing.exchange(resolver);
}

}  // namespace dsd
