// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/benchmarks/raw_tcp.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdint>

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

absl::Status RawTcp::Exchange(absl::Span<const std::byte> send,
                              absl::Span<std::byte> receive) {
  constexpr size_t kCallBytes = size_t{1} << 20;
  constexpr int kWaitMilliseconds = 10000;
  while (!send.empty() || !receive.empty()) {
    ssize_t sent = 0;
    ssize_t received = 0;
    if (!send.empty()) {
      sent = ::send(socket_.fd(), send.data(),
                    std::min(send.size(), kCallBytes), MSG_NOSIGNAL);
      if (sent < 0 && errno != EAGAIN) {
        return absl::UnavailableError("the TCP connection failed");
      }
      if (sent > 0) send.remove_prefix(sent);
    }
    if (!receive.empty()) {
      received = ::recv(socket_.fd(), receive.data(),
                        std::min(receive.size(), kCallBytes), 0);
      if (received == 0 || (received < 0 && errno != EAGAIN)) {
        return absl::UnavailableError("the TCP connection failed");
      }
      if (received > 0) receive.remove_prefix(received);
    }
    if (sent > 0 || received > 0) continue;
    const int events =
        (send.empty() ? 0 : POLLOUT) | (receive.empty() ? 0 : POLLIN);
    pollfd fd = {socket_.fd(), static_cast<short>(events), 0};
    if (events != 0 && poll(&fd, 1, kWaitMilliseconds) <= 0) {
      return absl::DeadlineExceededError("the TCP connection stands still");
    }
  }
  return absl::OkStatus();
}

}  // namespace dsd
