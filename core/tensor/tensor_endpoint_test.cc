// SPDX-License-Identifier: Apache-2.0
//
// TensorEndpoint against brute force: random layouts, strides, types and
// ranges, with owners and local order computed element by element.

#include "dsd/core/tensor/tensor_endpoint.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/arange.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/equal.h"
#include "ATen/ops/full.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "dsd/core/layout/element_map.h"
#include "dsd/core/layout/random_layout.h"
#include "dsd/core/tensor/tensor_value.h"
#include "dsd/core/tensor/torch_types.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::LayoutSpec;
using ::dsd::test::Uniform;
using ::testing::HasSubstr;

DeviceMesh OneRank() { return DeviceMesh::Iota({1}); }

// A tensor of these sizes with random strides: permuted, and inside a larger
// one.
at::Tensor RandomlyStrided(test::Random& random, const Dims& sizes,
                           c10::ScalarType type) {
  std::vector<int64_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) order.push_back(d);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<int64_t> padded;
  std::vector<int64_t> back(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    padded.push_back(sizes[order[i]] * 2 + 1);
    back[order[i]] = i;
  }
  at::Tensor tensor = at::zeros(padded, type).permute(back);
  for (size_t d = 0; d < sizes.size(); ++d) {
    const int64_t step = Uniform(random, 1, 2);
    tensor = tensor.slice(d, 1, 1 + sizes[d] * step, step);
  }
  return tensor;
}

// The elements of `box` in row-major order, as row-major indices of the whole.
std::vector<int64_t> ElementsOf(const Box& box, const Dims& shape) {
  std::vector<int64_t> elements;
  Dims at = box.lo;
  for (int64_t n = 0; n < box.num_elements(); ++n) {
    elements.push_back(FlatIndex(shape, at));
    for (int d = box.ndim() - 1; d >= 0; --d) {
      if (++at[d] < box.hi[d]) break;
      at[d] = box.lo[d];
    }
  }
  return elements;
}

double ValueOf(int64_t element) { return static_cast<double>(element % 100); }

TEST(TensorEndpointTest, ReadsAndWritesAnyPartOfAnyLayout) {
  const uint64_t seed = test::TestSeed();
  test::Random random(seed);
  const c10::ScalarType types[] = {c10::kFloat, c10::kDouble, c10::kInt,
                                   c10::kBFloat16, c10::kByte};
  for (int round = 0; round < 600; ++round) {
    SCOPED_TRACE(testing::Message() << "seed " << seed << " round " << round);
    const LayoutSpec spec = test::RandomLayoutSpec(
        random, test::RandomShape(random, 200), {{0, 1, 2, 3}});
    SCOPED_TRACE(spec.ToString());
    const absl::StatusOr<Layout> layout = test::BuildLayout(spec);
    ASSERT_TRUE(layout.ok()) << layout.status();
    const Holder holder = Uniform(random, 0, 3);
    const c10::ScalarType type = types[Uniform(random, 0, 4)];
    const std::vector<LocalBox> boxes = layout->BoxesOf(holder);
    if (boxes.empty()) continue;

    // Local tensors of the right values, filled by the brute-force order.
    std::vector<at::Tensor> locals;
    if (layout->kind() == Layout::Kind::kBoxes) {
      for (const LocalBox& box : boxes) {
        locals.push_back(RandomlyStrided(random, box.box.extents(), type));
      }
    } else {
      locals.push_back(
          RandomlyStrided(random, *layout->LocalShape(holder), type));
    }
    const std::vector<int64_t> elements = test::LocalElements(spec, holder);
    size_t next = 0;
    for (at::Tensor& local : locals) {
      at::Tensor values = at::empty({local.numel()}, c10::kDouble);
      for (int64_t i = 0; i < local.numel(); ++i) {
        values.data_ptr<double>()[i] = ValueOf(elements[next++]);
      }
      local.copy_(values.view(local.sizes()));
    }
    ASSERT_EQ(next, elements.size());

    TensorEndpoint endpoint(OneRank(), 0);
    const absl::Status added =
        endpoint.Add({"t", *ToDType(type), *layout}, holder, locals);
    ASSERT_TRUE(added.ok()) << added;

    const LocalBox& local_box = boxes[Uniform(random, 0, boxes.size() - 1)];
    Box box = local_box.box;
    for (int d = 0; d < box.ndim(); ++d) {
      box.lo[d] = Uniform(random, box.lo[d], box.hi[d] - 1);
      box.hi[d] = Uniform(random, box.lo[d] + 1, box.hi[d]);
    }
    const int64_t begin = Uniform(random, 0, box.num_elements());
    const int64_t end = Uniform(random, begin, box.num_elements());
    const c10::ScalarType wire = types[Uniform(random, 0, 4)];
    const std::vector<int64_t> in_box = ElementsOf(box, layout->shape());

    at::Tensor buffer = at::empty({end - begin}, wire);
    const absl::Span<std::byte> bytes(
        static_cast<std::byte*>(buffer.data_ptr()), buffer.nbytes());
    absl::Status status =
        endpoint.Read(0, box, begin, end, *ToDType(wire), bytes);
    ASSERT_TRUE(status.ok()) << status;
    const at::Tensor read = buffer.to(c10::kDouble);
    for (int64_t i = begin; i < end; ++i) {
      ASSERT_EQ(read.data_ptr<double>()[i - begin], ValueOf(in_box[i]))
          << "element " << i << " of " << box.ToString();
    }

    // Write zeros there: all else stays.
    buffer.zero_();
    status = endpoint.Write(0, box, begin, end, *ToDType(wire), bytes);
    ASSERT_TRUE(status.ok()) << status;
    const std::vector<int64_t> written(in_box.begin() + begin,
                                       in_box.begin() + end);
    next = 0;
    for (const at::Tensor& local : locals) {
      const at::Tensor now = local.to(c10::kDouble).contiguous();
      for (int64_t i = 0; i < local.numel(); ++i, ++next) {
        const bool zeroed = std::find(written.begin(), written.end(),
                                      elements[next]) != written.end();
        ASSERT_EQ(now.data_ptr<double>()[i],
                  zeroed ? 0 : ValueOf(elements[next]));
      }
    }
  }
}

