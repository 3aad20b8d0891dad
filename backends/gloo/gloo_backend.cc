// SPDX-License-Identifier: Apache-2.0
//
// What Gloo does not do, and what this file therefore does: it does not wake a
// wait when a peer dies in the middle of a message (Cancel does, by aborting
// each wait); it must not lose a buffer that an open connection may still write
// to (the connections are closed first); its own time limits are one per wait,
// also while connecting, and close every connection (so a deadline is final
// here, too); it aborts the process if a message is longer than the receive
// (Communicator's tags make that impossible); it closes connections one per
// tick of its event loop (so the loop is kept busy then).

#include "dsd/backends/gloo/gloo_backend.h"

#include <errno.h>
#include <gloo/common/error.h>
#include <gloo/transport/context.h>
#include <gloo/transport/pair.h>
#include <gloo/transport/tcp/attr.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/tcp/loop.h>
#include <gloo/transport/unbound_buffer.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/backends/gloo/sigpipe_block.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store.h"

namespace dsd {
namespace {

using ::gloo::transport::UnboundBuffer;

constexpr char kInterfaceVariable[] = "GLOO_SOCKET_IFNAME";

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
class BusyLoop final : public ::gloo::transport::tcp::Handler {
 public:
  explicit BusyLoop(::gloo::transport::tcp::Device& device)
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

  void handleEvents(int) override {}  // it stays readable

 private:
  ::gloo::transport::tcp::Device& device_;
  const Socket event_;
  bool registered_;
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

  absl::Status OpenDevice(absl::Time deadline);
  absl::Status ConnectPairs(absl::Time deadline);
  std::chrono::milliseconds TimeLeft(absl::Time deadline) const {
    const absl::Duration left =
        std::max(deadline - options_.env->Now(), absl::ZeroDuration());
    return absl::ToChronoMilliseconds(absl::Ceil(left, absl::Milliseconds(1)));
  }
  // Closes all connections, once. After it no memory is touched through them.
  void Close();

  const EngineOptions options_;
  std::shared_ptr<::gloo::transport::tcp::Device> device_;
  // Set by Connect with all its pairs, constant afterwards.
  std::shared_ptr<::gloo::transport::Context> context_;

  absl::Mutex mu_;
  std::atomic<bool> cancelled_{false};
  bool connecting_ ABSL_GUARDED_BY(mu_) = false;
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
    // Cancel after this look leaves a mark in the buffer that ends the wait.
    if (engine_->cancelled_) return CancelledStatus();
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
    if (engine_->cancelled_ || status.ok()) return CancelledStatus();
    if (engine_->options_.env->Now() >= deadline) {
      return absl::DeadlineExceededError(status.message());
    }
    return status;
  }

  GlooEngine* const engine_;
  std::vector<Op> ops_;
};

absl::Status GlooEngine::OpenDevice(absl::Time deadline) {
  ::gloo::transport::tcp::attr attr;
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
  return Guard(absl::StatusCode::kInvalidArgument,
               absl::StrCat("open a network device (", why, ")"), [&] {
                 device_ =
                     std::dynamic_pointer_cast<::gloo::transport::tcp::Device>(
                         ::gloo::transport::tcp::CreateDevice(attr));
                 if (device_ == nullptr)
                   throw std::runtime_error("no TCP device");
               });
}

absl::Status GlooEngine::ConnectPairs(absl::Time deadline) {
  const int size = options_.world_size;
  std::vector<std::string> addresses(size);
  std::shared_ptr<::gloo::transport::Context> context;
  DSD_RETURN_IF_ERROR(
      Guard(absl::StatusCode::kUnavailable, "listen for the other ranks", [&] {
        context = device_->createContext(options_.rank, size);
        context->setTimeout(TimeLeft(deadline));
        for (int peer = 0; peer < size; ++peer) {
          if (peer == options_.rank) continue;
          const std::vector<char> bytes =
              context->createPair(peer)->address().bytes();
          addresses[peer].assign(bytes.begin(), bytes.end());
        }
      }));
  {
    absl::MutexLock lock(&mu_);
    context_ = std::move(context);
    connecting_ = true;
  }
  for (int peer = 0; peer < size; ++peer) {
    if (peer == options_.rank) continue;
    DSD_RETURN_IF_ERROR(
        options_.store->Set(absl::StrCat("gloo/", options_.rank, "/", peer),
                            addresses[peer], deadline));
  }
  for (int peer = 0; peer < size; ++peer) {
    if (peer == options_.rank) continue;
    if (cancelled_) return CancelledStatus();
    const absl::StatusOr<std::string> address = options_.store->Get(
        absl::StrCat("gloo/", peer, "/", options_.rank), deadline);
    if (absl::IsDeadlineExceeded(address.status())) {
      return absl::DeadlineExceededError(
          absl::StrCat("rank ", peer, " has not said where it listens"));
    }
    DSD_RETURN_IF_ERROR(address);
    const absl::Status status =
        Guard(absl::StatusCode::kUnavailable,
              absl::StrCat("connect to rank ", peer), [&] {
                context_->getPair(peer)->connect(
                    std::vector<char>(address->begin(), address->end()));
              });
    if (options_.env->Now() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("no connection to rank ", peer, " in time"));
    }
    if (cancelled_) return CancelledStatus();
    DSD_RETURN_IF_ERROR(status);
  }
  return absl::OkStatus();
}

absl::Status GlooEngine::Connect(absl::Time deadline) {
  DSD_RETURN_IF_ERROR(OpenDevice(deadline));
  absl::Mutex mu;
  bool over = false;
  // Gloo's limit for one connection would count anew for each.
  const std::unique_ptr<EnvThread> limit =
      options_.env->StartThread("dsd_gloo_limit", [&] {
        absl::MutexLock lock(&mu);
        if (!options_.env->Await(mu, absl::Condition(&over), deadline)) {
          Cancel();
        }
      });
  const absl::Status status = ConnectPairs(deadline);
  {
    absl::MutexLock lock(&mu_);
    connecting_ = false;
  }
  absl::MutexLock lock(&mu);
  over = true;
  return status;
}

absl::StatusOr<std::unique_ptr<EngineBatch>> GlooEngine::Start(
    absl::Span<const EngineSend> sends, absl::Span<const EngineRecv> recvs) {
  if (cancelled_) return CancelledStatus();
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

void GlooEngine::Cancel() {
  bool connecting;
  {
    absl::MutexLock lock(&mu_);
    cancelled_ = true;
    connecting = connecting_;
    for (UnboundBuffer* buffer : buffers_) {
      buffer->abortWaitRecv();
      buffer->abortWaitSend();
    }
  }
  // Nothing else ends a connect.
  if (connecting) Close();
}

void GlooEngine::Close() {
  cancelled_ = true;
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
