// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/harness/rank_processes.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <optional>
#include <thread>

#include "absl/base/no_destructor.h"
#include "absl/base/thread_annotations.h"
#include "absl/log/check.h"
#include "absl/log/log.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/socket.h"
#include "gtest/gtest.h"

extern char** environ;  // POSIX declares it nowhere

namespace dsd {
namespace {

constexpr char kProgramVariable[] = "DSD_TEST_RANK_PROGRAM";
constexpr char kArgumentVariable[] = "DSD_TEST_ARGUMENT";
constexpr char kPipeVariable[] = "DSD_TEST_PIPE_FD";
constexpr char kKillVariable[] = "DSD_TEST_KILL_AT";
constexpr absl::Duration kPausePatience = absl::Minutes(1);
constexpr size_t kMaxOutputBytes = size_t{1} << 20;

// What a rank tells: kind, key size, value size, key, value.
constexpr char kValue = 'v';    // key, value
constexpr char kReached = 'r';  // place, time
constexpr char kKilled = 'k';   // place, time
constexpr char kStatus = 's';   // text, "<code> <time>"

struct Programs {
  std::map<std::string, RankProgram, std::less<>> by_name;
};
Programs& AllPrograms() {
  static absl::NoDestructor<Programs> programs;
  return *programs;
}
bool allowed = false;

std::string TimeText(absl::Time time) {
  return absl::StrCat(absl::ToUnixNanos(time));
}
absl::Time TimeOf(absl::string_view text) {
  int64_t nanos = 0;
  CHECK(absl::SimpleAtoi(text, &nanos)) << text;
  return absl::FromUnixNanos(nanos);
}

bool ReadFully(int fd, char* out, size_t size) {
  while (size > 0) {
    const ssize_t n = read(fd, out, size);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    out += n;
    size -= n;
  }
  return true;
}

// What the threads of a process wait for.
std::string DescribeThreads(pid_t pid) {
  std::string text = "the run's time is over; the threads of this rank:\n";
  const std::string tasks = absl::StrCat("/proc/", pid, "/task");
  DIR* dir = opendir(tasks.c_str());
  if (dir == nullptr) return text;
  while (const dirent* entry = readdir(dir)) {
    if (entry->d_name[0] == '.') continue;
    const auto first_line = [&](const char* file) {
      std::ifstream in(absl::StrCat(tasks, "/", entry->d_name, "/", file));
      std::string line;
      std::getline(in, line);
      return line;
    };
    absl::StrAppend(&text, "  ", first_line("comm"), ": ", first_line("wchan"),
                    " ", first_line("syscall"), "\n");
  }
  closedir(dir);
  return text;
}

// Shows what ranks wrote in a test that fails.
class OutputOfFailures : public ::testing::EmptyTestEventListener {
 public:
  void Add(const std::vector<RankResult>& results) {
    absl::MutexLock lock(&mu_);
    for (size_t rank = 0; rank < results.size(); ++rank) {
      for (absl::string_view line :
           absl::StrSplit(results[rank].output, '\n', absl::SkipEmpty())) {
        absl::StrAppend(&text_, "[rank ", rank, "] ", line, "\n");
      }
    }
  }

 private:
  void OnTestStart(const ::testing::TestInfo&) override {
    absl::MutexLock lock(&mu_);
    text_.clear();
  }
  void OnTestEnd(const ::testing::TestInfo& info) override {
    absl::MutexLock lock(&mu_);
    if (info.result()->Failed() && !text_.empty()) {
      std::cout << "--- output of the ranks ---\n" << text_ << std::flush;
    }
  }

