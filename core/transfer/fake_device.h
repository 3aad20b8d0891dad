// SPDX-License-Identifier: Apache-2.0
//
// A device for tests: memory that faults when the host touches it, work that is
// done as late, or as early, as its contract allows, and a backend that moves
// such memory.

#ifndef DSD_CORE_TRANSFER_FAKE_DEVICE_H_
#define DSD_CORE_TRANSFER_FAKE_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/comm/engine.h"
#include "dsd/core/transfer/device_stream.h"
#include "dsd/core/transfer/endpoint.h"

namespace dsd::test {

// One rank's device. Thread-compatible, its streams included.
class FakeDevice {
 public:
  // How work is put off: at random, from the numbers of `seed`.
  explicit FakeDevice(uint64_t seed);
  ~FakeDevice();
  FakeDevice(const FakeDevice&) = delete;
  FakeDevice& operator=(const FakeDevice&) = delete;

  // Memory until the device is destroyed.
  std::byte* Allocate(int64_t bytes);

  // What a user of the device does: after all work that was joined.
  void CopyIn(absl::Span<const std::byte> from, std::byte* device);
  void CopyOut(const std::byte* device, absl::Span<std::byte> to);

  std::unique_ptr<DeviceStream> OpenStream();

  // Host memory that needs no staging.
  void PageLock(absl::Span<std::byte> memory);

  int64_t host_bytes_peak() const { return host_.peak; }
  int64_t device_bytes_peak() const { return device_.peak; }

 private:
  friend class FakeStream;
  friend class FakeDeviceEndpoint;
  friend class FakeCudaEngine;

  struct Count {
    int64_t now = 0;
    int64_t peak = 0;
    void Add(int64_t bytes) {
      now += bytes;
      if (now > peak) peak = now;
    }
  };
  // Lets the host touch the memory while this lives.
  class Access;

  // Work of one stream, in order.
  struct Queue {
    std::deque<std::function<void()>> work;
    int64_t done = 0;

    int64_t end() const { return done + static_cast<int64_t>(work.size()); }
    void RunUntil(int64_t count);
  };

  void RunJoined();

  std::byte* arena_;
  int64_t used_ = 0;
  std::mt19937_64 random_;
  std::vector<std::pair<std::shared_ptr<Queue>, int64_t>> joined_;
  std::vector<absl::Span<std::byte>> page_locked_;
  Count host_;    // staging
  Count device_;  // staging
};

// Tensors of plain memory, each in host memory or on a FakeDevice.
class FakeDeviceEndpoint : public MemoryEndpoint {
 public:
  explicit FakeDeviceEndpoint(FakeDevice* device) : device_(*device) {}

  // The tensor added last is on the device.
  void SetOnDevice();

  absl::Status Read(size_t tensor, const Box& box, int64_t begin, int64_t end,
                    DType dtype, absl::Span<std::byte> out) override;
  absl::Status Write(size_t tensor, const Box& box, int64_t begin, int64_t end,
                     DType dtype, absl::Span<const std::byte> in) override;
  std::optional<StridedView> View(size_t tensor, const Box& box) override;
  bool IsOnDevice(size_t tensor) const override;
  absl::StatusOr<std::unique_ptr<DeviceStream>> OpenDeviceStream() override;
  // Now and then nullopt.
  std::optional<StridedView> ViewOnDevice(size_t tensor, const Box& box,
                                          DeviceStream& stream) override;
  absl::Status ReadOnDevice(size_t tensor, const Box& box, int64_t begin,
                            int64_t end, DType dtype, DeviceStream& stream,
                            absl::Span<std::byte> out) override;
  absl::Status WriteOnDevice(size_t tensor, const Box& box, int64_t begin,
                             int64_t end, DType dtype, DeviceStream& stream,
                             absl::Span<const std::byte> in) override;

 private:
  FakeDevice& device_;
  std::vector<bool> on_device_;
};

// The linked backend "local", which also moves memory of FakeDevices. Messages
// of one rank in device memory are carried out one exchange after the other, so
// that an order that could block does.
const BackendDescriptor& FakeCudaBackend();

}  // namespace dsd::test

#endif  // DSD_CORE_TRANSFER_FAKE_DEVICE_H_
