// SPDX-License-Identifier: Apache-2.0
//
// Nothing moves in UCX unless somebody calls ucp_worker_progress, the sender of
// a message included, and a worker belongs to one thread: so each engine has a
// thread that makes all calls of UCX, and sleeps in poll when nothing moves.
// Other threads hand it batches and wait for marks in them.
//
// A message is an active message whose header names it. Small ones carry their
// bytes (eager). Of others only the header comes, and the thread then has the
// bytes brought straight into the memory of the receive (rendezvous). What
// comes before its receive is posted is parked: a copy of eager bytes, of which
// a sender has at most kEagerWindow under way to one peer (then it uses
// rendezvous for small messages, too), or UCX's descriptor of a rendezvous.
//
// What UCX does not do: it never ends the wait for a message of a peer that has
// died (OnEndpointError does, and Communicator's verdict); and it cannot take
// back a transfer that is under way, so that its end, that of the endpoint, or
// that of the worker is waited for before memory is given back.

#include "dsd/backends/ucx/ucx_backend.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <ucp/api/ucp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/log/log.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "dsd/backends/ucx/ucx_library.h"
#include "dsd/backends/ucx/ucx_settings.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/rank_list.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store.h"

namespace dsd {
namespace {

constexpr unsigned kMessageId = 0x64;  // of all active messages of the engine

// Up to here a second copy costs less than the round trip of a rendezvous. An
// envelope of Communicator is smaller.
constexpr size_t kMaxEagerBytes = size_t{32} << 10;
// Eager messages that a peer has not taken; each also costs a place.
constexpr size_t kEagerWindow = size_t{512} << 10;
constexpr size_t kEagerOverhead = 128;

// Wake-ups may be lost or late (rapidsai/ucxx#15).
constexpr absl::Duration kMaxSleep = absl::Milliseconds(100);
// While UCX does not let us sleep though nothing moves.
constexpr int kSpins = 8;
constexpr int kYields = 2000;
constexpr absl::Duration kBusySleep = absl::Microseconds(200);
constexpr absl::Duration kAbortPatience = absl::Milliseconds(300);
constexpr absl::Duration kWireUpPatience = absl::Milliseconds(50);
constexpr absl::Duration kClosePatience = absl::Seconds(1);
// Of an endpoint while it connects.
constexpr int kFlushes = 2;
// Of a worker and UCX's own thread; a rank more takes two.
constexpr int kDescriptors = 32;

// Of what fails while UCX starts: mostly for what the user has set.
constexpr absl::StatusCode kBadSetting = absl::StatusCode::kInvalidArgument;

enum class MessageKind : uint32_t {
  kData,
  kHello,    // of each rank to each other one, while connecting
  kAnswer,   // to it
  kTaken,    // `tag` bytes of eager messages have found their receives
  kFlushed,  // when all that connecting has sent until then has left
};

struct Header {
  // Chosen by the receiver: a message that was not meant for it has another.
  uint64_t nonce;
  uint64_t tag;
  uint32_t from;
  MessageKind kind;
};
static_assert(sizeof(Header) == 24);
static_assert(std::is_trivially_copyable_v<Header>);

absl::Status CancelledStatus() { return absl::AbortedError("cancelled"); }

size_t EagerCost(size_t bytes) { return bytes + kEagerOverhead; }

// Signals are for the program's own threads.
class SignalBlock {
 public:
  SignalBlock() {
    sigset_t all;
    sigfillset(&all);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) {
      sigdelset(&all, fault);
    }
    pthread_sigmask(SIG_BLOCK, &all, &before_);
  }
  SignalBlock(const SignalBlock&) = delete;
  ~SignalBlock() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

class UcxEngine final : public Engine {
 public:
  explicit UcxEngine(const EngineOptions& options)
      : options_(options), peers_(options.world_size) {
    for (int rank = 0; rank < options.world_size; ++rank) {
      peers_[rank].engine = this;
      peers_[rank].rank = rank;
    }
  }

  ~UcxEngine() override {
    {
      absl::MutexLock lock(&mu_);
      closing_ = true;
      WakeOwner();
    }
    owner_.reset();
  }

  absl::Status Connect(absl::Time deadline) override;
  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override;

  void Cancel() override {
    absl::MutexLock lock(&mu_);
    cancelled_ = true;
    WakeOwner();
  }

 private:
  class Batch;

  // A posted send or receive. Until it is done only the owner touches it.
  struct Op {
    UcxEngine* engine;
    Batch* batch;
    bool is_send;
    int peer;
    uint64_t tag;
    std::byte* data;
    size_t size;
    Header header;      // of a send: UCX reads it until it has sent all
    bool done = false;  // guarded by mu_
  };

  struct Peer {
    UcxEngine* engine = nullptr;
    int rank = 0;
    uint64_t nonce = 0;
    ucp_ep_h endpoint = nullptr;
    absl::Status error;
    // How far connecting has come, see UpdateConnected.
    bool said_hello = false;
    bool answered = false;
    bool said_flushed = false;
    int flushes_started = 0;
    int flushes = 0;             // that have ended; kFlushes: connected
    size_t eager_under_way = 0;  // to it
    size_t eager_taken = 0;      // from it, which it has not been told
  };

  // A message without its receive.
  struct Parked {
    std::unique_ptr<std::byte[]> eager;
    void* rendezvous = nullptr;
    size_t size = 0;
  };

  using Key = std::pair<int, uint64_t>;  // peer, tag

