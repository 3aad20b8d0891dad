// SPDX-License-Identifier: Apache-2.0
//
// What is behind Checkpoint, for the other files of this package.

#ifndef DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_IMPL_H_
#define DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_IMPL_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/dcp/metadata.h"
#include "dsd/frontends/checkpoint/digests_file.h"

namespace dsd::checkpoint {

struct Checkpoint::Impl {
  std::string directory;
  Env* env = nullptr;
  dcp::Metadata index;
  // Files that it is made of, if each rank wrote its own.
  std::vector<std::string> rank_indexes;
  Digest fingerprint;
  Catalog catalog;
  std::vector<size_t> entry_of;  // catalog position -> index.tensors
  std::vector<std::pair<std::string, std::string>> unreadable;
  std::vector<StoredObject> objects;

  // Written by dsd, and its digests are there and in use. Then all bytes of the
  // data files are known: what is no payload is what dsd writes around it.
  bool has_digests = false;
  StoredDigests digests;
  // Where the bytes before an item begin that belong to no item, by position in
  // index.locations and index.objects; and the length of each file.
  std::vector<int64_t> chunk_gap;
  std::vector<int64_t> object_gap;
  std::vector<int64_t> file_bytes;
};

class CheckpointInternals {
 public:
  static const Checkpoint::Impl& Get(const Checkpoint& checkpoint) {
    return *checkpoint.impl_;
  }
};

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_IMPL_H_
