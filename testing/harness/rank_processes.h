// SPDX-License-Identifier: Apache-2.0
//
// Ranks as processes of the test: fork and exec of the test's own binary, so
// that a rank can be killed and shares no memory. What a rank does is
// registered under a name, and the test says which one to run:
//
//   DSD_RANK_PROGRAM(Greet) {  // absl::Status Greet(dsd::RankContext& rank)
//     DSD_ASSIGN_OR_RETURN(auto comm, rank.Connect("gloo"));
//     DSD_RETURN_IF_ERROR(comm->Barrier());
//     rank.Record("size", absl::StrCat(comm->size()));
//     return comm->Shutdown();
//   }
//
//   TEST(GreetTest, RanksMeet) {
//     EXPECT_THAT(dsd::RunRanks(4, "Greet"), dsd::AllRanksOk());
//   }
//
// The BUILD file says `main = "//testing/harness:rank_main"`. Ranks are started
// as torchrun would start them (RANK, WORLD_SIZE, MASTER_ADDR, ...), with a
// port that the kernel chose, OMP_NUM_THREADS=1, and die with the test. If the
// test fails, all that they wrote is shown, each line with its rank.

#ifndef DSD_TESTING_HARNESS_RANK_PROCESSES_H_
#define DSD_TESTING_HARNESS_RANK_PROCESSES_H_

#include <map>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/launch.h"
#include "gmock/gmock.h"

namespace dsd {

// Inside a rank. Thread-safe.
class RankContext {
 public:
  int rank() const { return launch_.rank; }
  int world_size() const { return launch_.world_size; }
  const LaunchInfo& launch() const { return launch_; }

  // RankRunOptions::argument.
  const std::string& argument() const { return argument_; }

  // ConnectWorld of this launch. With DSD_TEST_RANKS_PER_HOST in the environment
  // as if so many ranks were on each host.
  absl::StatusOr<std::unique_ptr<Communicator>> Connect(
      absl::string_view backend,
      absl::Duration connect_timeout = absl::Seconds(30));

  // Into RankResult::values, at once; kept if the rank is killed later.
  void Record(absl::string_view key, absl::string_view value);

  // A place with a name: RankRunOptions::kill_at ends the process here, and
  // RankProcesses::WaitFor sees it.
  void Reach(absl::string_view place);

  // As Reach, and waits until the test calls RankProcesses::Release. Errors:
  // DeadlineExceeded after a minute.
  absl::Status Pause(absl::string_view place);

 private:
  friend int RankMain(absl::string_view program);
  RankContext() = default;
  void Send(char kind, absl::string_view key, absl::string_view value);

  LaunchInfo launch_;
  std::string argument_;
  std::string kill_at_;
  int pipe_fd_ = -1;
};

using RankProgram = absl::Status (*)(RankContext& rank);

class RankProgramRegistration {
 public:
  RankProgramRegistration(const char* name, RankProgram program);
};

#define DSD_RANK_PROGRAM(name)                                     \
  static absl::Status name##RankProgram(::dsd::RankContext& rank); \
  static const ::dsd::RankProgramRegistration name##Registration(  \
      #name, &name##RankProgram);                                  \
  static absl::Status name##RankProgram(                           \
      [[maybe_unused]] ::dsd::RankContext& rank)

struct RankRunOptions {
  std::string argument;
  // Of the whole run, well below the test's own. Ranks that have not ended then
  // are killed, after what their threads wait for is noted in their output.
  absl::Duration timeout = absl::Seconds(50);
  // By rank: the place (RankContext::Reach) where the rank kills itself.
  std::map<int, std::string> kill_at;
  // Ranks that are not started.
  std::vector<int> absent;
  // Added to the environment, or replacing what is there.
  std::vector<std::pair<std::string, std::string>> environment;
};

struct RankResult {
  enum class End {
    kReturned,  // the program returned `status`, and the process exited
    kExited,    // the process exited before the program returned
    kKilled,    // by `signal`
    kTimedOut,  // killed when the run's time was over
    kAbsent,
  };
  End end = End::kAbsent;
  absl::Status status;
  int exit_code = 0;
  int signal = 0;
  std::map<std::string, std::string> values;
  std::string output;
  // On the clock of Env::Real(): when the program returned, or the process
  // died.
  absl::Time ended_at;
  // When the rank reached its kill_at.
  absl::Time killed_at = absl::InfiniteFuture();
};

void PrintTo(const RankResult& result, std::ostream* os);

// A run in progress. Thread-compatible; from the test's main thread.
class RankProcesses {
 public:
  RankProcesses(int world_size, absl::string_view program,
                const RankRunOptions& options = {});
  // Kills what still runs.
  ~RankProcesses();

  // Waits until the rank has reached the place; false if it ended before, or
  // the run's time is over.
  bool WaitFor(int rank, absl::string_view place);

  // Lets a rank go on from Pause.
  void Release(int rank);

  // SIGKILL, SIGSTOP, SIGCONT, ... Nothing happens to a rank that has ended.
  void Signal(int rank, int signal);

  // Waits for all; by rank.
  std::vector<RankResult> Wait();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Starts the ranks and waits for them.
std::vector<RankResult> RunRanks(int world_size, absl::string_view program,
                                 const RankRunOptions& options = {});

// Whether all programs returned OK.
MATCHER(AllRanksOk, negation ? "not all ranks succeed" : "all ranks succeed") {
  bool ok = true;
  for (size_t rank = 0; rank < arg.size(); ++rank) {
    if (arg[rank].end == RankResult::End::kReturned && arg[rank].status.ok()) {
      continue;
    }
    *result_listener << "\nrank " << rank << ": "
                     << ::testing::PrintToString(arg[rank]);
    ok = false;
  }
  return ok;
}

// For rank_main: what this process is to run, or "" if it is the test itself.
std::string RequestedRankProgram();
int RankMain(absl::string_view program);
// For rank_main: this process knows what to do when it is started as a rank.
void AllowRankProcesses();

}  // namespace dsd

#endif  // DSD_TESTING_HARNESS_RANK_PROCESSES_H_
