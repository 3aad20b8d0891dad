// SPDX-License-Identifier: Apache-2.0
//
// What an embedder ships: a shared library with all backends inside, and a few
// functions to call.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/registry.h"
#include "dsd/testing/harness/rank_threads.h"

namespace dsd {
namespace {

absl::Status SumOver(absl::string_view backend) {
  RankThreadsOptions options;
  DSD_ASSIGN_OR_RETURN(options.descriptor, FindBackend(backend));
  const auto statuses = RunRankThreads(
      3,
      [](Communicator& comm) -> absl::Status {
        int32_t number = comm.rank() + 1;
        DSD_RETURN_IF_ERROR(
            comm.AllReduce(absl::MakeSpan(reinterpret_cast<std::byte*>(&number),
                                          sizeof(number)),
                           DType::kInt32, ReduceOp::kSum));
        return number == 6 ? absl::OkStatus()
                           : absl::InternalError("wrong sum");
      },
      options);
  for (const absl::Status& status : statuses) DSD_RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

void Copy(const std::string& text, char* out, size_t size) {
  std::snprintf(out, size, "%s", text.c_str());
}

}  // namespace
}  // namespace dsd

extern "C" {

// The names of the backends inside, joined by commas.
void ComposedBackends(char* out, size_t size) {
  dsd::Copy(absl::StrJoin(dsd::LinkedBackends(), ","), out, size);
}

// "OK", or why three ranks could not sum over the backend.
void ComposedSum(const char* backend, char* out, size_t size) {
  dsd::Copy(dsd::SumOver(backend).ToString(), out, size);
}

}  // extern "C"
