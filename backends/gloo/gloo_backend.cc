// SPDX-License-Identifier: Apache-2.0
//
// What Gloo does not do, and what this file therefore does: it does not connect
// safely (ConnectPeers does; PeerPair takes the connections over); it does not
// wake a wait when a peer dies in the middle of a message (Cancel does, by
// aborting each wait); it must not lose a buffer that an open connection may
// still write to (the connections are closed first); its own time limits are
// one per wait and close every connection (so a deadline is final here, too);
// it closes connections one per tick of its event loop (so the loop is kept
// busy then).

#include "dsd/backends/gloo/gloo_backend.h"

#include <errno.h>
#include <fcntl.h>
#include <gloo/common/error.h>
#include <gloo/transport/tcp/attr.h>
#include <gloo/transport/tcp/context.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/tcp/loop.h>
#include <gloo/transport/tcp/pair.h>
#include <gloo/transport/unbound_buffer.h>
#include <netdb.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/backends/gloo/peer_connections.h"
#include "dsd/backends/gloo/sigpipe_block.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store.h"

namespace dsd {
namespace {

namespace tcp = ::gloo::transport::tcp;
using ::gloo::transport::UnboundBuffer;

constexpr char kInterfaceVariable[] = "GLOO_SOCKET_IFNAME";
constexpr char kTransportVariable[] = "GLOO_DEVICE_TRANSPORT";

// Gloo's texts start with "[file:line] ".
std::string TextOf(const std::exception& error) {
  const std::string text = error.what();
  const size_t end = text.find("] ");
  return !text.empty() && text[0] == '[' && end != std::string::npos
             ? text.substr(end + 2)
             : text;
}

absl::Status CancelledStatus() { return absl::AbortedError("cancelled"); }

// Calls `body`, whose exceptions become `code`: Gloo throws for everything.
template <class Body>
absl::Status Guard(absl::StatusCode code, absl::string_view what, Body body) {
  try {
    body();
    return absl::OkStatus();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat(what, ": out of memory"));
  } catch (const std::exception& error) {
    if (absl::StrContains(error.what(), std::strerror(EMFILE))) {
      code = absl::StatusCode::kResourceExhausted;
    }
    return absl::Status(code, absl::StrCat(what, ": gloo: ", TextOf(error)));
  }
}

// Gloo waits for a tick of the event loop for each connection that it closes:
// 10 ms if nothing happens. While one of these lives the loop does not rest.
class BusyLoop final : public tcp::Handler {
 public:
  explicit BusyLoop(tcp::Device& device)
      : device_(device), event_(eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC)) {
    // Without it everything is only slower.
    registered_ = event_.valid() &&
                  Guard(absl::StatusCode::kInternal, "watch", [&] {
                    device_.registerDescriptor(event_.fd(), EPOLLIN, this);
                  }).ok();
  }
  BusyLoop(const BusyLoop&) = delete;
  ~BusyLoop() {
    if (!registered_) return;
    Guard(absl::StatusCode::kInternal, "unwatch", [&] {
      device_.unregisterDescriptor(event_.fd(), this);
    }).IgnoreError();
  }

  // It stays readable. Newer trees of Gloo call the second.
  void handleEvents(int) {}
  void handleEvents(tcp::Loop&, int) {}

 private:
  tcp::Device& device_;
  const Socket event_;
  bool registered_;
};

// A connection that was made elsewhere. Gloo's constructor listens; nobody
// hears of that port, and Adopt follows at once.
class PeerPair final : public tcp::Pair {
 public:
  // Called by the event loop with what it is that the peer sends.
  using OnGarbage = std::function<void(int peer, const std::string& text)>;

  PeerPair(tcp::Context* context, tcp::Device* device, int peer,
           const OnGarbage& on_garbage)
      : Pair(context, device, peer, context->getTimeout()),
        on_garbage_(on_garbage) {}

