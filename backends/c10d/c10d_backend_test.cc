// SPDX-License-Identifier: Apache-2.0
//
// What is c10d's own; what all backends must do is in testing/conformance.

#include "dsd/backends/c10d/c10d_backend.h"

#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ATen/Functions.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/backends/c10d/own_group.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/engine.h"
#include "dsd/core/comm/tcp_store.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/testing/harness/rank_processes.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/csrc/distributed/c10d/Backend.hpp"
#include "torch/csrc/distributed/c10d/ProcessGroup.hpp"

namespace dsd {
namespace {

using Group = c10::intrusive_ptr<c10d::Backend>;
using ::testing::HasSubstr;

// The argument is the file in which the ranks of LibTorch meet.
absl::StatusOr<Group> MakeGroup(RankContext& rank) {
  signal(SIGPIPE, SIG_IGN);
  return MakeGlooGroup(rank.argument(), rank.rank(), rank.world_size());
}

std::vector<RankResult> RunWithFile(int ranks, absl::string_view program,
                                    RankRunOptions options = {}) {
  std::string path = absl::StrCat(getenv("TEST_TMPDIR"), "/c10d_XXXXXX");
  EXPECT_NE(mkdtemp(path.data()), nullptr);
  options.argument = path + "/store";
  return RunRanks(ranks, program, options);
}

absl::Status SumsUp(Group& group) {
  return TorchToStatus([&]() -> absl::Status {
    std::vector<at::Tensor> tensors = {
        at::full({3}, static_cast<float>(group->getRank() + 1), at::kFloat)};
    group->allreduce(tensors)->wait();
    const int size = group->getSize();
    const float expected = static_cast<float>(size * (size + 1)) / 2;
    return tensors[0].eq(expected).all().item<bool>()
               ? absl::OkStatus()
               : absl::InternalError("the group's own sum is wrong");
  });
}

// Messages of `bytes` from each rank to each, small and large ones mixed.
absl::Status AllToAll(Communicator& comm, size_t bytes) {
  std::vector<std::vector<std::byte>> out(comm.size());
  std::vector<std::vector<std::byte>> in(comm.size());
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  for (int peer = 0; peer < comm.size(); ++peer) {
    out[peer].assign(bytes, std::byte(16 * comm.rank() + peer));
    in[peer].resize(bytes);
    sends.push_back({peer, out[peer]});
    recvs.push_back({peer, absl::MakeSpan(in[peer])});
  }
  DSD_RETURN_IF_ERROR(comm.Exchange(sends, recvs, "all to all"));
  for (int peer = 0; peer < comm.size(); ++peer) {
    if (in[peer] !=
        std::vector<std::byte>(bytes, std::byte(16 * peer + comm.rank()))) {
      return absl::InternalError(absl::StrCat("from rank ", peer));
    }
  }
  return absl::OkStatus();
}

DSD_RANK_PROGRAM(SharesTheGroup) {
  DSD_ASSIGN_OR_RETURN(Group group, MakeGroup(rank));
  DSD_RETURN_IF_ERROR(SumsUp(group));
  // Two at once, one after another, and the group's own calls in between.
  for (int round = 0; round < 2; ++round) {
    DSD_ASSIGN_OR_RETURN(const auto comm, ConnectOverProcessGroup(group));
    DSD_ASSIGN_OR_RETURN(const auto other, ConnectOverProcessGroup(group));
    if (comm->backend() != "c10d") return absl::InternalError("backend");
    for (const size_t bytes : {0, 1, 20 << 10, (20 << 10) + 1, 5 << 20}) {
      DSD_RETURN_IF_ERROR(AllToAll(*comm, bytes));
      DSD_RETURN_IF_ERROR(SumsUp(group));
      DSD_RETURN_IF_ERROR(AllToAll(*other, bytes));
    }
    DSD_RETURN_IF_ERROR(other->Shutdown());
    DSD_RETURN_IF_ERROR(AllToAll(*comm, 100));
    DSD_RETURN_IF_ERROR(comm->Shutdown());
  }
  return SumsUp(group);
}

TEST(C10dBackendTest, SharesTheGroupWithItsUser) {
  for (const int ranks : {1, 2, 4}) {
    EXPECT_THAT(RunWithFile(ranks, "SharesTheGroup"), AllRanksOk()) << ranks;
  }
}

// One rank keeps groups that the other has destroyed, so that a new one has the
// address of an old one on one rank only.
DSD_RANK_PROGRAM(GroupsComeAndGo) {
  signal(SIGPIPE, SIG_IGN);
  std::vector<Group> kept;
  for (int round = 0; round < 4; ++round) {
    DSD_ASSIGN_OR_RETURN(Group group,
                         MakeGlooGroup(absl::StrCat(rank.argument(), round),
                                       rank.rank(), rank.world_size()));
    DSD_ASSIGN_OR_RETURN(const auto comm, ConnectOverProcessGroup(group));
    DSD_RETURN_IF_ERROR(AllToAll(*comm, 100 << 10));
    DSD_RETURN_IF_ERROR(comm->Shutdown());
    if (rank.rank() == 1) kept.push_back(group);
  }
  return absl::OkStatus();
}

TEST(C10dBackendTest, GroupsComeAndGo) {
  EXPECT_THAT(RunWithFile(2, "GroupsComeAndGo"), AllRanksOk());
}

DSD_RANK_PROGRAM(LosesARank) {
  DSD_ASSIGN_OR_RETURN(Group group, MakeGroup(rank));
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectOverProcessGroup(group));
  DSD_RETURN_IF_ERROR(comm->Barrier());
  rank.Reach("connected");
  return AllToAll(*comm, 32 << 20);
}

TEST(C10dBackendTest, DeathIsNamed) {
  for (int dead = 0; dead < 3; ++dead) {
    RankRunOptions options;
    options.kill_at = {{dead, "connected"}};
    const std::vector<RankResult> results =
        RunWithFile(3, "LosesARank", options);
    for (int rank = 0; rank < 3; ++rank) {
      if (rank == dead) continue;
      EXPECT_EQ(results[rank].status.code(), absl::StatusCode::kUnavailable)
          << ::testing::PrintToString(results[rank]);
      EXPECT_THAT(results[rank].status.message(),
                  HasSubstr(absl::StrCat("rank ", dead)));
    }
  }
}

// An engine over `group`, and a store that nobody else uses.
absl::StatusOr<std::unique_ptr<Engine>> ConnectEngine(RankContext& rank,
                                                      const Group& group) {
  EngineOptions options;
  options.rank = rank.rank();
  options.world_size = rank.world_size();
  options.env = Env::Real();
  const absl::Time deadline = options.env->Now() + absl::Seconds(30);
  std::unique_ptr<TcpStoreServer> server;
  if (rank.rank() == 0) {
    DSD_ASSIGN_OR_RETURN(server,
                         TcpStoreServer::Start(options.env, {}, deadline));
  }
  TcpStoreOptions client;
  DSD_ASSIGN_OR_RETURN(
      client.port, TorchToStatus([&] {
        std::vector<at::Tensor> tensors = {
            at::full({1}, server != nullptr ? server->port() : 0, at::kInt)};
        group->broadcast(tensors, c10d::BroadcastOptions())->wait();
        return tensors[0].item<int>();
      }));
  client.rank = rank.rank();
  DSD_ASSIGN_OR_RETURN(options.store,
                       ConnectTcpStore(options.env, client, deadline));
  if (server != nullptr) {
    options.store = MakeServedStore(std::move(server), options.store);
  }
  std::unique_ptr<Engine> engine = MakeC10dEngine(options, group);
  DSD_RETURN_IF_ERROR(engine->Connect(deadline));
  return engine;
}

// Cannot be aborted, as is LibTorch's default, and goes on when a wait for it
// is over.
class StubbornWork final : public c10d::Work {
 public:
  explicit StubbornWork(c10::intrusive_ptr<c10d::Work> work) {
    std::thread([work = std::move(work), state = state_] {
      std::exception_ptr error;
      try {
        work->wait(std::chrono::hours(24));
      } catch (...) {
        error = std::current_exception();
      }
      const std::lock_guard<std::mutex> lock(state->mu);
      state->done = true;
      state->error = error;
      state->changed.notify_all();
    }).detach();
  }

