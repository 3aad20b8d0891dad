// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/file_names.h"

#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace dsd::checkpoint {
namespace {

constexpr size_t kIdDigits = 16;
constexpr absl::string_view kDigestsPrefix = ".dsd_digests_";
constexpr absl::string_view kTemporaryPrefix = ".metadata_";
constexpr absl::string_view kTemporarySuffix = ".tmp";

bool IsId(absl::string_view text) {
  if (text.size() != kIdDigits) return false;
  for (const char c : text) {
    if (!absl::ascii_isdigit(c) && !(c >= 'a' && c <= 'f')) return false;
  }
  return true;
}

bool ConsumeDigits(absl::string_view* text) {
  size_t count = 0;
  while (count < text->size() && absl::ascii_isdigit((*text)[count])) ++count;
  text->remove_prefix(count);
  return count > 0;
}

// What follows "__<rank>_<n>" in a data file's name, without the suffix; false
// if it is none.
bool ParseDataFile(absl::string_view name, absl::string_view* rest) {
  if (!absl::ConsumePrefix(&name, "__") || !ConsumeDigits(&name) ||
      !absl::ConsumePrefix(&name, "_") || !ConsumeDigits(&name) ||
      !absl::ConsumeSuffix(&name, ".distcp")) {
    return false;
  }
  *rest = name;
  return true;
}

}  // namespace

std::string JoinFile(const std::string& directory, absl::string_view name) {
  const bool slash = !directory.empty() && directory.back() == '/';
  return absl::StrCat(directory, slash ? "" : "/", name);
}

std::string ParentOf(const std::string& path) {
  size_t end = path.find_last_not_of('/');
  if (end == std::string::npos) return "/";
  end = path.rfind('/', end);
  if (end == std::string::npos) return ".";
  end = path.find_last_not_of('/', end);
  return end == std::string::npos ? "/" : path.substr(0, end + 1);
}

std::vector<std::string> MissingDirectories(FileSystem& files,
                                            const std::string& path) {
  std::vector<std::string> missing;
  for (std::string at = path; absl::IsNotFound(files.Stat(at).status());) {
    missing.push_back(at);
    std::string parent = ParentOf(at);
    // Where a file system knows no directories, there is an end all the same.
    if (parent == at) break;
    at = std::move(parent);
  }
  return missing;
}

absl::string_view LastPart(absl::string_view path) {
  return path.substr(path.rfind('/') + 1);  // npos + 1 is 0
}

std::string TemporaryFile(absl::string_view name, absl::string_view file_id) {
  return absl::StrCat(".", name, ".", file_id, kTemporarySuffix);
}

absl::string_view NameOfTemporary(absl::string_view temporary) {
  if (!absl::ConsumePrefix(&temporary, ".") ||
      !absl::ConsumeSuffix(&temporary, kTemporarySuffix)) {
    return "";
  }
  const size_t dot = temporary.rfind('.');
  if (dot == absl::string_view::npos || !IsId(temporary.substr(dot + 1))) {
    return "";
  }
  return temporary.substr(0, dot);
}

std::string MakeSaveId(uint64_t high, uint64_t low) {
  high = (high & ~uint64_t{0xF000}) | 0x4000;                // version 4
  low = (low & ~(uint64_t{3} << 62)) | (uint64_t{2} << 62);  // variant
  const std::string a = absl::StrCat(absl::Hex(high, absl::kZeroPad16));
  const std::string b = absl::StrCat(absl::Hex(low, absl::kZeroPad16));
  return absl::StrCat(a.substr(0, 8), "-", a.substr(8, 4), "-", a.substr(12),
                      "-", b.substr(0, 4), "-", b.substr(4));
}

std::string FileId(absl::string_view save_id) {
  std::string id;
  for (const char c : save_id) {
    if (c != '-' && id.size() < kIdDigits) id.push_back(c);
  }
  return IsId(id) ? id : "";
}

std::string DataFile(int rank, int number, absl::string_view file_id) {
  return absl::StrCat("__", rank, "_", number, "_", file_id, ".distcp");
}

std::string DigestsFile(absl::string_view file_id) {
  return absl::StrCat(kDigestsPrefix, file_id);
}

std::string TemporaryIndexFile(absl::string_view file_id) {
  return absl::StrCat(kTemporaryPrefix, file_id, kTemporarySuffix);
}

absl::string_view IdOfDataFile(absl::string_view name) {
  absl::string_view rest;
  if (!ParseDataFile(name, &rest) || !absl::ConsumePrefix(&rest, "_") ||
      !IsId(rest)) {
    return "";
  }
  return rest;
}

std::optional<int> RankOfIndex(absl::string_view name) {
  int rank;
  if (!absl::ConsumePrefix(&name, "__") ||
      !absl::ConsumeSuffix(&name, ".metadata") || name.empty() ||
      name.find_first_not_of("0123456789") != absl::string_view::npos ||
      !absl::SimpleAtoi(name, &rank)) {
    return std::nullopt;
  }
  return rank;
}

bool IsCheckpointFile(absl::string_view name) {
  absl::string_view rest;
  if (ParseDataFile(name, &rest)) {
    return rest.empty() || !IdOfDataFile(name).empty();
  }
  if (RankOfIndex(name).has_value() ||
      RankOfIndex(absl::StripSuffix(name, ".tmp")).has_value()) {
    return true;
  }
  if (absl::ConsumePrefix(&name, kDigestsPrefix)) return IsId(name);
  return absl::ConsumePrefix(&name, kTemporaryPrefix) &&
         absl::ConsumeSuffix(&name, kTemporarySuffix) && IsId(name);
}

}  // namespace dsd::checkpoint
