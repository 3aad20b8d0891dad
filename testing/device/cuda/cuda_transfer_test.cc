// SPDX-License-Identifier: Apache-2.0
//
// What moves tensors on CUDA gives bit for bit what it gives on the CPU. Needs
// a GPU: see testing/device/run_cuda_tests.sh.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/core/grad_mode.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/equal.h"
#include "ATen/ops/full.h"
#include "ATen/ops/randint.h"
#include "ATen/ops/tensor.h"
#include "ATen/ops/zeros.h"
#include "ATen/ops/zeros_like.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/element_map.h"
#include "dsd/core/layout/random_layout.h"
#include "dsd/core/tensor/tensor_endpoint.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/testing/device/cuda/cuda_job.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::DeviceUnderTest;
using ::dsd::test::KeepBusy;
using ::dsd::test::kHalfASecond;
using ::dsd::test::LayoutSpec;
using ::dsd::test::OnCuda;
using ::dsd::test::OtherStream;
using ::dsd::test::Random;
using ::dsd::test::Uniform;

#define DSD_REQUIRE(condition)                                      \
  do {                                                              \
    if (!(condition)) {                                             \
      return absl::InternalError(                                   \
          absl::StrCat(__FILE__, ":", __LINE__, ": ", #condition)); \
    }                                                               \
  } while (false)

at::Tensor AsBits(const at::Tensor& tensor) {
  return tensor.view(BitsOf(tensor.element_size()));
}

bool SameBits(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) {
    return false;
  }
  const at::Tensor host_a = AsBits(a).contiguous().cpu();
  const at::Tensor host_b = AsBits(b).contiguous().cpu();
  return a.numel() == 0 ||
         std::memcmp(host_a.const_data_ptr(), host_b.const_data_ptr(),
                     host_a.nbytes()) == 0;
}

// Random bits; numbers that any type has where they are to be converted.
at::Tensor RandomElements(Random& random, int64_t count, c10::ScalarType type,
                          bool numbers) {
  if (numbers) {
    std::vector<double> values(count);
    for (double& value : values) {
      value = static_cast<double>(Uniform(random, 0, 12000)) / 100;
    }
    return at::tensor(values, c10::kDouble).to(type);
  }
  at::Tensor elements = at::empty({count}, type);
  auto* const bytes = static_cast<uint8_t*>(elements.mutable_data_ptr());
  for (size_t i = 0; i < elements.nbytes(); ++i) {
    bytes[i] = static_cast<uint8_t>(random()) & (type == c10::kBool ? 1 : 0xFF);
  }
  return elements;
}

// The same values on `device`, now and then with random strides.
at::Tensor Placed(Random& random, const at::Tensor& values,
                  c10::Device device) {
  const int64_t dims = values.dim();
  if (Uniform(random, 0, 1) == 0) return values.clone().to(device);
  std::vector<int64_t> order;
  for (int64_t d = 0; d < dims; ++d) order.push_back(d);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<int64_t> padded;
  std::vector<int64_t> back(dims);
  for (int64_t i = 0; i < dims; ++i) {
    padded.push_back(values.size(order[i]) * 2 + 1);
    back[order[i]] = i;
  }
  at::Tensor place =
      at::zeros(
          padded,
          c10::TensorOptions(BitsOf(values.element_size())).device(device))
          .permute(back);
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t step = Uniform(random, 1, 2);
    place = place.slice(d, 1, 1 + values.size(d) * step, step);
  }
  place.copy_(AsBits(values).to(device));
  return place.view(values.scalar_type());
}

struct RandomTensor {
  std::string fqn;
  DType from_type;
  DType to_type;
  LayoutSpec from;
  LayoutSpec to;
  at::Tensor whole;  // flat
};

std::vector<RandomTensor> RandomTensors(Random& random, int ranks) {
  std::vector<RandomTensor> tensors(Uniform(random, 1, 6));
  test::RandomLayoutOptions options;
  for (int rank = 0; rank < ranks; ++rank) options.holders.push_back(rank);
  for (size_t t = 0; t < tensors.size(); ++t) {
    RandomTensor& tensor = tensors[t];
    tensor.fqn = absl::StrCat("t", t);
    const bool converts = Uniform(random, 0, 3) == 0;
    const DType numbers[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16,
                             DType::kBFloat16, DType::kInt32};
    if (converts) {
      tensor.from_type = numbers[Uniform(random, 0, 4)];
      tensor.to_type = numbers[Uniform(random, 0, 4)];
    } else {
      tensor.from_type = static_cast<DType>(Uniform(random, 0, kNumDTypes - 1));
      tensor.to_type = tensor.from_type;
    }
    const auto shape = test::RandomShape(random, 400);
    tensor.from = test::RandomLayoutSpec(random, shape, options);
    tensor.to = test::RandomLayoutSpec(random, shape, options);
    int64_t count = 1;
    for (const int64_t extent : shape) count *= extent;
    tensor.whole =
        RandomElements(random, count, ToScalarType(tensor.from_type), converts);
  }
  return tensors;
}

