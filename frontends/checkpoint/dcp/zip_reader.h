// SPDX-License-Identifier: Apache-2.0
//
// Reads a zip archive that is a slice of a file, such as one item of a .distcp
// file. Compressed and encrypted records are listed and not read; every offset
// is checked against the slice.

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_ZIP_READER_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_ZIP_READER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"

namespace dsd::dcp {

// A part of a file. Keeps what was fetched. Thread-compatible.
class FileSlice {
 public:
  // Borrows `file`. DataLoss if the slice is not inside the file.
  static absl::StatusOr<FileSlice> Create(ReadableFile* file, int64_t offset,
                                          int64_t length);

  int64_t length() const { return length_; }

  // Bytes [begin, begin + count) of the slice; valid while it lives. Reads the
  // file unless they were fetched as a whole before. DataLoss if they are not
  // in the slice.
  absl::StatusOr<absl::string_view> Fetch(int64_t begin, int64_t count);

  // The `gap` bytes in front of the slice, and, in the same read of the file,
  // the first `count` of it for later calls. DataLoss if there are not so many.
  absl::StatusOr<absl::string_view> FetchWithGap(int64_t gap, int64_t count);

  // The same as Fetch, copied out and not kept.
  absl::Status Read(int64_t begin, absl::Span<std::byte> out);

  // Read from the file so far.
  int64_t bytes_read() const { return bytes_read_; }

 private:
  struct Piece {
    int64_t begin;  // in the slice; negative with a gap
    int64_t size;
    std::unique_ptr<char[]> bytes;
  };
  FileSlice(ReadableFile* file, int64_t offset, int64_t length)
      : file_(file), offset_(offset), length_(length) {}
  absl::Status CheckRange(int64_t begin, int64_t count) const;
  // Where the bytes are, if they were fetched; else null.
  const char* Find(int64_t begin, int64_t count) const;
  // Reads and keeps bytes that may begin before the slice.
  absl::StatusOr<const char*> ReadPiece(int64_t begin, int64_t count);

  ReadableFile* file_;
  int64_t offset_;
  int64_t length_;
  int64_t bytes_read_ = 0;
  std::vector<Piece> pieces_;
};

class ZipReader {
 public:
  struct Record {
    std::string name;  // without the top directory
    int64_t header_at = 0;
    int64_t size_bytes = 0;
    uint32_t crc = 0;      // 0: not computed by the writer, or really 0
    bool is_plain = true;  // neither compressed nor encrypted
  };

  // Reads the directory at the end of `slice`, which is borrowed.
  // Errors: DataLoss (not a zip archive, or damaged: says where);
  // ResourceExhausted over `max_records`.
  static absl::StatusOr<ZipReader> Open(FileSlice* slice, int64_t max_records);

  const std::vector<Record>& records() const { return records_; }
  const Record* Find(absl::string_view name) const;

  // Where the content starts in the slice. Reads and checks the local header.
  // Unimplemented for a record that is not plain.
  absl::StatusOr<int64_t> ContentOffset(const Record& record) const;

  // The content; checks the CRC, if there is one. ResourceExhausted over
  // `max_bytes`.
  absl::StatusOr<absl::string_view> Content(const Record& record,
                                            int64_t max_bytes) const;

 private:
  explicit ZipReader(FileSlice* slice) : slice_(slice) {}

  FileSlice* slice_;
  std::string top_;  // "archive/"
  int64_t directory_at_ = 0;
  std::vector<Record> records_;
};

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_ZIP_READER_H_
