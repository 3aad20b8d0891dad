// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/stream_transform.h"

#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "zstd.h"

namespace dsd::dcp {
namespace {

using ::testing::HasSubstr;

std::string Pack(const std::string& bytes) {
  std::string packed(ZSTD_compressBound(bytes.size()), '\0');
  packed.resize(ZSTD_compress(packed.data(), packed.size(), bytes.data(),
                              bytes.size(), 3));
  return packed;
}

std::string Text() {
  std::string text;
  for (int i = 0; i < 100000; ++i) text += std::to_string(i * i % 977);
  return text;
}

TEST(StreamTransformTest, ZstdDecodes) {
  const std::string text = Text();
  for (const char* name :
       {"stream.zstd/1", "stream.zstd/1.7", "stream.zstd/1, stream.zstd/1"}) {
    EXPECT_TRUE(CheckTransforms(name).ok());
  }
  const int64_t size = static_cast<int64_t>(text.size());
  EXPECT_EQ(*DecodeStream("stream.zstd/1", Pack(text), size), text);
  EXPECT_EQ(*DecodeStream("stream.zstd/1", Pack(""), size), "");
  // Several frames are one stream, and what was packed twice is unpacked twice.
  EXPECT_EQ(*DecodeStream("stream.zstd/1", Pack("abc") + Pack("def"), 10),
            "abcdef");
  EXPECT_EQ(
      *DecodeStream("stream.zstd/1, stream.zstd/1", Pack(Pack(text)), size),
      text);
}

TEST(StreamTransformTest, WhatIsUnknownIsNamed) {
  for (const char* name : {"stream.zstd/2", "stream.zstd", "stream.rot13/1", "",
                           "stream.zstd/1, stream.aes@x/1"}) {
    const absl::Status status = DecodeStream(name, Pack("x"), 10).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << name;
    EXPECT_EQ(CheckTransforms(name), status);
  }
  EXPECT_THAT(
      std::string(CheckTransforms("stream.zstd/1, stream.aes@x/1").message()),
      HasSubstr("stream.aes@x/1"));
}

TEST(StreamTransformTest, DamageAndBombsAreErrors) {
  const std::string packed = Pack(Text());
  for (size_t size = 0; size < packed.size(); size += 1 + size / 50) {
    EXPECT_EQ(DecodeStream("stream.zstd/1", packed.substr(0, size), 1 << 20)
                  .status()
                  .code(),
              absl::StatusCode::kDataLoss)
        << size;
  }
  EXPECT_EQ(
      DecodeStream("stream.zstd/1", packed + "junk", 1 << 20).status().code(),
      absl::StatusCode::kDataLoss);
  EXPECT_EQ(DecodeStream("stream.zstd/1", "junk", 100).status().code(),
            absl::StatusCode::kDataLoss);
  // Zeros take next to nothing.
  EXPECT_EQ(
      DecodeStream("stream.zstd/1", Pack(std::string(64 << 20, '\0')), 1 << 20)
          .status()
          .code(),
      absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace dsd::dcp
