// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/rebuild.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator_internal.h"
#include "dsd/core/comm/job_token.h"

namespace dsd {
namespace {

constexpr int64_t kMaxAddressBytes = 300;
// How often it is looked whether a rank that has not come is still there.
constexpr absl::Duration kLook = absl::Milliseconds(50);
constexpr char kRollKey[] = "roll";

std::string KeyOf(int rank) { return absl::StrCat(kRollKey, "/", rank); }

// One attempt to bring together those who are left.
class RollCall {
 public:
  RollCall(const Standby& standby, uint64_t generation,
           const RebuildOptions& options, absl::Time deadline)
      : standby_(standby),
        env_(standby.options.env),
        rank_(standby.launch.rank),
        size_(static_cast<int>(standby.ranks.size())),
        generation_(generation),
        options_(options),
        deadline_(deadline) {}

  absl::StatusOr<Roll> Run() {
    DSD_ASSIGN_OR_RETURN(token_, FindToken(env_, standby_.launch));
    DSD_ASSIGN_OR_RETURN(const std::shared_ptr<Store> store, FindStore());
    if (server_ != nullptr) {
      DSD_RETURN_IF_ERROR(Call(*store));
    } else {
      DSD_RETURN_IF_ERROR(store->Set(KeyOf(rank_), "", deadline_));
    }
    Roll roll;
    DSD_ASSIGN_OR_RETURN(const std::string text,
                         store->Get(kRollKey, deadline_));
    for (const absl::string_view field : absl::StrSplit(text, ' ')) {
      int rank;
      if (!absl::SimpleAtoi(field, &rank)) {
        return absl::DataLossError("the roll is no list of ranks");
      }
      roll.ranks.push_back(rank);
    }
    const auto place = absl::c_find(roll.ranks, rank_);
    if (place == roll.ranks.end()) {
      return absl::UnavailableError(absl::StrCat(
          "rank ", rank_, " came too late: ranks ", text, " go on"));
    }
    const int least =
        options_.min_ranks > 0 ? options_.min_ranks : size_ / 2 + 1;
    if (static_cast<int>(roll.ranks.size()) < least) {
      return absl::FailedPreconditionError(absl::StrCat(
          roll.ranks.size(), " of ", size_, " ranks are left (", text,
          "), expected at least ", least, ", see RebuildOptions::min_ranks"));
    }
    if (roll.ranks.size() == 1) return roll;
    // A connection of its own, for the number that the rank has from now on.
    TcpStoreOptions client = ClientOf(server_rank_);
    client.rank = static_cast<int>(place - roll.ranks.begin());
    client.may_relay = true;
    DSD_ASSIGN_OR_RETURN(roll.store, ConnectTcpStore(env_, client, deadline_));
    if (server_ != nullptr) {
      roll.store = MakeServedStore(std::move(server_), std::move(roll.store));
    }
    return roll;
  }

 private:
  TcpStoreOptions ClientOf(int server) const {
    TcpStoreOptions options;
    options.host = standby_.ranks[server].host;
    options.port = standby_.ranks[server].port;
    options.job_id = standby_.launch.job_id;
    options.generation = generation_;
    options.token = token_;
    options.rank = rank_;
    options.wait_for_server = false;
    return options;
  }

  // That of the lowest rank that is left, or this rank's own.
  absl::StatusOr<std::shared_ptr<Store>> FindStore() {
    for (int other = 0; other < rank_; ++other) {
      // Answers when it has failed, too, and serves; ends if it dies first.
      absl::StatusOr<std::shared_ptr<Store>> store =
          ConnectTcpStore(env_, ClientOf(other),
                          std::min(deadline_, env_->Now() + options_.patience));
      server_rank_ = other;
      if (store.ok() || (!absl::IsUnavailable(store.status()) &&
                         !absl::IsDeadlineExceeded(store.status()))) {
        return store;
      }
      if (env_->Now() >= deadline_) return store.status();
    }
    TcpStoreServerOptions options;
    options.host = standby_.ranks[rank_].host;
    options.listen_fd = standby_.listener.fd();
    options.job_id = standby_.launch.job_id;
    options.generation = generation_;
    options.token = token_;
    options.heartbeat_bound = standby_.launch.heartbeat_bound.value_or(
        standby_.options.heartbeat_bound);
    options.last_group = absl::StrCat(kWorldGroup, "#", generation_);
    // How many will be left is not known yet.
    DSD_ASSIGN_OR_RETURN(
        options.fan_out,
        ControlFanOut(standby_.launch, standby_.options, size_));
    DSD_ASSIGN_OR_RETURN(server_,
                         TcpStoreServer::Start(env_, options, deadline_));
    server_rank_ = rank_;
    return ConnectTcpStore(env_, ClientOf(rank_), deadline_);
  }

