// SPDX-License-Identifier: Apache-2.0
//
// Transfers with tensors on a device that faults when the host touches it and
// works as late or as early as it may: random plans and mixes of host and
// device, over a backend that moves only host memory and one that moves both.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/random_layout.h"
#include "dsd/core/transfer/fake_device.h"
#include "dsd/core/transfer/random_tensors.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::FakeDevice;
using ::dsd::test::FakeDeviceEndpoint;
using ::dsd::test::OneToAll;
using ::dsd::test::Random;
using ::dsd::test::RandomTensors;
using ::dsd::test::RowsToColumns;
using ::dsd::test::StorageEndpoint;
using ::dsd::test::TensorCase;
using ::dsd::test::Uniform;
using ::testing::HasSubstr;

// Ranks as threads; device memory moves if `cuda`.
std::vector<absl::Status> RunRanks(
    int size, bool cuda, absl::FunctionRef<absl::Status(Communicator&)> body) {
  RankThreadsOptions options;
  if (cuda) options.descriptor = &test::FakeCudaBackend();
  return RunRankThreads(size, body, options);
}

// Where the tensors of one side of one rank are.
enum class Place { kHost, kDevice, kMixed };

// One rank's memory of one side.
class Side {
 public:
  Side(FakeDevice* device) : endpoint(device), device_(*device) {}

  absl::Status Fill(const std::vector<TensorCase>& tensors, int rank,
                    bool is_source, Place place, Random& random) {
    for (size_t t = 0; t < tensors.size(); ++t) {
      host_.push_back(test::LocalBytes(tensors, t, rank, is_source));
      std::vector<std::byte>& bytes = host_.back();
      const bool on_device =
          place == Place::kDevice ||
          (place == Place::kMixed && Uniform(random, 0, 1) == 0);
      std::byte* memory = bytes.data();
      if (on_device) {
        memory = device_.Allocate(bytes.size());
        device_.CopyIn(bytes, memory);
      } else if (Uniform(random, 0, 3) == 0) {
        device_.PageLock(absl::MakeSpan(bytes));
      }
      memory_.push_back(memory);
      DSD_ASSIGN_OR_RETURN(
          Layout layout,
          test::BuildLayout(is_source ? tensors[t].from : tensors[t].to));
      DSD_RETURN_IF_ERROR(endpoint.AddLocal(
          {tensors[t].fqn, tensors[t].dtype, std::move(layout)}, rank, memory));
      if (on_device) endpoint.SetOnDevice();
    }
    return absl::OkStatus();
  }

  absl::Status Check(const std::vector<TensorCase>& tensors, int rank) {
    for (size_t t = 0; t < tensors.size(); ++t) {
      std::vector<std::byte>& bytes = host_[t];
      if (memory_[t] != bytes.data()) {
        device_.CopyOut(memory_[t], absl::MakeSpan(bytes));
      }
      DSD_RETURN_IF_ERROR(test::CheckBytes(tensors, t, rank, bytes));
    }
    return absl::OkStatus();
  }

  FakeDeviceEndpoint endpoint;

 private:
  FakeDevice& device_;
  std::vector<std::vector<std::byte>> host_;
  std::vector<std::byte*> memory_;
};

