// SPDX-License-Identifier: Apache-2.0
//
// What is Gloo's own; what all backends must do is in testing/conformance.
// Ranks are threads here, so that leaks can be counted.

#include "dsd/backends/gloo/gloo_backend.h"

#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "dsd/backends/gloo/sigpipe_block.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/testing/harness/abort_storm.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;

std::vector<absl::Status> RunThreads(
    absl::FunctionRef<absl::Status(Communicator&)> body,
    const std::string& bind_address = "") {
  RankThreadsOptions options;
  options.descriptor = &GlooBackend();
  options.bind_address = bind_address;
  options.shutdown = false;
  return RunRankThreads(2, body, options);
}

TEST(GlooBackendTest, AbortsAtRandomTimesLeaveNothingBehind) {
  test::AbortStormOptions options;
  options.threads.descriptor = &GlooBackend();
  options.rounds = 60;
  test::AbortStorm(options);
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
  const std::vector<absl::Status> results =
      RunThreads([](Communicator& comm) { return comm.Barrier(); },
                 "192.0.2.1");  // for documentation; nobody's
  for (const absl::Status& status : results) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("192.0.2.1"));
  }
}

TEST(GlooBackendTest, AnInterfaceThatIsNotHereIsNamed) {
  setenv("GLOO_SOCKET_IFNAME", "nosuch0", 1);
  const std::vector<absl::Status> results =
      RunThreads([](Communicator& comm) { return comm.Barrier(); });
  setenv("GLOO_SOCKET_IFNAME", "lo", 1);
  const std::vector<absl::Status> loopback =
      RunThreads([](Communicator& comm) { return comm.Shutdown(); });
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
