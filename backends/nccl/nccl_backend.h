// SPDX-License-Identifier: Apache-2.0

#ifndef DSD_BACKENDS_NCCL_NCCL_BACKEND_H_
#define DSD_BACKENDS_NCCL_NCCL_BACKEND_H_

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/comm/engine.h"

namespace dsd {

// Device memory over NCCL; host memory over another backend that is linked, see
// README.md.
const BackendDescriptor& NcclBackend();

// The engine, with host memory over an engine of `companion`: for a descriptor
// of one's own in a program without registrations. Errors: InvalidArgument if
// the companion moves no host memory.
absl::StatusOr<std::unique_ptr<Engine>> CreateNcclEngine(
    const EngineOptions& options, const BackendDescriptor& companion);

// OK if `ranks` ranks on this host find a library, a driver and devices;
// FailedPrecondition with what is missing.
absl::Status NcclIsAvailable(int ranks);

}  // namespace dsd

#endif  // DSD_BACKENDS_NCCL_NCCL_BACKEND_H_