  // `socket` may be closed afterwards.
  void Adopt(const Socket& socket) {
    const std::lock_guard<std::mutex> lock(m_);
    // In the place of the listening socket, which closes it.
    const int fd = fd_ < 0 ? fcntl(socket.fd(), F_DUPFD_CLOEXEC, 0)
                           : dup3(socket.fd(), fd_, O_CLOEXEC);
    if (fd < 0) throw std::runtime_error(std::strerror(errno));
    fd_ = fd;
    // What Gloo asks for is less than what the kernel comes to by itself.
    sendBufferSize_ = std::numeric_limits<size_t>::max();
    changeState(CONNECTED);
    device_->registerDescriptor(fd_, EPOLLIN, this);
  }

  void handleEvents(int events) {
    const std::unique_lock<std::mutex> lock(m_, std::try_to_lock);
    if (!lock) {
      // A thread posts a message, or has lost its core while it does: give it
      // this one.
      usleep(kPauseMicroseconds);
      return;
    }
    if (state_ != CONNECTED) return;
    try {
      handleReadWrite(events);
    } catch (const std::exception& error) {
      // Gloo would end the process.
      if (ex_ == nullptr) signalException(TextOf(error));
      on_garbage_(rank_, TextOf(error));
    }
  }
  // Newer trees of Gloo.
  void handleEvents(tcp::Loop&, int events) { handleEvents(events); }

 private:
  static constexpr int kPauseMicroseconds = 20;

  const OnGarbage on_garbage_;
};

class PeerContext final : public tcp::Context {
 public:
  using Context::Context;

  void Adopt(int peer, const Socket& socket,
             const PeerPair::OnGarbage& on_garbage) {
    auto pair =
        std::make_unique<PeerPair>(this, device_.get(), peer, on_garbage);
    pair->Adopt(socket);
    pairs_[peer] = std::move(pair);
  }
};

class GlooEngine final : public Engine {
 public:
  explicit GlooEngine(const EngineOptions& options) : options_(options) {}

  ~GlooEngine() override {
    if (context_ != nullptr) {
      const BusyLoop busy(*device_);
      context_.reset();
    }
    // Last: a context refers to its device by a raw pointer.
    device_.reset();
  }

  absl::Status Connect(absl::Time deadline) override;
  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override;
  void Cancel() override;

 private:
  class Batch;

  // Returns the number of its interface.
  absl::StatusOr<std::string> OpenDevice(absl::Time deadline);
  std::chrono::milliseconds TimeLeft(absl::Time deadline) const {
    const absl::Duration left =
        std::max(deadline - options_.env->Now(), absl::ZeroDuration());
    return absl::ToChronoMilliseconds(absl::Ceil(left, absl::Milliseconds(1)));
  }
  // Ends all calls, now and later, with `status`.
  void End(const absl::Status& status);
  // What ended them; OK if nothing did.
  absl::Status HowEnded() {
    absl::MutexLock lock(&mu_);
    return end_;
  }
  // Closes all connections, once. After it no memory is touched through them.
  void Close();

  const EngineOptions options_;
  std::shared_ptr<tcp::Device> device_;
  // Set by Connect with all its pairs, constant afterwards.
  std::shared_ptr<PeerContext> context_;

  absl::Mutex mu_;
  std::atomic<bool> ended_{false};
  absl::Status end_ ABSL_GUARDED_BY(mu_);
  std::optional<Waker> waker_ ABSL_GUARDED_BY(mu_);  // while connecting
  absl::flat_hash_set<UnboundBuffer*> buffers_ ABSL_GUARDED_BY(mu_);
  absl::Mutex close_mu_;
  bool closed_ ABSL_GUARDED_BY(close_mu_) = false;
};

class GlooEngine::Batch final : public EngineBatch {
 public:
  struct Op {
    int peer;
    bool is_send;
    std::unique_ptr<UnboundBuffer> buffer;
    bool done = false;
  };

  explicit Batch(GlooEngine* engine) : engine_(engine) {}

