// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/sim/scheduler.h"

#include <errno.h>
#include <poll.h>
#include <semaphore.h>
#include <time.h>

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/base/no_destructor.h"
#include "absl/debugging/symbolize.h"
#include "absl/log/check.h"
#include "absl/log/log.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace dsd::sim {
namespace {

// Of real time, for one step: longer means that a thread waits outside of Env.
constexpr int kStuckSeconds = 30;
// What a step costs, so that time passes for who only looks at the clock.
constexpr absl::Duration kStepTime = absl::Nanoseconds(200);

enum class State {
  kReady,
  kAwaiting,
  kSleeping,
  kPolling,
  kJoining,
  kEnded,
};

}  // namespace

// A thread of the system, used by one simulated thread after another.
struct Scheduler::Worker {
  Worker() { CHECK_EQ(sem_init(&wake, 0, 0), 0); }
  void Wake() { CHECK_EQ(sem_post(&wake), 0); }
  void Wait() {
    while (sem_wait(&wake) != 0) CHECK_EQ(errno, EINTR);
  }
  // False when `seconds` of real time have passed.
  bool WaitFor(int seconds) {
    const timespec end = absl::ToTimespec(absl::Now() + absl::Seconds(seconds));
    while (sem_timedwait(&wake, &end) != 0) {
      if (errno == ETIMEDOUT) return false;
      CHECK_EQ(errno, EINTR);
    }
    return true;
  }

  sem_t wake;
  std::pair<Scheduler*, Thread*> job;
};

struct Scheduler::Thread {
  int id = 0;
  std::string name;
  Process process = 0;
  absl::AnyInvocable<void()> body;
  Worker* worker = nullptr;  // null: not started

  State state = State::kReady;
  absl::Mutex* mu = nullptr;
  const absl::Condition* condition = nullptr;
  absl::Time deadline = absl::InfiniteFuture();
  absl::Span<struct pollfd> fds;
  Thread* joined = nullptr;
  // For the report.
  std::string what;
  void* caller = nullptr;
};

// Idle threads of the system; they live as long as the program.
class Scheduler::Workers {
 public:
  static Workers& Get() {
    static absl::NoDestructor<Workers> workers;
    return *workers;
  }

  Worker* Take() {
    {
      absl::MutexLock lock(&mu_);
      if (!idle_.empty()) {
        Worker* const worker = idle_.back();
        idle_.pop_back();
        return worker;
      }
    }
    Worker* const worker = new Worker;
    std::thread([this, worker] {
      while (true) {
        worker->Wait();
        const auto [scheduler, thread] = worker->job;
        scheduler->RunThread(thread);
      }
    }).detach();
    return worker;
  }

  void Give(Worker* worker) {
    absl::MutexLock lock(&mu_);
    idle_.push_back(worker);
  }

 private:
  absl::Mutex mu_;
  std::vector<Worker*> idle_ ABSL_GUARDED_BY(mu_);
};

namespace {
// The simulated thread that this thread of the system is.
thread_local void* current_thread = nullptr;
}  // namespace

class Scheduler::Handle final : public EnvThread {
 public:
  Handle(Scheduler* scheduler, std::shared_ptr<Thread> thread)
      : scheduler_(scheduler), thread_(std::move(thread)) {}
  ~Handle() override {
    if (thread_->state == State::kEnded) return;
    Thread* const self = scheduler_->Self();
    self->state = State::kJoining;
    self->joined = thread_.get();
    scheduler_->Park(self);
  }

 private:
  Scheduler* const scheduler_;
  const std::shared_ptr<Thread> thread_;
};

Scheduler::Scheduler(uint64_t seed)
    : random_(seed),
      now_(absl::UnixEpoch() + absl::Hours(1)),
      main_(std::make_unique<Worker>()) {}

Scheduler::~Scheduler() {
  for (const auto& thread : threads_) {
    CHECK(thread->state == State::kEnded || thread->worker == nullptr)
        << "a simulated thread outlives its scheduler: " << thread->name;
  }
}

