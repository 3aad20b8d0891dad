// SPDX-License-Identifier: Apache-2.0
//
// The index of a DCP checkpoint (`.metadata`), as columns: some 60 bytes per
// stored box.

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_METADATA_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_METADATA_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/value/value.h"
#include "dsd/frontends/checkpoint/dcp/pickle_reader.h"

namespace dsd::dcp {

// Where an item lies.
struct ItemLocation {
  uint32_t file = 0;  // index in Metadata::files
  int64_t offset_bytes = 0;
  int64_t length_bytes = -1;  // -1: not known
};

struct TensorEntry {
  std::string key;
  Path path;
  std::optional<DType> dtype;  // nullopt: one that is not known here
  std::string dtype_name;      // Python's, without "torch."
  Dims shape;
  size_t first_chunk = 0;  // in Metadata::locations
  size_t num_chunks = 0;
  size_t first_bound = 0;  // in Metadata::bounds

  int ndim() const { return static_cast<int>(shape.size()); }
};

struct ObjectEntryInfo {
  std::string key;
  Path path;
  ItemLocation location;
};

struct Metadata {
  std::vector<TensorEntry> tensors;
  std::vector<ObjectEntryInfo> objects;

  // Per chunk of a tensor, back to back: its offsets, then its sizes.
  std::vector<int64_t> bounds;
  std::vector<ItemLocation> locations;
  std::vector<std::string> files;  // single path components

  std::string save_id;  // "" if absent
  std::string version;  // "" if absent

  // Stream transforms (compression) by name; of chunks and of objects.
  absl::flat_hash_map<size_t, std::string> chunk_transforms;
  absl::flat_hash_map<size_t, std::string> object_transforms;

  // Box of chunk `index` of the tensor.
  Box ChunkBox(const TensorEntry& tensor, size_t index) const;
  const ItemLocation& ChunkLocation(const TensorEntry& tensor,
                                    size_t index) const {
    return locations[tensor.first_chunk + index];
  }

  // For writing: adds a tensor, then its chunks, in this order.
  void AddTensor(std::string key, Path path, DType dtype, Dims shape);
  void AddChunk(const Box& box, const ItemLocation& location);
};

// Decodes an index: torch 2.2 to 2.15, pickle protocols 2 to 5. Reads in order.
// Chunks of one tensor with equal offsets and sizes count once.
// Errors: DataLoss naming key and what is wrong (not a pickle, a type that is
// not expected, a chunk outside its tensor, overlapping chunks, an item without
// a place or with two, a file name that is a path); ResourceExhausted over a
// limit.
absl::StatusOr<Metadata> DecodeMetadata(int64_t size_bytes,
                                        Pickle::ReadFn read);
absl::StatusOr<Metadata> DecodeMetadata(absl::string_view bytes);

// No two chunks of a tensor overlap. DataLoss naming both; ResourceExhausted if
// there are too many beside each other to tell.
absl::Status CheckOverlap(const Metadata& metadata);

struct RankObject {
  size_t rank;
  size_t object;  // in that rank's Metadata::objects
};

// The indexes that all ranks of a job wrote for themselves
// (use_collectives=False), as one. Of equal boxes the first counts. Objects of
// one key for which `are_equal` gives false, are all kept, as "<key>@rank<r>".
// Errors: of `are_equal`; DataLoss for ranks that contradict each other.
absl::StatusOr<Metadata> MergeRankLocal(
    absl::Span<const Metadata> ranks,
    absl::FunctionRef<absl::StatusOr<bool>(absl::Span<const RankObject>)>
        are_equal);

// Encodes for Python's torch >= 2.6, in pieces. Errors: of `sink`;
// InvalidArgument for keys that are not UTF-8.
absl::Status EncodeMetadata(
    const Metadata& metadata,
    absl::FunctionRef<absl::Status(absl::string_view)> sink);

// Elements that are in no chunk; 0 if the tensor is complete.
int64_t NumMissingElements(const Metadata& metadata, const TensorEntry& tensor);

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_METADATA_H_
