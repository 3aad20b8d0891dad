// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/content_digest.h"

#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "absl/crc/crc32c.h"
#include "absl/strings/numbers.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

uint64_t Seed() {
  uint64_t seed = std::random_device()();
  if (const char* text = std::getenv("DSD_SEED")) {
    EXPECT_TRUE(absl::SimpleAtoi(text, &seed));
  }
  testing::Test::RecordProperty("seed", std::to_string(seed));
  std::fprintf(stderr, "DSD_SEED=%llu\n",
               static_cast<unsigned long long>(seed));
  return seed;
}

std::vector<std::byte> RandomBytes(std::mt19937_64& random, size_t size) {
  std::vector<std::byte> bytes(size);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

using Shape = std::vector<int64_t>;

struct TestBox {
  Shape lo, hi;
};

// Cuts the box at random until the pieces are small or luck ends.
void CutAtRandom(std::mt19937_64& random, TestBox box,
                 std::vector<TestBox>& out) {
  if (!box.lo.empty() && random() % 8 != 0) {
    const size_t d = random() % box.lo.size();
    const int64_t extent = box.hi[d] - box.lo[d];
    if (extent > 1) {
      const int64_t cut = box.lo[d] + 1 + random() % (extent - 1);
      TestBox low = box, high = box;
      low.hi[d] = cut;
      high.lo[d] = cut;
      CutAtRandom(random, low, out);
      CutAtRandom(random, high, out);
      return;
    }
  }
  out.push_back(box);
}

std::vector<std::byte> PackBox(const std::vector<std::byte>& whole,
                               const Shape& shape, int64_t item_size,
                               const TestBox& box) {
  std::vector<std::byte> out;
  Shape at = box.lo;
  while (true) {
    int64_t flat = 0;
    for (size_t d = 0; d < shape.size(); ++d) flat = flat * shape[d] + at[d];
    out.insert(out.end(), whole.begin() + flat * item_size,
               whole.begin() + (flat + 1) * item_size);
    int d = static_cast<int>(shape.size()) - 1;
    for (; d >= 0; --d) {
      if (++at[d] < box.hi[d]) break;
      at[d] = box.lo[d];
    }
    if (d < 0) return out;
  }
}

TEST(ContentDigestTest, EveryPartitionInEveryOrderGivesTheSameDigest) {
  std::mt19937_64 random(Seed());
  for (int round = 0; round < 500; ++round) {
    const int64_t item_size = int64_t{1} << (random() % 5);
    Shape shape(random() % 5);
    int64_t elements = 1;
    for (int64_t& extent : shape) {
      extent = 1 + random() % (random() % 4 == 0 ? 40 : 6);
      elements *= extent;
    }
    const std::vector<std::byte> whole =
        RandomBytes(random, elements * item_size);
    ContentDigest expected(whole.size());
    expected.AddRun(0, whole);

    std::vector<TestBox> boxes;
    CutAtRandom(random, {Shape(shape.size(), 0), shape}, boxes);
    std::shuffle(boxes.begin(), boxes.end(), random);
    std::vector<ContentDigest> ranks;
    for (int r = 0; r < 3; ++r) ranks.emplace_back(whole.size());
    for (const TestBox& box : boxes) {
      const std::vector<std::byte> packed =
          PackBox(whole, shape, item_size, box);
      const int64_t count = packed.size() / item_size;
      // In pieces, as a transfer does it.
      for (int64_t begin = 0; begin < count;) {
        const int64_t end =
            std::min<int64_t>(count, begin + 1 + random() % count);
        ranks[random() % 3].AddBox(
            shape, item_size, box.lo, box.hi, begin, end,
            absl::MakeConstSpan(packed).subspan(begin * item_size,
                                                (end - begin) * item_size));
        begin = end;
      }
    }
    ContentDigest merged(whole.size());
    for (const ContentDigest& rank : ranks) merged.Merge(rank.partial());
    ASSERT_EQ(merged.partial(), expected.partial()) << "round " << round;
  }
}

TEST(ContentDigestTest, EveryFlippedBitShows) {
  std::mt19937_64 random(7);
  std::vector<std::byte> bytes = RandomBytes(random, 96);
  ContentDigest before(bytes.size());
  before.AddRun(0, bytes);
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
    ContentDigest after(bytes.size());
    after.AddRun(0, bytes);
    EXPECT_NE(after.partial(), before.partial()) << "bit " << bit;
    bytes[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
  }
}

TEST(ContentDigestTest, IsTheLinearPartOfCrc32c) {
  const std::string text = "123456789";
  ContentDigest digest(text.size());
  digest.AddRun(
      0, absl::MakeConstSpan(reinterpret_cast<const std::byte*>(text.data()),
                             text.size()));
  const std::string zeros(text.size(), '\0');
  EXPECT_EQ(digest.partial(),
            static_cast<uint32_t>(absl::ComputeCrc32c(text)) ^
                static_cast<uint32_t>(absl::ComputeCrc32c(zeros)));
}

TEST(ContentDigestTest, DTypeShapeAndLengthAreMixedIn) {
  ContentDigest digest(8);
  const uint64_t flat = digest.Finish(DType::kFloat32, {2});
  EXPECT_NE(flat, digest.Finish(DType::kInt32, {2}));
  EXPECT_NE(flat, digest.Finish(DType::kFloat32, {2, 1}));
  EXPECT_NE(flat, digest.Finish(DType::kFloat32, {1, 2}));
  EXPECT_NE(ContentDigest(0).Finish(DType::kFloat32, {0}),
            ContentDigest(4).Finish(DType::kFloat32, {}));
}

TEST(ContentDigestTest, ValuesAreFixed) {
  // Stored in checkpoints: a change here breaks those written before.
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  ContentDigest digest(24);
  digest.AddRun(0, absl::MakeConstSpan(
                       reinterpret_cast<const std::byte*>(values.data()), 24));
  EXPECT_EQ(DigestHex(digest.Finish(DType::kFloat32, {2, 3})),
            "dd2a543d8c08e1ce");
  EXPECT_EQ(DigestHex(DigestOfBytes("step")), "5df889be2e8a74b0");
  EXPECT_EQ(DigestHex(0x1f), "000000000000001f");
}

}  // namespace
}  // namespace dsd