  bool wait(std::chrono::milliseconds timeout) override {
    std::unique_lock<std::mutex> lock(state_->mu);
    TORCH_CHECK(state_->changed.wait_for(lock, timeout,
                                         [this] { return state_->done; }),
                "not in time");
    if (state_->error != nullptr) std::rethrow_exception(state_->error);
    return true;
  }

 private:
  struct State {
    std::mutex mu;
    std::condition_variable changed;
    bool done = false;
    std::exception_ptr error;
  };
  const std::shared_ptr<State> state_ = std::make_shared<State>();
};

// Cannot be aborted, either.
class PlainWork final : public c10d::Work {
 public:
  explicit PlainWork(c10::intrusive_ptr<c10d::Work> work)
      : work_(std::move(work)) {}

  bool wait(std::chrono::milliseconds timeout) override {
    return work_->wait(timeout);
  }

 private:
  const c10::intrusive_ptr<c10d::Work> work_;
};

template <class WorkOfGroup>
class WrappedGroup final : public c10d::Backend {
 public:
  explicit WrappedGroup(Group to)
      : Backend(to->getRank(), to->getSize()), to_(std::move(to)) {}

  const std::string getBackendName() const override { return "wrapped"; }
  c10::intrusive_ptr<c10d::Work> broadcast(
      std::vector<at::Tensor>& tensors,
      const c10d::BroadcastOptions& options) override {
    return to_->broadcast(tensors, options);
  }
  c10::intrusive_ptr<c10d::Work> send(std::vector<at::Tensor>& tensors,
                                      int peer, int tag) override {
    return c10::make_intrusive<WorkOfGroup>(to_->send(tensors, peer, tag));
  }
  c10::intrusive_ptr<c10d::Work> recv(std::vector<at::Tensor>& tensors,
                                      int peer, int tag) override {
    return c10::make_intrusive<WorkOfGroup>(to_->recv(tensors, peer, tag));
  }
  c10::intrusive_ptr<c10d::Work> recvAnysource(std::vector<at::Tensor>& tensors,
                                               int tag) override {
    return c10::make_intrusive<WorkOfGroup>(to_->recvAnysource(tensors, tag));
  }