  absl::Mutex mu_;
  std::string text_ ABSL_GUARDED_BY(mu_);
};
OutputOfFailures* output_of_failures = nullptr;

}  // namespace

// --- In a rank ---

RankProgramRegistration::RankProgramRegistration(const char* name,
                                                 RankProgram program) {
  CHECK(AllPrograms().by_name.emplace(name, program).second)
      << "two rank programs are called " << name;
}

absl::StatusOr<std::unique_ptr<Communicator>> RankContext::Connect(
    absl::string_view backend, absl::Duration connect_timeout) {
  WorldOptions options;
  options.backend = std::string(backend);
  options.connect_timeout = connect_timeout;
  int ranks_per_host;
  const char* const text = std::getenv("DSD_TEST_RANKS_PER_HOST");
  if (text != nullptr && absl::SimpleAtoi(text, &ranks_per_host)) {
    options.host = absl::StrCat("host ", launch_.rank / ranks_per_host);
  }
  return ConnectWorld(launch_, options);
}

void RankContext::Send(char kind, absl::string_view key,
                       absl::string_view value) {
  const uint32_t sizes[] = {static_cast<uint32_t>(key.size()),
                            static_cast<uint32_t>(value.size())};
  std::string record(1, kind);
  record.append(reinterpret_cast<const char*>(sizes), sizeof(sizes));
  absl::StrAppend(&record, key, value);
  // One call, so that threads do not mix; pipes of sockets take it whole.
  const ssize_t sent =
      send(pipe_fd_, record.data(), record.size(), MSG_NOSIGNAL);
  CHECK_EQ(sent, static_cast<ssize_t>(record.size()));
}

void RankContext::Record(absl::string_view key, absl::string_view value) {
  Send(kValue, key, value);
}

void RankContext::Reach(absl::string_view place) {
  const std::string now = TimeText(Env::Real()->Now());
  if (place == kill_at_) {
    Send(kKilled, place, TimeText(Env::Real()->Now()));
    kill(getpid(), SIGKILL);
    pause();
  }
  Send(kReached, place, now);
}

absl::Status RankContext::Pause(absl::string_view place) {
  Reach(place);
  pollfd poll = {pipe_fd_, POLLIN, 0};
  DSD_ASSIGN_OR_RETURN(const int ready,
                       Env::Real()->Poll(absl::MakeSpan(&poll, 1),
                                         Env::Real()->Now() + kPausePatience));
  char go;
  if (ready == 0 || !ReadFully(pipe_fd_, &go, 1)) {
    return absl::DeadlineExceededError(
        absl::StrCat("nobody released the rank from \"", place, "\""));
  }
  return absl::OkStatus();
}

std::string RequestedRankProgram() {
  const char* const name = getenv(kProgramVariable);
  return name == nullptr ? "" : name;
}

void AllowRankProcesses() {
  allowed = true;
  output_of_failures = new OutputOfFailures;
  ::testing::UnitTest::GetInstance()->listeners().Append(output_of_failures);
}

int RankMain(absl::string_view program) {
  const auto it = AllPrograms().by_name.find(program);
  CHECK(it != AllPrograms().by_name.end())
      << "no DSD_RANK_PROGRAM(" << program << ")";
  const auto variable = [](const char* name) {
    const char* const value = getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  RankContext rank;
  absl::StatusOr<LaunchInfo> launch =
      LaunchFromEnvironment(ProcessEnvironment());
  CHECK(launch.ok()) << launch.status();
  rank.launch_ = *launch;
  rank.argument_ = variable(kArgumentVariable);
  rank.kill_at_ = variable(kKillVariable);
  CHECK(absl::SimpleAtoi(variable(kPipeVariable), &rank.pipe_fd_));
  fcntl(rank.pipe_fd_, F_SETFD, FD_CLOEXEC);
  // So that what was written before a kill is seen.
  setvbuf(stdout, nullptr, _IOLBF, 0);

  absl::Status status = it->second(rank);
  if (status.ok() &&
      ::testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed()) {
    status = absl::InternalError("an expectation failed, see the output");
  }
  if (!status.ok()) std::cout << "returned " << status << std::endl;
  rank.Send(kStatus, status.message(),
            absl::StrCat(static_cast<int>(status.code()), " ",
                         TimeText(Env::Real()->Now())));
  return status.ok() ? 0 : 1;
}

// --- In the test ---

void PrintTo(const RankResult& result, std::ostream* os) {
  switch (result.end) {
    case RankResult::End::kReturned:
      *os << "returned " << result.status;
      break;
    case RankResult::End::kExited:
      *os << "exited with code " << result.exit_code;
      break;
    case RankResult::End::kKilled:
      *os << "was killed by signal " << result.signal;
      break;
    case RankResult::End::kTimedOut:
      *os << "did not end in time and was killed";
      break;
    case RankResult::End::kAbsent:
      *os << "was not started";
      break;
  }
}

struct RankProcesses::Impl {
  struct Process {
    pid_t pid = -1;
    int control = -1;  // records from the rank, releases to it
    int output = -1;
    std::string records;
    std::vector<std::string> places;
    bool ended = false;
    bool timed_out = false;
    RankResult result;
  };

  void Spawn(int rank, absl::string_view program, const RankRunOptions& options,
             int listen_fd, int port);
  void Pump();
  void Read(Process& process);
  void Decode(Process& process);
  void Reap(Process& process);
  bool AllEnded() const ABSL_SHARED_LOCKS_REQUIRED(mu) {
    return std::all_of(processes.begin(), processes.end(),
                       [](const Process& p) { return p.ended; });
  }

  int world_size = 0;
  absl::Time deadline;
  // Without a rank 0: its port, at which nobody listens, lest another program
  // does.
  Socket port;
  absl::Mutex mu;
  std::vector<Process> processes ABSL_GUARDED_BY(mu);
  bool finished ABSL_GUARDED_BY(mu) = false;
  std::thread pump;
};

// Between fork and exec only what is safe after a fork of a program with
// threads.
void RankProcesses::Impl::Spawn(int rank, absl::string_view program,
                                const RankRunOptions& options, int listen_fd,
                                int port) {
  Process& process = processes[rank];
  int control[2];
  int output[2];
  CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control), 0);
  CHECK_EQ(pipe2(output, O_CLOEXEC), 0);

