// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/nccl/cuda_api.h"

#include <dlfcn.h>

#include <memory>

#include "absl/base/const_init.h"
#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/backends/nccl/dynamic_library.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {

absl::Status CudaApi::Check(int result, absl::string_view what) const {
  if (result == kCudaSuccess) return absl::OkStatus();
  // Else LibTorch's next look at it would blame its own last call.
  GetLastError();
  return absl::InternalError(
      absl::StrCat(what, ": CUDA: ", GetErrorString(result)));
}

absl::StatusOr<bool> CudaApi::IsReached(CudaEvent event) const {
  const int result = EventQuery(event);
  if (result == kCudaNotReady) {
    GetLastError();
    return false;
  }
  DSD_RETURN_IF_ERROR(Check(result, "device work"));
  return true;
}

absl::StatusOr<void*> OpenCudaLibrary() {
  static constexpr const char* kNames[] = {"libcudart.so.13", "libcudart.so.12",
                                           "libcudart.so.11.0", "libcudart.so"};
  static constexpr const char* kFolders[] = {"nvidia/cu13/lib",
                                             "nvidia/cuda_runtime/lib"};
  return OpenDynamicLibrary({"DSD_CUDART_LIBRARY", kNames, kFolders});
}

absl::StatusOr<const CudaApi*> LoadCuda() {
  ABSL_CONST_INIT static absl::Mutex mu(absl::kConstInit);
  static const CudaApi* loaded ABSL_GUARDED_BY(mu) = nullptr;
  absl::MutexLock lock(&mu);
  if (loaded != nullptr) return loaded;
  DSD_ASSIGN_OR_RETURN(void* const library, OpenCudaLibrary());
  auto api = std::make_unique<CudaApi>();
#define DSD_LOOK_UP(name, result, arguments)                                 \
  if ((api->name = reinterpret_cast<decltype(api->name)>(                    \
           dlsym(library, "cuda" #name))) == nullptr) {                      \
    return absl::FailedPreconditionError(                                    \
        absl::StrCat("the CUDA runtime has no cuda" #name ": ", dlerror())); \
  }
  DSD_CUDA_FUNCTIONS(DSD_LOOK_UP)
#undef DSD_LOOK_UP
  loaded = api.release();
  return loaded;
}

CudaDeviceScope::CudaDeviceScope(const CudaApi& cuda, int device)
    : cuda_(cuda) {
  int current = -1;
  status_ = cuda.Check(cuda.GetDevice(&current), "current device");
  if (!status_.ok() || current == device) return;
  status_ = cuda.Check(cuda.SetDevice(device), absl::StrCat("device ", device));
  if (status_.ok()) before_ = current;
}

CudaDeviceScope::~CudaDeviceScope() {
  if (before_ >= 0) cuda_.SetDevice(before_);
}

}  // namespace dsd
