// SPDX-License-Identifier: Apache-2.0
//
// Writes one data file from front to back, in large pieces.

#ifndef DSD_FRONTENDS_CHECKPOINT_DATA_FILE_WRITER_H_
#define DSD_FRONTENDS_CHECKPOINT_DATA_FILE_WRITER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"

namespace dsd::checkpoint {

// Thread-compatible. Errors of all calls: those of WritableFile.
class DataFileWriter {
 public:
  explicit DataFileWriter(std::unique_ptr<WritableFile> file);

  // Bytes appended so far.
  int64_t position() const { return position_; }

  absl::Status Append(absl::string_view bytes);
  absl::Status Append(absl::Span<const std::byte> bytes);

  // Zeros until position() % alignment == remainder.
  absl::Status PadTo(int64_t alignment, int64_t remainder);

  // Flushes, syncs, closes.
  absl::Status Finish();

 private:
  absl::Status Flush();

  std::unique_ptr<WritableFile> file_;
  std::string buffer_;  // not yet written: the end of what was appended
  int64_t position_ = 0;
};

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_DATA_FILE_WRITER_H_
