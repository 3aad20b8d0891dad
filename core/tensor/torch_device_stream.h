// SPDX-License-Identifier: Apache-2.0
//
// Transfers on CUDA through what LibTorch has for all devices: nothing here
// names CUDA's libraries, which a program links or does not.

#ifndef DSD_CORE_TENSOR_TORCH_DEVICE_STREAM_H_
#define DSD_CORE_TENSOR_TORCH_DEVICE_STREAM_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "c10/core/Device.h"
#include "c10/core/Event.h"
#include "c10/core/ScalarType.h"
#include "c10/core/Stream.h"
#include "c10/core/impl/VirtualGuardImpl.h"
#include "dsd/core/comm/engine.h"
#include "dsd/core/transfer/device_stream.h"
#include "dsd/core/transfer/strided_view.h"

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

  c10::Device device() const { return device_; }

  // Copies a tensor on any device of this kind to packed memory, row-major, as
  // items of `type`, and back; small ones are held back. May throw c10::Error.
  void Pack(const at::Tensor& view, c10::ScalarType type, std::byte* out);
  void Unpack(const std::byte* in, c10::ScalarType type,
              const at::Tensor& view);

  absl::StatusOr<std::byte*> AllocateHost(int64_t bytes) override;
  absl::StatusOr<std::byte*> AllocateDevice(int64_t bytes) override;
  bool IsPageLocked(const std::byte* host) const override;
  absl::Status CopyOnDevice(const StridedView& from, const StridedView& to,
                            absl::Span<const int64_t> extents,
                            int64_t item_size) override;
  absl::Status Submit() override;
  absl::Status CopyToHost(const std::byte* device, std::byte* host,
                          int64_t bytes) override;
  absl::Status CopyToDevice(const std::byte* host, std::byte* device,
                            int64_t bytes) override;
  absl::StatusOr<Position> Mark() override;
  absl::StatusOr<bool> IsReached(Position position) override;
  absl::Status Join() override;
  MemorySpace space() const override;

 private:
  // What copies do. Only those of one kind are held back: the memory that one
  // writes another of that kind does not read.
  enum class Kind { kPack, kUnpack, kCopy };

  // Copies of small contiguous memory, as items of one size.
  struct Held {
    std::vector<at::Tensor> from;
    std::vector<at::Tensor> to;
  };

  explicit TorchDeviceStream(c10::Device device);

  // Whether the copy is held back now; else what is of another kind has been
  // enqueued.
  bool Hold(Kind kind, const std::byte* from, std::byte* to, int64_t bytes);
  bool Hold(Kind kind, const at::Tensor& from, const at::Tensor& to);
  void SubmitOrThrow();

  // The side stream of a device; made, behind the current one, when first asked
  // for.
  c10::Stream SideStream(c10::Device device);
  at::Tensor HostBytes(const std::byte* host, int64_t bytes);
  at::Tensor DeviceItems(const std::byte* memory, c10::IntArrayRef sizes,
                         c10::ScalarType type,
                         at::OptionalIntArrayRef strides = std::nullopt) const;
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
  Kind held_kind_ = Kind::kPack;
  std::array<Held, 4> held_;  // by the binary logarithm of the size of items
  std::deque<std::pair<Position, c10::Event>> marks_;
  std::vector<c10::Event> spare_marks_;
  bool uses_foreign_host_memory_ = false;
};

}  // namespace dsd

#endif  // DSD_CORE_TENSOR_TORCH_DEVICE_STREAM_H_