  ~Batch() override {
    const bool unfinished = std::any_of(ops_.begin(), ops_.end(),
                                        [](const Op& op) { return !op.done; });
    if (unfinished) engine_->Close();
    {
      absl::MutexLock lock(&engine_->mu_);
      for (const Op& op : ops_) engine_->buffers_.erase(op.buffer.get());
    }
    // Their destructors wait for the loop's thread to let go.
    ops_.clear();
  }

  absl::Status Wait(absl::Time deadline) override {
    for (Op& op : ops_) DSD_RETURN_IF_ERROR(WaitFor(op, deadline));
    return absl::OkStatus();
  }

  absl::Status WaitReceived(size_t index, absl::Time deadline) override {
    return WaitFor(ops_[index], deadline);  // the receives come first
  }

  absl::Status Post(int peer, bool is_send, uint64_t tag, std::byte* data,
                    size_t size) {
    return Guard(
        absl::StatusCode::kUnavailable,
        absl::StrCat(is_send ? "send to" : "receive from", " rank ", peer),
        [&] {
          Op op{peer, is_send,
                engine_->context_->createUnboundBuffer(data, size)};
          UnboundBuffer* const buffer = op.buffer.get();
          {
            absl::MutexLock lock(&engine_->mu_);
            engine_->buffers_.insert(buffer);
          }
          ops_.push_back(std::move(op));
          if (is_send) {
            buffer->send(peer, tag, 0, size);
          } else {
            buffer->recv(peer, tag, 0, size);
          }
        });
  }

 private:
  absl::Status WaitFor(Op& op, absl::Time deadline) {
    if (op.done) return absl::OkStatus();
    // End after this look leaves a mark in the buffer that ends the wait.
    if (engine_->ended_) return engine_->HowEnded();
    bool completed = false;
    const absl::Status status = Guard(
        absl::StatusCode::kUnavailable,
        absl::StrCat(op.is_send ? "send to" : "receive from", " rank ",
                     op.peer),
        [&] {
          const std::chrono::milliseconds left = engine_->TimeLeft(deadline);
          completed = op.is_send ? op.buffer->waitSend(left)
                                 : op.buffer->waitRecv(left);
        });
    if (status.ok() && completed) {
      op.done = true;
      return status;
    }
    if (engine_->ended_) return engine_->HowEnded();
    if (engine_->options_.env->Now() >= deadline) {
      return absl::DeadlineExceededError(status.message());
    }
    return status;
  }

  GlooEngine* const engine_;
  std::vector<Op> ops_;
};

absl::StatusOr<std::string> GlooEngine::OpenDevice(absl::Time deadline) {
  const char* const transport = getenv(kTransportVariable);
  if (transport != nullptr && absl::StrContains(transport, "TLS")) {
    return absl::InvalidArgumentError(
        absl::StrCat(kTransportVariable, "=", transport,
                     ": this backend does not encrypt; unset it, or use a "
                     "network that does (VPN, IPsec)"));
  }
  tcp::attr attr;
  std::string why;
  const char* const interface = getenv(kInterfaceVariable);
  if (!options_.bind_address.empty()) {
    attr.hostname = options_.bind_address;
    why = absl::StrCat("bind_address \"", attr.hostname, "\"");
  } else if (interface != nullptr && *interface != '\0') {
    attr.iface = interface;
    why = absl::StrCat(kInterfaceVariable, "=", attr.iface);
  } else if (const std::string host = options_.store->server_host();
             host.empty()) {
    attr.hostname = "127.0.0.1";
    why = "loopback";
  } else {
    DSD_ASSIGN_OR_RETURN(attr.hostname,
                         AddressTowards(options_.env, host, deadline));
    why = absl::StrCat("address ", attr.hostname, " towards ", host, "; set ",
                       kInterfaceVariable, " to use another");
  }
  // The event loop's thread inherits the mask.
  const SigpipeBlock block;
  char number[NI_MAXHOST];
  DSD_RETURN_IF_ERROR(Guard(
      absl::StatusCode::kInvalidArgument,
      absl::StrCat("open a network device (", why, ")"), [&] {
        const tcp::attr found = tcp::CreateDeviceAttr(attr);
        const int error = getnameinfo(
            reinterpret_cast<const sockaddr*>(&found.ai_addr), found.ai_addrlen,
            number, sizeof(number), nullptr, 0, NI_NUMERICHOST);
        if (error != 0) throw std::runtime_error(gai_strerror(error));
        device_ = std::dynamic_pointer_cast<tcp::Device>(CreateDevice(found));
        if (device_ == nullptr) throw std::runtime_error("no TCP device");
      }));
  return std::string(number);
}

