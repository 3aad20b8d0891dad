// SPDX-License-Identifier: Apache-2.0
//
// What this backend needs of NCCL, declared here and looked up when the program
// runs: abi_test compares it with NVIDIA's header. Everything is there
// since version 2.14, the first with communicators that do not block.

#ifndef DSD_BACKENDS_NCCL_NCCL_API_H_
#define DSD_BACKENDS_NCCL_NCCL_API_H_

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/backends/nccl/cuda_api.h"

namespace dsd {

using NcclComm = void*;  // ncclComm_t

enum NcclResult : int {
  kNcclSuccess = 0,
  kNcclUnhandledCudaError = 1,
  kNcclSystemError = 2,
  kNcclInternalError = 3,
  kNcclInvalidArgument = 4,
  kNcclInvalidUsage = 5,
  kNcclRemoteError = 6,
  kNcclInProgress = 7,
};

inline constexpr int kNcclUint8 = 1;  // of ncclDataType_t

struct NcclUniqueId {
  char internal[128] = {};
};

// The front of ncclConfig_t as 2.14 has it; a library looks at `size` bytes and
// takes its own defaults for what `version` did not have.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = 21400;
  int blocking = 0;
};

inline constexpr int kMinNcclVersion = 21400;
// Several ranks on one device, if NCCL_MULTI_RANK_GPU_ENABLE=1.
inline constexpr int kNcclVersionOfSharedDevices = 23000;

// X(name without "nccl", result, arguments)
#define DSD_NCCL_FUNCTIONS(X)                                           \
  X(CommAbort, NcclResult, (NcclComm comm))                             \
  X(CommDestroy, NcclResult, (NcclComm comm))                           \
  X(CommFinalize, NcclResult, (NcclComm comm))                          \
  X(CommGetAsyncError, NcclResult, (NcclComm comm, NcclResult * error)) \
  X(CommInitRankConfig, NcclResult,                                     \
    (NcclComm * comm, int ranks, NcclUniqueId id, int rank,             \
     NcclConfig* config))                                               \
  X(GetErrorString, const char*, (NcclResult result))                   \
  X(GetLastError, const char*, (NcclComm comm))                         \
  X(GetUniqueId, NcclResult, (NcclUniqueId * id))                       \
  X(GetVersion, NcclResult, (int* version))                             \
  X(GroupEnd, NcclResult, ())                                           \
  X(GroupStart, NcclResult, ())                                         \
  X(Recv, NcclResult,                                                   \
    (void* data, size_t count, int type, int peer, NcclComm comm,       \
     CudaStream stream))                                                \
  X(Send, NcclResult,                                                   \
    (const void* data, size_t count, int type, int peer, NcclComm comm, \
     CudaStream stream))

struct NcclApi {
#define DSD_DECLARE(name, result, arguments) result(*name) arguments = nullptr;
  DSD_NCCL_FUNCTIONS(DSD_DECLARE)
#undef DSD_DECLARE

  int version = 0;  // 23007: 2.30.7

  // `result` as a status; the text begins with `what`. OK for kNcclInProgress.
  absl::Status Check(NcclResult result, absl::string_view what) const;
};

// "2.30.7"
std::string NcclVersionText(int version);

// That of this process: see OpenDynamicLibrary; DSD_NCCL_LIBRARY names another.
// Never freed. Errors: FailedPrecondition with the reason, also if it is older
// than kMinNcclVersion.
absl::StatusOr<const NcclApi*> LoadNccl();

}  // namespace dsd

#endif  // DSD_BACKENDS_NCCL_NCCL_API_H_
