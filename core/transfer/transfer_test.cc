// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/transfer.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/element_map.h"
#include "dsd/core/layout/random_layout.h"
#include "dsd/core/transfer/random_tensors.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::CheckSide;
using ::dsd::test::FillSide;
using ::dsd::test::MissingBytes;
using ::dsd::test::OneToAll;
using ::dsd::test::Random;
using ::dsd::test::RandomTensors;
using ::dsd::test::RowsToColumns;
using ::dsd::test::Side;
using ::dsd::test::StorageEndpoint;
using ::dsd::test::TensorCase;
using ::dsd::test::Uniform;
using ::testing::HasSubstr;

// Ranks as threads, connected once.
class Ranks {
 public:
  explicit Ranks(int size) : comms_(size) {
    const auto store = MakeInProcessStore(Env::Real());
    const std::vector<absl::Status> made =
        InThreads([&](int rank) -> absl::Status {
          CommunicatorOptions options;
          options.rank = rank;
          options.world_size = static_cast<int>(comms_.size());
          options.backend = "local";
          options.store = store;
          DSD_ASSIGN_OR_RETURN(comms_[rank], Communicator::Create(options));
          return absl::OkStatus();
        });
    for (const absl::Status& status : made) EXPECT_TRUE(status.ok()) << status;
  }

  ~Ranks() {
    InThreads([&](int rank) { return comms_[rank]->Shutdown(); });
  }

  std::vector<absl::Status> Run(
      const std::function<absl::Status(int, Communicator&)>& body) {
    return InThreads([&](int rank) { return body(rank, *comms_[rank]); });
  }

 private:
  std::vector<absl::Status> InThreads(
      const std::function<absl::Status(int)>& body) {
    std::vector<absl::Status> statuses(comms_.size());
    std::vector<std::unique_ptr<EnvThread>> threads;
    for (size_t rank = 0; rank < comms_.size(); ++rank) {
      threads.push_back(Env::Real()->StartThread(
          absl::StrCat("rank ", rank),
          [&, rank] { statuses[rank] = body(static_cast<int>(rank)); }));
    }
    threads.clear();
    return statuses;
  }

  std::vector<std::unique_ptr<Communicator>> comms_;
};

// Redistributes the tensors on all ranks, and checks what has arrived.
std::vector<absl::Status> MoveAndCheck(Ranks& ranks,
                                       const std::vector<TensorCase>& tensors,
                                       const TransferOptions& options,
                                       std::vector<TransferStats>& stats) {
  return ranks.Run([&](int rank, Communicator& comm) -> absl::Status {
    Side source;
    Side target;
    DSD_RETURN_IF_ERROR(FillSide(tensors, rank, true, source));
    DSD_RETURN_IF_ERROR(FillSide(tensors, rank, false, target));
    DSD_ASSIGN_OR_RETURN(
        stats[rank],
        Redistribute(source.endpoint, target.endpoint, &comm, options));
    return CheckSide(tensors, rank, target);
  });
}

TEST(TransferTest, RandomPairsMoveTheLowerBoundAndArriveRight) {
  Random random(test::TestSeed());
  for (int size = 1; size <= 4; ++size) {
    Ranks ranks(size);
    for (int round = 0; round < 150; ++round) {
      const std::vector<TensorCase> tensors = RandomTensors(random, size);
      TransferOptions options;
      const int64_t chunks[] = {16, 100, 1000, int64_t{4} << 20};
      options.chunk_bytes = chunks[Uniform(random, 0, 3)];
      std::vector<TransferStats> stats(size);
      const auto statuses = MoveAndCheck(ranks, tensors, options, stats);
      int64_t sent = 0;
      int64_t missing = 0;
      for (int rank = 0; rank < size; ++rank) {
        ASSERT_TRUE(statuses[rank].ok()) << statuses[rank];
        EXPECT_EQ(stats[rank].bytes_received, MissingBytes(tensors, rank));
        EXPECT_LE(stats[rank].bytes_staged_peak, 4 * options.chunk_bytes);
        sent += stats[rank].bytes_sent;
        missing += MissingBytes(tensors, rank);
      }
      ASSERT_EQ(sent, missing);
    }
  }
}