  // A message of the engine's own.
  struct Control {
    UcxEngine* engine;
    Header header;
  };

  // --- Any thread ---

  void WakeOwner() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    attention_.store(true, std::memory_order_release);
    if (asleep_) waker_.Wake();
  }
  absl::Status StartOwner(absl::Time deadline);
  absl::Status ExchangeAddresses(absl::Time deadline);
  absl::Status AwaitOwner(const absl::Condition& condition, absl::Time deadline,
                          absl::string_view what);
  bool Ended() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return cancelled_ || !failure_.ok();
  }
  absl::Status EndStatus() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return cancelled_ ? CancelledStatus() : failure_;
  }

  // --- The owner's thread ---

  void Own();
  absl::Status CheckDescriptors();
  absl::Status Open();
  absl::Status Configure(ucp_config_t* config);
  void Run();
  void ConnectPeers();
  void Post(Op* op);
  void Send(Op* op);
  void BringRendezvous(Op* op, void* descriptor, size_t size);
  void SendControl(Peer& peer, MessageKind kind, uint64_t tag);
  void Taken(Peer& peer, size_t bytes);
  void Complete(Op* op, absl::Status status);
  void Finish(Op* op, ucs_status_t status);  // of a request of UCX
  void Fail(const absl::Status& status);
  void ReportBrokenPeers();
  void UpdateConnected();
  void Flush(Peer& peer);
  void Sleep(absl::Time until);
  void Yield();
  bool LetWireUpEnd();
  void Close(bool orderly);
  ucs_status_t Receive(const Header& header, void* data, size_t size,
                       bool is_rendezvous);
  absl::Status PeerError(const Peer& peer) const {
    return absl::UnavailableError(absl::StrCat("connection to rank ", peer.rank,
                                               ": ", peer.error.message()));
  }

  // --- Called by UCX, in the owner's thread ---

  static ucs_status_t OnMessage(void* engine, const void* header,
                                size_t header_size, void* data, size_t size,
                                const ucp_am_recv_param_t* param);
  static void OnSent(void* request, ucs_status_t status, void* op);
  static void OnReceived(void* request, ucs_status_t status, size_t size,
                         void* op);
  static void OnControlSent(void* request, ucs_status_t status, void* control);
  static void OnFlushed(void* request, ucs_status_t status, void* peer);
  static void OnEndpointClosed(void* request, ucs_status_t status,
                               void* engine);
  static void OnEndpointError(void* peer, ucp_ep_h endpoint,
                              ucs_status_t status);

  const EngineOptions options_;
  UcxHost host_;
  Waker waker_;

  absl::Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  bool closing_ ABSL_GUARDED_BY(mu_) = false;
  // The first error that concerns all messages.
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  bool asleep_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<Batch*> started_ ABSL_GUARDED_BY(mu_);
  // Connecting, step by step.
  bool opened_ ABSL_GUARDED_BY(mu_) = false;
  std::string address_ ABSL_GUARDED_BY(mu_);
  std::vector<std::string> addresses_ ABSL_GUARDED_BY(mu_);  // by rank
  std::vector<bool> connected_ ABSL_GUARDED_BY(mu_);         // by rank
  // The owner has ended: nothing touches the memory of any batch.
  bool quiet_ ABSL_GUARDED_BY(mu_) = false;
  // There is something for the owner under mu_.
  std::atomic<bool> attention_{false};

  // The owner's.
  const UcxLibrary* ucx_ = nullptr;
  UcxErrors* errors_ = nullptr;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int worker_fd_ = -1;
  uint64_t nonce_ = 0;
  bool user_rendezvous_ = false;
  int busy_rounds_ = 0;  // without progress, since UCX let us sleep
  bool connecting_ = false;
  bool closed_ = false;
  std::vector<Peer> peers_;  // not resized: UCX has pointers to them
  bool peer_broke_ = false;
  absl::flat_hash_map<Key, Op*> posted_;
  absl::flat_hash_map<Key, Parked> parked_;
  // Requests of UCX that end by themselves once the endpoints are closed.
  // Receives do not: those end with the worker.
  size_t under_way_ = 0;

  // Last: ends before what it uses.
  std::unique_ptr<EnvThread> owner_;
};

class UcxEngine::Batch final : public EngineBatch {
 public:
  explicit Batch(UcxEngine* engine) : engine_(engine) {}

  ~Batch() override {
    absl::MutexLock lock(&engine_->mu_);
    if (pending_ == 0) return;
    engine_->cancelled_ = true;
    engine_->WakeOwner();
    const auto quiet = [this]() ABSL_SHARED_LOCKS_REQUIRED(engine_->mu_) {
      return pending_ == 0 || engine_->quiet_;
    };
    // The owner ends by itself, in bounded time.
    engine_->options_.env->Await(engine_->mu_, absl::Condition(&quiet),
                                 absl::InfiniteFuture());
  }

  absl::Status Wait(absl::Time deadline) override {
    absl::MutexLock lock(&engine_->mu_);
    const auto over = [this]() ABSL_SHARED_LOCKS_REQUIRED(engine_->mu_) {
      return pending_ == 0 || !error_.ok() || engine_->Ended();
    };
    if (!engine_->options_.env->Await(engine_->mu_, absl::Condition(&over),
                                      deadline)) {
      return absl::DeadlineExceededError("a message did not come in time");
    }
    return Result(/*done=*/pending_ == 0 && error_.ok());
  }

