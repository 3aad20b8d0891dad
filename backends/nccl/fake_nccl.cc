// SPDX-License-Identifier: Apache-2.0
//
// An NCCL for tests on machines without a GPU, over fake_cudart.cc, that really
// moves the bytes: ranks meet through sockets in the abstract namespace, a
// group is a "kernel" on the stream that it was given. Where NCCL would do
// something undefined (sizes that differ, memory that is none of a device, two
// calls at once on a communicator, a call before the last is done), it ends the
// process.
//
// DSD_FAKE_NCCL is a script of items "name=value" or "name@rank=value",
// separated by commas:
//   version=N           ncclGetVersion; 23007 if not said
//   polls=N             looks until what was started is done; 2
//   init_error=RESULT   ncclCommInitRankConfig comes to this
//   init_hangs=1        it never comes to anything
//   group_error=RESULT  ncclGroupEnd returns this
//   async_error=RESULT  a kernel fails with this and spins
//   hangs=1             a kernel spins
//   dies=1              the process is killed in the middle of a message
//   tells_of_death=1    a peer that has gone is a remote error, as over
//                       sockets; else the kernel spins, as over NVLink
//   abort_hangs=1       ncclCommAbort does not return
//   after=N             the group that is the first to behave so; 1, since 0 is
//                       the first of a communicator

#include <dlfcn.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

enum Result : int {
  kSuccess = 0,
  kInvalidArgument = 4,
  kRemoteError = 6,
  kInProgress = 7,
};

struct Config {
  size_t size;
  unsigned magic;
  unsigned version;
  int blocking;
};

struct UniqueId {
  char internal[128];
};

[[noreturn]] void Misuse(const std::string& what) {
  fprintf(stderr, "fake NCCL: %s\n", what.c_str());
  abort();
}

// `name` of the script, for this rank or for all; `fallback` if it is not said.
int Script(const char* name, int rank, int fallback) {
  const char* const text = getenv("DSD_FAKE_NCCL");
  if (text == nullptr) return fallback;
  const std::string script = std::string(",") + text + ",";
  for (const std::string& key :
       {std::string(name) + "@" + std::to_string(rank), std::string(name)}) {
    const size_t at = script.find("," + key + "=");
    if (at != std::string::npos) {
      return atoi(script.c_str() + at + key.size() + 2);
    }
  }
  return fallback;
}

// What it needs of the fake CUDA runtime, which is there before.
struct Cuda {
  int (*GetDevice)(int*);
  int (*LaunchHostFunc)(void*, void (*)(void*), void*);
  int (*PointerGetAttributes)(void*, const void*);
};
const Cuda& TheCuda() {
  static const Cuda cuda = [] {
    void* const library =
        dlopen(getenv("DSD_CUDART_LIBRARY"), RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) Misuse("no fake CUDA runtime is there");
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(
          dlsym(library, name));
    };
    Cuda found;
    find(found.GetDevice, "cudaGetDevice");
    find(found.LaunchHostFunc, "cudaLaunchHostFunc");
    find(found.PointerGetAttributes, "cudaPointerGetAttributes");
    return found;
  }();
  return cuda;
}

void CheckMemory(const void* data) {
  struct {
    int type, device;
    void* pointers[2];
  } attributes;
  if (TheCuda().PointerGetAttributes(&attributes, data) != 0 ||
      attributes.type != 2) {
    Misuse("a message is not in memory of a device");
  }
}

void SleepBriefly() { usleep(500); }

}  // namespace

struct Kernel;

struct ncclComm {
  // Two of them at once are a mistake.
  class Call {
   public:
    explicit Call(ncclComm* comm) : comm_(comm) {
      if (comm_->magic != kMagic) Misuse("no communicator, or freed already");
      if (comm_->calls.fetch_add(1) != 0) Misuse("two calls at once");
    }
    ~Call() {
      if (comm_ != nullptr) comm_->calls.fetch_sub(1);
    }
    void Forget() { comm_ = nullptr; }

   private:
    ncclComm* comm_;
  };
  static constexpr uint64_t kMagic = 0x1234abcd5678ef90;

