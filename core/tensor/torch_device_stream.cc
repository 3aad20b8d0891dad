// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/tensor/torch_device_stream.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/_foreach_copy.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/from_blob.h"
#include "absl/base/no_destructor.h"
#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/memory/memory.h"
#include "absl/synchronization/mutex.h"
#include "c10/core/StreamGuard.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {
namespace {

// Side streams that no transfer uses. LibTorch keeps freed memory by stream:
// transfers one after another must not each take a new one of its pool.
class IdleStreams {
 public:
  static IdleStreams& Global() {
    static absl::NoDestructor<IdleStreams> streams;
    return *streams;
  }

  c10::Stream Take(const c10::impl::VirtualGuardImpl& guard,
                   c10::Device device) {
    {
      absl::MutexLock lock(&mu_);
      std::vector<c10::Stream>& idle = idle_[device.index()];
      if (!idle.empty()) {
        const c10::Stream stream = idle.back();
        idle.pop_back();
        return stream;
      }
    }
    return guard.getStreamFromGlobalPool(device, /*isHighPriority=*/true);
  }

  void Return(c10::Stream stream) {
    absl::MutexLock lock(&mu_);
    idle_[stream.device_index()].push_back(stream);
  }

 private:
  absl::Mutex mu_;
  absl::flat_hash_map<c10::DeviceIndex, std::vector<c10::Stream>> idle_
      ABSL_GUARDED_BY(mu_);
};

// Larger copies are worth a kernel of their own.
constexpr int64_t kMaxHeldBytes = int64_t{256} << 10;

// Copies that change no bits do not depend on which types a device has kernels
// for.
at::Tensor AsBits(const at::Tensor& tensor) {
  return tensor.view(BitsOf(tensor.element_size()));
}

bool HaveSameBits(const at::Tensor& from, const at::Tensor& to) {
  return from.scalar_type() == to.scalar_type() && !from.is_conj() &&
         !from.is_neg() && !to.is_conj() && !to.is_neg();
}

void EnqueueCopy(const at::Tensor& from, const at::Tensor& to) {
  if (HaveSameBits(from, to)) {
    AsBits(to).copy_(AsBits(from), /*non_blocking=*/true);
  } else {
    to.copy_(from, /*non_blocking=*/true);
  }
}

}  // namespace

bool CanPinMemory() {
  return c10::impl::hasDeviceGuardImpl(c10::kCUDA) &&
         c10::impl::VirtualGuardImpl(c10::kCUDA).deviceCount() > 0;
}

absl::StatusOr<std::unique_ptr<TorchDeviceStream>> TorchDeviceStream::Open(
    c10::Device device) {
  return TorchToStatus([&] {
    auto stream = absl::WrapUnique(new TorchDeviceStream(device));
    stream->SideStream(device);
    return stream;
  });
}

TorchDeviceStream::TorchDeviceStream(c10::Device device)
    : guard_(device.type()), device_(device) {}

TorchDeviceStream::~TorchDeviceStream() {
  // Streams of a device that has failed are not used again.
  const absl::Status left = TorchToStatus([&] {
    JoinOrThrow();
    if (uses_foreign_host_memory_) guard_.synchronizeStream(sides_[0]);
  });
  if (!left.ok()) return;
  for (const c10::Stream& side : sides_) IdleStreams::Global().Return(side);
}

c10::Stream TorchDeviceStream::SideStream(c10::Device device) {
  for (const c10::Stream& side : sides_) {
    if (side.device() == device) return side;
  }
  const c10::Stream side = IdleStreams::Global().Take(guard_, device);
  sides_.push_back(side);
  c10::Event before(device.type());
  before.record(guard_.getStream(device));
  before.block(side);
  return side;
}

at::Tensor TorchDeviceStream::HostBytes(const std::byte* host, int64_t bytes) {
  // As part of the tensor that owns it, so that its allocator learns how long
  // the device uses it.
  for (const at::Tensor& memory : host_memory_) {
    const auto* const begin =
        static_cast<const std::byte*>(memory.const_data_ptr());
    if (host >= begin && host + bytes <= begin + memory.nbytes()) {
      return memory.narrow(0, host - begin, bytes);
    }
  }
  uses_foreign_host_memory_ = true;
  return at::from_blob(const_cast<std::byte*>(host), {bytes}, c10::kByte);
}

