// SPDX-License-Identifier: Apache-2.0
//
// What communicator.cc and collectives.cc share. Private to this package.

#ifndef DSD_CORE_COMM_COMMUNICATOR_INTERNAL_H_
#define DSD_CORE_COMM_COMMUNICATOR_INTERNAL_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/engine.h"
#include "dsd/core/comm/membership.h"
#include "dsd/core/comm/store.h"
#include "dsd/core/comm/whereabouts.h"

namespace dsd {

struct Standby;

// A call as it is named in errors and compared between ranks.
struct Call {
  // `terms`: what else ranks must agree on, beyond what `text` says.
  explicit Call(std::string text, absl::Span<const int64_t> terms = {});

  std::string text;
  uint64_t digest;
};

// One rank's part of a group, shared by its lanes. Thread-safe.
struct Communicator::Core {
  ~Core();

  // OK, or the first error.
  absl::Status status();

  // That `call` was cancelled by this rank.
  absl::Status Cancelled(absl::string_view call) const;

  // The first error, with what it stopped: `call`, and what else was `found`
  // here.
  absl::Status ErrorDuring(absl::string_view call,
                           absl::string_view found = "");

  // OK, or the first error for a call that was not started.
  absl::Status CheckAlive(absl::string_view call);

  // Records `status` as the first error if there is none, tells the other ranks
  // if it came from this one, and ends all waits. Returns whether it is the
  // first.
  bool Fail(const absl::Status& status, bool tell);

  // Fails and tells; returns `status`, or the first error if that is another.
  absl::Status FailDuring(const absl::Status& status, absl::string_view call);

  // An argument of `call` is wrong. The other ranks, whose own may be right,
  // wait for this one in it, so that is everybody's error.
  absl::Status Refuse(
      absl::string_view call, absl::string_view why,
      absl::StatusCode code = absl::StatusCode::kInvalidArgument);

  // What to return for an error of the engine during `call`, waiting a moment
  // for the store's verdict, which knows better who is gone.
  // Not for long after `deadline`.
  absl::Status EngineFailed(const absl::Status& status, absl::string_view call,
                            absl::Time deadline);

  // Ends a call whose time is over; asks the others where they are. See
  // LateCall.
  absl::Status TimeIsOver(const ActiveCall& active, std::string missing = "",
                          std::vector<int> peers = {});

  // "on rank 1 of group "world"".
  std::string Here() const;

  // For the others' error texts: what this rank does on the lane in question,
  // and that a call there waits for a message of `peer` from now on, or for
  // none (-1).
  std::string Answer(absl::string_view question);
  void WaitFor(uint64_t lane, int peer);

  // Calls are cancelled by a flag that nobody announces, so a thread looks.
  absl::Status WatchCancel(const std::atomic<bool>* cancel,
                           absl::string_view call);
  void UnwatchCancel(const std::atomic<bool>* cancel);
  void CancelLoop();

  int rank = 0;
  int size = 1;
  std::string backend;
  bool has_cuda_memory = false;
  std::string group;
  uint64_t generation = 0;
  Env* env = nullptr;
  std::shared_ptr<Store> store;
  std::unique_ptr<Membership> membership;  // null in a world of one
  std::unique_ptr<Engine> engine;          // likewise
  std::unique_ptr<Standby> standby;        // null without may_rebuild

  absl::Mutex mu;
  absl::Status error ABSL_GUARDED_BY(mu);
  bool shut_down ABSL_GUARDED_BY(mu) = false;
  // `engine`, for Fail, from the moment it may be cancelled.
  Engine* cancellable ABSL_GUARDED_BY(mu) = nullptr;
  absl::flat_hash_set<std::string> lane_names ABSL_GUARDED_BY(mu);
  Position position ABSL_GUARDED_BY(mu);
  struct Watched {
    const std::atomic<bool>* cancel;
    std::string call;
  };
  std::vector<Watched> watched ABSL_GUARDED_BY(mu);
  bool stopping ABSL_GUARDED_BY(mu) = false;
  std::unique_ptr<EnvThread> watcher ABSL_GUARDED_BY(mu);
};

// A call in progress, for the others' error texts, with its limits.
class Communicator::ActiveCall {
 public:
  ActiveCall(const Lane& lane, Call call, const CallOptions& options,
             bool collective);
  ActiveCall(const ActiveCall&) = delete;
  ~ActiveCall();

