// SPDX-License-Identifier: Apache-2.0
//
// What needs a device, or the fake one: one rank that sends to itself, a rank
// that does not come, a kernel that waits in vain. Skipped with the reason
// where there is neither.

#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/backends/gloo/gloo_backend.h"
#include "dsd/backends/nccl/nccl_api.h"
#include "dsd/backends/nccl/nccl_backend.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/testing/conformance/conformance.h"
#include "dsd/testing/conformance/device_memory.h"
#include "dsd/testing/harness/rank_processes.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::HasSubstr;

constexpr size_t kMiB = size_t{1} << 20;
// Of a wait that ends at its deadline of a second or two, with the abort that
// follows.
constexpr absl::Duration kSoon = absl::Seconds(20);

#define DSD_SKIP_WITHOUT(ranks)                                         \
  if (const absl::Status status = NcclIsAvailable(ranks); !status.ok()) \
  GTEST_SKIP() << status.message()

absl::Time Soon() { return Env::Real()->Now() + absl::Seconds(60); }

TEST(NcclDeviceTest, TellsWhatItRunsOn) {
  DSD_SKIP_WITHOUT(1);
  std::cout << "NCCL " << NcclVersionText((*LoadNccl())->version) << std::endl;
}

// The whole way of a message, with one rank on one device: both ends are in one
// Start.
class OneRankTest : public ::testing::Test {
 protected:
  void SetUp() override {
    DSD_SKIP_WITHOUT(1);
    EngineOptions options;
    options.env = Env::Real();
    options.store = MakeInProcessStore(Env::Real());
    absl::StatusOr<std::unique_ptr<Engine>> engine =
        NcclBackend().create(options);
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
    ASSERT_EQ(engine_->Connect(Soon()), absl::OkStatus());
    auto stream = DeviceStream::Create();
    ASSERT_TRUE(stream.ok()) << stream.status();
    stream_ = *std::move(stream);
  }

  DeviceBuffer Make(const std::vector<std::byte>& bytes) {
    absl::StatusOr<DeviceBuffer> buffer =
        DeviceBuffer::Create(*stream_, bytes.size());
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    EXPECT_EQ(buffer->CopyFrom(bytes), absl::OkStatus());
    EXPECT_EQ(stream_->Synchronize(), absl::OkStatus());
    return *std::move(buffer);
  }

  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const std::byte> from, absl::Span<std::byte> to,
      uint64_t lane = 0) {
    return engine_->Start({{0, 1, from, stream_->space(), lane}},
                          {{0, 1, to, stream_->space(), lane}});
  }

  std::unique_ptr<Engine> engine_;
  std::unique_ptr<DeviceStream> stream_;
};

TEST_F(OneRankTest, SendsToItself) {
  for (const size_t size : {size_t{1}, size_t{1000}, kMiB, 64 * kMiB + 1}) {
    DeviceBuffer from = Make(Pattern(size, size));
    DeviceBuffer to = Make(Pattern(3, size));
    auto batch = Start(from.bytes(), to.bytes());
    ASSERT_TRUE(batch.ok()) << batch.status();
    EXPECT_EQ((*batch)->WaitReceived(0, Soon()), absl::OkStatus());
    EXPECT_EQ((*batch)->Wait(Soon()), absl::OkStatus());
    const auto found = to.Read();
    ASSERT_TRUE(found.ok()) << found.status();
    EXPECT_TRUE(*found == Pattern(size, size)) << size;
  }
}

TEST_F(OneRankTest, ComesAfterTheStreamAndBeforeWhatFollows) {
  const std::vector<std::byte> wanted = Pattern(1, kMiB);
  const std::vector<std::byte> noise = Pattern(2, kMiB);
  DeviceBuffer from = Make(noise);
  DeviceBuffer to = Make(noise);
  std::atomic<bool> go{false};
  ASSERT_EQ(stream_->Run([&] {
    while (!go) usleep(1000);
  }),
            absl::OkStatus());
  ASSERT_EQ(from.CopyFrom(wanted), absl::OkStatus());
  ASSERT_EQ(to.CopyFrom(noise), absl::OkStatus());
  auto batch = Start(from.bytes(), to.bytes());
  ASSERT_TRUE(batch.ok()) << batch.status();
  std::thread later([&] {
    usleep(50000);
    go = true;
  });
  EXPECT_EQ((*batch)->Wait(Soon()), absl::OkStatus());
  ASSERT_EQ(from.CopyFrom(noise), absl::OkStatus());
  const auto found = to.Read();
  later.join();
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_TRUE(*found == wanted);
}

