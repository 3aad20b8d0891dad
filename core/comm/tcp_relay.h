// SPDX-License-Identifier: Apache-2.0
//
// Serves the store to some ranks on behalf of rank 0, over one connection to
// it. Private to this package.

#ifndef DSD_CORE_COMM_TCP_RELAY_H_
#define DSD_CORE_COMM_TCP_RELAY_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/tcp_store.h"

namespace dsd {

class Env;

// The rank that relays is a client of its own relay, too.
class TcpRelay {
 public:
  // `server`: on which this client (`options`) was welcomed as a relay.
  // `heartbeat_bound`: the server's.
  static absl::StatusOr<std::unique_ptr<TcpRelay>> Start(
      Env* env, const TcpStoreOptions& options, Socket server,
      absl::Duration heartbeat_bound, absl::Time deadline);
  // Passes on what is under way, in both directions (within a second).
  ~TcpRelay();

  // On the interface towards the server.
  const Address& address() const;

 private:
  class Impl;
  explicit TcpRelay(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsd

#endif  // DSD_CORE_COMM_TCP_RELAY_H_
