// SPDX-License-Identifier: Apache-2.0
//
// Threads that run one at a time, in an order and at times that follow from a
// seed.

#ifndef DSD_BACKENDS_SIM_SCHEDULER_H_
#define DSD_BACKENDS_SIM_SCHEDULER_H_

#include <poll.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <queue>
#include <random>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"

namespace dsd::sim {

// Simulated threads are threads of the system of which exactly one runs: the
// others wait for the baton. It changes hands only where a thread waits or
// yields; who gets it next is drawn among those that can run. Time stands still
// while somebody can, and then jumps to the next deadline or event.
//
// A process is a group of threads that dies or stops as one. A dead thread
// never runs again, as far as anybody can see: it stands still until Run is
// over, and is then let run out with every wait ending at once.
//
// Used by its own threads and, between calls of Run, by the thread that made
// it. Those hold no lock where they wait: who does is reported with the names
// of all threads.
class Scheduler {
 public:
  using Process = int;

  explicit Scheduler(uint64_t seed);
  Scheduler(const Scheduler&) = delete;
  ~Scheduler();

  Process AddProcess(std::string name);
  const std::string& name(Process process) const;
  void Kill(Process process);
  // Its threads stand still until `until`.
  void Pause(Process process, absl::Time until);
  bool IsDead(Process process) const;
  // In the past unless it stands still.
  absl::Time PausedUntil(Process process) const;
  // Called at each place where a thread of the process may lose the baton, with
  // their number so far. May Kill and Pause. Null: none.
  void SetYieldHook(std::function<void(Process, int64_t)> hook);

  // Of one Run, until it counts as a livelock.
  void SetMaxSteps(int64_t steps) { max_steps_ = steps; }

  // Runs until the threads of all live processes have returned. Internal with a
  // report of what each thread waits for if none of them ever can run again
  // (deadlock), or if they run without end (livelock).
  absl::Status Run();

  absl::Time now() const { return now_; }
  // Uniform in [0, bound); 0 for bound 0.
  uint64_t Random(uint64_t bound);
  uint64_t RandomBits() { return random_(); }
  absl::Duration RandomDuration(absl::Duration bound);

  // Calls `event` at `time`, when no thread runs. It must not wait.
  void At(absl::Time time, absl::AnyInvocable<void()> event);

  // What happened so far, as a number: equal for equal runs.
  uint64_t trace() const { return trace_; }
  void Note(uint64_t what);
  int64_t steps() const { return steps_; }

  // What Env promises, for the calling thread. `caller` is an address in the
  // function that waits, for the report.
  bool Await(absl::Mutex& mu, const absl::Condition& condition,
             absl::Time deadline, void* caller) ABSL_SHARED_LOCKS_REQUIRED(mu);
  void SleepUntil(absl::Time time);
  absl::StatusOr<int> Poll(absl::Span<struct pollfd> fds, absl::Time deadline);
  std::unique_ptr<EnvThread> StartThread(absl::string_view name,
                                         absl::AnyInvocable<void()> body,
                                         Process process);
  // Lets others run.
  void Yield();

  // Of the calling thread, which must be one of this scheduler.
  Process current_process() const;
  // Whether the calling thread is dead and only running out: nothing that it
  // does counts.
  bool IsRunningOut() const;

  // While it lives, what the calling thread waits for, in the words of a
  // report: "for a message".
  class Waiting {
   public:
    Waiting(Scheduler* scheduler, std::string what);
    Waiting(const Waiting&) = delete;
    ~Waiting();

   private:
    Scheduler* const scheduler_;
    std::string before_;
  };

 private:
  struct Thread;
  struct Worker;
  class Handle;
  class Workers;
  struct Event {
    absl::Time time;
    int64_t number;
    std::shared_ptr<absl::AnyInvocable<void()>> call;
    bool operator<(const Event& other) const {  // the earliest on top
      return time != other.time ? time > other.time : number > other.number;
    }
  };
  struct ProcessState {
    std::string name;
    bool dead = false;
    absl::Time paused_until = absl::InfinitePast();
    int64_t yields = 0;
  };

  Thread* Self() const;
  // Gives the baton away; returns when it is back. `self` null: the thread has
  // ended.
  void Switch(Thread* self);
  void Park(Thread* self);
  // The next to run; null: Run is over.
  Thread* PickNext();
  bool CanRun(Thread& thread);
  absl::Time NextTime() const;
  void Resume(Thread* thread);
  void RunThread(Thread* thread);
  void WaitForEnd();
  std::string Report(absl::string_view what) const;

  std::mt19937_64 random_;
  absl::Time now_;
  uint64_t trace_ = 0;
  int64_t steps_ = 0;
  int64_t max_steps_ = 20'000'000;
  int64_t steps_limit_ = 0;
  std::vector<ProcessState> processes_;
  std::vector<std::shared_ptr<Thread>> threads_;
  std::vector<Thread*> live_;  // those that the scheduler looks at
  std::priority_queue<Event> events_;
  int64_t num_events_ = 0;
  std::function<void(Process, int64_t)> yield_hook_;
  bool reaping_ = false;
  absl::Status result_;
  std::unique_ptr<Worker> main_;
};

}  // namespace dsd::sim

#endif  // DSD_BACKENDS_SIM_SCHEDULER_H_
