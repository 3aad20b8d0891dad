// SPDX-License-Identifier: Apache-2.0
//
// What the NCCL backend needs of the CUDA runtime (12 and 13 alike), declared
// here and looked up when the program runs: abi_test compares it with
// NVIDIA's header.

#ifndef DSD_BACKENDS_NCCL_CUDA_API_H_
#define DSD_BACKENDS_NCCL_CUDA_API_H_

#include <cstddef>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dsd {

using CudaStream = void*;  // cudaStream_t
using CudaEvent = void*;   // cudaEvent_t

// cudaError_t
inline constexpr int kCudaSuccess = 0;
inline constexpr int kCudaNotReady = 600;

inline constexpr unsigned kCudaStreamNonBlocking = 1;
inline constexpr unsigned kCudaEventDisableTiming = 2;

// cudaPointerAttributes. Version 13 has more at the end.
struct CudaPointerAttributes {
  enum Type : int { kUnregistered = 0, kHost = 1, kDevice = 2, kManaged = 3 };
  Type type = kUnregistered;
  int device = -1;
  void* device_pointer = nullptr;
  void* host_pointer = nullptr;
  long reserved[8] = {};
};

// X(name without "cuda", result, arguments)
#define DSD_CUDA_FUNCTIONS(X)                                       \
  X(DeviceGetStreamPriorityRange, int, (int* least, int* greatest)) \
  X(EventCreateWithFlags, int, (CudaEvent * event, unsigned flags)) \
  X(EventDestroy, int, (CudaEvent event))                           \
  X(EventQuery, int, (CudaEvent event))                             \
  X(EventRecord, int, (CudaEvent event, CudaStream stream))         \
  X(Free, int, (void* memory))                                      \
  X(GetDevice, int, (int* device))                                  \
  X(GetDeviceCount, int, (int* count))                              \
  X(GetErrorString, const char*, (int error))                       \
  X(GetLastError, int, ())                                          \
  X(Malloc, int, (void** memory, size_t bytes))                     \
  X(PointerGetAttributes, int,                                      \
    (CudaPointerAttributes * attributes, const void* memory))       \
  X(RuntimeGetVersion, int, (int* version))                         \
  X(SetDevice, int, (int device))                                   \
  X(StreamCreateWithPriority, int,                                  \
    (CudaStream * stream, unsigned flags, int priority))            \
  X(StreamDestroy, int, (CudaStream stream))                        \
  X(StreamQuery, int, (CudaStream stream))

struct CudaApi {
#define DSD_DECLARE(name, result, arguments) result(*name) arguments = nullptr;
  DSD_CUDA_FUNCTIONS(DSD_DECLARE)
#undef DSD_DECLARE

  // `result` as a status; the text begins with `what`.
  absl::Status Check(int result, absl::string_view what) const;

  // Whether `event` is reached. Errors: those of work before it, of any stream.
  absl::StatusOr<bool> IsReached(CudaEvent event) const;
};

// The library itself, for dlsym. Errors: as for LoadCuda.
absl::StatusOr<void*> OpenCudaLibrary();

// That of this process: see OpenDynamicLibrary; DSD_CUDART_LIBRARY names
// another. Never freed. Errors: FailedPrecondition with the reason.
absl::StatusOr<const CudaApi*> LoadCuda();

// Makes `device` the current one of this thread while it lives.
class CudaDeviceScope {
 public:
  CudaDeviceScope(const CudaApi& cuda, int device);
  CudaDeviceScope(const CudaDeviceScope&) = delete;
  ~CudaDeviceScope();

  const absl::Status& status() const { return status_; }

 private:
  const CudaApi& cuda_;
  int before_ = -1;
  absl::Status status_;
};

}  // namespace dsd

#endif  // DSD_BACKENDS_NCCL_CUDA_API_H_
