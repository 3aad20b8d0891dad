// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/group_table.h"
#include "dsd/core/comm/reception.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store.h"
#include "dsd/core/comm/store_protocol.h"
#include "dsd/core/comm/tcp_store.h"

namespace dsd {
namespace {

ReceptionOptions ReceptionOf(const TcpStoreServerOptions& options) {
  ReceptionOptions reception;
  reception.job_id = options.job_id;
  reception.generation = options.generation;
  reception.token = options.token;
  reception.greeting_patience = options.greeting_patience;
  reception.heartbeat_bound = options.heartbeat_bound;
  return reception;
}

// For a rank whose connection is lost before all have joined.
constexpr absl::Duration kReturnPatience = absl::Seconds(1);

std::string DiedText(int at_rank) {
  return absl::StrCat("died (its connection to rank ", at_rank, " closed)");
}

}  // namespace

// All but the destructor and port() is of the one thread.
class TcpStoreServer::Impl final : public Reception::Host {
 public:
  Impl(Env* env, TcpStoreServerOptions options, Socket listener, int port,
       Waker waker)
      : env_(env),
        options_(std::move(options)),
        port_(port),
        reception_(env, ReceptionOf(options_), std::move(listener),
                   std::move(waker)) {
    thread_ = env_->StartThread("dsd_store", [this] { reception_.Run(*this); });
  }

  ~Impl() override {
    reception_.Stop();
    thread_.reset();
  }

  int port() const { return port_; }
  bool has_thread() const { return thread_ != nullptr; }

  Reception::Place Welcome(Reception::Id id, int rank) override;
  bool Handle(Reception::Id id, absl::string_view body) override;
  void Silent(Reception::Id id, absl::string_view how) override;
  void Gone(Reception::Id id) override;
  void Work(absl::Time now) override;
  absl::Time NextWork() override;

 private:
  // One with a connection here is named by it.
  using ClientId = Reception::Id;
  struct Client {
    Reception::Id connection;
    uint64_t channel;   // if that is a relay's
    int at_rank;        // of the other end of the client's own connection
    bool last = false;  // of the relay's clients: the rank that relays
    std::vector<GroupTable::MemberId> members;
  };
  struct Relay {
    int rank;
    std::string address;  // empty until it serves, and when it is silent
    absl::flat_hash_map<uint64_t, ClientId> clients;  // by channel
  };
  // A request that is not answered yet.
  struct Asker {
    ClientId client;
    uint64_t request;
  };
  struct Member {
    ClientId client;
    int rank;
    uint64_t join_request;   // the client's name for it
    uint64_t leave_request;  // 0: none
  };
  struct Question {
    std::vector<Asker> askers;
    GroupTable::MemberId first_member = 0;  // of the group
    std::string text;
    absl::Time deadline;
    std::vector<std::optional<std::string>> answers;
    std::map<ClientId, int> rank_of;  // who has yet to answer
  };

  // These return false for a frame that is not understood.
  bool FromRelay(Reception::Id id, Relay& relay, absl::string_view body);
  bool FromClient(ClientId id, absl::string_view body);
  void Send(ClientId id, const std::string& frame);
  void Reply(const Asker& asker, const absl::Status& status,
             absl::string_view value = "");
  void Deliver(const std::vector<GroupTable::Event>& events);
  void FinishQuestion(uint64_t id);
  // All groups of the client's fail, as it says itself.
  void FailAll(ClientId id, const absl::Status& status);
  // Likewise, as is found here. `status` of a member's rank.
  template <class Status>
  void BreakAll(ClientId id, Status status) {
    for (const GroupTable::MemberId member : clients_.at(id).members) {
      Deliver(groups_.Break(member, status(members_.at(member).rank)));
    }
  }
  void BreakAllOf(const Relay& relay, const absl::Status& status) {
    for (const auto& [channel, client] : relay.clients) {
      BreakAll(client, [&](int) { return status; });
    }
  }
  // The client's members have died, if they have not left.
  void Forget(ClientId id);
  // Forgets those who wait for keys.
  template <class Predicate>
  void StopWaiting(Predicate who) {
    absl::erase_if(waiting_, [&](auto& entry) {
      std::vector<Asker>& askers = entry.second;
      askers.erase(std::remove_if(askers.begin(), askers.end(), who),
                   askers.end());
      return askers.empty();
    });
  }

