// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "dsd/core/plan/plan.h"

namespace dsd {
namespace {

constexpr size_t kMaxReaders = 8;

std::string BytesToString(int64_t bytes) {
  static constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB", "PiB"};
  if (bytes < 1024) return absl::StrCat(bytes, " B");
  double value = bytes / 1024.0;
  int unit = 0;
  for (; value >= 1024 && unit < 4; ++unit) value /= 1024;
  return absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

std::string Count(int64_t count, absl::string_view noun) {
  return absl::StrCat(count, " ", noun, count == 1 ? "" : "s");
}

struct Traffic {
  int64_t moves = 0;
  int64_t bytes = 0;
};

using Pair = std::pair<int, int>;  // (from, to); equal: within a rank

struct Summary {
  absl::btree_map<Pair, Traffic> pairs;
  std::vector<const Move*> moves;  // by target tensor and box

  void Add(int from, int to, int64_t bytes) {
    Traffic& traffic = pairs[{from, to}];
    ++traffic.moves;
    traffic.bytes += bytes;
  }
};

// Counts each move once: in the provider's plan if it was given.
Summary Summarize(const std::vector<Plan>& plans) {
  absl::flat_hash_set<int> planned;
  for (const Plan& plan : plans) planned.insert(plan.rank);
  Summary summary;
  for (const Plan& plan : plans) {
    for (const Move& move : plan.moves) {
      if (move.provider != plan.rank && planned.contains(move.provider)) {
        continue;
      }
      summary.moves.push_back(&move);
      if (move.provider_keeps) {
        summary.Add(move.provider, move.provider, move.wire_bytes());
      }
      for (int reader : move.readers) {
        summary.Add(move.provider, reader, move.wire_bytes());
      }
    }
  }
  std::stable_sort(summary.moves.begin(), summary.moves.end(),
                   [](const Move* a, const Move* b) {
                     if (a->target_tensor != b->target_tensor) {
                       return a->target_tensor < b->target_tensor;
                     }
                     return a->box.lo < b->box.lo;
                   });
  return summary;
}

std::string MoveToString(const Catalog& source, const Catalog& target,
                         const Move& move) {
  const std::string& from = source[move.source_tensor].fqn;
  const std::string& to = target[move.target_tensor].fqn;
  std::string out =
      absl::StrCat(from == to ? to : absl::StrCat(from, " as ", to),
                   move.box.ToString(), " rank ", move.provider, " ");
  const std::string bytes = BytesToString(move.wire_bytes());
  if (move.readers.empty()) return absl::StrCat(out, "local (", bytes, ")");
  const size_t shown = std::min(move.readers.size(), kMaxReaders);
  absl::StrAppend(
      &out, "-> ", move.provider_keeps ? "itself, " : "",
      absl::StrJoin(move.readers.begin(), move.readers.begin() + shown, ", "));
  if (shown < move.readers.size()) {
    absl::StrAppend(&out, " and ", move.readers.size() - shown, " more");
  }
  const bool several = move.readers.size() + move.provider_keeps > 1;
  return absl::StrCat(out, " (", bytes, several ? " each" : "",
                      move.relayed ? ", relayed)" : ")");
}

}  // namespace

std::string Explain(const Catalog& source, const Catalog& target,
                    const std::vector<Plan>& plans, int max_moves) {
  const size_t limit = std::max(max_moves, 0);
  const Summary summary = Summarize(plans);

  Traffic within;
  Traffic between;
  absl::btree_map<int, std::pair<int64_t, int64_t>> in_out;  // by rank, bytes
  for (const auto& [pair, traffic] : summary.pairs) {
    Traffic& total = pair.first == pair.second ? within : between;
    total.moves += traffic.moves;
    total.bytes += traffic.bytes;
    if (pair.first == pair.second) continue;
    in_out[pair.second].first += traffic.bytes;
    in_out[pair.first].second += traffic.bytes;
  }

  std::string out = absl::StrCat(
      "plan of ", Count(plans.size(), "rank"), " for ",
      Count(target.size(), "tensor"), ": ", Count(summary.moves.size(), "move"),
      ", ", BytesToString(between.bytes), " between ranks, ",
      BytesToString(within.bytes), " within ranks\n");
  if (summary.moves.empty()) return out;

  std::vector<std::pair<Pair, Traffic>> rows(summary.pairs.begin(),
                                             summary.pairs.end());
  if (rows.size() > limit) {
    std::stable_sort(rows.begin(), rows.end(),
                     [](const auto& a, const auto& b) {
                       return a.second.bytes > b.second.bytes;
                     });
    absl::StrAppend(&out, "\nthe ", limit, " largest of ", rows.size(),
                    " pairs of ranks:\n");
    rows.resize(limit);
  } else {
    absl::StrAppend(&out, "\n");
  }
  absl::StrAppendFormat(&out, "%7s %7s %7s %11s\n", "from", "to", "copies",
                        "bytes");
  for (const auto& [pair, traffic] : rows) {
    absl::StrAppendFormat(
        &out, "%7d %7s %7d %11s\n", pair.first,
        pair.first == pair.second ? "local" : absl::StrCat(pair.second),
        traffic.moves, BytesToString(traffic.bytes));
  }

  if (!in_out.empty()) {
    const auto busiest = std::max_element(
        in_out.begin(), in_out.end(), [](const auto& a, const auto& b) {
          return std::max(a.second.first, a.second.second) <
                 std::max(b.second.first, b.second.second);
        });
    absl::StrAppend(&out, "\nbusiest: rank ", busiest->first, ", ",
                    BytesToString(busiest->second.first), " in, ",
                    BytesToString(busiest->second.second), " out\n");
  }

  absl::StrAppend(&out, "\nmoves:\n");
  for (size_t i = 0; i < summary.moves.size(); ++i) {
    if (i == limit) {
      absl::StrAppend(&out, "  and ", summary.moves.size() - i, " more\n");
      break;
    }
    absl::StrAppend(&out, "  ", MoveToString(source, target, *summary.moves[i]),
                    "\n");
  }
  return out;
}

}  // namespace dsd
