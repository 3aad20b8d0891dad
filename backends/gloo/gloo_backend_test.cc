// SPDX-License-Identifier: Apache-2.0
//
// What is Gloo's own; what all backends must do is in testing/conformance.
// Ranks are threads here, so that leaks can be counted.

#include "dsd/backends/gloo/gloo_backend.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "dsd/backends/gloo/peer_connections.h"
#include "dsd/backends/gloo/sigpipe_block.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/socket.h"
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

// Rank 0 over Gloo, rank 1 by hand.
class OtherEndTest : public ::testing::Test {
 protected:
  void SetUp() override {
    EngineOptions options;
    options.world_size = 2;
    options.env = Env::Real();
    options.store = MakeInProcessStore(options.env);
    absl::StatusOr<std::unique_ptr<Engine>> engine =
        GlooBackend().create(options);
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
    absl::Status connected;
    std::thread connecting([&] { connected = engine_->Connect(deadline()); });
    options.rank = 1;
    const std::atomic<bool> cancelled{false};
    Waker waker = *Waker::Create();
    absl::StatusOr<std::vector<Socket>> sockets =
        ConnectPeers(options, "127.0.0.1", cancelled, waker, deadline());
    connecting.join();
    ASSERT_TRUE(sockets.ok()) << sockets.status();
    ASSERT_EQ(connected, absl::OkStatus());
    other_end_ = std::move((*sockets)[0]);
  }

  absl::Time deadline() { return Env::Real()->Now() + absl::Seconds(30); }

  absl::Status Receive(size_t size) {
    std::vector<std::byte> bytes(size);
    EngineRecv recv;
    recv.peer = 1;
    recv.tag = 7;
    recv.data = absl::MakeSpan(bytes);
    absl::StatusOr<std::unique_ptr<EngineBatch>> batch =
        engine_->Start({}, {recv});
    if (!batch.ok()) return batch.status();
    return (*batch)->Wait(deadline());
  }

  std::unique_ptr<Engine> engine_;
  Socket other_end_;
};

TEST_F(OtherEndTest, APeerThatGoesIsAnError) {
  other_end_.Close();
  EXPECT_EQ(Receive(10).code(), absl::StatusCode::kUnavailable);
}

// Gloo believes what it reads. That is an error and not the end of the process,
// whether the receive was posted before or not.
TEST_F(OtherEndTest, GarbageIsAnError) {
  // What Gloo puts before a message: size, kind, tag, offset, length, offset.
  const std::vector<uint64_t> longer = {48 + 100, 1, 7, 0, 100, 0};
  std::string text(reinterpret_cast<const char*>(longer.data()), 48);
  text += std::string(100, 'x');
  std::thread sending([&] {
    EXPECT_EQ(other_end_.WriteAll(Env::Real(), text, deadline()),
              absl::OkStatus());
  });
  const absl::Status status = Receive(10);
  sending.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
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

TEST(GlooBackendTest, EncryptionThatIsAskedForIsNotLeftOut) {
  setenv("GLOO_DEVICE_TRANSPORT", "TCP_TLS", 1);
  const std::vector<absl::Status> results =
      RunThreads([](Communicator& comm) { return comm.Barrier(); });
  unsetenv("GLOO_DEVICE_TRANSPORT");
  for (const absl::Status& status : results) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("GLOO_DEVICE_TRANSPORT=TCP_TLS"));
  }
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