  const std::shared_ptr<Core> core;
  const uint64_t lane;
  const std::vector<int> members;  // see Lane
  const Call call;
  const bool collective;
  const absl::Duration timeout;
  const absl::Time deadline;
  const std::atomic<bool>* const cancel;
};

struct Communicator::Lane {
  // A message to this rank itself, waiting for its counterpart.
  struct SelfMessage {
    Call call;
    const std::byte* from = nullptr;
    std::byte* to = nullptr;
    size_t size = 0;
    std::shared_ptr<bool> done = std::make_shared<bool>(false);
  };

  std::shared_ptr<Core> core;
  std::string name;
  uint64_t id = 0;
  bool is_main = false;
  // Of the ranks that this lane has, which are the group's or, by Split, some
  // of them. Peers of ops are such ranks until Start.
  int rank = 0;
  int size = 1;
  std::vector<int> members;  // the group's numbers of them; empty: all
  std::vector<int> host_of_rank;
  int64_t splits = 0;
  std::vector<uint64_t> next_send;  // sequence numbers, by peer
  std::vector<uint64_t> next_recv;
  std::deque<SelfMessage> self_sends;
  std::deque<SelfMessage> self_recvs;

  Lane(std::shared_ptr<Core> core, std::string name, bool is_main);
  // Of Split.
  Lane(std::shared_ptr<Core> core, std::string name, int rank,
       std::vector<int> members);

  // Ranks with equal `names` share a host.
  template <class Name>
  void SetHosts(absl::Span<const Name> names) {
    absl::flat_hash_map<Name, int> numbers;
    host_of_rank.clear();
    for (const Name& name : names) {
      host_of_rank.push_back(
          numbers.try_emplace(name, static_cast<int>(numbers.size()))
              .first->second);
    }
  }

  // The group's number of a rank of this lane.
  int GroupRank(int r) const { return members.empty() ? r : members[r]; }

  // The entry of every public call.
  absl::StatusOr<std::unique_ptr<ActiveCall>> Begin(Call call,
                                                    const CallOptions& options,
                                                    bool collective);

  // An exchange that is part of `active`, which must outlive it.
  absl::StatusOr<PendingExchange> Post(absl::Span<const SendOp> sends,
                                       absl::Span<const RecvOp> recvs,
                                       const ActiveCall& active);
  // The same with the group's ranks as peers.
  absl::StatusOr<PendingExchange> Start(absl::Span<const SendOp> sends,
                                        absl::Span<const RecvOp> recvs,
                                        const ActiveCall& active);
  absl::Status Run(absl::Span<const SendOp> sends,
                   absl::Span<const RecvOp> recvs, const ActiveCall& active);
  // The same in chunks of which few are under way, if any op is long. Both
  // sides must be sure of the sizes.
  absl::Status RunInChunks(absl::Span<const SendOp> sends,
                           absl::Span<const RecvOp> recvs,
                           const ActiveCall& active,
                           const CallOptions& options);

  // For calls with a root, whose own messages go one way: what each rank says
  // to the next one at once, before it waits for any other, so that all compare
  // their calls, as in the first step of every other collective; two ranks that
  // both take themselves for the root would not notice each other.
  // `root_sends_to_next`: the root's first message to the next rank is that.
  void AddRing(int root, bool root_sends_to_next, std::vector<SendOp>& sends,
               std::vector<RecvOp>& recvs) const;

  // Copies messages to this rank itself that have both ends.
  absl::Status MatchSelf();

  // The mismatch of a message, as an error that both sides understand.
  struct Described {
    absl::string_view call;
    uint64_t size = 0;
    DeviceType memory = DeviceType::kCpu;
  };
  absl::Status Mismatch(int from, const Described& sent,
                        const Described& expected, uint64_t sequence) const;

  // Refuses what there is no reduction for.
  absl::Status CheckReduction(absl::string_view call, DType dtype, ReduceOp op);

  absl::Status Barrier(const ActiveCall& active);
  // The same, in which each rank says a word, which all get: by rank.
  absl::StatusOr<std::vector<uint64_t>> BarrierWithWord(
      uint64_t mine, const ActiveCall& active);
  // parts[rank] is in place already.
  absl::Status AllGather(absl::Span<const absl::Span<std::byte>> parts,
                         const ActiveCall& active, const CallOptions& options);
};

}  // namespace dsd

#endif  // DSD_CORE_COMM_COMMUNICATOR_INTERNAL_H_
