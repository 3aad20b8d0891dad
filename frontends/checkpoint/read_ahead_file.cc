// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/read_ahead_file.h"

#include <algorithm>
#include <cstring>

namespace dsd::checkpoint {

absl::Status ReadAheadFile::ReadAt(int64_t offset, absl::Span<std::byte> out) {
  const int64_t count = static_cast<int64_t>(out.size());
  if (!IsAhead(offset, count)) ReadAhead(offset, count);
  last_end_ = offset + count;
  if (!IsAhead(offset, count)) return file_->ReadAt(offset, out);
  std::memcpy(out.data(), ahead_.data() + (offset - begin_), count);
  return absl::OkStatus();
}

void ReadAheadFile::ReadAhead(int64_t offset, int64_t count) {
  const bool follows =
      offset >= last_end_ && offset - last_end_ <= kMaxGapBytes;
  const bool is_small = 2 * count <= kMaxLength;
  length_ =
      follows && is_small ? std::min(2 * length_, kMaxLength) : kMinLength;
  // A read past the end is the file's to refuse.
  if (!follows || 2 * count > length_ || count > size_bytes() - offset) return;
  ahead_.resize(kMaxLength);
  const int64_t length = std::min(length_, size_bytes() - offset);
  begin_ = offset;
  // An error may lie behind what is asked for.
  end_ = file_->ReadAt(offset, absl::MakeSpan(ahead_).first(length)).ok()
             ? offset + length
             : offset;
}

}  // namespace dsd::checkpoint