 private:
  const Group to_;
};

absl::Status UseAndAbort(RankContext& rank, const Group& group) {
  for (int round = 0; round < 2; ++round) {
    DSD_ASSIGN_OR_RETURN(const auto comm, ConnectOverProcessGroup(group));
    for (const size_t bytes : {0, 1, 20 << 10, (20 << 10) + 1, 5 << 20}) {
      DSD_RETURN_IF_ERROR(AllToAll(*comm, bytes));
    }
    DSD_RETURN_IF_ERROR(comm->Shutdown());
  }
  {
    DSD_ASSIGN_OR_RETURN(const auto comm, ConnectOverProcessGroup(group));
    // Rank 0 may hear of the abort in the first barrier, which rank 1 leaves.
    absl::Status status = comm->Barrier();
    if (rank.rank() == 1) {
      DSD_RETURN_IF_ERROR(status);
      comm->Abort(absl::UnknownError("on purpose"));
    }
    if (status.ok()) status = comm->Barrier();
    if (!absl::IsAborted(status)) {
      return absl::InternalError(absl::StrCat("barrier: ", status.ToString()));
    }
  }
  return absl::OkStatus();
}

DSD_RANK_PROGRAM(OverAStubbornGroup) {
  DSD_ASSIGN_OR_RETURN(const Group inner, MakeGroup(rank));
  return UseAndAbort(rank,
                     c10::make_intrusive<WrappedGroup<StubbornWork>>(inner));
}
DSD_RANK_PROGRAM(OverAPlainGroup) {
  DSD_ASSIGN_OR_RETURN(const Group inner, MakeGroup(rank));
  return UseAndAbort(rank, c10::make_intrusive<WrappedGroup<PlainWork>>(inner));
}

TEST(C10dBackendTest, EndsThoughWorksDoNot) {
  EXPECT_THAT(RunWithFile(2, "OverAStubbornGroup"), AllRanksOk());
  EXPECT_THAT(RunWithFile(2, "OverAPlainGroup"), AllRanksOk());
}

// What the engine had posted and the group still has comes when the memory is
// its owner's again.
DSD_RANK_PROGRAM(LateMessage) {
  constexpr size_t kBytes = 1 << 20;
  constexpr int kFirstSlot = 1 << 29;  // of the engine's first large receive
  DSD_ASSIGN_OR_RETURN(Group inner, MakeGroup(rank));
  DSD_ASSIGN_OR_RETURN(
      std::unique_ptr<Engine> engine,
      ConnectEngine(rank,
                    c10::make_intrusive<WrappedGroup<StubbornWork>>(inner)));
  std::vector<std::byte> data(kBytes, std::byte{7});
  std::unique_ptr<EngineBatch> batch;
  if (rank.rank() == 0) {
    const EngineRecv recv = {1, /*tag=*/5, absl::MakeSpan(data)};
    DSD_ASSIGN_OR_RETURN(batch, engine->Start({}, {recv}));
  }
  DSD_RETURN_IF_ERROR(SumsUp(inner));
  engine->Cancel();
  batch.reset();
  engine.reset();
  DSD_RETURN_IF_ERROR(SumsUp(inner));
  DSD_RETURN_IF_ERROR(TorchToStatus([&] {
    if (rank.rank() == 0) return;
    std::vector<at::Tensor> tensors = {
        at::full({static_cast<int64_t>(kBytes)}, 255, at::kByte)};
    inner->send(tensors, 0, kFirstSlot)->wait();
  }));
  DSD_RETURN_IF_ERROR(SumsUp(inner));
  return data == std::vector<std::byte>(kBytes, std::byte{7})
             ? absl::OkStatus()
             : absl::InternalError("written after the end");
}

TEST(C10dBackendTest, MemoryIsGivenBackThoughWorksGoOn) {
  EXPECT_THAT(RunWithFile(2, "LateMessage"), AllRanksOk());
}

// Message `tag`: its bytes follow from it.
std::vector<std::byte> MessageOf(uint64_t tag, size_t size) {
  std::vector<std::byte> bytes(size);
  for (size_t i = 0; i < size; ++i) {
    bytes[i] = std::byte((tag * 131 + i * 7) >> 3);
  }
  return bytes;
}

DSD_RANK_PROGRAM(RunsAhead) {
  constexpr int kMessages = 300;
  constexpr size_t kBytes = 16'000;  // of each; together far beyond a window
  constexpr absl::Duration kTimeout = absl::Seconds(40);
  Env* const env = Env::Real();
  DSD_ASSIGN_OR_RETURN(Group group, MakeGroup(rank));
  DSD_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine,
                       ConnectEngine(rank, group));
  std::vector<std::vector<std::byte>> messages;
  std::vector<std::unique_ptr<EngineBatch>> batches(kMessages);
  for (int tag = 0; tag < kMessages; ++tag) {
    messages.push_back(rank.rank() == 0 ? MessageOf(tag, kBytes)
                                        : std::vector<std::byte>(kBytes));
  }
  if (rank.rank() == 0) {
    for (int tag = 0; tag < kMessages; ++tag) {
      const EngineSend send = {1, static_cast<uint64_t>(tag), messages[tag]};
      DSD_ASSIGN_OR_RETURN(batches[tag], engine->Start({send}, {}));
    }
    // Of this error it is known that the engine survives it.
    const absl::Status early =
        batches.back()->Wait(env->Now() + absl::Milliseconds(300));
    if (!absl::IsDeadlineExceeded(early)) {
      return absl::InternalError(
          absl::StrCat("sent before it is expected: ", early.ToString()));
    }
  }
  DSD_RETURN_IF_ERROR(SumsUp(group));  // from here on rank 1 receives
  // The last one first: nothing that is not expected yet is in its way.
  for (int tag = kMessages - 1; tag >= 0; --tag) {
    if (rank.rank() == 1) {
      const EngineRecv recv = {0, static_cast<uint64_t>(tag),
                               absl::MakeSpan(messages[tag])};
      DSD_ASSIGN_OR_RETURN(batches[tag], engine->Start({}, {recv}));
    }
    DSD_RETURN_IF_ERROR(batches[tag]->Wait(env->Now() + kTimeout));
    if (messages[tag] != MessageOf(tag, kBytes)) {
      return absl::InternalError(absl::StrCat("message ", tag));
    }
  }
  batches.clear();
  return SumsUp(group);
}

