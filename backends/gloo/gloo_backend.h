// SPDX-License-Identifier: Apache-2.0
//
// The backend over Gloo's TCP transport: ranks are processes on hosts that
// reach each other. Host memory only.

#ifndef DSD_BACKENDS_GLOO_GLOO_BACKEND_H_
#define DSD_BACKENDS_GLOO_GLOO_BACKEND_H_

#include "dsd/core/comm/engine.h"

namespace dsd {

// For CommunicatorOptions::descriptor, in programs that link no registration.
const BackendDescriptor& GlooBackend();

}  // namespace dsd

#endif  // DSD_BACKENDS_GLOO_GLOO_BACKEND_H_
