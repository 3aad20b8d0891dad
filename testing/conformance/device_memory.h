// SPDX-License-Identifier: Apache-2.0
//
// Memory of a CUDA device for cases, through the runtime that the backend
// found, which may be a fake one: no header and no library of CUDA is needed.

#ifndef DSD_TESTING_CONFORMANCE_DEVICE_MEMORY_H_
#define DSD_TESTING_CONFORMANCE_DEVICE_MEMORY_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/backends/nccl/cuda_api.h"
#include "dsd/core/comm/engine.h"

namespace dsd {

// A stream of the device that a launcher gives this rank, LOCAL_RANK of those
// that there are. Makes it the current one of the thread.
class DeviceStream {
 public:
  static absl::StatusOr<std::unique_ptr<DeviceStream>> Create();
  DeviceStream(const DeviceStream&) = delete;
  // Waits for what was enqueued.
  ~DeviceStream();

  MemorySpace space() const { return {DeviceType::kCuda, stream_}; }

  // Enqueues a function of the host.
  absl::Status Run(std::function<void()> body);
  absl::Status Synchronize();

 private:
  friend class DeviceBuffer;
  struct Functions;
  DeviceStream() = default;

  const CudaApi* cuda_ = nullptr;
  std::unique_ptr<Functions> more_;
  CudaStream stream_ = nullptr;
};

// Bytes of the device. Used in the order of the stream, which must live longer.
class DeviceBuffer {
 public:
  static absl::StatusOr<DeviceBuffer> Create(DeviceStream& stream, size_t size);
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();

  absl::Span<std::byte> bytes() { return bytes_; }

  // Enqueues a copy; `from` must stay until the stream has done it.
  absl::Status CopyFrom(absl::Span<const std::byte> from);
  // Enqueues a copy and waits for it.
  absl::StatusOr<std::vector<std::byte>> Read();

 private:
  explicit DeviceBuffer(DeviceStream* stream) : stream_(stream) {}

  DeviceStream* stream_;
  absl::Span<std::byte> bytes_;
};

}  // namespace dsd

#endif  // DSD_TESTING_CONFORMANCE_DEVICE_MEMORY_H_