  Env* const env_;
  const TcpStoreServerOptions options_;
  const int port_;
  Reception reception_;
  absl::btree_map<ClientId, Client> clients_;
  absl::btree_map<Reception::Id, Relay> relays_;
  absl::flat_hash_map<std::string, std::string> values_;
  absl::flat_hash_map<std::string, std::vector<Asker>> waiting_;  // by key
  GroupTable groups_;
  GroupTable::MemberId next_member_ = 1;
  absl::flat_hash_map<GroupTable::MemberId, Member> members_;
  uint64_t next_question_ = 1;
  absl::btree_map<uint64_t, Question> questions_;

  std::unique_ptr<EnvThread> thread_;
};

absl::Time TcpStoreServer::Impl::NextWork() {
  absl::Time next = groups_.NextExpiry();
  for (const auto& [id, question] : questions_) {
    next = std::min(next, question.deadline);
  }
  return next;
}

void TcpStoreServer::Impl::Work(absl::Time now) {
  Deliver(groups_.Expire(now, reception_.Hindrance(now)));
  std::vector<uint64_t> due;
  for (const auto& [id, question] : questions_) {
    if (question.deadline <= now) due.push_back(id);
  }
  for (const uint64_t id : due) FinishQuestion(id);
}

Reception::Place TcpStoreServer::Impl::Welcome(Reception::Id id, int rank) {
  if (options_.fan_out > 0 && rank >= options_.fan_out) {
    const int relay_rank = rank - rank % options_.fan_out;
    if (rank == relay_rank) {
      relays_[id].rank = rank;
      return {StoreRole::kRelay, rank, ""};
    }
    Reception::Place place = {StoreRole::kElsewhere, relay_rank, ""};
    // The last one: another may be just going.
    for (const auto& [relay_id, relay] : relays_) {
      if (relay.rank == relay_rank && !relay.address.empty()) {
        place.address = relay.address;
      }
    }
    return place;
  }
  clients_[id] = {id, 0, 0};
  return {};
}

bool TcpStoreServer::Impl::Handle(Reception::Id id, absl::string_view body) {
  const auto relay = relays_.find(id);
  return relay == relays_.end() ? FromClient(id, body)
                                : FromRelay(id, relay->second, body);
}

bool TcpStoreServer::Impl::FromRelay(Reception::Id id, Relay& relay,
                                     absl::string_view body) {
  FrameReader reader(body);
  const auto kind = static_cast<FrameKind>(reader.Get<uint8_t>());
  const uint64_t channel = reader.Get<uint64_t>();
  // Absent if it was forgotten here while it spoke.
  const auto client = relay.clients.find(channel);
  const bool known = client != relay.clients.end();
  switch (kind) {
    case FrameKind::kServe:
      relay.address = std::string(reader.GetText());
      return reader.ok();
    case FrameKind::kOpen: {
      const int rank = reader.Get<int32_t>();
      if (!reader.ok() || known) return false;
      const ClientId opened = reception_.NewId();
      relay.clients[channel] = opened;
      clients_[opened] = {id, channel, relay.rank, rank == relay.rank};
      return true;
    }
    case FrameKind::kPass: {
      const absl::string_view passed = reader.GetText();
      if (!reader.ok()) return false;
      if (known && !FromClient(client->second, passed)) {
        reception_.Send(id, FrameWriter(FrameKind::kClose, channel).Finish());
        Forget(client->second);
        relay.clients.erase(client);
      }
      return true;
    }
    case FrameKind::kSilent: {
      const std::string how(reader.GetText());
      if (!reader.ok()) return false;
      if (known) {
        BreakAll(client->second, [&](int rank) {
          return absl::UnavailableError(absl::StrCat("rank ", rank, " ", how));
        });
      }
      return true;
    }
    case FrameKind::kClose:
      if (known) {
        Forget(client->second);
        relay.clients.erase(client);
      }
      return true;
    case FrameKind::kFailAll: {
      const absl::Status status = reader.GetStatus();
      if (!reader.ok() || status.ok()) return false;
      for (const auto& [number, other] : relay.clients) FailAll(other, status);
      return true;
    }
    case FrameKind::kBeat:
      reception_.Send(id, FrameWriter(FrameKind::kReply, channel)
                              .Put(absl::OkStatus())
                              .Put(absl::string_view())
                              .Finish());
      return true;
    default:
      return false;
  }
}

bool TcpStoreServer::Impl::FromClient(ClientId id, absl::string_view body) {
  FrameReader reader(body);
  const auto kind = static_cast<FrameKind>(reader.Get<uint8_t>());
  const uint64_t request = reader.Get<uint64_t>();
  const Asker asker = {id, request};
  Client& client = clients_.at(id);
  // The member that a client names by its join.
  const auto member_of =
      [&](uint64_t join) -> std::optional<GroupTable::MemberId> {
    for (const GroupTable::MemberId member : client.members) {
      if (members_.at(member).join_request == join) return member;
    }
    return std::nullopt;
  };
  switch (kind) {
    case FrameKind::kSet: {
      const std::string key(reader.GetText());
      const std::string value(reader.GetText());
      if (!reader.ok()) return false;
      values_[key] = value;
      Reply(asker, absl::OkStatus());
      const auto waiting = waiting_.extract(key);
      if (!waiting.empty()) {
        for (const Asker& other : waiting.mapped()) {
          Reply(other, absl::OkStatus(), value);
        }
      }
      return true;
    }
    case FrameKind::kGet: {
      const std::string key(reader.GetText());
      if (!reader.ok()) return false;
      const auto it = values_.find(key);
      if (it != values_.end()) {
        Reply(asker, absl::OkStatus(), it->second);
      } else {
        waiting_[key].push_back(asker);
      }
      return true;
    }
    case FrameKind::kAdd: {
      const std::string key(reader.GetText());
      const int64_t delta = reader.Get<int64_t>();
      if (!reader.ok()) return false;
      std::string& value = values_[key];
      const absl::Status status = AddToCounter(key, delta, value);
      Reply(asker, status, value);
      return true;
    }
    case FrameKind::kForget: {
      StopWaiting([&](const Asker& other) {
        return other.client == id && other.request == request;
      });
      return true;
    }
    case FrameKind::kJoin: {
      const std::string group(reader.GetText());
      const int rank = reader.Get<int32_t>();
      const int size = reader.Get<int32_t>();
      const std::string facts(reader.GetText());
      const int64_t patience = reader.Get<int64_t>();
      if (!reader.ok()) return false;
      const GroupTable::MemberId member = next_member_++;
      members_[member] = {id, rank, request, 0};
      client.members.push_back(member);
      // Once it knows the end of a group its process may go, and this server.
      if (rank == 0) reception_.WriteLast(id);
      Deliver(groups_.Join(member, group, rank, size, facts,
                           absl::Nanoseconds(patience), env_->Now()));
      return true;
    }
    case FrameKind::kLeave: {
      const auto member = member_of(reader.Get<uint64_t>());
      if (!reader.ok()) return false;
      if (!member.has_value()) {
        Reply(asker, absl::FailedPreconditionError("not a member"));
        return true;
      }
      members_.at(*member).leave_request = request;
      Deliver(groups_.Leave(*member));
      if (!options_.last_group.empty() &&
          groups_.WasDissolved(options_.last_group)) {
        reception_.StopAccepting();
      }
      return true;
    }
    case FrameKind::kFail: {
      const auto member = member_of(reader.Get<uint64_t>());
      const absl::Status status = reader.GetStatus();
      if (!reader.ok()) return false;
      if (member.has_value() && !status.ok()) {
        Deliver(groups_.Fail(*member, status));
      }
      return true;
    }
    case FrameKind::kGone: {
      const auto member = member_of(reader.Get<uint64_t>());
      if (!reader.ok()) return false;
      if (member.has_value()) {
        Deliver(groups_.Remove(*member, "left the group without Shutdown"));
        members_.erase(*member);
        client.members.erase(
            std::find(client.members.begin(), client.members.end(), *member));
      }
      return true;
    }
    case FrameKind::kAsk: {
      const auto member = member_of(reader.Get<uint64_t>());
      const std::string text(reader.GetText());
      const int64_t patience = reader.Get<int64_t>();
      if (!reader.ok()) return false;
      std::vector<GroupTable::Member> peers;
      if (member.has_value()) peers = groups_.Peers(*member);
      const GroupTable::MemberId first = peers.empty() ? 0 : peers[0].id;
      const absl::Duration time = absl::Nanoseconds(patience);
      // When the time of all is over they ask the same: once is enough, if the
      // answers are not due too soon for this one.
      for (auto& [other, question] : questions_) {
        if (first != 0 && question.first_member == first &&
            question.text == text &&
            question.deadline >= env_->Now() + time / 2) {
          question.askers.push_back(asker);
          return true;
        }
      }
      const uint64_t number = next_question_++;
      Question& question = questions_[number];
      question.askers = {asker};
      question.first_member = first;
      question.text = text;
      question.deadline = env_->Now() + time;
      for (const GroupTable::Member& peer : peers) {
        const auto place = members_.find(peer.id);
        if (place == members_.end()) continue;
        question.answers.resize(
            std::max<size_t>(question.answers.size(), peer.rank + 1));
        question.rank_of[place->second.client] = peer.rank;
        Send(place->second.client, FrameWriter(FrameKind::kQuestion, number)
                                       .Put(place->second.join_request)
                                       .Put(text)
                                       .Finish());
      }
      if (question.rank_of.empty()) FinishQuestion(number);
      return true;
    }
    case FrameKind::kAnswer: {
      const std::string text(reader.GetText());
      if (!reader.ok()) return false;
      const auto question = questions_.find(request);
      if (question == questions_.end()) return true;  // too late
      const auto rank = question->second.rank_of.find(id);
      if (rank == question->second.rank_of.end()) return true;
      question->second.answers[rank->second] = text;
      question->second.rank_of.erase(rank);
      if (question->second.rank_of.empty()) FinishQuestion(request);
      return true;
    }
    case FrameKind::kBeat: {
      Reply(asker, absl::OkStatus());
      return true;
    }
    case FrameKind::kFailAll: {
      const absl::Status status = reader.GetStatus();
      if (!reader.ok() || status.ok()) return false;
      FailAll(id, status);
      return true;
    }
    default:
      return false;
  }
}

void TcpStoreServer::Impl::Send(ClientId id, const std::string& frame) {
  const auto it = clients_.find(id);
  if (it == clients_.end()) return;
  const Client& client = it->second;
  if (client.connection == id) return reception_.Send(id, frame);
  reception_.Send(client.connection,
                  FrameWriter(FrameKind::kPass, client.channel)
                      .Put(absl::string_view(frame).substr(kFrameHeaderBytes))
                      .Finish());
}

void TcpStoreServer::Impl::Reply(const Asker& asker, const absl::Status& status,
                                 absl::string_view value) {
  Send(asker.client, FrameWriter(FrameKind::kReply, asker.request)
                         .Put(status)
                         .Put(value)
                         .Finish());
}

void TcpStoreServer::Impl::FinishQuestion(uint64_t id) {
  const Question question = std::move(questions_.at(id));
  questions_.erase(id);
  std::string value;
  // As fields of a frame, without the frame's head.
  FrameWriter writer(FrameKind::kReply, 0);
  writer.Put(static_cast<uint32_t>(question.answers.size()));
  size_t room = kMaxValueBytes;
  for (const std::optional<std::string>& answer : question.answers) {
    const bool fits = answer.has_value() && answer->size() < room;
    writer.Put(static_cast<uint8_t>(fits));
    if (!fits) continue;
    room -= answer->size();
    writer.Put(*answer);
  }
  const std::string frame = writer.Finish();
  for (const Asker& asker : question.askers) {
    Reply(asker, absl::OkStatus(),
          absl::string_view(frame).substr(kFrameHeaderBytes + 1 + 8));
  }
}

void TcpStoreServer::Impl::Deliver(
    const std::vector<GroupTable::Event>& events) {
  const auto deliver = [&](const GroupTable::Event& event,
                           const Member& member) {
    switch (event.kind) {
      case GroupTable::EventKind::kJoined:
        Reply({member.client, member.join_request}, event.status);
        break;
      case GroupTable::EventKind::kLeft:
        Reply({member.client, member.leave_request}, event.status);
        break;
      case GroupTable::EventKind::kFailed:
        Send(member.client, FrameWriter(FrameKind::kFailed, 0)
                                .Put(member.join_request)
                                .Put(event.status)
                                .Finish());
        break;
    }
  };
  // With a rank that relays those may go whom it has yet to tell.
  for (const bool last : {false, true}) {
    for (const GroupTable::Event& event : events) {
      const auto member = members_.find(event.member);
      if (member == members_.end()) continue;
      const auto client = clients_.find(member->second.client);
      if (client == clients_.end() || client->second.last != last) continue;
      deliver(event, member->second);
    }
  }
}

void TcpStoreServer::Impl::FailAll(ClientId id, const absl::Status& status) {
  for (const GroupTable::MemberId member : clients_.at(id).members) {
    Deliver(groups_.Fail(member, status));
  }
}

void TcpStoreServer::Impl::Silent(Reception::Id id, absl::string_view how) {
  const auto relay = relays_.find(id);
  if (relay == relays_.end()) {
    return BreakAll(id, [&](int rank) {
      return absl::UnavailableError(absl::StrCat("rank ", rank, " ", how));
    });
  }
  relay->second.address.clear();
  BreakAllOf(relay->second, absl::UnavailableError(absl::StrCat(
                                "rank ", relay->second.rank, " ", how)));
}

void TcpStoreServer::Impl::Gone(Reception::Id id) {
  const auto it = relays_.find(id);
  if (it == relays_.end()) return Forget(id);
  const Relay relay = std::move(it->second);
  relays_.erase(it);
  // Those whom it served hear no more, and are not to blame.
  BreakAllOf(relay, absl::UnavailableError(
                        absl::StrCat("rank ", relay.rank, " ", DiedText(0))));
  for (const auto& [channel, client] : relay.clients) Forget(client);
}

void TcpStoreServer::Impl::Forget(ClientId id) {
  const auto it = clients_.find(id);
  if (it == clients_.end()) return;
  const Client client = std::move(it->second);
  clients_.erase(it);
  StopWaiting([&](const Asker& asker) { return asker.client == id; });
  for (const GroupTable::MemberId member : client.members) {
    Deliver(groups_.Remove(member, DiedText(client.at_rank),
                           env_->Now() + kReturnPatience));
    members_.erase(member);
  }
  std::vector<uint64_t> answered;
  for (auto& [number, question] : questions_) {
    question.rank_of.erase(id);
    if (question.rank_of.empty()) answered.push_back(number);
  }
  for (const uint64_t number : answered) FinishQuestion(number);
}

TcpStoreServer::TcpStoreServer(std::unique_ptr<Impl> impl)
    : impl_(std::move(impl)) {}
TcpStoreServer::~TcpStoreServer() = default;
int TcpStoreServer::port() const { return impl_->port(); }

absl::StatusOr<std::unique_ptr<TcpStoreServer>> TcpStoreServer::Start(
    Env* env, const TcpStoreServerOptions& options, absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(Socket listener, options.listen_fd >= 0
                                            ? AdoptListener(options.listen_fd)
                                            : ListenAt(env, options.host,
                                                       options.port, deadline));
  DSD_ASSIGN_OR_RETURN(const int port, listener.LocalPort());
  DSD_ASSIGN_OR_RETURN(Waker waker, Waker::Create());
  auto impl = std::make_unique<Impl>(env, options, std::move(listener), port,
                                     std::move(waker));
  if (!impl->has_thread()) return NoThread("dsd_store");
  return absl::WrapUnique(new TcpStoreServer(std::move(impl)));
}

namespace {

class ServedStore final : public ForwardingStore {
 public:
  ServedStore(std::shared_ptr<void> server, std::shared_ptr<Store> client)
      : ForwardingStore(std::move(client)), server_(std::move(server)) {}
  // The client goes first and says what it has left to say.
  ~ServedStore() override { to_.reset(); }

 private:
  const std::shared_ptr<void> server_;
};

}  // namespace

std::shared_ptr<Store> MakeServedStore(std::shared_ptr<void> server,
                                       std::shared_ptr<Store> client) {
  return std::make_shared<ServedStore>(std::move(server), std::move(client));
}

}  // namespace dsd
