// SPDX-License-Identifier: Apache-2.0
//
// Ranks that move bytes together. Collective and point-to-point calls with
// deadlines; the first error poisons the communicator on every rank, and its
// text names the rank that caused it.

#ifndef DSD_CORE_COMM_COMMUNICATOR_H_
#define DSD_CORE_COMM_COMMUNICATOR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/engine.h"
#include "dsd/core/comm/launch.h"
#include "dsd/core/comm/store.h"

namespace dsd {

enum class ReduceOp : uint8_t { kSum, kMin, kMax };

// `label`: of this message alone, else that of the exchange holds. Both sides
// of a message are in memory of the same type; memory of a device needs a
// backend with cuda_memory and a peer that is another rank.
struct SendOp {
  int peer;
  absl::Span<const std::byte> data;
  MemorySpace space = {};
  absl::string_view label = {};
};
struct RecvOp {
  int peer;
  absl::Span<std::byte> data;
  MemorySpace space = {};
  absl::string_view label = {};
};

struct CommunicatorOptions {
  int rank = 0;
  int world_size = 1;
  std::string backend;  // see FindBackend
  // Used instead of looking `backend` up, if not null. Must outlive the
  // communicator.
  const BackendDescriptor* descriptor = nullptr;
  Env* env = Env::Real();
  std::shared_ptr<Store> store;  // required for world_size > 1
  std::string group = "world";
  // Which incarnation of the group; all ranks must agree. One that has failed
  // is not used again: the next takes another number.
  uint64_t generation = 0;
  // See EngineOptions.
  std::string bind_address;
  // The same for ranks that reach each other without the network, and no
  // others; empty: Env::HostId().
  std::string host;
  // What backends that need more of the caller say that it is; usually null.
  std::shared_ptr<void> backend_context;
  absl::Duration connect_timeout = absl::Minutes(2);
};

struct RebuildOptions {
  // Of all of it.
  absl::Duration timeout = absl::Minutes(2);
  // How long ranks that are there, but do not call Rebuild, are waited for.
  absl::Duration patience = absl::Seconds(30);
  // Fewer are an error on all of them. 0: more than half of the failed group,
  // of which there is never a second one, also where a network falls apart.
  int min_ranks = 0;
};

struct WorldOptions;

// Posted messages, see Communicator::StartExchange. The destructor blocks until
// the memory is no longer used; messages that were not waited for poison the
// communicator. Used by the thread of its communicator, and destroyed before
// it.
class [[nodiscard]] PendingExchange {
 public:
  ~PendingExchange();
  PendingExchange(PendingExchange&&) noexcept;
  PendingExchange& operator=(PendingExchange&&) noexcept;

  // Blocks until all of it is done. Call once.
  absl::Status Wait();

