// SPDX-License-Identifier: Apache-2.0
//
// Device messages of one lane: an NCCL communicator with a stream and a thread
// of its own. Private to this package.

#ifndef DSD_BACKENDS_NCCL_NCCL_LANE_H_
#define DSD_BACKENDS_NCCL_NCCL_LANE_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "dsd/backends/nccl/cuda_api.h"
#include "dsd/backends/nccl/nccl_api.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/engine.h"
#include "dsd/core/comm/store.h"

namespace dsd {

// Device messages that were given to one Start.
class NcclTransfer {
 private:
  friend class NcclLane;

  enum class State {
    kQueued,     // waits for its streams, or for its peers
    kLaunching,  // NCCL is told of it
    kLaunched,   // `done` is recorded
    kDone,
  };

  std::vector<EngineSend> sends;
  std::vector<EngineRecv> recvs;
  std::string peers;             // "rank 1, rank 2", for texts
  std::vector<CudaEvent> gates;  // what was enqueued on the streams before

  // To and from each peer, when the gates are passed on this side. Started by
  // one thread, then waited for and destroyed by the lane's.
  std::vector<EngineSend> hello_sends;
  std::vector<EngineRecv> hello_recvs;
  std::vector<std::byte> hellos;
  std::unique_ptr<EngineBatch> handshake;

  CudaEvent done = nullptr;
  State state = State::kQueued;  // guarded by the lane's mu_
};

// A transfer goes through three steps. Its gates: the host waits until the
// streams have reached it, so that no kernel of NCCL ever waits for one of the
// program. Its handshake: each message is announced through the companion by
// both sides, under a name that has its tag and its number in it, so that NCCL,
// which knows neither names nor sizes, only ever gets messages that match; and
// both sides have passed their gates then, so a kernel waits for nothing but
// the wire, and a rank that is late or gone leaves none behind. Its launch: one
// group of ncclSend and ncclRecv.
//
// A message of a rank to itself, which no Communicator sends, has both ends in
// one transfer and needs no handshake: so tests go the whole way on one device.
//
// Transfers of a lane are launched in the order of their Starts. All calls of
// NCCL but one are made by the lane's thread, so none that takes long, although
// it should not, can break a deadline; the exception is the look for errors of
// those who wait.
class NcclLane {
 public:
  struct Options {
    const CudaApi* cuda;
    const NcclApi* nccl;
    int device;
    int rank;
    int world_size;
    uint64_t lane;
    Env* env;
    Store* store;       // for the unique id
    Engine* companion;  // connected; null in a world of one
  };

  explicit NcclLane(const Options& options) : options_(options) {}
  NcclLane(const NcclLane&) = delete;

  // Only after Close has said that the thread has ended, or without Open.
  ~NcclLane() = default;

  // Makes the communicator, and sends one byte around all ranks. Collective.
  // Errors: DeadlineExceeded; FailedPrecondition (versions differ, what NCCL
  // refuses); Unavailable; Aborted after Cancel.
  absl::Status Open(absl::Time deadline);

  // All messages are in device memory and none is empty.
  absl::StatusOr<std::unique_ptr<NcclTransfer>> Start(
      std::vector<EngineSend> sends, std::vector<EngineRecv> recvs);

  absl::Status Wait(NcclTransfer& transfer, absl::Time deadline);

  // Blocks until nobody uses the memory of the transfer. Cancelled before
  // unless it is done. Ends the process if NCCL does not let go.
  void Release(std::unique_ptr<NcclTransfer> transfer);

  // From any thread, returns at once; the thread aborts the communicator.
  void Cancel();

  // Ends the thread; false if NCCL does not return, and then this object must
  // live for ever.
  bool Close();

 private:
  using State = NcclTransfer::State;

  void Run(absl::Time deadline);
  absl::Status OpenInThread(absl::Time deadline);
  absl::Status WarmUp(absl::Time deadline);
  // Carries out what is queued until the lane is closed or cancelled.
  absl::Status Serve();
  void End(bool in_order);

  absl::Status RecordGates(NcclTransfer& transfer);
  absl::StatusOr<bool> GatesArePassed(const NcclTransfer& transfer);
  void PrepareHandshake(NcclTransfer& transfer);
  // Announces it if its gates are passed; whether it is announced.
  absl::StatusOr<bool> Announce(NcclTransfer& transfer);
  absl::Status Launch(NcclTransfer& transfer);
  // Whether nobody uses its memory any more.
  bool IsLetGo(NcclTransfer& transfer);
  // Waits until NCCL has done what it was told, on the host's side.
  absl::Status Settle(absl::string_view what, absl::Time deadline);
  absl::Status LookForErrors();

  absl::StatusOr<CudaEvent> TakeEvent();
  void ReturnEvents(NcclTransfer& transfer);
  // Sleeps, longer each time, up to a millisecond; not after Cancel.
  void Rest(absl::Duration& pause);
  bool IsCancelled();
  absl::Status StatusIfCancelled();

  const Options options_;

  // Held for each call of NCCL, which takes no two at once on a communicator.
  absl::Mutex nccl_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  NcclComm comm_ ABSL_GUARDED_BY(nccl_mu_) = nullptr;

  // Of the thread, constant once the lane is open.
  CudaStream stream_ = nullptr;
  void* scratch_ = nullptr;

  // How many messages went to, and came from, each rank. Of the thread that
  // calls Start.
  std::vector<uint64_t> sent_;
  std::vector<uint64_t> received_;

  absl::Mutex mu_;
  bool opened_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status open_status_ ABSL_GUARDED_BY(mu_);
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  bool closing_ ABSL_GUARDED_BY(mu_) = false;
  // Nothing more is launched.
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  // Nothing that was launched touches memory any more.
  bool over_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;    // the thread is about to return
  absl::Status failure_ ABSL_GUARDED_BY(mu_);  // why it has stopped
  std::deque<NcclTransfer*> queue_ ABSL_GUARDED_BY(mu_);
  std::vector<CudaEvent> free_events_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<EnvThread> thread_;
};

}  // namespace dsd

#endif  // DSD_BACKENDS_NCCL_NCCL_LANE_H_
