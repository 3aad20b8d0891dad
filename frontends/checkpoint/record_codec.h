// SPDX-License-Identifier: Apache-2.0
//
// Small records between ranks of one save or load: numbers and texts, back to
// back.

#ifndef DSD_FRONTENDS_CHECKPOINT_RECORD_CODEC_H_
#define DSD_FRONTENDS_CHECKPOINT_RECORD_CODEC_H_

#include <cstdint>
#include <cstring>
#include <string>
#include <variant>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/value/value.h"

namespace dsd::checkpoint {

class RecordWriter {
 public:
  void Number(int64_t value) {
    out_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  void Put(const Digest128& digest) {
    Number(static_cast<int64_t>(digest.high));
    Number(static_cast<int64_t>(digest.low));
  }
  void Text(absl::string_view text) {
    Number(static_cast<int64_t>(text.size()));
    out_.append(text.data(), text.size());
  }
  void PutPath(const Path& path) {
    Number(static_cast<int64_t>(path.size()));
    for (const PathSegment& segment : path) {
      Number(static_cast<int64_t>(segment.index()));
      if (const auto* text = std::get_if<std::string>(&segment)) {
        Text(*text);
      } else {
        Number(std::get<int64_t>(segment));
      }
    }
  }
  std::string Take() { return std::move(out_); }

 private:
  std::string out_;
};

// After reading past the end, everything is zero and ok() is false.
class RecordReader {
 public:
  explicit RecordReader(absl::string_view in) : in_(in) {}

  int64_t Number() {
    int64_t value = 0;
    if (!Has(sizeof(value))) return 0;
    std::memcpy(&value, in_.data(), sizeof(value));
    in_.remove_prefix(sizeof(value));
    return value;
  }
  Digest128 GetDigest() {
    const uint64_t high = static_cast<uint64_t>(Number());
    return {high, static_cast<uint64_t>(Number())};
  }
  absl::string_view Text() {
    const int64_t size = Number();
    if (size < 0 || !Has(size)) return "";
    const absl::string_view text = in_.substr(0, size);
    in_.remove_prefix(size);
    return text;
  }
  Path GetPath() {
    Path path;
    for (int64_t left = Number(); left > 0 && ok_; --left) {
      if (Number() == 0) {
        path.emplace_back(std::string(Text()));
      } else {
        path.emplace_back(Number());
      }
    }
    return path;
  }
  bool ok() const { return ok_; }
  bool done() const { return in_.empty() || !ok_; }
  absl::Status status() const {
    return ok_ ? absl::OkStatus()
               : absl::InternalError("a rank sent a malformed record");
  }

 private:
  bool Has(size_t size) {
    ok_ = ok_ && in_.size() >= size;
    return ok_;
  }

  absl::string_view in_;
  bool ok_ = true;
};

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_RECORD_CODEC_H_
