// SPDX-License-Identifier: Apache-2.0

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_MEMORY_FILE_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_MEMORY_FILE_H_

#include <cstring>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"

namespace dsd::dcp {

// A string as a file. Thread-safe.
class MemoryFile final : public ReadableFile {
 public:
  explicit MemoryFile(std::string bytes) : bytes_(std::move(bytes)) {}

  int64_t size_bytes() const override {
    return static_cast<int64_t>(bytes_.size());
  }

  absl::Status ReadAt(int64_t offset, absl::Span<std::byte> out) override {
    if (offset < 0 || offset + out.size() > bytes_.size()) {
      return absl::OutOfRangeError("read past the end");
    }
    std::memcpy(out.data(), bytes_.data() + offset, out.size());
    return absl::OkStatus();
  }

 private:
  const std::string bytes_;
};

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_MEMORY_FILE_H_