absl::Status GlooEngine::Connect(absl::Time deadline) {
  DSD_ASSIGN_OR_RETURN(const std::string host, OpenDevice(deadline));
  Waker* waker;
  {
    absl::MutexLock lock(&mu_);
    if (ended_) return end_;
    DSD_ASSIGN_OR_RETURN(waker_, Waker::Create());
    waker = &*waker_;
  }
  absl::StatusOr<std::vector<Socket>> connections =
      ConnectPeers(options_, host, ended_, *waker, deadline);
  {
    absl::MutexLock lock(&mu_);
    waker_.reset();
  }
  DSD_RETURN_IF_ERROR(connections);
  const PeerPair::OnGarbage on_garbage = [this](int peer,
                                                const std::string& text) {
    End(absl::UnavailableError(absl::StrCat(
        "rank ", peer, " sends what is no message of Gloo's: ", text)));
  };
  return Guard(absl::StatusCode::kUnavailable, "take connections over", [&] {
    const auto context = std::make_shared<PeerContext>(device_, options_.rank,
                                                       options_.world_size);
    for (int peer = 0; peer < options_.world_size; ++peer) {
      if (peer != options_.rank) {
        context->Adopt(peer, (*connections)[peer], on_garbage);
      }
      (*connections)[peer].Close();
    }
    context_ = context;
  });
}

absl::StatusOr<std::unique_ptr<EngineBatch>> GlooEngine::Start(
    absl::Span<const EngineSend> sends, absl::Span<const EngineRecv> recvs) {
  if (ended_) return HowEnded();
  const SigpipeBlock block;
  auto batch = std::make_unique<Batch>(this);
  for (const EngineRecv& recv : recvs) {
    DSD_RETURN_IF_ERROR(batch->Post(recv.peer, /*is_send=*/false, recv.tag,
                                    recv.data.data(), recv.data.size()));
  }
  for (const EngineSend& send : sends) {
    DSD_RETURN_IF_ERROR(batch->Post(send.peer, /*is_send=*/true, send.tag,
                                    const_cast<std::byte*>(send.data.data()),
                                    send.data.size()));
  }
  return batch;
}

void GlooEngine::Cancel() { End(CancelledStatus()); }

void GlooEngine::End(const absl::Status& status) {
  absl::MutexLock lock(&mu_);
  end_ = status;
  ended_ = true;
  if (waker_.has_value()) waker_->Wake();
  for (UnboundBuffer* buffer : buffers_) {
    buffer->abortWaitRecv();
    buffer->abortWaitSend();
  }
}

void GlooEngine::Close() {
  if (!ended_) Cancel();
  absl::MutexLock lock(&close_mu_);
  if (std::exchange(closed_, true)) return;
  const BusyLoop busy(*device_);
  for (int peer = 0; peer < options_.world_size; ++peer) {
    if (peer == options_.rank) continue;
    Guard(absl::StatusCode::kUnavailable, "close", [&] {
      context_->getPair(peer)->close();
    }).IgnoreError();
  }
}

absl::StatusOr<std::unique_ptr<Engine>> CreateGloo(
    const EngineOptions& options) {
  return std::make_unique<GlooEngine>(options);
}

}  // namespace

const BackendDescriptor& GlooBackend() {
  static constexpr BackendDescriptor kDescriptor = {
      /*name=*/"gloo",      kEngineApiVersion,
      /*host_memory=*/true, /*cuda_memory=*/false,
      /*in_process=*/false, &CreateGloo};
  return kDescriptor;
}

}  // namespace dsd