// This rank's part of all tensors, each on the CPU or, if `mixed`, on either
// device.
absl::StatusOr<std::vector<at::Tensor>> Fill(
    Random& random, const std::vector<RandomTensor>& tensors, Holder rank,
    bool is_source, bool mixed, TensorEndpoint& endpoint) {
  std::vector<at::Tensor> all;
  for (const RandomTensor& tensor : tensors) {
    const LayoutSpec& spec = is_source ? tensor.from : tensor.to;
    const DType dtype = is_source ? tensor.from_type : tensor.to_type;
    DSD_ASSIGN_OR_RETURN(const Layout layout, test::BuildLayout(spec));
    std::vector<at::Tensor> locals;
    const std::vector<int64_t> holders = test::HoldersOf(spec);
    if (std::count(holders.begin(), holders.end(), rank) > 0) {
      const std::vector<int64_t> elements = test::LocalElements(spec, rank);
      at::Tensor values = at::zeros({static_cast<int64_t>(elements.size())},
                                    BitsOf(ItemSize(dtype)))
                              .view(ToScalarType(dtype));
      if (is_source && !elements.empty()) {
        values = AsBits(tensor.whole)
                     .index({at::tensor(elements, c10::kLong)})
                     .view(ToScalarType(dtype));
      }
      std::vector<Dims> shapes;
      if (layout.kind() == Layout::Kind::kBoxes) {
        for (const LocalBox& box : layout.BoxesOf(rank)) {
          shapes.push_back(box.box.extents());
        }
      } else if (const auto shape = layout.LocalShape(rank)) {
        shapes.push_back(*shape);
      }
      const c10::Device device = mixed && Uniform(random, 0, 2) > 0
                                     ? DeviceUnderTest()
                                     : c10::Device(c10::kCPU);
      int64_t begin = 0;
      for (const Dims& shape : shapes) {
        int64_t count = 1;
        for (const int64_t extent : shape) count *= extent;
        locals.push_back(Placed(
            random, values.narrow(0, begin, count).view(ToIntArrayRef(shape)),
            mixed ? device : c10::Device(c10::kCPU)));
        begin += count;
      }
    }
    all.insert(all.end(), locals.begin(), locals.end());
    DSD_RETURN_IF_ERROR(
        endpoint.Add({tensor.fqn, dtype, layout}, rank, std::move(locals)));
  }
  return all;
}

TEST(CudaTransferTest, RandomMixesOfDevicesEqualTheCpu) {
  Random random(test::TestSeed());
  const int rounds = 120;
  for (int ranks = 1; ranks <= 3; ++ranks) {
    std::vector<std::vector<RandomTensor>> cases;
    std::vector<int64_t> chunks;
    for (int round = 0; round < rounds; ++round) {
      cases.push_back(RandomTensors(random, ranks));
      const int64_t sizes[] = {16, 100, 1000, int64_t{4} << 20};
      chunks.push_back(sizes[Uniform(random, 0, 3)]);
    }
    const uint64_t seed = random();
    const std::vector<absl::Status> statuses =
        RunRankThreads(ranks, [&](Communicator& comm) -> absl::Status {
          Random mine(seed + comm.rank());
          const at::NoGradGuard no_grad;
          for (int round = 0; round < rounds; ++round) {
            std::vector<at::Tensor> results[2];
            for (const bool mixed : {false, true}) {
              TensorEndpoint source(DeviceMesh::Iota({ranks}), comm.rank());
              TensorEndpoint target(DeviceMesh::Iota({ranks}), comm.rank());
              DSD_RETURN_IF_ERROR(
                  Fill(mine, cases[round], comm.rank(), true, mixed, source)
                      .status());
              DSD_ASSIGN_OR_RETURN(
                  results[mixed],
                  Fill(mine, cases[round], comm.rank(), false, mixed, target));
              TransferOptions options;
              options.chunk_bytes = chunks[round];
              DSD_ASSIGN_OR_RETURN(
                  const TransferStats stats,
                  Redistribute(source, target, &comm, options));
              DSD_REQUIRE(stats.bytes_staged_peak <= 9 * options.chunk_bytes);
            }
            for (size_t i = 0; i < results[0].size(); ++i) {
              if (!SameBits(results[0][i], results[1][i])) {
                return absl::InternalError(
                    absl::StrCat("round ", round, " result ", i, " on rank ",
                                 comm.rank(), " differs, type ",
                                 c10::toString(results[0][i].scalar_type()),
                                 " on ", results[1][i].device().str()));
              }
            }
          }
          return absl::OkStatus();
        });
    EXPECT_THAT(statuses, AllOk());
  }
}

