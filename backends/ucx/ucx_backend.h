// SPDX-License-Identifier: Apache-2.0
//
// The backend over UCX: ranks are processes; shared memory within a host, TCP
// or RDMA between hosts. Host memory only.

#ifndef DSD_BACKENDS_UCX_UCX_BACKEND_H_
#define DSD_BACKENDS_UCX_UCX_BACKEND_H_

#include "dsd/core/comm/engine.h"

namespace dsd {

// For CommunicatorOptions::descriptor, in programs that link no registration.
const BackendDescriptor& UcxBackend();

}  // namespace dsd

#endif  // DSD_BACKENDS_UCX_UCX_BACKEND_H_