TEST_F(OneRankTest, ManyAreUnderWayAtOnceOnTwoLanes) {
  ASSERT_EQ(engine_->OpenLane(77, Soon()), absl::OkStatus());
  std::vector<DeviceBuffer> from;
  std::vector<DeviceBuffer> to;
  std::vector<std::unique_ptr<EngineBatch>> batches;
  for (int i = 0; i < 40; ++i) {
    from.push_back(Make(Pattern(i, 100000 + i)));
    to.push_back(Make(Pattern(99, 100000 + i)));
    auto batch = Start(from.back().bytes(), to.back().bytes(), i % 2 * 77);
    ASSERT_TRUE(batch.ok()) << batch.status();
    batches.push_back(*std::move(batch));
  }
  for (int i = 40; i-- > 0;) {
    EXPECT_EQ(batches[i]->Wait(Soon()), absl::OkStatus());
    EXPECT_TRUE(*to[i].Read() == Pattern(i, 100000 + i)) << i;
  }
}

// Its stream does not get there: nothing has been launched when it is given up.
TEST_F(OneRankTest, ADeadlineEndsItAndFreesTheMemory) {
  std::atomic<bool> go{false};
  DeviceBuffer from = Make(Pattern(1, kMiB));
  DeviceBuffer to = Make(Pattern(2, kMiB));
  ASSERT_EQ(stream_->Run([&] {
    while (!go) usleep(1000);
  }),
            absl::OkStatus());
  {
    auto batch = Start(from.bytes(), to.bytes());
    ASSERT_TRUE(batch.ok()) << batch.status();
    const absl::Time start = Env::Real()->Now();
    const absl::Status status =
        (*batch)->Wait(Env::Real()->Now() + absl::Milliseconds(200));
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    batch->reset();
    EXPECT_LT(Env::Real()->Now() - start, kSoon);
  }
  go = true;
  EXPECT_TRUE(*to.Read() == Pattern(2, kMiB));
  EXPECT_EQ(Start(from.bytes(), to.bytes()).status().code(),
            absl::StatusCode::kAborted);
}

TEST_F(OneRankTest, CancelFromAnotherThreadEndsWhatIsUnderWay) {
  DeviceBuffer from = Make(Pattern(1, 16 * kMiB));
  DeviceBuffer to = Make(Pattern(2, 16 * kMiB));
  std::thread canceller([&] {
    usleep(20000);
    engine_->Cancel();
  });
  absl::Status status;
  while (status.ok()) {
    auto batch = Start(from.bytes(), to.bytes());
    status = batch.status();
    if (status.ok()) status = (*batch)->Wait(Soon());
  }
  canceller.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
}

TEST_F(OneRankTest, MemoryThatIsNotTheDevicesIsRefused) {
  std::vector<std::byte> host(100);
  DeviceBuffer to = Make(host);
  const absl::Status status = Start(host, to.bytes()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("is not"));
}

// --- Two ranks ---

// The other rank is there, but does not come to NCCL.
TEST(NcclAbsentRankTest, ConnectEndsAtItsDeadline) {
  DSD_SKIP_WITHOUT(1);
  const std::shared_ptr<Store> store = MakeInProcessStore(Env::Real());
  EngineOptions options;
  options.world_size = 2;
  options.env = Env::Real();
  options.store = store;
  auto engine = CreateNcclEngine(options, GlooBackend());
  ASSERT_TRUE(engine.ok()) << engine.status();
  options.rank = 1;
  options.store = MakePrefixStore("companion", store);
  auto other = GlooBackend().create(options);
  ASSERT_TRUE(other.ok()) << other.status();
  absl::Status connected;
  std::thread thread([&] { connected = (*other)->Connect(Soon()); });
  const absl::Time start = Env::Real()->Now();
  const absl::Status status = (*engine)->Connect(start + absl::Seconds(2));
  const absl::Duration took = Env::Real()->Now() - start;
  thread.join();
  EXPECT_EQ(connected, absl::OkStatus());
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  EXPECT_LT(took, kSoon);
  engine->reset();
  EXPECT_LT(Env::Real()->Now() - start, kSoon);
}

// A companion that says of every message that the other side is ready.
class RashEngine final : public Engine {
 public:
  explicit RashEngine(std::unique_ptr<Engine> to) : to_(std::move(to)) {}

  absl::Status Connect(absl::Time deadline) override {
    return to_->Connect(deadline);
  }
  absl::StatusOr<std::unique_ptr<EngineBatch>> Start(
      absl::Span<const EngineSend> sends,
      absl::Span<const EngineRecv> recvs) override {
    // The Communicator's own are longer.
    if (!recvs.empty() && recvs[0].data.size() == 1) {
      return std::make_unique<Done>();
    }
    return to_->Start(sends, recvs);
  }
  void Cancel() override { to_->Cancel(); }

 private:
  class Done final : public EngineBatch {
    absl::Status Wait(absl::Time) override { return absl::OkStatus(); }
    absl::Status WaitReceived(size_t, absl::Time) override {
      return absl::OkStatus();
    }
  };

  std::unique_ptr<Engine> to_;
};

