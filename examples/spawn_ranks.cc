// SPDX-License-Identifier: Apache-2.0

#include "dsd/examples/spawn_ranks.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/launch.h"

namespace dsd_examples {
namespace {

constexpr absl::Duration kGrace = absl::Seconds(30);
constexpr char kSelf[] = "/proc/self/exe";
constexpr int kExitUsage = 2;

absl::Status SystemError(absl::string_view what) {
  return absl::ErrnoToStatus(errno, what);
}

// A listening socket on a port that the kernel chose: nobody can take it
// between now and the moment in which rank 0 uses it.
struct Listener {
  int fd = -1;
  int port = 0;
};
absl::StatusOr<Listener> Listen() {
  Listener listener;
  listener.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (listener.fd < 0) return SystemError("socket for the ranks' store");
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  if (bind(listener.fd, generic, length) != 0 ||
      listen(listener.fd, SOMAXCONN) != 0 ||
      getsockname(listener.fd, generic, &length) != 0) {
    const absl::Status status = SystemError("listening on 127.0.0.1");
    close(listener.fd);
    return status;
  }
  listener.port = ntohs(address.sin_port);
  return listener;
}

struct RankProcess {
  pid_t pid = -1;
  bool ended = false;
};

// Only async-signal-safe calls: the parent may have threads.
[[noreturn]] void BecomeRank(char* const* argv, char* const* env, int listen_fd,
                             pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);  // it died before the line above
  if (listen_fd >= 0) fcntl(listen_fd, F_SETFD, 0);
  execve(kSelf, argv, env);
  constexpr char kText[] = "could not execute /proc/self/exe\n";
  if (write(STDERR_FILENO, kText, sizeof(kText) - 1) < 0) _exit(126);
  _exit(127);
}

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& s : strings) pointers.push_back(s.data());
  pointers.push_back(nullptr);
  return pointers;
}

absl::StatusOr<RankProcess> StartRank(int rank, int world_size,
                                      const Listener& listener,
                                      std::vector<std::string> argv) {
  dsd::EnvironmentMap variables = dsd::ProcessEnvironment();
  variables["RANK"] = variables["LOCAL_RANK"] = absl::StrCat(rank);
  variables["WORLD_SIZE"] = variables["LOCAL_WORLD_SIZE"] =
      absl::StrCat(world_size);
  variables["MASTER_ADDR"] = "127.0.0.1";
  variables["MASTER_PORT"] = absl::StrCat(listener.port);
  variables["OMP_NUM_THREADS"] = "1";
  if (rank == 0) variables["DSD_LISTEN_FD"] = absl::StrCat(listener.fd);
  std::vector<std::string> env;
  for (const auto& [name, value] : variables) {
    env.push_back(absl::StrCat(name, "=", value));
  }
  const std::vector<char*> argv_pointers = Pointers(argv);
  const std::vector<char*> env_pointers = Pointers(env);

  const pid_t parent = getpid();
  RankProcess process;
  process.pid = fork();
  if (process.pid == 0) {
    BecomeRank(argv_pointers.data(), env_pointers.data(),
               rank == 0 ? listener.fd : -1, parent);
  }
  if (process.pid < 0) return SystemError("fork");
  return process;
}

// Empty for exit code 0.
std::string DescribeEnd(int wait_status) {
  if (WIFSIGNALED(wait_status)) {
    const int number = WTERMSIG(wait_status);
    return absl::StrCat("was killed by signal ", number, " (",
                        strsignal(number), ")");
  }
  const int code = WEXITSTATUS(wait_status);
  return code == 0 ? "" : absl::StrCat("ended with exit code ", code);
}

}  // namespace

absl::Status RunRanks(int world_size,
                      const std::vector<std::string>& arguments) {
  absl::StatusOr<Listener> listener = Listen();
  DSD_RETURN_IF_ERROR(listener);
  std::vector<std::string> argv = {kSelf};
  argv.insert(argv.end(), arguments.begin(), arguments.end());

  std::vector<RankProcess> processes;
  const auto kill_all = [&processes] {
    for (const RankProcess& process : processes) {
      if (!process.ended) kill(process.pid, SIGKILL);
    }
  };
  absl::Status start;
  for (int rank = 0; rank < world_size && start.ok(); ++rank) {
    absl::StatusOr<RankProcess> process =
        StartRank(rank, world_size, *listener, argv);
    start = absl::Status(process.status());
    if (start.ok()) processes.push_back(*std::move(process));
  }
  close(listener->fd);
  if (!start.ok()) kill_all();

  std::vector<std::string> failures;
  bool all_are_usage = true;
  absl::Time deadline = absl::InfiniteFuture();
  size_t num_ended = 0;
  while (num_ended < processes.size()) {
    absl::SleepFor(absl::Milliseconds(10));
    for (size_t rank = 0; rank < processes.size(); ++rank) {
      RankProcess& process = processes[rank];
      int wait_status = 0;
      if (process.ended ||
          waitpid(process.pid, &wait_status, WNOHANG) != process.pid) {
        continue;
      }
      process.ended = true;
      ++num_ended;
      const std::string end = DescribeEnd(wait_status);
      if (end.empty()) continue;
      all_are_usage &=
          WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == kExitUsage;
      failures.push_back(absl::StrCat("rank ", rank, " ", end));
      if (deadline == absl::InfiniteFuture()) deadline = absl::Now() + kGrace;
    }
    if (absl::Now() > deadline) {
      kill_all();
      deadline = absl::InfiniteFuture();
    }
  }
  DSD_RETURN_IF_ERROR(start);
  if (failures.empty()) return absl::OkStatus();
  return absl::Status(
      all_are_usage ? absl::StatusCode::kInvalidArgument
                    : absl::StatusCode::kAborted,
      absl::StrCat(failures.size(), " of ", world_size, " ranks failed:\n  ",
                   absl::StrJoin(failures, "\n  ")));
}

}  // namespace dsd_examples
