// SPDX-License-Identifier: Apache-2.0
//
// Writes a zip archive as torch.save does: stored records under "archive/",
// each payload at a multiple of 64 bytes from the start of the archive.

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_ZIP_WRITER_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_ZIP_WRITER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace dsd::dcp {

// Of a zip record; libdeflate's, at memory speed.
uint32_t Crc32(uint32_t crc, absl::string_view bytes);

// Appends the archive to a string, which the caller may empty between calls.
// The content of large records goes past it.
class ZipWriter {
 public:
  static constexpr int64_t kAlignment = 64;

  explicit ZipWriter(std::string* out) : out_(out) {}

  void AddRecord(absl::string_view name, absl::string_view content);

  // Appends what precedes a payload of `size_bytes`; the caller puts the
  // payload after it and then calls FinishRecord with its CRC.
  void StartRecord(absl::string_view name, int64_t size_bytes);
  void FinishRecord(uint32_t crc);

  // Appends the directory. The archive is complete.
  void Finish();

  // Bytes of the archive so far, payloads included.
  int64_t position() const { return position_; }

 private:
  struct Record {
    std::string name;
    int64_t header_at;
    int64_t size_bytes;
    uint32_t crc;
  };

  void Append(absl::string_view bytes);

  std::string* const out_;
  int64_t position_ = 0;
  std::vector<Record> records_;
};

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_ZIP_WRITER_H_
