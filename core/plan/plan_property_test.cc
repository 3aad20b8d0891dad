// SPDX-License-Identifier: Apache-2.0
//
// The planner against a brute-force map of the elements, which knows nothing of
// Layout: every needed element arrives once, over the network only if it must.

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/layout/random_layout.h"
#include "dsd/core/plan/plan.h"
#include "dsd/core/plan/random_plan_case.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using test::ElementMap;
using test::PlanCase;
using test::PlanInputs;
using Element = ElementMap::Element;

// Row-major indices, in a tensor of `shape`, of the elements of `box`.
std::vector<int64_t> Elements(const Dims& shape, const Box& box) {
  std::vector<int64_t> out;
  if (box.empty()) return out;
  Dims at = box.lo;
  while (true) {
    out.push_back(FlatIndex(shape, at));
    int d = box.ndim() - 1;
    while (d >= 0 && ++at[d] == box.hi[d]) at[d] = box.lo[d], --d;
    if (d < 0) return out;
  }
}

bool Has(const std::vector<int>& ranks, int rank) {
  return std::binary_search(ranks.begin(), ranks.end(), rank);
}

// What one rank's planning must answer.
bool MustFail(const std::vector<ElementMap>& maps, int rank) {
  for (const ElementMap& map : maps) {
    for (const Element& element : map.elements) {
      if (element.available()) continue;
      if (element.target_any || Has(element.target_ranks, rank)) return true;
    }
  }
  return false;
}

// Of what sort the cases were.
struct Checked {
  int64_t pairs = 0;               // of layouts, planned
  int64_t refused = 0;             // cases with an element that is nowhere
  int64_t bytes = 0;               // over the network
  int64_t moves = 0;               // likewise
  int64_t large_moves = 0;         // of a size that only dividing a cell gives
  int64_t across_hosts = 0;        // moves
  int64_t relays = 0;              // moves
  int64_t relays_after_hosts = 0;  // elements that come from another host first
  int64_t from_any = 0;            // elements read from kAnyHolder
  int64_t to_any = 0;              // elements taken for kAnyHolder
  int64_t shared_ranks = 0;        // cases with several holders on a rank
};

// What a move is to both of its ends.
bool SameForBoth(const Move& a, const Move& b) {
  return a.source_tensor == b.source_tensor &&
         a.target_tensor == b.target_tensor && a.box == b.box &&
         a.wire_dtype == b.wire_dtype && a.provider == b.provider &&
         a.relayed == b.relayed;
}