TEST(TransferTest, StorageIsReadOnceOverAllRanks) {
  Random random(test::TestSeed());
  Ranks ranks(4);
  for (int round = 0; round < 150; ++round) {
    const std::vector<TensorCase> tensors = RandomTensors(random, 4);
    std::atomic<int64_t> bytes_read = 0;
    TransferOptions options;
    options.chunk_bytes = Uniform(random, 16, 2000);
    const auto statuses =
        ranks.Run([&](int rank, Communicator& comm) -> absl::Status {
          StorageEndpoint source(tensors, &bytes_read);
          Side target;
          DSD_RETURN_IF_ERROR(FillSide(tensors, rank, false, target));
          DSD_RETURN_IF_ERROR(
              Redistribute(source, target.endpoint, &comm, options).status());
          return CheckSide(tensors, rank, target);
        });
    for (const absl::Status& status : statuses)
      ASSERT_TRUE(status.ok()) << status;
    int64_t needed = 0;
    for (const TensorCase& tensor : tensors) {
      for (const auto& holders : test::HoldersByElement(tensor.to)) {
        if (!holders.empty()) needed += ItemSize(tensor.dtype);
      }
    }
    ASSERT_EQ(bytes_read, needed);
  }
}

// What many need and one has: each sends on a part of it.
TEST(TransferTest, LargeTensorsAreRelayed) {
  constexpr int64_t kElements = 300001;
  for (const int size : {2, 3, 4}) {
    Ranks ranks(size);
    const std::vector<TensorCase> tensors = {OneToAll(size, kElements)};
    std::vector<TransferStats> stats(size);
    TransferOptions options;
    options.chunk_bytes = 10000;
    const auto statuses = MoveAndCheck(ranks, tensors, options, stats);
    for (int rank = 0; rank < size; ++rank) {
      ASSERT_TRUE(statuses[rank].ok()) << statuses[rank];
      EXPECT_EQ(stats[rank].bytes_received, rank == 0 ? 0 : 4 * kElements);
      EXPECT_LE(stats[rank].bytes_sent, 4 * kElements) << "rank " << rank;
      EXPECT_LE(stats[rank].bytes_staged_peak, 4 * options.chunk_bytes);
    }
  }
}

// What lies in memory as it does on the wire is neither packed nor unpacked,
// also next to what is.
TEST(TransferTest, MuchOfOneBoxNeedsNoStaging) {
  constexpr int64_t kLarge = 300001;
  for (const int64_t chunk_bytes : {10000, 1 << 20, 4 << 20}) {
    for (const bool with_small : {false, true}) {
      Ranks ranks(2);
      std::vector<TensorCase> tensors;
      const auto add = [&](const char* name, int64_t elements) {
        tensors.push_back(OneToAll(2, elements));
        tensors.back().fqn = name;
      };
      add("a", kLarge);
      if (with_small) add("b", 3);
      if (with_small) add("c", 5);
      add("d", 2 * kLarge);
      if (with_small) add("e", 7);
      std::vector<TransferStats> stats(2);
      TransferOptions options;
      options.chunk_bytes = chunk_bytes;
      const auto statuses = MoveAndCheck(ranks, tensors, options, stats);
      for (int rank = 0; rank < 2; ++rank) {
        ASSERT_TRUE(statuses[rank].ok()) << statuses[rank];
        if (with_small) {
          EXPECT_LE(stats[rank].bytes_staged_peak, 2 * chunk_bytes);
        } else if (chunk_bytes > kLarge * 4) {
          EXPECT_EQ(stats[rank].bytes_staged_peak, 0);
        }
      }
    }
  }
}

