// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/item_reader.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/frontends/checkpoint/dcp/memory_file.h"
#include "dsd/frontends/checkpoint/dcp/stream_transform.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"
#include "dsd/frontends/checkpoint/file_names.h"
#include "dsd/frontends/checkpoint/read_ahead_file.h"

namespace dsd::checkpoint {
namespace {

// Descriptors are a shared good.
constexpr size_t kMaxOpenFiles = 64;
constexpr size_t kMaxOpenChunks = 1024;
// Archives up to this size are read in one call when all of them is wanted.
constexpr int64_t kSmallArchiveBytes = 64 << 10;
// Pieces shorter than this, if there are many, are read with what is between.
constexpr int64_t kShortRunBytes = 512;
constexpr int64_t kManyRuns = 1024;
constexpr int64_t kSpanBytes = 1 << 20;
// Strided elements that are kept for the next read, and decoded archives.
constexpr int64_t kMaxKeptBytes = int64_t{256} << 20;
// More than what is around the elements in an archive.
constexpr int64_t kMaxAroundBytes = 1 << 20;
// More than what aligns items in dsd's files.
constexpr int64_t kMaxGapBytes = 4096;

absl::Status Foreign(absl::string_view what) {
  return absl::DataLossError(
      absl::StrCat(what, " differ from what was written: the file is damaged"));
}

}  // namespace

absl::StatusOr<ReadableFile*> ItemReader::OpenFile(uint32_t file) {
  const auto found = files_.find(file);
  if (found != files_.end()) return found->second.get();
  // All at once: chunks that are open refer to files.
  if (files_.size() >= kMaxOpenFiles) {
    ForgetChunks();
    files_.clear();
  }
  const std::string path = JoinFile(impl_.directory, impl_.index.files[file]);
  absl::StatusOr<std::unique_ptr<ReadableFile>> opened =
      impl_.env->files().OpenReadable(path);
  if (absl::IsNotFound(opened.status())) {
    return absl::NotFoundError(absl::StrCat(
        "the index names ", QuotedFile(file), ", which is not there"));
  }
  DSD_RETURN_IF_ERROR(opened.status());
  if (!impl_.file_bytes.empty() &&
      (*opened)->size_bytes() != impl_.file_bytes[file]) {
    return absl::DataLossError(
        absl::StrCat(QuotedFile(file), " has ", (*opened)->size_bytes(),
                     " bytes, expected ", impl_.file_bytes[file]));
  }
  return (files_[file] = std::make_unique<ReadAheadFile>(*std::move(opened)))
      .get();
}

std::string ItemReader::QuotedFile(uint32_t file) const {
  return absl::StrCat(
      "\"",
      JoinFile(impl_.directory, absl::CHexEscape(impl_.index.files[file])),
      "\"");
}

absl::StatusOr<std::unique_ptr<ReadableFile>> ItemReader::Decode(
    const dcp::ItemLocation& location, absl::string_view transforms,
    int64_t max_bytes) {
  DSD_RETURN_IF_ERROR(dcp::CheckTransforms(transforms));
  DSD_ASSIGN_OR_RETURN(ReadableFile* const file, OpenFile(location.file));
  DSD_ASSIGN_OR_RETURN(dcp::FileSlice slice,
                       dcp::FileSlice::Create(file, location.offset_bytes,
                                              location.length_bytes));
  // What does not compress gets longer, but not by much.
  if (location.length_bytes > max_bytes + max_bytes / 64) {
    return absl::ResourceExhaustedError(absl::StrCat(
        location.length_bytes, " bytes are stored, for at most ", max_bytes));
  }
  DSD_ASSIGN_OR_RETURN(const absl::string_view stored,
                       slice.Fetch(0, location.length_bytes));
  stats_.overhead_bytes += location.length_bytes;
  DSD_ASSIGN_OR_RETURN(std::string archive,
                       dcp::DecodeStream(transforms, stored, max_bytes));
  return std::make_unique<dcp::MemoryFile>(std::move(archive));
}

void ItemReader::ForgetChunks() {
  whole_.reset();
  chunks_.clear();
  kept_span_bytes_ = 0;
  kept_decoded_bytes_ = 0;
}

absl::Status ItemReader::CheckGap(dcp::FileSlice& slice, int64_t gap_bytes,
                                  int64_t and_bytes) {
  gap_bytes = std::max<int64_t>(gap_bytes, 0);
  if (gap_bytes > kMaxGapBytes) return Foreign("the bytes before it");
  stats_.overhead_bytes += gap_bytes;
  DSD_ASSIGN_OR_RETURN(const absl::string_view gap,
                       slice.FetchWithGap(gap_bytes, and_bytes));
  if (gap.find_first_not_of('\0') != absl::string_view::npos) {
    return Foreign("the bytes before it");
  }
  return absl::OkStatus();
}

absl::Status ItemReader::OpenOwn(Chunk& chunk, DType dtype, const Dims& shape) {
  const dcp::TensorArchive& archive = archives_.Get(dtype, shape);
  if (chunk.slice.length() != archive.total_bytes()) {
    return Foreign("its length and shape");
  }
  const int64_t head_bytes = static_cast<int64_t>(archive.head().size());
  DSD_ASSIGN_OR_RETURN(const absl::string_view head,
                       chunk.slice.Fetch(0, head_bytes));
  if (head != archive.head()) return Foreign("the bytes before its elements");
  DSD_ASSIGN_OR_RETURN(const absl::string_view tail,
                       chunk.slice.Fetch(head_bytes + archive.payload_bytes(),
                                         archive.tail_bytes()));
  const std::optional<uint32_t> crc = archive.CrcOfTail(tail);
  if (!crc.has_value()) return Foreign("the bytes after its elements");
  dcp::TensorItem& item = chunk.item;
  item.dtype = dtype;
  item.shape = shape;
  item.strides = RowMajorStrides(shape);
  item.data_at = item.record_at = head_bytes;
  item.record_bytes = archive.payload_bytes();
  item.record_crc = *crc;
  return absl::OkStatus();
}

absl::StatusOr<ItemReader::Chunk*> ItemReader::OpenChunk(size_t entry,
                                                         size_t index,
                                                         bool all) {
  const dcp::TensorEntry& tensor = impl_.index.tensors[entry];
  const size_t id = tensor.first_chunk + index;
  const auto found = chunks_.find(id);
  if (found != chunks_.end()) return found->second.get();
  if (!all && chunks_.size() >= kMaxOpenChunks) ForgetChunks();

  const dcp::ItemLocation& location = impl_.index.locations[id];
  const Box box = impl_.index.ChunkBox(tensor, index);
  const auto where = [&] { return WhereChunk(entry, index); };
  const auto transform = impl_.index.chunk_transforms.find(id);
  const bool transformed = transform != impl_.index.chunk_transforms.end();
  std::unique_ptr<ReadableFile> decoded;
  int64_t begin = location.offset_bytes;
  int64_t length = location.length_bytes;
  if (transformed) {
    if (kept_decoded_bytes_ > kMaxKeptBytes) ForgetChunks();
    absl::StatusOr<std::unique_ptr<ReadableFile>> archive =
        Decode(location, transform->second,
               box.num_elements() * ItemSize(*tensor.dtype) + kMaxAroundBytes);
    DSD_RETURN_IF_ERROR(archive.status()) << where();
    decoded = *std::move(archive);
    begin = 0;
    length = decoded->size_bytes();
    if (!all) kept_decoded_bytes_ += length;
  }
  absl::StatusOr<ReadableFile*> file =
      transformed ? decoded.get() : OpenFile(location.file);
  DSD_RETURN_IF_ERROR(file.status()) << where();
  absl::StatusOr<dcp::FileSlice> slice =
      dcp::FileSlice::Create(*file, begin, length);
  DSD_RETURN_IF_ERROR(slice.status()) << where();
  auto chunk = std::make_unique<Chunk>(*std::move(slice), entry, index);
  chunk->decoded = std::move(decoded);
  const bool at_once = all && length <= kSmallArchiveBytes;
  if (at_once && !impl_.has_digests) {
    DSD_RETURN_IF_ERROR(chunk->slice.Fetch(0, length).status()) << where();
  }
  const Dims shape = box.extents();
  const auto is_row_major = [&](const Dims& strides) {
    // The stride of an extent of 1 is not used.
    const Dims expected = RowMajorStrides(shape);
    for (size_t d = 0; d < shape.size(); ++d) {
      if (shape[d] != 1 && strides[d] != expected[d]) return false;
    }
    return true;
  };
  if (impl_.format != Format::kDcp) {
    if (impl_.items.empty()) {
      chunk->item.dtype = *tensor.dtype;
      chunk->item.shape = shape;
      chunk->item.strides = RowMajorStrides(shape);
      chunk->item.record_bytes = location.length_bytes;
    } else {
      chunk->item = impl_.items[id];
    }
    chunk->row_major = is_row_major(chunk->item.strides);
  } else if (impl_.has_digests) {
    DSD_RETURN_IF_ERROR(CheckGap(chunk->slice,
                                 location.offset_bytes - impl_.chunk_gap[id],
                                 at_once ? length : 0))
        << where();
    DSD_RETURN_IF_ERROR(OpenOwn(*chunk, *tensor.dtype, shape)) << where();
  } else if (!OpenOwn(*chunk, *tensor.dtype, shape).ok()) {  // foreign
    absl::StatusOr<dcp::TensorItem> item = dcp::ReadTensorItem(&chunk->slice);
    DSD_RETURN_IF_ERROR(item.status()) << where();
    chunk->item = *std::move(item);
    if (chunk->item.shape != shape || chunk->item.dtype != *tensor.dtype) {
      return absl::DataLossError(absl::StrCat(
          where(), ": the index says ", tensor.dtype_name, " ",
          DimsToString(shape), ", the file has ", DTypeName(chunk->item.dtype),
          " ", DimsToString(chunk->item.shape)));
    }
    chunk->row_major = is_row_major(chunk->item.strides);
  }
  // Elements of an archive that was read as a whole are counted when they are
  // asked for.
  const int64_t read = chunk->slice.bytes_read();
  const bool has_payload = read == length;
  if (!transformed)
    stats_.overhead_bytes +=
        read - (has_payload ? chunk->item.record_bytes : 0);
  std::unique_ptr<Chunk>& place = all ? whole_ : chunks_[id];
  place = std::move(chunk);
  return place.get();
}

absl::Status ItemReader::Read(Chunk& chunk, const Box& chunk_box,
                              const Box& box, int64_t begin, int64_t end,
                              absl::Span<std::byte> out) {
  const int64_t item_size = ItemSize(chunk.item.dtype);
  if (begin >= end) return absl::OkStatus();
  if (chunk.row_major) {
    DSD_RETURN_IF_ERROR(ReadRuns(chunk, chunk_box, box, begin, end, out))
        << WhereChunk(chunk.entry, chunk.index);
    if (impl_.verify && !impl_.has_digests && box == chunk_box) {
      DSD_RETURN_IF_ERROR(CheckCrc(chunk, begin, end, out))
          << WhereChunk(chunk.entry, chunk.index);
    }
  } else {
    // Strided elements: what they span is read whole, once.
    if (chunk.span.empty()) {
      int64_t bytes = item_size;
      for (int d = 0; d < box.ndim(); ++d) {
        bytes += (chunk.item.shape[d] - 1) * chunk.item.strides[d] * item_size;
      }
      if (kept_span_bytes_ + bytes > kMaxKeptBytes) {
        for (const auto& [id, other] : chunks_) other->span = std::string();
        kept_span_bytes_ = 0;
      }
      if (&chunk != whole_.get()) kept_span_bytes_ += bytes;
      chunk.span.resize(bytes);
      stats_.payload_bytes += bytes;
      DSD_RETURN_IF_ERROR(chunk.slice.Read(
          chunk.item.data_at,
          absl::MakeSpan(reinterpret_cast<std::byte*>(chunk.span.data()),
                         chunk.span.size())))
          << WhereChunk(chunk.entry, chunk.index);
    }
    StridedView view;
    view.base = reinterpret_cast<std::byte*>(chunk.span.data());
    for (int d = 0; d < box.ndim(); ++d) {
      const int64_t stride = chunk.item.strides[d] * item_size;
      view.strides_bytes.push_back(stride);
      view.base += (box.lo[d] - chunk_box.lo[d]) * stride;
    }
    PackRange(view, box.extents(), item_size, begin, end, out.data());
  }
  if (!chunk.item.is_plain()) chunk.item.Normalize(out);
  return absl::OkStatus();
}

absl::Status ItemReader::CheckCrc(Chunk& chunk, int64_t begin, int64_t end,
                                  absl::Span<const std::byte> bytes) {
  const dcp::TensorItem& item = chunk.item;
  if (item.record_crc == 0 || begin != chunk.crc_end) return absl::OkStatus();
  chunk.crc = dcp::Crc32(
      chunk.crc, absl::string_view(reinterpret_cast<const char*>(bytes.data()),
                                   bytes.size()));
  chunk.crc_end = end;
  // A record may be longer than its tensor, and is checked by no more than
  // that.
  if (end * ItemSize(item.dtype) != item.record_bytes ||
      item.data_at != item.record_at || chunk.crc == item.record_crc) {
    return absl::OkStatus();
  }
  return absl::DataLossError(
      "the CRC of its elements differs: the bytes are damaged");
}

absl::Status ItemReader::ReadRuns(Chunk& chunk, const Box& chunk_box,
                                  const Box& box, int64_t begin, int64_t end,
                                  absl::Span<std::byte> out) {
  const int64_t item_size = ItemSize(chunk.item.dtype);
  const Dims shape = chunk_box.extents();
  const Dims strides = RowMajorStrides(shape);
  const Dims extents = box.extents();
  // Dimensions that the box fills in the chunk continue the run.
  int outer = box.ndim();
  int64_t run = 1;
  while (outer > 0) {
    --outer;
    run *= extents[outer];
    if (extents[outer] != shape[outer]) break;
  }
  Dims at(box.ndim(), 0);
  int64_t flat = 0;  // of the current run's first element, in the chunk
  int64_t row = begin / run;
  for (int d = box.ndim() - 1; d >= 0; --d) {
    flat += (box.lo[d] - chunk_box.lo[d]) * strides[d];
    if (d >= outer) continue;
    at[d] = row % extents[d];
    row /= extents[d];
    flat += at[d] * strides[d];
  }
  const auto next_run = [&] {
    for (int d = outer - 1; d >= 0; --d) {
      flat += strides[d];
      if (++at[d] < extents[d]) return;
      flat -= at[d] * strides[d];
      at[d] = 0;
    }
  };

  const bool in_spans =
      run * item_size < kShortRunBytes && (end - begin) / run > kManyRuns;
  std::string span;
  int64_t span_at = 0;
  const int64_t data_end =
      chunk.item.data_at + chunk_box.num_elements() * item_size;
  int64_t in_run = begin % run;
  std::byte* to = out.data();
  for (int64_t left = end - begin; left > 0;) {
    const int64_t count = std::min(left, run - in_run);
    const int64_t bytes = count * item_size;
    const int64_t from = chunk.item.data_at + (flat + in_run) * item_size;
    if (!in_spans) {
      stats_.payload_bytes += bytes;
      DSD_RETURN_IF_ERROR(chunk.slice.Read(from, absl::MakeSpan(to, bytes)));
    } else {
      if (from + bytes > span_at + static_cast<int64_t>(span.size())) {
        span_at = from;
        span.resize(std::min(std::max(kSpanBytes, bytes), data_end - from));
        stats_.payload_bytes += static_cast<int64_t>(span.size());
        DSD_RETURN_IF_ERROR(chunk.slice.Read(
            from, absl::MakeSpan(reinterpret_cast<std::byte*>(span.data()),
                                 span.size())));
      }
      std::memcpy(to, span.data() + (from - span_at), bytes);
    }
    to += bytes;
    left -= count;
    in_run = 0;
    next_run();
  }
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> ItemReader::RecordCrc(Chunk& chunk) {
  constexpr int64_t kPieceBytes = 1 << 20;
  std::string piece(std::min(kPieceBytes, chunk.item.record_bytes), '\0');
  uint32_t crc = 0;
  for (int64_t at = 0; at < chunk.item.record_bytes;) {
    piece.resize(std::min(kPieceBytes, chunk.item.record_bytes - at));
    stats_.payload_bytes += static_cast<int64_t>(piece.size());
    DSD_RETURN_IF_ERROR(chunk.slice.Read(
        chunk.item.record_at + at,
        absl::MakeSpan(reinterpret_cast<std::byte*>(piece.data()),
                       piece.size())))
        << WhereChunk(chunk.entry, chunk.index);
    crc = dcp::Crc32(crc, piece);
    at += static_cast<int64_t>(piece.size());
  }
  return crc;
}

std::string ItemReader::Where(absl::string_view key, absl::string_view part,
                              const dcp::ItemLocation& location) const {
  return absl::StrCat("\"", absl::CHexEscape(key), "\"", part, " in ",
                      QuotedFile(location.file), " at byte ",
                      location.offset_bytes);
}

std::string ItemReader::WhereChunk(size_t entry, size_t chunk) const {
  const dcp::TensorEntry& tensor = impl_.index.tensors[entry];
  return Where(
      tensor.key,
      absl::StrCat(" ", impl_.index.ChunkBox(tensor, chunk).ToString()),
      impl_.index.ChunkLocation(tensor, chunk));
}

std::string ItemReader::WhereObject(size_t object) const {
  const dcp::ObjectEntryInfo& info = impl_.index.objects[object];
  return Where(info.key, "", info.location);
}

absl::StatusOr<std::string> ItemReader::ReadStoredObject(size_t object) {
  const dcp::ObjectEntryInfo& info = impl_.index.objects[object];
  const auto where = [&] { return WhereObject(object); };
  const auto transform = impl_.index.object_transforms.find(object);
  std::unique_ptr<ReadableFile> decoded;
  int64_t begin = info.location.offset_bytes;
  int64_t length = info.location.length_bytes;
  if (transform != impl_.index.object_transforms.end()) {
    absl::StatusOr<std::unique_ptr<ReadableFile>> archive =
        Decode(info.location, transform->second, dcp::kMaxObjectBytes);
    DSD_RETURN_IF_ERROR(archive.status()) << where();
    decoded = *std::move(archive);
    begin = 0;
    length = decoded->size_bytes();
  }
  absl::StatusOr<ReadableFile*> file =
      decoded != nullptr ? decoded.get() : OpenFile(info.location.file);
  DSD_RETURN_IF_ERROR(file.status()) << where();
  absl::StatusOr<dcp::FileSlice> slice =
      dcp::FileSlice::Create(*file, begin, length);
  DSD_RETURN_IF_ERROR(slice.status()) << where();
  absl::StatusOr<std::string> stored = dcp::ReadStoredObject(&*slice);
  if (decoded == nullptr) stats_.overhead_bytes += slice->bytes_read();
  DSD_RETURN_IF_ERROR(stored.status()) << where();
  if (!impl_.has_digests) return stored;

  DSD_RETURN_IF_ERROR(CheckGap(
      *slice, info.location.offset_bytes - impl_.object_gap[object], 0))
      << where();
  DSD_ASSIGN_OR_RETURN(const absl::string_view bytes,
                       slice->Fetch(0, slice->length()));
  const auto digest = impl_.digests.objects.find(info.key);
  if (bytes != dcp::ObjectArchive(*stored) ||
      digest == impl_.digests.objects.end() ||
      digest->second != dcp::ObjectDigest(*stored, impl_.digests.version)) {
    return Annotate(Foreign("its bytes"), where());
  }
  return stored;
}

absl::StatusOr<dcp::ObjectItem> ItemReader::ReadObject(size_t object) {
  if (impl_.format != Format::kDcp) return impl_.values[object];
  DSD_ASSIGN_OR_RETURN(const std::string stored, ReadStoredObject(object));
  absl::StatusOr<dcp::ObjectItem> item = dcp::DecodeStoredObject(stored);
  DSD_RETURN_IF_ERROR(item.status()) << WhereObject(object);
  return item;
}

}  // namespace dsd::checkpoint