void CheckPlans(const PlanCase& plan_case, const std::vector<ElementMap>& maps,
                const PlanInputs& inputs, const std::vector<Plan>& plans,
                Checked& checked) {
  const int world_size = plan_case.world_size;
  // Per tensor and element: which ranks it was written on, and who read it from
  // storage.
  std::vector<std::vector<std::vector<int>>> written(maps.size());
  std::vector<std::vector<int>> reads(maps.size());
  for (size_t t = 0; t < maps.size(); ++t) {
    written[t].resize(maps[t].elements.size());
    reads[t].resize(maps[t].elements.size());
  }
  // By tensor, element and host: how often it comes from another host, and from
  // a relay.
  std::map<std::tuple<size_t, int64_t, int>, std::pair<int, int>> arrivals;
  std::map<std::pair<int, int>, std::vector<Move>> sent;
  std::map<std::pair<int, int>, std::vector<Move>> received;
  int64_t bytes_sent = 0;
  int64_t bytes_received = 0;
  // What each rank receives by moves that are not relayed: tensor, element.
  std::vector<std::set<std::pair<size_t, int64_t>>> brought(world_size);
  for (int rank = 0; rank < world_size; ++rank) {
    for (const Move& move : plans[rank].moves) {
      if (move.provider == rank || move.relayed) continue;
      const size_t t = move.target_tensor;
      for (int64_t e : Elements(inputs.target[t].shape(), move.box)) {
        brought[rank].emplace(t, e);
      }
    }
  }

  for (int rank = 0; rank < world_size; ++rank) {
    const Plan& plan = plans[rank];
    ASSERT_EQ(plan.rank, rank);
    PlanCost cost;
    for (size_t i = 0; i < plan.moves.size(); ++i) {
      const Move& move = plan.moves[i];
      ASSERT_EQ(move.source_tensor, move.target_tensor);
      const size_t t = move.target_tensor;
      ASSERT_FALSE(move.box.empty());
      if (i > 0) {  // in order
        const Move& previous = plan.moves[i - 1];
        ASSERT_LE(previous.target_tensor, t);
        if (previous.target_tensor == t) {
          ASSERT_LE(previous.box.lo, move.box.lo);
          ASSERT_FALSE(previous.box == move.box &&
                       previous.provider == move.provider);
        }
      }
      if (move.provider != rank) {
        ASSERT_EQ(move.readers.size(), 1);
        ASSERT_EQ(move.readers[0], rank);
        ASSERT_FALSE(move.provider_keeps);
        received[{move.provider, rank}].push_back(move);
        cost.bytes_received += move.wire_bytes();
        continue;
      }
      ASSERT_TRUE(move.provider_keeps || !move.readers.empty());
      ASSERT_TRUE(std::is_sorted(move.readers.begin(), move.readers.end()));
      ASSERT_EQ(std::adjacent_find(move.readers.begin(), move.readers.end()),
                move.readers.end());
      if (move.provider_keeps) cost.bytes_local += move.wire_bytes();
      cost.bytes_sent += move.wire_bytes() * move.readers.size();
      for (int reader : move.readers) sent[{rank, reader}].push_back(move);

      const DType from_dtype = inputs.source[t].dtype;
      const DType to_dtype = inputs.target[t].dtype;
      for (int64_t e : Elements(inputs.target[t].shape(), move.box)) {
        const Element& element = maps[t].elements[e];
        ASSERT_TRUE(move.relayed
                        ? brought[rank].count({t, e}) > 0
                        : element.source_any || Has(element.source_ranks, rank))
            << "rank " << rank << " has not element " << e << " of t" << t;
        if (!move.relayed) ++reads[t][e];
        ASSERT_FALSE(move.relayed && move.wire_dtype != to_dtype);
        const bool as_target =
            element.source_any || ItemSize(to_dtype) < ItemSize(from_dtype);
        ASSERT_EQ(move.wire_dtype, as_target ? to_dtype : from_dtype);
        if (move.provider_keeps) written[t][e].push_back(rank);
        for (int reader : move.readers) {
          ASSERT_NE(reader, rank);
          written[t][e].push_back(reader);
          // A host that has it need not ask another.
          const auto host = [&](int r) {
            return plan_case.host_of_rank.empty() ? 0
                                                  : plan_case.host_of_rank[r];
          };
          std::pair<int, int>& arrived = arrivals[{t, e, host(reader)}];
          arrived.first += host(reader) != host(rank);
          arrived.second += move.relayed;
          if (!element.source_any && host(reader) != host(rank)) {
            for (int r : element.source_ranks) {
              ASSERT_NE(host(r), host(reader));
            }
          }
        }
      }
    }
    ASSERT_EQ(plan.cost.bytes_local, cost.bytes_local);
    ASSERT_EQ(plan.cost.bytes_sent, cost.bytes_sent);
    ASSERT_EQ(plan.cost.bytes_received, cost.bytes_received);
    ASSERT_EQ(plan.cost.moves, plan.moves.size());
    bytes_sent += cost.bytes_sent;
    bytes_received += cost.bytes_received;
  }

  // Who relays does so on its own host, which is reached once.
  for (const auto& [place, arrived] : arrivals) {
    ASSERT_TRUE(arrived.second == 0 || arrived.first <= 1);
    checked.relays_after_hosts += arrived.first == 1 && arrived.second > 0;
  }

  // Both ends of each ordered pair of ranks have the same stream.
  ASSERT_EQ(sent.size(), received.size());
  for (const auto& [pair, moves] : sent) {
    const std::vector<Move>& other = received[pair];
    ASSERT_EQ(moves.size(), other.size());
    for (size_t i = 0; i < moves.size(); ++i) {
      ASSERT_TRUE(SameForBoth(moves[i], other[i]))
          << pair.first << " -> " << pair.second << " move " << i;
    }
  }

  // Each needed element arrives once, and no other.
  int64_t lower_bound = 0;
  for (size_t t = 0; t < maps.size(); ++t) {
    for (size_t e = 0; e < maps[t].elements.size(); ++e) {
      const Element& element = maps[t].elements[e];
      std::vector<int>& ranks = written[t][e];
      std::sort(ranks.begin(), ranks.end());
      if (element.target_any) {
        ASSERT_EQ(ranks.size(), 1) << "element " << e << " of t" << t;
      } else {
        ASSERT_EQ(ranks, element.target_ranks)
            << "element " << e << " of t" << t;
      }
      if (element.source_any) {
        ASSERT_EQ(reads[t][e], element.needed() ? 1 : 0);
      }
      lower_bound += element.wire_bytes;
      checked.from_any += element.source_any && element.needed();
      checked.to_any += element.target_any;
    }
  }
  EXPECT_EQ(bytes_sent, lower_bound);
  EXPECT_EQ(bytes_received, lower_bound);
  checked.bytes += bytes_sent;
  for (const auto& [pair, moves] : sent) {
    checked.moves += moves.size();
    for (const Move& move : moves) checked.relays += move.relayed;
    if (!plan_case.host_of_rank.empty() &&
        plan_case.host_of_rank[pair.first] !=
            plan_case.host_of_rank[pair.second]) {
      checked.across_hosts += moves.size();
    }
    for (const Move& move : moves) {
      checked.large_moves += move.wire_bytes() > kSplitBytes / 2 &&
                             move.wire_bytes() <= kSplitBytes;
    }
  }
}

