// SPDX-License-Identifier: Apache-2.0
//
// What Gloo does not do, and what this file therefore does: it does not wake a
// wait when a peer dies in the middle of a message (Cancel does, by aborting
// each wait); it must not lose a buffer that an open connection may still write
// to (the connections are closed first); its own time limits close every
// connection (so a deadline is final here, too); it aborts the process if a
// message is longer than the receive (Communicator's tags make that
// impossible).

#include "dsd/backends/gloo/gloo_backend.h"

#include <gloo/common/error.h>
#include <gloo/transport/context.h>
#include <gloo/transport/pair.h>
#include <gloo/transport/tcp/attr.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
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
  const SigpipeBlock block;
  try {
    body();
    return absl::OkStatus();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat(what, ": out of memory"));
  } catch (const std::exception& error) {
    return absl::Status(code, absl::StrCat(what, ": gloo: ", TextOf(error)));
  }
}

class GlooEngine final : public Engine {
 public:
  explicit GlooEngine(const EngineOptions& options) : options_(options) {}

  ~GlooEngine() override {
    // In this order: a context refers to its device by a raw pointer.
    context_.reset();
    device_.reset();
  }

  absl::Status Connect(absl::Time deadline) override;
  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override;
  void Cancel() override;

 private:
  class Batch;

  absl::Status OpenDevice();
  absl::Status ConnectPairs(absl::Time deadline);
  std::chrono::milliseconds TimeLeft(absl::Time deadline) const {
    const absl::Duration left =
        std::max(deadline - options_.env->Now(), absl::ZeroDuration());
    return absl::ToChronoMilliseconds(absl::Ceil(left, absl::Milliseconds(1)));
  }
  // Closes all connections, once. After it no memory is touched through them.
  void Close();

  const EngineOptions options_;
  std::shared_ptr<::gloo::transport::Device> device_;
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

absl::Status GlooEngine::OpenDevice() {
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
    DSD_ASSIGN_OR_RETURN(attr.hostname, AddressTowards(host));
    why = absl::StrCat("address ", attr.hostname, " towards ", host, "; set ",
                       kInterfaceVariable, " to use another");
  }
  return Guard(absl::StatusCode::kInvalidArgument,
               absl::StrCat("open a network device (", why, ")"),
               [&] { device_ = ::gloo::transport::tcp::CreateDevice(attr); });
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
    DSD_ASSIGN_OR_RETURN(
        const std::string address,
        options_.store->Get(absl::StrCat("gloo/", peer, "/", options_.rank),
                            deadline));
    const absl::Status status =
        Guard(absl::StatusCode::kUnavailable,
              absl::StrCat("connect to rank ", peer), [&] {
                context_->getPair(peer)->connect(
                    std::vector<char>(address.begin(), address.end()));
              });
    if (cancelled_) return CancelledStatus();
    if (!status.ok() && options_.env->Now() >= deadline) {
      return absl::DeadlineExceededError(status.message());
    }
    DSD_RETURN_IF_ERROR(status);
  }
  return absl::OkStatus();
}

absl::Status GlooEngine::Connect(absl::Time deadline) {
  DSD_RETURN_IF_ERROR(OpenDevice());
  const absl::Status status = ConnectPairs(deadline);
  absl::MutexLock lock(&mu_);
  connecting_ = false;
  return status;
}

absl::StatusOr<std::unique_ptr<EngineBatch>> GlooEngine::Start(
    absl::Span<const EngineSend> sends, absl::Span<const EngineRecv> recvs) {
  if (cancelled_) return CancelledStatus();
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
