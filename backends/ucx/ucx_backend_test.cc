// SPDX-License-Identifier: Apache-2.0
//
// What is UCX's own; what all backends must do is in testing/conformance.

#include "dsd/backends/ucx/ucx_backend.h"

#include <dirent.h>
#include <dlfcn.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "dsd/backends/ucx/ucx_library.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/testing/harness/abort_storm.h"
#include "dsd/testing/harness/process_counts.h"
#include "dsd/testing/harness/rank_processes.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

absl::Time Soon() { return Env::Real()->Now() + absl::Seconds(30); }

std::vector<absl::Status> RunThreads(
    absl::FunctionRef<absl::Status(Communicator&)> body,
    const std::string& bind_address = "") {
  RankThreadsOptions options;
  options.descriptor = &UcxBackend();
  options.bind_address = bind_address;
  options.shutdown = false;
  return RunRankThreads(2, body, options);
}

// Two engines that are connected to each other.
class EnginesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 2; ++rank) {
      engines_[rank] = NewEngine(rank);
      threads.emplace_back([this, rank] {
        const absl::Status status = engines_[rank]->Connect(Soon());
        EXPECT_TRUE(status.ok()) << status;
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  std::unique_ptr<Engine> NewEngine(int rank) {
    EngineOptions options;
    options.rank = rank;
    options.world_size = 2;
    options.env = Env::Real();
    options.store = store_;
    return *UcxBackend().create(options);
  }

  std::unique_ptr<EngineBatch> Send(uint64_t tag,
                                    const std::vector<std::byte>& data) {
    auto batch = engines_[0]->Start({{1, tag, data}}, {});
    EXPECT_TRUE(batch.ok()) << batch.status();
    return *std::move(batch);
  }
  std::unique_ptr<EngineBatch> Receive(uint64_t tag,
                                       std::vector<std::byte>& data) {
    auto batch = engines_[1]->Start({}, {{0, tag, absl::MakeSpan(data)}});
    EXPECT_TRUE(batch.ok()) << batch.status();
    return *std::move(batch);
  }

  const std::shared_ptr<Store> store_ = MakeInProcessStore(Env::Real());
  std::unique_ptr<Engine> engines_[2];
};

std::vector<std::byte> Filled(size_t size, int with) {
  return std::vector<std::byte>(size, std::byte(with));
}

TEST_F(EnginesTest, MessagesMayComeInAnyOrderAndBeforeTheirReceives) {
  const size_t sizes[] = {0, 1, 4096, 32768, 32769, 1 << 20, 5 << 20};
  std::vector<std::vector<std::byte>> out;
  std::vector<std::unique_ptr<EngineBatch>> sends;
  for (size_t i = 0; i < std::size(sizes); ++i) {
    out.push_back(Filled(sizes[i], i + 1));
  }
  for (size_t i = 0; i < std::size(sizes); ++i) {
    sends.push_back(Send(i, out[i]));
  }
  // A message that is not waited for holds up no other.
  for (size_t i = std::size(sizes); i-- > 0;) {
    std::vector<std::byte> in(sizes[i]);
    const auto receive = Receive(i, in);
    EXPECT_EQ(receive->WaitReceived(0, Soon()), absl::OkStatus()) << sizes[i];
    EXPECT_EQ(receive->Wait(Soon()), absl::OkStatus());
    EXPECT_EQ(in, out[i]);
  }
  for (const auto& send : sends) {
    EXPECT_EQ(send->Wait(Soon()), absl::OkStatus());
  }
}

// Small messages that nobody takes do not pile up in the receiver: after a
// while they wait with the sender.
TEST_F(EnginesTest, SmallMessagesThatNobodyTakesWaitWithTheSender) {
  constexpr int kMessages = 2000;
  const std::vector<std::byte> out = Filled(16 << 10, 7);
  std::vector<EngineSend> messages;
  for (uint64_t tag = 0; tag < kMessages; ++tag) {
    messages.push_back({1, tag, out});
  }
  auto sends = engines_[0]->Start(messages, {});
  ASSERT_TRUE(sends.ok());
  EXPECT_EQ((*sends)->Wait(Env::Real()->Now() + absl::Milliseconds(200)).code(),
            absl::StatusCode::kDeadlineExceeded);
  for (uint64_t tag = kMessages; tag-- > 0;) {
    std::vector<std::byte> in(out.size());
    ASSERT_EQ(Receive(tag, in)->Wait(Soon()), absl::OkStatus()) << tag;
    ASSERT_EQ(in, out);
  }
  EXPECT_EQ((*sends)->Wait(Soon()), absl::OkStatus());
  // What was taken has been told, so that eager messages go on.
  for (uint64_t tag = 0; tag < kMessages; ++tag) {
    const auto send = Send(tag, out);
    std::vector<std::byte> in(out.size());
    ASSERT_EQ(Receive(tag, in)->Wait(Soon()), absl::OkStatus()) << tag;
    ASSERT_EQ(send->Wait(Soon()), absl::OkStatus()) << tag;
  }
}

TEST_F(EnginesTest, AShorterMessageFillsTheFrontOfItsReceive) {
  uint64_t tag = 0;
  for (size_t size : {size_t{0}, size_t{10}, size_t{3} << 20}) {
    for (bool early : {false, true}) {
      const std::vector<std::byte> out = Filled(size, 1);
      std::vector<std::byte> in(size + 100);
      std::unique_ptr<EngineBatch> send;
      if (early) send = Send(++tag, out);
      const auto receive = Receive(early ? tag : tag + 1, in);
      if (!early) send = Send(++tag, out);
      EXPECT_EQ(receive->Wait(Soon()), absl::OkStatus());
      EXPECT_EQ(send->Wait(Soon()), absl::OkStatus());
      std::vector<std::byte> expected = out;
      expected.resize(size + 100);
      EXPECT_EQ(in, expected);
    }
  }
}

// Communicator's tags make it impossible; but nothing is overwritten.
TEST_F(EnginesTest, ALongerMessageIsAnError) {
  uint64_t tag = 0;
  for (size_t size : {size_t{100}, size_t{1} << 20}) {
    for (bool early : {false, true}) {
      const std::vector<std::byte> out = Filled(size, 1);
      std::vector<std::byte> in(size - 1);
      std::unique_ptr<EngineBatch> send;
      if (early) send = Send(++tag, out);
      const auto receive = Receive(early ? tag : tag + 1, in);
      if (!early) send = Send(++tag, out);
      const absl::Status status = receive->Wait(Soon());
      EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
      EXPECT_THAT(std::string(status.message()),
                  HasSubstr(absl::StrCat("has ", size, " bytes")));
      EXPECT_EQ(in, std::vector<std::byte>(size - 1));
      send->Wait(Soon()).IgnoreError();
    }
  }
}

TEST_F(EnginesTest, CancelEndsEverythingAndIsFinal) {
  std::vector<std::byte> in(10);
  std::vector<std::byte> out = Filled(64 << 20, 1);
  const auto receive = Receive(1, in);
  const auto send = Send(2, out);  // nobody takes it
  std::thread waiting([&] {
    EXPECT_EQ(receive->Wait(Soon()).code(), absl::StatusCode::kAborted);
  });
  engines_[1]->Cancel();
  engines_[1]->Cancel();
  engines_[0]->Cancel();
  waiting.join();
  EXPECT_EQ(receive->WaitReceived(0, Soon()).code(),
            absl::StatusCode::kAborted);
  EXPECT_EQ(send->Wait(Soon()).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(engines_[0]->Start({{1, 3, out}}, {}).status().code(),
            absl::StatusCode::kAborted);
}

absl::Duration CpuTime() {
  timespec time = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return absl::DurationFromTimespec(time);
}

TEST_F(EnginesTest, EnginesSleepWhileNothingMoves) {
  std::vector<std::byte> in(10);
  const auto receive = Receive(1, in);
  const absl::Duration before = CpuTime();
  EXPECT_EQ(receive->Wait(Env::Real()->Now() + absl::Seconds(2)).code(),
            absl::StatusCode::kDeadlineExceeded);
  const absl::Duration used = CpuTime() - before;
  std::cout << "idle for 2s: " << used << " of the processor" << std::endl;
  EXPECT_LT(used, absl::Milliseconds(200));  // two that spin take seconds
}

// The memory is the caller's again when a batch is gone, also one that was
// given up in the middle: a sanitizer watches.
TEST_F(EnginesTest, ABatchThatIsGivenUpTouchesItsMemoryNoMore) {
  auto out = std::make_unique<std::vector<std::byte>>(Filled(64 << 20, 1));
  auto in = std::make_unique<std::vector<std::byte>>(out->size());
  auto send = Send(1, *out);
  auto receive = Receive(1, *in);
  // It is under way, or is about to be.
  Env::Real()->SleepUntil(Env::Real()->Now() + absl::Milliseconds(2));
  receive.reset();
  std::fill(in->begin(), in->end(), std::byte{9});
  std::thread other([&] {
    send.reset();
    out.reset();
  });
  other.join();
  for (std::byte b : *in) ASSERT_EQ(b, std::byte{9});
}

TEST(UcxConnectTest, APeerThatDoesNotAnswerIsNamed) {
  EngineOptions options;
  options.world_size = 2;
  options.env = Env::Real();
  options.store = MakeInProcessStore(Env::Real());
  // It says where it is, and leaves.
  options.rank = 1;
  auto gone = *UcxBackend().create(options);
  EXPECT_EQ(gone->Connect(Env::Real()->Now() + absl::Milliseconds(500)).code(),
            absl::StatusCode::kDeadlineExceeded);
  gone.reset();
  options.rank = 0;
  auto engine = *UcxBackend().create(options);
  const absl::Status status =
      engine->Connect(Env::Real()->Now() + absl::Seconds(1));
  EXPECT_THAT(status.code(), AnyOf(absl::StatusCode::kDeadlineExceeded,
                                   absl::StatusCode::kUnavailable))
      << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
}

TEST(UcxConnectTest, CancelEndsIt) {
  EngineOptions options;
  options.world_size = 2;
  options.env = Env::Real();
  options.store = MakeInProcessStore(Env::Real());
  auto engine = *UcxBackend().create(options);
  engine->Cancel();
  EXPECT_EQ(engine->Connect(Soon()).code(), absl::StatusCode::kAborted);
}

TEST(UcxConnectTest, AnotherVersionIsRefused) {
  EngineOptions options;
  options.world_size = 2;
  options.env = Env::Real();
  options.store = MakeInProcessStore(Env::Real());
  ASSERT_TRUE(options.store->Set("ucx/1", "0.7 1 address", Soon()).ok());
  auto engine = *UcxBackend().create(options);
  const absl::Status status = engine->Connect(Soon());
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("rank 1 has UCX 0.7, but rank 0 has UCX 1."));
}

TEST(UcxBackendTest, AbortsAtRandomTimesLeaveNothingBehind) {
  test::AbortStormOptions options;
  options.threads.descriptor = &UcxBackend();
  test::AbortStorm(options);
}

TEST(UcxBackendTest, AnAddressThatIsNotHereIsNamed) {
  const std::vector<absl::Status> results =
      RunThreads([](Communicator& comm) { return comm.Barrier(); },
                 "192.0.2.1");  // for documentation; nobody's
  for (const absl::Status& status : results) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("192.0.2.1"));
  }
}

