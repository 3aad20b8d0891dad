// SPDX-License-Identifier: Apache-2.0
//
// Early returns on `absl::Status`, and context for errors on their way up.
//
//   absl::Status Load(absl::string_view dir) {
//     DSD_ASSIGN_OR_RETURN(Index index, ReadIndex(dir));
//     DSD_RETURN_IF_ERROR(Check(index)) << "load \"" << dir << "\"";
//     return absl::OkStatus();
//   }

#ifndef DSD_CORE_BASE_STATUS_MACROS_H_
#define DSD_CORE_BASE_STATUS_MACROS_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

#if __cplusplus < 201703L
#error "dsd needs C++17: put `build --cxxopt=-std=c++17` into your .bazelrc"
#endif

namespace dsd {

// Returns `status` with "`context`: " put before its text. Code and payloads
// stay. An OK status is returned unchanged.
absl::Status Annotate(const absl::Status& status, absl::string_view context);

namespace internal {

// Collects streamed context; converts to the annotated status.
class StatusAnnotator {
 public:
  explicit StatusAnnotator(absl::Status status) : status_(std::move(status)) {}
  template <class T>
  StatusAnnotator& operator<<(const T& value) {
    absl::StrAppend(&context_, value);
    return *this;
  }
  operator absl::Status() const {  // NOLINT: made for `return`
    return context_.empty() ? status_ : Annotate(status_, context_);
  }
  template <class T>
  operator absl::StatusOr<T>() const {  // NOLINT: made for `return`
    return static_cast<absl::Status>(*this);
  }

 private:
  absl::Status status_;
  std::string context_;
};

inline const absl::Status& AsStatus(const absl::Status& status) {
  return status;
}
template <class T>
const absl::Status& AsStatus(const absl::StatusOr<T>& status_or) {
  return status_or.status();
}

}  // namespace internal
}  // namespace dsd

#define DSD_INTERNAL_CONCAT_(a, b) a##b
#define DSD_INTERNAL_CONCAT(a, b) DSD_INTERNAL_CONCAT_(a, b)

// Returns from the function if `expr` (a Status or StatusOr) is an error.
// Context may be streamed: DSD_RETURN_IF_ERROR(f()) << "while packing";
// A loop and no `if`, so that an `else` of the caller's cannot bind to it.
#define DSD_RETURN_IF_ERROR(expr)                                            \
  for (absl::Status dsd_internal_status = ::dsd::internal::AsStatus((expr)); \
       !dsd_internal_status.ok();)                                           \
  return ::dsd::internal::StatusAnnotator(std::move(dsd_internal_status))

// Assigns the value of `expr` (a StatusOr) to `lhs`, or returns its error. Two
// statements: not for an unbraced `if`.
#define DSD_ASSIGN_OR_RETURN(lhs, expr) \
  DSD_INTERNAL_ASSIGN_OR_RETURN(        \
      DSD_INTERNAL_CONCAT(dsd_internal_statusor_, __LINE__), lhs, expr)
#define DSD_INTERNAL_ASSIGN_OR_RETURN(statusor, lhs, expr) \
  auto statusor = (expr);                                  \
  if (!statusor.ok()) return std::move(statusor).status(); \
  lhs = *std::move(statusor)

#endif  // DSD_CORE_BASE_STATUS_MACROS_H_
