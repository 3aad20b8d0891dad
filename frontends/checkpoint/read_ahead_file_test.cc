// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/read_ahead_file.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

// Counts what it is asked for; its last bytes cannot be read.
class CountingFile final : public ReadableFile {
 public:
  struct Counts {
    int64_t reads = 0;
    int64_t bytes = 0;
  };
  CountingFile(std::string content, int64_t damaged, Counts* counts)
      : content_(std::move(content)), damaged_(damaged), counts_(counts) {}

  int64_t size_bytes() const override {
    return static_cast<int64_t>(content_.size());
  }
  absl::Status ReadAt(int64_t offset, absl::Span<std::byte> out) override {
    ++counts_->reads;
    counts_->bytes += static_cast<int64_t>(out.size());
    if (offset + static_cast<int64_t>(out.size()) > size_bytes() - damaged_) {
      return absl::DataLossError("damaged");
    }
    std::copy_n(reinterpret_cast<const std::byte*>(content_.data()) + offset,
                out.size(), out.begin());
    return absl::OkStatus();
  }

 private:
  const std::string content_;
  const int64_t damaged_;
  Counts* const counts_;
};

class ReadAheadFileTest : public ::testing::Test {
 protected:
  void Open(int64_t size, int64_t damaged = 0) {
    content_.clear();
    for (int64_t i = 0; i < size; ++i) {
      content_.push_back(static_cast<char>(i * 7 + i / 251));
    }
    counts_ = {};
    file_ = std::make_unique<ReadAheadFile>(
        std::make_unique<CountingFile>(content_, damaged, &counts_));
  }
  absl::Status Read(int64_t offset, int64_t count) {
    std::string out(count, '\0');
    const absl::Status status = file_->ReadAt(
        offset,
        absl::MakeSpan(reinterpret_cast<std::byte*>(out.data()), count));
    if (status.ok()) {
      EXPECT_EQ(out, content_.substr(offset, count)) << offset;
    }
    return status;
  }

  std::string content_;
  CountingFile::Counts counts_;
  std::unique_ptr<ReadAheadFile> file_;
};

TEST_F(ReadAheadFileTest, SmallReadsThatFollowEachOtherAreFewLargeOnes) {
  Open(1 << 20);
  for (int64_t at = 0; at + 1400 <= 1 << 20; at += 1450) {
    ASSERT_TRUE(Read(at, 1400).ok());
  }
  EXPECT_LE(counts_.reads, 32);
  EXPECT_LE(counts_.bytes, (1 << 20) + 32 * 1400);
}

TEST_F(ReadAheadFileTest, OtherReadsAreAsTheyWere) {
  Open(1 << 20);
  // Here and there.
  for (int64_t at = 1000000; at > 10000; at -= 10000) {
    ASSERT_TRUE(Read(at, 1000).ok());
  }
  EXPECT_EQ(counts_.reads, 99);
  EXPECT_EQ(counts_.bytes, 99 * 1000);
  // Large ones with small ones between.
  Open(1 << 20);
  for (int64_t at = 0; at < 1 << 20; at += 1 << 18) {
    ASSERT_TRUE(Read(at, 1000).ok());
    ASSERT_TRUE(Read(at + 1000, (1 << 18) - 1000).ok());
  }
  EXPECT_EQ(counts_.reads, 8);
  EXPECT_EQ(counts_.bytes, 1 << 20);
}

TEST_F(ReadAheadFileTest, AnErrorIsThatOfTheBytesAskedFor) {
  Open(100000, 1);
  for (int64_t at = 0; at < 99900; at += 100) {
    EXPECT_TRUE(Read(at, 100).ok()) << at;
  }
  EXPECT_EQ(Read(99900, 100).code(), absl::StatusCode::kDataLoss);
}

TEST_F(ReadAheadFileTest, ReadsPastTheEndAreRefusedByTheFile) {
  Open(3000);
  for (int64_t at = 0; at < 3000; at += 100) {
    ASSERT_TRUE(Read(at, 100).ok()) << at;
  }
  EXPECT_EQ(Read(3000, 100).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(Read(3500, 100).code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace dsd::checkpoint
