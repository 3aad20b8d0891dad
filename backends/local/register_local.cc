// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/local/local_backend.h"
#include "dsd/core/comm/registry.h"

namespace dsd {
namespace {

const BackendRegistration registration(LocalBackend());

}  // namespace
}  // namespace dsd
