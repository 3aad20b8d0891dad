// SPDX-License-Identifier: Apache-2.0

#ifndef DSD_FRONTENDS_CHECKPOINT_READ_AHEAD_FILE_H_
#define DSD_FRONTENDS_CHECKPOINT_READ_AHEAD_FILE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"

namespace dsd::checkpoint {

// Makes few large reads of many small ones that follow each other, each twice
// as long as the one before: no more is read in vain than was of use. Unlike
// other files it is thread-compatible.
class ReadAheadFile final : public ReadableFile {
 public:
  explicit ReadAheadFile(std::unique_ptr<ReadableFile> file)
      : file_(std::move(file)) {}

  int64_t size_bytes() const override { return file_->size_bytes(); }
  absl::Status ReadAt(int64_t offset, absl::Span<std::byte> out) override;

 private:
  static constexpr int64_t kMinLength = 256;
  static constexpr int64_t kMaxLength = 64 << 10;
  // What may lie between reads that follow each other.
  static constexpr int64_t kMaxGapBytes = 4096;

  bool IsAhead(int64_t offset, int64_t count) const {
    return offset >= begin_ && offset + count <= end_;
  }
  void ReadAhead(int64_t offset, int64_t count);

  const std::unique_ptr<ReadableFile> file_;
  int64_t last_end_ = 0;  // of the read before
  int64_t length_ = kMinLength;
  std::vector<std::byte> ahead_;  // bytes [begin_, end_) of the file
  int64_t begin_ = 0;
  int64_t end_ = 0;
};

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_READ_AHEAD_FILE_H_
