// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/sim/network.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/log/check.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/backends/sim/sim_env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/store.h"

namespace dsd::sim {
namespace {

// One end of a message.
struct Op {
  bool done = false;
  absl::Status error;
  bool withdrawn = false;
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  size_t size = 0;
};

// A message under way. Its bytes are in `data`, or still at `sender`.
struct Message {
  int from;
  int to;
  uint64_t tag;
  size_t size;
  std::string data;
  std::shared_ptr<Op> sender;    // null: eager
  std::shared_ptr<Op> receiver;  // null: not matched yet
  absl::Time sent;
  bool broken_within = false;
  std::optional<size_t> corrupt_at;
};

absl::Status Lost(int peer, absl::string_view why) {
  return absl::UnavailableError(
      absl::StrCat("the connection to rank ", peer, " ", why));
}

}  // namespace

// The links of one group.
class Network::Hub : public std::enable_shared_from_this<Network::Hub> {
 public:
  using Key = std::tuple<int, int, uint64_t>;  // from, to, tag

  Hub(Network* network, int size)
      : network_(*network),
        scheduler_(*network->scheduler_),
        size_(size),
        processes_(size, -1),
        newest_sent_(size, {absl::InfinitePast(), -1}),
        links_(size * size) {
    for (Link& link : links_) {
      link.bytes_per_second =
          network_.options_.bytes_per_second /
          std::pow(network_.options_.slowest_link,
                   static_cast<double>(scheduler_.Random(1001)) / 1000);
    }
  }

  absl::Mutex& mu() ABSL_LOCK_RETURNED(mu_) { return mu_; }

  void Enter(int rank, Scheduler::Process process) {
    absl::MutexLock lock(&mu_);
    processes_[rank] = process;
    // It may have died on the way.
    if (scheduler_.IsDead(process)) BreakAll(rank, "closed");
  }

  void ProcessDied(Scheduler::Process process) {
    absl::MutexLock lock(&mu_);
    for (int rank = 0; rank < size_; ++rank) {
      if (processes_[rank] != process) continue;
      // What is on the way may or may not arrive.
      const absl::Duration delay =
          scheduler_.RandomDuration(network_.options_.death_delay);
      scheduler_.At(scheduler_.now() + delay,
                    [self = shared_from_this(), rank] {
                      absl::MutexLock lock(&self->mu_);
                      self->BreakAll(rank, "closed");
                    });
    }
  }

  void PostRecv(int from, int to, uint64_t tag, const std::shared_ptr<Op>& op) {
    absl::MutexLock lock(&mu_);
    const auto arrived = arrived_.find({from, to, tag});
    const Link& link = LinkOf(from, to);
    const bool is_here = arrived != arrived_.end() &&
                         (arrived->second->sender == nullptr || !link.broken);
    if (!is_here) {
      if (link.broken) {
        op->error = link.error_at_to;
      } else {
        posted_[{from, to, tag}] = op;
      }
      return;
    }
    const std::shared_ptr<Message> message = std::move(arrived->second);
    arrived_.erase(arrived);
    Match(message, op);
  }

  void PostSend(int from, int to, uint64_t tag, const std::shared_ptr<Op>& op) {
    absl::MutexLock lock(&mu_);
    Link& link = LinkOf(from, to);
    Fate fate{from, to, link.messages++, op->size, absl::ZeroDuration()};
    if (network_.fate_) network_.fate_(fate);
    if (fate.broken_before) Break(from, to, "was lost", "was lost");
    if (link.broken) {
      op->error = link.error_at_from;
      return;
    }
    const LinkOptions& options = network_.options_;
    taken_later_.erase(std::remove_if(taken_later_.begin(), taken_later_.end(),
                                      [](const std::shared_ptr<Message>& m) {
                                        return m->sender->done ||
                                               m->sender->withdrawn;
                                      }),
                       taken_later_.end());
    auto message = std::make_shared<Message>();
    message->from = from;
    message->to = to;
    message->tag = tag;
    message->size = op->size;
    message->sent = scheduler_.now();
    message->broken_within = fate.broken_within;
    if (fate.corrupt && op->size > 0) {
      message->corrupt_at = scheduler_.Random(op->size);
    }
    const bool eager = static_cast<int64_t>(op->size) <= options.eager_bytes;
    absl::Time leaves = std::max(link.free_at, scheduler_.now());
    if (eager) {
      message->data.assign(reinterpret_cast<const char*>(op->from), op->size);
      if (message->corrupt_at.has_value()) {
        message->data[*message->corrupt_at] ^= 1 << scheduler_.Random(8);
      }
      op->done = true;
      leaves += link.TimeFor(op->size);
      link.free_at = leaves;
    } else {
      message->sender = op;
      taken_later_.push_back(message);
    }
    absl::Time arrives = leaves + options.latency +
                         scheduler_.RandomDuration(options.jitter) +
                         fate.extra_delay;
    if (!options.overtaking) arrives = std::max(arrives, link.last_arrival);
    link.last_arrival = arrives;
    scheduler_.At(arrives, [self = shared_from_this(), message] {
      absl::MutexLock lock(&self->mu_);
      self->Arrive(message);
    });
  }