TEST(UcxBackendTest, SignalHandlersAreLeftAlone) {
  std::vector<struct sigaction> before(65);
  for (int signal = 1; signal < 65; ++signal) {
    sigaction(signal, nullptr, &before[signal]);
  }
  for (const absl::Status& status :
       RunThreads([](Communicator& comm) { return comm.Shutdown(); })) {
    EXPECT_EQ(status, absl::OkStatus());
  }
  for (int signal = 1; signal < 65; ++signal) {
    struct sigaction now;
    sigaction(signal, nullptr, &now);
    EXPECT_EQ(now.sa_handler, before[signal].sa_handler) << signal;
  }
}

// --- In processes of their own ---

// Addresses at which this process listens, as the system shows them.
std::set<std::string> ListeningAddresses() {
  std::set<std::string> sockets;  // by inode
  DIR* dir = opendir("/proc/self/fd");
  while (const dirent* entry = readdir(dir)) {
    char target[64] = "";
    if (readlink(absl::StrCat("/proc/self/fd/", entry->d_name).c_str(), target,
                 sizeof(target) - 1) > 0 &&
        absl::StartsWith(target, "socket:[")) {
      sockets.insert(std::string(target).substr(8, strlen(target) - 9));
    }
  }
  closedir(dir);
  std::set<std::string> addresses;
  for (const char* file : {"/proc/self/net/tcp", "/proc/self/net/tcp6"}) {
    std::ifstream in(file);
    std::string line;
    std::getline(in, line);
    while (std::getline(in, line)) {
      const std::vector<std::string> words =
          absl::StrSplit(line, ' ', absl::SkipEmpty());
      if (words[3] == "0A" && sockets.count(words[9]) == 1) {
        addresses.insert(words[1].substr(0, words[1].find(':')));
      }
    }
  }
  return addresses;
}

