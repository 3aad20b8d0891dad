// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/registry.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>

#include "absl/base/const_init.h"
#include "absl/log/log.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace dsd {
namespace {

ABSL_CONST_INIT std::atomic<const BackendRegistration*> registrations{nullptr};
ABSL_CONST_INIT std::atomic<const char*> default_backend{nullptr};

// The program or library that holds a constant.
std::string Origin(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) {
    return "an unknown object";
  }
  return info.dli_fname;
}

}  // namespace

BackendRegistration::BackendRegistration(
    const BackendDescriptor& descriptor) noexcept
    : descriptor_(&descriptor), next_(registrations.load()) {
  while (!registrations.compare_exchange_weak(next_, this)) {
  }
}

DefaultBackendRegistration::DefaultBackendRegistration(
    const char* name) noexcept {
  default_backend.store(name);
}

std::vector<const BackendDescriptor*> LinkedDescriptors() {
  std::vector<const BackendDescriptor*> found;
  for (const BackendRegistration* node = registrations.load(); node != nullptr;
       node = node->next_) {
    found.push_back(node->descriptor_);
  }
  std::sort(found.begin(), found.end(),
            [](const BackendDescriptor* a, const BackendDescriptor* b) {
              return a->name != b->name ? a->name < b->name : a < b;
            });
  found.erase(std::unique(found.begin(), found.end()), found.end());
  for (size_t i = 1; i < found.size(); ++i) {
    if (found[i]->name == found[i - 1]->name) {
      LOG(FATAL) << "two backends \"" << found[i]->name
                 << "\" are linked: one by " << Origin(found[i - 1])
                 << ", one by " << Origin(found[i])
                 << "; link it in one of them only";
    }
  }
  return found;
}

std::vector<std::string> LinkedBackends() {
  std::vector<std::string> names;
  for (const BackendDescriptor* descriptor : LinkedDescriptors()) {
    names.emplace_back(descriptor->name);
  }
  return names;
}

absl::StatusOr<const BackendDescriptor*> FindBackend(absl::string_view name) {
  const std::vector<const BackendDescriptor*> linked = LinkedDescriptors();
  const std::string list =
      linked.empty() ? "none" : absl::StrJoin(LinkedBackends(), ", ");
  if (name.empty()) {
    const char* const by_build = default_backend.load();
    std::vector<const BackendDescriptor*> between_processes;
    for (const BackendDescriptor* descriptor : linked) {
      if (!descriptor->in_process) between_processes.push_back(descriptor);
    }
    if (linked.size() == 1) {
      name = linked[0]->name;
    } else if (by_build != nullptr && *by_build != '\0') {
      name = by_build;
    } else if (between_processes.size() == 1) {
      name = between_processes[0]->name;
    } else if (linked.empty()) {
      return absl::NotFoundError(
          "no backend is linked; add one of //backends/... or "
          "//backends:default_backend to deps");
    } else {
      return absl::NotFoundError(
          absl::StrCat("several backends are linked (", list,
                       ") and none is the default; name one or build with "
                       "--//backends:default="));
    }
  }
  for (const BackendDescriptor* descriptor : linked) {
    if (descriptor->name == name) {
      if (descriptor->api_version != kEngineApiVersion) {
        return absl::FailedPreconditionError(absl::StrCat(
            "backend \"", name, "\" of ", Origin(descriptor),
            " is made for version ", descriptor->api_version,
            " of the backend interface, this program has version ",
            kEngineApiVersion, "; build both from the same source"));
      }
      return descriptor;
    }
  }
  return absl::NotFoundError(
      absl::StrCat("no backend \"", name, "\" is linked (linked: ", list,
                   "); add //backends/", name, " to deps or build with ",
                   "--//backends:default=", name));
}

}  // namespace dsd
