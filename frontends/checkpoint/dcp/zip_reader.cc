// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/zip_reader.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "dsd/core/base/checked_int.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/dcp/little_endian.h"
#include "dsd/frontends/checkpoint/dcp/zip_format.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"

namespace dsd::dcp {
namespace {

// Holds the directory of a tensor item as PyTorch writes it and stays clear of
// its payload.
constexpr int64_t kTailBytes = 768;
constexpr int64_t kMaxCommentBytes = 0xFFFF;
constexpr uint16_t kFlagEncrypted = 0x0001;

absl::Status Damaged(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("zip archive: ", what));
}

}  // namespace

absl::StatusOr<FileSlice> FileSlice::Create(ReadableFile* file, int64_t offset,
                                            int64_t length) {
  const std::optional<int64_t> end = CheckedAdd(offset, length);
  if (offset < 0 || length < 0 || !end.has_value() ||
      *end > file->size_bytes()) {
    return absl::DataLossError(absl::StrCat(
        "bytes [", offset, ", +", length, ") are not inside the file of ",
        file->size_bytes(), " bytes (truncated?)"));
  }
  return FileSlice(file, offset, length);
}

absl::Status FileSlice::CheckRange(int64_t begin, int64_t count) const {
  if (begin >= 0 && count >= 0 && begin <= length_ &&
      count <= length_ - begin) {
    return absl::OkStatus();
  }
  return absl::DataLossError(absl::StrCat("bytes [", begin, ", +", count,
                                          ") are not inside the ", length_,
                                          " bytes of the item"));
}

const char* FileSlice::Find(int64_t begin, int64_t count) const {
  for (const Piece& piece : pieces_) {
    if (begin >= piece.begin && begin + count <= piece.begin + piece.size) {
      return piece.bytes.get() + (begin - piece.begin);
    }
  }
  return nullptr;
}

absl::StatusOr<const char*> FileSlice::ReadPiece(int64_t begin, int64_t count) {
  // Not initialized: all of it is read.
  Piece piece{begin, count, std::unique_ptr<char[]>(new char[count])};
  DSD_RETURN_IF_ERROR(file_->ReadAt(
      offset_ + begin,
      absl::MakeSpan(reinterpret_cast<std::byte*>(piece.bytes.get()), count)));
  pieces_.push_back(std::move(piece));
  return pieces_.back().bytes.get();
}

absl::StatusOr<absl::string_view> FileSlice::Fetch(int64_t begin,
                                                   int64_t count) {
  DSD_RETURN_IF_ERROR(CheckRange(begin, count));
  const char* bytes = Find(begin, count);
  if (bytes == nullptr) {
    bytes_read_ += count;
    DSD_ASSIGN_OR_RETURN(bytes, ReadPiece(begin, count));
  }
  return absl::string_view(bytes, count);
}

absl::StatusOr<absl::string_view> FileSlice::FetchWithGap(int64_t gap,
                                                          int64_t count) {
  DSD_RETURN_IF_ERROR(CheckRange(0, count));
  if (gap < 0 || gap > offset_) {
    return absl::DataLossError(
        absl::StrCat("there are no ", gap, " bytes before the item"));
  }
  if (gap + count == 0) return absl::string_view();
  bytes_read_ += count;
  DSD_ASSIGN_OR_RETURN(const char* const bytes, ReadPiece(-gap, gap + count));
  return absl::string_view(bytes, gap);
}

absl::Status FileSlice::Read(int64_t begin, absl::Span<std::byte> out) {
  const int64_t count = static_cast<int64_t>(out.size());
  DSD_RETURN_IF_ERROR(CheckRange(begin, count));
  if (const char* const bytes = Find(begin, count)) {
    std::copy_n(reinterpret_cast<const std::byte*>(bytes), count, out.begin());
    return absl::OkStatus();
  }
  bytes_read_ += count;
  return file_->ReadAt(offset_ + begin, out);
}