Scheduler::Process Scheduler::AddProcess(std::string name) {
  processes_.push_back({});
  processes_.back().name = std::move(name);
  return static_cast<Process>(processes_.size()) - 1;
}

const std::string& Scheduler::name(Process process) const {
  return processes_[process].name;
}

void Scheduler::Kill(Process process) {
  Note(0x6b696c6c + process);
  processes_[process].dead = true;
  live_.erase(std::remove_if(live_.begin(), live_.end(),
                             [&](Thread* t) { return t->process == process; }),
              live_.end());
}

void Scheduler::Pause(Process process, absl::Time until) {
  Note(0x73746f70 + process);
  processes_[process].paused_until = until;
}

bool Scheduler::IsDead(Process process) const {
  return processes_[process].dead;
}

absl::Time Scheduler::PausedUntil(Process process) const {
  return processes_[process].paused_until;
}

void Scheduler::SetYieldHook(std::function<void(Process, int64_t)> hook) {
  yield_hook_ = std::move(hook);
}

uint64_t Scheduler::Random(uint64_t bound) {
  return bound == 0 ? 0 : random_() % bound;
}

absl::Duration Scheduler::RandomDuration(absl::Duration bound) {
  return absl::Nanoseconds(
      Random(static_cast<uint64_t>(absl::ToInt64Nanoseconds(bound)) + 1));
}

void Scheduler::At(absl::Time time, absl::AnyInvocable<void()> event) {
  events_.push(
      {time, num_events_++,
       std::make_shared<absl::AnyInvocable<void()>>(std::move(event))});
}

void Scheduler::Note(uint64_t what) {
  trace_ = (trace_ ^ what) * 0x9e3779b97f4a7c15u;
  trace_ ^= trace_ >> 29;
}

Scheduler::Thread* Scheduler::Self() const {
  CHECK(current_thread != nullptr)
      << "a thread that the simulation did not start waits in it";
  return static_cast<Thread*>(current_thread);
}

Scheduler::Process Scheduler::current_process() const {
  return Self()->process;
}

bool Scheduler::IsRunningOut() const { return reaping_; }

std::unique_ptr<EnvThread> Scheduler::StartThread(
    absl::string_view name, absl::AnyInvocable<void()> body, Process process) {
  auto thread = std::make_shared<Thread>();
  thread->id = static_cast<int>(threads_.size());
  thread->name = std::string(name);
  thread->process = process;
  thread->body = std::move(body);
  threads_.push_back(thread);
  if (!processes_[process].dead || reaping_) live_.push_back(thread.get());
  return std::make_unique<Handle>(this, std::move(thread));
}

void Scheduler::RunThread(Thread* thread) {
  current_thread = thread;
  thread->body();
  thread->body = nullptr;
  thread->state = State::kEnded;
  live_.erase(std::find(live_.begin(), live_.end(), thread));
  current_thread = nullptr;
  Workers::Get().Give(thread->worker);
  Switch(nullptr);
}

void Scheduler::Resume(Thread* thread) {
  if (thread == nullptr) {
    main_->Wake();
    return;
  }
  if (thread->worker == nullptr) {
    thread->worker = Workers::Get().Take();
    thread->worker->job = {this, thread};
  }
  thread->worker->Wake();
}

void Scheduler::Switch(Thread* self) {
  Thread* const next = PickNext();
  if (next == self && self != nullptr) return;
  // From here on another thread may run.
  Worker* const mine = self == nullptr ? nullptr : self->worker;
  Resume(next);
  if (mine != nullptr) mine->Wait();
}

void Scheduler::Park(Thread* self) {
  if (!reaping_) {
    ProcessState& process = processes_[self->process];
    ++process.yields;
    if (yield_hook_) yield_hook_(self->process, process.yields);
  }
  Switch(self);
  self->state = State::kReady;
}

