// SPDX-License-Identifier: Apache-2.0
//
// The backend whose ranks are threads of one process: a message is a memcpy
// from the sender's memory into the receiver's.

#ifndef DSD_BACKENDS_LOCAL_LOCAL_BACKEND_H_
#define DSD_BACKENDS_LOCAL_LOCAL_BACKEND_H_

#include "dsd/core/comm/engine.h"

namespace dsd {

// For CommunicatorOptions::descriptor, in programs that link no registration.
const BackendDescriptor& LocalBackend();

}  // namespace dsd

#endif  // DSD_BACKENDS_LOCAL_LOCAL_BACKEND_H_