TEST(DeviceTransferTest, RandomMixesArriveInBoundedMemory) {
  Random random(test::TestSeed());
  for (const bool cuda : {false, true}) {
    for (int size = 1; size <= 4; ++size) {
      struct Case {
        std::vector<TensorCase> tensors;
        int64_t chunk_bytes;
        std::vector<Place> places;  // source and target of each rank
        bool all_on_device;
        uint64_t seed;
      };
      std::vector<Case> cases;
      for (int round = 0; round < 100; ++round) {
        Case one;
        one.tensors = RandomTensors(random, size);
        const int64_t chunks[] = {16, 100, 1000, 10000};
        one.chunk_bytes = chunks[Uniform(random, 0, 3)];
        const int64_t kind = Uniform(random, 0, 2);
        for (int i = 0; i < 2 * size; ++i) {
          one.places.push_back(kind == 0 ? Place::kDevice
                               : kind == 1
                                   ? Place::kMixed
                                   : static_cast<Place>(Uniform(random, 0, 2)));
        }
        one.all_on_device = kind == 0;
        one.seed = random();
        cases.push_back(std::move(one));
      }
      const auto statuses =
          RunRanks(size, cuda, [&](Communicator& comm) -> absl::Status {
            const int rank = comm.rank();
            for (const Case& one : cases) {
              Random mine(one.seed + rank);
              FakeDevice device(mine());
              Side source(&device);
              Side target(&device);
              DSD_RETURN_IF_ERROR(source.Fill(one.tensors, rank, true,
                                              one.places[2 * rank], mine));
              DSD_RETURN_IF_ERROR(target.Fill(one.tensors, rank, false,
                                              one.places[2 * rank + 1], mine));
              TransferOptions options;
              options.chunk_bytes = one.chunk_bytes;
              DSD_ASSIGN_OR_RETURN(
                  const TransferStats stats,
                  Redistribute(source.endpoint, target.endpoint, &comm,
                               options));
              if (device.host_bytes_peak() > 4 * one.chunk_bytes ||
                  device.device_bytes_peak() > 5 * one.chunk_bytes ||
                  stats.bytes_staged_peak > 9 * one.chunk_bytes) {
                return absl::InternalError("staging is not bounded");
              }
              if (one.all_on_device && cuda && device.host_bytes_peak() > 0) {
                return absl::InternalError(
                    "device to device went through host memory");
              }
              DSD_RETURN_IF_ERROR(target.Check(one.tensors, rank));
            }
            return absl::OkStatus();
          });
      for (const absl::Status& status : statuses) {
        ASSERT_TRUE(status.ok()) << status << " cuda " << cuda;
      }
    }
  }
}

// Each rank sends on, from where it is, what has come to it.
TEST(DeviceTransferTest, LargeTensorsAreRelayed) {
  Random random(test::TestSeed());
  const std::vector<TensorCase> tensors = {OneToAll(4, 100001)};
  for (const bool cuda : {false, true}) {
    for (int round = 0; round < 8; ++round) {
      const uint64_t seed = random();
      const auto statuses =
          RunRanks(4, cuda, [&](Communicator& comm) -> absl::Status {
            const int rank = comm.rank();
            Random mine(seed + rank);
            FakeDevice device(mine());
            Side source(&device);
            Side target(&device);
            const auto place = static_cast<Place>(Uniform(mine, 0, 2));
            DSD_RETURN_IF_ERROR(
                source.Fill(tensors, rank, true, Place::kDevice, mine));
            DSD_RETURN_IF_ERROR(target.Fill(tensors, rank, false, place, mine));
            TransferOptions options;
            options.chunk_bytes = 10000;
            DSD_ASSIGN_OR_RETURN(
                const TransferStats stats,
                Redistribute(source.endpoint, target.endpoint, &comm, options));
            if (stats.bytes_sent > 4 * 100001) {
              return absl::InternalError("a rank sent more than it needs");
            }
            return target.Check(tensors, rank);
          });
      for (const absl::Status& status : statuses) {
        ASSERT_TRUE(status.ok()) << status << " cuda " << cuda;
      }
    }
  }
}

TEST(DeviceTransferTest, StorageIsRelayedFromDevices) {
  Random random(test::TestSeed());
  constexpr int kRanks = 3;
  for (const bool cuda : {false, true}) {
    std::vector<std::vector<TensorCase>> cases;
    for (int round = 0; round < 100; ++round) {
      cases.push_back(RandomTensors(random, kRanks));
    }
    const uint64_t seed = random();
    const auto statuses =
        RunRanks(kRanks, cuda, [&](Communicator& comm) -> absl::Status {
          Random mine(seed + comm.rank());
          for (const std::vector<TensorCase>& tensors : cases) {
            FakeDevice device(mine());
            StorageEndpoint source(tensors);
            Side target(&device);
            DSD_RETURN_IF_ERROR(
                target.Fill(tensors, comm.rank(), false,
                            static_cast<Place>(Uniform(mine, 0, 2)), mine));
            TransferOptions options;
            options.chunk_bytes = 500;
            DSD_RETURN_IF_ERROR(
                Redistribute(source, target.endpoint, &comm, options).status());
            DSD_RETURN_IF_ERROR(target.Check(tensors, comm.rank()));
          }
          return absl::OkStatus();
        });
    for (const absl::Status& status : statuses) {
      ASSERT_TRUE(status.ok()) << status << " cuda " << cuda;
    }
  }
}