void Scheduler::Yield() {
  Thread* const self = Self();
  self->state = State::kReady;
  Park(self);
}

bool Scheduler::Await(absl::Mutex& mu, const absl::Condition& condition,
                      absl::Time deadline,
                      void* caller) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  mu.AssertHeld();
  if (condition.Eval()) return true;
  if (deadline <= now_ && !reaping_) return false;
  Thread* const self = Self();
  self->mu = &mu;
  self->condition = &condition;
  self->deadline = deadline;
  self->caller = caller;
  self->state = reaping_ ? State::kReady : State::kAwaiting;
  if (reaping_ && deadline != absl::InfiniteFuture()) {
    now_ = std::max(now_, deadline);
  }
  mu.Unlock();
  Park(self);
  mu.Lock();
  self->mu = nullptr;
  self->condition = nullptr;
  return condition.Eval();
}

void Scheduler::SleepUntil(absl::Time time) {
  Thread* const self = Self();
  self->state = State::kSleeping;
  self->deadline = time;
  if (reaping_) {
    self->state = State::kReady;
    if (time != absl::InfiniteFuture()) now_ = std::max(now_, time);
  }
  Park(self);
}

absl::StatusOr<int> Scheduler::Poll(absl::Span<struct pollfd> fds,
                                    absl::Time deadline) {
  Thread* const self = Self();
  self->fds = fds;
  self->deadline = deadline;
  self->state = reaping_ ? State::kReady : State::kPolling;
  if (reaping_ && deadline != absl::InfiniteFuture()) {
    now_ = std::max(now_, deadline);
  }
  Park(self);
  return std::max(0, poll(fds.data(), fds.size(), 0));
}

Scheduler::Waiting::Waiting(Scheduler* scheduler, std::string what)
    : scheduler_(scheduler),
      before_(std::exchange(scheduler->Self()->what, std::move(what))) {}

Scheduler::Waiting::~Waiting() {
  scheduler_->Self()->what = std::move(before_);
}

bool Scheduler::CanRun(Thread& thread) {
  if (!reaping_ && processes_[thread.process].paused_until > now_) {
    return false;
  }
  switch (thread.state) {
    case State::kReady:
      return true;
    case State::kAwaiting: {
      if (thread.deadline <= now_) return true;
      // Nobody runs, so nobody may hold it.
      CHECK(thread.mu->TryLock())
          << Report(absl::StrCat("a thread waits while it holds a mutex that "
                                 "thread ",
                                 thread.name, " needs"));
      const bool holds = thread.condition->Eval();
      thread.mu->Unlock();
      return holds;
    }
    case State::kSleeping:
      return thread.deadline <= now_;
    case State::kPolling:
      return thread.deadline <= now_ ||
             poll(thread.fds.data(), thread.fds.size(), 0) > 0;
    case State::kJoining:
      return thread.joined->state == State::kEnded;
    case State::kEnded:
      return false;
  }
  return false;
}

absl::Time Scheduler::NextTime() const {
  absl::Time next =
      events_.empty() ? absl::InfiniteFuture() : events_.top().time;
  for (const Thread* thread : live_) {
    const absl::Time paused_until = processes_[thread->process].paused_until;
    if (paused_until > now_) {
      next = std::min(next, paused_until);
    } else if (thread->state == State::kAwaiting ||
               thread->state == State::kSleeping ||
               thread->state == State::kPolling) {
      next = std::min(next, thread->deadline);
    }
  }
  return next;
}

