// SPDX-License-Identifier: Apache-2.0
//
// The one place where exceptions of LibTorch become absl::Status. Every call
// into LibTorch that may throw goes through TorchToStatus.

#ifndef DSD_CORE_TENSOR_TORCH_BOUNDARY_H_
#define DSD_CORE_TENSOR_TORCH_BOUNDARY_H_

#include <type_traits>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "c10/util/Exception.h"

namespace dsd {

// A Status on its way through LibTorch, which can only throw: for hooks and
// modules' forward(). TorchToStatus gives the status back as it was; what() is
// its text.
class StatusError : public c10::Error {
 public:
  explicit StatusError(absl::Status status);

  const absl::Status& status() const { return status_; }

 private:
  absl::Status status_;
};

namespace internal {

// The status of the exception in flight. Call inside a catch block only.
absl::Status StatusOfCurrentException();

template <class T>
struct StatusResult {
  using type = absl::StatusOr<T>;
};
template <>
struct StatusResult<void> {
  using type = absl::Status;
};
template <>
struct StatusResult<absl::Status> {
  using type = absl::Status;
};
template <class T>
struct StatusResult<absl::StatusOr<T>> {
  using type = absl::StatusOr<T>;
};

}  // namespace internal

// Runs `fn` and returns its result as Status (fn returns void or Status) or
// StatusOr<T> (fn returns T or StatusOr<T>).
//
// Errors: those of `fn`, the status of a StatusError, and for other exceptions:
// ResourceExhausted (out of memory), InvalidArgument (IndexError, ValueError,
// TypeError), Unimplemented (NotImplementedError), Internal (any other). The
// text is LibTorch's without its stack, which is in the payload
// kTorchBacktracePayload.
template <class Fn>
auto TorchToStatus(Fn&& fn) ->
    typename internal::StatusResult<std::invoke_result_t<Fn>>::type {
  using Result =
      typename internal::StatusResult<std::invoke_result_t<Fn>>::type;
  try {
    if constexpr (std::is_void_v<std::invoke_result_t<Fn>>) {
      std::forward<Fn>(fn)();
      return absl::OkStatus();
    } else {
      return Result(std::forward<Fn>(fn)());
    }
  } catch (...) {
    return internal::StatusOfCurrentException();
  }
}

// Key of the status payload with LibTorch's full text, stack included.
inline constexpr char kTorchBacktracePayload[] = "dsd/torch_backtrace";

}  // namespace dsd

#endif  // DSD_CORE_TENSOR_TORCH_BOUNDARY_H_
