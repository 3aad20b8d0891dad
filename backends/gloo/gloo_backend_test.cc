// SPDX-License-Identifier: Apache-2.0
//
// What is Gloo's own; what all backends must do is in testing/conformance.
// Ranks are threads here, so that leaks can be counted.

#include "dsd/backends/gloo/gloo_backend.h"

#include <dirent.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "dsd/backends/gloo/sigpipe_block.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;

int CountEntries(const char* folder) {
  DIR* dir = opendir(folder);
  int count = 0;
  while (readdir(dir) != nullptr) ++count;
  closedir(dir);
  return count;
}

// A thread that has been joined is listed for a moment longer.
int CountThreads(int expected) {
  const absl::Time end = Env::Real()->Now() + absl::Seconds(20);
  while (true) {
    const int count = CountEntries("/proc/self/task");
    if (count <= expected || Env::Real()->Now() >= end) return count;
    Env::Real()->SleepUntil(Env::Real()->Now() + absl::Milliseconds(1));
  }
}

std::vector<absl::Status> RunThreads(
    int ranks, absl::FunctionRef<absl::Status(Communicator&)> body,
    const std::string& bind_address = "") {
  const std::shared_ptr<Store> store = MakeInProcessStore(Env::Real());
  std::vector<absl::Status> results(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      CommunicatorOptions options;
      options.rank = rank;
      options.world_size = ranks;
      options.descriptor = &GlooBackend();
      options.store = store;
      options.bind_address = bind_address;
      options.connect_timeout = absl::Seconds(30);
      absl::StatusOr<std::unique_ptr<Communicator>> comm =
          Communicator::Create(options);
      results[rank] = comm.ok() ? body(**comm) : comm.status();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results;
}

// One rank aborts at a random moment of an exchange of many chunks. Afterwards
// the memory is the caller's again: it is freed at once, which a sanitizer
// watches.
TEST(GlooBackendTest, AbortsAtRandomTimesLeaveNothingBehind) {
  const char* const text = getenv("DSD_TEST_SEED");
  uint64_t seed = 0;
  if (text == nullptr || !absl::SimpleAtoi(text, &seed)) {
    seed = Env::Real()->RandomSeed();
  }
  std::cout << "DSD_TEST_SEED=" << seed << std::endl;
  std::mt19937_64 random(seed);
  int descriptors = 0;
  int threads = 0;
  for (int round = 0; round < 60; ++round) {
    const absl::Duration delay = absl::Microseconds(random() % 20000);
    const std::vector<absl::Status> results =
        RunThreads(3, [&](Communicator& comm) {
          std::thread aborter;
          if (comm.rank() == 1) {
            aborter = std::thread([&] {
              comm.env()->SleepUntil(comm.env()->Now() + delay);
              comm.Abort(absl::UnknownError("on purpose"));
            });
          }
          absl::Status status;
          while (status.ok()) {
            const std::vector<std::byte> out(700000, std::byte{1});
            std::vector<std::byte> in(700000);
            status = comm.Exchange(
                {{(comm.rank() + 1) % 3, out}},
                {{(comm.rank() + 2) % 3, absl::MakeSpan(in)}}, "storm");
          }
          if (aborter.joinable()) aborter.join();
          return status;
        });
    for (const absl::Status& status : results) {
      ASSERT_EQ(status.code(), absl::StatusCode::kAborted) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1 aborted"));
    }
    const int now = CountEntries("/proc/self/fd");
    if (round == 0) {
      threads = CountEntries("/proc/self/task");
    } else {
      ASSERT_EQ(now, descriptors) << "round " << round;
      ASSERT_LE(CountThreads(threads), threads) << "round " << round;
    }
    descriptors = now;
  }
}

// A rank that dies right after it has connected: its connection is gone before
// it is accepted. That is an error here and not the end of the process.
TEST(GlooBackendTest, APeerThatVanishesWhileItConnectsIsAnError) {
  for (int round = 0; round < 100; ++round) {
    Env* const env = Env::Real();
    const absl::Time deadline = env->Now() + absl::Seconds(30);
    EngineOptions options;
    options.world_size = 2;
    options.env = env;
    options.store = MakeInProcessStore(env);
    absl::StatusOr<std::unique_ptr<Engine>> engine =
        GlooBackend().create(options);
    ASSERT_TRUE(engine.ok()) << engine.status();
    std::thread connecting([&] { (*engine)->Connect(deadline).IgnoreError(); });
    // Gloo's address begins with the socket's.
    std::string address = *options.store->Get("gloo/0/1", deadline);
    sockaddr_in name;
    ASSERT_GE(address.size(), sizeof(name));
    std::memcpy(&name, address.data(), sizeof(name));
    const int peer = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const linger reset = {1, 0};
    setsockopt(peer, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    EXPECT_EQ(connect(peer, reinterpret_cast<sockaddr*>(&name), sizeof(name)),
              0);
    close(peer);
    // The side with the higher port is the one that connects.
    name.sin_port = 0xffff;
    std::memcpy(address.data(), &name, sizeof(name));
    EXPECT_TRUE(options.store->Set("gloo/1/0", address, deadline).ok());
    connecting.join();
  }
}

TEST(GlooBackendTest, AnAddressThatIsNotHereIsNamed) {
  const std::vector<absl::Status> results = RunThreads(
      2, [](Communicator& comm) { return comm.Barrier(); },
      "192.0.2.1");  // for documentation; nobody's
  for (const absl::Status& status : results) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("192.0.2.1"));
  }
}

TEST(GlooBackendTest, AnInterfaceThatIsNotHereIsNamed) {
  setenv("GLOO_SOCKET_IFNAME", "nosuch0", 1);
  const std::vector<absl::Status> results =
      RunThreads(2, [](Communicator& comm) { return comm.Barrier(); });
  setenv("GLOO_SOCKET_IFNAME", "lo", 1);
  const std::vector<absl::Status> loopback =
      RunThreads(2, [](Communicator& comm) { return comm.Shutdown(); });
  unsetenv("GLOO_SOCKET_IFNAME");
  for (const absl::Status& status : results) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("GLOO_SOCKET_IFNAME=nosuch0"));
  }
  EXPECT_EQ(loopback[0], absl::OkStatus());
  EXPECT_EQ(loopback[1], absl::OkStatus());
}

TEST(SigpipeBlockTest, ABrokenConnectionDoesNotEndTheProcess) {
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  close(ends[1]);
  {
    const SigpipeBlock block;
    EXPECT_EQ(write(ends[0], "x", 1), -1);
    EXPECT_EQ(errno, EPIPE);
  }
  close(ends[0]);
  // Nothing is left to arrive, and the mask is as it was.
  sigset_t set;
  sigpending(&set);
  EXPECT_EQ(sigismember(&set, SIGPIPE), 0);
  pthread_sigmask(SIG_BLOCK, nullptr, &set);
  EXPECT_EQ(sigismember(&set, SIGPIPE), 0);
}

}  // namespace
}  // namespace dsd
