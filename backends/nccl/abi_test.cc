// SPDX-License-Identifier: Apache-2.0
//
// What nccl_api.h and cuda_api.h declare is what NVIDIA's headers say. Mostly
// the compiler checks it.

#include <cstddef>
#include <type_traits>

#include "dsd/backends/nccl/cuda_api.h"
#include "dsd/backends/nccl/nccl_api.h"
#include "gtest/gtest.h"

#ifdef DSD_NCCL_HEADERS_MISSING

TEST(NcclAbiTest, MatchesTheHeaders) {
  GTEST_SKIP() << DSD_NCCL_HEADERS_MISSING;
}

#else

#include <cuda_runtime.h>
#include <nccl.h>

namespace dsd {
namespace {

// Whether two types are passed in the same way: pointers to what is alike, or
// values of one kind and size.
template <class Ours, class Theirs>
constexpr bool Alike() {
  if constexpr (std::is_pointer_v<Ours> || std::is_pointer_v<Theirs>) {
    if constexpr (!std::is_pointer_v<Ours> || !std::is_pointer_v<Theirs>) {
      return false;
    } else {
      using A = std::remove_pointer_t<Ours>;
      using B = std::remove_pointer_t<Theirs>;
      // Handles are pointers to nothing here.
      if constexpr (std::is_void_v<A>) {
        return !std::is_pointer_v<B>;
      } else if constexpr (std::is_void_v<B>) {
        return false;
      } else if constexpr (std::is_class_v<A>) {
        // The library may know of more, or less, at the end.
        return std::is_class_v<B>;
      } else {
        return Alike<std::remove_cv_t<A>, std::remove_cv_t<B> >();
      }
    }
  } else if constexpr (std::is_class_v<Ours>) {
    return std::is_class_v<Theirs> && sizeof(Ours) == sizeof(Theirs) &&
           alignof(Ours) == alignof(Theirs) &&
           std::is_trivially_copyable_v<Ours>;
  } else {
    return (std::is_integral_v<Ours> || std::is_enum_v<Ours>)&&(
               std::is_integral_v<Theirs> ||
               std::is_enum_v<Theirs>)&&sizeof(Ours) == sizeof(Theirs);
  }
}

template <class Ours, class Theirs>
struct SameCall : std::false_type {};
template <class R, class... A, class S, class... B>
struct SameCall<R (*)(A...), S (*)(B...)> {
  static constexpr bool Check() {
    if constexpr (sizeof...(A) != sizeof...(B)) {
      return false;
    } else {
      return Alike<R, S>() && (Alike<A, B>() && ...);
    }
  }
  static constexpr bool value = Check();
};

// A function of C++ stands beside some of C; this picks the latter.
#define DSD_COMPARE_CUDA(name, result, arguments)                              \
  static_assert(SameCall<decltype(CudaApi::name), CudaFunction_##name>::value, \
                "cuda" #name " is another function in cuda_runtime.h");
#define DSD_COMPARE_NCCL(name, result, arguments)                        \
  static_assert(                                                         \
      SameCall<decltype(NcclApi::name), decltype(&::nccl##name)>::value, \
      "nccl" #name " is another function in nccl.h");

using CudaFunction_DeviceGetStreamPriorityRange =
    decltype(&::cudaDeviceGetStreamPriorityRange);
using CudaFunction_EventCreateWithFlags = decltype(&::cudaEventCreateWithFlags);
using CudaFunction_EventDestroy = decltype(&::cudaEventDestroy);
using CudaFunction_EventQuery = decltype(&::cudaEventQuery);
using CudaFunction_EventRecord =
    decltype(static_cast<cudaError_t (*)(cudaEvent_t, cudaStream_t)>(
        &::cudaEventRecord));
using CudaFunction_Free = decltype(&::cudaFree);
using CudaFunction_GetDevice = decltype(&::cudaGetDevice);
using CudaFunction_GetDeviceCount = decltype(&::cudaGetDeviceCount);
using CudaFunction_GetErrorString = decltype(&::cudaGetErrorString);
using CudaFunction_GetLastError = decltype(&::cudaGetLastError);
using CudaFunction_Malloc =
    decltype(static_cast<cudaError_t (*)(void**, size_t)>(&::cudaMalloc));
using CudaFunction_PointerGetAttributes = decltype(&::cudaPointerGetAttributes);
using CudaFunction_RuntimeGetVersion = decltype(&::cudaRuntimeGetVersion);
using CudaFunction_SetDevice = decltype(&::cudaSetDevice);
using CudaFunction_StreamCreateWithPriority =
    decltype(&::cudaStreamCreateWithPriority);
using CudaFunction_StreamDestroy = decltype(&::cudaStreamDestroy);
using CudaFunction_StreamQuery = decltype(&::cudaStreamQuery);

DSD_CUDA_FUNCTIONS(DSD_COMPARE_CUDA)
DSD_NCCL_FUNCTIONS(DSD_COMPARE_NCCL)

static_assert(NCCL_UNIQUE_ID_BYTES == sizeof(NcclUniqueId));
static_assert(NCCL_VERSION(2, 14, 0) == kMinNcclVersion);
static_assert(NCCL_VERSION(2, 30, 0) == kNcclVersionOfSharedDevices);

// The front of the configuration.
#define DSD_SAME_FIELD(field)                        \
  static_assert(offsetof(NcclConfig, field) ==       \
                    offsetof(ncclConfig_t, field) && \
                sizeof(NcclConfig::field) == sizeof(ncclConfig_t::field))
DSD_SAME_FIELD(size);
DSD_SAME_FIELD(magic);
DSD_SAME_FIELD(version);
DSD_SAME_FIELD(blocking);
static_assert(sizeof(NcclConfig) <= sizeof(ncclConfig_t));

#define DSD_SAME_POINTER_FIELD(ours, theirs)             \
  static_assert(offsetof(CudaPointerAttributes, ours) == \
                offsetof(cudaPointerAttributes, theirs))
DSD_SAME_POINTER_FIELD(type, type);
DSD_SAME_POINTER_FIELD(device, device);
DSD_SAME_POINTER_FIELD(device_pointer, devicePointer);
DSD_SAME_POINTER_FIELD(host_pointer, hostPointer);
static_assert(sizeof(CudaPointerAttributes) >= sizeof(cudaPointerAttributes));

TEST(NcclAbiTest, MatchesTheHeaders) {
  EXPECT_EQ(int{ncclSuccess}, int{kNcclSuccess});
  EXPECT_EQ(int{ncclUnhandledCudaError}, int{kNcclUnhandledCudaError});
  EXPECT_EQ(int{ncclSystemError}, int{kNcclSystemError});
  EXPECT_EQ(int{ncclInternalError}, int{kNcclInternalError});
  EXPECT_EQ(int{ncclInvalidArgument}, int{kNcclInvalidArgument});
  EXPECT_EQ(int{ncclInvalidUsage}, int{kNcclInvalidUsage});
  EXPECT_EQ(int{ncclRemoteError}, int{kNcclRemoteError});
  EXPECT_EQ(int{ncclInProgress}, int{kNcclInProgress});
  EXPECT_EQ(int{ncclUint8}, kNcclUint8);
  const ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;
  EXPECT_EQ(theirs.magic, NcclConfig().magic);
  EXPECT_GE(theirs.version, NcclConfig().version);

  EXPECT_EQ(int{cudaSuccess}, kCudaSuccess);
  EXPECT_EQ(int{cudaErrorNotReady}, kCudaNotReady);
  EXPECT_EQ(unsigned{cudaStreamNonBlocking}, kCudaStreamNonBlocking);
  EXPECT_EQ(unsigned{cudaEventDisableTiming}, kCudaEventDisableTiming);
  EXPECT_EQ(int{cudaMemoryTypeUnregistered},
            int{CudaPointerAttributes::kUnregistered});
  EXPECT_EQ(int{cudaMemoryTypeHost}, int{CudaPointerAttributes::kHost});
  EXPECT_EQ(int{cudaMemoryTypeDevice}, int{CudaPointerAttributes::kDevice});
  EXPECT_EQ(int{cudaMemoryTypeManaged}, int{CudaPointerAttributes::kManaged});
}

}  // namespace
}  // namespace dsd

#endif  // DSD_NCCL_HEADERS_MISSING
