// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/nccl/nccl_api.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <memory>

#include "absl/base/const_init.h"
#include "absl/base/thread_annotations.h"
#include "absl/log/log.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/backends/nccl/dynamic_library.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {

absl::Status NcclApi::Check(NcclResult result, absl::string_view what) const {
  if (result == kNcclSuccess || result == kNcclInProgress) {
    return absl::OkStatus();
  }
  absl::StatusCode code = absl::StatusCode::kInternal;
  // Of the network, or of what another rank does.
  if (result == kNcclSystemError || result == kNcclRemoteError) {
    code = absl::StatusCode::kUnavailable;
  } else if (result == kNcclInvalidUsage) {
    code = absl::StatusCode::kFailedPrecondition;
  }
  const char* const last = GetLastError(nullptr);
  return absl::Status(code,
                      absl::StrCat(what, ": NCCL: ", GetErrorString(result),
                                   last == nullptr || *last == '\0' ? "" : ": ",
                                   last == nullptr ? "" : last,
                                   "; NCCL_DEBUG=WARN tells more"));
}

std::string NcclVersionText(int version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".",
                      version % 100);
}

absl::StatusOr<const NcclApi*> LoadNccl() {
  ABSL_CONST_INIT static absl::Mutex mu(absl::kConstInit);
  static const NcclApi* loaded ABSL_GUARDED_BY(mu) = nullptr;
  absl::MutexLock lock(&mu);
  if (loaded != nullptr) return loaded;
  static constexpr const char* kNames[] = {"libnccl.so.2"};
  static constexpr const char* kFolders[] = {"nvidia/nccl/lib"};
  DSD_ASSIGN_OR_RETURN(
      void* const library,
      OpenDynamicLibrary({"DSD_NCCL_LIBRARY", kNames, kFolders}));

  auto api = std::make_unique<NcclApi>();
  const char* missing = nullptr;
#define DSD_LOOK_UP(name, result, arguments)                               \
  api->name =                                                              \
      reinterpret_cast<decltype(api->name)>(dlsym(library, "nccl" #name)); \
  if (api->name == nullptr) missing = "nccl" #name;
  DSD_NCCL_FUNCTIONS(DSD_LOOK_UP)
#undef DSD_LOOK_UP
  if (api->GetVersion == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("the library found as libnccl.so.2 is not NCCL: it has no "
                     "ncclGetVersion"));
  }
  const char* const file =
      FileOfAddress(reinterpret_cast<const void*>(api->GetVersion));
  if (const NcclResult result = api->GetVersion(&api->version);
      result != kNcclSuccess) {
    return absl::FailedPreconditionError(
        absl::StrCat(file, ": ncclGetVersion returns ", result));
  }
  if (api->version < kMinNcclVersion) {
    return absl::FailedPreconditionError(absl::StrCat(
        file, " is NCCL ", NcclVersionText(api->version), ", needed is ",
        NcclVersionText(kMinNcclVersion), " or newer"));
  }
  if (missing != nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat(file, " is NCCL ", NcclVersionText(api->version),
                     " but has no ", missing));
  }
  // NCCL lets it win over the configuration of a communicator.
  const char* const blocking = getenv("NCCL_COMM_BLOCKING");
  if (blocking != nullptr && atoi(blocking) == 1) {
    LOG(WARNING) << "NCCL_COMM_BLOCKING=1: calls of NCCL block, so connecting "
                    "may outlast its deadline; unset it";
  }
  loaded = api.release();
  return loaded;
}

}  // namespace dsd