TEST(C10dBackendTest, SmallMessagesWaitForASlowReceiver) {
  EXPECT_THAT(RunWithFile(2, "RunsAhead"), AllRanksOk());
}

// All ranks to all others at once, many windows, in orders of their own.
DSD_RANK_PROGRAM(ManyMessages) {
  constexpr int kMessages = 600;  // to each
  constexpr absl::Duration kTimeout = absl::Seconds(40);
  Env* const env = Env::Real();
  DSD_ASSIGN_OR_RETURN(Group group, MakeGroup(rank));
  DSD_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine,
                       ConnectEngine(rank, group));
  const auto tag_of = [](int from, int to, int i) {
    return static_cast<uint64_t>((from * 16 + to) * kMessages + i);
  };
  const auto size_of = [](uint64_t tag) -> size_t {
    const size_t size = tag * 7919 % 20'480;
    return tag % 50 == 0 ? 0 : tag % 40 == 0 ? 3 * size : size;
  };
  struct Transfer {
    bool is_send;
    int peer;
    uint64_t tag;
    std::vector<std::byte> bytes;
    std::unique_ptr<EngineBatch> batch;
  };
  std::vector<Transfer> transfers;
  for (int peer = 0; peer < rank.world_size(); ++peer) {
    if (peer == rank.rank()) continue;
    for (int i = 0; i < kMessages; ++i) {
      const uint64_t out = tag_of(rank.rank(), peer, i);
      transfers.push_back({true, peer, out, MessageOf(out, size_of(out)), {}});
      const uint64_t in = tag_of(peer, rank.rank(), i);
      // Some are shorter than what is expected.
      const size_t more = in % 9 == 0 ? 30'000 : in % 3;
      transfers.push_back(
          {false, peer, in, std::vector<std::byte>(size_of(in) + more), {}});
    }
  }
  std::mt19937 random(rank.rank());
  // Not quite at random: the far ends of a window meet the near ones.
  const size_t half = transfers.size() / 2;
  std::shuffle(transfers.begin(), transfers.begin() + half, random);
  std::shuffle(transfers.begin() + half, transfers.end(), random);
  for (Transfer& t : transfers) {
    const EngineSend send = {t.peer, t.tag, t.bytes};
    const EngineRecv recv = {t.peer, t.tag, absl::MakeSpan(t.bytes)};
    absl::StatusOr<std::unique_ptr<EngineBatch>> batch =
        t.is_send ? engine->Start({send}, {}) : engine->Start({}, {recv});
    DSD_RETURN_IF_ERROR(batch.status());
    t.batch = *std::move(batch);
  }
  for (Transfer& t : transfers) {
    DSD_RETURN_IF_ERROR(t.batch->Wait(env->Now() + kTimeout));
    t.bytes.resize(size_of(t.tag));
    if (t.bytes != MessageOf(t.tag, size_of(t.tag))) {
      return absl::InternalError(absl::StrCat("message ", t.tag));
    }
  }
  transfers.clear();
  DSD_RETURN_IF_ERROR(SumsUp(group));
  engine.reset();
  return SumsUp(group);
}

