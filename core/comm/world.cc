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
#include "dsd/core/comm/rebuild.h"
#include "dsd/core/comm/registry.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/tcp_store.h"

namespace dsd {
namespace {

// Leaves the address of the store with torchrun's agent, or finds it there.
absl::StatusOr<Address> ShareAddress(const LaunchInfo& launch, Env* env,
                                     const std::string& key, Address address,
                                     absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(C10dStoreClient agent,
                       C10dStoreClient::Connect(env, launch.master_addr,
                                                launch.master_port, deadline));
  if (launch.rank == 0) {
    DSD_RETURN_IF_ERROR(agent.Set(key, AddressText(address), deadline));
    return address;
  }
  DSD_ASSIGN_OR_RETURN(const std::string value, agent.Get(key, deadline));
  absl::StatusOr<Address> found = ParseAddress(value);
  if (!found.ok()) {
    return Annotate(found.status(),
                    absl::StrCat("key \"", key, "\" of the agent's store"));
  }
  return found;
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
    server_options.generation = options.generation;
    server_options.token = token;
    server_options.heartbeat_bound =
        launch.heartbeat_bound.value_or(options.heartbeat_bound);
    server_options.last_group =
        absl::StrCat(kWorldGroup, "#", options.generation);
    DSD_ASSIGN_OR_RETURN(server_options.fan_out,
                         ControlFanOut(launch, options, launch.world_size));
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
  client_options.generation = options.generation;
  client_options.token = token;
  client_options.rank = launch.rank;
  client_options.may_relay = true;
  DSD_ASSIGN_OR_RETURN(std::shared_ptr<Store> client,
                       ConnectTcpStore(env, client_options, deadline));
  if (server == nullptr) return client;
  return MakeServedStore(std::move(server), std::move(client));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> ConnectWorld(
    const LaunchInfo& launch, const WorldOptions& options) {
  if (options.env == nullptr) {
    return absl::InvalidArgumentError("ConnectWorld: env is null");
  }
  WorldOptions world = options;
  const absl::Time deadline = options.env->Now() + options.connect_timeout;
  std::shared_ptr<Store> store;
  if (launch.world_size > 1) {
    // Before the others are kept waiting.
    if (world.descriptor == nullptr) {
      DSD_ASSIGN_OR_RETURN(world.descriptor, FindBackend(world.backend));
    }
    absl::StatusOr<std::shared_ptr<Store>> found =
        FindStore(launch, options, deadline);
    if (!found.ok()) {
      return Annotate(found.status(),
                      absl::StrCat("connect on rank ", launch.rank, " of ",
                                   launch.world_size));
    }
    store = *std::move(found);
  }
  return Communicator::ConnectThrough(std::move(store), launch, world,
                                      deadline);
}

}  // namespace dsd
