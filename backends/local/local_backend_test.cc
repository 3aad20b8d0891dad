// SPDX-License-Identifier: Apache-2.0

#include "dsd/backends/local/local_backend.h"

#include <atomic>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/store.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::AnyOf;
using ::testing::Each;
using ::testing::ElementsAre;

TEST(LocalBackendTest, RanksExchangeAndReduce) {
  EXPECT_THAT(
      RunRankThreads(4,
                     [](Communicator& comm) {
                       std::vector<int32_t> data(300000, comm.rank() + 1);
                       const absl::Span<std::byte> bytes(
                           reinterpret_cast<std::byte*>(data.data()),
                           data.size() * sizeof(int32_t));
                       const absl::Status status =
                           comm.AllReduce(bytes, DType::kInt32, ReduceOp::kSum);
                       EXPECT_EQ(data[123456], 10);
                       return status;
                     }),
      AllOk());
}

// An engine whose connections break while all ranks live.
class BreakingEngine final : public Engine {
 public:
  explicit BreakingEngine(std::unique_ptr<Engine> engine)
      : engine_(std::move(engine)) {}

  absl::Status Connect(absl::Time deadline) override {
    return engine_->Connect(deadline);
  }
  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override {
    if (is_broken) return absl::UnavailableError("connection reset by peer");
    return engine_->Start(sends, recvs);
  }
  void Cancel() override { engine_->Cancel(); }

  static inline std::atomic<bool> is_broken{false};

 private:
  const std::unique_ptr<Engine> engine_;
};

// Who waits for a verdict about the others still keeps its deadline.
TEST(LocalBackendTest, ABrokenConnectionIsAnErrorByTheDeadline) {
  BackendDescriptor descriptor = LocalBackend();
  descriptor.create = [](const EngineOptions& options)
      -> absl::StatusOr<std::unique_ptr<Engine>> {
    DSD_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine,
                         LocalBackend().create(options));
    return std::make_unique<BreakingEngine>(std::move(engine));
  };
  RankThreadsOptions options;
  options.descriptor = &descriptor;
  options.shutdown = false;
  std::atomic<bool> connected[2] = {};
  BreakingEngine::is_broken = false;
  RunRankThreads(
      2,
      [&](Communicator& comm) {
        connected[comm.rank()] = true;
        while (!connected[1 - comm.rank()]) std::this_thread::yield();
        BreakingEngine::is_broken = true;
        CallOptions call;
        call.timeout = absl::Milliseconds(10);
        const absl::Time start = comm.env()->Now();
        const absl::Status status = comm.Barrier(call);
        EXPECT_FALSE(status.ok());
        // The verdict itself is waited for up to 5 s.
        EXPECT_LT(comm.env()->Now() - start, absl::Seconds(4));
        return status;
      },
      options);
}

TEST(LocalBackendTest, LeavingWithoutShutdownFailsTheOthers) {
  RankThreadsOptions options;
  options.shutdown = false;
  const std::vector<absl::Status> statuses = RunRankThreads(
      3,
      [](Communicator& comm) {
        return comm.rank() == 1 ? absl::OkStatus() : comm.Barrier();
      },
      options);
  EXPECT_THAT(statuses,
              ElementsAre(IsStatus(absl::StatusCode::kUnavailable, "rank 1"),
                          absl::OkStatus(),
                          IsStatus(absl::StatusCode::kUnavailable, "rank 1")));
}