  std::map<std::string, std::string> env;
  for (const auto& [name, value] : ProcessEnvironment()) env[name] = value;
  // The rank is no test of its own.
  for (const char* name : {"XML_OUTPUT_FILE", "GTEST_OUTPUT", "GTEST_FILTER",
                           "TEST_SHARD_INDEX", "TEST_SHARD_STATUS_FILE",
                           "TEST_TOTAL_SHARDS", "TEST_PREMATURE_EXIT_FILE"}) {
    env.erase(name);
  }
  const std::string size = absl::StrCat(world_size);
  env["RANK"] = env["LOCAL_RANK"] = absl::StrCat(rank);
  env["WORLD_SIZE"] = env["LOCAL_WORLD_SIZE"] = size;
  env["MASTER_ADDR"] = "127.0.0.1";
  env["MASTER_PORT"] = absl::StrCat(port);
  if (rank == 0) env["DSD_LISTEN_FD"] = absl::StrCat(listen_fd);
  env["OMP_NUM_THREADS"] = "1";
  env[kProgramVariable] = std::string(program);
  env[kArgumentVariable] = options.argument;
  env[kPipeVariable] = absl::StrCat(control[1]);
  const auto kill_at = options.kill_at.find(rank);
  env[kKillVariable] = kill_at == options.kill_at.end() ? "" : kill_at->second;
  for (const auto& [name, value] : options.environment) env[name] = value;
  std::vector<std::string> entries;
  for (const auto& [name, value] : env) {
    entries.push_back(absl::StrCat(name, "=", value));
  }
  std::vector<char*> envp;
  for (std::string& entry : entries) envp.push_back(entry.data());
  envp.push_back(nullptr);
  std::string name = absl::StrCat(program, "_rank", rank);
  char* const argv[] = {name.data(), nullptr};
  const pid_t parent = getpid();