Scheduler::Thread* Scheduler::PickNext() {
  if (!result_.ok() && !reaping_) return nullptr;
  while (true) {
    if (++steps_ > steps_limit_) {
      CHECK(!reaping_) << Report("dead threads do not end");
      result_ = absl::InternalError(Report("livelock: the threads run on"));
      return nullptr;
    }
    now_ += kStepTime;
    while (!reaping_ && !events_.empty() && events_.top().time <= now_) {
      const Event event = events_.top();
      events_.pop();
      Note(event.number);
      (*event.call)();
    }
    if (live_.empty()) return nullptr;
    // Uniform among those that can run: the first in a random order.
    for (size_t i = 0; i < live_.size(); ++i) {
      std::swap(live_[i], live_[i + random_() % (live_.size() - i)]);
      Thread* const thread = live_[i];
      if (!CanRun(*thread)) continue;
      Note(thread->id);
      return thread;
    }
    const absl::Time next = NextTime();
    if (reaping_ || next == absl::InfiniteFuture()) {
      CHECK(!reaping_) << Report("dead threads wait for each other");
      result_ = absl::InternalError(
          Report("deadlock: none of the threads can ever run again"));
      return nullptr;
    }
    now_ = std::max(now_, next);
  }
}

void Scheduler::WaitForEnd() {
  for (int64_t before = -1; !main_->WaitFor(kStuckSeconds);) {
    // Another thread may be changing all this, but most likely it stands.
    const int64_t steps = steps_;
    CHECK_NE(std::exchange(before, steps), steps)
        << Report("a thread waits outside of Env, or computes for minutes");
  }
}

absl::Status Scheduler::Run() {
  CHECK(current_thread == nullptr) << "Run is called by a simulated thread";
  result_ = absl::OkStatus();
  steps_limit_ = steps_ + max_steps_;
  Resume(PickNext());
  WaitForEnd();

  // Those who died, and those who never would end.
  reaping_ = true;
  live_.clear();
  for (const auto& thread : threads_) {
    if (thread->state == State::kEnded) continue;
    processes_[thread->process].dead = true;
    // One that joins others still has to wait for them.
    if (thread->state != State::kJoining) thread->state = State::kReady;
    live_.push_back(thread.get());
  }
  // What an event holds may add events when it goes.
  while (!events_.empty()) std::exchange(events_, {});
  steps_limit_ = steps_ + max_steps_;
  Resume(PickNext());
  WaitForEnd();
  reaping_ = false;
  while (!events_.empty()) std::exchange(events_, {});
  threads_.clear();
  return result_;
}

std::string Scheduler::Report(absl::string_view what) const {
  std::string text = absl::StrCat(
      what, ", at ",
      absl::FormatDuration(now_ - absl::UnixEpoch() - absl::Hours(1)));
  for (const auto& thread : threads_) {
    if (thread->state == State::kEnded) continue;
    const ProcessState& process = processes_[thread->process];
    absl::StrAppend(&text, "\n  thread \"", thread->name, "\" of ",
                    process.name,
                    process.dead                  ? " (dead)"
                    : process.paused_until > now_ ? " (paused)"
                                                  : "",
                    ": ");
    switch (thread->state) {
      case State::kReady:
        absl::StrAppend(&text, "can run");
        break;
      case State::kAwaiting: {
        char symbol[256] = "a condition";
        if (thread->what.empty()) {
          absl::Symbolize(thread->caller, symbol, sizeof(symbol));
        }
        absl::StrAppend(
            &text, "waits ",
            thread->what.empty() ? absl::StrCat("in ", symbol) : thread->what);
        break;
      }
      case State::kSleeping:
        absl::StrAppend(&text, "sleeps");
        break;
      case State::kPolling:
        absl::StrAppend(&text, "polls ", thread->fds.size(), " descriptors");
        break;
      case State::kJoining:
        absl::StrAppend(&text, "waits for the end of thread \"",
                        thread->joined->name, "\"");
        break;
      case State::kEnded:
        break;
    }
    if (thread->state == State::kAwaiting ||
        thread->state == State::kSleeping || thread->state == State::kPolling) {
      absl::StrAppend(
          &text,
          thread->deadline == absl::InfiniteFuture()
              ? ", without a deadline"
              : absl::StrCat(", for ",
                             absl::FormatDuration(thread->deadline - now_),
                             " more"));
    }
  }
  return text;
}

}  // namespace dsd::sim
