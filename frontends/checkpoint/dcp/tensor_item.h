// SPDX-License-Identifier: Apache-2.0
//
// One stored tensor: the archive that torch.save(tensor) writes.

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_TENSOR_ITEM_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_TENSOR_ITEM_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/box.h"
#include "dsd/frontends/checkpoint/dcp/pickle_reader.h"
#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"
#include "dsd/frontends/checkpoint/dcp/zip_reader.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"

namespace dsd::dcp {

// Where the elements of a stored tensor lie in its slice.
struct TensorItem {
  DType dtype = DType::kFloat32;
  Dims shape;
  Dims strides;         // in elements, >= 0
  int64_t data_at = 0;  // of element [0, ..., 0]; all elements are in the slice

  // The record that has them, and its CRC (0: not computed).
  int64_t record_at = 0;
  int64_t record_bytes = 0;
  uint32_t record_crc = 0;

  // What Read elements still need: see Normalize.
  bool big_endian = false;
  bool conjugated = false;  // the imaginary parts are stored negated
  bool negated = false;     // all values are

  bool is_plain() const { return !big_endian && !conjugated && !negated; }
  // Makes elements, as they are stored, what they stand for.
  void Normalize(absl::Span<std::byte> elements) const;
};

// A tensor as a pickle has it: a view of a storage, which is the record
// "data/<storage_key>" of the same archive.
struct TensorView {
  DType dtype = DType::kFloat32;
  Dims shape;
  Dims strides;        // in elements, >= 0
  int64_t offset = 0;  // of element [0, ..., 0], in elements
  std::string storage_key;
  int64_t storage_bytes = 0;
  bool conjugated = false;  // as in TensorItem
  bool negated = false;
};

// Whether the value rebuilds a tensor of some kind.
bool IsTensorCall(PickleValue value);

// Errors: as ReadTensorItem.
absl::StatusOr<TensorView> ReadTensorView(PickleValue value);

// The view in its record, whose content begins at `record_at`. DataLoss if it
// reaches outside.
absl::StatusOr<TensorItem> PlaceTensor(const TensorView& view,
                                       const ZipReader::Record& record,
                                       int64_t record_at, bool big_endian);

// Whether the archive has big-endian elements. DataLoss for a byte order that
// is none.
absl::StatusOr<bool> IsBigEndian(const ZipReader& zip);

// Puts a contiguous tensor, whose storage is the record "data/<storage_key>",
// on the stack of the pickle.
void WriteTensor(PickleWriter& pickle, DType dtype,
                 absl::Span<const int64_t> shape,
                 absl::string_view storage_key);

// Reads archive and pickle; not the elements.
// Errors: DataLoss (damaged, or not a tensor); Unimplemented (quantized,
// sparse, of an unknown dtype).
absl::StatusOr<TensorItem> ReadTensorItem(FileSlice* slice);

// What surrounds the elements of a contiguous tensor in an archive written
// here. The elements start at a multiple of 64 from the start of the archive.
class TensorArchive {
 public:
  TensorArchive(DType dtype, absl::Span<const int64_t> shape);

  const std::string& head() const { return head_; }
  int64_t payload_bytes() const { return payload_bytes_; }
  int64_t tail_bytes() const { return static_cast<int64_t>(tail_.size()); }
  int64_t total_bytes() const {
    return static_cast<int64_t>(head_.size()) + payload_bytes_ + tail_bytes();
  }

  // What follows a payload with this CRC-32.
  std::string Tail(uint32_t crc) const;

  // The CRC in a tail; nullopt if it is not one that Tail makes.
  std::optional<uint32_t> CrcOfTail(absl::string_view tail) const;

 private:
  void WriteHead(ZipWriter* zip) const;
  std::string MakeTail(uint32_t crc) const;

  std::string pickle_;
  std::string head_;
  int64_t payload_bytes_;
  std::string tail_;            // with a CRC of 0
  std::vector<size_t> crc_at_;  // where the CRC is in it
};

// Archives by dtype and shape, made when first asked for: most tensors of a
// model share a few shapes. Thread-compatible.
class TensorArchives {
 public:
  // Valid until the next call.
  const TensorArchive& Get(DType dtype, const Dims& shape);

 private:
  absl::flat_hash_map<std::pair<DType, Dims>, std::unique_ptr<TensorArchive>>
      archives_;
};

// Whether torch.save has a form for the dtype that TensorArchive writes: all.
// The name of its typed storage class ("FloatStorage"), or "" for those that
// are stored untyped.
absl::string_view StorageClass(DType dtype);

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_TENSOR_ITEM_H_