  process.pid = fork();
  CHECK_GE(process.pid, 0);
  if (process.pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(125);
    dup2(output[1], STDOUT_FILENO);
    dup2(output[1], STDERR_FILENO);
    fcntl(control[1], F_SETFD, 0);
    if (rank == 0) fcntl(listen_fd, F_SETFD, 0);
    execve("/proc/self/exe", argv, envp.data());
    _exit(126);
  }
  close(control[1]);
  close(output[1]);
  process.control = control[0];
  process.output = output[0];
}

void RankProcesses::Impl::Decode(Process& process) {
  constexpr size_t kHead = 1 + 2 * sizeof(uint32_t);
  std::string& in = process.records;
  while (in.size() >= kHead) {
    uint32_t sizes[2];
    memcpy(sizes, in.data() + 1, sizeof(sizes));
    if (in.size() < kHead + sizes[0] + sizes[1]) return;
    const std::string key = in.substr(kHead, sizes[0]);
    const std::string value = in.substr(kHead + sizes[0], sizes[1]);
    RankResult& result = process.result;
    switch (in[0]) {
      case kValue:
        result.values[key] = value;
        break;
      case kReached:
        process.places.push_back(key);
        break;
      case kKilled:
        process.places.push_back(key);
        result.killed_at = TimeOf(value);
        break;
      case kStatus: {
        const std::vector<std::string> fields = absl::StrSplit(value, ' ');
        int code = 0;
        CHECK(absl::SimpleAtoi(fields[0], &code));
        result.end = RankResult::End::kReturned;
        result.status = absl::Status(static_cast<absl::StatusCode>(code), key);
        result.ended_at = TimeOf(fields[1]);
        break;
      }
      default:
        LOG(FATAL) << "a record of kind " << in[0];
    }
    in.erase(0, kHead + sizes[0] + sizes[1]);
  }
}

// At once, so that no zombie looks like a living process to anybody.
void RankProcesses::Impl::Reap(Process& process) {
  int how = 0;
  while (waitpid(process.pid, &how, 0) < 0 && errno == EINTR) {
  }
  RankResult& result = process.result;
  const bool returned = result.end == RankResult::End::kReturned;
  if (!returned) result.ended_at = Env::Real()->Now();
  if (WIFSIGNALED(how)) {
    result.signal = WTERMSIG(how);
    result.end = process.timed_out ? RankResult::End::kTimedOut
                                   : RankResult::End::kKilled;
  } else {
    result.exit_code = WEXITSTATUS(how);
    // A program that returned OK must also exit well.
    if (!returned || (result.status.ok() && result.exit_code != 0)) {
      result.end = RankResult::End::kExited;
    }
  }
  close(process.control);
  close(process.output);
  process.control = process.output = -1;
  process.ended = true;
}

void RankProcesses::Impl::Read(Process& process) {
  char buffer[65536];
  const auto drain = [&](int fd, std::string& into) {
    while (true) {
      pollfd poll = {fd, POLLIN, 0};
      if (::poll(&poll, 1, 0) <= 0) return true;
      const ssize_t n = read(fd, buffer, sizeof(buffer));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return false;
      into.append(buffer, n);
      // Keeps the beginning, where the cause stands.
      if (&into == &process.result.output && into.size() > kMaxOutputBytes) {
        into.resize(kMaxOutputBytes);
      }
    }
  };
  drain(process.output, process.result.output);
  const bool open = drain(process.control, process.records);
  Decode(process);
  if (!open) {
    drain(process.output, process.result.output);
    Reap(process);
  }
}

