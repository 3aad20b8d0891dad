// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/outline.h"

#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/equal.h"
#include "ATen/ops/scalar_tensor.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

Value Sample() {
  StateDict inner;
  inner.Set("text", Value("t"));
  inner.Set(int64_t{-7}, Value(Bytes{std::string("\0\1", 2)}));
  inner.Set("opaque", Value(Opaque{"m.C"}));
  inner.Set("wide", Value(WideInt{std::string(9, '\1')}));
  inner.Set("set", Value(Value::Set{{Complex(1, -2), "x"}, true}));
  inner.Set("map", Value(Value::Map{{Value(), Value(2.5)},
                                    {Value("x"), Value(Value::List{true})}}));
  StateDict root;
  root.Set("none", Value());
  root.Set("flags", Value(Value::List{true, false}));
  root.Set("numbers", Value(Value::Tuple{{int64_t{1} << 60, -0.5}}));
  root.Set("inner", Value(std::move(inner)));
  root.Set("scalar", Value(TensorValue(at::scalar_tensor(2.5, c10::kDouble))));
  root.Set("tensor", Value(TensorValue(at::zeros({3, 0, 2}, c10::kHalf))));
  return Value(std::move(root));
}

TEST(OutlineTest, ObjectsAndScalarsByValueTensorsByShape) {
  const Value sample = Sample();
  const absl::StatusOr<std::string> bytes = EncodeOutline(sample);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  const absl::StatusOr<Value> value =
      DecodeOutline(*bytes, DeviceMesh::Iota({1}));
  ASSERT_TRUE(value.ok()) << value.status();
  const StateDict& root = *value->get_if<StateDict>();
  EXPECT_TRUE(root.Find("none")->is<None>());
  EXPECT_FALSE(*(*root.Find("flags")->get_if<Value::List>())[1].get_if<bool>());
  const auto& numbers = root.Find("numbers")->get_if<Value::Tuple>()->items;
  EXPECT_EQ(*numbers[0].get_if<int64_t>(), int64_t{1} << 60);
  EXPECT_EQ(*numbers[1].get_if<double>(), -0.5);
  const StateDict& inner = *root.Find("inner")->get_if<StateDict>();
  EXPECT_EQ(inner.Find(PathSegment(int64_t{-7}))->get_if<Bytes>()->data,
            std::string("\0\1", 2));
  EXPECT_EQ(inner.Find("opaque")->get_if<Opaque>()->type_name, "m.C");
  EXPECT_EQ(inner.Find("wide")->get_if<WideInt>()->bytes, std::string(9, '\1'));
  const auto& set = *inner.Find("set")->get_if<Value::Set>();
  EXPECT_TRUE(set.is_frozen);
  ASSERT_EQ(set.items.size(), 2u);
  EXPECT_EQ(*set.items[0].get_if<Complex>(), Complex(1, -2));
  const TensorValue& scalar = *root.Find("scalar")->get_if<TensorValue>();
  EXPECT_TRUE(scalar.is_plain());
  EXPECT_EQ(scalar.locals()[0].item<double>(), 2.5);
  const TensorValue& tensor = *root.Find("tensor")->get_if<TensorValue>();
  EXPECT_FALSE(tensor.is_plain());
  EXPECT_EQ(tensor.shape(), Dims({3, 0, 2}));
  EXPECT_EQ(tensor.scalar_type(), c10::kHalf);
}

TEST(OutlineTest, EveryCutAndAnyChangeIsAnErrorOrAValue) {
  const std::string bytes = *EncodeOutline(Sample());
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_EQ(DecodeOutline(bytes.substr(0, size), DeviceMesh::Iota({1}))
                  .status()
                  .code(),
              absl::StatusCode::kDataLoss)
        << size;
  }
  EXPECT_EQ(DecodeOutline(bytes + "x", DeviceMesh::Iota({1})).status().code(),
            absl::StatusCode::kDataLoss);
  std::mt19937 random(7);
  for (int round = 0; round < 20000; ++round) {
    std::string changed = bytes;
    for (int i = 0; i < 3; ++i) {
      changed[random() % changed.size()] = static_cast<char>(random());
    }
    DecodeOutline(changed, DeviceMesh::Iota({1})).IgnoreError();
  }
}

TEST(OutlineTest, DepthIsLimitedOnBothSides) {
  Value deep(1);
  for (int i = 0; i < 1000; ++i) deep = Value(Value::List{std::move(deep)});
  EXPECT_EQ(EncodeOutline(deep).status().code(),
            absl::StatusCode::kInvalidArgument);
  std::string bytes;
  for (int i = 0; i < 100000; ++i) {
    bytes.push_back(10);  // a list
    bytes.append("\1\0\0\0\0\0\0\0", 8);
  }
  EXPECT_EQ(DecodeOutline(bytes, DeviceMesh::Iota({1})).status().code(),
            absl::StatusCode::kDataLoss);
}

TEST(OutlineTest, UndefinedTensorIsNamed) {
  StateDict dict;
  dict.Set("w", Value(TensorValue(at::Tensor())));
  const absl::Status status = EncodeOutline(Value(dict)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("\"w\""));
}

}  // namespace
}  // namespace dsd