  // Nobody touches the memory of `op` any more.
  void Withdraw(const Key& key, const std::shared_ptr<Op>& op) {
    absl::MutexLock lock(&mu_);
    op->withdrawn = true;
    const auto it = posted_.find(key);
    if (it != posted_.end() && it->second == op) posted_.erase(it);
  }

 private:
  struct Link {
    int64_t messages = 0;
    absl::Time free_at = absl::InfinitePast();
    absl::Time last_arrival = absl::InfinitePast();
    double bytes_per_second = 0;
    bool broken = false;
    absl::Status error_at_from;
    absl::Status error_at_to;

    absl::Duration TimeFor(size_t bytes) const {
      return absl::Seconds(static_cast<double>(bytes) / bytes_per_second);
    }
  };

  Link& LinkOf(int from, int to) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return links_[from * size_ + to];
  }

  bool IsDead(int rank) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return processes_[rank] >= 0 && scheduler_.IsDead(processes_[rank]);
  }

  void Arrive(const std::shared_ptr<Message>& message)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const int to = message->to;
    if (LinkOf(message->from, to).broken || IsDead(to)) return;
    auto& [sent, from] = newest_sent_[to];
    if (message->sent < sent && message->from != from) ++network_.overtakes_;
    if (message->sent > sent) newest_sent_[to] = {message->sent, message->from};
    const Key key{message->from, to, message->tag};
    const auto posted = posted_.find(key);
    if (posted == posted_.end()) {
      arrived_[key] = message;
      return;
    }
    const std::shared_ptr<Op> op = std::move(posted->second);
    posted_.erase(posted);
    Match(message, op);
  }

  void Match(const std::shared_ptr<Message>& message,
             const std::shared_ptr<Op>& op) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    CHECK_LE(message->size, op->size)
        << "a message is longer than the receive of its tag";
    if (message->sender == nullptr) {
      Copy(*message, *op, 0, message->size,
           reinterpret_cast<const std::byte*>(message->data.data()));
      return;
    }
    // The bytes come in two pieces, from where they are by then.
    message->receiver = op;
    const size_t half = scheduler_.Random(message->size);
    const absl::Time first = scheduler_.now() + network_.options_.latency;
    const auto piece = [&](size_t begin, size_t end) {
      return [self = shared_from_this(), message, op, begin, end] {
        absl::MutexLock lock(&self->mu_);
        const Link& link = self->LinkOf(message->from, message->to);
        if (link.broken || op->withdrawn || message->sender->withdrawn ||
            self->IsDead(message->to) || self->IsDead(message->from)) {
          return;
        }
        self->Copy(*message, *op, begin, end, message->sender->from);
        message->sender->done = op->done;
      };
    };
    const Link& link = LinkOf(message->from, message->to);
    scheduler_.At(first + link.TimeFor(half), piece(0, half));
    scheduler_.At(first + link.TimeFor(message->size),
                  piece(half, message->size));
  }

  // Bytes [begin, end) of `message` land.
  void Copy(const Message& message, Op& op, size_t begin, size_t end,
            const std::byte* bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    scheduler_.Note(message.tag ^ end);
    size_t length = end - begin;
    const bool last = end == message.size;
    if (last && message.broken_within) length = scheduler_.Random(length + 1);
    if (length > 0) std::memcpy(op.to + begin, bytes + begin, length);
    if (message.sender != nullptr && message.corrupt_at.has_value() &&
        *message.corrupt_at >= begin && *message.corrupt_at < begin + length) {
      op.to[*message.corrupt_at] ^= std::byte{1} << scheduler_.Random(8);
    }
    if (last && message.broken_within) {
      // Not matched any more, so the break does not find it.
      op.error = Lost(message.from, "was lost");
      Break(message.from, message.to, "was lost", "was lost");
      return;
    }
    op.done = last;
  }

  // Both directions of the link end.
  void Break(int a, int b, absl::string_view why_at_a,
             absl::string_view why_at_b) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const auto one =
        [&](int from, int to, absl::string_view why_at_from,
            absl::string_view why_at_to) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
          Link& link = LinkOf(from, to);
          if (link.broken) return;
          link.broken = true;
          link.error_at_from = Lost(to, why_at_from);
          link.error_at_to = Lost(from, why_at_to);
          for (auto it = posted_.lower_bound({from, to, 0});
               it != posted_.end() && std::get<0>(it->first) == from &&
               std::get<1>(it->first) == to;) {
            it->second->error = link.error_at_to;
            it = posted_.erase(it);
          }
          for (const std::shared_ptr<Message>& message : taken_later_) {
            if (message->from != from || message->to != to) continue;
            if (!message->sender->done)
              message->sender->error = link.error_at_from;
            if (message->receiver != nullptr && !message->receiver->done) {
              message->receiver->error = link.error_at_to;
            }
          }
        };
    one(a, b, why_at_a, why_at_b);
    one(b, a, why_at_b, why_at_a);
  }

  void BreakAll(int rank, absl::string_view why)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (!network_.options_.reports_death) return;
    for (int other = 0; other < size_; ++other) {
      if (other != rank) Break(other, rank, why, why);
    }
  }

  Network& network_;
  Scheduler& scheduler_;
  const int size_;
  absl::Mutex mu_;
  std::vector<Scheduler::Process> processes_ ABSL_GUARDED_BY(mu_);
  // Of the messages that have arrived at a rank, the one sent last: when, and
  // by whom.
  std::vector<std::pair<absl::Time, int>> newest_sent_ ABSL_GUARDED_BY(mu_);
  std::vector<Link> links_ ABSL_GUARDED_BY(mu_);
  std::map<Key, std::shared_ptr<Op>> posted_ ABSL_GUARDED_BY(mu_);
  std::map<Key, std::shared_ptr<Message>> arrived_ ABSL_GUARDED_BY(mu_);
  // Messages whose bytes are still with the sender, and some that are done.
  std::vector<std::shared_ptr<Message>> taken_later_ ABSL_GUARDED_BY(mu_);
};

