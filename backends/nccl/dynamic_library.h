// SPDX-License-Identifier: Apache-2.0
//
// Libraries of NVIDIA that are looked up when the program runs, so that it runs
// without them, too, and shares the copies that LibTorch uses.

#ifndef DSD_BACKENDS_NCCL_DYNAMIC_LIBRARY_H_
#define DSD_BACKENDS_NCCL_DYNAMIC_LIBRARY_H_

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace dsd {

struct DynamicLibrarySearch {
  // Environment variable with the path of the file to use and no other.
  const char* variable;
  // File names, best first: "libnccl.so.2".
  absl::Span<const char* const> names;
  // Where wheels install it, below site-packages: "nvidia/nccl/lib".
  absl::Span<const char* const> wheel_folders;
};

// A handle for dlsym, never closed: the file that the variable names; else the
// copy that is mapped already; else what the loader finds (RUNPATH,
// LD_LIBRARY_PATH, the system's folders); else one in the wheels beside the
// LibTorch that is mapped. Errors: FailedPrecondition with all that was tried.
absl::StatusOr<void*> OpenDynamicLibrary(const DynamicLibrarySearch& search);

// The file that holds an address, for error texts.
const char* FileOfAddress(const void* address);

}  // namespace dsd

#endif  // DSD_BACKENDS_NCCL_DYNAMIC_LIBRARY_H_
