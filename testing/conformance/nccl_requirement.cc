// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/nccl/nccl_backend.h"
#include "dsd/testing/conformance/conformance.h"

namespace dsd {
namespace {

const ConformanceRequirementRegistration registration("nccl", &NcclIsAvailable);

}  // namespace
}  // namespace dsd
