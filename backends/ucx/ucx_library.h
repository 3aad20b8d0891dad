// SPDX-License-Identifier: Apache-2.0
//
// libucp.so.0, loaded when it is first needed and never unloaded. Loaded and
// not linked, because UCX takes over signal handlers as soon as it is in a
// process, and because a program that could use it must start without it.

#ifndef DSD_BACKENDS_UCX_UCX_LIBRARY_H_
#define DSD_BACKENDS_UCX_UCX_LIBRARY_H_

#include <ucp/api/ucp.h>

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dsd {

// The functions that the backend calls.
#define DSD_UCX_FUNCTIONS(_)        \
  _(ucp_am_data_release)            \
  _(ucp_am_recv_data_nbx)           \
  _(ucp_am_send_nbx)                \
  _(ucp_cleanup)                    \
  _(ucp_config_modify)              \
  _(ucp_config_print)               \
  _(ucp_config_read)                \
  _(ucp_config_release)             \
  _(ucp_ep_close_nbx)               \
  _(ucp_ep_create)                  \
  _(ucp_ep_flush_nbx)               \
  _(ucp_get_version)                \
  _(ucp_init_version)               \
  _(ucp_request_free)               \
  _(ucp_worker_arm)                 \
  _(ucp_worker_create)              \
  _(ucp_worker_destroy)             \
  _(ucp_worker_get_address)         \
  _(ucp_worker_get_efd)             \
  _(ucp_worker_progress)            \
  _(ucp_worker_release_address)     \
  _(ucp_worker_set_am_recv_handler) \
  _(ucs_status_string)

struct UcxLibrary {
#define DSD_UCX_MEMBER(name) decltype(&::name) name = nullptr;
  DSD_UCX_FUNCTIONS(DSD_UCX_MEMBER)
#undef DSD_UCX_MEMBER

  unsigned major = 0;
  unsigned minor = 0;
};

// The same for all callers. Unless the user has set UCX_HANDLE_ERRORS, or
// something else in the process has loaded UCX before, the handlers of signals
// are as they were when it returns. To be called first in a thread of the
// library's own: UCX gives the calling thread a signal stack.
// Errors: NotFound, naming what was looked for and the remedy;
// FailedPrecondition for a version that is too old.
absl::StatusOr<const UcxLibrary*> LoadUcx();

// While it lives, the errors that UCX would print from this thread (to standard
// output) are collected instead, unless the user has set UCX_LOG_LEVEL.
class UcxErrors {
 public:
  UcxErrors();
  UcxErrors(const UcxErrors&) = delete;
  ~UcxErrors();

  // What came since the last call, "; " between; the first few.
  std::string Take();

 private:
  friend struct UcxLog;
  std::string text_;
  UcxErrors* const before_;
};

// "what: status (what UCX said)". `code`, or ResourceExhausted: Unavailable is
// how the death of a peer looks.
absl::Status UcxError(const UcxLibrary& ucx, absl::string_view what,
                      ucs_status_t status, UcxErrors& errors,
                      absl::StatusCode code = absl::StatusCode::kUnavailable);

}  // namespace dsd

#endif  // DSD_BACKENDS_UCX_UCX_LIBRARY_H_
