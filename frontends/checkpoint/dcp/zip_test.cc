// SPDX-License-Identifier: Apache-2.0

#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/frontends/checkpoint/dcp/memory_file.h"
#include "dsd/frontends/checkpoint/dcp/zip_reader.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"
#include "gtest/gtest.h"

namespace dsd::dcp {
namespace {

absl::StatusOr<std::string> ReadRecord(const std::string& file, int64_t offset,
                                       int64_t length, absl::string_view name) {
  MemoryFile memory(file);
  auto slice = FileSlice::Create(&memory, offset, length);
  if (!slice.ok()) return slice.status();
  const auto zip = ZipReader::Open(&*slice, 16);
  if (!zip.ok()) return zip.status();
  const ZipReader::Record* record = zip->Find(name);
  if (record == nullptr) return absl::NotFoundError(name);
  const auto content = zip->Content(*record, 1 << 20);
  if (!content.ok()) return content.status();
  return std::string(*content);
}

std::string SmallArchive() {
  std::string out;
  ZipWriter zip(&out);
  zip.AddRecord("data.pkl", "hello");
  zip.AddRecord("empty", "");
  zip.AddRecord("data/0", std::string(100, 'x'));
  zip.Finish();
  EXPECT_EQ(zip.position(), static_cast<int64_t>(out.size()));
  return out;
}

TEST(ZipTest, RoundTripInsideAFile) {
  const std::string archive = SmallArchive();
  const int64_t length = static_cast<int64_t>(archive.size());
  const std::string file = "before!" + archive + "after";
  EXPECT_EQ(*ReadRecord(file, 7, length, "data.pkl"), "hello");
  EXPECT_EQ(*ReadRecord(file, 7, length, "empty"), "");
  EXPECT_EQ(*ReadRecord(file, 7, length, "data/0"), std::string(100, 'x'));
  // Bytes after the archive are tolerated, as Python does.
  EXPECT_EQ(*ReadRecord(file, 7, length + 5, "data.pkl"), "hello");
  EXPECT_FALSE(ReadRecord(file, 7, length + 6, "data.pkl").ok());
  EXPECT_FALSE(ReadRecord(file, -1, length, "data.pkl").ok());
  EXPECT_FALSE(ReadRecord(file, 7, -1, "data.pkl").ok());
}

TEST(ZipTest, PayloadsAreAligned) {
  const std::string archive = SmallArchive();
  MemoryFile file(archive);
  auto slice = FileSlice::Create(&file, 0, archive.size());
  const auto zip = ZipReader::Open(&*slice, 16);
  ASSERT_TRUE(zip.ok()) << zip.status();
  for (const ZipReader::Record& record : zip->records()) {
    EXPECT_EQ(*zip->ContentOffset(record) % 64, 0) << record.name;
  }
}

TEST(ZipTest, EveryTruncationAndEveryFlipIsATypedError) {
  const std::string archive = SmallArchive();
  for (size_t size = 0; size < archive.size(); ++size) {
    const auto read = ReadRecord(archive.substr(0, size), 0, size, "data.pkl");
    EXPECT_EQ(read.status().code(), absl::StatusCode::kDataLoss) << size;
  }
  for (size_t bit = 0; bit < archive.size() * 8; ++bit) {
    std::string bad = archive;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
    const auto read = ReadRecord(bad, 0, bad.size(), "data.pkl");
    // Not every byte matters to a reader, but what is read is right.
    if (read.ok()) {
      EXPECT_EQ(*read, "hello") << bit;
    }
  }
}

TEST(ZipTest, RefusesWhatItDoesNotRead) {
  // Compressed.
  std::string compressed = SmallArchive();
  for (size_t at = 0; at + 46 < compressed.size(); ++at) {
    if (compressed.compare(at, 4, "PK\x01\x02") == 0) compressed[at + 10] = 8;
  }
  EXPECT_EQ(
      ReadRecord(compressed, 0, compressed.size(), "data.pkl").status().code(),
      absl::StatusCode::kUnimplemented);
  // Twice the same name.
  std::string twice;
  ZipWriter zip(&twice);
  zip.AddRecord("a", "1");
  zip.AddRecord("a", "2");
  zip.Finish();
  EXPECT_EQ(ReadRecord(twice, 0, twice.size(), "a").status().code(),
            absl::StatusCode::kDataLoss);
  // More records than the limit.
  std::string many;
  ZipWriter more(&many);
  for (int i = 0; i < 17; ++i) more.AddRecord(absl::StrCat(i), "");
  more.Finish();
  EXPECT_EQ(ReadRecord(many, 0, many.size(), "1").status().code(),
            absl::StatusCode::kResourceExhausted);
}

// A file of which only the parts that were written exist.
class SparseFile final : public ReadableFile {
 public:
  SparseFile(std::string head, int64_t hole, std::string tail)
      : head_(std::move(head)), hole_(hole), tail_(std::move(tail)) {}
  int64_t size_bytes() const override {
    return static_cast<int64_t>(head_.size()) + hole_ +
           static_cast<int64_t>(tail_.size());
  }
  absl::Status ReadAt(int64_t offset, absl::Span<std::byte> out) override {
    for (std::byte& byte : out) {
      const int64_t tail_at =
          offset - hole_ - static_cast<int64_t>(head_.size());
      byte = offset < static_cast<int64_t>(head_.size())
                 ? static_cast<std::byte>(head_[offset])
             : tail_at >= 0 ? static_cast<std::byte>(tail_[tail_at])
                            : std::byte{0};
      ++offset;
    }
    return absl::OkStatus();
  }

 private:
  const std::string head_;
  const int64_t hole_;
  const std::string tail_;
};

TEST(ZipTest, RecordsOver4GiB) {
  constexpr int64_t kSize = (int64_t{5} << 30) + 3;
  std::string head, out;
  ZipWriter zip(&out);
  zip.AddRecord("data.pkl", "hello");
  zip.StartRecord("data/0", kSize);
  head = std::move(out);
  out.clear();
  zip.FinishRecord(0x12345678);
  zip.AddRecord("version", "3\n");
  zip.Finish();
  SparseFile file(head, kSize, out);
  EXPECT_EQ(file.size_bytes(), zip.position());
  auto slice = FileSlice::Create(&file, 0, file.size_bytes());
  const auto read = ZipReader::Open(&*slice, 16);
  ASSERT_TRUE(read.ok()) << read.status();
  const ZipReader::Record* large = read->Find("data/0");
  ASSERT_NE(large, nullptr);
  EXPECT_EQ(large->size_bytes, kSize);
  EXPECT_EQ(large->crc, 0x12345678u);
  EXPECT_EQ(*read->ContentOffset(*large), static_cast<int64_t>(head.size()));
  EXPECT_EQ(head.size() % 64, 0u);
  const ZipReader::Record* after = read->Find("version");
  ASSERT_NE(after, nullptr);
  EXPECT_EQ(*read->Content(*after, 10), "3\n");
}

}  // namespace
}  // namespace dsd::dcp