class FailingEndpoint : public MemoryEndpoint {
 public:
  // Others write through Write only.
  std::optional<StridedView> View(size_t tensor, const Box& box) override {
    if (!writes_) return std::nullopt;
    return MemoryEndpoint::View(tensor, box);
  }
  absl::Status Write(size_t tensor, const Box& box, int64_t begin, int64_t end,
                     DType dtype, absl::Span<const std::byte> in) override {
    if (--writes_left_ < 0)
      return absl::ResourceExhaustedError("no space left");
    writes_ = true;
    const absl::Status status =
        MemoryEndpoint::Write(tensor, box, begin, end, dtype, in);
    writes_ = false;
    return status;
  }

 private:
  bool writes_ = false;
  int writes_left_ = 2;
};

TEST(TransferTest, AnErrorOfOneEndpointEndsTheTransferOnAllRanks) {
  Ranks ranks(3);
  const std::vector<TensorCase> tensors = {RowsToColumns(3)};
  TransferOptions options;
  options.chunk_bytes = 256;
  const auto statuses =
      ranks.Run([&](int rank, Communicator& comm) -> absl::Status {
        Side source;
        Side target;
        DSD_RETURN_IF_ERROR(FillSide(tensors, rank, true, source));
        DSD_RETURN_IF_ERROR(FillSide(tensors, rank, false, target));
        if (rank != 1) {
          return Redistribute(source.endpoint, target.endpoint, &comm, options)
              .status();
        }
        FailingEndpoint failing;
        DSD_RETURN_IF_ERROR(failing.AddLocal(target.endpoint.catalog()[0], rank,
                                             target.buffers[0].data()));
        return Redistribute(source.endpoint, failing, &comm, options).status();
      });
  EXPECT_EQ(statuses[1].code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(statuses[1].message(), HasSubstr("encoder.weight"));
  EXPECT_THAT(statuses[1].message(), HasSubstr("rank 1"));
  for (int rank : {0, 2}) {
    EXPECT_FALSE(statuses[rank].ok());
    EXPECT_THAT(statuses[rank].message(), HasSubstr("rank 1"));
    EXPECT_THAT(statuses[rank].message(), HasSubstr("no space left"));
  }
}

// Nobody waits for that rank until the deadline.
TEST(TransferTest, AChunkSizeThatIsWrongOnOneRankIsEverybodysError) {
  Ranks ranks(3);
  const std::vector<TensorCase> tensors = {RowsToColumns(3)};
  const absl::Time start = Env::Real()->Now();
  const auto statuses =
      ranks.Run([&](int rank, Communicator& comm) -> absl::Status {
        Side source;
        Side target;
        DSD_RETURN_IF_ERROR(FillSide(tensors, rank, true, source));
        DSD_RETURN_IF_ERROR(FillSide(tensors, rank, false, target));
        TransferOptions options;
        if (rank == 1) options.chunk_bytes = 15;
        return Redistribute(source.endpoint, target.endpoint, &comm, options)
            .status();
      });
  EXPECT_LT(Env::Real()->Now() - start, absl::Minutes(1));
  EXPECT_EQ(statuses[1].code(), absl::StatusCode::kInvalidArgument);
  for (int rank : {0, 2}) {
    EXPECT_EQ(statuses[rank].code(), absl::StatusCode::kAborted);
    EXPECT_THAT(statuses[rank].message(), HasSubstr("rank 1"));
    EXPECT_THAT(statuses[rank].message(), HasSubstr("chunk_bytes is 15"));
  }
}

// What Redistribute returns on two ranks, whose options `prepare` makes.
std::vector<absl::Status> MoveRowsToColumns(
    const std::function<void(int, Env*, CallOptions&)>& prepare) {
  Ranks ranks(2);
  const std::vector<TensorCase> tensors = {RowsToColumns(2)};
  return ranks.Run([&](int rank, Communicator& comm) -> absl::Status {
    Side source;
    Side target;
    DSD_RETURN_IF_ERROR(FillSide(tensors, rank, true, source));
    DSD_RETURN_IF_ERROR(FillSide(tensors, rank, false, target));
    TransferOptions options;
    options.chunk_bytes = 256;
    prepare(rank, comm.env(), options.call);
    return Redistribute(source.endpoint, target.endpoint, &comm, options)
        .status();
  });
}

TEST(TransferTest, ACancelOnOneRankEndsItOnAll) {
  for (const bool at_once : {true, false}) {
    std::atomic<bool> cancel = at_once;
    const auto statuses =
        MoveRowsToColumns([&](int rank, Env*, CallOptions& call) {
          if (rank != 0) return;
          call.cancel = &cancel;
          call.progress = [&](const Progress& progress) {
            if (progress.bytes_done > 0) cancel = true;
          };
        });
    for (const absl::Status& status : statuses) {
      EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
    }
  }
}

// Agreeing and moving have one deadline: a rank that has waited for the other
// to agree does not begin anew.
TEST(TransferTest, TheDeadlineIsThatOfTheWholeCall) {
  const auto statuses =
      MoveRowsToColumns([](int rank, Env* env, CallOptions& call) {
        if (rank == 0) {
          call.timeout = absl::Seconds(1);
          return;
        }
        const auto pause = [env] {
          env->SleepUntil(env->Now() + absl::Milliseconds(700));
        };
        pause();
        call.progress = [pause, paused = false](const Progress&) mutable {
          if (!std::exchange(paused, true)) pause();
        };
      });
  EXPECT_FALSE(statuses[0].ok());
}

TEST(TransferTest, APlanWithOthersNeedsACommunicator) {
  const std::vector<TensorCase> tensors = {RowsToColumns(2)};
  Side source;
  Side target;
  ASSERT_TRUE(FillSide(tensors, 0, true, source).ok());
  ASSERT_TRUE(FillSide(tensors, 0, false, target).ok());
  const Binding binding(2);
  const auto plan =
      PlanForRank(0, source.endpoint.catalog(), target.endpoint.catalog(),
                  {{0, 0}}, binding, binding);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(Transfer(*plan, source.endpoint, target.endpoint, nullptr)
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(AgreeTest, EqualRanksAgree) {
  Ranks ranks(4);
  for (const absl::Status& status : ranks.Run([](int, Communicator& comm) {
         return Agree(&comm, "save", DigestBuilder().Add(1).Finish(),
                      absl::OkStatus(), [] { return std::string("never"); });
       })) {
    EXPECT_TRUE(status.ok()) << status;
  }
}

TEST(AgreeTest, EveryRankGetsTheSameVerdict) {
  Ranks ranks(4);
  std::vector<absl::Status> statuses = ranks.Run([](int rank,
                                                    Communicator& comm) {
    return Agree(&comm, "save", DigestBuilder().Add(rank == 2 ? 1 : 0).Finish(),
                 absl::OkStatus(),
                 [&] { return absl::StrCat("step ", rank == 2 ? 1 : 0); });
  });
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(statuses[0].message(), HasSubstr("rank 2: step 1"));
  for (const absl::Status& status : statuses) EXPECT_EQ(status, statuses[0]);

  statuses = ranks.Run([](int rank, Communicator& comm) {
    return Agree(&comm, "load", Digest(),
                 rank % 2 == 0 ? absl::OkStatus()
                               : absl::NotFoundError("no such directory"),
                 [] { return std::string(); });
  });
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(statuses[0].message(), "load: ranks 1, 3: no such directory");
  for (const absl::Status& status : statuses) EXPECT_EQ(status, statuses[0]);

  statuses = ranks.Run([](int, Communicator& comm) {
    return Agree(&comm, "load", Digest(), absl::NotFoundError("nothing there"),
                 [] { return std::string(); });
  });
  EXPECT_EQ(statuses[3].message(), "load: nothing there");
}

}  // namespace
}  // namespace dsd
