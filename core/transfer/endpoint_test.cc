// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/endpoint.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "dsd/core/base/half.h"
#include "dsd/core/layout/random_layout.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

// A view with permuted, gapped and partly negative strides in its own memory.
struct RandomView {
  std::vector<std::byte> memory;
  StridedView view;
};

RandomView MakeView(const Dims& extents, int64_t item_size, test::Random& rng) {
  std::vector<int> order(extents.size());
  for (size_t d = 0; d < order.size(); ++d) order[d] = d;
  std::shuffle(order.begin(), order.end(), rng);
  RandomView out;
  out.view.strides_bytes.resize(extents.size());
  int64_t step = item_size * (1 + rng() % 2);
  int64_t base = 0;
  for (int d : order) {
    const bool backwards = rng() % 4 == 0;
    out.view.strides_bytes[d] = backwards ? -step : step;
    if (backwards) base += step * (extents[d] - 1);
    step *= extents[d] + rng() % 2;
  }
  out.memory.resize(step + 16);
  for (std::byte& byte : out.memory) byte = static_cast<std::byte>(rng());
  out.view.base = out.memory.data() + base;
  return out;
}

std::byte* ElementAt(const StridedView& view, const Dims& extents,
                     int64_t index) {
  std::byte* at = view.base;
  for (int d = static_cast<int>(extents.size()) - 1; d >= 0; --d) {
    at += index % extents[d] * view.strides_bytes[d];
    index /= extents[d];
  }
  return at;
}

TEST(EndpointTest, PackingEqualsElementByElementCopies) {
  test::Random rng(test::TestSeed());
  for (int round = 0; round < 2000; ++round) {
    const int64_t item_size = int64_t{1} << rng() % 5;
    Dims extents(rng() % 5);
    int64_t elements = 1;
    for (int64_t& extent : extents) elements *= extent = 1 + rng() % 4;
    const RandomView from = MakeView(extents, item_size, rng);
    const int64_t begin = rng() % (elements + 1);
    const int64_t end = begin + rng() % (elements - begin + 1);

    std::vector<std::byte> packed((end - begin) * item_size);
    PackRange(from.view, extents, item_size, begin, end, packed.data());
    RandomView to = MakeView(extents, item_size, rng);
    std::vector<std::byte> expected = to.memory;
    const int64_t base = to.view.base - to.memory.data();
    for (int64_t i = begin; i < end; ++i) {
      const std::byte* element = ElementAt(from.view, extents, i);
      ASSERT_EQ(
          0, std::memcmp(&packed[(i - begin) * item_size], element, item_size));
      const int64_t offset = ElementAt(to.view, extents, i) - to.view.base;
      std::memcpy(&expected[base + offset], element, item_size);
    }
    UnpackRange(to.view, extents, item_size, begin, end, packed.data());
    ASSERT_EQ(to.memory, expected) << "bytes outside the range changed";
  }
}

TEST(EndpointTest, CopyBoxEqualsElementByElementCopies) {
  test::Random rng(test::TestSeed());
  for (int round = 0; round < 2000; ++round) {
    const int64_t item_size = int64_t{1} << rng() % 5;
    Dims extents(rng() % 5);
    int64_t elements = 1;
    for (int64_t& extent : extents)
      elements *= extent = rng() % 8 ? 1 + rng() % 4 : 0;
    const RandomView from = MakeView(extents, item_size, rng);
    RandomView to = MakeView(extents, item_size, rng);
    std::vector<std::byte> expected = to.memory;
    const int64_t base = to.view.base - to.memory.data();
    for (int64_t i = 0; i < elements; ++i) {
      std::memcpy(
          &expected[base + (ElementAt(to.view, extents, i) - to.view.base)],
          ElementAt(from.view, extents, i), item_size);
    }
    CopyBox(from.view, to.view, extents, item_size);
    ASSERT_EQ(to.memory, expected);
  }
}

TEST(EndpointTest, MemoryEndpointRefusesWhatItHasNot) {
  std::vector<float> data(4);
  MemoryEndpoint endpoint;
  ASSERT_TRUE(
      endpoint
          .AddLocal({"w", DType::kFloat32, Layout::Replicated({4}, {0})}, 0,
                    reinterpret_cast<std::byte*>(data.data()))
          .ok());
  EXPECT_EQ(endpoint
                .AddLocal({"w", DType::kFloat32, Layout::Replicated({4}, {0})},
                          0, reinterpret_cast<std::byte*>(data.data()))
                .code(),
            absl::StatusCode::kAlreadyExists);
  std::vector<std::byte> out(32);
  const Box whole = Box::Whole({4});
  const absl::Status cast = endpoint.Read(0, whole, 0, 4, DType::kInt64,
                                          absl::MakeSpan(out).first(32));
  EXPECT_EQ(cast.code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(cast.message().find("\"w\""), std::string::npos) << cast;
}

// A transposed part, more than is converted at once, through a type of fewer
// bytes and one of more.
TEST(EndpointTest, MemoryEndpointCastsFloats) {
  constexpr int64_t kRows = 3, kColumns = 5000;
  std::vector<float> data(kRows * kColumns);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
  MemoryEndpoint endpoint;
  MemoryEndpoint::Part part;
  part.box = Box::Whole({kColumns, kRows});
  part.view = {reinterpret_cast<std::byte*>(data.data()),
               {sizeof(float), kColumns * sizeof(float)}};
  ASSERT_TRUE(endpoint
                  .Add({"w", DType::kFloat32,
                        Layout::Replicated({kColumns, kRows}, {0})},
                       {part})
                  .ok());
  const int64_t begin = 7, end = kRows * kColumns - 2;
  std::vector<double> out(end - begin);
  ASSERT_TRUE(endpoint
                  .Read(0, part.box, begin, end, DType::kFloat64,
                        absl::MakeSpan(reinterpret_cast<std::byte*>(out.data()),
                                       out.size() * sizeof(double)))
                  .ok());
  std::vector<uint16_t> in;
  for (int64_t i = begin; i < end; ++i) {
    const double expected =
        static_cast<double>(i % kRows * kColumns + i / kRows);
    ASSERT_EQ(out[i - begin], expected) << i;
    in.push_back(FloatToBFloat16(static_cast<float>(-expected)));
  }
  ASSERT_TRUE(endpoint
                  .Write(0, part.box, begin, end, DType::kBFloat16,
                         absl::MakeConstSpan(
                             reinterpret_cast<const std::byte*>(in.data()),
                             in.size() * sizeof(uint16_t)))
                  .ok());
  for (int64_t i = 0; i < kRows * kColumns; ++i) {
    const int64_t at = i % kRows * kColumns + i / kRows;
    const float expected = i >= begin && i < end
                               ? BFloat16ToFloat(in[i - begin])
                               : static_cast<float>(at);
    ASSERT_EQ(data[at], expected) << i;
  }
}

}  // namespace
}  // namespace dsd
