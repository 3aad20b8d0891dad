// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/data_file_writer.h"

#include <utility>

#include "dsd/core/base/status_macros.h"

namespace dsd::checkpoint {
namespace {

// Larger pieces are not copied.
constexpr size_t kBufferBytes = size_t{1} << 20;

}  // namespace

DataFileWriter::DataFileWriter(std::unique_ptr<WritableFile> file)
    : file_(std::move(file)) {}

absl::Status DataFileWriter::Append(absl::string_view bytes) {
  return Append(absl::MakeConstSpan(
      reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()));
}

absl::Status DataFileWriter::Append(absl::Span<const std::byte> bytes) {
  if (buffer_.size() + bytes.size() > kBufferBytes) {
    DSD_RETURN_IF_ERROR(Flush());
    if (bytes.size() >= kBufferBytes) {
      DSD_RETURN_IF_ERROR(file_->WriteAt(position_, bytes));
      position_ += static_cast<int64_t>(bytes.size());
      return absl::OkStatus();
    }
  }
  buffer_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  position_ += static_cast<int64_t>(bytes.size());
  return absl::OkStatus();
}

absl::Status DataFileWriter::PadTo(int64_t alignment, int64_t remainder) {
  const int64_t padding =
      ((remainder - position_) % alignment + alignment) % alignment;
  return Append(std::string(padding, '\0'));
}

absl::Status DataFileWriter::Flush() {
  if (buffer_.empty()) return absl::OkStatus();
  DSD_RETURN_IF_ERROR(file_->WriteAt(
      position_ - static_cast<int64_t>(buffer_.size()),
      absl::MakeConstSpan(reinterpret_cast<const std::byte*>(buffer_.data()),
                          buffer_.size())));
  buffer_.clear();
  return absl::OkStatus();
}

absl::Status DataFileWriter::Finish() {
  DSD_RETURN_IF_ERROR(Flush());
  DSD_RETURN_IF_ERROR(file_->Sync());
  return file_->Close();
}

}  // namespace dsd::checkpoint