class FailingEndpoint : public FakeDeviceEndpoint {
 public:
  using FakeDeviceEndpoint::FakeDeviceEndpoint;
  absl::Status WriteOnDevice(size_t tensor, const Box& box, int64_t begin,
                             int64_t end, DType dtype, DeviceStream& stream,
                             absl::Span<const std::byte> in) override {
    if (--writes_left_ < 0) return absl::ResourceExhaustedError("no room");
    return FakeDeviceEndpoint::WriteOnDevice(tensor, box, begin, end, dtype,
                                             stream, in);
  }
  int writes_left_ = 2;
};

TEST(DeviceTransferTest, AnErrorOnOneDeviceEndsTheTransferOnAllRanks) {
  const std::vector<TensorCase> tensors = {RowsToColumns(3)};
  for (const bool cuda : {false, true}) {
    const auto statuses =
        RunRanks(3, cuda, [&](Communicator& comm) -> absl::Status {
          Random random(comm.rank());
          FakeDevice device(random());
          Side source(&device);
          Side target(&device);
          DSD_RETURN_IF_ERROR(
              source.Fill(tensors, comm.rank(), true, Place::kDevice, random));
          DSD_RETURN_IF_ERROR(
              target.Fill(tensors, comm.rank(), false, Place::kDevice, random));
          TransferOptions options;
          options.chunk_bytes = 256;
          FailingEndpoint failing(&device);
          DSD_RETURN_IF_ERROR(failing.AddLocal(target.endpoint.catalog()[0],
                                               comm.rank(),
                                               device.Allocate(64 * 64 * 4)));
          failing.SetOnDevice();
          return Redistribute(source.endpoint,
                              comm.rank() == 1 ? failing : target.endpoint,
                              &comm, options)
              .status();
        });
    EXPECT_EQ(statuses[1].code(), absl::StatusCode::kResourceExhausted);
    for (const absl::Status& status : statuses) {
      EXPECT_FALSE(status.ok());
      EXPECT_THAT(status.message(), HasSubstr("rank 1"));
      EXPECT_THAT(status.message(), HasSubstr("no room"));
      EXPECT_THAT(status.message(), HasSubstr("encoder.weight"));
    }
  }
}

TEST(DeviceTransferTest, WorkThatDoesNotEndRunsIntoTheDeadline) {
  class Never : public DeviceStream {
   public:
    absl::StatusOr<std::byte*> AllocateHost(int64_t) override {
      return nullptr;
    }
    absl::StatusOr<std::byte*> AllocateDevice(int64_t) override {
      return nullptr;
    }
    bool IsPageLocked(const std::byte*) const override { return false; }
    absl::Status CopyOnDevice(const StridedView&, const StridedView&,
                              absl::Span<const int64_t>, int64_t) override {
      return absl::OkStatus();
    }
    absl::Status Submit() override { return absl::OkStatus(); }
    absl::Status CopyToHost(const std::byte*, std::byte*, int64_t) override {
      return absl::OkStatus();
    }
    absl::Status CopyToDevice(const std::byte*, std::byte*, int64_t) override {
      return absl::OkStatus();
    }
    absl::StatusOr<Position> Mark() override { return 1; }
    absl::StatusOr<bool> IsReached(Position) override { return false; }
    absl::Status Join() override { return absl::OkStatus(); }
    MemorySpace space() const override { return {}; }
  };
  Never never;
  EXPECT_EQ(WaitUntilReached(never, 1, Env::Real(),
                             Env::Real()->Now() + absl::Milliseconds(20))
                .code(),
            absl::StatusCode::kDeadlineExceeded);
}

}  // namespace
}  // namespace dsd