absl::Status Move(const at::Tensor& from, const at::Tensor& to) {
  const DeviceMesh one = DeviceMesh::Iota({1});
  TensorEndpoint source(one, 0);
  TensorEndpoint target(one, 0);
  DSD_RETURN_IF_ERROR(source.Add("t", from));
  DSD_RETURN_IF_ERROR(target.Add("t", to));
  return Redistribute(source, target, nullptr).status();
}

TEST(CudaTransferTest, FollowsAProducerAndPrecedesTheNextOnAnyStream) {
  const c10::TensorOptions on_device =
      c10::TensorOptions(c10::kFloat).device(DeviceUnderTest());
  for (const bool other : {false, true}) {
    std::optional<OtherStream> stream;
    if (other) stream.emplace();
    at::Tensor from = at::zeros({3000, 1001}, on_device);
    // To the host: what is still being made.
    at::Tensor host = at::zeros({3000, 1001});
    test::Synchronize();
    KeepBusy();
    from.fill_(7);
    ASSERT_TRUE(Move(from, host).ok());
    from.fill_(8);
    EXPECT_TRUE(at::equal(host, at::full({3000, 1001}, 7.f)));
    // To the device: after what still reads or writes it, before what follows.
    at::Tensor to = at::zeros({3000, 1001}, on_device);
    test::Synchronize();
    KeepBusy();
    to.fill_(1);
    ASSERT_TRUE(Move(host, to).ok());
    const at::Tensor read = to.clone();
    to.fill_(2);
    EXPECT_TRUE(at::equal(read.cpu(), host));
    // Within the device nobody waits.
    test::Synchronize();
    KeepBusy();
    from.fill_(9);
    const absl::Time start = absl::Now();
    ASSERT_TRUE(Move(from.t(), to.t()).ok());
    const absl::Duration took = absl::Now() - start;
    from.fill_(10);
    const at::Tensor second = to.clone();
    to.fill_(3);
    EXPECT_TRUE(at::equal(second.cpu(), at::full({3000, 1001}, 9.f)));
    std::cout << "device to device with a busy stream: returned after " << took
              << "\n";
  }
}

TEST(CudaTransferTest, ADeadlineHoldsWhileAKernelRuns) {
  if (!OnCuda()) GTEST_SKIP() << "kernels of the CPU are done at once";
  const at::Tensor from =
      at::zeros({1 << 20}, c10::TensorOptions(c10::kFloat).device(c10::kCUDA));
  at::Tensor to = at::zeros({1 << 20});
  test::Synchronize();
  const DeviceMesh one = DeviceMesh::Iota({1});
  TensorEndpoint source(one, 0);
  TensorEndpoint target(one, 0);
  ASSERT_TRUE(source.Add("t", from).ok());
  ASSERT_TRUE(target.Add("t", to).ok());
  TransferOptions options;
  options.call.timeout = absl::Milliseconds(100);
  KeepBusy(6 * kHalfASecond);
  const absl::Time start = absl::Now();
  const auto moved = Redistribute(source, target, nullptr, options);
  EXPECT_THAT(moved.status(),
              IsStatus(absl::StatusCode::kDeadlineExceeded, "on rank 0"));
  EXPECT_LT(absl::Now() - start, absl::Seconds(1));
  test::Synchronize();
  EXPECT_TRUE(Move(from, to).ok());
}

TEST(CudaTransferTest, MisalignedPiecesOfMessages) {
  // A byte before each wider item.
  const DeviceMesh one = DeviceMesh::Iota({1});
  TensorEndpoint source(one, 0);
  TensorEndpoint target(one, 0);
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;
  for (const c10::ScalarType type :
       {c10::kByte, c10::kComplexDouble, c10::kByte, c10::kDouble, c10::kByte,
        c10::kFloat, c10::kByte, c10::kHalf}) {
    const at::Tensor values = at::randint(0, 100, {33}).to(type);
    const size_t i = pairs.size();
    pairs.emplace_back(values.to(DeviceUnderTest()), at::zeros({33}, type));
    ASSERT_TRUE(source.Add(absl::StrCat(i), pairs[i].first).ok());
    ASSERT_TRUE(target.Add(absl::StrCat(i), pairs[i].second).ok());
  }
  ASSERT_TRUE(Redistribute(source, target, nullptr).ok());
  for (const auto& [from, to] : pairs) EXPECT_TRUE(SameBits(from, to));
  // And back.
  TensorEndpoint back(one, 0);
  std::vector<at::Tensor> results;
  for (size_t i = 0; i < pairs.size(); ++i) {
    results.push_back(at::zeros_like(pairs[i].first));
    ASSERT_TRUE(back.Add(absl::StrCat(i), results[i]).ok());
  }
  ASSERT_TRUE(Redistribute(target, back, nullptr).ok());
  for (size_t i = 0; i < pairs.size(); ++i) {
    EXPECT_TRUE(SameBits(pairs[i].first, results[i]));
  }
}

}  // namespace
}  // namespace dsd
