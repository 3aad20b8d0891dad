// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/agree_on_catalogs.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "dsd/core/base/call_clock.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/rank_list.h"
#include "dsd/core/transfer/transfer.h"

namespace dsd {
namespace {

constexpr size_t kBuckets = 256;
constexpr size_t kShown = 50;
// Per rank; enough for any report that a person reads.
constexpr size_t kMaxEntryBytes = size_t{4} << 20;
constexpr size_t kMaxOptionBytes = size_t{16} << 10;
// Names and layouts may have any characters but these.
constexpr char kBetweenFields = '\x1f';
constexpr char kBetweenEntries = '\x1e';

Digest DigestOf(const TensorSpec& spec) {
  DigestBuilder digest;
  digest.Add(spec.fqn)
      .Add(static_cast<int64_t>(spec.dtype))
      .Add(spec.layout.symbols());
  return digest.Finish();
}

// The same on every rank.
size_t BucketOf(const std::string& fqn) {
  return DigestBuilder().Add(fqn).Finish().bytes[0];
}

// Digests of the buckets of one catalog, in its order.
std::string BucketDigests(const Catalog& catalog) {
  std::array<DigestBuilder, kBuckets> buckets;
  for (const TensorSpec& spec : catalog.tensors()) {
    buckets[BucketOf(spec.fqn)].Add(DigestOf(spec));
  }
  std::string bytes;
  for (const DigestBuilder& bucket : buckets) {
    const Digest digest = bucket.Finish();
    bytes.append(reinterpret_cast<const char*>(digest.bytes.data()),
                 digest.bytes.size());
  }
  return bytes;
}

// The entries of the buckets in `wanted`; digests tell layouts apart whose text
// was cut.
std::string EntriesOf(const Catalog& catalog, const std::vector<bool>& wanted) {
  std::string bytes;
  for (const TensorSpec& spec : catalog.tensors()) {
    if (!wanted[BucketOf(spec.fqn)]) continue;
    const std::string entry = absl::StrCat(
        spec.fqn, std::string(1, kBetweenFields), DTypeName(spec.dtype), " ",
        spec.layout.ToString(), std::string(1, kBetweenFields),
        DigestOf(spec).Hex().substr(0, 16), std::string(1, kBetweenEntries));
    if (bytes.size() + entry.size() > kMaxEntryBytes) break;
    bytes.append(entry);
  }
  return bytes;
}

// What ranks say, as "... on rank 2 and ... on ranks 0, 1": those of fewer
// ranks first.
std::string ByRank(
    const std::vector<std::pair<std::string, std::vector<int>>>& variants) {
  std::vector<std::pair<std::string, std::vector<int>>> sorted = variants;
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const auto& a, const auto& b) {
                     return a.second.size() < b.second.size();
                   });
  return absl::StrJoin(sorted, " and ", [](std::string* out, const auto& one) {
    absl::StrAppend(out, one.first, " on ", RankList(one.second));
  });
}

void AddVariant(const std::string& text, int rank,
                std::vector<std::pair<std::string, std::vector<int>>>& to) {
  auto it = std::find_if(to.begin(), to.end(),
                         [&](const auto& v) { return v.first == text; });
  if (it == to.end()) it = to.insert(it, {text, {}});
  it->second.push_back(rank);
}