  uint64_t magic = kMagic;
  std::atomic<int> calls{0};
  std::string id;
  int rank = 0;
  int ranks = 0;
  std::atomic<bool> abort{false};
  std::atomic<int> state{kInProgress};
  int polls = 0;   // looks until the state is told
  int groups = 0;  // so far
  bool finalized = false;
  Kernel* pending = nullptr;  // launched by the last of the looks
  void* pending_stream = nullptr;
  std::atomic<int> kernels{0};
  std::vector<int> sockets;  // by peer
  std::thread init;
};

struct Op {
  bool is_send;
  char* data;
  size_t size;
  int peer;
};

struct Kernel {
  ncclComm* comm;
  std::vector<Op> ops;
  int number;
};

namespace {

struct Group {
  int depth = 0;
  ncclComm* comm = nullptr;
  void* stream = nullptr;
  std::vector<Op> ops;
};
thread_local Group group;

std::string NameOf(const ncclComm& comm, int rank) {
  return "dsd-fake-nccl-" + comm.id + "-" + std::to_string(rank);
}

socklen_t Address(const std::string& name, sockaddr_un* address) {
  memset(address, 0, sizeof(*address));
  address->sun_family = AF_UNIX;
  memcpy(address->sun_path + 1, name.data(), name.size());
  return offsetof(sockaddr_un, sun_path) + 1 + name.size();
}

bool WaitFor(int fd, const std::atomic<bool>& abort) {
  pollfd poll_fd = {fd, POLLIN, 0};
  while (!abort) {
    if (poll(&poll_fd, 1, 1) > 0) return true;
  }
  return false;
}

// A socket to each other rank.
[[maybe_unused]] void Meet(ncclComm* comm) {  // not by the old one
  sockaddr_un address;
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  socklen_t length = Address(NameOf(*comm, comm->rank), &address);
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), length) != 0 ||
      listen(listener, comm->ranks) != 0) {
    Misuse("the id of a communicator is used twice");
  }
  bool ok = true;
  for (int peer = 0; peer < comm->rank && ok; ++peer) {
    length = Address(NameOf(*comm, peer), &address);
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    while (connect(fd, reinterpret_cast<sockaddr*>(&address), length) != 0) {
      if (comm->abort) {
        ok = false;
        break;
      }
      SleepBriefly();
    }
    if (ok && send(fd, &comm->rank, sizeof(int), MSG_NOSIGNAL) != sizeof(int)) {
      ok = false;
    }
    comm->sockets[peer] = fd;
  }
  for (int i = comm->rank + 1; i < comm->ranks && ok; ++i) {
    ok = WaitFor(listener, comm->abort);
    if (!ok) break;
    const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    int peer = -1;
    ok =
        WaitFor(fd, comm->abort) && read(fd, &peer, sizeof(int)) == sizeof(int);
    if (ok) {
      comm->sockets[peer] = fd;
    } else {
      close(fd);
    }
  }
  close(listener);
  while (Script("init_hangs", comm->rank, 0) != 0 && !comm->abort) {
    SleepBriefly();
  }
  const int error = Script("init_error", comm->rank, kSuccess);
  comm->state = ok ? error : kRemoteError;
}

bool Spin(ncclComm* comm) {
  while (!comm->abort) SleepBriefly();
  return false;
}

// One end of the messages with one peer, in one direction.
struct Channel {
  int fd;
  std::deque<Op> ops;
  uint64_t head = 0;  // the size, before the bytes
  size_t head_done = 0;
  size_t done = 0;
};