at::Tensor TorchDeviceStream::DeviceItems(
    const std::byte* memory, c10::IntArrayRef sizes, c10::ScalarType type,
    at::OptionalIntArrayRef strides) const {
  return at::for_blob(const_cast<std::byte*>(memory), sizes)
      .strides(strides)
      .options(c10::TensorOptions(type).device(device_))
      .target_device(device_)
      .make_tensor();
}

std::byte* TorchDeviceStream::Aligned(int64_t bytes) {
  if (!aligned_.defined() || aligned_.numel() < bytes) {
    aligned_ =
        at::empty({bytes}, c10::TensorOptions(c10::kByte).device(device_));
  }
  return static_cast<std::byte*>(aligned_.mutable_data_ptr());
}

void TorchDeviceStream::Pack(const at::Tensor& view, c10::ScalarType type,
                             std::byte* out) {
  if (view.numel() == 0) return;
  const c10::MultiStreamGuard guard(
      {SideStream(view.device()), SideStream(device_)});
  const int64_t item_size = static_cast<int64_t>(c10::elementSize(type));
  if (reinterpret_cast<uintptr_t>(out) % item_size == 0) {
    const at::Tensor to = DeviceItems(out, view.sizes(), type);
    if (!Hold(Kind::kPack, view, to)) EnqueueCopy(view, to);
    return;
  }
  SubmitOrThrow();
  // Kernels cannot write there.
  const int64_t bytes = view.numel() * item_size;
  std::byte* const aligned = Aligned(bytes);
  EnqueueCopy(view, DeviceItems(aligned, view.sizes(), type));
  EnqueueCopy(DeviceItems(aligned, {bytes}, c10::kByte),
              DeviceItems(out, {bytes}, c10::kByte));
}

void TorchDeviceStream::Unpack(const std::byte* in, c10::ScalarType type,
                               const at::Tensor& view) {
  if (view.numel() == 0) return;
  const c10::MultiStreamGuard guard(
      {SideStream(view.device()), SideStream(device_)});
  const int64_t item_size = static_cast<int64_t>(c10::elementSize(type));
  if (reinterpret_cast<uintptr_t>(in) % item_size != 0) {
    SubmitOrThrow();
    const int64_t bytes = view.numel() * item_size;
    std::byte* const aligned = Aligned(bytes);
    EnqueueCopy(DeviceItems(in, {bytes}, c10::kByte),
                DeviceItems(aligned, {bytes}, c10::kByte));
    in = aligned;
  }
  const at::Tensor from = DeviceItems(in, view.sizes(), type);
  if (!Hold(Kind::kUnpack, from, view)) EnqueueCopy(from, view);
}

bool TorchDeviceStream::Hold(Kind kind, const std::byte* from, std::byte* to,
                             int64_t bytes) {
  if (kind != held_kind_) SubmitOrThrow();
  held_kind_ = kind;
  if (bytes > kMaxHeldBytes) return false;
  // As the widest items that all of this is a multiple of.
  const uintptr_t bits = reinterpret_cast<uintptr_t>(from) |
                         reinterpret_cast<uintptr_t>(to) |
                         static_cast<uintptr_t>(bytes);
  size_t log_size = 0;
  while (log_size + 1 < held_.size() && (bits >> log_size) % 2 == 0) ++log_size;
  const int64_t item_size = int64_t{1} << log_size;
  const int64_t items = bytes / item_size;
  held_[log_size].from.push_back(DeviceItems(from, {items}, BitsOf(item_size)));
  held_[log_size].to.push_back(DeviceItems(to, {items}, BitsOf(item_size)));
  return true;
}

bool TorchDeviceStream::Hold(Kind kind, const at::Tensor& from,
                             const at::Tensor& to) {
  if (from.device() != device_ || to.device() != device_ ||
      !HaveSameBits(from, to) || !from.is_contiguous() || !to.is_contiguous()) {
    if (kind != held_kind_) SubmitOrThrow();
    return false;
  }
  return Hold(kind, static_cast<const std::byte*>(from.const_data_ptr()),
              static_cast<std::byte*>(to.mutable_data_ptr()),
              static_cast<int64_t>(from.nbytes()));
}

void TorchDeviceStream::SubmitOrThrow() {
  for (Held& held : held_) {
    if (held.from.empty()) continue;
    const c10::StreamGuard guard(sides_[0]);
    at::_foreach_copy_(held.to, held.from, /*non_blocking=*/true);
    held.from.clear();
    held.to.clear();
  }
}