  absl::Status WaitReceived(size_t index, absl::Time deadline) override {
    const Op& op = ops[index];  // the receives come first
    absl::MutexLock lock(&engine_->mu_);
    const auto over = [&]() ABSL_SHARED_LOCKS_REQUIRED(engine_->mu_) {
      return op.done || !error_.ok() || engine_->Ended();
    };
    if (!engine_->options_.env->Await(engine_->mu_, absl::Condition(&over),
                                      deadline)) {
      return absl::DeadlineExceededError(
          absl::StrCat("a message of rank ", op.peer, " did not come in time"));
    }
    return Result(op.done);
  }

  // Not moved once the batch is started.
  std::vector<Op> ops;

 private:
  friend class UcxEngine;

  absl::Status Result(bool done) const
      ABSL_SHARED_LOCKS_REQUIRED(engine_->mu_) {
    if (engine_->cancelled_) return CancelledStatus();
    if (done) return absl::OkStatus();
    return error_.ok() ? engine_->EndStatus() : error_;
  }

  UcxEngine* const engine_;
  size_t pending_ = 0;  // of ops; guarded by mu_ of the engine, like error_
  absl::Status error_;
};

// --- Any thread ---

absl::Status UcxEngine::AwaitOwner(const absl::Condition& condition,
                                   absl::Time deadline,
                                   absl::string_view what) {
  absl::MutexLock lock(&mu_);
  if (!options_.env->Await(mu_, condition, deadline)) {
    return absl::DeadlineExceededError(what);
  }
  return EndStatus();
}

absl::Status UcxEngine::StartOwner(absl::Time deadline) {
  std::string towards = options_.store->server_host();
  if (towards.empty()) {
    towards = "127.0.0.1";
  } else if (options_.bind_address.empty()) {
    DSD_ASSIGN_OR_RETURN(towards,
                         AddressTowards(options_.env, towards, deadline));
  }
  DSD_ASSIGN_OR_RETURN(host_, LookAtHost(options_.bind_address, towards));
  DSD_ASSIGN_OR_RETURN(Waker waker, Waker::Create());
  {
    absl::MutexLock lock(&mu_);
    waker_ = std::move(waker);
  }
  nonce_ = options_.env->RandomSeed();
  {
    // The threads that it starts inherit the mask.
    const SignalBlock block;
    owner_ = options_.env->StartThread("dsd_ucx", [this] { Own(); });
  }
  if (owner_ == nullptr) return NoThread("dsd_ucx");
  const auto opened = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return opened_ || Ended();
  };
  return AwaitOwner(absl::Condition(&opened), deadline,
                    "UCX did not start in time");
}

absl::Status UcxEngine::ExchangeAddresses(absl::Time deadline) {
  const std::string version = absl::StrCat(ucx_->major, ".", ucx_->minor);
  std::string address;
  {
    absl::MutexLock lock(&mu_);
    address = address_;
  }
  DSD_RETURN_IF_ERROR(options_.store->Set(
      absl::StrCat("ucx/", options_.rank),
      absl::StrCat(version, " ", nonce_, " ", address), deadline));
  std::vector<std::string> addresses(options_.world_size);
  for (Peer& peer : peers_) {
    if (peer.rank == options_.rank) continue;
    {
      absl::MutexLock lock(&mu_);
      if (Ended()) return EndStatus();
    }
    const absl::StatusOr<std::string> value =
        options_.store->Get(absl::StrCat("ucx/", peer.rank), deadline);
    if (absl::IsDeadlineExceeded(value.status())) {
      return absl::DeadlineExceededError(
          absl::StrCat("rank ", peer.rank, " has not said where it listens"));
    }
    DSD_RETURN_IF_ERROR(value);
    const std::vector<absl::string_view> fields =
        absl::StrSplit(*value, absl::MaxSplits(' ', 2));
    if (fields.size() != 3 || !absl::SimpleAtoi(fields[1], &peer.nonce) ||
        fields[2].empty()) {
      return absl::InternalError(
          absl::StrCat("rank ", peer.rank, " has published no UCX address"));
    }
    if (fields[0] != version) {
      return absl::FailedPreconditionError(
          absl::StrCat("rank ", peer.rank, " has UCX ", fields[0],
                       ", but rank ", options_.rank, " has UCX ", version,
                       "; use the same version on all ranks"));
    }
    addresses[peer.rank] = std::string(fields[2]);
  }
  absl::MutexLock lock(&mu_);
  addresses_ = std::move(addresses);
  WakeOwner();
  return absl::OkStatus();
}

absl::Status UcxEngine::Connect(absl::Time deadline) {
  DSD_RETURN_IF_ERROR(StartOwner(deadline));
  DSD_RETURN_IF_ERROR(ExchangeAddresses(deadline));
  const auto connected = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return Ended() || std::count(connected_.begin(), connected_.end(), true) ==
                          options_.world_size;
  };
  const absl::Status status =
      AwaitOwner(absl::Condition(&connected), deadline, "");
  if (!absl::IsDeadlineExceeded(status)) return status;
  std::vector<int> silent;
  absl::MutexLock lock(&mu_);
  for (int rank = 0; rank < static_cast<int>(connected_.size()); ++rank) {
    if (!connected_[rank]) silent.push_back(rank);
  }
  return absl::DeadlineExceededError(
      absl::StrCat("no answer over UCX from ", RankList(silent),
                   " (this rank uses interface ", host_.interface,
                   " unless UCX_NET_DEVICES says another)"));
}

