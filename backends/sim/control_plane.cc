// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/sim/control_plane.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/status_macros.h"

namespace dsd::sim {
namespace {

// The answer of a rank that cannot answer.
constexpr char kNoAnswer[] = "\x01no answer";

}  // namespace

// A rank's connection and, once it has joined, its place in a group.
struct ControlPlane::Client {
  SimEnv* env;
  int rank;
  absl::Time last;  // when its last message arrives
  // Whether its store has gone, as it knows.
  absl::Mutex mu;
  bool server_gone = false;

  // Of its membership.
  MemberOptions options;
  std::shared_ptr<Membership> inner;  // null before it has joined
  bool told = false;                  // of the group's failure
  bool closed = false;                // no call into it any more

  bool IsDead() const { return env->scheduler().IsDead(env->process()); }
};

ControlPlane::ControlPlane(Scheduler* scheduler, Scheduler::Process server,
                           const ControlPlaneOptions& options)
    : scheduler_(*scheduler),
      server_(server),
      options_(options),
      env_(scheduler, server, nullptr, nullptr),
      store_(MakeInProcessStore(&env_)) {}

ControlPlane::~ControlPlane() { closing_ = true; }

void ControlPlane::SendAt(absl::Time time, absl::AnyInvocable<void()> what) {
  scheduler_.At(time, [this, what = std::move(what)]() mutable {
    if (scheduler_.IsDead(server_)) return;
    const absl::Time paused_until = scheduler_.PausedUntil(server_);
    if (paused_until > scheduler_.now()) {
      SendAt(paused_until, std::move(what));
    } else {
      what();
    }
  });
}

void ControlPlane::Send(const std::shared_ptr<Client>& client,
                        absl::AnyInvocable<void()> what) {
  client->last =
      std::max(client->last,
               scheduler_.now() + scheduler_.RandomDuration(options_.latency));
  SendAt(client->last, std::move(what));
}

absl::Status ControlPlane::ServerDied(const Client& client) const {
  return absl::UnavailableError(absl::StrCat(
      "rank 0 died (its connection to rank ", client.rank, " closed)"));
}

void ControlPlane::Tell(const std::shared_ptr<Client>& client,
                        const absl::Status& status) {
  if (client->closed || client->IsDead() || std::exchange(client->told, true)) {
    return;
  }
  client->options.on_failure(status);
}

void ControlPlane::ProcessDied(Scheduler::Process process) {
  for (const std::shared_ptr<Client>& client : clients_) {
    const absl::Time heard =
        scheduler_.now() + scheduler_.RandomDuration(options_.death_delay);
    if (client->env->process() == process) {
      scheduler_.At(heard, [client] {
        if (client->inner == nullptr) return;
        client->inner->Fail(absl::UnavailableError(absl::StrCat(
            "rank ", client->rank, " died (its connection to rank 0 closed)")));
      });
    } else if (process == server_) {
      scheduler_.At(heard, [this, client] {
        if (client->IsDead()) return;
        {
          absl::MutexLock lock(&client->mu);
          client->server_gone = true;
        }
        if (client->inner != nullptr) Tell(client, ServerDied(*client));
      });
    }
  }
}

class SimMembership final : public Membership {
 public:
  SimMembership(ControlPlane* plane,
                std::shared_ptr<ControlPlane::Client> client)
      : plane_(*plane), client_(std::move(client)) {}

  ~SimMembership() override {
    client_->closed = true;
    if (plane_.scheduler_.IsRunningOut()) return;
    // The end of the connection comes after all that went over it.
    plane_.Send(client_, [client = client_] { client->inner = nullptr; });
  }

  void Fail(const absl::Status& status) override {
    if (plane_.scheduler_.IsRunningOut()) return;
    plane_.Send(client_, [client = client_, status] {
      if (client->inner != nullptr) client->inner->Fail(status);
    });
  }

  absl::Status Leave(absl::Time deadline) override;
  std::vector<std::optional<std::string>> Ask(absl::string_view question,
                                              absl::Time deadline) override;

 private:
  ControlPlane& plane_;
  const std::shared_ptr<ControlPlane::Client> client_;
};

class SimStore final : public Store {
 public:
  SimStore(ControlPlane* plane, std::shared_ptr<ControlPlane::Client> client)
      : plane_(*plane), client_(std::move(client)) {}

  absl::Status Set(absl::string_view key, absl::string_view value,
                   absl::Time deadline) override {
    DSD_RETURN_IF_ERROR(Travel(deadline, key));
    return plane_.store_->Set(key, value, deadline);
  }

  absl::StatusOr<std::string> Get(absl::string_view key,
                                  absl::Time deadline) override {
    DSD_RETURN_IF_ERROR(Travel(deadline, key));
    const Scheduler::Waiting waiting(&plane_.scheduler_,
                                     absl::StrCat("for key \"", key, "\""));
    return plane_.store_->Get(key, deadline);
  }

  absl::StatusOr<int64_t> Add(absl::string_view key, int64_t delta,
                              absl::Time deadline) override {
    DSD_RETURN_IF_ERROR(Travel(deadline, key));
    return plane_.store_->Add(key, delta, deadline);
  }

  absl::StatusOr<std::unique_ptr<Membership>> Join(
      const MemberOptions& options, absl::Time deadline) override;

  std::string server_host() const override { return ""; }

 private:
  friend class SimMembership;

