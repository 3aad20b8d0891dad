// SPDX-License-Identifier: Apache-2.0
//
// Writes one file from front to back, in large aligned pieces, of which some
// are on their way to storage while the next is filled. What stands at its
// front may become known last.

#ifndef DSD_FRONTENDS_CHECKPOINT_DATA_FILE_WRITER_H_
#define DSD_FRONTENDS_CHECKPOINT_DATA_FILE_WRITER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "dsd/core/base/aligned_buffer.h"
#include "dsd/core/base/env.h"

namespace dsd::checkpoint {

// Thread-compatible. Errors of all calls: those of WritableFile; what a write
// in the background reports, a later call returns.
class DataFileWriter {
 public:
  // Files up to this size are written by the calling thread.
  static constexpr int64_t kPieceBytes = int64_t{4} << 20;

  DataFileWriter(std::unique_ptr<WritableFile> file, Env* env);
  ~DataFileWriter();

  // Bytes appended so far.
  int64_t position() const { return position_; }

  absl::Status Append(absl::string_view bytes);
  absl::Status Append(absl::Span<const std::byte> bytes);

  // At the beginning: how many bytes there will be, or at least.
  absl::Status Expect(int64_t bytes) { return file_->Reserve(bytes); }

  // At the beginning: the first `bytes` of the file are those that Finish gets.
  // The pieces with them stay in memory until then: each is written once.
  absl::Status Reserve(int64_t bytes);

  // Zeros until position() is this.
  absl::Status PadTo(int64_t position);

  // Returns when all of it is on stable storage; closes. `front` are the bytes
  // of Reserve.
  absl::Status Finish(absl::string_view front = "");

 private:
  static constexpr int kWriters = 2;
  static constexpr int kBuffers = kWriters + 1;

  // Hands the full buffer to a writer and takes a free one.
  absl::Status Submit();
  // Writes what begins at byte `at`, whole pages by themselves.
  absl::Status WriteOut(int64_t at, absl::Span<const std::byte> bytes);
  void RunWriter();
  void Stop();
  bool HasWorkOrStops() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return queued_ != nullptr || stop_;
  }
  bool HasFree() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return queued_ == nullptr && (!free_.empty() || !status_.ok());
  }

  const std::unique_ptr<WritableFile> file_;
  Env& env_;
  AlignedBuffer memory_;  // of kBuffers pieces
  std::byte* current_ = nullptr;
  int64_t used_ = 0;  // of current_
  int64_t position_ = 0;
  int64_t reserved_ = 0;
  std::vector<std::unique_ptr<AlignedBuffer>> held_;  // pieces, from the front
  std::vector<std::unique_ptr<EnvThread>> writers_;

  absl::Mutex mu_;
  std::vector<std::byte*> free_ ABSL_GUARDED_BY(mu_);
  std::byte* queued_ ABSL_GUARDED_BY(mu_) = nullptr;
  int64_t queued_at_ ABSL_GUARDED_BY(mu_) = 0;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_DATA_FILE_WRITER_H_