absl::StatusOr<std::unique_ptr<EngineBatch>> UcxEngine::Start(
    absl::Span<const EngineSend> sends, absl::Span<const EngineRecv> recvs) {
  auto batch = std::make_unique<Batch>(this);
  batch->ops.reserve(recvs.size() + sends.size());
  for (const EngineRecv& recv : recvs) {
    batch->ops.push_back({this, batch.get(), /*is_send=*/false, recv.peer,
                          recv.tag, recv.data.data(), recv.data.size()});
  }
  for (const EngineSend& send : sends) {
    batch->ops.push_back({this, batch.get(), /*is_send=*/true, send.peer,
                          send.tag, const_cast<std::byte*>(send.data.data()),
                          send.data.size()});
  }
  absl::MutexLock lock(&mu_);
  if (Ended()) return EndStatus();
  if (!batch->ops.empty()) {
    batch->pending_ = batch->ops.size();
    started_.push_back(batch.get());
    WakeOwner();
  }
  return batch;
}

// --- The owner's thread ---

void UcxEngine::Own() {
  UcxErrors errors;
  errors_ = &errors;
  const absl::Status status = Open();
  {
    absl::MutexLock lock(&mu_);
    opened_ = true;
    if (failure_.ok()) failure_ = status;
  }
  if (status.ok()) Run();
  bool orderly;
  {
    absl::MutexLock lock(&mu_);
    orderly = !Ended();
  }
  Close(orderly);
  absl::MutexLock lock(&mu_);
  quiet_ = true;
}

// What the user has set, found as UCX finds it, and then our own.
absl::Status UcxEngine::Configure(ucp_config_t* config) {
  absl::flat_hash_map<std::string, std::string> values;
  char* text = nullptr;
  size_t size = 0;
  FILE* const stream = open_memstream(&text, &size);
  if (stream == nullptr) return absl::ResourceExhaustedError("out of memory");
  ucx_->ucp_config_print(config, stream, "", UCS_CONFIG_PRINT_CONFIG);
  fclose(stream);
  for (absl::string_view line :
       absl::StrSplit(absl::string_view(text, size), '\n')) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(line, absl::MaxSplits('=', 1));
    if (absl::StartsWith(parts.first, "UCX_")) {
      values[parts.first.substr(4)] = std::string(parts.second);
    }
  }
  free(text);

  // Of the file only what differs from UCX's defaults can be seen.
  const auto user = [&](absl::string_view name) -> std::optional<std::string> {
    if (const char* value = getenv(absl::StrCat("UCX_", name).c_str())) {
      return value;
    }
    const auto it = values.find(name);
    if (it == values.end()) return std::nullopt;
    for (absl::string_view usual :
         {"all", "auto", "20000000.00us", "20.00s", "20s"}) {
      if (it->second == usual) return std::nullopt;
    }
    return it->second;
  };
  DSD_ASSIGN_OR_RETURN(const UcxSettings settings,
                       ChooseUcxSettings(host_, user));
  user_rendezvous_ = settings.user_rendezvous;
  if (!settings.warning.empty()) {
    LOG_FIRST_N(WARNING, 1) << settings.warning;
  }
  // Up to 1.16 a transport knows its options without its own name. A name that
  // nobody knows is not an error.
  const bool is_old = ucx_->major == 1 && ucx_->minor < 17;
  for (const auto& [name, value] : settings.options) {
    absl::string_view known = name;
    if (is_old) absl::ConsumePrefix(&known, "TCP_");
    if (const ucs_status_t status = ucx_->ucp_config_modify(
            config, std::string(known).c_str(), value.c_str());
        status != UCS_OK) {
      return UcxError(*ucx_, absl::StrCat("set UCX_", name, "=", value), status,
                      *errors_, kBadSetting);
    }
  }
  return absl::OkStatus();
}

// Without descriptors some versions of UCX end the process.
absl::Status UcxEngine::CheckDescriptors() {
  const int needed = kDescriptors + 2 * options_.world_size;
  std::vector<Socket> trial;
  while (static_cast<int>(trial.size()) < needed) {
    trial.emplace_back(eventfd(0, EFD_CLOEXEC));
    if (!trial.back().valid()) {
      return absl::ResourceExhaustedError(
          absl::StrCat("UCX needs about ", needed,
                       " file descriptors, but after ", trial.size() - 1, ": ",
                       std::strerror(errno), "; raise the limit (ulimit -n)"));
    }
  }
  return absl::OkStatus();
}

