// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/tcp_relay.h"

#include <cstdint>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/memory/memory.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/reception.h"
#include "dsd/core/comm/store_protocol.h"

namespace dsd {

// A channel has the number of the client's connection.
class TcpRelay::Impl final : public Reception::Host {
 public:
  Impl(Env* env, const ReceptionOptions& options, int rank, Address address,
       Socket listener, Socket server, Waker waker)
      : rank_(rank),
        address_(std::move(address)),
        reception_(env, options, std::move(listener), std::move(waker)),
        server_(reception_.Adopt(std::move(server))),
        next_beat_(env->Now()) {
    reception_.Send(
        server_,
        FrameWriter(FrameKind::kServe, 0).Put(AddressText(address_)).Finish());
    thread_ = env->StartThread("dsd_relay", [this] { reception_.Run(*this); });
  }

  ~Impl() override {
    reception_.Stop();
    thread_.reset();
  }

  const Address& address() const { return address_; }
  bool has_thread() const { return thread_ != nullptr; }

  Reception::Place Welcome(Reception::Id id, int rank) override {
    clients_.insert(id);
    if (rank == rank_) reception_.WriteLast(id);
    ToServer(FrameWriter(FrameKind::kOpen, id).Put(static_cast<int32_t>(rank)));
    return {};
  }

  bool Handle(Reception::Id id, absl::string_view body) override {
    if (id == server_) return FromServer(body);
    FrameReader reader(body);
    const auto kind = static_cast<FrameKind>(reader.Get<uint8_t>());
    if (kind == FrameKind::kBeat) {
      reception_.Send(id, FrameWriter(FrameKind::kReply, reader.Get<uint64_t>())
                              .Put(absl::OkStatus())
                              .Put(absl::string_view())
                              .Finish());
    } else {
      ToServer(FrameWriter(FrameKind::kPass, id).Put(body));
    }
    return true;
  }

  void Silent(Reception::Id id, absl::string_view how) override {
    if (id != server_) {
      return ToServer(FrameWriter(FrameKind::kSilent, id).Put(how));
    }
    const absl::Status verdict =
        absl::UnavailableError(absl::StrCat("rank 0 ", how));
    // For rank 0 to find, should it go on: else it would blame this rank.
    ToServer(FrameWriter(FrameKind::kFailAll, 0).Put(verdict));
    reception_.Close(server_);
    Lose(verdict);
  }

  void Gone(Reception::Id id) override {
    if (id == server_) {
      return Lose(absl::UnavailableError(absl::StrCat(
          "rank 0 died (its connection to rank ", rank_, " closed)")));
    }
    if (clients_.erase(id) > 0) ToServer(FrameWriter(FrameKind::kClose, id));
  }

  void Work(absl::Time now) override {
    if (!lost_.ok()) {
      for (const Reception::Id id : std::exchange(clients_, {})) {
        reception_.Send(id,
                        FrameWriter(FrameKind::kLost, 0).Put(lost_).Finish());
        reception_.Close(id);
      }
    } else if (reception_.beats().on() && now >= next_beat_) {
      ToServer(FrameWriter(FrameKind::kBeat, kBeat));
      next_beat_ = now + reception_.beats().period();
    }
  }

  absl::Time NextWork() override {
    if (!lost_.ok() && !clients_.empty()) return absl::InfinitePast();
    return lost_.ok() && reception_.beats().on() ? next_beat_
                                                 : absl::InfiniteFuture();
  }

  // When the server's last words to the others are on their way: those of a
  // rank that gives up, and goes, may be what they are about.
  bool MayEnd() override {
    if (!said_last_word_) {
      ToServer(FrameWriter(FrameKind::kBeat, kLastWord));
      said_last_word_ = true;
    }
    return heard_last_word_ || !lost_.ok();
  }

 private:
  // Ids of frames to the server, and of its replies.
  static constexpr uint64_t kBeat = 0;
  static constexpr uint64_t kLastWord = 1;

  void ToServer(FrameWriter& frame) {
    if (lost_.ok()) reception_.Send(server_, frame.Finish());
  }
  void ToServer(FrameWriter&& frame) { ToServer(frame); }

  bool FromServer(absl::string_view body) {
    FrameReader reader(body);
    const auto kind = static_cast<FrameKind>(reader.Get<uint8_t>());
    const uint64_t id = reader.Get<uint64_t>();
    switch (kind) {
      case FrameKind::kPass: {
        const absl::string_view passed = reader.GetText();
        if (!reader.ok()) return false;
        if (clients_.contains(id)) reception_.Send(id, FrameOf(passed));
        return true;
      }
      case FrameKind::kClose:
        if (clients_.erase(id) > 0) reception_.Close(id);
        return true;
      case FrameKind::kReply:
        heard_last_word_ |= id == kLastWord;
        return true;
      default:
        return false;
    }
  }

  void Lose(const absl::Status& verdict) {
    if (!lost_.ok()) return;
    lost_ = verdict;
    reception_.StopAccepting();
  }

  const int rank_;
  const Address address_;
  // All below is of the one thread.
  Reception reception_;
  const Reception::Id server_;
  absl::flat_hash_set<Reception::Id> clients_;
  absl::Status lost_;  // why there is no server any more, for the clients
  absl::Time next_beat_;
  bool said_last_word_ = false;
  bool heard_last_word_ = false;
  std::unique_ptr<EnvThread> thread_;
};

TcpRelay::TcpRelay(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TcpRelay::~TcpRelay() = default;
const Address& TcpRelay::address() const { return impl_->address(); }

absl::StatusOr<std::unique_ptr<TcpRelay>> TcpRelay::Start(
    Env* env, const TcpStoreOptions& options, Socket server,
    absl::Duration heartbeat_bound, absl::Time deadline) {
  Address address;
  DSD_ASSIGN_OR_RETURN(address.host, server.LocalHost());
  DSD_ASSIGN_OR_RETURN(Socket listener,
                       ListenAt(env, address.host, 0, deadline));
  DSD_ASSIGN_OR_RETURN(address.port, listener.LocalPort());
  DSD_ASSIGN_OR_RETURN(Waker waker, Waker::Create());
  ReceptionOptions reception;
  reception.rank = options.rank;
  reception.job_id = options.job_id;
  reception.generation = options.generation;
  reception.token = options.token;
  reception.heartbeat_bound = heartbeat_bound;
  auto impl = std::make_unique<Impl>(env, reception, options.rank,
                                     std::move(address), std::move(listener),
                                     std::move(server), std::move(waker));
  if (!impl->has_thread()) return NoThread("dsd_relay");
  return absl::WrapUnique(new TcpRelay(std::move(impl)));
}

}  // namespace dsd
