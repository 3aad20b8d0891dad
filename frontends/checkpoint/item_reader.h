// SPDX-License-Identifier: Apache-2.0
//
// Reads stored items: opens files and archives as they are needed, and elements
// of stored boxes by the byte ranges they lie in.

#ifndef DSD_FRONTENDS_CHECKPOINT_ITEM_READER_H_
#define DSD_FRONTENDS_CHECKPOINT_ITEM_READER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/layout/box.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/tensor_item.h"
#include "dsd/frontends/checkpoint/dcp/zip_reader.h"

namespace dsd::checkpoint {

// Thread-compatible. Errors of all calls name key, file and byte: DataLoss for
// what does not decode or differs from what dsd writes there; NotFound for a
// file that is missing; Unimplemented for stored forms that are not supported.
class ItemReader {
 public:
  // Borrows `impl`.
  explicit ItemReader(const Checkpoint::Impl* impl) : impl_(*impl) {}

  // One open chunk of a tensor.
  struct Chunk {
    Chunk(dcp::FileSlice slice, size_t entry, size_t index)
        : slice(std::move(slice)), entry(entry), index(index) {}
    std::unique_ptr<ReadableFile> decoded;  // of a transformed item, whole
    dcp::FileSlice slice;
    size_t entry;  // of the tensor
    size_t index;  // of the chunk in it
    dcp::TensorItem item;
    bool row_major = true;  // elements back to back
    // The CRC of elements [0, crc_end), as long as they are read in order.
    uint32_t crc = 0;
    int64_t crc_end = 0;
    std::string span;  // all elements or nothing yet, if not row_major
  };

  // Opens chunk `chunk` of tensor `entry` of the index. Valid until the next
  // call of OpenChunk. `all`: it is read front to back, and not again; a small
  // archive at once.
  absl::StatusOr<Chunk*> OpenChunk(size_t entry, size_t chunk, bool all);

  // Elements [begin, end) of `box`, counted row-major over it, which lies in
  // the chunk of box `chunk_box`. In the machine's byte order.
  absl::Status Read(Chunk& chunk, const Box& chunk_box, const Box& box,
                    int64_t begin, int64_t end, absl::Span<std::byte> out);

  // The CRC-32 of the record with the chunk's elements, as it is in the file.
  absl::StatusOr<uint32_t> RecordCrc(Chunk& chunk);

  // What an object is made of (DCP only; see dcp::ReadStoredObject), or the
  // decoded object.
  absl::StatusOr<std::string> ReadStoredObject(size_t object);
  absl::StatusOr<dcp::ObjectItem> ReadObject(size_t object);

  // The path of a data file, quoted, for errors.
  std::string QuotedFile(uint32_t file) const;
  // Key, file and byte of a chunk and of an object, for errors.
  std::string WhereChunk(size_t entry, size_t chunk) const;
  std::string WhereObject(size_t object) const;

  ReadStats stats() const { return stats_; }

 private:
  absl::StatusOr<ReadableFile*> OpenFile(uint32_t file);
  // The archive of an item that was stored through transforms.
  absl::StatusOr<std::unique_ptr<ReadableFile>> Decode(
      const dcp::ItemLocation& location, absl::string_view transforms,
      int64_t max_bytes);
  std::string Where(absl::string_view key, absl::string_view part,
                    const dcp::ItemLocation& location) const;
  void ForgetChunks();
  // That the bytes before an item are such as dsd writes there; in one read
  // with the first `and_bytes` of it, which the slice keeps.
  absl::Status CheckGap(dcp::FileSlice& slice, int64_t gap_bytes,
                        int64_t and_bytes);
  absl::Status OpenOwn(Chunk& chunk, DType dtype, const Dims& shape);
  absl::Status CheckCrc(Chunk& chunk, int64_t begin, int64_t end,
                        absl::Span<const std::byte> bytes);
  absl::Status ReadRuns(Chunk& chunk, const Box& chunk_box, const Box& box,
                        int64_t begin, int64_t end, absl::Span<std::byte> out);

  const Checkpoint::Impl& impl_;
  absl::flat_hash_map<uint32_t, std::unique_ptr<ReadableFile>> files_;
  std::unique_ptr<Chunk> whole_;  // the last that was opened with `all`
  absl::flat_hash_map<size_t, std::unique_ptr<Chunk>> chunks_;
  int64_t kept_span_bytes_ = 0;     // strided ones
  int64_t kept_decoded_bytes_ = 0;  // transformed ones
  dcp::TensorArchives archives_;
  ReadStats stats_;
};

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_ITEM_READER_H_