  // Waits for each higher rank until it comes, or is found dead, or the
  // patience is over; then says who is there.
  absl::Status Call(Store& store) {
    const absl::Time end = std::min(deadline_, env_->Now() + options_.patience);
    std::vector<int> here = {rank_};
    for (int other = rank_ + 1; other < size_; ++other) {
      // Nobody serves it; it ends with the process.
      absl::StatusOr<Socket> watch = ConnectOnce(
          env_, standby_.ranks[other].host, standby_.ranks[other].port, end);
      bool alive = watch.ok();
      while (true) {
        const absl::Status came =
            store.Get(KeyOf(other), env_->Now() + kLook).status();
        if (came.ok()) {
          here.push_back(other);
          break;
        }
        if (!absl::IsDeadlineExceeded(came)) return came;
        if (!alive || env_->Now() >= end) break;
        // If not, a last look: it may have come and gone on.
        std::string nothing;
        const absl::StatusOr<bool> open = watch->ReadSome(nothing, 1);
        alive = open.ok() && *open;
      }
    }
    return store.Set(kRollKey, absl::StrJoin(here, " "), deadline_);
  }

  const Standby& standby_;
  Env* const env_;
  const int rank_;
  const int size_;
  const uint64_t generation_;
  const RebuildOptions& options_;
  const absl::Time deadline_;
  std::string token_;
  int server_rank_ = 0;
  std::unique_ptr<TcpStoreServer> server_;  // null: another rank's
};

}  // namespace

absl::StatusOr<int> ControlFanOut(const LaunchInfo& launch,
                                  const WorldOptions& options, int world_size) {
  const int least = launch.control_fan_out.value_or(options.control_fan_out);
  if (least < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("WorldOptions::control_fan_out is ", least,
                     ", expected a number of ranks, or 0 for all"));
  }
  if (least == 0 || world_size <= least) return 0;
  // Where neither rank 0 nor those who relay have more than needed.
  return std::max(least, static_cast<int>(std::ceil(std::sqrt(world_size))));
}

absl::StatusOr<std::unique_ptr<Standby>> MakeStandby(
    Communicator& comm, const Store& store, const LaunchInfo& launch,
    const WorldOptions& options, absl::Time deadline) {
  auto standby = std::make_unique<Standby>();
  standby->launch = launch;
  standby->options = options;
  // Where the others reach this rank, and no other interface.
  Address own;
  DSD_ASSIGN_OR_RETURN(
      own.host, AddressTowards(options.env, store.server_host(), deadline));
  DSD_ASSIGN_OR_RETURN(standby->listener,
                       ListenAt(options.env, own.host, 0, deadline));
  DSD_ASSIGN_OR_RETURN(own.port, standby->listener.LocalPort());
  CallOptions call;
  call.timeout = deadline - options.env->Now();
  DSD_ASSIGN_OR_RETURN(
      const std::vector<std::string> all,
      comm.AllGatherBlobs(AddressText(own), kMaxAddressBytes, call));
  for (const std::string& text : all) {
    DSD_ASSIGN_OR_RETURN(Address address, ParseAddress(text));
    standby->ranks.push_back(std::move(address));
  }
  return standby;
}

absl::StatusOr<Roll> CallRoll(const Standby& standby, uint64_t generation,
                              const RebuildOptions& options,
                              absl::Time deadline) {
  return RollCall(standby, generation, options, deadline).Run();
}

absl::StatusOr<std::unique_ptr<Communicator>> Communicator::Rebuild(
    const RebuildOptions& options) {
  Core& core = *lane_->core;
  const std::string where = absl::StrCat("Rebuild ", core.Here());
  if (core.standby == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(
        where, ": it was not connected with WorldOptions::may_rebuild"));
  }
  if (core.status().ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat(where, ": it has not failed"));
  }
  Standby& standby = *core.standby;
  const absl::Time deadline = core.env->Now() + options.timeout;
  const uint64_t generation = core.generation + ++standby.attempts;
  absl::StatusOr<Roll> roll = CallRoll(standby, generation, options, deadline);
  if (!roll.ok()) return Annotate(roll.status(), where);

  LaunchInfo launch = standby.launch;
  launch.rank = static_cast<int>(absl::c_find(roll->ranks, core.rank) -
                                 roll->ranks.begin());
  launch.world_size = static_cast<int>(roll->ranks.size());
  WorldOptions world = standby.options;
  world.generation = generation;
  absl::StatusOr<std::unique_ptr<Communicator>> next =
      ConnectThrough(roll->store, launch, world, deadline);
  if (!next.ok()) return Annotate(next.status(), where);
  return next;
}

absl::StatusOr<std::unique_ptr<Communicator>> Communicator::ConnectThrough(
    std::shared_ptr<Store> store, const LaunchInfo& launch,
    const WorldOptions& options, absl::Time deadline) {
  CommunicatorOptions comm_options;
  comm_options.rank = launch.rank;
  comm_options.world_size = launch.world_size;
  comm_options.backend = options.backend;
  comm_options.descriptor = options.descriptor;
  comm_options.env = options.env;
  comm_options.store = store;
  comm_options.group = kWorldGroup;
  comm_options.generation = options.generation;
  comm_options.bind_address = options.bind_address;
  comm_options.host = launch.host.empty() ? options.host : launch.host;
  comm_options.connect_timeout = deadline - options.env->Now();
  DSD_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> comm,
                       Create(comm_options));
  if (options.may_rebuild && launch.world_size > 1) {
    DSD_ASSIGN_OR_RETURN(comm->lane_->core->standby,
                         MakeStandby(*comm, *store, launch, options, deadline));
  }
  return comm;
}

}  // namespace dsd