TEST(C10dBackendTest, NothingIsLostBeyondTheWindow) {
  for (const int ranks : {2, 3}) {
    EXPECT_THAT(RunWithFile(ranks, "ManyMessages"), AllRanksOk()) << ranks;
  }
}

// The ports at which this process listens.
std::vector<int> ListeningPorts() {
  std::vector<int> ports;
  for (int fd = 3; fd < 1024; ++fd) {
    int listens = 0;
    socklen_t size = sizeof(listens);
    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) != 0 ||
        listens == 0) {
      continue;
    }
    sockaddr_in name = {};
    socklen_t length = sizeof(name);
    if (getsockname(fd, reinterpret_cast<sockaddr*>(&name), &length) == 0 &&
        name.sin_family == AF_INET) {
      ports.push_back(ntohs(name.sin_port));
    }
  }
  return ports;
}

DSD_RANK_PROGRAM(StrangerAtTheStore) {
  DSD_ASSIGN_OR_RETURN(Group group, MakeGroup(rank));
  const std::vector<int> before = ListeningPorts();  // Gloo's
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectOverProcessGroup(group));
  if (rank.rank() == 0) {
    int stores = 0;
    for (const int port : ListeningPorts()) {
      if (std::count(before.begin(), before.end(), port) > 0) continue;
      ++stores;
      TcpStoreOptions stranger;
      stranger.port = port;
      stranger.rank = 1;
      const absl::Status status =
          ConnectTcpStore(comm->env(), stranger,
                          comm->env()->Now() + absl::Seconds(20))
              .status();
      if (!absl::IsPermissionDenied(status)) {
        return absl::InternalError(absl::StrCat("let in: ", status.ToString()));
      }
    }
    if (stores != 1)
      return absl::InternalError(absl::StrCat(stores, " stores"));
  }
  DSD_RETURN_IF_ERROR(AllToAll(*comm, 100));
  return comm->Shutdown();
}