Network::Network(Scheduler* scheduler, const LinkOptions& options)
    : scheduler_(scheduler), options_(options) {}
Network::~Network() = default;

void Network::SetFate(std::function<void(Fate&)> fate) {
  fate_ = std::move(fate);
}

void Network::ProcessDied(Scheduler::Process process) {
  for (const auto& [number, weak] : hubs_) {
    if (const std::shared_ptr<Hub> hub = weak.lock()) hub->ProcessDied(process);
  }
}

int64_t Network::overtakes() const { return overtakes_; }

class SimEngine final : public Engine {
 public:
  explicit SimEngine(const EngineOptions& options, SimEnv* env)
      : options_(options), env_(*env) {}

  // Rank 0 makes the hub and tells the others its number.
  absl::Status Connect(absl::Time deadline) override {
    Network& network = *env_.network();
    std::shared_ptr<Network::Hub> hub;
    if (options_.rank == 0) {
      hub = std::make_shared<Network::Hub>(&network, options_.world_size);
      const int64_t number = network.next_hub_++;
      network.hubs_[number] = hub;
      hub->Enter(0, env_.process());
      DSD_RETURN_IF_ERROR(
          options_.store->Set("hub", absl::StrCat(number), deadline));
    } else {
      DSD_ASSIGN_OR_RETURN(const std::string value,
                           options_.store->Get("hub", deadline));
      int64_t number = -1;
      CHECK(absl::SimpleAtoi(value, &number)) << value;
      hub = network.hubs_[number].lock();
      if (hub == nullptr) return Lost(0, "closed");
      hub->Enter(options_.rank, env_.process());
    }
    // The others find it when they come.
    hub_ = std::move(hub);
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override;

  void Cancel() override { cancelled_ = true; }

 private:
  class Batch;

  // Nothing that a dead rank does is seen by others.
  bool IsOver() const { return cancelled_ || env_.scheduler().IsRunningOut(); }

  const EngineOptions options_;
  SimEnv& env_;
  bool cancelled_ = false;
  std::shared_ptr<Network::Hub> hub_;
};

class SimEngine::Batch final : public EngineBatch {
 public:
  struct Posted {
    Network::Hub::Key key;
    std::shared_ptr<Op> op;
  };

