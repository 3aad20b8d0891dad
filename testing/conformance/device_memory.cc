// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/conformance/device_memory.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <utility>

#include "dsd/core/base/status_macros.h"

namespace dsd {
namespace {

constexpr int kMemcpyDefault = 4;  // of cudaMemcpyKind

}  // namespace

struct DeviceStream::Functions {
  int (*launch_host_func)(CudaStream, void (*)(void*), void*);
  int (*memcpy_async)(void*, const void*, size_t, int, CudaStream);
  int (*stream_synchronize)(CudaStream);
};

absl::StatusOr<std::unique_ptr<DeviceStream>> DeviceStream::Create() {
  auto made = std::unique_ptr<DeviceStream>(new DeviceStream);
  DSD_ASSIGN_OR_RETURN(made->cuda_, LoadCuda());
  DSD_ASSIGN_OR_RETURN(void* const library, OpenCudaLibrary());
  made->more_ = std::make_unique<Functions>();
  bool all = true;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(
        dlsym(library, name));
    all = all && function != nullptr;
  };
  find(made->more_->launch_host_func, "cudaLaunchHostFunc");
  find(made->more_->memcpy_async, "cudaMemcpyAsync");
  find(made->more_->stream_synchronize, "cudaStreamSynchronize");
  if (!all) return absl::FailedPreconditionError("a strange CUDA runtime");
  const CudaApi& cuda = *made->cuda_;
  int devices = 0;
  DSD_RETURN_IF_ERROR(
      cuda.Check(cuda.GetDeviceCount(&devices), "count devices"));
  const char* const local_rank = getenv("LOCAL_RANK");
  DSD_RETURN_IF_ERROR(cuda.Check(
      cuda.SetDevice(local_rank == nullptr ? 0 : atoi(local_rank) % devices),
      "choose a device"));
  DSD_RETURN_IF_ERROR(cuda.Check(
      cuda.StreamCreateWithPriority(&made->stream_, kCudaStreamNonBlocking, 0),
      "create a stream"));
  return made;
}

DeviceStream::~DeviceStream() {
  if (stream_ == nullptr) return;
  Synchronize().IgnoreError();
  cuda_->StreamDestroy(stream_);
}

absl::Status DeviceStream::Run(std::function<void()> body) {
  auto* const copy = new std::function<void()>(std::move(body));
  const auto call = [](void* argument) {
    const std::unique_ptr<std::function<void()>> owned(
        static_cast<std::function<void()>*>(argument));
    (*owned)();
  };
  return cuda_->Check(more_->launch_host_func(stream_, call, copy),
                      "call a function");
}

absl::Status DeviceStream::Synchronize() {
  return cuda_->Check(more_->stream_synchronize(stream_), "synchronize");
}

absl::StatusOr<DeviceBuffer> DeviceBuffer::Create(DeviceStream& stream,
                                                  size_t size) {
  DeviceBuffer buffer(&stream);
  void* memory = nullptr;
  DSD_RETURN_IF_ERROR(stream.cuda_->Check(
      stream.cuda_->Malloc(&memory, size == 0 ? 1 : size), "allocate"));
  buffer.bytes_ = absl::MakeSpan(static_cast<std::byte*>(memory), size);
  return buffer;
}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : stream_(other.stream_), bytes_(std::exchange(other.bytes_, {})) {}

DeviceBuffer::~DeviceBuffer() {
  if (bytes_.data() == nullptr) return;
  stream_->Synchronize().IgnoreError();
  stream_->cuda_->Free(bytes_.data());
}

absl::Status DeviceBuffer::CopyFrom(absl::Span<const std::byte> from) {
  return stream_->cuda_->Check(
      stream_->more_->memcpy_async(bytes_.data(), from.data(), from.size(),
                                   kMemcpyDefault, stream_->stream_),
      "copy");
}

absl::StatusOr<std::vector<std::byte>> DeviceBuffer::Read() {
  std::vector<std::byte> out(bytes_.size());
  DSD_RETURN_IF_ERROR(stream_->cuda_->Check(
      stream_->more_->memcpy_async(out.data(), bytes_.data(), out.size(),
                                   kMemcpyDefault, stream_->stream_),
      "copy"));
  DSD_RETURN_IF_ERROR(stream_->Synchronize());
  return out;
}

}  // namespace dsd
