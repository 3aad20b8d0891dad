// SPDX-License-Identifier: Apache-2.0
//
// Transfers with tensors on a device that faults when the host touches it and
// works as late or as early as it may: random plans and mixes of host and
// device, over a backend that moves only host memory and one that moves both.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/element_map.h"
#include "dsd/core/layout/random_layout.h"
#include "dsd/core/transfer/fake_device.h"
#include "dsd/core/transfer/transfer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::FakeDevice;
using ::dsd::test::FakeDeviceEndpoint;
using ::dsd::test::LayoutSpec;
using ::dsd::test::Random;
using ::dsd::test::Uniform;
using ::testing::HasSubstr;

// Ranks as threads; device memory moves if `cuda`.
std::vector<absl::Status> RunRanks(
    int size, bool cuda,
    const std::function<absl::Status(Communicator&)>& body) {
  const auto store = MakeInProcessStore(Env::Real());
  std::vector<absl::Status> statuses(size);
  std::vector<std::unique_ptr<EnvThread>> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.push_back(
        Env::Real()->StartThread(absl::StrCat("rank ", rank), [&, rank] {
          CommunicatorOptions options;
          options.rank = rank;
          options.world_size = size;
          options.store = store;
          options.backend = "local";
          if (cuda) options.descriptor = &test::FakeCudaBackend();
          statuses[rank] = [&]() -> absl::Status {
            DSD_ASSIGN_OR_RETURN(const auto comm,
                                 Communicator::Create(options));
            DSD_RETURN_IF_ERROR(body(*comm));
            return comm->Shutdown();
          }();
        }));
  }
  threads.clear();
  return statuses;
}

std::byte ByteOf(size_t tensor, int64_t index, int64_t b) {
  return static_cast<std::byte>(1 + 31 * tensor + 7 * index + 13 * b +
                                (index >> 5));
}

struct Tensor {
  std::string fqn;
  DType dtype;
  LayoutSpec from;
  LayoutSpec to;
};

// Where the tensors of one side of one rank are.
enum class Place { kHost, kDevice, kMixed };

std::vector<Tensor> RandomTensors(Random& random, int size) {
  const DType types[] = {DType::kUInt8, DType::kFloat16, DType::kFloat32,
                         DType::kInt64, DType::kComplex128};
  std::vector<Tensor> tensors(Uniform(random, 1, 5));
  test::RandomLayoutOptions options;
  for (int rank = 0; rank < size; ++rank) options.holders.push_back(rank);
  for (size_t t = 0; t < tensors.size(); ++t) {
    tensors[t].fqn = absl::StrCat("layer.", t, ".weight");
    tensors[t].dtype = types[Uniform(random, 0, 4)];
    const auto shape = test::RandomShape(random, 300);
    tensors[t].from = test::RandomLayoutSpec(random, shape, options);
    tensors[t].to = test::RandomLayoutSpec(random, shape, options);
  }
  return tensors;
}

// One rank's memory of one side.
class Side {
 public:
  Side(FakeDevice* device) : endpoint(device), device_(*device) {}

  absl::Status Fill(const std::vector<Tensor>& tensors, int rank,
                    bool is_source, Place place, Random& random) {
    for (size_t t = 0; t < tensors.size(); ++t) {
      const LayoutSpec& spec = is_source ? tensors[t].from : tensors[t].to;
      const int64_t item_size = ItemSize(tensors[t].dtype);
      const std::vector<int64_t> held = test::HoldersOf(spec);
      std::vector<int64_t> elements;
      if (std::count(held.begin(), held.end(), rank) > 0) {
        elements = test::LocalElements(spec, rank);
      }
      host_.emplace_back(elements.size() * item_size, std::byte{0xEE});
      std::vector<std::byte>& bytes = host_.back();
      for (size_t i = 0; is_source && i < elements.size(); ++i) {
        for (int64_t b = 0; b < item_size; ++b) {
          bytes[i * item_size + b] = ByteOf(t, elements[i], b);
        }
      }
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
      DSD_ASSIGN_OR_RETURN(Layout layout, test::BuildLayout(spec));
      DSD_RETURN_IF_ERROR(endpoint.AddLocal(
          {tensors[t].fqn, tensors[t].dtype, std::move(layout)}, rank, memory));
      if (on_device) endpoint.SetOnDevice();
    }
    return absl::OkStatus();
  }

