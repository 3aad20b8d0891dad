// SPDX-License-Identifier: Apache-2.0
//
// Transfers on CUDA through what LibTorch has for all devices: nothing here
// names CUDA's libraries, which a program links or does not.

#ifndef DSD_CORE_TENSOR_TORCH_DEVICE_STREAM_H_
#define DSD_CORE_TENSOR_TORCH_DEVICE_STREAM_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "c10/core/Device.h"
#include "c10/core/Event.h"
#include "c10/core/ScalarType.h"
#include "c10/core/Stream.h"
#include "c10/core/impl/VirtualGuardImpl.h"
#include "dsd/core/comm/engine.h"
#include "dsd/core/transfer/device_stream.h"

namespace dsd {

// Whether memory can be page-locked: a CUDA device is there and linked.
bool CanPinMemory();

// Work on a side stream of LibTorch's pool; memory of LibTorch's caching
// allocators, which keep it for the next transfer. Used by the thread that
// opened it.
class TorchDeviceStream final : public DeviceStream {
 public:
  // Messages are in the memory of `device`.
  static absl::StatusOr<std::unique_ptr<TorchDeviceStream>> Open(
      c10::Device device);
  ~TorchDeviceStream() override;

  // Enqueues a copy of a tensor on any device of this kind to packed memory,
  // row-major, as items of `type`, and back. May throw c10::Error.
  void Pack(const at::Tensor& view, c10::ScalarType type, std::byte* out);
  void Unpack(const std::byte* in, c10::ScalarType type,
              const at::Tensor& view);

  absl::StatusOr<std::byte*> AllocateHost(int64_t bytes) override;
  absl::StatusOr<std::byte*> AllocateDevice(int64_t bytes) override;
  bool IsPageLocked(const std::byte* host) const override;
  absl::Status CopyToHost(const std::byte* device, std::byte* host,
                          int64_t bytes) override;
  absl::Status CopyToDevice(const std::byte* host, std::byte* device,
                            int64_t bytes) override;
  absl::StatusOr<Position> Mark() override;
  absl::StatusOr<bool> IsReached(Position position) override;
  absl::Status Join() override;
  MemorySpace space() const override;

 private:
  explicit TorchDeviceStream(c10::Device device);

  // The side stream of a device; made, behind the current one, when first asked
  // for.
  c10::Stream SideStream(c10::Device device);
  at::Tensor HostBytes(const std::byte* host, int64_t bytes);
  at::Tensor DeviceItems(const std::byte* memory, c10::IntArrayRef sizes,
                         c10::ScalarType type) const;
  // Memory for `bytes` at an address that suits every type, until the next
  // call.
  std::byte* Aligned(int64_t bytes);
  void JoinOrThrow();

  const c10::impl::VirtualGuardImpl guard_;
  c10::Device device_;
  std::vector<c10::Stream> sides_;  // that of device_ first
  std::vector<at::Tensor> host_memory_;
  std::vector<at::Tensor> device_memory_;
  at::Tensor aligned_;
  Position last_ = 0;
  Position reached_ = 0;
  std::deque<std::pair<Position, c10::Event>> marks_;
  std::vector<c10::Event> spare_marks_;
  bool uses_foreign_host_memory_ = false;
};

}  // namespace dsd

#endif  // DSD_CORE_TENSOR_TORCH_DEVICE_STREAM_H_
