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

// Line by line.
class Writer {
 public:
  explicit Writer(DigestVersion version) : version_(version) {
    absl::StrAppend(&out_, kTitle, static_cast<int>(version), "\n");
  }

  void Index(int64_t bytes, uint32_t crc) {
    absl::StrAppend(&out_, "index ", bytes, " ",
                    absl::Hex(crc, absl::kZeroPad8), "\n");
  }
  void Key(absl::string_view kind, absl::string_view key,
           const Digest128& digest) {
    absl::StrAppend(&out_, kind, " ", DigestHex(digest, version_), " ",
                    absl::CEscape(key), "\n");
    ++keys_;
  }
  std::string Finish() {
    const uint32_t crc = static_cast<uint32_t>(absl::ComputeCrc32c(out_));
    absl::StrAppend(&out_, "end ", keys_, " ", absl::Hex(crc, absl::kZeroPad8),
                    "\n");
    return std::move(out_);
  }

 private:
  const DigestVersion version_;
  std::string out_;
  int64_t keys_ = 0;
};

using Map = absl::flat_hash_map<std::string, Digest128>;

void WriteSorted(const Map& digests, absl::string_view kind, Writer* writer) {
  std::vector<std::pair<absl::string_view, Digest128>> sorted(digests.begin(),
                                                              digests.end());
  std::sort(sorted.begin(), sorted.end());
  for (const auto& [key, digest] : sorted) writer->Key(kind, key, digest);
}

}  // namespace

std::string EncodeDigests(const StoredDigests& digests) {
  Writer writer(digests.version);
  if (digests.index_bytes > 0) {
    writer.Index(digests.index_bytes, digests.index_crc);
  }
  WriteSorted(digests.tensors, "tensor", &writer);
  WriteSorted(digests.objects, "object", &writer);
  return writer.Finish();
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
  out.tensors.reserve(text.size() / 64);
  Writer again(out.version);
  std::pair<int, std::string> last;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::pair<absl::string_view, absl::string_view> words =
        absl::StrSplit(line, absl::MaxSplits(' ', 1));
    const std::pair<absl::string_view, absl::string_view> values =
        absl::StrSplit(words.second, absl::MaxSplits(' ', 1));
    std::pair<int, std::string> place(words.first == "index"    ? 1
                                      : words.first == "tensor" ? 2
                                      : words.first == "object" ? 3
                                                                : 0,
                                      "");
    if (place.first == 0) continue;
    if (place.first == 1) {
      if (!absl::SimpleAtoi(values.first, &out.index_bytes) ||
          !absl::SimpleHexAtoi(values.second, &out.index_crc) ||
          out.index_bytes <= 0) {
        return bad("damaged line \"index\"");
      }
      again.Index(out.index_bytes, out.index_crc);
    } else {
      Digest128 digest;
      if (!ParseDigestHex(values.first, &digest, out.version) ||
          !absl::CUnescape(values.second, &place.second)) {
        return bad("a damaged line");
      }
      again.Key(words.first, place.second, digest);
      (place.first == 2 ? out.tensors : out.objects)
          .emplace(place.second, digest);
    }
    if (place <= last) return bad("damaged: lines are not in order");
    last = std::move(place);
  }
  // Covers count, CRC and whatever was passed over above.
  if (again.Finish() != text) {
    return bad("damaged: their checksum differs");
  }
  return out;
}

}  // namespace dsd::checkpoint
