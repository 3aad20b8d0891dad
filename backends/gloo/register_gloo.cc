// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/gloo/gloo_backend.h"
#include "dsd/core/comm/registry.h"

namespace dsd {
namespace {

const BackendRegistration registration(GlooBackend());

}  // namespace
}  // namespace dsd
