// SPDX-License-Identifier: Apache-2.0
//
// The store of a job whose ranks are processes: rank 0 serves it, all ranks
// (rank 0 too) are its clients. A client's connection lives as long as the
// process uses the store; its end without a goodbye is the death of its rank. A
// process that is stopped, or whose host vanishes without a word (power,
// cable), gives no sign of life any more, and is given up after a while.
//
// Of many ranks only some are connected to rank 0, and relay for the others, in
// all respects: the death of one that relays is what those whom it serves hear,
// too, and that of rank 0 is passed on.
//
// Without a token it trusts its network, as the libraries under it do: whoever
// can reach the port can take part. With one, both ends of a connection prove
// that they know it before anything else is said; what is said then is neither
// encrypted nor signed.

#ifndef DSD_CORE_COMM_TCP_STORE_H_
#define DSD_CORE_COMM_TCP_STORE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "dsd/core/comm/store.h"

namespace dsd {

class Env;

struct TcpStoreServerOptions {
  // A name or number of this host: where it listens, and nowhere else.
  std::string host = "127.0.0.1";
  int port = 0;  // 0: any free one, see port()
  // A listening socket to use instead, or -1. It stays open.
  int listen_fd = -1;
  // Clients of another job are refused.
  std::string job_id;
  // Clients of another generation of the job come too early or too late.
  uint64_t generation = 0;
  // Clients that do not know it are refused. Empty: none is asked for.
  std::string token;
  // How long a connection may take to greet. Of those who have not yet, few are
  // kept: beyond, the oldest goes.
  absl::Duration greeting_patience = absl::Seconds(20);
  // Who gives no sign of life for so long is given up, on all connections, by
  // both sides; zero: nobody is. The threads of the store give the signs,
  // whatever else a process does.
  absl::Duration heartbeat_bound = absl::Seconds(30);
  // When this group has dissolved, no new clients are accepted: they mean the
  // next server at this address. May be empty.
  std::string last_group;
  // Of the clients with TcpStoreOptions::may_relay, those of ranks n, 2n, ...
  // serve the ranks up to the next of them; only the others, and the first n,
  // are served here. 0: all are.
  int fan_out = 0;
};

// Serves from a thread of its own. The destructor delivers what is under way
// (within a second) and closes all connections.
class TcpStoreServer {
 public:
  // Errors: FailedPrecondition if the port is in use or `host` is another host;
  // Unavailable, DeadlineExceeded if `host` is a name that nobody knows;
  // ResourceExhausted without a descriptor or a thread.
  static absl::StatusOr<std::unique_ptr<TcpStoreServer>> Start(
      Env* env, const TcpStoreServerOptions& options, absl::Time deadline);
  ~TcpStoreServer();

  int port() const;

 private:
  class Impl;
  explicit TcpStoreServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

struct TcpStoreOptions {
  std::string host = "127.0.0.1";
  int port = 0;
  std::string job_id;
  uint64_t generation = 0;
  // A server that does not know it is refused. Empty: none is asked for.
  std::string token;
  int rank = 0;  // of the client, for error texts
  // Whether the server may let this client relay for others, or send it to one
  // that does; of a rank that is no other client's. A relay that cannot be
  // reached in half of the time is done without.
  bool may_relay = false;
  // If not, it is Unavailable that nobody serves, or the job's store of another
  // generation.
  bool wait_for_server = true;
};

// Connects, waiting until somebody serves. Errors: DeadlineExceeded;
// ResourceExhausted if who serves has no descriptors left by then, or this
// process has none, or no thread; FailedPrecondition if what answers is no
// store of this version or of another job; PermissionDenied if the two ends do
// not have the same token.
absl::StatusOr<std::shared_ptr<Store>> ConnectTcpStore(
    Env* env, const TcpStoreOptions& options, absl::Time deadline);

// The client, with a server that serves as long as it is used.
std::shared_ptr<Store> MakeServedStore(std::shared_ptr<void> server,
                                       std::shared_ptr<Store> client);

}  // namespace dsd

#endif  // DSD_CORE_COMM_TCP_STORE_H_
