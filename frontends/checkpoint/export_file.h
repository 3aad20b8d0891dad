// SPDX-License-Identifier: Apache-2.0
//
// One file of an export while it is written: what its format has around the
// elements, their checksums and digests. Private to this package.

#ifndef DSD_FRONTENDS_CHECKPOINT_EXPORT_FILE_H_
#define DSD_FRONTENDS_CHECKPOINT_EXPORT_FILE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/env.h"
#include "dsd/core/plan/catalog.h"
#include "dsd/frontends/checkpoint/data_file_writer.h"
#include "dsd/frontends/checkpoint/digests_file.h"
#include "dsd/frontends/checkpoint/safetensors/header.h"
#include "dsd/frontends/checkpoint/torch_archive/archive_writer.h"

namespace dsd::checkpoint {

// The bytes of a file around those of its elements, in the order in which they
// are asked for.
class FileFrame {
 public:
  virtual ~FileFrame() = default;
  virtual bool needs_crc() const = 0;
  // Length of what Front gives.
  virtual absl::StatusOr<int64_t> FrontBytes() = 0;
  virtual std::string StartTensor(int64_t bytes) = 0;
  virtual std::string FinishTensor(uint32_t crc) = 0;
  virtual std::string Finish(const StoredDigests& digests) = 0;
  // What stands before all of it.
  virtual absl::StatusOr<std::string> Front(const StoredDigests& digests) = 0;
};

std::unique_ptr<FileFrame> MakeSafetensorsFrame(safetensors::Header header);
std::unique_ptr<FileFrame> MakeArchiveFrame(torch_archive::Tree tree);

// Thread-compatible.
class ExportFile {
 public:
  // `element_bytes`: of all its tensors.
  static absl::StatusOr<std::unique_ptr<ExportFile>> Start(
      std::unique_ptr<FileFrame> frame, std::unique_ptr<WritableFile> file,
      int64_t element_bytes, Env* env);

  // For each tensor in the order of the frame: StartTensor, its elements in
  // order, FinishTensor.
  absl::Status StartTensor(int64_t bytes);
  absl::Status Append(absl::Span<const std::byte> bytes);
  absl::Status FinishTensor(const TensorSpec& spec);

  // `fqn` is another name of the finished tensor `first`.
  void AddSame(const std::string& fqn, const std::string& first);

  // Returns the file's length when all of it is on stable storage.
  absl::StatusOr<int64_t> Finish();

 private:
  ExportFile(std::unique_ptr<FileFrame> frame,
             std::unique_ptr<WritableFile> file, Env* env);

  const std::unique_ptr<FileFrame> frame_;
  DataFileWriter out_;
  // Of the tensor that is written.
  uint32_t crc_ = 0;
  ContentDigest digest_{0};
  int64_t digested_bytes_ = 0;
  StoredDigests digests_;
};

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_EXPORT_FILE_H_
