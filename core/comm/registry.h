// SPDX-License-Identifier: Apache-2.0
//
// Backends linked into this program. A backend's register_*.cc (an alwayslink
// target) holds one static BackendRegistration; embedders who want no static
// initializer link the backend's other target and pass its descriptor to
// Communicator::Create.

#ifndef DSD_CORE_COMM_REGISTRY_H_
#define DSD_CORE_COMM_REGISTRY_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/comm/engine.h"

namespace dsd {

// Takes no lock, allocates nothing, calls nothing in the backend. Must have
// static storage.
class BackendRegistration {
 public:
  explicit BackendRegistration(const BackendDescriptor& descriptor) noexcept;
  BackendRegistration(const BackendRegistration&) = delete;

 private:
  friend std::vector<const BackendDescriptor*> LinkedDescriptors();
  const BackendDescriptor* descriptor_;
  const BackendRegistration* next_;
};

// The build-time default (`--//backends:default=`), set by a registration like
// that of backends. Empty name if the program links none.
class DefaultBackendRegistration {
 public:
  explicit DefaultBackendRegistration(const char* name) noexcept;
};

// All linked descriptors, sorted by name. Two different ones of one name are
// fatal: the program is linked wrongly; the text names both origins.
std::vector<const BackendDescriptor*> LinkedDescriptors();

// Their names, sorted.
std::vector<std::string> LinkedBackends();

// The backend to use: `name` if not empty; else the only one linked; else the
// build-time default; else the only one linked that is not in_process; else an
// error. Errors: NotFound: `no backend "nccl" is linked (linked: gloo, local);
// add
// //backends/nccl to deps or build with --//backends:default=nccl`.
absl::StatusOr<const BackendDescriptor*> FindBackend(absl::string_view name);

}  // namespace dsd

#endif  // DSD_CORE_COMM_REGISTRY_H_