TEST(C10dBackendTest, StrangersAreKeptOut) {
  EXPECT_THAT(RunWithFile(2, "StrangerAtTheStore"), AllRanksOk());
}

DSD_RANK_PROGRAM(WrongHost) {
  DSD_ASSIGN_OR_RETURN(Group group, MakeGroup(rank));
  ProcessGroupOptions options;
  options.store_host = "192.0.2.1";  // nobody's
  return ConnectOverProcessGroup(group, options).status();
}

TEST(C10dBackendTest, ErrorOfRankZeroIsEverybodys) {
  for (const RankResult& result : RunWithFile(2, "WrongHost")) {
    EXPECT_EQ(result.status.code(), absl::StatusCode::kFailedPrecondition)
        << ::testing::PrintToString(result);
    EXPECT_THAT(result.status.message(), HasSubstr("192.0.2.1"));
  }
}

TEST(C10dBackendTest, GroupsThatCannotServe) {
  EXPECT_EQ(ConnectOverProcessGroup(Group()).status().code(),
            absl::StatusCode::kInvalidArgument);
  const auto empty = c10::make_intrusive<c10d::ProcessGroup>(0, 2);
  const absl::Status status = ConnectOverProcessGroup(empty).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("host memory"));
}

}  // namespace
}  // namespace dsd