absl::Status TorchDeviceStream::Submit() {
  return TorchToStatus([&] { SubmitOrThrow(); });
}

absl::Status TorchDeviceStream::CopyOnDevice(const StridedView& from,
                                             const StridedView& to,
                                             absl::Span<const int64_t> extents,
                                             int64_t item_size) {
  int64_t bytes = item_size;
  for (const int64_t extent : extents) bytes *= extent;
  if (bytes == 0 ||
      (from.base == to.base && from.strides_bytes == to.strides_bytes)) {
    return absl::OkStatus();
  }
  return TorchToStatus([&] {
    const bool contiguous = IsContiguous(from, extents, item_size) &&
                            IsContiguous(to, extents, item_size);
    if (contiguous && Hold(Kind::kCopy, from.base, to.base, bytes)) return;
    const c10::StreamGuard guard(sides_[0]);
    const auto items = [&](const StridedView& view) {
      Dims strides = view.strides_bytes;
      for (int64_t& stride : strides) stride /= item_size;
      return DeviceItems(view.base, ToIntArrayRef(extents), BitsOf(item_size),
                         ToIntArrayRef(strides));
    };
    items(to).copy_(items(from), /*non_blocking=*/true);
  });
}

absl::StatusOr<std::byte*> TorchDeviceStream::AllocateHost(int64_t bytes) {
  return TorchToStatus([&] {
    host_memory_.push_back(
        at::empty({bytes}, c10::TensorOptions(c10::kByte).pinned_memory(true)));
    return static_cast<std::byte*>(host_memory_.back().mutable_data_ptr());
  });
}

absl::StatusOr<std::byte*> TorchDeviceStream::AllocateDevice(int64_t bytes) {
  return TorchToStatus([&] {
    const c10::StreamGuard guard(sides_[0]);
    device_memory_.push_back(
        at::empty({bytes}, c10::TensorOptions(c10::kByte).device(device_)));
    return static_cast<std::byte*>(device_memory_.back().mutable_data_ptr());
  });
}

bool TorchDeviceStream::IsPageLocked(const std::byte* host) const {
  const absl::StatusOr<bool> pinned = TorchToStatus([&] {
    return at::from_blob(const_cast<std::byte*>(host), {1}, c10::kByte)
        .is_pinned();
  });
  return pinned.ok() && *pinned;
}

absl::Status TorchDeviceStream::CopyToHost(const std::byte* device,
                                           std::byte* host, int64_t bytes) {
  return TorchToStatus([&] {
    SubmitOrThrow();
    const c10::StreamGuard guard(sides_[0]);
    HostBytes(host, bytes)
        .copy_(DeviceItems(device, {bytes}, c10::kByte),
               /*non_blocking=*/true);
  });
}

absl::Status TorchDeviceStream::CopyToDevice(const std::byte* host,
                                             std::byte* device, int64_t bytes) {
  return TorchToStatus([&] {
    SubmitOrThrow();
    const c10::StreamGuard guard(sides_[0]);
    DeviceItems(device, {bytes}, c10::kByte)
        .copy_(HostBytes(host, bytes), /*non_blocking=*/true);
  });
}

absl::StatusOr<DeviceStream::Position> TorchDeviceStream::Mark() {
  return TorchToStatus([&] {
    SubmitOrThrow();
    c10::Event event(device_.type());
    if (!spare_marks_.empty()) {
      event = std::move(spare_marks_.back());
      spare_marks_.pop_back();
    }
    event.record(sides_[0]);
    marks_.emplace_back(++last_, std::move(event));
    return last_;
  });
}

absl::StatusOr<bool> TorchDeviceStream::IsReached(Position position) {
  return TorchToStatus([&] {
    while (reached_ < position && !marks_.empty() &&
           marks_.front().second.query()) {
      reached_ = marks_.front().first;
      spare_marks_.push_back(std::move(marks_.front().second));
      marks_.pop_front();
    }
    return reached_ >= position;
  });
}

void TorchDeviceStream::JoinOrThrow() {
  SubmitOrThrow();
  for (const c10::Stream& side : sides_) {
    c10::Event after(device_.type());
    after.record(side);
    after.block(guard_.getStream(side.device()));
  }
}

absl::Status TorchDeviceStream::Join() {
  return TorchToStatus([&] { JoinOrThrow(); });
}

MemorySpace TorchDeviceStream::space() const {
  return {DeviceType::kCuda, sides_[0].native_handle()};
}

}  // namespace dsd