absl::StatusOr<std::unique_ptr<Communicator>> ConnectAt(
    RankContext& rank, const std::string& address) {
  WorldOptions options;
  options.descriptor = &UcxBackend();
  options.bind_address = address;
  options.connect_timeout = absl::Seconds(30);
  return ConnectWorld(rank.launch(), options);
}

DSD_RANK_PROGRAM(ListenAtLoopback) {
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectAt(rank, rank.argument()));
  for (const std::string& address : ListeningAddresses()) {
    rank.Record(address, "");
  }
  return comm->Shutdown();
}

// Some megabytes each way, in small and large messages.
absl::Status MoveSome(Communicator& comm) {
  for (size_t size : {size_t{100}, size_t{20000}, size_t{5} << 20}) {
    const std::vector<std::byte> out(size, std::byte(comm.rank() + 1));
    std::vector<std::byte> in(size);
    const int other = 1 - comm.rank();
    DSD_RETURN_IF_ERROR(comm.Exchange(
        {{other, out}}, {{other, absl::MakeSpan(in)}}, "move some"));
    if (in != std::vector<std::byte>(size, std::byte(other + 1))) {
      return absl::InternalError("other bytes came");
    }
  }
  return comm.Shutdown();
}

DSD_RANK_PROGRAM(Move) {
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectAt(rank, ""));
  return MoveSome(*comm);
}

