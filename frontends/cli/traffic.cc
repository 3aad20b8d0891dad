// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/traffic.h"

#include <algorithm>

#include "absl/container/flat_hash_map.h"
#include "dsd/core/base/status_macros.h"

namespace dsd::cli {
namespace {

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

using Ranks = std::vector<int>;  // ascending, distinct

Ranks RanksOf(const HolderSet& holders, const Binding& binding) {
  Ranks ranks;
  for (int64_t i = 0; i < holders.size(); ++i) {
    const int rank = binding.RankOf(holders.At(i));
    if (rank >= 0) ranks.push_back(rank);
  }
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  return ranks;
}

// What every plan for these catalogs has to do.
class Bound {
 public:
  explicit Bound(int world_size) : in_(world_size, 0) {}

  void Add(const Layout& source, const Layout& target, int64_t item_size,
           const Binding& binding) {
    target.ForEachCell(target.whole(), [&](const Cell& needed) {
      const Ranks readers = RanksOf(needed.holders, binding);
      source.ForEachCell(needed.box, [&](const Cell& had) {
        const int64_t bytes = had.box.num_elements() * item_size;
        if (had.holders.IsAny()) {
          // Whoever reads it passes it on to the others.
          total_ += bytes * (static_cast<int64_t>(readers.size()) - 1);
          return;
        }
        const Ranks holders = RanksOf(had.holders, binding);
        bool leaves = false;
        for (const int rank : readers) {
          if (std::binary_search(holders.begin(), holders.end(), rank)) {
            continue;
          }
          leaves = true;
          in_[rank] += bytes;
          total_ += bytes;
        }
        if (leaves) out_[holders] += bytes;
      });
    });
  }

  int64_t Busiest() const {
    int64_t bound = DivideUp(total_, static_cast<int64_t>(in_.size()));
    for (const int64_t bytes : in_) bound = std::max(bound, bytes);
    for (const auto& [holders, bytes] : out_) {
      bound = std::max(bound,
                       DivideUp(bytes, static_cast<int64_t>(holders.size())));
    }
    return bound;
  }

 private:
  std::vector<int64_t> in_;                  // by rank
  int64_t total_ = 0;                        // that is received, by all
  absl::flat_hash_map<Ranks, int64_t> out_;  // that only these have
};

}  // namespace

absl::StatusOr<Traffic> TrafficOf(const Catalog& source, const Catalog& target,
                                  const Binding& binding) {
  Traffic out;
  out.ranks.resize(binding.world_size());
  const TensorPairs pairs = MatchByName(source, target);
  for (int rank = 0; rank < binding.world_size(); ++rank) {
    DSD_ASSIGN_OR_RETURN(const Plan plan, PlanForRank(rank, source, target,
                                                      pairs, binding, binding));
    for (const Move& move : plan.moves) {
      if (move.provider != rank) continue;  // in the provider's plan too
      ++out.moves;
      const int64_t bytes = move.wire_bytes();
      RankTraffic& provider = out.ranks[rank];
      if (!move.relayed && source[move.source_tensor].layout.HasAnyHolder()) {
        provider.read += bytes;
        out.read += bytes;
      }
      if (move.provider_keeps) {
        provider.kept += bytes;
        out.kept += bytes;
      }
      for (const int reader : move.readers) {
        out.pairs[{rank, reader}] += bytes;
        provider.sent += bytes;
        out.ranks[reader].received += bytes;
        out.between += bytes;
      }
    }
  }
  Bound bound(binding.world_size());
  for (const auto& [from, to] : pairs) {
    const int64_t item_size = ItemSize(source[from].dtype);
    bound.Add(source[from].layout, target[to].layout, item_size, binding);
    for (int rank = 0; rank < binding.world_size(); ++rank) {
      for (const LocalBox& local : source[from].layout.BoxesOf(rank)) {
        out.ranks[rank].has += local.box.num_elements() * item_size;
      }
      for (const LocalBox& local : target[to].layout.BoxesOf(rank)) {
        out.ranks[rank].needs += local.box.num_elements() * item_size;
      }
    }
  }
  out.bound = bound.Busiest();
  for (int rank = 0; rank < binding.world_size(); ++rank) {
    const int64_t busy = out.ranks[rank].busy();
    if (busy > 0 && (out.busiest < 0 || busy > out.ranks[out.busiest].busy())) {
      out.busiest = rank;
    }
  }
  return out;
}

}  // namespace dsd::cli
