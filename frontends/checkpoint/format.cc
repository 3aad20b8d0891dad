// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/file_names.h"

namespace dsd::checkpoint {
namespace {

constexpr absl::string_view kNames[] = {"dcp", "safetensors", "torch"};

// Of a pickle of protocol 2, with which torch.save began before its archives.
constexpr absl::string_view kOldTorchMagic("\x80\x02", 2);
constexpr absl::string_view kZipMagic("PK\x03\x04", 4);

absl::StatusOr<Format> DetectFile(ReadableFile& file, const std::string& path) {
  char head[9] = {};
  const int64_t size = std::min<int64_t>(sizeof(head), file.size_bytes());
  DSD_RETURN_IF_ERROR(
      file.ReadAt(0, absl::MakeSpan(reinterpret_cast<std::byte*>(head), size)));
  const absl::string_view bytes(head, size);
  if (absl::StartsWith(bytes, kZipMagic)) return Format::kTorchArchive;
  if (absl::EndsWith(path, kSafetensorsSuffix) ||
      absl::EndsWith(path, kSafetensorsIndexSuffix) ||
      (size == sizeof(head) && head[8] == '{')) {
    return Format::kSafetensors;
  }
  if (absl::StartsWith(bytes, kOldTorchMagic)) {
    return absl::UnimplementedError(absl::StrCat(
        "\"", path,
        "\" is a file of torch.save as it was before PyTorch 1.6, which is not "
        "supported; load it in Python and save it again"));
  }
  return absl::NotFoundError(
      absl::StrCat("no checkpoint at \"", path,
                   "\": it is not a directory, and neither a safetensors file "
                   "nor an archive "
                   "of torch.save"));
}

}  // namespace

absl::string_view FormatName(Format format) {
  return kNames[static_cast<int>(format)];
}

std::optional<Format> ParseFormat(absl::string_view name) {
  for (const Format format :
       {Format::kDcp, Format::kSafetensors, Format::kTorchArchive}) {
    if (FormatName(format) == name) return format;
  }
  return std::nullopt;
}

absl::StatusOr<Format> DetectFormat(FileSystem& files,
                                    const std::string& path) {
  for (const char* const index : {kIndexFile, kFirstRankIndexFile}) {
    if (files.Stat(JoinFile(path, index)).ok()) return Format::kDcp;
  }
  const absl::StatusOr<std::vector<std::string>> names = files.List(path);
  if (names.ok()) {
    for (const std::string& name : *names) {
      if (absl::EndsWith(name, kSafetensorsSuffix) ||
          absl::EndsWith(name, kSafetensorsIndexSuffix)) {
        return Format::kSafetensors;
      }
    }
    return Format::kDcp;
  }
  const absl::StatusOr<std::unique_ptr<ReadableFile>> file =
      files.OpenReadable(path);
  if (absl::IsNotFound(file.status())) return Format::kDcp;
  DSD_RETURN_IF_ERROR(file.status());
  return DetectFile(**file, path);
}

}  // namespace dsd::checkpoint