absl::StatusOr<ZipReader> ZipReader::Open(FileSlice* slice,
                                          int64_t max_records) {
  const int64_t length = slice->length();
  if (length < kEndBytes) {
    return Damaged(absl::StrCat(length, " bytes are too few"));
  }
  // The end record: last, unless a comment or padding follows.
  int64_t end_at = -1;
  for (const int64_t tail : {std::min(length, kTailBytes),
                             std::min(length, kEndBytes + kMaxCommentBytes)}) {
    DSD_ASSIGN_OR_RETURN(const absl::string_view bytes,
                         slice->Fetch(length - tail, tail));
    for (int64_t at = tail - kEndBytes; at >= 0; --at) {
      if (LoadLittleEndian<uint32_t>(bytes.data() + at) == kEndSignature) {
        end_at = length - tail + at;
        break;
      }
    }
    if (end_at >= 0) break;
  }
  if (end_at < 0) return Damaged("no end record (truncated?)");

  DSD_ASSIGN_OR_RETURN(const absl::string_view end,
                       slice->Fetch(end_at, kEndBytes));
  uint64_t count = LoadLittleEndian<uint16_t>(end.data() + 10);
  uint64_t directory_bytes = LoadLittleEndian<uint32_t>(end.data() + 12);
  uint64_t directory_at = LoadLittleEndian<uint32_t>(end.data() + 16);
  if (LoadLittleEndian<uint16_t>(end.data() + 4) != 0 ||
      LoadLittleEndian<uint16_t>(end.data() + 6) != 0) {
    return Damaged("parts on several disks");
  }
  if (end_at >= kZip64LocatorBytes) {
    DSD_ASSIGN_OR_RETURN(
        const absl::string_view locator,
        slice->Fetch(end_at - kZip64LocatorBytes, kZip64LocatorBytes));
    if (LoadLittleEndian<uint32_t>(locator.data()) == kZip64LocatorSignature) {
      const uint64_t at = LoadLittleEndian<uint64_t>(locator.data() + 8);
      if (at > static_cast<uint64_t>(length)) {
        return Damaged("the zip64 end record is outside");
      }
      DSD_ASSIGN_OR_RETURN(
          const absl::string_view record,
          slice->Fetch(static_cast<int64_t>(at), kZip64EndBytes));
      if (LoadLittleEndian<uint32_t>(record.data()) != kZip64EndSignature) {
        return Damaged("no zip64 end record where the locator points");
      }
      count = LoadLittleEndian<uint64_t>(record.data() + 32);
      directory_bytes = LoadLittleEndian<uint64_t>(record.data() + 40);
      directory_at = LoadLittleEndian<uint64_t>(record.data() + 48);
    }
  }
  if (directory_at > static_cast<uint64_t>(end_at) ||
      directory_bytes > static_cast<uint64_t>(end_at) - directory_at ||
      count > directory_bytes / kDirectoryEntryBytes) {
    return Damaged("the directory does not fit before its end record");
  }
  if (count > static_cast<uint64_t>(max_records)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "zip archive: ", count, " records, the limit is ", max_records));
  }

  // A name and its extra field take some hundred bytes.
  constexpr uint64_t kMaxEntryBytes = 1024;
  if (directory_bytes > (count + 64) * kMaxEntryBytes) {
    return Damaged(absl::StrCat("a directory of ", directory_bytes,
                                " bytes for ", count, " records"));
  }

  ZipReader reader(slice);
  reader.directory_at_ = static_cast<int64_t>(directory_at);
  DSD_ASSIGN_OR_RETURN(absl::string_view directory,
                       slice->Fetch(reader.directory_at_,
                                    static_cast<int64_t>(directory_bytes)));
  absl::flat_hash_set<std::string> names;
  for (uint64_t i = 0; i < count; ++i) {
    if (static_cast<int64_t>(directory.size()) < kDirectoryEntryBytes ||
        LoadLittleEndian<uint32_t>(directory.data()) !=
            kDirectoryEntrySignature) {
      return Damaged(absl::StrCat("directory entry ", i, " is damaged"));
    }
    const uint16_t flags = LoadLittleEndian<uint16_t>(directory.data() + 8);
    const uint16_t method = LoadLittleEndian<uint16_t>(directory.data() + 10);
    const uint64_t packed32 = LoadLittleEndian<uint32_t>(directory.data() + 20);
    const uint64_t size32 = LoadLittleEndian<uint32_t>(directory.data() + 24);
    const size_t name_bytes = LoadLittleEndian<uint16_t>(directory.data() + 28);
    const size_t extra_bytes =
        LoadLittleEndian<uint16_t>(directory.data() + 30);
    const size_t comment_bytes =
        LoadLittleEndian<uint16_t>(directory.data() + 32);
    const uint64_t header32 = LoadLittleEndian<uint32_t>(directory.data() + 42);
    Record record;
    record.crc = LoadLittleEndian<uint32_t>(directory.data() + 16);
    directory.remove_prefix(kDirectoryEntryBytes);
    if (name_bytes + extra_bytes + comment_bytes > directory.size()) {
      return Damaged(absl::StrCat("directory entry ", i, " is cut off"));
    }
    absl::string_view name = directory.substr(0, name_bytes);
    absl::string_view extra = directory.substr(name_bytes, extra_bytes);
    directory.remove_prefix(name_bytes + extra_bytes + comment_bytes);
    record.is_plain = (flags & kFlagEncrypted) == 0 && method == 0;

    uint64_t packed = packed32, size = size32, header = header32;
    while (extra.size() >= 4) {
      const uint16_t id = LoadLittleEndian<uint16_t>(extra.data());
      const size_t bytes = LoadLittleEndian<uint16_t>(extra.data() + 2);
      extra.remove_prefix(4);
      if (bytes > extra.size()) return Damaged("an extra field is cut off");
      absl::string_view field = extra.substr(0, bytes);
      extra.remove_prefix(bytes);
      if (id != kZip64FieldId) continue;
      for (uint64_t* value : {&size, &packed, &header}) {
        if (*value != kZip32Max) continue;
        if (field.size() < 8) return Damaged("a zip64 field is cut off");
        *value = LoadLittleEndian<uint64_t>(field.data());
        field.remove_prefix(8);
      }
    }
    if (packed > static_cast<uint64_t>(length) || header > directory_at ||
        (record.is_plain ? packed != size
                         : size > std::numeric_limits<int64_t>::max())) {
      return Damaged(absl::StrCat("record \"", absl::CHexEscape(name),
                                  "\" has impossible sizes"));
    }
    record.size_bytes = static_cast<int64_t>(size);
    record.header_at = static_cast<int64_t>(header);

    if (i == 0) {
      const size_t slash = name.find('/');
      if (slash == absl::string_view::npos) {
        return Damaged("records without a top directory");
      }
      reader.top_ = std::string(name.substr(0, slash + 1));
    }
    if (!absl::ConsumePrefix(&name, reader.top_)) {
      return Damaged(absl::StrCat("record \"", absl::CHexEscape(name),
                                  "\" is not under \"",
                                  absl::CHexEscape(reader.top_), "\""));
    }
    record.name = std::string(name);
    if (!names.insert(record.name).second) {
      return Damaged(
          absl::StrCat("two records \"", absl::CHexEscape(record.name), "\""));
    }
    reader.records_.push_back(std::move(record));
  }
  return reader;
}