TEST(TensorEndpointTest, PartsOfAValueAreItsBoxes) {
  test::Random random(test::TestSeed());
  for (int round = 0; round < 300; ++round) {
    const LayoutSpec spec = test::RandomLayoutSpec(
        random, test::RandomShape(random, 100), {{0, 1, 2, 3}});
    SCOPED_TRACE(spec.ToString());
    const Layout layout = *test::BuildLayout(spec);
    if (layout.kind() == Layout::Kind::kBoxes ||
        !layout.LocalShape(1).has_value()) {
      continue;
    }
    const std::vector<int64_t> elements = test::LocalElements(spec, 1);
    at::Tensor local =
        at::empty({static_cast<int64_t>(elements.size())}, c10::kLong);
    std::copy(elements.begin(), elements.end(), local.data_ptr<int64_t>());
    const absl::StatusOr<TensorValue> value = TensorValue::Sharded(
        {layout, 1}, local.view(ToIntArrayRef(*layout.LocalShape(1))));
    ASSERT_TRUE(value.ok()) << value.status();
    const auto parts = value->Parts();
    ASSERT_TRUE(parts.ok()) << parts.status();
    size_t seen = 0;
    for (const TensorValue::Part& part : *parts) {
      const at::Tensor view = part.view.contiguous();
      const std::vector<int64_t> expected =
          ElementsOf(part.box, layout.shape());
      ASSERT_EQ(view.numel(), expected.size());
      for (size_t i = 0; i < expected.size(); ++i) {
        EXPECT_EQ(view.data_ptr<int64_t>()[i], expected[i]);
      }
      seen += expected.size();
    }
    EXPECT_EQ(seen, elements.size());
  }
}

TEST(TensorEndpointTest, FinishTellsAutogradThatTheTensorChanged) {
  const at::Tensor tensor = at::zeros({4}, c10::kFloat).requires_grad_();
  TensorEndpoint endpoint(OneRank(), 0);
  ASSERT_TRUE(endpoint.Add("t", TensorValue(tensor)).ok());
  const auto before = tensor._version();
  const std::vector<std::byte> bytes(16, std::byte{0});
  ASSERT_TRUE(endpoint
                  .Write(0, Box::Whole({4}), 0, 4, DType::kFloat32,
                         absl::MakeConstSpan(bytes))
                  .ok());
  ASSERT_TRUE(endpoint.Finish().ok());
  EXPECT_GT(tensor._version(), before);
  EXPECT_TRUE(tensor.is_leaf());
}

TEST(TensorEndpointTest, LazilyConjugatedTensorsHaveTheirValues) {
  const at::Tensor tensor =
      at::full({2}, c10::complex<double>(1, 2), c10::kComplexDouble).conj();
  TensorEndpoint endpoint(OneRank(), 0);
  ASSERT_TRUE(endpoint.Add("t", TensorValue(tensor)).ok());
  EXPECT_FALSE(endpoint.View(0, Box::Whole({2})).has_value());
  double out[4];
  ASSERT_TRUE(
      endpoint
          .Read(0, Box::Whole({2}), 0, 2, DType::kComplex128,
                absl::MakeSpan(reinterpret_cast<std::byte*>(out), sizeof(out)))
          .ok());
  EXPECT_THAT(out, testing::ElementsAre(1, -2, 1, -2));
}

TEST(TensorEndpointTest, RefusesTensorsWithoutAddressableElements) {
  TensorEndpoint endpoint(OneRank(), 0);
  EXPECT_EQ(endpoint.Add("u", TensorValue(at::Tensor())).code(),
            absl::StatusCode::kInvalidArgument);
  const absl::Status meta = endpoint.Add(
      "m", TensorValue(at::empty(
               {2}, c10::TensorOptions(c10::kFloat).device(c10::kMeta))));
  EXPECT_EQ(meta.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(meta.message()), HasSubstr("\"m\""));
  const absl::Status sparse = endpoint.Add(
      "s", TensorValue(at::zeros({2, 2}, c10::kFloat).to_sparse()));
  EXPECT_EQ(sparse.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(endpoint.Add("t", TensorValue(at::zeros({2}))).ok());
  EXPECT_EQ(endpoint.Add("t", TensorValue(at::zeros({2}))).code(),
            absl::StatusCode::kAlreadyExists);
}

}  // namespace
}  // namespace dsd
