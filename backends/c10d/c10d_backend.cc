// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/c10d/c10d_backend.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/zeros.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/job_token.h"
#include "dsd/core/comm/tcp_store.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "torch/csrc/distributed/c10d/Backend.hpp"
#include "torch/csrc/distributed/c10d/ProcessGroup.hpp"

namespace dsd {
namespace {

constexpr char kLoopback[] = "127.0.0.1";
constexpr int64_t kMaxGreetingBytes = 1024;

struct Context {
  c10::intrusive_ptr<c10d::Backend> group;
};

absl::StatusOr<std::unique_ptr<Engine>> CreateC10d(
    const EngineOptions& options) {
  if (options.context == nullptr) {
    return absl::FailedPreconditionError(
        "backend \"c10d\" works over a process group: use "
        "ConnectOverProcessGroup (dsd/backends/c10d/c10d_backend.h)");
  }
  return MakeC10dEngine(
      options, std::static_pointer_cast<Context>(options.context)->group);
}

constexpr BackendDescriptor kDescriptor = {
    /*name=*/"c10d",      kEngineApiVersion,
    /*host_memory=*/true, /*cuda_memory=*/false,
    /*in_process=*/false, &CreateC10d};

// Rank 0's text, or its error, to all.
absl::StatusOr<std::string> Greet(c10d::Backend& group,
                                  const absl::StatusOr<std::string>& mine,
                                  absl::Duration timeout) {
  at::Tensor greeting = at::zeros({kMaxGreetingBytes}, at::kByte);
  if (group.getRank() == 0) {
    std::string text =
        mine.ok() ? absl::StrCat("ok ", *mine)
                  : absl::StrCat("no ", static_cast<int>(mine.status().code()),
                                 " ", mine.status().message());
    text.resize(std::min<size_t>(text.size(), kMaxGreetingBytes - 1));
    std::memcpy(greeting.mutable_data_ptr<uint8_t>(), text.data(), text.size());
  }
  const absl::StatusOr<bool> came = TorchToStatus([&] {
    std::vector<at::Tensor> tensors = {greeting};
    c10d::BroadcastOptions options;
    options.timeout = absl::ToChronoMilliseconds(timeout);
    return group.broadcast(tensors, options)->wait();
  });
  if (!mine.ok()) return mine.status();
  if (!came.ok() || !*came) {
    return absl::DeadlineExceededError(absl::StrCat(
        "no broadcast through the process group within ",
        absl::FormatDuration(timeout), ": ", came.status().message()));
  }
  const std::string text(
      reinterpret_cast<const char*>(greeting.const_data_ptr<uint8_t>()));
  if (text.rfind("ok ", 0) == 0) return text.substr(3);
  const std::vector<std::string> parts =
      absl::StrSplit(text, absl::MaxSplits(' ', 2));
  int code = 0;
  if (parts.size() != 3 || parts[0] != "no" ||
      !absl::SimpleAtoi(parts[1], &code)) {
    return absl::InternalError(
        "rank 0 sent something else through the process group; all ranks must "
        "connect over it at the same time");
  }
  return absl::Status(static_cast<absl::StatusCode>(code), parts[2]);
}

// Clients of one store: rank 0 serves it as long as it is used.
absl::StatusOr<std::shared_ptr<Store>> FindStore(
    c10d::Backend& group, const ProcessGroupOptions& options,
    absl::Time deadline) {
  std::unique_ptr<TcpStoreServer> server;
  absl::StatusOr<std::string> address = "";
  if (group.getRank() == 0) {
    TcpStoreServerOptions server_options;
    const char* const master = getenv("MASTER_ADDR");
    server_options.host = !options.store_host.empty() ? options.store_host
                          : master != nullptr && *master != '\0' ? master
                                                                 : kLoopback;
    // The group is a channel of its own to tell it.
    server_options.token = absl::BytesToHexString(NewNonce(options.env));
    server_options.heartbeat_bound = options.heartbeat_bound;
    absl::StatusOr<std::unique_ptr<TcpStoreServer>> started =
        TcpStoreServer::Start(options.env, server_options, deadline);
    if (started.ok()) {
      server = *std::move(started);
      address = absl::StrCat(server->port(), " ", server_options.token, " ",
                             server_options.host);
    } else {
      address = Annotate(
          started.status(),
          absl::StrCat("serve the store of rank 0 at ", server_options.host));
    }
  }
  DSD_ASSIGN_OR_RETURN(const std::string shared,
                       Greet(group, address, deadline - options.env->Now()));
  const std::vector<std::string> parts =
      absl::StrSplit(shared, absl::MaxSplits(' ', 2));
  TcpStoreOptions client;
  if (parts.size() != 3 || !absl::SimpleAtoi(parts[0], &client.port)) {
    return absl::InternalError("rank 0 sent no address");
  }
  client.token = parts[1];
  client.host = parts[2];
  client.rank = group.getRank();
  absl::StatusOr<std::shared_ptr<Store>> store =
      ConnectTcpStore(options.env, client, deadline);
  if (!store.ok()) {
    return Annotate(store.status(),
                    "ProcessGroupOptions::store_host or MASTER_ADDR must be a "
                    "name of rank 0's host that all ranks reach");
  }
  if (server == nullptr) return store;
  return MakeServedStore(std::move(server), *std::move(store));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> ConnectOverProcessGroup(
    const c10::intrusive_ptr<c10d::Backend>& group,
    const ProcessGroupOptions& options) {
  if (group == nullptr || options.env == nullptr) {
    return absl::InvalidArgumentError(
        "ConnectOverProcessGroup: the process group or env is null");
  }
  CommunicatorOptions comm;
  comm.rank = group->getRank();
  comm.world_size = group->getSize();
  comm.descriptor = &kDescriptor;
  comm.env = options.env;
  comm.group = options.group;
  if (comm.world_size > 1) {
    auto context = std::make_shared<Context>();
    context->group = group;
    comm.backend_context = std::move(context);
    const absl::Time deadline = options.env->Now() + options.connect_timeout;
    absl::StatusOr<std::shared_ptr<Store>> store =
        FindStore(*group, options, deadline);
    if (!store.ok()) {
      return Annotate(store.status(),
                      absl::StrCat("connect over a process group on rank ",
                                   comm.rank, " of ", comm.world_size));
    }
    comm.store = *std::move(store);
    comm.connect_timeout = deadline - options.env->Now();
  }
  return Communicator::Create(comm);
}

absl::StatusOr<std::unique_ptr<Communicator>> ConnectOverProcessGroup(
    const c10::intrusive_ptr<c10d::ProcessGroup>& group,
    const ProcessGroupOptions& options) {
  if (group == nullptr) {
    return absl::InvalidArgumentError(
        "ConnectOverProcessGroup: the process group is null");
  }
  const absl::StatusOr<c10::intrusive_ptr<c10d::Backend>> backend =
      TorchToStatus([&] { return group->getBackend(c10::DeviceType::CPU); });
  if (!backend.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "ConnectOverProcessGroup: the process group has no backend for host "
        "memory, such as Gloo: ",
        backend.status().message()));
  }
  return ConnectOverProcessGroup(*backend, options);
}

}  // namespace dsd