  Batch(SimEngine* engine, std::shared_ptr<Network::Hub> hub)
      : engine_(*engine), hub_(std::move(hub)) {}

  ~Batch() override {
    for (const auto& [key, op] : recvs) hub_->Withdraw(key, op);
    for (const auto& [key, op] : sends) hub_->Withdraw(key, op);
  }

  absl::Status Wait(absl::Time deadline) override {
    for (const auto& [key, op] : recvs) {
      DSD_RETURN_IF_ERROR(WaitFor(key, *op, deadline));
    }
    for (const auto& [key, op] : sends) {
      DSD_RETURN_IF_ERROR(WaitFor(key, *op, deadline));
    }
    return absl::OkStatus();
  }

  absl::Status WaitReceived(size_t index, absl::Time deadline) override {
    return WaitFor(recvs[index].key, *recvs[index].op, deadline);
  }

  std::vector<Posted> recvs;
  std::vector<Posted> sends;

 private:
  absl::Status WaitFor(const Network::Hub::Key& key, const Op& op,
                       absl::Time deadline) {
    const auto over = [&] {
      return op.done || !op.error.ok() || engine_.IsOver();
    };
    if (!over()) {
      const auto& [from, to, tag] = key;
      Scheduler& scheduler = engine_.env_.scheduler();
      const Scheduler::Waiting waiting(
          &scheduler,
          absl::StrCat("for a message of ", op.size, " bytes from rank ", from,
                       " to rank ", to, ", tag ", absl::Hex(tag)));
      absl::MutexLock lock(&hub_->mu());
      if (!engine_.env_.Await(hub_->mu(), absl::Condition(&over), deadline)) {
        return absl::DeadlineExceededError("a message did not come in time");
      }
    }
    if (engine_.IsOver()) return absl::AbortedError("cancelled");
    return op.error;
  }

  SimEngine& engine_;
  const std::shared_ptr<Network::Hub> hub_;
};

absl::StatusOr<std::unique_ptr<EngineBatch>> SimEngine::Start(
    absl::Span<const EngineSend> sends, absl::Span<const EngineRecv> recvs) {
  env_.scheduler().Yield();
  if (IsOver() || hub_ == nullptr) return absl::AbortedError("cancelled");
  auto batch = std::make_unique<Batch>(this, hub_);
  for (const EngineRecv& recv : recvs) {
    auto op = std::make_shared<Op>();
    op->to = recv.data.data();
    op->size = recv.data.size();
    batch->recvs.push_back(
        {{recv.peer, options_.rank, recv.tag}, std::move(op)});
  }
  for (const EngineSend& send : sends) {
    auto op = std::make_shared<Op>();
    op->from = send.data.data();
    op->size = send.data.size();
    batch->sends.push_back(
        {{options_.rank, send.peer, send.tag}, std::move(op)});
  }
  for (const auto& [key, op] : batch->recvs) {
    hub_->PostRecv(std::get<0>(key), std::get<1>(key), std::get<2>(key), op);
  }
  for (const auto& [key, op] : batch->sends) {
    hub_->PostSend(std::get<0>(key), std::get<1>(key), std::get<2>(key), op);
  }
  return batch;
}

}  // namespace dsd::sim

namespace dsd {
namespace {

absl::StatusOr<std::unique_ptr<Engine>> CreateSim(
    const EngineOptions& options) {
  auto* const env = dynamic_cast<sim::SimEnv*>(options.env);
  if (env == nullptr || env->network() == nullptr) {
    return absl::InvalidArgumentError(
        "backend \"sim\" serves ranks of a simulation only");
  }
  return std::make_unique<sim::SimEngine>(options, env);
}

}  // namespace

const BackendDescriptor& SimBackend() {
  static constexpr BackendDescriptor kDescriptor = {
      /*name=*/"sim",       kEngineApiVersion,
      /*host_memory=*/true, /*cuda_memory=*/false,
      /*in_process=*/true,  &CreateSim};
  return kDescriptor;
}

}  // namespace dsd
