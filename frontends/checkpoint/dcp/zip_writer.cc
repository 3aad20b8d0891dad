// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/zip_writer.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "dsd/frontends/checkpoint/dcp/little_endian.h"
#include "dsd/frontends/checkpoint/dcp/zip_format.h"
#include "libdeflate.h"

namespace dsd::dcp {
namespace {

// Sizes follow the payload in a descriptor; names are UTF-8.
constexpr uint16_t kFlags = 0x0808;
constexpr uint16_t kFlagsEmpty = 0x0800;
constexpr int64_t kFieldHeaderBytes = 4;

// The zip64 field of a record; empty if nothing needs it.
std::string Zip64Field(int64_t size_bytes, int64_t header_at) {
  std::string values;
  if (size_bytes >= kZip32Max) {
    AppendLittleEndian<uint64_t>(&values, size_bytes);  // uncompressed
    AppendLittleEndian<uint64_t>(&values, size_bytes);  // compressed
  }
  if (header_at >= kZip32Max) AppendLittleEndian<uint64_t>(&values, header_at);
  if (values.empty()) return "";
  std::string field;
  AppendLittleEndian<uint16_t>(&field, kZip64FieldId);
  AppendLittleEndian<uint16_t>(&field, values.size());
  return field + values;
}

uint32_t Clamp32(int64_t value) {
  return value >= kZip32Max ? kZip32Max : static_cast<uint32_t>(value);
}

}  // namespace

uint32_t Crc32(uint32_t crc, absl::string_view bytes) {
  return libdeflate_crc32(crc, bytes.data(), bytes.size());
}

void ZipWriter::Append(absl::string_view bytes) {
  out_->append(bytes.data(), bytes.size());
  position_ += static_cast<int64_t>(bytes.size());
}

void ZipWriter::AddRecord(absl::string_view name, absl::string_view content) {
  StartRecord(name, static_cast<int64_t>(content.size()));
  out_->append(content.data(), content.size());
  FinishRecord(Crc32(0, content));
}

void ZipWriter::StartRecord(absl::string_view name, int64_t size_bytes) {
  Record record{absl::StrCat("archive/", name), position_, size_bytes, 0};
  const std::string zip64 = Zip64Field(size_bytes, position_);
  const int64_t start =
      position_ + kLocalHeaderBytes +
      static_cast<int64_t>(record.name.size() + zip64.size()) +
      kFieldHeaderBytes;
  const int64_t padding = (kAlignment - start % kAlignment) % kAlignment;

  std::string header;
  AppendLittleEndian<uint32_t>(&header, kLocalHeaderSignature);
  AppendLittleEndian<uint16_t>(&header, 0);  // version needed
  AppendLittleEndian<uint16_t>(&header, size_bytes == 0 ? kFlagsEmpty : kFlags);
  AppendLittleEndian<uint16_t>(&header, 0);  // method: stored
  AppendLittleEndian<uint32_t>(&header, 0);  // time and date
  AppendLittleEndian<uint32_t>(&header, 0);  // crc
  AppendLittleEndian<uint32_t>(&header, 0);  // compressed size
  AppendLittleEndian<uint32_t>(&header, 0);  // size
  AppendLittleEndian<uint16_t>(&header, record.name.size());
  AppendLittleEndian<uint16_t>(&header,
                               zip64.size() + kFieldHeaderBytes + padding);
  absl::StrAppend(&header, record.name, zip64, "FB");
  AppendLittleEndian<uint16_t>(&header, padding);
  header.append(padding, 'Z');
  Append(header);
  records_.push_back(std::move(record));
}

void ZipWriter::FinishRecord(uint32_t crc) {
  Record& record = records_.back();
  record.crc = crc;
  position_ += record.size_bytes;
  if (record.size_bytes == 0) return;
  std::string descriptor;
  AppendLittleEndian<uint32_t>(&descriptor, kDescriptorSignature);
  AppendLittleEndian<uint32_t>(&descriptor, crc);
  if (record.size_bytes >= kZip32Max || record.header_at >= kZip32Max) {
    AppendLittleEndian<uint64_t>(&descriptor, record.size_bytes);
    AppendLittleEndian<uint64_t>(&descriptor, record.size_bytes);
  } else {
    AppendLittleEndian<uint32_t>(&descriptor, record.size_bytes);
    AppendLittleEndian<uint32_t>(&descriptor, record.size_bytes);
  }
  Append(descriptor);
}

void ZipWriter::Finish() {
  const int64_t directory_at = position_;
  std::string out;
  for (const Record& record : records_) {
    const std::string zip64 = Zip64Field(record.size_bytes, record.header_at);
    AppendLittleEndian<uint32_t>(&out, kDirectoryEntrySignature);
    AppendLittleEndian<uint16_t>(&out, 0);  // version made by
    AppendLittleEndian<uint16_t>(&out, 0);  // version needed
    AppendLittleEndian<uint16_t>(&out,
                                 record.size_bytes == 0 ? kFlagsEmpty : kFlags);
    AppendLittleEndian<uint16_t>(&out, 0);  // method
    AppendLittleEndian<uint32_t>(&out, 0);  // time and date
    AppendLittleEndian<uint32_t>(&out, record.crc);
    AppendLittleEndian<uint32_t>(&out, Clamp32(record.size_bytes));
    AppendLittleEndian<uint32_t>(&out, Clamp32(record.size_bytes));
    AppendLittleEndian<uint16_t>(&out, record.name.size());
    AppendLittleEndian<uint16_t>(&out, zip64.size());
    AppendLittleEndian<uint16_t>(&out, 0);  // comment
    AppendLittleEndian<uint16_t>(&out, 0);  // disk
    AppendLittleEndian<uint16_t>(&out, 0);  // internal attributes
    AppendLittleEndian<uint32_t>(&out, 0);  // external attributes
    AppendLittleEndian<uint32_t>(&out, Clamp32(record.header_at));
    absl::StrAppend(&out, record.name, zip64);
  }
  const int64_t directory_bytes = static_cast<int64_t>(out.size());
  const int64_t end_at = directory_at + directory_bytes;
  const uint64_t count = records_.size();

  AppendLittleEndian<uint32_t>(&out, kZip64EndSignature);
  AppendLittleEndian<uint64_t>(&out, kZip64EndBytes - 12);
  AppendLittleEndian<uint16_t>(&out, 0x031E);  // version made by
  AppendLittleEndian<uint16_t>(&out, 0x002D);  // version needed
  AppendLittleEndian<uint32_t>(&out, 0);       // this disk
  AppendLittleEndian<uint32_t>(&out, 0);       // the directory's disk
  AppendLittleEndian<uint64_t>(&out, count);
  AppendLittleEndian<uint64_t>(&out, count);
  AppendLittleEndian<uint64_t>(&out, directory_bytes);
  AppendLittleEndian<uint64_t>(&out, directory_at);

  AppendLittleEndian<uint32_t>(&out, kZip64LocatorSignature);
  AppendLittleEndian<uint32_t>(&out, 0);
  AppendLittleEndian<uint64_t>(&out, end_at);
  AppendLittleEndian<uint32_t>(&out, 1);  // disks

  AppendLittleEndian<uint32_t>(&out, kEndSignature);
  AppendLittleEndian<uint16_t>(&out, 0);
  AppendLittleEndian<uint16_t>(&out, 0);
  AppendLittleEndian<uint16_t>(&out, count);
  AppendLittleEndian<uint16_t>(&out, count);
  AppendLittleEndian<uint32_t>(&out, Clamp32(directory_bytes));
  AppendLittleEndian<uint32_t>(&out, Clamp32(directory_at));
  AppendLittleEndian<uint16_t>(&out, 0);  // comment
  Append(out);
}

}  // namespace dsd::dcp