 private:
  friend class Communicator;
  struct Impl;
  explicit PendingExchange(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// One rank's membership in a group, on one lane: the one that Create made, one
// of OpenLane or one of Split. Thread-compatible; Abort and status() may come
// from any thread. Different lanes may be used by different threads at once.
//
// Collective: all ranks of the group must make the same collective calls in the
// same order on one lane. Each message carries a checked header (generation,
// lane, sequence number, operation, size): a rank that makes another call fails
// all ranks with FailedPrecondition that names both calls.
//
// Errors of all calls: InvalidArgument (an argument is wrong on some rank,
// which is named; Unimplemented for a reduction that there is not);
// FailedPrecondition (ranks disagree; at least one of them notices in this
// call, also where they name different roots); DeadlineExceeded (names
// operation and the ranks that did not arrive, where known); Unavailable (a
// rank died; named); ResourceExhausted (the system has no thread or descriptor
// left); Cancelled; Aborted (someone called Abort; names rank and reason).
//
// Any of them, a wrong argument too, since the others wait for that rank,
// poisons the group on all ranks and lanes: later calls return the first error
// at once. Output buffers are then unspecified, and no memory is referenced any
// more. After Shutdown calls are FailedPrecondition, which changes nothing.
class Communicator {
 public:
  // Connects. Collective over world_size ranks. world_size 1 needs no store and
  // opens no socket, whatever the backend.
  static absl::StatusOr<std::unique_ptr<Communicator>> Create(
      const CommunicatorOptions& options);

  // Of Create's, without Shutdown and on a group that has not failed: waits up
  // to a second for all other ranks to leave, too, as they do after an error
  // that they have agreed on; if they do not, the group fails (Unavailable on
  // the others, naming this rank). Returns within 2 s. Lanes of OpenLane and
  // Split that are left end with it, on this rank: calls that wait on them, and
  // later ones, are FailedPrecondition. Of OpenLane's and Split's: nothing.
  ~Communicator();

  int rank() const;
  int size() const;
  absl::string_view backend() const;
  // Whether messages may be in CUDA memory.
  bool has_cuda_memory() const;
  uint64_t generation() const;
  Env* env() const;

  // By rank: equal numbers, equal host; from 0, in the order in which they
  // first appear. Known on all ranks since they connected.
  absl::Span<const int> host_of_rank() const;

  // OK, or the first error.
  absl::Status status() const;

  // The same ranks and connections with sequence numbers of their own.
  // Collective on this lane. `name` must be the same on all ranks
  // (FailedPrecondition) and new in this group (AlreadyExists on all ranks,
  // which poisons nothing).
  absl::StatusOr<std::unique_ptr<Communicator>> OpenLane(
      absl::string_view name, const CallOptions& options = {});

  // Collective on this lane. Ranks that give the same color >= 0 get a
  // communicator of their own, in which they are numbered by key, and by rank
  // where keys are equal; ranks with a color < 0 get null. It is a lane for
  // some of the ranks: the same connections, its own sequence numbers, and one
  // fate: an error on it poisons the whole group, and error texts name the
  // ranks of the group.
  absl::StatusOr<std::unique_ptr<Communicator>> Split(
      int color, int key, const CallOptions& options = {});

  // Point to point, not collective: only who is named takes part, in any order
  // with regard to others. Where two ranks must not heed the order of
  // collectives between them either, use a lane of OpenLane for it.
  //
  // Posts receives, then sends, and returns. Messages from one rank to another
  // match in the order in which each side names them, over all calls on this
  // lane. The two sides must agree on sizes; a rank with no op for a peer is
  // not involved. Memory must stay until Wait returns. Deadline and
  // cancellation of `options` hold for the Wait. Messages in device memory that
  // wait for each other, as in a ring, must be in one exchange on each rank.
  absl::StatusOr<PendingExchange> StartExchange(
      absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
      absl::string_view label, const CallOptions& options = {});

  // StartExchange and Wait.
  absl::Status Exchange(absl::Span<const SendOp> sends,
                        absl::Span<const RecvOp> recvs, absl::string_view label,
                        const CallOptions& options = {});

  // Collective. Returns OK on no rank before all have called.
  absl::Status Barrier(const CallOptions& options = {});

  // Collective. Rank `root`'s bytes win. Each rank, the root too, waits until
  // the one before it has called.
  absl::Status Broadcast(absl::Span<std::byte> data, int root,
                         const CallOptions& options = {});

  // Collective. parts[r] receives rank r's `mine`; sizes are known everywhere,
  // may differ and be 0. parts[rank()] may be `mine` itself, else there is no
  // overlap.
  absl::Status AllGather(absl::Span<const std::byte> mine,
                         absl::Span<const absl::Span<std::byte>> parts,
                         const CallOptions& options = {});

  // Collective. Rank r's `mine` receives parts[r] of rank `root`; sizes may
  // differ and be 0. `parts` is empty on the others. On the root `mine` may be
  // parts[root] itself, else there is no overlap.
  absl::Status Scatter(absl::Span<const absl::Span<const std::byte>> parts,
                       absl::Span<std::byte> mine, int root,
                       const CallOptions& options = {});

  // Collective. Byte strings of any size, also per rank. FailedPrecondition on
  // all ranks if one is longer than `max_bytes_each`, which must be equal on
  // all.
  absl::StatusOr<std::vector<std::string>> AllGatherBlobs(
      absl::string_view mine, int64_t max_bytes_each,
      const CallOptions& options = {});

  // Collective. `input` is the concatenation of size() parts of `counts[r]`
  // elements; `output` (counts[rank()] elements) receives the reduction of part
  // rank() over all ranks. Reduced in rank order, ((r0 + r1) + r2) + ..., for
  // float16 and bfloat16 in float32 and rounded once: the result depends on
  // neither backend nor timing. Types: floats, integers; kBool with min, max.
  // Unimplemented otherwise. `output` may be part rank() of `input` itself.
  absl::Status ReduceScatter(absl::Span<const std::byte> input,
                             absl::Span<const int64_t> counts,
                             absl::Span<std::byte> output, DType dtype,
                             ReduceOp op, const CallOptions& options = {});

  // Collective. In place, the same order of summation.
  absl::Status AllReduce(absl::Span<std::byte> data, DType dtype, ReduceOp op,
                         const CallOptions& options = {});

  // From any thread, idempotent, returns at once: pending and later calls on
  // every rank end with Aborted (Cancelled, if that is it) and this reason.
  void Abort(const absl::Status& reason);

  // Collective. Barrier, then an orderly goodbye: peers do not take the closing
  // connections for a death. The last call on all lanes; one of OpenLane or
  // Split only does the barrier. On a poisoned group only local, and returns
  // its error.
  absl::Status Shutdown(const CallOptions& options = {});

  // A new world of the ranks that are left of this one, which has failed, was
  // made by ConnectWorld with `may_rebuild`, and stays failed. Collective over
  // those who are left; their order stays, the lowest becomes rank 0 and serves
  // the store, so that it matters to nobody who has died. generation() grows,
  // and what is still under way of older ones reaches nobody. Rebuild works on
  // the new world, too.
  //
  // Errors: FailedPrecondition (this group has not failed, cannot be rebuilt,
  // or too few are left); Unavailable on a rank that the others did not wait
  // for; those of ConnectWorld. After an error all may call it once more.
  absl::StatusOr<std::unique_ptr<Communicator>> Rebuild(
      const RebuildOptions& options = {});

 private:
  friend absl::StatusOr<std::unique_ptr<Communicator>> ConnectWorld(
      const LaunchInfo& launch, const WorldOptions& options);
  // The world of `launch`, whose ranks meet in `store`.
  static absl::StatusOr<std::unique_ptr<Communicator>> ConnectThrough(
      std::shared_ptr<Store> store, const LaunchInfo& launch,
      const WorldOptions& options, absl::Time deadline);
  friend class PendingExchange;
  struct Core;
  struct Lane;
  class ActiveCall;
  class EngineStore;
  explicit Communicator(std::unique_ptr<Lane> lane);
  std::unique_ptr<Lane> lane_;
};

struct WorldOptions {
  std::string backend;  // see FindBackend
  // Used instead of looking `backend` up, if not null.
  const BackendDescriptor* descriptor = nullptr;
  Env* env = Env::Real();
  std::string bind_address;  // see EngineOptions
  std::string host;          // see CommunicatorOptions; LaunchInfo's counts
  absl::Duration connect_timeout = absl::Minutes(2);
  // A process that gives no sign of life for so long, because it is stopped or
  // its host is out of reach, is dead for the others (Unavailable, naming its
  // rank). The signs come from a thread of their own, whatever the process
  // computes. Zero: only deadlines notice. Rank 0's counts.
  absl::Duration heartbeat_bound = absl::Seconds(30);
  // In worlds of more than n ranks not all have a control connection to rank 0:
  // ranks n, 2n, ... listen at ports of their own, on the interface towards
  // rank 0, and relay for those up to the next of them. Where it is more, the
  // square root of the world size takes the place of n. 0: none relays. Rank
  // 0's counts.
  int control_fan_out = 128;
  // The same on all ranks: which incarnation of the world this is. A process
  // that takes the place of one that died joins the others in the next one:
  // those who are left destroy the failed communicator and connect with the
  // same number. Who comes early waits.
  uint64_t generation = 0;
  // Each rank listens at a port of its own, on the interface towards rank 0, so
  // that Communicator::Rebuild finds it.
  bool may_rebuild = false;
};

// The communicator of all ranks of a launch; of a world of one without a
// socket. Rank 0 serves the store at master_addr:master_port, bound to that
// address only, or, under torchrun's agent store, at a port of its own that it
// publishes through the agent's. Collective over launch.world_size; a process
// may call it again after Shutdown. Errors: those of Communicator::Create;
// FailedPrecondition naming MASTER_PORT if the port is in use, MASTER_ADDR if
// it is not this host's, or the versions if they differ; PermissionDenied if
// this rank and rank 0 do not have the same token (LaunchInfo).
absl::StatusOr<std::unique_ptr<Communicator>> ConnectWorld(
    const LaunchInfo& launch, const WorldOptions& options = {});

}  // namespace dsd

#endif  // DSD_CORE_COMM_COMMUNICATOR_H_