void RankProcesses::Impl::Pump() {
  while (true) {
    std::vector<pollfd> polls;
    {
      absl::MutexLock lock(&mu);
      if (AllEnded()) {
        finished = true;
        return;
      }
      for (const Process& process : processes) {
        if (process.ended) continue;
        polls.push_back({process.control, POLLIN, 0});
        polls.push_back({process.output, POLLIN, 0});
      }
    }
    const absl::StatusOr<int> ready =
        Env::Real()->Poll(absl::MakeSpan(polls), deadline);
    CHECK(ready.ok()) << ready.status();
    absl::MutexLock lock(&mu);
    for (int rank = 0; rank < world_size; ++rank) {
      Process& process = processes[rank];
      if (process.ended) continue;
      if (*ready == 0 && !process.timed_out) {
        process.timed_out = true;
        absl::StrAppend(&process.result.output, DescribeThreads(process.pid));
        kill(process.pid, SIGKILL);
      }
      Read(process);
    }
    if (*ready == 0) deadline += absl::Seconds(10);
  }
}

RankProcesses::RankProcesses(int world_size, absl::string_view program,
                             const RankRunOptions& options)
    : impl_(std::make_unique<Impl>()) {
  CHECK(allowed) << "a test that starts ranks needs main = "
                    "\"//testing/harness:rank_main\"";
  CHECK(AllPrograms().by_name.count(program) > 0)
      << "no DSD_RANK_PROGRAM(" << program << ")";
  const auto is_absent = [&](int rank) {
    return std::count(options.absent.begin(), options.absent.end(), rank) > 0;
  };
  Socket port(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  CHECK(port.valid());
  // As ListenAt does: another may serve here when this one is dead.
  const int on = 1;
  setsockopt(port.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  CHECK_EQ(bind(port.fd(), reinterpret_cast<sockaddr*>(&address), size), 0);
  if (!is_absent(0)) CHECK_EQ(listen(port.fd(), 128), 0);
  CHECK_EQ(getsockname(port.fd(), reinterpret_cast<sockaddr*>(&address), &size),
           0);

  impl_->world_size = world_size;
  impl_->deadline = Env::Real()->Now() + options.timeout;
  {
    absl::MutexLock lock(&impl_->mu);
    impl_->processes.resize(world_size);
    for (int rank = 0; rank < world_size; ++rank) {
      if (is_absent(rank)) {
        impl_->processes[rank].ended = true;
        continue;
      }
      impl_->Spawn(rank, program, options, port.fd(), ntohs(address.sin_port));
    }
  }
  if (is_absent(0)) impl_->port = std::move(port);
  port.Close();
  impl_->pump = std::thread([impl = impl_.get()] { impl->Pump(); });
}

RankProcesses::~RankProcesses() {
  for (int rank = 0; rank < impl_->world_size; ++rank) Signal(rank, SIGKILL);
  Wait();
}

bool RankProcesses::WaitFor(int rank, absl::string_view place) {
  absl::MutexLock lock(&impl_->mu);
  const RankProcesses::Impl::Process& process = impl_->processes[rank];
  const auto reached = [&] {
    return std::count(process.places.begin(), process.places.end(), place) > 0;
  };
  const auto over = [&] { return reached() || process.ended; };
  impl_->mu.Await(absl::Condition(&over));
  return reached();
}

void RankProcesses::Release(int rank) {
  absl::MutexLock lock(&impl_->mu);
  const RankProcesses::Impl::Process& process = impl_->processes[rank];
  if (!process.ended) send(process.control, "g", 1, MSG_NOSIGNAL);
}

void RankProcesses::Signal(int rank, int signal) {
  absl::MutexLock lock(&impl_->mu);
  const RankProcesses::Impl::Process& process = impl_->processes[rank];
  if (!process.ended) kill(process.pid, signal);
}

std::vector<RankResult> RankProcesses::Wait() {
  if (impl_->pump.joinable()) {
    impl_->pump.join();
    std::vector<RankResult> results;
    absl::MutexLock lock(&impl_->mu);
    for (const Impl::Process& process : impl_->processes) {
      results.push_back(process.result);
    }
    output_of_failures->Add(results);
    return results;
  }
  return {};
}

std::vector<RankResult> RunRanks(int world_size, absl::string_view program,
                                 const RankRunOptions& options) {
  RankProcesses processes(world_size, program, options);
  return processes.Wait();
}

}  // namespace dsd
