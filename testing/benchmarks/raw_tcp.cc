// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/benchmarks/raw_tcp.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {

absl::StatusOr<RawTcp> RawTcp::Connect(Communicator& comm, int a, int b) {
  Env* const env = comm.env();
  const absl::Time deadline = env->Now() + absl::Seconds(30);
  int64_t port = 0;
  Socket listener;
  if (comm.rank() == a) {
    DSD_ASSIGN_OR_RETURN(listener, ListenAt(env, "127.0.0.1", 0, deadline));
    DSD_ASSIGN_OR_RETURN(port, listener.LocalPort());
  }
  DSD_RETURN_IF_ERROR(comm.Broadcast(
      absl::MakeSpan(reinterpret_cast<std::byte*>(&port), sizeof(port)), a));
  RawTcp raw;
  if (comm.rank() == b) {
    DSD_ASSIGN_OR_RETURN(raw.socket_,
                         ConnectTo(env, "127.0.0.1", port, deadline));
  }
  while (comm.rank() == a && !raw.socket_.valid()) {
    DSD_ASSIGN_OR_RETURN(raw.socket_, AcceptFrom(listener));
  }
  return raw;
}

absl::Status RawTcp::Exchange(std::vector<Stream> streams) {
  constexpr size_t kCallBytes = size_t{1} << 20;
  constexpr int kWaitMilliseconds = 10000;
  std::vector<pollfd> waits;
  while (true) {
    waits.clear();
    bool moved = false;
    for (Stream& stream : streams) {
      const int fd = stream.connection->socket_.fd();
      if (!stream.send.empty()) {
        const ssize_t sent =
            ::send(fd, stream.send.data(),
                   std::min(stream.send.size(), kCallBytes), MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) {
          return absl::UnavailableError("the TCP connection failed");
        }
        if (sent > 0) stream.send.remove_prefix(sent);
        moved |= sent > 0;
      }
      if (!stream.receive.empty()) {
        const ssize_t received =
            ::recv(fd, stream.receive.data(),
                   std::min(stream.receive.size(), kCallBytes), 0);
        if (received == 0 || (received < 0 && errno != EAGAIN)) {
          return absl::UnavailableError("the TCP connection failed");
        }
        if (received > 0) stream.receive.remove_prefix(received);
        moved |= received > 0;
      }
      const int events = (stream.send.empty() ? 0 : POLLOUT) |
                         (stream.receive.empty() ? 0 : POLLIN);
      if (events != 0) waits.push_back({fd, static_cast<short>(events), 0});
    }
    if (waits.empty()) return absl::OkStatus();
    if (!moved && poll(waits.data(), waits.size(), kWaitMilliseconds) <= 0) {
      return absl::DeadlineExceededError("the TCP connections stand still");
    }
  }
}

}  // namespace dsd
