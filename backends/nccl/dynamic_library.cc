// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/nccl/dynamic_library.h"

#include <dlfcn.h>
#include <link.h>
#include <stdlib.h>

#include <algorithm>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"

namespace dsd {
namespace {

// Symbols of one copy must not answer for those of another.
constexpr int kMode = RTLD_NOW | RTLD_LOCAL;

// The folders "site-packages" from which objects of PyTorch or of NVIDIA's
// wheels are mapped.
std::vector<std::string> SitePackages() {
  std::vector<std::string> sites;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const absl::string_view path =
            info->dlpi_name == nullptr ? "" : info->dlpi_name;
        for (const absl::string_view part : {"/torch/lib/", "/nvidia/"}) {
          const size_t at = path.rfind(part);
          if (at == absl::string_view::npos) continue;
          auto& list = *static_cast<std::vector<std::string>*>(out);
          const absl::string_view site = path.substr(0, at);
          if (std::find(list.begin(), list.end(), site) == list.end()) {
            list.emplace_back(site);
          }
        }
        return 0;
      },
      &sites);
  return sites;
}

}  // namespace

absl::StatusOr<void*> OpenDynamicLibrary(const DynamicLibrarySearch& search) {
  const char* const chosen = getenv(search.variable);
  if (chosen != nullptr && *chosen != '\0') {
    if (void* const handle = dlopen(chosen, kMode)) return handle;
    return absl::FailedPreconditionError(
        absl::StrCat(search.variable, "=", chosen, ": ", dlerror()));
  }
  for (const char* name : search.names) {
    if (void* const handle = dlopen(name, kMode | RTLD_NOLOAD)) return handle;
  }
  std::vector<std::string> paths(search.names.begin(), search.names.end());
  for (const std::string& site : SitePackages()) {
    for (const char* folder : search.wheel_folders) {
      for (const char* name : search.names) {
        paths.push_back(absl::StrCat(site, "/", folder, "/", name));
      }
    }
  }
  std::vector<std::string> errors;
  for (const std::string& path : paths) {
    if (void* const handle = dlopen(path.c_str(), kMode)) return handle;
    errors.emplace_back(dlerror());
  }
  return absl::FailedPreconditionError(absl::StrCat(
      search.names[0], " was not found (", absl::StrJoin(errors, "; "),
      "); install it, or name the file in ", search.variable));
}

const char* FileOfAddress(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) {
    return "an unknown file";
  }
  return info.dli_fname;
}

}  // namespace dsd
