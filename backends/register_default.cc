// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/registry.h"

namespace dsd {
namespace {

const DefaultBackendRegistration registration(DSD_DEFAULT_BACKEND);

}  // namespace
}  // namespace dsd
