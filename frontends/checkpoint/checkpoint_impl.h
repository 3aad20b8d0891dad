// SPDX-License-Identifier: Apache-2.0
//
// What is behind Checkpoint, for the other files of this package.

#ifndef DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_IMPL_H_
#define DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_IMPL_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/env.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/dcp/metadata.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/tensor_item.h"
#include "dsd/frontends/checkpoint/digests_file.h"

namespace dsd::checkpoint {

struct Checkpoint::Impl {
  Format format = Format::kDcp;
  std::string path;
  std::string directory;
  Env* env = nullptr;
  // As in OpenOptions. Without digests the CRC of a record is compared that is
  // read as a whole.
  bool verify = true;
  // What lies where, in every format. A location is that of an archive with one
  // item in DCP, else that of the bytes that `items` refers to.
  dcp::Metadata index;
  // Files that it is made of, if each rank wrote its own.
  std::vector<std::string> rank_indexes;
  std::vector<std::pair<std::string, std::string>> attributes;

  // Of formats without an archive per item: what a torch.save archive says of
  // chunk i, relative to its location. Empty: elements lie back to back.
  std::vector<dcp::TensorItem> items;
  std::vector<size_t> same_as;
  Nesting nesting;
  // ... and the objects, of index.objects[i].
  std::vector<dcp::ObjectItem> values;

  Digest fingerprint;
  Catalog catalog;
  std::vector<size_t> entry_of;  // catalog position -> index.tensors
  std::vector<std::pair<std::string, std::string>> unreadable;
  std::vector<StoredObject> objects;

  // Written by dsd, and its digests are there and in use, of all tensors. Then
  // all bytes of the data files of a DCP checkpoint are known: what is no
  // payload is what dsd writes around it.
  bool has_digests = false;
  StoredDigests digests;
  // Where the bytes before an item begin that belong to no item, by position in
  // index.locations and index.objects; and the length of each file.
  std::vector<int64_t> chunk_gap;
  std::vector<int64_t> object_gap;
  std::vector<int64_t> file_bytes;
};

// Bytes of the elements in all stored boxes of the catalog.
int64_t StoredBytes(const Checkpoint::Impl& impl);

// The catalog and the lists of objects and unreadable tensors, from the index.
absl::Status FillCatalog(Checkpoint::Impl* impl);

// The rest of an Impl that has path, env and verify.
absl::Status OpenDcp(Checkpoint::Impl* impl);
absl::Status OpenSafetensors(Checkpoint::Impl* impl);
absl::Status OpenTorchArchive(Checkpoint::Impl* impl);

// DataLoss over `max_bytes`.
absl::StatusOr<std::string> ReadWhole(FileSystem& files,
                                      const std::string& path,
                                      int64_t max_bytes);

// By what is at `path`. NotFound for a file of no format; Unimplemented for the
// older one of torch.save. Without anything at `path`: kDcp, to report it.
absl::StatusOr<Format> DetectFormat(FileSystem& files, const std::string& path);

class CheckpointInternals {
 public:
  static const Checkpoint::Impl& Get(const Checkpoint& checkpoint) {
    return *checkpoint.impl_;
  }
};

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_IMPL_H_