// With a /dev/shm of 64 KiB.
DSD_RANK_PROGRAM(MoveWithLittleSharedMemory) {
  if (unshare(CLONE_NEWNS) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) {
    rank.Record("cannot", "unshare");
    return absl::OkStatus();
  }
  mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
  if (mount("tmpfs", "/dev/shm", "tmpfs", 0, "size=64k") != 0) {
    rank.Record("cannot", "mount");
    return absl::OkStatus();
  }
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectAt(rank, ""));
  return MoveSome(*comm);
}

// The file of the library is there and is empty.
DSD_RANK_PROGRAM(ConnectWithoutUcx) {
  void* const library = dlopen("libucp.so.0", RTLD_LAZY | RTLD_NOLOAD);
  std::string path;
  for (const char* folder :
       {"/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64",
        "/usr/lib", "/usr/local/lib"}) {
    const std::string candidate = absl::StrCat(folder, "/libucp.so.0");
    if (path.empty() && access(candidate.c_str(), R_OK) == 0) path = candidate;
  }
  if (library != nullptr || path.empty()) {
    rank.Record("cannot", "hide UCX");
    return absl::OkStatus();
  }
  if (unshare(CLONE_NEWNS) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) {
    rank.Record("cannot", "unshare");
    return absl::OkStatus();
  }
  mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
  if (mount("/dev/null", path.c_str(), nullptr, MS_BIND, nullptr) != 0) {
    rank.Record("cannot", "mount");
    return absl::OkStatus();
  }
  return ConnectAt(rank, "").status();
}

// The system refuses to copy from and to the memory of other processes, as in
// containers.
DSD_RANK_PROGRAM(MoveWithoutCma) {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 1, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_writev, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {std::size(filter), filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
    rank.Record("cannot", "filter system calls");
    return absl::OkStatus();
  }
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectAt(rank, ""));
  return MoveSome(*comm);
}

// When UCX starts only `argument` descriptors are left.
DSD_RANK_PROGRAM(ConnectWithFewDescriptors) {
  static int left;
  if (!absl::SimpleAtoi(rank.argument(), &left)) left = 0;
  static BackendDescriptor descriptor = UcxBackend();
  descriptor.create = [](const EngineOptions& options) {
    std::vector<int> fillers;
    rlimit limit = {};
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = test::OpenDescriptors() + left;
    setrlimit(RLIMIT_NOFILE, &limit);
    return UcxBackend().create(options);
  };
  WorldOptions options;
  options.descriptor = &descriptor;
  options.connect_timeout = absl::Seconds(30);
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectWorld(rank.launch(), options));
  return comm->Shutdown();
}