const ZipReader::Record* ZipReader::Find(absl::string_view name) const {
  for (const Record& record : records_) {
    if (record.name == name) return &record;
  }
  return nullptr;
}

absl::StatusOr<int64_t> ZipReader::ContentOffset(const Record& record) const {
  if (!record.is_plain) {
    return absl::UnimplementedError(
        absl::StrCat("zip archive: record \"", absl::CHexEscape(record.name),
                     "\" is compressed or encrypted"));
  }
  const int64_t name_bytes =
      static_cast<int64_t>(top_.size() + record.name.size());
  std::string header(kLocalHeaderBytes + name_bytes, '\0');
  DSD_RETURN_IF_ERROR(
      slice_->Read(record.header_at,
                   absl::MakeSpan(reinterpret_cast<std::byte*>(header.data()),
                                  header.size())));
  const absl::string_view name =
      absl::string_view(header).substr(kLocalHeaderBytes);
  if (LoadLittleEndian<uint32_t>(header.data()) != kLocalHeaderSignature ||
      LoadLittleEndian<uint16_t>(header.data() + 26) != name_bytes ||
      !absl::StartsWith(name, top_) ||
      name.substr(top_.size()) != record.name) {
    return Damaged(absl::StrCat("the header of record \"",
                                absl::CHexEscape(record.name), "\" at byte ",
                                record.header_at, " is damaged"));
  }
  const int64_t at = record.header_at + kLocalHeaderBytes + name_bytes +
                     LoadLittleEndian<uint16_t>(header.data() + 28);
  if (at > directory_at_ || record.size_bytes > directory_at_ - at) {
    return Damaged(absl::StrCat("record \"", absl::CHexEscape(record.name),
                                "\" runs into the directory"));
  }
  return at;
}

absl::StatusOr<absl::string_view> ZipReader::Content(const Record& record,
                                                     int64_t max_bytes) const {
  if (record.size_bytes > max_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "zip archive: record \"", absl::CHexEscape(record.name), "\" has ",
        record.size_bytes, " bytes, the limit is ", max_bytes));
  }
  DSD_ASSIGN_OR_RETURN(const int64_t at, ContentOffset(record));
  DSD_ASSIGN_OR_RETURN(const absl::string_view content,
                       slice_->Fetch(at, record.size_bytes));
  if (record.crc != 0 && Crc32(0, content) != record.crc) {
    return Damaged(absl::StrCat("the CRC of record \"",
                                absl::CHexEscape(record.name),
                                "\" differs: the bytes are damaged"));
  }
  return content;
}

}  // namespace dsd::dcp