absl::Status UcxEngine::Open() {
  DSD_RETURN_IF_ERROR(CheckDescriptors());
  DSD_ASSIGN_OR_RETURN(ucx_, LoadUcx());
  ucp_config_t* config = nullptr;
  if (const ucs_status_t status =
          ucx_->ucp_config_read(nullptr, nullptr, &config);
      status != UCS_OK) {
    return UcxError(*ucx_, "read UCX's configuration", status, *errors_,
                    kBadSetting);
  }
  absl::Status configured = Configure(config);
  ucs_status_t status = UCS_OK;
  if (configured.ok()) {
    ucp_params_t params = {};
    params.field_mask =
        UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS;
    params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    params.estimated_num_eps = options_.world_size;
    status = ucx_->ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &params,
                                    config, &context_);
  }
  ucx_->ucp_config_release(config);
  DSD_RETURN_IF_ERROR(configured);
  if (status != UCS_OK) {
    return UcxError(*ucx_, "start UCX", status, *errors_, kBadSetting);
  }

  ucp_worker_params_t worker = {};
  worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker.thread_mode = UCS_THREAD_MODE_SINGLE;
  status = ucx_->ucp_worker_create(context_, &worker, &worker_);
  if (status != UCS_OK) {
    worker_ = nullptr;
    return UcxError(*ucx_, "open UCX's transports", status, *errors_,
                    kBadSetting);
  }
  ucp_am_handler_param_t handler = {};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID |
                       UCP_AM_HANDLER_PARAM_FIELD_CB |
                       UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kMessageId;
  handler.cb = &OnMessage;
  handler.arg = this;
  status = ucx_->ucp_worker_set_am_recv_handler(worker_, &handler);
  if (status == UCS_OK) {
    status = ucx_->ucp_worker_get_efd(worker_, &worker_fd_);
  }
  ucp_address_t* address = nullptr;
  size_t size = 0;
  if (status == UCS_OK) {
    status = ucx_->ucp_worker_get_address(worker_, &address, &size);
  }
  if (status != UCS_OK) {
    return UcxError(*ucx_, "open UCX's transports", status, *errors_,
                    kBadSetting);
  }
  errors_->Take();
  absl::MutexLock lock(&mu_);
  address_.assign(reinterpret_cast<const char*>(address), size);
  ucx_->ucp_worker_release_address(worker_, address);
  return absl::OkStatus();
}

void UcxEngine::Run() {
  std::vector<Batch*> started;
  while (true) {
    bool moved = false;
    // Not forever: others may have something, too.
    for (int i = 0; i < 64 && ucx_->ucp_worker_progress(worker_) != 0; ++i) {
      moved = true;
    }
    if (peer_broke_) ReportBrokenPeers();
    if (connecting_) UpdateConnected();
    if (attention_.exchange(false, std::memory_order_acquire)) {
      bool connect;
      {
        absl::MutexLock lock(&mu_);
        if (Ended() || closing_) return;
        started.swap(started_);
        connect = !addresses_.empty();
      }
      if (connect) ConnectPeers();
      for (Batch* batch : started) {
        for (Op& op : batch->ops) Post(&op);
      }
      started.clear();
      continue;
    }
    if (moved) {
      busy_rounds_ = 0;
    } else {
      Sleep(options_.env->Now() + kMaxSleep);
    }
  }
}

void UcxEngine::Sleep(absl::Time until) {
  const ucs_status_t status = ucx_->ucp_worker_arm(worker_);
  if (status == UCS_ERR_BUSY) return Yield();
  busy_rounds_ = 0;
  if (status != UCS_OK) {
    return Fail(UcxError(*ucx_, "wait for messages", status, *errors_));
  }
  {
    absl::MutexLock lock(&mu_);
    if (attention_) return;
    asleep_ = true;
  }
  pollfd fds[] = {{worker_fd_, POLLIN, 0}, {waker_.fd(), POLLIN, 0}};
  const absl::StatusOr<int> ready =
      options_.env->Poll(absl::MakeSpan(fds), until);
  {
    absl::MutexLock lock(&mu_);
    asleep_ = false;
  }
  if (!ready.ok()) return Fail(ready.status());
  if (fds[1].revents != 0) waker_.Clear();
}

// Something has just come; or a queue to a peer in shared memory is full, of
// whose end no event tells. The peer may need this very core to empty it.
void UcxEngine::Yield() {
  ++busy_rounds_;
  if (busy_rounds_ <= kSpins) return;
  if (busy_rounds_ <= kYields) {
    std::this_thread::yield();
    return;
  }
  pollfd fd = {waker_.fd(), POLLIN, 0};
  options_.env->Poll(absl::MakeSpan(&fd, 1), options_.env->Now() + kBusySleep)
      .IgnoreError();
  if (fd.revents != 0) waker_.Clear();
}