// Moves what can be moved now. False if the peer has gone.
bool Advance(Channel& channel, bool is_send, bool dies) {
  while (!channel.ops.empty()) {
    const Op& op = channel.ops.front();
    if (is_send) channel.head = op.size;
    const bool in_head = channel.head_done < sizeof(channel.head);
    char* const at =
        in_head ? reinterpret_cast<char*>(&channel.head) + channel.head_done
                : op.data + channel.done;
    const size_t left = in_head
                            ? sizeof(channel.head) - channel.head_done
                            : std::min(op.size - channel.done, size_t{1} << 16);
    const ssize_t n =
        is_send ? send(channel.fd, at, left, MSG_DONTWAIT | MSG_NOSIGNAL)
                : recv(channel.fd, at, left, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (n <= 0) return false;
    (in_head ? channel.head_done : channel.done) += n;
    if (!in_head && dies && channel.done >= op.size / 2) {
      kill(getpid(), SIGKILL);
    }
    if (channel.head_done < sizeof(channel.head)) continue;
    if (!is_send && channel.head != op.size) {
      Misuse("a message of " + std::to_string(channel.head) +
             " bytes meets a receive of " + std::to_string(op.size));
    }
    if (channel.done == op.size) {
      channel.ops.pop_front();
      channel.head_done = channel.done = 0;
    }
  }
  return true;
}

bool Move(const Kernel& kernel) {
  ncclComm* const comm = kernel.comm;
  const auto script = [&](const char* name) {
    return kernel.number < Script("after", comm->rank, 1)
               ? 0
               : Script(name, comm->rank, 0);
  };
  if (const int error = script("async_error")) {
    comm->state = error;
    return Spin(comm);
  }
  if (script("hangs") != 0) return Spin(comm);
  const bool dies = script("dies") != 0;

  std::vector<Channel> in(comm->ranks);
  std::vector<Channel> out(comm->ranks);
  for (const Op& op : kernel.ops) {
    (op.is_send ? out : in)[op.peer].ops.push_back(op);
  }
  for (int peer = 0; peer < comm->ranks; ++peer) {
    in[peer].fd = out[peer].fd = comm->sockets[peer];
  }
  std::deque<Op>& to_self = out[comm->rank].ops;
  std::deque<Op>& from_self = in[comm->rank].ops;
  if (to_self.size() != from_self.size()) Misuse("a message to itself alone");
  for (; !to_self.empty(); to_self.pop_front(), from_self.pop_front()) {
    if (to_self.front().size != from_self.front().size) Misuse("sizes");
    memcpy(from_self.front().data, to_self.front().data, to_self.front().size);
  }
  while (!comm->abort) {
    std::vector<pollfd> fds;
    for (int peer = 0; peer < comm->ranks; ++peer) {
      short events = 0;
      if (!in[peer].ops.empty()) events |= POLLIN;
      if (!out[peer].ops.empty()) events |= POLLOUT;
      if (events != 0) fds.push_back({comm->sockets[peer], events, 0});
    }
    if (fds.empty()) return true;
    poll(fds.data(), fds.size(), 1);
    for (int peer = 0; peer < comm->ranks; ++peer) {
      if (Advance(in[peer], false, dies) && Advance(out[peer], true, dies)) {
        continue;
      }
      if (script("tells_of_death") != 0) comm->state = kRemoteError;
      return Spin(comm);
    }
  }
  return false;
}

void RunKernel(void* argument) {
  const std::unique_ptr<Kernel> kernel(static_cast<Kernel*>(argument));
  Move(*kernel);
  kernel->comm->kernels.fetch_sub(1);
}

// Whether it does all that was asked of it.
int Look(ncclComm* comm) {
  const int state = comm->state;
  if (state != kSuccess) return state;
  if (comm->polls > 0 && --comm->polls > 0) return kInProgress;
  if (comm->pending != nullptr) {
    comm->kernels.fetch_add(1);
    TheCuda().LaunchHostFunc(comm->pending_stream, &RunKernel, comm->pending);
    comm->pending = nullptr;
  }
  return kSuccess;
}

void CheckReady(ncclComm* comm) {
  if (comm->state == kInProgress || comm->polls > 0 ||
      comm->pending != nullptr) {
    Misuse("a call before the last one is done");
  }
}

int Start(ncclComm* comm) {
  comm->polls = 1 + Script("polls", comm->rank, 2);
  return kInProgress;
}

void Free(ncclComm* comm) {
  if (comm->init.joinable()) comm->init.join();
  while (comm->kernels > 0) SleepBriefly();
  for (const int fd : comm->sockets) {
    if (fd >= 0) close(fd);
  }
  comm->magic = 0;
  delete comm;
}

int Add(const Op& op, ncclComm* comm, void* stream) {
  if (group.depth == 0) Misuse("a message outside of a group");
  if (group.comm != nullptr && (group.comm != comm || group.stream != stream)) {
    Misuse("a group over two communicators or streams");
  }
  const ncclComm::Call call(comm);
  CheckReady(comm);
  CheckMemory(op.data);
  if (op.peer < 0 || op.peer >= comm->ranks) return kInvalidArgument;
  group.comm = comm;
  group.stream = stream;
  group.ops.push_back(op);
  return kSuccess;
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
  const char* const rank = getenv("RANK");
  *version = Script("version", rank == nullptr ? -1 : atoi(rank), 23007);
  return kSuccess;
}

const char* ncclGetErrorString(int result) {
  switch (result) {
    case kRemoteError:
      return "remote process exited or there was a network error";
    case 5:
      return "invalid usage";
    default:
      return "another result";
  }
}

const char* ncclGetLastError(ncclComm*) { return "as the script says"; }

int ncclGetUniqueId(UniqueId* id) {
  std::random_device random;
  snprintf(id->internal, sizeof(id->internal), "%08x%08x", random(), random());
  return kSuccess;
}

#ifndef DSD_FAKE_NCCL_IS_OLD
int ncclCommInitRankConfig(ncclComm** out, int ranks, UniqueId id, int rank,
                           Config* config) {
  if (config->magic != 0xcafebeef || config->size < sizeof(Config) ||
      config->version < 21400) {
    Misuse("a configuration that is none");
  }
  if (config->blocking != 0) Misuse("a communicator that blocks");
  auto* const comm = new ncclComm;
  comm->id = id.internal;
  comm->rank = rank;
  comm->ranks = ranks;
  comm->sockets.assign(ranks, -1);
  *out = comm;
  Start(comm);
  comm->init = std::thread([comm] { Meet(comm); });
  return kInProgress;
}
#endif

int ncclCommGetAsyncError(ncclComm* comm, int* error) {
  const ncclComm::Call call(comm);
  *error = Look(comm);
  return kSuccess;
}

int ncclGroupStart() {
  ++group.depth;
  return kSuccess;
}

int ncclSend(const void* data, size_t count, int type, int peer, ncclComm* comm,
             void* stream) {
  if (type != 1) Misuse("a message that is not of bytes");
  return Add({true, static_cast<char*>(const_cast<void*>(data)), count, peer},
             comm, stream);
}

int ncclRecv(void* data, size_t count, int type, int peer, ncclComm* comm,
             void* stream) {
  if (type != 1) Misuse("a message that is not of bytes");
  return Add({false, static_cast<char*>(data), count, peer}, comm, stream);
}

int ncclGroupEnd() {
  if (group.depth == 0) Misuse("the end of no group");
  if (--group.depth > 0 || group.comm == nullptr) return kSuccess;
  ncclComm* const comm = group.comm;
  const ncclComm::Call call(comm);
  CheckReady(comm);
  const int number = comm->groups++;
  const Group ended = std::exchange(group, Group());
  if (number >= Script("after", comm->rank, 1)) {
    if (const int error = Script("group_error", comm->rank, 0)) {
      return error;
    }
  }
  // Launched when it has been looked at often enough: a caller that does not
  // look would take the stream for idle.
  comm->pending = new Kernel{comm, ended.ops, number};
  comm->pending_stream = ended.stream;
  return Start(comm);
}

int ncclCommFinalize(ncclComm* comm) {
  const ncclComm::Call call(comm);
  CheckReady(comm);
  comm->finalized = true;
  return Start(comm);
}

int ncclCommDestroy(ncclComm* comm) {
  ncclComm::Call call(comm);
  CheckReady(comm);
  if (!comm->finalized) Misuse("destroyed before finalized");
  call.Forget();
  Free(comm);
  return kSuccess;
}

int ncclCommAbort(ncclComm* comm) {
  ncclComm::Call call(comm);
  while (Script("abort_hangs", comm->rank, 0) != 0) pause();
  comm->abort = true;
  delete comm->pending;
  call.Forget();
  Free(comm);
  return kSuccess;
}

}  // extern "C"