  // The way to the store and back; ends when the store is there and alive.
  static absl::Status Travel(ControlPlane& plane, ControlPlane::Client& client,
                             absl::Time deadline, absl::string_view what) {
    Scheduler& scheduler = plane.scheduler_;
    absl::Time there =
        scheduler.now() + scheduler.RandomDuration(plane.options_.latency);
    there = std::max(there, scheduler.PausedUntil(plane.server_));
    scheduler.SleepUntil(std::min(there, deadline));
    absl::MutexLock lock(&client.mu);
    if (client.server_gone || scheduler.IsRunningOut()) {
      return plane.ServerDied(client);
    }
    if (there > deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("\"", what, "\": the store of rank 0 does not answer"));
    }
    if (!scheduler.IsDead(plane.server_)) return absl::OkStatus();
    // Nothing answers any more, and that comes out.
    const auto gone = [&] { return client.server_gone; };
    plane.env_.Await(client.mu, absl::Condition(&gone), deadline);
    return plane.ServerDied(client);
  }

  absl::Status Travel(absl::Time deadline, absl::string_view what) {
    return Travel(plane_, *client_, deadline, what);
  }

  ControlPlane& plane_;
  const std::shared_ptr<ControlPlane::Client> client_;
};

absl::Status SimMembership::Leave(absl::Time deadline) {
  DSD_RETURN_IF_ERROR(
      SimStore::Travel(plane_, *client_, deadline, "leave the group"));
  const Scheduler::Waiting waiting(&plane_.scheduler_,
                                   "for all others to leave the group");
  const std::shared_ptr<Membership> inner = client_->inner;
  absl::Status left = inner->Leave(deadline);
  // Nobody's end is a death after that.
  if (left.ok()) client_->told = true;
  return left;
}

std::vector<std::optional<std::string>> SimMembership::Ask(
    absl::string_view question, absl::Time deadline) {
  std::vector<std::optional<std::string>> answers(client_->options.size);
  if (!SimStore::Travel(plane_, *client_, deadline, "ask").ok()) return answers;
  answers = client_->inner->Ask(question, deadline);
  bool all = true;
  for (std::optional<std::string>& answer : answers) {
    if (answer == kNoAnswer) answer.reset();
    all &= answer.has_value();
  }
  if (!all) plane_.scheduler_.SleepUntil(deadline);
  return answers;
}

// The store's end of the joining is a thread there, which outlives the rank.
absl::StatusOr<std::unique_ptr<Membership>> SimStore::Join(
    const MemberOptions& options, absl::Time deadline) {
  DSD_RETURN_IF_ERROR(Travel(deadline, options.group));
  auto client = std::make_shared<ControlPlane::Client>();
  client->env = client_->env;
  client->rank = options.rank;
  client->options = options;
  client->last = plane_.scheduler_.now();
  plane_.clients_.push_back(client);

  ControlPlane* const plane = &plane_;
  const std::weak_ptr<ControlPlane::Client> weak = client;
  MemberOptions served = options;
  served.on_failure = [plane, weak](const absl::Status& status) {
    const std::shared_ptr<ControlPlane::Client> heard = weak.lock();
    if (heard == nullptr || plane->closing_) return;
    plane->Send(heard, [plane, heard, status] { plane->Tell(heard, status); });
  };
  served.on_question = [plane, weak](absl::string_view question) {
    const std::shared_ptr<ControlPlane::Client> asked = weak.lock();
    if (asked == nullptr || asked->closed || asked->IsDead() ||
        plane->scheduler_.PausedUntil(asked->env->process()) >
            plane->scheduler_.now()) {
      return std::string(kNoAnswer);
    }
    return asked->options.on_question(question);
  };
  auto joined = std::make_shared<std::optional<absl::Status>>();
  plane_.threads_.push_back(plane_.env_.StartThread(
      absl::StrCat("join ", options.rank),
      [plane, client, served, joined, deadline] {
        const Scheduler::Waiting waiting(
            &plane->scheduler_,
            absl::StrCat("for all ranks to join \"", served.group, "\""));
        absl::StatusOr<std::unique_ptr<Membership>> member =
            plane->store_->Join(served, deadline);
        absl::MutexLock lock(&client->mu);
        *joined = member.status();
        if (member.ok()) client->inner = *std::move(member);
        if (client->inner != nullptr && client->IsDead()) {
          plane->ProcessDied(client->env->process());
        }
      }));
  const Scheduler::Waiting waiting(
      &plane_.scheduler_,
      absl::StrCat("for all ranks to join \"", options.group, "\""));
  absl::MutexLock lock(&client->mu);
  const auto over = [&] { return joined->has_value() || client->server_gone; };
  // The store's own error comes a moment later.
  const absl::Duration grace = absl::Seconds(1);
  if (!plane_.env_.Await(client->mu, absl::Condition(&over),
                         deadline + grace)) {
    return absl::DeadlineExceededError(absl::StrCat(
        "join \"", options.group, "\": the store of rank 0 does not answer"));
  }
  if (!joined->has_value()) return plane_.ServerDied(*client);
  DSD_RETURN_IF_ERROR(**joined);
  return std::make_unique<SimMembership>(plane, client);
}

std::shared_ptr<Store> ControlPlane::Connect(SimEnv* env, int rank) {
  auto client = std::make_shared<Client>();
  client->env = env;
  client->rank = rank;
  client->last = scheduler_.now();
  clients_.push_back(client);
  return std::make_shared<SimStore>(this, std::move(client));
}

}  // namespace dsd::sim
