// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/fake_device.h"

#include <sys/mman.h>

#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "absl/log/check.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/registry.h"

namespace dsd::test {
namespace {

constexpr int64_t kArenaBytes = int64_t{1} << 28;  // reserved, not used
constexpr int64_t kAlignment = 64;

}  // namespace

class FakeDevice::Access {
 public:
  explicit Access(FakeDevice& device) : device_(device) {
    Protect(PROT_READ | PROT_WRITE);
  }
  ~Access() { Protect(PROT_NONE); }

 private:
  void Protect(int protection) {
    CHECK_EQ(mprotect(device_.arena_, kArenaBytes, protection), 0);
  }
  FakeDevice& device_;
};

void FakeDevice::Queue::RunUntil(int64_t count) {
  for (; done < count; ++done) {
    const std::function<void()> next = std::move(work.front());
    work.pop_front();
    next();
  }
}

class FakeStream final : public DeviceStream {
 public:
  explicit FakeStream(FakeDevice* device)
      : device_(*device), queue_(std::make_shared<FakeDevice::Queue>()) {
    // After what the user of the device did.
    device_.RunJoined();
  }

  ~FakeStream() override {
    device_.host_.Add(-host_bytes_);
    device_.device_.Add(-device_bytes_);
    // The memory stays until the device is done with it.
    queue_->work.push_back(
        [memory = std::make_shared<decltype(host_)>(std::move(host_))] {
          for (const auto& [bytes, buffer] : *memory) {
            std::memset(buffer.get(), 0xDD, bytes);
          }
        });
    (void)Join();
  }

  absl::StatusOr<std::byte*> AllocateHost(int64_t bytes) override {
    host_.emplace_back(bytes, new std::byte[bytes]);
    std::memset(host_.back().second.get(), 0xCC, bytes);
    host_bytes_ += bytes;
    device_.host_.Add(bytes);
    return host_.back().second.get();
  }

  absl::StatusOr<std::byte*> AllocateDevice(int64_t bytes) override {
    device_bytes_ += bytes;
    device_.device_.Add(bytes);
    return device_.Allocate(bytes);
  }

  bool IsPageLocked(const std::byte* host) const override {
    return IsPageLocked(host, 1);
  }

  absl::Status CopyOnDevice(const StridedView& from, const StridedView& to,
                            absl::Span<const int64_t> extents,
                            int64_t item_size) override {
    Hold([device = &device_, from, to,
          extents = Dims(extents.begin(), extents.end()), item_size] {
      const FakeDevice::Access access(*device);
      CopyBox(from, to, extents, item_size);
    });
    return absl::OkStatus();
  }

  absl::Status Submit() override {
    for (std::function<void()>& work : std::exchange(held_, {})) {
      Enqueue(std::move(work));
    }
    return absl::OkStatus();
  }

  absl::Status CopyToHost(const std::byte* device, std::byte* host,
                          int64_t bytes) override {
    return Copy(device, host, host, bytes);
  }
  absl::Status CopyToDevice(const std::byte* host, std::byte* device,
                            int64_t bytes) override {
    return Copy(host, device, host, bytes);
  }

  absl::StatusOr<Position> Mark() override {
    DSD_RETURN_IF_ERROR(Submit());
    return queue_->end() + 1;
  }

  absl::StatusOr<bool> IsReached(Position position) override {
    if (queue_->done + 1 < position && device_.random_() % 4 == 0) {
      queue_->RunUntil(position - 1);
    }
    return queue_->done + 1 >= position;
  }

  absl::Status Join() override {
    DSD_RETURN_IF_ERROR(Submit());
    device_.joined_.emplace_back(queue_, queue_->end());
    return absl::OkStatus();
  }

  MemorySpace space() const override {
    return {DeviceType::kCuda, const_cast<FakeStream*>(this)};
  }

  void Hold(std::function<void()> work) { held_.push_back(std::move(work)); }

  void RunAll() { queue_->RunUntil(queue_->end()); }

  FakeDevice& device() { return device_; }

 private:
  void Enqueue(std::function<void()> work) {
    queue_->work.push_back(std::move(work));
    if (device_.random_() % 4 == 0) RunAll();
  }

  bool IsPageLocked(const std::byte* host, int64_t bytes) const {
    for (const auto& [size, buffer] : host_) {
      if (host >= buffer.get() && host + bytes <= buffer.get() + size) {
        return true;
      }
    }
    for (const absl::Span<std::byte> memory : device_.page_locked_) {
      if (host >= memory.data() &&
          host + bytes <= memory.data() + memory.size()) {
        return true;
      }
    }
    return false;
  }