absl::StatusOr<std::unique_ptr<Communicator>> ConnectRashly(RankContext& rank) {
  static constexpr BackendDescriptor kRash = {
      "rash",
      kEngineApiVersion,
      true,
      false,
      false,
      [](const EngineOptions& options)
          -> absl::StatusOr<std::unique_ptr<Engine>> {
        DSD_ASSIGN_OR_RETURN(auto engine, GlooBackend().create(options));
        return std::make_unique<RashEngine>(std::move(engine));
      }};
  static constexpr BackendDescriptor kDescriptor = {
      "rash nccl",
      kEngineApiVersion,
      true,
      true,
      false,
      [](const EngineOptions& options) {
        return CreateNcclEngine(options, kRash);
      }};
  WorldOptions options;
  options.descriptor = &kDescriptor;
  return ConnectWorld(rank.launch(), options);
}

// A kernel of rank 0 waits on the device for a message that never comes.
DSD_RANK_PROGRAM(AKernelThatWaits) {
  DSD_ASSIGN_OR_RETURN(const auto comm, ConnectRashly(rank));
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  DSD_ASSIGN_OR_RETURN(DeviceBuffer in, DeviceBuffer::Create(*stream, kMiB));
  const std::vector<std::byte> before = Pattern(5, kMiB);
  DSD_RETURN_IF_ERROR(in.CopyFrom(before));
  DSD_RETURN_IF_ERROR(stream->Synchronize());
  DSD_RETURN_IF_ERROR(comm->Barrier());
  const absl::Time start = comm->env()->Now();
  if (comm->rank() == 0) {
    std::thread aborter;
    CallOptions options;
    options.timeout = absl::Seconds(1);
    if (rank.argument() == "abort") {
      options.timeout = absl::Minutes(2);
      aborter = std::thread([&] {
        comm->env()->SleepUntil(comm->env()->Now() + absl::Milliseconds(300));
        comm->Abort(absl::UnknownError("on purpose"));
      });
    }
    const absl::Status status = comm->Exchange(
        {}, {{1, in.bytes(), stream->space()}}, "waits", options);
    if (aborter.joinable()) aborter.join();
    DSD_RETURN_IF_ERROR(Check(!status.ok(), "the message came"));
  } else {
    DSD_RETURN_IF_ERROR(WaitForFailure(*comm));
  }
  const absl::Duration took = comm->env()->Now() - start;
  rank.Record("took", absl::FormatDuration(took));
  DSD_RETURN_IF_ERROR(Check(took < kSoon, "the end took long"));
  // Nobody writes there any more.
  DSD_ASSIGN_OR_RETURN(const std::vector<std::byte> after, in.Read());
  DSD_RETURN_IF_ERROR(Check(after == before, "the memory has changed"));
  return Expect(comm->status(),
                rank.argument() == "abort"
                    ? absl::StatusCode::kAborted
                    : absl::StatusCode::kDeadlineExceeded,
                {});
}

TEST(NcclKernelTest, ThatWaitsEndsAtTheDeadline) {
  DSD_SKIP_WITHOUT(2);
  RankRunOptions options;
  options.argument = "deadline";
  const auto results = RunRanks(2, "AKernelThatWaits", options);
  EXPECT_THAT(results, AllRanksOk());
}

TEST(NcclKernelTest, ThatWaitsEndsByAbort) {
  DSD_SKIP_WITHOUT(2);
  RankRunOptions options;
  options.argument = "abort";
  const auto results = RunRanks(2, "AKernelThatWaits", options);
  EXPECT_THAT(results, AllRanksOk());
}

// --- Speed, for the record ---

DSD_RANK_PROGRAM(SpeedOfDeviceMemory) {
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect("nccl"));
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  for (const size_t size : {size_t{64} << 10, 4 * kMiB, 64 * kMiB}) {
    DSD_ASSIGN_OR_RETURN(DeviceBuffer memory,
                         DeviceBuffer::Create(*stream, size));
    constexpr int kRounds = 20;
    absl::Time start;
    for (int round = -2; round < kRounds; ++round) {
      if (round == 0) start = comm->env()->Now();
      if (comm->rank() == 0) {
        DSD_RETURN_IF_ERROR(comm->Exchange(
            {{1, memory.bytes(), stream->space()}}, {}, "speed"));
      } else {
        DSD_RETURN_IF_ERROR(comm->Exchange(
            {}, {{0, memory.bytes(), stream->space()}}, "speed"));
      }
    }
    const absl::Duration each = (comm->env()->Now() - start) / kRounds;
    rank.Record(absl::StrCat(size),
                absl::StrCat(absl::FormatDuration(each), " each, ",
                             size / absl::ToDoubleNanoseconds(each), " GB/s"));
  }
  return comm->Shutdown();
}

TEST(NcclSpeedTest, OfOneMessageAtATime) {
  DSD_SKIP_WITHOUT(2);
  const auto results = RunRanks(2, "SpeedOfDeviceMemory");
  EXPECT_THAT(results, AllRanksOk());
  for (const auto& [size, text] : results[1].values) {
    std::cout << size << " bytes from rank 0 to 1: " << text << std::endl;
  }
}

}  // namespace
}  // namespace dsd
