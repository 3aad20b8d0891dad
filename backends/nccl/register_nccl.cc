// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/nccl/nccl_backend.h"
#include "dsd/core/comm/registry.h"

namespace dsd {
namespace {

const BackendRegistration registration(NcclBackend());

}  // namespace
}  // namespace dsd