// Lines about the tensors of one catalog, from what all ranks sent. Adds the
// names to `known`; those that are there already are left out.
void CompareEntries(const std::vector<std::string>& all,
                    absl::flat_hash_set<std::string>& known,
                    std::vector<std::string>& lines) {
  struct Tensor {
    std::vector<std::pair<std::string, std::vector<int>>> variants;
    std::vector<int> lacking;
  };
  std::vector<std::string> order;
  absl::flat_hash_map<std::string, Tensor> tensors;
  for (size_t rank = 0; rank < all.size(); ++rank) {
    for (const absl::string_view entry :
         absl::StrSplit(all[rank], kBetweenEntries, absl::SkipEmpty())) {
      const std::vector<std::string> fields =
          absl::StrSplit(entry, kBetweenFields);
      if (fields.size() != 3) continue;
      const auto [it, is_new] = tensors.try_emplace(fields[0]);
      if (is_new) order.push_back(fields[0]);
      AddVariant(
          absl::StrCat(fields[1], std::string(1, kBetweenFields), fields[2]),
          static_cast<int>(rank), it->second.variants);
    }
  }
  for (const std::string& fqn : order) {
    Tensor& tensor = tensors[fqn];
    size_t present = 0;
    for (auto& [text, ranks] : tensor.variants) present += ranks.size();
    if (tensor.variants.size() == 1 && present == all.size()) continue;
    if (!known.insert(fqn).second) continue;
    if (present < all.size()) {
      std::vector<bool> has(all.size());
      std::vector<int> with;
      for (const auto& [text, ranks] : tensor.variants) {
        for (const int rank : ranks) has[rank] = true;
      }
      for (size_t rank = 0; rank < all.size(); ++rank) {
        (has[rank] ? with : tensor.lacking).push_back(static_cast<int>(rank));
      }
      lines.push_back(absl::StrCat("\"", fqn, "\" is missing on ",
                                   RankList(tensor.lacking), " and is on ",
                                   RankList(with)));
    }
    if (tensor.variants.size() == 1) continue;
    // Without the digest, unless it is all that differs.
    const auto text_of = [](const std::string& variant) {
      return variant.substr(0, variant.find(kBetweenFields));
    };
    bool texts_differ = true;
    for (size_t i = 1; i < tensor.variants.size(); ++i) {
      texts_differ &= text_of(tensor.variants[i].first) !=
                      text_of(tensor.variants[i - 1].first);
    }
    for (auto& [variant, ranks] : tensor.variants) {
      const std::string text = text_of(variant);
      variant =
          texts_differ
              ? text
              : absl::StrCat(text, " (", variant.substr(text.size() + 1), ")");
    }
    lines.push_back(absl::StrCat("\"", fqn, "\" is ", ByRank(tensor.variants)));
  }
}

}  // namespace

absl::Status AgreeOnCatalogs(Communicator* comm, absl::string_view what,
                             absl::Span<const Catalog* const> catalogs,
                             const Digest& fingerprint,
                             const absl::Status& local,
                             absl::FunctionRef<std::string()> describe,
                             const CallOptions& options) {
  Env* const env = comm == nullptr ? Env::Real() : comm->env();
  const CallClock clock(env, options);
  bool disagree = false;
  const absl::Status verdict =
      Agree(comm, what, fingerprint, local, describe, options, &disagree);
  if (!disagree) return verdict;

  // All ranks are here.
  const std::string text = describe().substr(0, kMaxOptionBytes);
  std::string mine;
  for (const Catalog* catalog : catalogs) mine += BucketDigests(*catalog);
  const size_t digests_size = mine.size();
  mine += text;
  DSD_ASSIGN_OR_RETURN(
      const std::vector<std::string> digests,
      comm->AllGatherBlobs(mine,
                           static_cast<int64_t>(digests_size + kMaxOptionBytes),
                           clock.Left()));
  std::vector<std::pair<std::string, std::vector<int>>> words;
  for (size_t rank = 0; rank < digests.size(); ++rank) {
    if (digests[rank].size() < digests_size) {
      return absl::InternalError("agreement: a rank sent malformed digests");
    }
    AddVariant(digests[rank].substr(digests_size), static_cast<int>(rank),
               words);
  }
  std::vector<std::string> lines;
  if (words.size() > 1) lines.push_back(ByRank(words));
  absl::flat_hash_set<std::string> known;
  const size_t digest_size = Digest().bytes.size();
  // What else differs where the words do is a consequence of it.
  const size_t compared = words.size() > 1 ? 1 : catalogs.size();
  for (size_t c = 0; c < compared; ++c) {
    std::vector<bool> wanted(kBuckets);
    for (const std::string& other : digests) {
      for (size_t b = 0; b < kBuckets; ++b) {
        const size_t at = (c * kBuckets + b) * digest_size;
        if (other.compare(at, digest_size, digests[0], at, digest_size) != 0) {
          wanted[b] = true;
        }
      }
    }
    DSD_ASSIGN_OR_RETURN(
        const std::vector<std::string> entries,
        comm->AllGatherBlobs(EntriesOf(*catalogs[c], wanted),
                             static_cast<int64_t>(kMaxEntryBytes),
                             clock.Left()));
    CompareEntries(entries, known, lines);
  }
  if (lines.empty()) lines.push_back("the order of the tensors differs");
  const size_t shown = std::min(lines.size(), kShown);
  std::string report =
      absl::StrJoin(lines.begin(), lines.begin() + shown, "; ");
  if (shown < lines.size()) {
    absl::StrAppend(&report, "; and ", lines.size() - shown, " more");
  }
  return absl::FailedPreconditionError(
      absl::StrCat(what, ": ranks disagree: ", report));
}

}  // namespace dsd
