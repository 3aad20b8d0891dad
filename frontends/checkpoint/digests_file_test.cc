// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/digests_file.h"

#include <cstdint>
#include <string>

#include "absl/crc/crc32c.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

StoredDigests Sample() {
  StoredDigests digests;
  digests.index_bytes = 951;
  digests.index_crc = 0x89abcdef;
  digests.tensors["b"] = {1, 2};
  digests.tensors["a \"quoted\" \n key"] = {3, 4};
  digests.objects["a"] = {5, 6};
  return digests;
}

// The lines with the end that belongs to them.
std::string WithEnd(const std::string& lines, int keys) {
  return absl::StrCat(
      lines, "end ", keys, " ",
      absl::Hex(static_cast<uint32_t>(absl::ComputeCrc32c(lines)),
                absl::kZeroPad8),
      "\n");
}

TEST(DigestsFileTest, DecodesWhatItEncodes) {
  StoredDigests digests = Sample();
  for (const bool has_index : {true, false}) {
    if (!has_index) digests.index_bytes = digests.index_crc = 0;
    const std::string text = EncodeDigests(digests);
    const auto decoded = DecodeDigests(text);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(decoded->index_bytes, digests.index_bytes);
    EXPECT_EQ(decoded->index_crc, digests.index_crc);
    EXPECT_TRUE(decoded->tensors == digests.tensors);
    EXPECT_TRUE(decoded->objects == digests.objects);
  }
}

TEST(DigestsFileTest, OnlyWhatIsEncodedIsDecoded) {
  const std::string title = "dsd digests 2\n";
  const std::string index = "index 951 89abcdef\n";
  const std::string zeros(30, '0');
  const std::string a = absl::StrCat("tensor ", zeros, "0a a\n");
  const std::string b = absl::StrCat("tensor ", zeros, "0b b\n");
  const std::string object = absl::StrCat("object ", zeros, "0c a\n");
  const std::string good = WithEnd(title + index + a + b + object, 3);
  ASSERT_TRUE(DecodeDigests(good).ok()) << DecodeDigests(good).status();
  for (const std::string& bad : {
           WithEnd(title + index + b + a + object, 3),
           WithEnd(title + index + a + a + object, 3),
           WithEnd(title + index + object + a + b, 3),
           WithEnd(title + a + b + object + index, 3),
           WithEnd(title + index + index + a + b + object, 3),
           WithEnd(title + "index 0 89abcdef\n" + a + b + object, 3),
           WithEnd(title + index + a + b + object, 2),
           WithEnd(title + index + a + "more\n" + b + object, 3),
           absl::StrReplaceAll(good, {{"end 3", "end 4"}}),
           absl::StrReplaceAll(good, {{"0b b", "0B b"}}),
           good + "\n",
           good.substr(0, good.size() - 1),
           std::string(),
       }) {
    EXPECT_EQ(DecodeDigests(bad).status().code(), absl::StatusCode::kDataLoss)
        << bad;
  }
}

}  // namespace
}  // namespace dsd::checkpoint