// A worker that says where it is, and does nothing more.
class DeafPeer {
 public:
  absl::Status Open(Store& store) {
    DSD_ASSIGN_OR_RETURN(ucx_, LoadUcx());
    ucp_config_t* config = nullptr;
    ucp_params_t params = {};
    params.field_mask = UCP_PARAM_FIELD_FEATURES;
    params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    ucp_worker_params_t worker = {};
    ucp_address_t* address = nullptr;
    size_t size = 0;
    if (ucx_->ucp_config_read(nullptr, nullptr, &config) != UCS_OK ||
        ucx_->ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &params, config,
                               &context_) != UCS_OK ||
        ucx_->ucp_worker_create(context_, &worker, &worker_) != UCS_OK ||
        ucx_->ucp_worker_get_address(worker_, &address, &size) != UCS_OK) {
      return absl::InternalError("no worker");
    }
    ucx_->ucp_config_release(config);
    return store.Set(
        "ucx/2",
        absl::StrCat(ucx_->major, ".", ucx_->minor, " 1 ",
                     absl::string_view(reinterpret_cast<char*>(address), size)),
        Soon());
  }

 private:
  const UcxLibrary* ucx_ = nullptr;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
};

// The queue of the third is full before it has all that connecting sends.
DSD_RANK_PROGRAM(ConnectToTheDeaf) {
  EngineOptions options;
  options.world_size = 3;
  options.env = Env::Real();
  options.store = MakeInProcessStore(Env::Real());
  DeafPeer deaf;
  DSD_RETURN_IF_ERROR(deaf.Open(*options.store));
  std::vector<absl::Status> statuses(2);
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    options.rank = i;
    threads.emplace_back([&, i, options] {
      const auto engine = *UcxBackend().create(options);
      statuses[i] = engine->Connect(Env::Real()->Now() + absl::Seconds(1));
      if (rank.argument() == "cancelled") engine->Cancel();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) {
    if (!absl::IsDeadlineExceeded(status) ||
        !absl::StrContains(status.message(), "rank 2")) {
      return absl::InternalError(
          absl::StrCat("unexpected: ", status.message()));
    }
  }
  // The next generation is not hindered.
  for (const absl::Status& status : RunThreads(
           [](Communicator& comm) { return comm.Shutdown(); }, "127.0.0.1")) {
    DSD_RETURN_IF_ERROR(status);
  }
  return absl::OkStatus();
}

std::vector<RankResult> RunWith(absl::string_view program,
                                const std::string& argument,
                                const std::vector<std::string>& environment) {
  RankRunOptions options;
  options.argument = argument;
  for (const std::string& one : environment) {
    options.environment.push_back(absl::StrSplit(one, absl::MaxSplits('=', 1)));
  }
  return RunRanks(2, program, options);
}

TEST(UcxProcessTest, NothingListensButAtTheAddressGiven) {
  for (const RankResult& result :
       RunWith("ListenAtLoopback", "127.0.0.1", {})) {
    EXPECT_EQ(result.status, absl::OkStatus());
    EXPECT_THAT(result.values, ::testing::SizeIs(1));
    EXPECT_EQ(result.values.count("0100007F"), 1);
  }
  // UCX's own rule, for who asks for it.
  for (const RankResult& result :
       RunWith("ListenAtLoopback", "", {"UCX_NET_DEVICES=lo"})) {
    EXPECT_EQ(result.status, absl::OkStatus());
    EXPECT_EQ(result.values.count("0100007F"), 1);
  }
}

TEST(UcxProcessTest, TransportsOfTheUserAreUsed) {
  for (const char* transports : {"tcp,self", "tcp", "posix", "sysv,self",
                                 "posix,cma,self", "^tcp", "all"}) {
    EXPECT_THAT(RunWith("Move", "", {absl::StrCat("UCX_TLS=", transports)}),
                AllRanksOk())
        << transports;
  }
  EXPECT_THAT(RunWith("Move", "", {"UCX_RNDV_THRESH=1k"}), AllRanksOk());
  EXPECT_THAT(RunWith("Move", "", {"UCX_RNDV_THRESH=inf"}), AllRanksOk());
}

TEST(UcxProcessTest, SettingsThatCannotWorkAreClearErrors) {
  const auto expect = [](const std::vector<std::string>& environment,
                         absl::string_view text) {
    for (const RankResult& result : RunWith("Move", "", environment)) {
      EXPECT_EQ(result.end, RankResult::End::kReturned) << environment[0];
      EXPECT_FALSE(result.status.ok()) << environment[0];
      EXPECT_THAT(std::string(result.status.message()),
                  HasSubstr(std::string(text)))
          << environment[0];
    }
  };
  expect({"UCX_TLS=carrier_pigeon"}, "carrier_pigeon");
  expect({"UCX_TLS=self"}, "UCX_TLS must allow a transport");
  expect({"UCX_NET_DEVICES=nosuch0", "UCX_TLS=tcp"}, "nosuch0");
  // The user wants shared memory, and not the failure handling it needs.
  expect({"UCX_TLS=posix,self", "UCX_MM_ERROR_HANDLING=n"}, "UCX_TLS");
}

TEST(UcxProcessTest, WithoutTheLibraryConnectingSaysWhatToInstall) {
  const auto results = RunWith("ConnectWithoutUcx", "", {});
  if (results[0].values.count("cannot") == 1) {
    GTEST_SKIP() << "this system does not let us "
                 << results[0].values.at("cannot");
  }
  for (const RankResult& result : results) {
    EXPECT_EQ(result.status.code(), absl::StatusCode::kNotFound)
        << result.status;
    EXPECT_THAT(std::string(result.status.message()), HasSubstr("libucx0"));
  }
}

TEST(UcxProcessTest, WithoutCmaOtherTransportsServe) {
  for (const char* transports : {"all", "posix,cma,self"}) {
    const auto results =
        RunWith("MoveWithoutCma", "", {absl::StrCat("UCX_TLS=", transports)});
    if (results[0].values.count("cannot") == 1) {
      GTEST_SKIP() << "this system does not let us "
                   << results[0].values.at("cannot");
    }
    EXPECT_THAT(results, AllRanksOk());
  }
}

TEST(UcxProcessTest, WithLittleSharedMemoryOtherTransportsServe) {
  const auto results = RunWith("MoveWithLittleSharedMemory", "", {});
  if (results[0].values.count("cannot") == 1) {
    GTEST_SKIP() << "this system does not let us "
                 << results[0].values.at("cannot");
  }
  EXPECT_THAT(results, AllRanksOk());
  for (const RankResult& result : results) {
    EXPECT_THAT(result.output, HasSubstr("only 64 KiB free"));
  }
  for (const RankResult& result :
       RunWith("MoveWithLittleSharedMemory", "", {"UCX_TLS=posix,self"})) {
    EXPECT_EQ(result.status.code(), absl::StatusCode::kResourceExhausted)
        << result.status;
    EXPECT_THAT(std::string(result.status.message()), HasSubstr("/dev/shm"));
  }
}

TEST(UcxProcessTest, WithoutDescriptorsConnectingFailsClearly) {
  for (int left : {0, 1, 2, 3, 5, 8, 12, 16, 24, 32, 200}) {
    for (const RankResult& result :
         RunWith("ConnectWithFewDescriptors", absl::StrCat(left), {})) {
      ASSERT_EQ(result.end, RankResult::End::kReturned) << left << "\n"
                                                        << result.output;
      EXPECT_EQ(result.status.code(),
                left == 200 ? absl::StatusCode::kOk
                            : absl::StatusCode::kResourceExhausted)
          << left << ": " << result.status;
    }
  }
}

// UCX 1.13 ended the process.
TEST(UcxProcessTest, APeerThatTakesNothingWhileConnectingCanBeLeft) {
  for (const char* how : {"closed", "cancelled"}) {
    RankRunOptions options;
    options.argument = how;
    options.environment = {{"UCX_MM_FIFO_SIZE", "2"},
                           {"UCX_TLS", "posix,self"},
                           {"UCX_MM_ERROR_HANDLING", "y"}};
    EXPECT_THAT(RunRanks(1, "ConnectToTheDeaf", options), AllRanksOk()) << how;
  }
}

TEST(UcxProcessTest, UcxKnowsAllThatWeSet) {
  for (const RankResult& result : RunWith("Move", "", {"UCX_LOG_LEVEL=warn"})) {
    EXPECT_EQ(result.status, absl::OkStatus());
    EXPECT_THAT(result.output, Not(HasSubstr("invalid configuration")));
  }
}

// Its output is the program's own.
TEST(UcxProcessTest, NothingIsPrinted) {
  for (const RankResult& result : RunWith("Move", "", {})) {
    EXPECT_EQ(result.status, absl::OkStatus());
    EXPECT_EQ(result.output, "");
  }
}

}  // namespace
}  // namespace dsd
