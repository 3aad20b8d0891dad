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
#include "dsd/core/base/content_digest.h"

namespace dsd::checkpoint {
namespace {

constexpr absl::string_view kFirstLine = "dsd digests 1\n";

std::string Hex32(uint32_t value) {
  return absl::StrCat(absl::Hex(value, absl::kZeroPad8));
}

void AppendSorted(const absl::flat_hash_map<std::string, uint64_t>& digests,
                  absl::string_view kind, std::string* out) {
  std::vector<std::pair<absl::string_view, uint64_t>> sorted(digests.begin(),
                                                             digests.end());
  std::sort(sorted.begin(), sorted.end());
  for (const auto& [key, digest] : sorted) {
    absl::StrAppend(out, kind, " ", DigestHex(digest), " ", absl::CEscape(key),
                    "\n");
  }
}

}  // namespace

std::string EncodeDigests(const StoredDigests& digests) {
  std::string out(kFirstLine);
  absl::StrAppend(&out, "index ", digests.index_bytes, " ",
                  Hex32(digests.index_crc), "\n");
  AppendSorted(digests.tensors, "tensor", &out);
  AppendSorted(digests.objects, "object", &out);
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
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<absl::string_view> words =
        absl::StrSplit(line, absl::MaxSplits(' ', 2));
    uint64_t number;
    std::string key;
    if (words.size() != 3) continue;
    if (words[0] == "index") {
      if (!absl::SimpleAtoi(words[1], &out.index_bytes) ||
          !absl::SimpleHexAtoi(words[2], &out.index_crc)) {
        return bad("damaged line \"index\"");
      }
    } else if (words[0] == "tensor" || words[0] == "object") {
      if (!absl::SimpleHexAtoi(words[1], &number) ||
          !absl::CUnescape(words[2], &key)) {
        return bad("a damaged line");
      }
      (words[0] == "tensor" ? out.tensors : out.objects)[key] = number;
    }
  }
  // Covers order, counts, CRC and whatever was passed over above.
  if (EncodeDigests(out) != text) {
    return bad("damaged: their checksum differs");
  }
  return out;
}

}  // namespace dsd::checkpoint
