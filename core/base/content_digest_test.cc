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

constexpr DigestVersion kVersions[] = {DigestVersion::k1, DigestVersion::k2};

TEST(ContentDigestTest, EveryPartitionInEveryOrderGivesTheSameDigest) {
  std::mt19937_64 random(Seed());
  for (int round = 0; round < 1000; ++round) {
    const DigestVersion version = kVersions[round % 2];
    const int64_t item_size = int64_t{1} << (random() % 5);
    Shape shape(random() % 5);
    int64_t elements = 1;
    for (int64_t& extent : shape) {
      extent = 1 + random() % (random() % 4 == 0 ? 40 : 6);
      elements *= extent;
    }
    const std::vector<std::byte> whole =
        RandomBytes(random, elements * item_size);
    ContentDigest expected(whole.size(), version);
    expected.AddRun(0, whole);

    std::vector<TestBox> boxes;
    CutAtRandom(random, {Shape(shape.size(), 0), shape}, boxes);
    std::shuffle(boxes.begin(), boxes.end(), random);
    std::vector<ContentDigest> ranks;
    for (int r = 0; r < 3; ++r) ranks.emplace_back(whole.size(), version);
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
    ContentDigest merged(whole.size(), version);
    for (const ContentDigest& rank : ranks) merged.Merge(rank.partial());
    ASSERT_TRUE(merged.partial() == expected.partial()) << "round " << round;
  }
}

TEST(ContentDigestTest, EveryFlippedBitShows) {
  std::mt19937_64 random(7);
  std::vector<std::byte> bytes = RandomBytes(random, 300);
  for (const DigestVersion version : kVersions) {
    ContentDigest before(bytes.size(), version);
    before.AddRun(0, bytes);
    for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
      bytes[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
      ContentDigest after(bytes.size(), version);
      after.AddRun(0, bytes);
      EXPECT_TRUE(after.partial() != before.partial()) << "bit " << bit;
      bytes[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
    }
  }
}

// Value of the polynomial whose coefficients are the blocks, by Horner's rule,
// bit by bit.
Digest128 ByDefinition(const std::vector<std::byte>& bytes) {
  constexpr Digest128 kPoint = {0x9E3779B97F4A7C15, 0xF39CC0605CEDC834};
  Digest128 sum;
  for (size_t at = 0; at < bytes.size(); at += 16) {
    for (size_t i = 0; i < 16 && at + i < bytes.size(); ++i) {
      (i < 8 ? sum.low : sum.high) ^= static_cast<uint64_t>(bytes[at + i])
                                      << (8 * (i % 8));
    }
    Digest128 product;
    for (int bit = 127; bit >= 0; --bit) {
      const bool carry = product.high >> 63 != 0;
      product.high = product.high << 1 | product.low >> 63;
      product.low = product.low << 1 ^ (carry ? 0x87 : 0);
      if (((bit < 64 ? sum.low >> bit : sum.high >> (bit - 64)) & 1) != 0) {
        product.high ^= kPoint.high;
        product.low ^= kPoint.low;
      }
    }
    sum = product;
  }
  return sum;
}

TEST(ContentDigestTest, Version2IsAPolynomialWithAndWithoutTheInstruction) {
  std::mt19937_64 random(8);
  // Over the longest group of blocks, which has 4 KiB.
  for (size_t size = 0; size < 20000; size += 1 + size / 40) {
    const std::vector<std::byte> bytes = RandomBytes(random, size);
    const Digest128 expected = ByDefinition(bytes);
    EXPECT_TRUE(internal::HashBlocks(0, bytes, true) == expected) << size;
    EXPECT_TRUE(internal::HashBlocks(0, bytes, false) == expected) << size;
    for (size_t offset = 1; offset < 40; offset += 7) {
      std::vector<std::byte> moved(offset, std::byte{0});
      moved.insert(moved.end(), bytes.begin(), bytes.end());
      const Digest128 value = ByDefinition(moved);
      EXPECT_TRUE(internal::HashBlocks(offset, bytes, true) == value);
      EXPECT_TRUE(internal::HashBlocks(offset, bytes, false) == value);
    }
  }
}

TEST(ContentDigestTest, Version1IsTheLinearPartOfCrc32c) {
  const std::string text = "123456789";
  ContentDigest digest(text.size(), DigestVersion::k1);
  digest.AddRun(
      0, absl::MakeConstSpan(reinterpret_cast<const std::byte*>(text.data()),
                             text.size()));
  const std::string zeros(text.size(), '\0');
  EXPECT_EQ(digest.partial().low,
            static_cast<uint32_t>(absl::ComputeCrc32c(text)) ^
                static_cast<uint32_t>(absl::ComputeCrc32c(zeros)));
}

TEST(ContentDigestTest, DTypeShapeAndLengthAreMixedIn) {
  for (const DigestVersion version : kVersions) {
    ContentDigest digest(8, version);
    const Digest128 flat = digest.Finish(DType::kFloat32, {2});
    EXPECT_TRUE(flat != digest.Finish(DType::kInt32, {2}));
    EXPECT_TRUE(flat != digest.Finish(DType::kFloat32, {2, 1}));
    EXPECT_TRUE(flat != digest.Finish(DType::kFloat32, {1, 2}));
    EXPECT_TRUE(ContentDigest(0, version).Finish(DType::kFloat32, {0}) !=
                ContentDigest(4, version).Finish(DType::kFloat32, {}));
  }
}

TEST(ContentDigestTest, ValuesAreFixed) {
  // Stored in checkpoints: a change here breaks those written before.
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  const auto bytes = absl::MakeConstSpan(
      reinterpret_cast<const std::byte*>(values.data()), 24);
  ContentDigest first(24, DigestVersion::k1);
  first.AddRun(0, bytes);
  EXPECT_EQ(DigestHex(first.Finish(DType::kFloat32, {2, 3}), DigestVersion::k1),
            "dd2a543d8c08e1ce");
  EXPECT_EQ(
      DigestHex(DigestOfBytes("step", DigestVersion::k1), DigestVersion::k1),
      "5df889be2e8a74b0");
  ContentDigest second(24);
  second.AddRun(0, bytes);
  EXPECT_EQ(DigestHex(second.Finish(DType::kFloat32, {2, 3})),
            "0575396e6e1f55246d5ad83e374e71c2");
  EXPECT_EQ(DigestHex(DigestOfBytes("step")),
            "011967033f406d602472ac0f077bb6e4");
  EXPECT_EQ(DigestHex({0, 0x1f}), "0000000000000000000000000000001f");
}

TEST(ContentDigestTest, HexReadsBack) {
  for (const DigestVersion version : kVersions) {
    const Digest128 digest = {
        version == DigestVersion::k1 ? uint64_t{0} : 0x0123456789ABCDEF,
        0xFEDCBA9876543210};
    Digest128 back;
    EXPECT_TRUE(ParseDigestHex(DigestHex(digest, version), &back, version));
    EXPECT_TRUE(back == digest);
    EXPECT_FALSE(ParseDigestHex("12", &back, version));
    EXPECT_FALSE(ParseDigestHex(std::string(32, 'g'), &back, version));
  }
}

}  // namespace
}  // namespace dsd