  absl::Status Check(const std::vector<Tensor>& tensors, int rank) {
    for (size_t t = 0; t < tensors.size(); ++t) {
      const int64_t item_size = ItemSize(tensors[t].dtype);
      std::vector<std::byte>& bytes = host_[t];
      if (bytes.empty()) continue;
      if (memory_[t] != bytes.data()) {
        device_.CopyOut(memory_[t], absl::MakeSpan(bytes));
      }
      const std::vector<int64_t> elements =
          test::LocalElements(tensors[t].to, rank);
      for (size_t i = 0; i < elements.size(); ++i) {
        for (int64_t b = 0; b < item_size; ++b) {
          if (bytes[i * item_size + b] == ByteOf(t, elements[i], b)) continue;
          return absl::InternalError(absl::StrCat(
              "\"", tensors[t].fqn, "\" element ", elements[i], " on rank ",
              rank, " is wrong: ", tensors[t].from.ToString(), " -> ",
              tensors[t].to.ToString()));
        }
      }
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
        std::vector<Tensor> tensors;
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

// Storage that every rank can read.
class StorageEndpoint : public Endpoint {
 public:
  explicit StorageEndpoint(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) {
      const Dims shape(tensor.to.shape.begin(), tensor.to.shape.end());
      EXPECT_TRUE(
          catalog_.Add({tensor.fqn, tensor.dtype, Layout::Anywhere(shape)})
              .ok());
    }
  }
  const Catalog& catalog() const override { return catalog_; }
  absl::Status Read(size_t tensor, const Box& box, int64_t begin, int64_t end,
                    DType dtype, absl::Span<std::byte> out) override {
    const int64_t item_size = ItemSize(dtype);
    const Dims extents = box.extents();
    for (int64_t i = begin; i < end; ++i) {
      Dims at(box.ndim());
      int64_t rest = i;
      for (int d = box.ndim() - 1; d >= 0; --d) {
        at[d] = box.lo[d] + rest % extents[d];
        rest /= extents[d];
      }
      const int64_t index = FlatIndex(catalog_[tensor].shape(), at);
      for (int64_t b = 0; b < item_size; ++b) {
        out[(i - begin) * item_size + b] = ByteOf(tensor, index, b);
      }
    }
    return absl::OkStatus();
  }
  absl::Status Write(size_t, const Box&, int64_t, int64_t, DType,
                     absl::Span<const std::byte>) override {
    return absl::UnimplementedError("storage is read only");
  }

 private:
  Catalog catalog_;
};

TEST(DeviceTransferTest, StorageIsRelayedFromDevices) {
  Random random(test::TestSeed());
  constexpr int kRanks = 3;
  for (const bool cuda : {false, true}) {
    std::vector<std::vector<Tensor>> cases;
    for (int round = 0; round < 100; ++round) {
      cases.push_back(RandomTensors(random, kRanks));
    }
    const uint64_t seed = random();
    const auto statuses =
        RunRanks(kRanks, cuda, [&](Communicator& comm) -> absl::Status {
          Random mine(seed + comm.rank());
          for (const std::vector<Tensor>& tensors : cases) {
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
  Tensor tensor;
  tensor.fqn = "encoder.weight";
  tensor.dtype = DType::kFloat32;
  tensor.from.kind = LayoutSpec::Kind::kPlacements;
  tensor.from.shape = {64, 64};
  tensor.from.mesh_shape = {3};
  tensor.from.mesh_holders = {0, 1, 2};
  tensor.from.placements = {{'S', 0, 1}};
  tensor.to = tensor.from;
  tensor.to.placements = {{'S', 1, 1}};
  for (const bool cuda : {false, true}) {
    const auto statuses =
        RunRanks(3, cuda, [&](Communicator& comm) -> absl::Status {
          Random random(comm.rank());
          FakeDevice device(random());
          Side source(&device);
          Side target(&device);
          DSD_RETURN_IF_ERROR(
              source.Fill({tensor}, comm.rank(), true, Place::kDevice, random));
          DSD_RETURN_IF_ERROR(target.Fill({tensor}, comm.rank(), false,
                                          Place::kDevice, random));
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
