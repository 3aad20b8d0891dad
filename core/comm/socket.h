// SPDX-License-Identifier: Apache-2.0
//
// TCP sockets that never block: whoever must wait does so through Env::Poll.
// For this package and backends.

#ifndef DSD_CORE_COMM_SOCKET_H_
#define DSD_CORE_COMM_SOCKET_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

struct addrinfo;

namespace dsd {

class Env;

// Owns a file descriptor. Movable.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept;
  Socket& operator=(Socket&& other) noexcept;
  ~Socket() { Close(); }

  int fd() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  void Close();

  // Appends what has arrived to `buffer`, at most `max_bytes`. Returns false at
  // the end of the connection.
  absl::StatusOr<bool> ReadSome(std::string& buffer, size_t max_bytes);

  // Removes from the front of `buffer` what could be sent.
  absl::Status WriteSome(std::string& buffer);

  // Waits until all of `buffer` is sent.
  absl::Status WriteAll(Env* env, std::string buffer, absl::Time deadline);

  // Waits for exactly `bytes`. Unavailable if the connection ends before.
  absl::StatusOr<std::string> ReadExactly(Env* env, size_t bytes,
                                          absl::Time deadline);

  // The port this end is bound to.
  absl::StatusOr<int> LocalPort() const;
  // The number of the host at the other end or at this one, "10.0.0.1".
  absl::StatusOr<std::string> PeerHost() const;
  absl::StatusOr<std::string> LocalHost() const;

 private:
  int fd_ = -1;
};

// What wakes a thread out of Env::Poll. Thread-safe.
class Waker {
 public:
  static absl::StatusOr<Waker> Create();
  int fd() const { return socket_.fd(); }
  void Wake();
  void Clear();

 private:
  Socket socket_;
};

// A descriptor for nothing: closed, it makes room for one. Not valid if there
// is no room for it.
Socket SpareDescriptor();

// "host:port", with brackets around a numeric IPv6 host.
std::string HostPort(absl::string_view host, int port);

struct Address {
  std::string host;
  int port = 0;
};

// "<port> <host>", for stores.
std::string AddressText(const Address& address);
// DataLoss if it is none.
absl::StatusOr<Address> ParseAddress(absl::string_view text);

// Hosts are names or numbers. A name is looked up by the system, in a thread
// that is left to itself if it is not done at the deadline.

// Listens at `host` and nowhere else. Port 0: any. FailedPrecondition if the
// port is taken or the host is not this one.
absl::StatusOr<Socket> ListenAt(Env* env, absl::string_view host, int port,
                                absl::Time deadline);

// Takes over a listening socket inherited from the parent process; the original
// stays open.
absl::StatusOr<Socket> AdoptListener(int fd);

// The next connection; an invalid socket if there is none just now.
absl::StatusOr<Socket> AcceptFrom(const Socket& listener);

// Connects. Unavailable if nobody listens.
absl::StatusOr<Socket> ConnectOnce(Env* env, absl::string_view host, int port,
                                   absl::Time deadline);

// Connects, trying again while nobody listens. DeadlineExceeded names the last
// reason. If the other host vanishes without a word, the connection ends within
// a minute.
absl::StatusOr<Socket> ConnectTo(Env* env, absl::string_view host, int port,
                                 absl::Time deadline);

// The number of this host on the interface that leads to `host`.
absl::StatusOr<std::string> AddressTowards(Env* env, absl::string_view host,
                                           absl::Time deadline);

// Whether both ends of a connection are this one socket, as may happen to who
// connects to a free port of this host.
bool IsConnectedToItself(const Socket& connection);

// Stands in for getaddrinfo; null: the system's. Returns the one before.
using Resolver = int (*)(const char* host, const char* port,
                         const addrinfo* hints, addrinfo** found);
Resolver SetResolverForTesting(Resolver resolver);

}  // namespace dsd

#endif  // DSD_CORE_COMM_SOCKET_H_
