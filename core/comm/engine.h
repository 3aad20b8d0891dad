// SPDX-License-Identifier: Apache-2.0
//
// What a backend implements: move bytes between ranks. Everything else
// (headers, sequence numbers, collectives, deadlines, liveness, error text) is
// written once in Communicator.

#ifndef DSD_CORE_COMM_ENGINE_H_
#define DSD_CORE_COMM_ENGINE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"

namespace dsd {

class Env;
class Store;

// Where the bytes of a message are. Memory of a CUDA device is read and written
// in the order of `stream`, a cudaStream_t (null: the default stream): after
// what was enqueued there before the call, and before what is enqueued there
// after the wait.
struct MemorySpace {
  DeviceType type = DeviceType::kCpu;
  void* stream = nullptr;
};

// `tag` names one message from one rank to another: Communicator never uses a
// tag twice between the same two ranks in one direction. A send may be shorter
// than the receive of its tag, which then fills the front of its memory, and is
// never longer; a send or receive whose counterpart has another tag never
// matches anything and is ended by Cancel. `peer` is never this rank.
//
// Device memory comes only to engines with cuda_memory, and to a counterpart of
// the same size in device memory. Such messages of one lane come from one
// thread at a time, in an order in which the Starts of a lane could be carried
// out one after another: messages that wait for each other, as in a ring, are
// in one Start on each rank.
struct EngineSend {
  int peer;
  uint64_t tag;
  absl::Span<const std::byte> data;
  MemorySpace space = {};
  uint64_t lane = 0;  // as in OpenLane
};
struct EngineRecv {
  int peer;
  uint64_t tag;
  absl::Span<std::byte> data;
  MemorySpace space = {};
  uint64_t lane = 0;
};

// Posted sends and receives. The destructor blocks until the engine no longer
// touches the memory (after Cancel: promptly).
class EngineBatch {
 public:
  virtual ~EngineBatch() = default;

  // Returns OK when all sends may be reused and all receives have arrived.
  // Errors: DeadlineExceeded; Unavailable (text names the peer rank where
  // known); Aborted after Cancel. After an error the engine is unusable.
  virtual absl::Status Wait(absl::Time deadline) = 0;

  // The same for the receive at `index` of the list given to Start.
  virtual absl::Status WaitReceived(size_t index, absl::Time deadline) = 0;
};

struct EngineOptions {
  int rank = 0;
  int world_size = 1;
  Env* env = nullptr;
  // Keys are private to this engine (prefixed by group and generation).
  std::shared_ptr<Store> store;
  // Address of the interface to use, for instance "127.0.0.1"; empty: the
  // backend's own rule and environment variables.
  std::string bind_address;
  // CommunicatorOptions::backend_context.
  std::shared_ptr<void> context;
};

// Thread-safe: any thread may Start; Wait on one batch is called by one thread.
class Engine {
 public:
  // All batches are destroyed before.
  virtual ~Engine() = default;

  // Connects all ranks; the first call. Collective over world_size ranks.
  // Errors: DeadlineExceeded naming absent ranks where known; Unavailable;
  // Aborted after Cancel.
  virtual absl::Status Connect(absl::Time deadline) = 0;

  // Device memory may be sent on this lane from now on. Collective. Errors:
  // those of Connect.
  virtual absl::Status OpenLane(uint64_t /*lane*/, absl::Time /*deadline*/) {
    return absl::OkStatus();
  }

  // Posts all receives, then all sends, without waiting for completion.
  virtual absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) = 0;

  // From any thread, idempotent, returns at once: Connect, all Waits and all
  // Starts, now and later, end with Aborted.
  virtual void Cancel() = 0;
};

inline constexpr int kEngineApiVersion = 1;

// A constant that describes a backend. No device or socket is touched before
// Engine::Connect.
struct BackendDescriptor {
  absl::string_view name;  // "gloo"
  int api_version = kEngineApiVersion;
  bool host_memory = true;
  bool cuda_memory = false;
  // The ranks must be threads of one process.
  bool in_process = false;
  // Errors: InvalidArgument for options the backend cannot serve.
  absl::StatusOr<std::unique_ptr<Engine>> (*create)(const EngineOptions&);
};

}  // namespace dsd

#endif  // DSD_CORE_COMM_ENGINE_H_