void UcxEngine::ConnectPeers() {
  std::vector<std::string> addresses;
  {
    absl::MutexLock lock(&mu_);
    addresses.swap(addresses_);
    connected_.assign(peers_.size(), false);
    connected_[options_.rank] = true;
  }
  connecting_ = true;
  for (Peer& peer : peers_) {
    if (peer.rank == options_.rank) continue;
    ucp_ep_params_t params = {};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS |
                        UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                        UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address =
        reinterpret_cast<const ucp_address_t*>(addresses[peer.rank].data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = &OnEndpointError;
    params.err_handler.arg = &peer;
    if (const ucs_status_t status =
            ucx_->ucp_ep_create(worker_, &params, &peer.endpoint);
        status != UCS_OK) {
      peer.endpoint = nullptr;
      return Fail(UcxError(
          *ucx_,
          absl::StrCat("connect to rank ", peer.rank, " (interface ",
                       host_.interface,
                       " unless UCX_NET_DEVICES says another; UCX_TLS must "
                       "allow a transport that both ranks have)"),
          status, *errors_,
          // Anything else may be the end of that rank.
          status == UCS_ERR_UNREACHABLE ? kBadSetting
                                        : absl::StatusCode::kUnavailable));
    }
    SendControl(peer, MessageKind::kHello, 0);
    // Its own may have come before.
    if (peer.said_hello) SendControl(peer, MessageKind::kAnswer, 0);
  }
}

// Messages of ours may come and go while UCX's own of connecting still wait,
// and UCX 1.13 ends the process when an endpoint is closed by force before
// those have left. So each side lets its requests leave, says so, and when the
// other has said it too, lets leave what it has replied to those of the other.
void UcxEngine::UpdateConnected() {
  std::vector<bool> connected(peers_.size(), true);
  connecting_ = false;
  for (Peer& peer : peers_) {
    if (peer.rank == options_.rank) continue;
    if (peer.said_hello && peer.answered) {
      if (peer.flushes_started == 0) Flush(peer);
      if (peer.flushes_started == 1 && peer.flushes == 1 && peer.said_flushed) {
        Flush(peer);
      }
    }
    connected[peer.rank] = peer.flushes == kFlushes;
    connecting_ |= !connected[peer.rank];
  }
  absl::MutexLock lock(&mu_);
  connected_ = std::move(connected);
}

void UcxEngine::Flush(Peer& peer) {
  ++peer.flushes_started;
  if (!peer.error.ok()) return;
  ucp_request_param_t param = {};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = &OnFlushed;
  param.user_data = &peer;
  ++under_way_;
  const ucs_status_ptr_t request =
      ucx_->ucp_ep_flush_nbx(peer.endpoint, &param);
  if (UCS_PTR_IS_ERR(request)) {
    --under_way_;
    OnEndpointError(&peer, peer.endpoint, UCS_PTR_STATUS(request));
  } else if (request == nullptr) {
    OnFlushed(nullptr, UCS_OK, &peer);
  }
}

void UcxEngine::OnFlushed(void* request, ucs_status_t status, void* data) {
  Peer& peer = *static_cast<Peer*>(data);
  UcxEngine& engine = *peer.engine;
  --engine.under_way_;
  if (request != nullptr) engine.ucx_->ucp_request_free(request);
  if (status != UCS_OK) return;
  ++peer.flushes;
  if (peer.flushes == 1 && !engine.closed_) {
    engine.SendControl(peer, MessageKind::kFlushed, 0);
  }
}

void UcxEngine::Complete(Op* op, absl::Status status) {
  absl::MutexLock lock(&mu_);
  Batch* const batch = op->batch;
  op->done = status.ok();
  if (!status.ok() && batch->error_.ok()) {
    batch->error_ =
        absl::Status(status.code(),
                     absl::StrCat(op->is_send ? "send to" : "receive from",
                                  " rank ", op->peer, ": ", status.message()));
  }
  --batch->pending_;  // with the last one it may be gone when we unlock
}

void UcxEngine::Fail(const absl::Status& status) {
  absl::MutexLock lock(&mu_);
  if (failure_.ok()) failure_ = status;
  attention_ = true;
}

void UcxEngine::ReportBrokenPeers() {
  peer_broke_ = false;
  std::vector<Op*> lost;
  for (auto it = posted_.begin(); it != posted_.end();) {
    if (peers_[it->first.first].error.ok()) {
      ++it;
      continue;
    }
    lost.push_back(it->second);
    posted_.erase(it++);
  }
  for (Op* op : lost) Complete(op, peers_[op->peer].error);
  if (!connecting_) return;
  for (const Peer& peer : peers_) {
    if (!peer.error.ok()) return Fail(PeerError(peer));
  }
}

void UcxEngine::Post(Op* op) {
  if (op->is_send) return Send(op);
  const Key key(op->peer, op->tag);
  const auto it = parked_.find(key);
  if (it == parked_.end()) {
    Peer& peer = peers_[op->peer];
    if (!peer.error.ok()) return Complete(op, peer.error);
    posted_[key] = op;
    return;
  }
  Parked parked = std::move(it->second);
  parked_.erase(it);
  if (parked.rendezvous != nullptr) {
    return BringRendezvous(op, parked.rendezvous, parked.size);
  }
  if (parked.size > op->size) {
    return Complete(
        op, absl::InternalError(absl::StrCat("the message has ", parked.size,
                                             " bytes, not ", op->size)));
  }
  if (parked.size > 0) std::memcpy(op->data, parked.eager.get(), parked.size);
  Taken(peers_[op->peer], parked.size);
  Complete(op, absl::OkStatus());
}

void UcxEngine::Send(Op* op) {
  Peer& peer = peers_[op->peer];
  if (!peer.error.ok() || peer.endpoint == nullptr) {
    return Complete(op, peer.error.ok()
                            ? absl::UnavailableError("not connected")
                            : peer.error);
  }
  op->header = {peer.nonce, op->tag, static_cast<uint32_t>(options_.rank),
                MessageKind::kData};
  ucp_request_param_t param = {};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                       UCP_OP_ATTR_FIELD_USER_DATA |
                       UCP_OP_ATTR_FIELD_MEMORY_TYPE | UCP_OP_ATTR_FIELD_FLAGS;
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  param.cb.send = &OnSent;
  param.user_data = op;
  if (!user_rendezvous_) {
    // There is no rendezvous for nothing.
    const bool is_eager =
        op->size == 0 ||
        (op->size <= kMaxEagerBytes &&
         peer.eager_under_way + EagerCost(op->size) <= kEagerWindow);
    param.flags = is_eager ? UCP_AM_SEND_FLAG_EAGER : UCP_AM_SEND_FLAG_RNDV;
    if (is_eager) peer.eager_under_way += EagerCost(op->size);
  }
  ++under_way_;
  // The operation and its batch may be gone when it returns.
  const ucs_status_ptr_t request =
      ucx_->ucp_am_send_nbx(peer.endpoint, kMessageId, &op->header,
                            sizeof(op->header), op->data, op->size, &param);
  if (request == nullptr || UCS_PTR_IS_ERR(request)) {
    --under_way_;
    Finish(op, UCS_PTR_STATUS(request));
  }
}

void UcxEngine::OnSent(void* request, ucs_status_t status, void* op) {
  UcxEngine* const engine = static_cast<Op*>(op)->engine;
  --engine->under_way_;
  engine->ucx_->ucp_request_free(request);
  engine->Finish(static_cast<Op*>(op), status);
}

void UcxEngine::Finish(Op* op, ucs_status_t status) {
  Complete(op, status == UCS_OK
                   ? absl::OkStatus()
                   : UcxError(*ucx_, "transfer", status, *errors_));
}

void UcxEngine::BringRendezvous(Op* op, void* descriptor, size_t size) {
  if (size > op->size) {
    ucx_->ucp_am_data_release(worker_, descriptor);
    return Complete(
        op, absl::InternalError(absl::StrCat("the message has ", size,
                                             " bytes, not ", op->size)));
  }
  ucp_request_param_t param = {};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                       UCP_OP_ATTR_FIELD_USER_DATA |
                       UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  param.cb.recv_am = &OnReceived;
  param.user_data = op;
  // The operation and its batch may be gone when it returns.
  const ucs_status_ptr_t request =
      ucx_->ucp_am_recv_data_nbx(worker_, descriptor, op->data, size, &param);
  if (request == nullptr || UCS_PTR_IS_ERR(request)) {
    Finish(op, UCS_PTR_STATUS(request));
  }
}

void UcxEngine::OnReceived(void* request, ucs_status_t status, size_t /*size*/,
                           void* op) {
  UcxEngine* const engine = static_cast<Op*>(op)->engine;
  engine->ucx_->ucp_request_free(request);
  engine->Finish(static_cast<Op*>(op), status);
}

void UcxEngine::SendControl(Peer& peer, MessageKind kind, uint64_t tag) {
  if (peer.endpoint == nullptr || !peer.error.ok()) return;
  auto control = std::make_unique<Control>();
  control->engine = this;
  control->header = {peer.nonce, tag, static_cast<uint32_t>(options_.rank),
                     kind};
  ucp_request_param_t param = {};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                       UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  // UCX asks for the other's endpoint, which it also needs for rendezvous, when
  // it is first needed. It shall be now, see UpdateConnected.
  if (kind == MessageKind::kHello) param.flags |= UCP_AM_SEND_FLAG_REPLY;
  param.cb.send = &OnControlSent;
  param.user_data = control.get();
  ++under_way_;
  const ucs_status_ptr_t request =
      ucx_->ucp_am_send_nbx(peer.endpoint, kMessageId, &control->header,
                            sizeof(control->header), nullptr, 0, &param);
  if (request == nullptr || UCS_PTR_IS_ERR(request)) {
    // An error is the endpoint's, which tells of it by itself.
    --under_way_;
  } else {
    control.release();  // OnControlSent has it
  }
}

void UcxEngine::OnControlSent(void* request, ucs_status_t /*status*/,
                              void* data) {
  const std::unique_ptr<Control> control(static_cast<Control*>(data));
  --control->engine->under_way_;
  control->engine->ucx_->ucp_request_free(request);
}

void UcxEngine::Taken(Peer& peer, size_t bytes) {
  peer.eager_taken += EagerCost(bytes);
  if (peer.eager_taken < kEagerWindow / 2) return;
  SendControl(peer, MessageKind::kTaken, std::exchange(peer.eager_taken, 0));
}

ucs_status_t UcxEngine::OnMessage(void* engine, const void* header,
                                  size_t header_size, void* data, size_t size,
                                  const ucp_am_recv_param_t* param) {
  UcxEngine& self = *static_cast<UcxEngine*>(engine);
  Header h;
  if (header_size != sizeof(h)) return UCS_OK;
  std::memcpy(&h, header, sizeof(h));
  // Of a stranger.
  if (h.nonce != self.nonce_ || h.from >= self.peers_.size() ||
      h.from == static_cast<uint32_t>(self.options_.rank)) {
    return UCS_OK;
  }
  return self.Receive(h, data, size,
                      (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0);
}

ucs_status_t UcxEngine::Receive(const Header& header, void* data, size_t size,
                                bool is_rendezvous) {
  if (closed_) return UCS_OK;
  Peer& peer = peers_[header.from];
  switch (header.kind) {
    case MessageKind::kHello:
      peer.said_hello = true;
      SendControl(peer, MessageKind::kAnswer, 0);
      return UCS_OK;
    case MessageKind::kAnswer:
      peer.answered = true;
      return UCS_OK;
    case MessageKind::kFlushed:
      peer.said_flushed = true;
      return UCS_OK;
    case MessageKind::kTaken:
      peer.eager_under_way -=
          std::min<size_t>(peer.eager_under_way, header.tag);
      return UCS_OK;
    case MessageKind::kData:
      break;
    default:
      return UCS_OK;
  }
  const Key key(peer.rank, header.tag);
  const auto it = posted_.find(key);
  if (it == posted_.end()) {
    Parked parked;
    parked.size = size;
    if (is_rendezvous) {
      parked.rendezvous = data;
    } else {
      parked.eager.reset(new (std::nothrow) std::byte[size]);
      if (parked.eager == nullptr) {
        Fail(absl::ResourceExhaustedError(
            absl::StrCat("no memory for a message of ", size, " bytes of rank ",
                         peer.rank)));
        return UCS_OK;
      }
      if (size > 0) std::memcpy(parked.eager.get(), data, size);
    }
    const bool is_new = parked_.try_emplace(key, std::move(parked)).second;
    return is_new && is_rendezvous ? UCS_INPROGRESS : UCS_OK;
  }
  Op* const op = it->second;
  posted_.erase(it);
  if (size > op->size) {
    Complete(op, absl::InternalError(absl::StrCat("the message has ", size,
                                                  " bytes, not ", op->size)));
    return UCS_OK;
  }
  if (is_rendezvous) {
    BringRendezvous(op, data, size);
    return UCS_INPROGRESS;
  }
  if (size > 0) std::memcpy(op->data, data, size);
  Taken(peer, size);
  Complete(op, absl::OkStatus());
  return UCS_OK;
}

void UcxEngine::OnEndpointError(void* data, ucp_ep_h /*endpoint*/,
                                ucs_status_t status) {
  Peer& peer = *static_cast<Peer*>(data);
  UcxEngine& engine = *peer.engine;
  if (peer.error.ok()) {
    peer.error = UcxError(*engine.ucx_, "transfer", status, *engine.errors_);
  }
  engine.peer_broke_ = true;
}

void UcxEngine::OnEndpointClosed(void* request, ucs_status_t /*status*/,
                                 void* data) {
  UcxEngine* const engine = static_cast<UcxEngine*>(data);
  --engine->under_way_;
  engine->ucx_->ucp_request_free(request);
}

// Whether UCX's own messages have left the endpoints that are not connected,
// see UpdateConnected. They may wait for a peer that is dead or stopped.
bool UcxEngine::LetWireUpEnd() {
  const bool may_wait = ucx_->major == 1 && ucx_->minor < 14;
  std::vector<Peer*> unconnected;
  for (Peer& peer : peers_) {
    if (may_wait && peer.endpoint != nullptr && peer.flushes < kFlushes) {
      unconnected.push_back(&peer);
    }
  }
  const absl::Time end = options_.env->Now() + kWireUpPatience;
  while (true) {
    // What has left is flushed at once.
    bool all_left = true;
    for (Peer* const peer : unconnected) {
      if (!peer->error.ok()) continue;
      if (peer->flushes == peer->flushes_started) Flush(*peer);
      all_left &= peer->flushes == peer->flushes_started;
    }
    if (all_left) return true;
    if (options_.env->Now() >= end) return false;
    if (ucx_->ucp_worker_progress(worker_) == 0) {
      options_.env->SleepUntil(options_.env->Now() + absl::Microseconds(50));
    }
  }
}

void UcxEngine::Close(bool orderly) {
  closed_ = true;
  posted_.clear();
  if (worker_ != nullptr) {
    if (!LetWireUpEnd()) {
      // What UCX has stays: nothing moves any more, and the process lives.
      LOG_FIRST_N(WARNING, 1)
          << "UCX before 1.14 would end the process if a connection that was "
             "not complete were closed now; its memory and descriptors are "
             "not given back";
      return;
    }
    for (Peer& peer : peers_) {
      if (peer.endpoint == nullptr) continue;
      ucp_request_param_t param = {};
      param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK |
                           UCP_OP_ATTR_FIELD_USER_DATA |
                           UCP_OP_ATTR_FIELD_FLAGS;
      // Otherwise what was sent is flushed first.
      param.flags = orderly && peer.error.ok() ? 0 : UCP_EP_CLOSE_FLAG_FORCE;
      param.cb.send = &OnEndpointClosed;
      param.user_data = this;
      ++under_way_;
      const ucs_status_ptr_t request =
          ucx_->ucp_ep_close_nbx(peer.endpoint, &param);
      if (request == nullptr || UCS_PTR_IS_ERR(request)) --under_way_;
      peer.endpoint = nullptr;
    }
    for (const auto& [key, parked] : parked_) {
      if (parked.rendezvous != nullptr) {
        ucx_->ucp_am_data_release(worker_, parked.rendezvous);
      }
    }
    const absl::Time end =
        options_.env->Now() + (orderly ? kClosePatience : kAbortPatience);
    while (under_way_ > 0 && options_.env->Now() < end) {
      if (ucx_->ucp_worker_progress(worker_) != 0) continue;
      attention_ = false;
      Sleep(std::min(end, options_.env->Now() + absl::Milliseconds(5)));
    }
    // After this no transport has any memory of ours.
    ucx_->ucp_worker_destroy(worker_);
    worker_ = nullptr;
  }
  parked_.clear();
  if (context_ != nullptr) ucx_->ucp_cleanup(context_);
  context_ = nullptr;
}

absl::StatusOr<std::unique_ptr<Engine>> CreateUcx(
    const EngineOptions& options) {
  return std::make_unique<UcxEngine>(options);
}

}  // namespace

const BackendDescriptor& UcxBackend() {
  static constexpr BackendDescriptor kDescriptor = {
      /*name=*/"ucx",       kEngineApiVersion,
      /*host_memory=*/true, /*cuda_memory=*/false,
      /*in_process=*/false, &CreateUcx};
  return kDescriptor;
}

}  // namespace dsd
