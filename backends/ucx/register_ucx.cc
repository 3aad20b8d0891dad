// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/ucx/ucx_backend.h"
#include "dsd/core/comm/registry.h"

namespace dsd {
namespace {

const BackendRegistration registration(UcxBackend());

}  // namespace
}  // namespace dsd
