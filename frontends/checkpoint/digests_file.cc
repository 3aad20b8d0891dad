// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/digests_file.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/crc/crc32c.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace dsd::checkpoint {
namespace {

constexpr absl::string_view kTitle = "dsd digests ";

std::string Hex32(uint32_t value) {
  return absl::StrCat(absl::Hex(value, absl::kZeroPad8));
}

void AppendSorted(const absl::flat_hash_map<std::string, Digest128>& digests,
                  DigestVersion version, absl::string_view kind,
                  std::string* out) {
  std::vector<std::pair<absl::string_view, Digest128>> sorted(digests.begin(),
                                                              digests.end());
  std::sort(sorted.begin(), sorted.end());
  for (const auto& [key, digest] : sorted) {
    absl::StrAppend(out, kind, " ", DigestHex(digest, version), " ",
                    absl::CEscape(key), "\n");
  }
}

}  // namespace

std::string EncodeDigests(const StoredDigests& digests) {
  std::string out;
  absl::StrAppend(&out, kTitle, static_cast<int>(digests.version), "\n");
  if (digests.index_bytes > 0) {
    absl::StrAppend(&out, "index ", digests.index_bytes, " ",
                    Hex32(digests.index_crc), "\n");
  }
  AppendSorted(digests.tensors, digests.version, "tensor", &out);
  AppendSorted(digests.objects, digests.version, "object", &out);
  const uint32_t crc = static_cast<uint32_t>(absl::ComputeCrc32c(out));
  absl::StrAppend(&out, "end ", digests.tensors.size() + digests.objects.size(),
                  " ", Hex32(crc), "\n");
  return out;
}

absl::StatusOr<StoredDigests> DecodeDigests(absl::string_view text) {
  const auto bad = [](absl::string_view what) {
    return absl::DataLossError(absl::StrCat("digests: ", what));
  };
  StoredDigests out;
  absl::string_view title = text.substr(0, text.find('\n'));
  int version;
  if (!absl::ConsumePrefix(&title, kTitle) ||
      !absl::SimpleAtoi(title, &version) || version < 1) {
    return bad("not a file of digests");
  }
  if (version > static_cast<int>(kDigestVersion)) {
    return absl::UnimplementedError(
        absl::StrCat("digests of version ", version,
                     ", written by a newer dsd; read the "
                     "checkpoint without verification, or with that"));
  }
  out.version = static_cast<DigestVersion>(version);
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<absl::string_view> words =
        absl::StrSplit(line, absl::MaxSplits(' ', 2));
    Digest128 digest;
    std::string key;
    if (words.size() != 3) continue;
    if (words[0] == "index") {
      if (!absl::SimpleAtoi(words[1], &out.index_bytes) ||
          !absl::SimpleHexAtoi(words[2], &out.index_crc)) {
        return bad("damaged line \"index\"");
      }
    } else if (words[0] == "tensor" || words[0] == "object") {
      if (!ParseDigestHex(words[1], &digest, out.version) ||
          !absl::CUnescape(words[2], &key)) {
        return bad("a damaged line");
      }
      (words[0] == "tensor" ? out.tensors : out.objects)[key] = digest;
    }
  }
  // Covers order, counts, CRC and whatever was passed over above.
  if (EncodeDigests(out) != text) {
    return bad("damaged: their checksum differs");
  }
  return out;
}

}  // namespace dsd::checkpoint
