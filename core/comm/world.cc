// SPDX-License-Identifier: Apache-2.0

#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/c10d_store_client.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/job_token.h"
#include "dsd/core/comm/registry.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/tcp_store.h"

namespace dsd {
namespace {

constexpr char kGroup[] = "world";

// Rank 0's store is served as long as it is used.
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

struct Address {
  std::string host;
  int port;
};

// Leaves the address of the store with torchrun's agent, or finds it there.
absl::StatusOr<Address> ShareAddress(const LaunchInfo& launch, Env* env,
                                     const std::string& key, Address address,
                                     absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(C10dStoreClient agent,
                       C10dStoreClient::Connect(env, launch.master_addr,
                                                launch.master_port, deadline));
  if (launch.rank == 0) {
    DSD_RETURN_IF_ERROR(agent.Set(
        key, absl::StrCat(address.port, " ", address.host), deadline));
    return address;
  }
  DSD_ASSIGN_OR_RETURN(const std::string value, agent.Get(key, deadline));
  const size_t space = value.find(' ');
  if (space == std::string::npos ||
      !absl::SimpleAtoi(value.substr(0, space), &address.port)) {
    return absl::DataLossError(absl::StrCat(
        "key \"", key, "\" of the agent's store holds no address"));
  }
  address.host = value.substr(space + 1);
  return address;
}

absl::StatusOr<std::shared_ptr<Store>> FindStore(const LaunchInfo& launch,
                                                 const WorldOptions& options,
                                                 absl::Time deadline) {
  Env* const env = options.env;
  // Counts the worlds of this process: the agent's store outlives each of them.
  static std::atomic<int> worlds{0};
  const int number = worlds.fetch_add(1);

  Address address = {launch.master_addr, launch.master_port};
  std::unique_ptr<TcpStoreServer> server;
  DSD_ASSIGN_OR_RETURN(const std::string token, FindToken(env, launch));
  if (launch.rank == 0) {
    TcpStoreServerOptions server_options;
    server_options.host = launch.master_addr;
    server_options.port = launch.master_port;
    server_options.listen_fd = launch.listen_fd;
    server_options.job_id = launch.job_id;
    server_options.token = token;
    server_options.heartbeat_bound =
        launch.heartbeat_bound.value_or(options.heartbeat_bound);
    server_options.last_group = absl::StrCat(kGroup, "#0");
    if (launch.agent_store) {
      DSD_ASSIGN_OR_RETURN(server_options.host,
                           AddressTowards(env, launch.master_addr, deadline));
      server_options.port = 0;
    }
    absl::StatusOr<std::unique_ptr<TcpStoreServer>> started =
        TcpStoreServer::Start(env, server_options, deadline);
    if (!started.ok()) {
      return Annotate(started.status(),
                      absl::StrCat("serve the store of rank 0 at MASTER_ADDR ",
                                   launch.master_addr, ", MASTER_PORT ",
                                   launch.master_port));
    }
    server = *std::move(started);
    address = {server_options.host, server->port()};
  }
  if (launch.agent_store) {
    const absl::StatusOr<Address> shared = ShareAddress(
        launch, env,
        absl::StrCat("/dsd/", launch.job_id, "/", number, "/store"),
        std::move(address), deadline);
    if (!shared.ok()) {
      return Annotate(
          shared.status(),
          absl::StrCat("find the store of rank 0 through torchrun's agent at ",
                       HostPort(launch.master_addr, launch.master_port)));
    }
    address = *shared;
  }
  TcpStoreOptions client_options;
  client_options.host = address.host;
  client_options.port = address.port;
  client_options.job_id = launch.job_id;
  client_options.token = token;
  client_options.rank = launch.rank;
  DSD_ASSIGN_OR_RETURN(std::shared_ptr<Store> client,
                       ConnectTcpStore(env, client_options, deadline));
  if (server == nullptr) return client;
  return std::make_shared<ServedStore>(std::move(server), std::move(client));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> ConnectWorld(
    const LaunchInfo& launch, const WorldOptions& options) {
  if (options.env == nullptr) {
    return absl::InvalidArgumentError("ConnectWorld: env is null");
  }
  CommunicatorOptions comm;
  comm.rank = launch.rank;
  comm.world_size = launch.world_size;
  comm.backend = options.backend;
  comm.descriptor = options.descriptor;
  comm.env = options.env;
  comm.group = kGroup;
  comm.bind_address = options.bind_address;
  if (launch.world_size > 1) {
    // Before the others are kept waiting.
    if (comm.descriptor == nullptr) {
      DSD_ASSIGN_OR_RETURN(comm.descriptor, FindBackend(comm.backend));
    }
    const absl::Time deadline = options.env->Now() + options.connect_timeout;
    absl::StatusOr<std::shared_ptr<Store>> store =
        FindStore(launch, options, deadline);
    if (!store.ok()) {
      return Annotate(store.status(),
                      absl::StrCat("connect on rank ", launch.rank, " of ",
                                   launch.world_size));
    }
    comm.store = *std::move(store);
    comm.connect_timeout = deadline - options.env->Now();
  }
  return Communicator::Create(comm);
}

}  // namespace dsd
