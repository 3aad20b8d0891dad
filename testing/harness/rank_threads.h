// SPDX-License-Identifier: Apache-2.0
//
// Ranks as threads of the test, over backends/local if nothing else is said:
//
//   EXPECT_THAT(RunRankThreads(4, [](dsd::Communicator& comm) {
//                 return comm.Barrier();
//               }),
//               AllOk());

#ifndef DSD_TESTING_HARNESS_RANK_THREADS_H_
#define DSD_TESTING_HARNESS_RANK_THREADS_H_

#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/store.h"
#include "gmock/gmock.h"

namespace dsd {

struct RankThreadsOptions {
  absl::Duration connect_timeout = absl::Seconds(60);
  // Ranks that never start.
  std::vector<int> absent;
  // Calls Shutdown for a body that returns OK. Otherwise the communicator is
  // destroyed as the body leaves it, as it always is after an error.
  bool shutdown = true;
  const BackendDescriptor* descriptor = nullptr;  // null: local's
  std::string bind_address;                       // see EngineOptions
};

// Runs `body` once per rank, each in a thread with a communicator of its own,
// and returns what each returned, by rank; for a rank that did not connect, the
// error of connecting; for absent ranks OK. `body` is called from several
// threads at once and must return: calls on `comm` have deadlines.
std::vector<absl::Status> RunRankThreads(
    int world_size, absl::FunctionRef<absl::Status(Communicator& comm)> body,
    const RankThreadsOptions& options = {});

// What RunRankThreads connects with, for ranks that connect once more: `store`
// is one of theirs alone, and `generation` is theirs to choose.
CommunicatorOptions RankThreadCommunicator(
    int rank, int world_size, std::shared_ptr<Store> store,
    const RankThreadsOptions& options = {});

// Matches a list of statuses if all are OK; prints the others with their ranks.
MATCHER(AllOk, negation ? "not all ranks succeed" : "all ranks succeed") {
  bool ok = true;
  for (size_t rank = 0; rank < arg.size(); ++rank) {
    if (arg[rank].ok()) continue;
    *result_listener << "\nrank " << rank << ": " << arg[rank].ToString();
    ok = false;
  }
  return ok;
}

// Matches a status of this code whose text contains `text`.
MATCHER_P2(IsStatus, code, text,
           absl::StrCat(negation ? "is not " : "is ",
                        absl::StatusCodeToString(code), " with \"", text,
                        "\"")) {
  *result_listener << arg.ToString();
  return arg.code() == code &&
         arg.message().find(text) != absl::string_view::npos;
}

}  // namespace dsd

#endif  // DSD_TESTING_HARNESS_RANK_THREADS_H_
