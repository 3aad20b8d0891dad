// SPDX-License-Identifier: Apache-2.0
//
// The small bridges to LibTorch: exceptions, types, the sharding table, values.

#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/empty.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/cord.h"
#include "c10/util/Exception.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/tensor_memory.h"
#include "dsd/core/tensor/tensor_value.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

Layout Rows(int64_t rows, int64_t columns, int64_t ranks) {
  return *Layout::FromPlacements({rows, columns}, DeviceMesh::Iota({ranks}),
                                 {Shard(0)});
}

TEST(TorchBoundaryTest, ExceptionsBecomeStatus) {
  const auto code_of = [](auto fn) { return TorchToStatus(fn).code(); };
  EXPECT_EQ(code_of([] { TORCH_CHECK(false, "x"); }),
            absl::StatusCode::kInternal);
  EXPECT_EQ(code_of([] { TORCH_CHECK_INDEX(false, "x"); }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code_of([] { TORCH_CHECK_VALUE(false, "x"); }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code_of([] { TORCH_CHECK_TYPE(false, "x"); }),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code_of([] { TORCH_CHECK_NOT_IMPLEMENTED(false, "x"); }),
            absl::StatusCode::kUnimplemented);
  EXPECT_EQ(code_of([] { TORCH_CHECK_WITH(OutOfMemoryError, false, "x"); }),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(code_of([] { at::empty({int64_t{1} << 50}, c10::kByte); }),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(code_of([] { throw std::bad_alloc(); }),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(code_of([] { throw std::runtime_error("x"); }),
            absl::StatusCode::kInternal);
  EXPECT_EQ(code_of([] { throw 7; }), absl::StatusCode::kInternal);
}

TEST(TorchBoundaryTest, StatusErrorComesOutAsItWentIn) {
  absl::Status status = absl::UnavailableError("rank 2 died");
  status.SetPayload("key", absl::Cord("value"));
  EXPECT_EQ(TorchToStatus([&] { throw StatusError(status); }), status);
}

TEST(TorchBoundaryTest, TextHasNoBacktraceButThePayloadHas) {
  const absl::Status status =
      TorchToStatus([] { TORCH_CHECK(false, "the reason"); });
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("the reason"), Not(HasSubstr("frame #"))));
  EXPECT_TRUE(status.GetPayload(kTorchBacktracePayload).has_value());
}

TEST(TorchBoundaryTest, ResultsPassThrough) {
  EXPECT_TRUE(TorchToStatus([] {}).ok());
  EXPECT_EQ(*TorchToStatus([] { return 5; }), 5);
  EXPECT_EQ(TorchToStatus([] { return absl::AbortedError("a"); }).code(),
            absl::StatusCode::kAborted);
  const absl::StatusOr<std::string> nested =
      TorchToStatus([]() -> absl::StatusOr<std::string> { return "v"; });
  EXPECT_EQ(*nested, "v");
}

TEST(TorchTypesTest, EveryTypeThereAndBack) {
  for (int i = 0; i < kNumDTypes; ++i) {
    const DType dtype = static_cast<DType>(i);
    const c10::ScalarType type = ToScalarType(dtype);
    EXPECT_EQ(static_cast<int64_t>(c10::elementSize(type)), ItemSize(dtype))
        << DTypeName(dtype);
    EXPECT_EQ(*ToDType(type), dtype);
  }
  EXPECT_EQ(ToDType(c10::ScalarType::QInt8).status().code(),
            absl::StatusCode::kUnimplemented);
}

TEST(ShardingTableTest, FollowsTheTensorAndNotItsAddress) {
  ShardingTable table;
  at::Tensor shard = at::zeros({2, 3});
  ASSERT_TRUE(table.Set(shard, Rows(4, 3, 2), 1).ok());
  ASSERT_TRUE(table.Find(shard).has_value());
  EXPECT_EQ(table.Find(shard)->holder, 1);
  shard.set_data(at::zeros({4, 3}));
  EXPECT_TRUE(table.Find(shard).has_value());
  // Many short-lived tensors: none is taken for a dead one at its address.
  shard = at::Tensor();
  for (int i = 0; i < 1000; ++i) {
    const at::Tensor other = at::zeros({2, 3});
    ASSERT_FALSE(table.Find(other).has_value());
    ASSERT_TRUE(table.Set(other, Rows(4, 3, 2), 0).ok());
  }
}

TEST(ShardingTableTest, ErasedIsPlainAgain) {
  ShardingTable table;
  const at::Tensor shard = at::zeros({2, 3});
  ASSERT_TRUE(table.Set(shard, Rows(4, 3, 2), 0).ok());
  EXPECT_TRUE(table.Find(shard).has_value());
  table.Erase(shard);
  EXPECT_FALSE(table.Find(shard).has_value());
  EXPECT_FALSE(table.Find(at::Tensor()).has_value());
}

TEST(ShardingTableTest, RefusesAnotherShapeNamingBoth) {
  ShardingTable table;
  const absl::Status status = table.Set(at::zeros({3, 3}), Rows(4, 3, 2), 0);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("[2, 3]"), HasSubstr("[3, 3]")));
  EXPECT_EQ(table.Set(at::Tensor(), Rows(4, 3, 2), 0).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(table.Set(at::zeros({2, 3}), Rows(4, 3, 2), 9).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(TensorMemoryTest, NewTensorsAreContiguous) {
  for (const c10::ScalarType type : {c10::kFloat, c10::kBool, c10::kDouble}) {
    for (const std::vector<int64_t>& shape :
         {std::vector<int64_t>{}, {0}, {3}, {2, 0, 5}, {4, 1, 2}}) {
      const absl::StatusOr<at::Tensor> tensor =
          NewTensor(shape, c10::TensorOptions(type));
      ASSERT_TRUE(tensor.ok()) << tensor.status();
      EXPECT_EQ(tensor->sizes(), c10::IntArrayRef(shape));
      EXPECT_EQ(tensor->scalar_type(), type);
      EXPECT_TRUE(tensor->is_cpu());
      EXPECT_TRUE(tensor->is_contiguous());
      tensor->fill_(1);
      EXPECT_EQ(tensor->sum().item().toLong(), tensor->numel());
    }
  }
  EXPECT_EQ(NewTensor({int64_t{1} << 58}, c10::TensorOptions(c10::kFloat))
                .status()
                .code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(NewTensor({2}, c10::TensorOptions(c10::kFloat).device(c10::kMeta))
                  ->is_meta());
}

// Prefetching looks at nothing that may not be there.
TEST(TensorMemoryTest, AnyTensorCanBePrefetched) {
  for (const at::Tensor& tensor :
       {at::Tensor(), at::zeros({0}), at::zeros({3}),
        at::empty({2}, c10::TensorOptions(c10::kFloat).device(c10::kMeta)),
        at::zeros({2, 2}).to_sparse()}) {
    PrefetchTensor(tensor);
    PrefetchStorage(tensor);
    PrefetchMemory(tensor);
  }
}

TEST(TensorValueTest, PlainIsOneWholePart) {
  const at::Tensor tensor = at::zeros({2, 3});
  const TensorValue value(tensor);
  EXPECT_TRUE(value.is_plain());
  EXPECT_EQ(value.shape(), Dims({2, 3}));
  EXPECT_TRUE(value.Local()->is_same(tensor));
  ASSERT_EQ(value.Parts()->size(), 1);
  EXPECT_EQ((*value.Parts())[0].box, Box::Whole({2, 3}));
}

TEST(TensorValueTest, EmptyShardKeepsItsOtherExtents) {
  const absl::StatusOr<TensorValue> value =
      TensorValue::Sharded({Rows(2, 3, 4), 3}, at::zeros({0, 3}));
  ASSERT_TRUE(value.ok()) << value.status();
  EXPECT_EQ(value->shape(), Dims({2, 3}));
  EXPECT_TRUE(value->Parts()->empty());
  EXPECT_TRUE(value->Local().ok());
}

TEST(TensorValueTest, BoxesAreTensorsOfTheirOwn) {
  const Layout layout = *Layout::FromBoxes(
      {4, 4},
      {{0, {{0, 0}, {2, 2}}}, {0, {{2, 2}, {4, 4}}}, {1, {{0, 2}, {2, 4}}}});
  const absl::StatusOr<TensorValue> value = TensorValue::FromBoxes(
      {layout, 0}, c10::kFloat, {at::zeros({2, 2}), at::zeros({2, 2})});
  ASSERT_TRUE(value.ok()) << value.status();
  EXPECT_EQ(value->Parts()->size(), 2);
  EXPECT_EQ(value->Local().status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(
      TensorValue::FromBoxes({layout, 0}, c10::kFloat, {at::zeros({2, 2})})
          .status()
          .code(),
      absl::StatusCode::kInvalidArgument);
}

TEST(TensorValueTest, ShardOfAnotherRankIsKnown) {
  const TensorValue shard =
      *TensorValue::Sharded({Rows(4, 3, 2), 1}, at::zeros({2, 3}));
  EXPECT_TRUE(shard.CheckIsOf(1).ok());
  const absl::Status status = shard.CheckIsOf(0);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("shard of holder 1, but this is rank 0"));
  // Plain values are anybody's, and so is what is on other ranks only.
  EXPECT_TRUE(TensorValue(at::zeros({2})).CheckIsOf(0).ok());
  EXPECT_TRUE(
      TensorValue::Elsewhere(Rows(4, 3, 2), c10::kFloat).CheckIsOf(0).ok());
}

TEST(TensorValueTest, ElsewhereHasShapeAndTypeOnly) {
  const TensorValue value = TensorValue::Elsewhere(Rows(4, 3, 2), c10::kHalf);
  EXPECT_FALSE(value.is_plain());
  EXPECT_EQ(value.scalar_type(), c10::kHalf);
  EXPECT_TRUE(value.locals().empty());
  EXPECT_TRUE(value.Parts()->empty());
}

}  // namespace
}  // namespace dsd