void CheckCase(uint64_t seed, Checked& checked) {
  const PlanCase plan_case = test::RandomPlanCase(seed);
  SCOPED_TRACE("DSD_TEST_SEED=" + std::to_string(seed) + "\n" +
               plan_case.ToString());
  const absl::StatusOr<PlanInputs> inputs = test::BuildPlanCase(plan_case);
  ASSERT_TRUE(inputs.ok()) << inputs.status();
  std::vector<ElementMap> maps;
  for (const test::TensorCase& tensor : plan_case.tensors) {
    maps.push_back(test::MapElements(plan_case, tensor));
  }

  std::vector<Plan> plans;
  bool refused = false;
  for (int rank = 0; rank < plan_case.world_size; ++rank) {
    absl::StatusOr<Plan> plan =
        PlanForRank(rank, inputs->source, inputs->target,
                    MatchByName(inputs->source, inputs->target),
                    inputs->source_binding, inputs->target_binding);
    if (MustFail(maps, rank)) {
      refused = true;
      ASSERT_EQ(plan.status().code(), absl::StatusCode::kFailedPrecondition);
      continue;
    }
    ASSERT_TRUE(plan.ok()) << plan.status();
    plans.push_back(*std::move(plan));
  }
  if (refused) {
    ++checked.refused;
    return;
  }
  checked.pairs += plan_case.tensors.size();
  ASSERT_NO_FATAL_FAILURE(CheckPlans(plan_case, maps, *inputs, plans, checked));
  checked.shared_ranks +=
      !inputs->source_binding.OneToOne() || !inputs->target_binding.OneToOne();
  // Words for any plan.
  EXPECT_FALSE(Explain(inputs->source, inputs->target, plans).empty());
}

TEST(PlanPropertyTest, RandomPairsOfLayouts) {
  const uint64_t seed = test::TestSeed();
  Checked checked;
  for (uint64_t i = 0; checked.pairs < 4000; ++i) {
    ASSERT_NO_FATAL_FAILURE(CheckCase(seed + i, checked));
    if (HasFailure()) return;
  }
  // The cases were of all sorts.
  EXPECT_GT(checked.refused, 20);
  EXPECT_GT(checked.bytes, 100000);
  EXPECT_GT(checked.moves, 1000);
  EXPECT_GT(checked.large_moves, 5);
  EXPECT_GT(checked.across_hosts, 100);
  EXPECT_GT(checked.relays, 5);
  EXPECT_GT(checked.relays_after_hosts, 100);
  EXPECT_GT(checked.from_any, 1000);
  EXPECT_GT(checked.to_any, 1000);
  EXPECT_GT(checked.shared_ranks, 100);
}

}  // namespace
}  // namespace dsd
