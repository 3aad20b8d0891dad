// SPDX-License-Identifier: Apache-2.0
//
// ClipGradNorm on shards against torch's clip_grad_norm_ on the whole. Ranks
// are threads.

#include "dsd/frontends/parallel/clip_grad_norm.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ATen/CPUGeneratorImpl.h"
#include "ATen/Functions.h"
#include "ATen/Parallel.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/layout/placement.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/frontends/parallel/fully_shard.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "torch/nn/modules/container/sequential.h"
#include "torch/nn/modules/linear.h"
#include "torch/nn/utils/clip_grad.h"

namespace dsd {
namespace {

namespace nn = torch::nn;
using ::at::Tensor;
using ::testing::HasSubstr;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Runs `body` on ranks that are threads; exceptions are errors of the test.
void RunRanks(int world_size, const std::function<void(Communicator&)>& body) {
  EXPECT_THAT(RunRankThreads(world_size,
                             [&](Communicator& comm) -> absl::Status {
                               at::set_num_threads(1);
                               return TorchToStatus([&] { body(comm); });
                             }),
              AllOk());
}

// 7 and 3 rows: uneven and empty shards over 4 ranks. With a context each layer
// is a unit.
std::shared_ptr<nn::SequentialImpl> Net(
    const std::shared_ptr<FullyShardContext>& context) {
  // The generator of LibTorch is the process's: one rank at a time builds.
  static absl::Mutex mu(absl::kConstInit);
  absl::MutexLock lock(&mu);
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  generator.set_current_seed(17);
  auto net = std::make_shared<nn::SequentialImpl>();
  for (const auto& [in, out] : {std::make_pair(5, 7), std::make_pair(7, 3)}) {
    const auto layer =
        std::make_shared<nn::LinearImpl>(nn::LinearOptions(in, out));
    if (context == nullptr) {
      net->push_back(layer);
    } else {
      net->push_back(MakeFullyShard<Tensor(Tensor)>(layer, context));
    }
  }
  return net;
}

Tensor Loss(nn::SequentialImpl& net, int rank) {
  const Tensor x = at::arange(20, at::kFloat).view({4, 5}) * 0.3 + rank;
  return net.forward(x).pow(2).mean();
}

// A parameter with this gradient.
Tensor WithGradient(const Tensor& gradient) {
  Tensor parameter = at::zeros_like(gradient).set_requires_grad(true);
  parameter.mutable_grad() = gradient.clone();
  return parameter;
}

// Beside the units: one that is equal on all ranks, and one without a gradient.
std::vector<Tensor> PlainParameters() {
  return {WithGradient(at::arange(6, at::kFloat) - 2.5),
          at::ones({3}).set_requires_grad(true)};
}

std::vector<Tensor> Join(std::vector<Tensor> a, const std::vector<Tensor>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// This rank's part of the gradient of the whole parameter.
Tensor PartOf(const Tensor& whole, const Tensor& parameter) {
  const std::optional<Sharding> sharding =
      ShardingTable::Global().Find(parameter);
  if (!sharding.has_value()) return whole;
  const std::vector<LocalBox> boxes =
      sharding->layout.BoxesOf(sharding->holder);
  if (boxes.empty()) return whole.narrow(0, 0, 0);
  return whole.narrow(0, boxes[0].box.lo[0], boxes[0].box.extent(0));
}

void ExpectAsTorch(int world_size, double max_norm, double norm_type) {
  SCOPED_TRACE(absl::StrCat(world_size, " ranks, max_norm ", max_norm,
                            ", norm_type ", norm_type));
  const auto dense = Net(nullptr);
  for (int rank = 0; rank < world_size; ++rank) {
    (Loss(*dense, rank) / world_size).backward();
  }
  const std::vector<Tensor> whole =
      Join(dense->parameters(), PlainParameters());
  const double expected =
      nn::utils::clip_grad_norm_(whole, max_norm, norm_type);
  std::vector<double> norms(world_size);
  RunRanks(world_size, [&](Communicator& comm) {
    const auto net = Net(std::make_shared<FullyShardContext>(&comm));
    Loss(*net, comm.rank()).backward();
    const std::vector<Tensor> mine = Join(net->parameters(), PlainParameters());
    const absl::StatusOr<double> norm =
        ClipGradNorm(mine, max_norm, &comm, norm_type);
    ASSERT_TRUE(norm.ok()) << norm.status();
    norms[comm.rank()] = *norm;
    ASSERT_EQ(mine.size(), whole.size());
    for (size_t i = 0; i < mine.size(); ++i) {
      ASSERT_EQ(mine[i].grad().defined(), whole[i].grad().defined()) << i;
      if (!mine[i].grad().defined()) continue;
      const Tensor part = PartOf(whole[i].grad(), mine[i]);
      EXPECT_EQ(mine[i].grad().sizes(), part.sizes());
      EXPECT_TRUE(mine[i].grad().allclose(part, 1e-5, 1e-7))
          << "rank " << comm.rank() << ", parameter " << i << ": "
          << mine[i].grad() << ", expected " << part;
    }
  });
  EXPECT_NEAR(norms[0], expected, 1e-5 * expected);
  for (const double norm : norms) {
    EXPECT_EQ(std::memcmp(&norm, norms.data(), sizeof(norm)), 0);
  }
}

TEST(ClipGradNormTest, AsTorchOnTheDenseModel) {
  for (const int world_size : {1, 2, 4}) {
    for (const double norm_type : {1.0, 2.0, 3.5, kInfinity}) {
      for (const double max_norm : {0.0, 0.1, 1000.0}) {
        ExpectAsTorch(world_size, max_norm, norm_type);
      }
    }
  }
}

// Rows over one dimension of the mesh, replicas over the other.
TEST(ClipGradNormTest, ReplicasCountOnce) {
  const Tensor whole = at::arange(15, at::kDouble).view({5, 3});
  const DeviceMesh mesh = DeviceMesh::Iota({2, 2});
  const Placement placements[] = {Replicate(), Shard(0)};
  const absl::StatusOr<Layout> layout =
      Layout::FromPlacements({5, 3}, mesh, placements);
  ASSERT_TRUE(layout.ok()) << layout.status();
  RunRanks(4, [&](Communicator& comm) {
    const LocalBox part = layout->BoxesOf(comm.rank())[0];
    const Tensor parameter =
        WithGradient(whole.narrow(0, part.box.lo[0], part.box.extent(0)));
    ASSERT_TRUE(
        ShardingTable::Global().Set(parameter, *layout, comm.rank()).ok());
    // Twice in the list, once in the norm.
    const absl::StatusOr<double> norm =
        ClipGradNorm({parameter, parameter}, 1.0, &comm);
    ASSERT_TRUE(norm.ok()) << norm.status();
    EXPECT_DOUBLE_EQ(*norm, whole.norm().item<double>());
    EXPECT_TRUE(
        parameter.grad().allclose(PartOf(whole, parameter) / (*norm + 1e-6)));
  });
}

// Elements of which a rank has some alone and shares others that are not its
// to count.
TEST(ClipGradNormTest, PartsThatOverlapAreRefused) {
  const absl::StatusOr<Layout> layout =
      Layout::FromBoxes({4}, {{0, Box{{0}, {3}}}, {1, Box{{2}, {4}}}});
  ASSERT_TRUE(layout.ok()) << layout.status();
  RunRanks(2, [&](Communicator& comm) {
    const Tensor parameter =
        WithGradient(at::full({comm.rank() == 0 ? 3 : 2}, 5.0));
    ASSERT_TRUE(
        ShardingTable::Global().Set(parameter, *layout, comm.rank()).ok());
    const absl::Status status = ClipGradNorm({parameter}, 1.0, &comm).status();
    EXPECT_EQ(status.code(), comm.rank() == 1
                                 ? absl::StatusCode::kUnimplemented
                                 : absl::StatusCode::kFailedPrecondition)
        << status;
    EXPECT_TRUE(parameter.grad().eq(5).all().item<bool>());
  });
}

TEST(ClipGradNormTest, NormsThatAreNotFinite) {
  const absl::StatusOr<Layout> layout = Layout::FromPlacements(
      {4}, DeviceMesh::Iota({2}), std::vector<Placement>{Shard(0)});
  ASSERT_TRUE(layout.ok()) << layout.status();
  for (const double bad : {kNan, kInfinity}) {
    for (const double norm_type : {2.0, kInfinity}) {
      const Tensor gradient = at::tensor({1.0, 2.0, bad, 4.0});
      const Tensor whole = WithGradient(gradient);
      const double expected =
          nn::utils::clip_grad_norm_({whole}, 1.0, norm_type);
      RunRanks(2, [&](Communicator& comm) {
        const Tensor parameter =
            WithGradient(gradient.narrow(0, 2 * comm.rank(), 2));
        ASSERT_TRUE(
            ShardingTable::Global().Set(parameter, *layout, comm.rank()).ok());
        const absl::StatusOr<double> norm =
            ClipGradNorm({parameter}, 1.0, &comm, norm_type);
        ASSERT_TRUE(norm.ok()) << norm.status();
        EXPECT_TRUE(std::isnan(expected) ? std::isnan(*norm)
                                         : *norm == expected);
        EXPECT_TRUE(parameter.grad().allclose(PartOf(whole.grad(), parameter),
                                              0, 0, /*equal_nan=*/true))
            << parameter.grad() << ", torch: " << whole.grad();
      });
    }
  }
}

// More than goes into one copy, of a type that has not the range of the norm.
TEST(ClipGradNormTest, LargeGradientOfASmallType) {
  const int64_t elements = (int64_t{1} << 22) + 1000;
  const Tensor parameter = WithGradient(at::full({elements}, 64, at::kHalf));
  const absl::StatusOr<double> norm = ClipGradNorm({parameter}, 1e9, nullptr);
  ASSERT_TRUE(norm.ok()) << norm.status();
  EXPECT_NEAR(*norm, 64 * std::sqrt(static_cast<double>(elements)), 1e-6);
}

// Neither the powers of large elements overflow nor do those of small ones
// vanish.
TEST(ClipGradNormTest, RangeOfTheNorm) {
  for (const double scale : {1e300, 1e-300}) {
    const absl::StatusOr<double> norm =
        ClipGradNorm({WithGradient(at::full({1}, 3 * scale, at::kDouble)),
                      WithGradient(at::full({1}, 4 * scale, at::kDouble))},
                     1, nullptr);
    ASSERT_TRUE(norm.ok()) << norm.status();
    EXPECT_NEAR(*norm / scale, 5, 1e-12);
  }
}

TEST(ClipGradNormTest, NothingToClip) {
  EXPECT_EQ(*ClipGradNorm({}, 1, nullptr), 0);
  EXPECT_EQ(
      *ClipGradNorm({Tensor(), at::ones({2}), WithGradient(at::ones({0}))}, 1,
                    nullptr, kInfinity),
      0);
}

// Every rank gets an error, and no gradient changes.
TEST(ClipGradNormTest, Errors) {
  struct Call {
    double max_norm = 1;
    double norm_type = 2;
    int parameters = 1;
    bool sparse = false;
  };
  using Code = absl::StatusCode;
  const struct {
    Call other;  // of rank 1
    Code code;   // there
    std::string text;
  } kCases[] = {
      {{-1, 2, 1, false}, Code::kInvalidArgument, "max_norm is -1"},
      {{kNan, 2, 1, false}, Code::kInvalidArgument, "max_norm is nan"},
      {{1, 0, 1, false}, Code::kInvalidArgument, "norm_type is 0"},
      {{1, kNan, 1, false}, Code::kInvalidArgument, "norm_type is nan"},
      {{2, 2, 1, false}, Code::kFailedPrecondition, "max_norm 2"},
      {{1, 1, 1, false}, Code::kFailedPrecondition, "norm_type 1"},
      {{1, 2, 2, false}, Code::kFailedPrecondition, "2 parameters"},
      {{1, 2, 1, true}, Code::kOk, ""},
  };
  for (const auto& c : kCases) {
    SCOPED_TRACE(c.text);
    RunRanks(2, [&](Communicator& comm) {
      const Call call = comm.rank() == 1 ? c.other : Call();
      std::vector<Tensor> parameters;
      for (int i = 0; i < call.parameters; ++i) {
        Tensor parameter = WithGradient(at::full({2, 2}, 5.0));
        if (call.sparse) {
          parameter.mutable_grad() = parameter.grad().to_sparse();
        }
        // Counts on both ranks, so that each has a norm to take.
        ASSERT_TRUE(
            ShardingTable::Global()
                .Set(parameter,
                     *Layout::FromBoxes({4, 2}, {{0, Box{{0, 0}, {2, 2}}},
                                                 {1, Box{{2, 0}, {4, 2}}}}),
                     comm.rank())
                .ok());
        parameters.push_back(parameter);
      }
      const absl::Status status =
          ClipGradNorm(parameters, call.max_norm, &comm, call.norm_type)
              .status();
      EXPECT_FALSE(status.ok());
      if (comm.rank() == 0) {
        EXPECT_EQ(status.code(), Code::kFailedPrecondition) << status;
        EXPECT_THAT(status.message(), HasSubstr("rank 1"));
      } else if (c.code != Code::kOk) {
        EXPECT_EQ(status.code(), c.code) << status;
        EXPECT_THAT(status.message(), HasSubstr(c.text));
      }
      for (const Tensor& parameter : parameters) {
        EXPECT_TRUE(parameter.grad().to_dense().eq(5).all().item<bool>());
      }
    });
  }
}

}  // namespace
}  // namespace dsd
