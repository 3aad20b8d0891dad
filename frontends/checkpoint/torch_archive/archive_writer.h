// SPDX-License-Identifier: Apache-2.0
//
// Writes archives that torch.load(weights_only=True) opens, and maps with
// mmap=True.

#ifndef DSD_FRONTENDS_CHECKPOINT_TORCH_ARCHIVE_ARCHIVE_WRITER_H_
#define DSD_FRONTENDS_CHECKPOINT_TORCH_ARCHIVE_ARCHIVE_WRITER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/value/flatten.h"
#include "dsd/core/value/value.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"

namespace dsd::torch_archive {

inline constexpr char kDigestsRecord[] = ".dsd_digests";

struct NewTensor {
  Path path;
  DType dtype;
  Dims shape;
  int64_t same_as = -1;  // an earlier tensor that it is; -1: none
};
struct NewObject {
  Path path;
  Object value;
};

struct Tree {
  std::string pickle;
  // Tensors that lie in objects, by the keys under which they are read, if they
  // have some, in the order of their storages, which follow those of the
  // tensors.
  std::vector<std::pair<std::optional<std::string>, HostTensor>> inner;
};

// A nested dict, with a storage for each tensor that is no other: text segments
// of paths are keys of dicts, numbers indices of lists, in which None stands
// where nothing is. What `nesting` says beyond that counts where it fits.
// Errors: InvalidArgument for a path that another one passes through, for a
// number beside texts, for what is no UTF-8, for an object that has no form
// (names them).
absl::StatusOr<Tree> EncodeTree(absl::Span<const NewTensor> tensors,
                                absl::Span<const NewObject> objects,
                                const Nesting& nesting = {});

// The bytes around the elements of an archive, front to back:
//
//   ArchiveWriter writer(tree.pickle);
//   for each storage, in the order of EncodeTree:
//     append writer.StartTensor(bytes), then the elements (contiguous),
//     then writer.FinishTensor(crc)
//   append writer.Finish(digests)
class ArchiveWriter {
 public:
  explicit ArchiveWriter(std::string pickle);
  ArchiveWriter(const ArchiveWriter&) = delete;
  ArchiveWriter& operator=(const ArchiveWriter&) = delete;

  std::string StartTensor(int64_t bytes);
  std::string FinishTensor(uint32_t crc);
  // `digests`: the content of the record kDigestsRecord, which Python ignores.
  std::string Finish(absl::string_view digests);

 private:
  std::string Take();

  std::string out_;
  dcp::ZipWriter zip_;
  int64_t next_ = 0;
};

}  // namespace dsd::torch_archive

#endif  // DSD_FRONTENDS_CHECKPOINT_TORCH_ARCHIVE_ARCHIVE_WRITER_H_