// A lane of its own communicator, which is destroyed with the others' while
// `use` runs in another thread.
std::vector<absl::Status> LanesThatAreLeft(
    absl::FunctionRef<absl::Status(Communicator& lane)> use,
    bool shutdown = false) {
  const std::shared_ptr<Store> store = MakeInProcessStore(Env::Real());
  std::vector<absl::Status> used(3);
  RankThreadsOptions options;
  options.shutdown = false;
  EXPECT_THAT(
      RunRankThreads(
          3,
          [&](Communicator& outer) -> absl::Status {
            DSD_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> comm,
                                 Communicator::Create(RankThreadCommunicator(
                                     outer.rank(), 3, store)));
            DSD_ASSIGN_OR_RETURN(const std::unique_ptr<Communicator> lane,
                                 comm->OpenLane("lane"));
            // All have it.
            DSD_RETURN_IF_ERROR(comm->Barrier());
            auto thread = Env::Real()->StartThread(
                "use", [&] { used[outer.rank()] = use(*lane); });
            if (shutdown) DSD_RETURN_IF_ERROR(comm->Shutdown());
            DSD_RETURN_IF_ERROR(outer.Barrier());
            comm.reset();
            thread.reset();
            return outer.Barrier();
          },
          options),
      AllOk());
  return used;
}

// What waits on a lane when all communicators go ends then, and not at its
// deadline or when somebody dies, of which nobody would hear any more.
TEST(LocalBackendTest, ACallOnALaneEndsWithItsCommunicator) {
  for (const bool shutdown : {false, true}) {
    const absl::Time start = Env::Real()->Now();
    const std::vector<absl::Status> used = LanesThatAreLeft(
        [](Communicator& lane) {
          std::vector<std::byte> in(10);
          return lane.Exchange(
              {}, {{(lane.rank() + 1) % 3, absl::MakeSpan(in)}}, "never");
        },
        shutdown);
    EXPECT_LT(Env::Real()->Now() - start, absl::Seconds(60));
    EXPECT_THAT(used, Each(AnyOf(IsStatus(absl::StatusCode::kFailedPrecondition,
                                          "was destroyed on rank"),
                                 IsStatus(absl::StatusCode::kFailedPrecondition,
                                          "after Shutdown"))));
  }
}

TEST(LocalBackendTest, LanesThatAreLeftFail) {
  EXPECT_THAT(
      LanesThatAreLeft([](Communicator& lane) {
        while (lane.status().ok()) std::this_thread::yield();
        return lane.Barrier();
      }),
      Each(IsStatus(absl::StatusCode::kFailedPrecondition, "was not started")));
}

// All ranks return an error that they agree on, none calls Shutdown, and one is
// slow to take the message that lets it return.
TEST(LocalBackendTest, RanksThatGiveUpTogetherDoNotBlameEachOther) {
  RankThreadsOptions options;
  options.shutdown = false;
  const absl::Status verdict = absl::NotFoundError("no such checkpoint");
  const std::vector<absl::Status> statuses = RunRankThreads(
      3,
      [&](Communicator& comm) -> absl::Status {
        std::vector<std::byte> in(1);
        const std::vector<std::byte> out(1);
        DSD_ASSIGN_OR_RETURN(
            PendingExchange pending,
            comm.StartExchange({{(comm.rank() + 1) % 3, out}},
                               {{(comm.rank() + 2) % 3, absl::MakeSpan(in)}},
                               "verdict"));
        // The others have left by then, or are about to.
        if (comm.rank() == 2) {
          comm.env()->SleepUntil(comm.env()->Now() + absl::Milliseconds(100));
        }
        DSD_RETURN_IF_ERROR(pending.Wait());
        return verdict;
      },
      options);
  EXPECT_THAT(statuses, ElementsAre(verdict, verdict, verdict));
}

TEST(LocalBackendTest, AnAbsentRankIsNamed) {
  RankThreadsOptions options;
  options.connect_timeout = absl::Milliseconds(50);
  options.absent = {2};
  const std::vector<absl::Status> statuses = RunRankThreads(
      3, [](Communicator& comm) { return comm.Barrier(); }, options);
  EXPECT_THAT(statuses[0],
              IsStatus(absl::StatusCode::kDeadlineExceeded, "rank 2 of 3"));
  EXPECT_THAT(statuses[1],
              IsStatus(absl::StatusCode::kDeadlineExceeded, "rank 2 of 3"));
}

}  // namespace
}  // namespace dsd