  absl::Status Copy(const std::byte* from, std::byte* to, const std::byte* host,
                    int64_t bytes) {
    if (!IsPageLocked(host, bytes)) {
      return absl::InternalError("a copy of host memory that is not locked");
    }
    DSD_RETURN_IF_ERROR(Submit());
    Enqueue([device = &device_, from, to, bytes] {
      const FakeDevice::Access access(*device);
      std::memcpy(to, from, bytes);
    });
    return absl::OkStatus();
  }

  FakeDevice& device_;
  const std::shared_ptr<FakeDevice::Queue> queue_;
  std::vector<std::function<void()>> held_;
  std::vector<std::pair<int64_t, std::unique_ptr<std::byte[]>>> host_;
  int64_t host_bytes_ = 0;
  int64_t device_bytes_ = 0;
};

FakeDevice::FakeDevice(uint64_t seed) : random_(seed) {
  void* const memory = mmap(nullptr, kArenaBytes, PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK_NE(memory, MAP_FAILED);
  arena_ = static_cast<std::byte*>(memory);
}

FakeDevice::~FakeDevice() {
  RunJoined();
  CHECK_EQ(munmap(arena_, kArenaBytes), 0);
}

std::byte* FakeDevice::Allocate(int64_t bytes) {
  std::byte* const memory = arena_ + used_;
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  CHECK_LE(used_, kArenaBytes);
  return memory;
}

void FakeDevice::RunJoined() {
  for (const auto& [queue, count] : joined_) queue->RunUntil(count);
  joined_.clear();
}

void FakeDevice::CopyIn(absl::Span<const std::byte> from, std::byte* device) {
  RunJoined();
  const Access access(*this);
  std::memcpy(device, from.data(), from.size());
}

void FakeDevice::CopyOut(const std::byte* device, absl::Span<std::byte> to) {
  RunJoined();
  const Access access(*this);
  std::memcpy(to.data(), device, to.size());
}

std::unique_ptr<DeviceStream> FakeDevice::OpenStream() {
  return std::make_unique<FakeStream>(this);
}

void FakeDevice::PageLock(absl::Span<std::byte> memory) {
  page_locked_.push_back(memory);
}

void FakeDeviceEndpoint::SetOnDevice() {
  on_device_.resize(catalog().size());
  on_device_.back() = true;
}

bool FakeDeviceEndpoint::IsOnDevice(size_t tensor) const {
  return tensor < on_device_.size() && on_device_[tensor];
}

absl::StatusOr<std::unique_ptr<DeviceStream>>
FakeDeviceEndpoint::OpenDeviceStream() {
  return device_.OpenStream();
}

std::optional<StridedView> FakeDeviceEndpoint::View(size_t tensor,
                                                    const Box& box) {
  if (IsOnDevice(tensor)) return std::nullopt;
  return MemoryEndpoint::View(tensor, box);
}

std::optional<StridedView> FakeDeviceEndpoint::ViewOnDevice(size_t tensor,
                                                            const Box& box,
                                                            DeviceStream&) {
  if (!IsOnDevice(tensor) || device_.random_() % 4 == 0) return std::nullopt;
  return MemoryEndpoint::View(tensor, box);
}

absl::Status FakeDeviceEndpoint::Read(size_t tensor, const Box& box,
                                      int64_t begin, int64_t end, DType dtype,
                                      absl::Span<std::byte> out) {
  if (IsOnDevice(tensor)) return absl::InternalError("slow read from a device");
  return MemoryEndpoint::Read(tensor, box, begin, end, dtype, out);
}

absl::Status FakeDeviceEndpoint::Write(size_t tensor, const Box& box,
                                       int64_t begin, int64_t end, DType dtype,
                                       absl::Span<const std::byte> in) {
  if (IsOnDevice(tensor)) return absl::InternalError("slow write to a device");
  return MemoryEndpoint::Write(tensor, box, begin, end, dtype, in);
}

absl::Status FakeDeviceEndpoint::ReadOnDevice(size_t tensor, const Box& box,
                                              int64_t begin, int64_t end,
                                              DType dtype, DeviceStream& stream,
                                              absl::Span<std::byte> out) {
  const auto view = MemoryEndpoint::View(tensor, box);
  if (!IsOnDevice(tensor) || !view.has_value()) {
    return absl::InternalError("not on the device");
  }
  static_cast<FakeStream&>(stream).Hold([device = &device_, view = *view,
                                         extents = box.extents(), begin, end,
                                         dtype, out] {
    const FakeDevice::Access access(*device);
    PackRange(view, extents, ItemSize(dtype), begin, end, out.data());
  });
  return absl::OkStatus();
}

absl::Status FakeDeviceEndpoint::WriteOnDevice(size_t tensor, const Box& box,
                                               int64_t begin, int64_t end,
                                               DType dtype,
                                               DeviceStream& stream,
                                               absl::Span<const std::byte> in) {
  const auto view = MemoryEndpoint::View(tensor, box);
  if (!IsOnDevice(tensor) || !view.has_value()) {
    return absl::InternalError("not on the device");
  }
  static_cast<FakeStream&>(stream).Hold([device = &device_, view = *view,
                                         extents = box.extents(), begin, end,
                                         dtype, in] {
    const FakeDevice::Access access(*device);
    UnpackRange(view, extents, ItemSize(dtype), begin, end, in.data());
  });
  return absl::OkStatus();
}

// Copies device memory through memory that the local backend can touch.
class FakeCudaEngine final : public Engine {
 public:
  explicit FakeCudaEngine(std::unique_ptr<Engine> local)
      : local_(std::move(local)) {}

  absl::Status Connect(absl::Time deadline) override {
    return local_->Connect(deadline);
  }
  void Cancel() override { local_->Cancel(); }

  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override {
    auto batch = std::make_unique<Batch>(this);
    std::vector<EngineSend> host_sends(sends.begin(), sends.end());
    std::vector<EngineRecv> host_recvs(recvs.begin(), recvs.end());
    bool has_device = false;
    for (EngineSend& send : host_sends) {
      if (send.space.type == DeviceType::kCpu) continue;
      has_device = true;
      auto& stream = *static_cast<FakeStream*>(send.space.stream);
      stream.RunAll();
      auto copy = std::make_unique<std::byte[]>(send.data.size());
      {
        const FakeDevice::Access access(stream.device());
        std::memcpy(copy.get(), send.data.data(), send.data.size());
      }
      send.data = absl::MakeConstSpan(copy.get(), send.data.size());
      send.space = {};
      batch->copies.push_back(std::move(copy));
    }
    for (EngineRecv& recv : host_recvs) {
      batch->arrivals.emplace_back();
      if (recv.space.type == DeviceType::kCpu) continue;
      has_device = true;
      auto& stream = *static_cast<FakeStream*>(recv.space.stream);
      stream.RunAll();
      batch->arrivals.back() = {&stream.device(), recv.data};
      auto copy = std::make_unique<std::byte[]>(recv.data.size());
      recv.data = absl::MakeSpan(copy.get(), recv.data.size());
      recv.space = {};
      batch->arrivals.back().copy = copy.get();
      batch->copies.push_back(std::move(copy));
    }
    if (has_device) {
      if (last_ != nullptr) {
        DSD_RETURN_IF_ERROR(
            last_->local->Wait(Env::Real()->Now() + absl::Seconds(20)))
            << "the exchange before has not ended";
      }
      last_ = batch.get();
    }
    DSD_ASSIGN_OR_RETURN(batch->local, local_->Start(host_sends, host_recvs));
    return batch;
  }

 private:
  struct Batch final : EngineBatch {
    struct Arrival {
      FakeDevice* device = nullptr;
      absl::Span<std::byte> memory;
      std::byte* copy = nullptr;
    };

    explicit Batch(FakeCudaEngine* engine) : engine(engine) {}
    ~Batch() override {
      if (engine->last_ == this) engine->last_ = nullptr;
      local.reset();
    }

    absl::Status Wait(absl::Time deadline) override {
      DSD_RETURN_IF_ERROR(local->Wait(deadline));
      for (Arrival& arrival : arrivals) Deliver(arrival);
      return absl::OkStatus();
    }
    absl::Status WaitReceived(size_t index, absl::Time deadline) override {
      DSD_RETURN_IF_ERROR(local->WaitReceived(index, deadline));
      Deliver(arrivals[index]);
      return absl::OkStatus();
    }
    static void Deliver(Arrival& arrival) {
      if (arrival.device == nullptr) return;
      const FakeDevice::Access access(*arrival.device);
      std::memcpy(arrival.memory.data(), arrival.copy, arrival.memory.size());
      arrival.device = nullptr;
    }

    FakeCudaEngine* const engine;
    std::vector<std::unique_ptr<std::byte[]>> copies;
    std::vector<Arrival> arrivals;  // by index of the receive
    std::unique_ptr<EngineBatch> local;
  };

  std::unique_ptr<Engine> local_;
  Batch* last_ = nullptr;  // with device memory
};

const BackendDescriptor& FakeCudaBackend() {
  static constexpr BackendDescriptor kDescriptor = {
      /*name=*/"fake_cuda",
      kEngineApiVersion,
      /*host_memory=*/true,
      /*cuda_memory=*/true,
      /*in_process=*/true,
      [](const EngineOptions& options)
          -> absl::StatusOr<std::unique_ptr<Engine>> {
        DSD_ASSIGN_OR_RETURN(const BackendDescriptor* const under,
                             FindBackend("local"));
        DSD_ASSIGN_OR_RETURN(std::unique_ptr<Engine> local,
                             under->create(options));
        return std::make_unique<FakeCudaEngine>(std::move(local));
      }};
  return kDescriptor;
}

}  // namespace dsd::test
