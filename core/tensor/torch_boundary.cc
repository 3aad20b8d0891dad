// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/tensor/torch_boundary.h"

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "c10/util/Exception.h"

namespace dsd {

StatusError::StatusError(absl::Status status)
    : c10::Error(std::string(status.message())), status_(std::move(status)) {}

namespace internal {
namespace {

absl::Status FromTorch(absl::StatusCode code, const c10::Error& error) {
  absl::Status status(
      code, absl::StrCat("LibTorch: ", error.what_without_backtrace()));
  status.SetPayload(kTorchBacktracePayload, absl::Cord(error.what()));
  return status;
}

}  // namespace

absl::Status StatusOfCurrentException() {
  // Derived classes before their bases.
  try {
    throw;
  } catch (const StatusError& e) {
    return e.status();
  } catch (const c10::OutOfMemoryError& e) {
    return FromTorch(absl::StatusCode::kResourceExhausted, e);
  } catch (const c10::IndexError& e) {
    return FromTorch(absl::StatusCode::kInvalidArgument, e);
  } catch (const c10::ValueError& e) {
    return FromTorch(absl::StatusCode::kInvalidArgument, e);
  } catch (const c10::TypeError& e) {
    return FromTorch(absl::StatusCode::kInvalidArgument, e);
  } catch (const c10::NotImplementedError& e) {
    return FromTorch(absl::StatusCode::kUnimplemented, e);
  } catch (const c10::Error& e) {
    // The allocator of host memory has no class of errors for this.
    const bool no_memory =
        absl::StrContains(e.what_without_backtrace(),
                          "DefaultCPUAllocator: can't allocate memory");
    return FromTorch(no_memory ? absl::StatusCode::kResourceExhausted
                               : absl::StatusCode::kInternal,
                     e);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("out of host memory");
  } catch (const std::exception& e) {
    return absl::InternalError(absl::StrCat("exception: ", e.what()));
  } catch (...) {
    return absl::InternalError("exception of an unknown class");
  }
}

}  // namespace internal
}  // namespace dsd
