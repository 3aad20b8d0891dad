// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/ucx/ucx_library.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdlib.h>
#include <ucs/debug/log_def.h>

#include <cstdio>
#include <string>
#include <utility>

#include "absl/base/const_init.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {

namespace {

constexpr char kLibrary[] = "libucp.so.0";
constexpr size_t kMaxErrorBytes = 600;

thread_local UcxErrors* collecting = nullptr;

bool IsSet(const char* variable) { return getenv(variable) != nullptr; }

}  // namespace

struct UcxLog {
  static ucs_log_func_rc_t Handle(const char* /*file*/, unsigned /*line*/,
                                  const char* /*function*/,
                                  ucs_log_level_t level,
                                  const ucs_log_component_config_t* /*config*/,
                                  const char* format, va_list arguments) {
    if (collecting == nullptr || level == UCS_LOG_LEVEL_FATAL ||
        level > UCS_LOG_LEVEL_WARN) {
      return UCS_LOG_FUNC_RC_CONTINUE;
    }
    char line[256];
    vsnprintf(line, sizeof(line), format, arguments);
    std::string& text = collecting->text_;
    if (level == UCS_LOG_LEVEL_ERROR && text.size() < kMaxErrorBytes) {
      absl::StrAppend(&text, text.empty() ? "" : "; ", line);
    }
    return UCS_LOG_FUNC_RC_STOP;
  }
};

namespace {

absl::StatusOr<UcxLibrary> Load() {
  // Whoever loaded it before us also chose what it does with signals.
  const bool was_loaded =
      dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD) != nullptr;
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const why = dlerror();
    return absl::NotFoundError(absl::StrCat(
        "backend \"ucx\" needs the UCX library, which cannot be loaded: ",
        why == nullptr ? kLibrary : why,
        "; install it (Debian: libucx0), or put its folder into "
        "LD_LIBRARY_PATH"));
  }
  UcxLibrary ucx;
#define DSD_UCX_FIND(name)                                                \
  ucx.name = reinterpret_cast<decltype(ucx.name)>(dlsym(library, #name)); \
  if (ucx.name == nullptr) {                                              \
    return absl::FailedPreconditionError(                                 \
        absl::StrCat("backend \"ucx\": ", kLibrary,                       \
                     " has no " #name "; it needs UCX 1.11 or newer"));   \
  }
  DSD_UCX_FUNCTIONS(DSD_UCX_FIND)
#undef DSD_UCX_FIND
  unsigned release = 0;
  ucx.ucp_get_version(&ucx.major, &ucx.minor, &release);

  if (!was_loaded && !IsSet("UCX_HANDLE_ERRORS")) {
    const auto restore = reinterpret_cast<void (*)()>(
        dlsym(library, "ucs_debug_disable_signals"));
    if (restore != nullptr) restore();
  }
  // These tell UCX's user where the log is wanted.
  if (!IsSet("UCX_LOG_LEVEL") && !IsSet("UCX_LOG_FILE")) {
    const auto push = reinterpret_cast<decltype(&::ucs_log_push_handler)>(
        dlsym(library, "ucs_log_push_handler"));
    if (push != nullptr) push(&UcxLog::Handle);
  }
  return ucx;
}

}  // namespace

absl::StatusOr<const UcxLibrary*> LoadUcx() {
  static absl::Mutex mu(absl::kConstInit);
  // Not destroyed: threads of UCX live as long as the process.
  static const UcxLibrary* loaded = nullptr;
  absl::MutexLock lock(&mu);
  if (loaded == nullptr) {
    DSD_ASSIGN_OR_RETURN(UcxLibrary library, Load());
    loaded = new UcxLibrary(library);
  }
  return loaded;
}

UcxErrors::UcxErrors() : before_(std::exchange(collecting, this)) {}
UcxErrors::~UcxErrors() { collecting = before_; }
std::string UcxErrors::Take() { return std::exchange(text_, std::string()); }

absl::Status UcxError(const UcxLibrary& ucx, absl::string_view what,
                      ucs_status_t status, UcxErrors& errors,
                      absl::StatusCode code) {
  const std::string said = errors.Take();
  if (status == UCS_ERR_NO_MEMORY || status == UCS_ERR_NO_RESOURCE ||
      status == UCS_ERR_EXCEEDS_LIMIT) {
    code = absl::StatusCode::kResourceExhausted;
  }
  return absl::Status(
      code, absl::StrCat(what, ": UCX: ", ucx.ucs_status_string(status),
                         said.empty() ? "" : absl::StrCat(" (", said, ")")));
}

}  // namespace dsd
