// SPDX-License-Identifier: Apache-2.0
//
// Planning: a save of many chunks beside PyTorch's planner in the same run, one
// rank of a large world, and how many bytes plans move. Fails if results differ
// from PyTorch's or from the lower bound.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/plan/plan.h"
#include "dsd/core/plan/random_plan_case.h"
#include "dsd/testing/benchmarks/measure.h"
#include "nlohmann/json.hpp"

namespace dsd {
namespace {

using Json = nlohmann::json;

constexpr int64_t kRows = 4;  // of a chunk; as in planning_peer.py
constexpr int64_t kColumns = 64;

bool same = true;  // whether all results are as they must be

void Verdict(const std::string& what, bool equal) {
  same &= equal;
  absl::PrintF("  %s: %s\n", what, equal ? "equal" : "NOT EQUAL");
  std::fflush(stdout);
}

// `make` gives the layout of each tensor anew: no memory is shared.
template <class Make>
Catalog CatalogOf(int tensors, const Make& make) {
  Catalog catalog;
  for (int i = 0; i < tensors; ++i) {
    const absl::Status added = catalog.Add(
        {absl::StrCat("layers.", i, ".weight"), DType::kFloat32, make()});
    if (!added.ok()) std::exit(1);
  }
  return catalog;
}

Layout Bands(int64_t chunks) {
  std::vector<HolderBox> boxes;
  boxes.reserve(chunks);
  for (int64_t i = 0; i < chunks; ++i) {
    boxes.push_back({i, {{kRows * i, 0}, {kRows * (i + 1), kColumns}}});
  }
  return Must(Layout::FromBoxes({kRows * chunks, kColumns}, std::move(boxes)));
}

Layout OnMesh(Dims shape, Dims mesh, std::vector<Placement> placements) {
  return Must(Layout::FromPlacements(
      std::move(shape), DeviceMesh::Iota(std::move(mesh)), placements));
}

// Row 7. A save: every chunk is written by one of the ranks that have it.
void PlanAndValidate(const std::string& peer, int tensors, int ranks,
                     bool with_peer) {
  const double start_mib = PeakMiB();
  Catalog source;
  int64_t uncovered = 0;
  const Seconds validate = Measure([&] {
    source = CatalogOf(tensors, [&] { return Bands(ranks); });
    for (const TensorSpec& spec : source.tensors()) {
      uncovered += spec.layout.NumUncovered();
    }
  });
  int64_t items = 0;
  int64_t elements = 0;
  const Seconds plan = Measure([&] {
    const Catalog target = CatalogOf(tensors, [&] {
      return Layout::Anywhere({kRows * ranks, kColumns});
    });
    const TensorPairs pairs = MatchByName(source, target);
    const Binding binding(ranks);
    for (int rank = 0; rank < ranks; ++rank) {
      const Plan one =
          Must(PlanForRank(rank, source, target, pairs, binding, binding));
      items += one.cost.moves;
      for (const Move& move : one.moves) elements += move.box.num_elements();
    }
  });
  const double grown = PeakMiB() - start_mib;
  absl::PrintF(
      "7. plan and validate %d tensors x %d shards: dsd %.3f s (validate %.3f, "
      "all ranks' plans %.3f; CPU %.3f), %.0f MiB\n",
      tensors, ranks, validate.wall + plan.wall, validate.wall, plan.wall,
      validate.cpu + plan.cpu, grown);
  Verdict("every element has one writer",
          uncovered == 0 &&
              elements == int64_t{tensors} * ranks * kRows * kColumns);
  if (!with_peer) return;
  const Json other = RunPeer(absl::StrCat(peer, " ", tensors, " ", ranks));
  const double total = other["dedup"]["wall"].get<double>() +
                       other["plan"]["wall"].get<double>() +
                       other["validate"]["wall"].get<double>();
  absl::PrintF(
      "   PyTorch %.3f s (de-dup %.3f, plan %.3f, validate %.3f), %.0f MiB; "
      "ratio %.0fx\n",
      total, other["dedup"]["wall"].get<double>(),
      other["plan"]["wall"].get<double>(),
      other["validate"]["wall"].get<double>(),
      other["peak_mib"].get<double>() - other["start_mib"].get<double>(),
      total / (validate.wall + plan.wall));
  Verdict("items and elements of PyTorch's plan",
          other["valid"].get<bool>() &&
              other["items"].get<int64_t>() == items &&
              other["elements"].get<int64_t>() == elements);
}

// Row 7b. Half of the ranks take over what all had: equal overlap in any world.
void PlanOneRank(int tensors) {
  int64_t operations[2];
  int at = 0;
  for (const int64_t ranks : {int64_t{1024}, int64_t{16384}}) {
    const double start_mib = PeakMiB();
    const Dims shape = {kRows * ranks, kColumns};
    const Catalog source =
        CatalogOf(tensors, [&] { return OnMesh(shape, {ranks}, {Shard(0)}); });
    const Catalog target = CatalogOf(
        tensors, [&] { return OnMesh(shape, {ranks / 2}, {Shard(0)}); });
    const TensorPairs pairs = MatchByName(source, target);
    const Binding binding(static_cast<int>(ranks));
    Plan plan;
    Seconds least;
    for (int run = 0; run < 5; ++run) {
      const Seconds one = Measure([&] {
        plan = Must(PlanForRank(static_cast<int>(ranks / 2 - 1), source, target,
                                pairs, binding, binding));
      });
      if (run == 0 || one.wall < least.wall) least = one;
    }
    operations[at++] = plan.cost.operations;
    absl::PrintF(
        "7b. PlanForRank of one rank, %d ranks x %d tensors: %.2f ms (CPU "
        "%.2f), %.1f MiB with the catalogs, %d operations, %d moves\n",
        ranks, tensors, 1e3 * least.wall, 1e3 * least.cpu,
        PeakMiB() - start_mib, plan.cost.operations, plan.cost.moves);
  }
  Verdict("operations at 1,024 and 16,384 ranks",
          operations[0] == operations[1]);
}

// Row 8, first half.
void RandomPairs(int64_t count) {
  int64_t pairs = 0;
  int64_t moved = 0;
  int64_t bound = 0;
  int64_t wrong = 0;
  const Seconds seconds = Measure([&] {
    for (uint64_t seed = 1; pairs < count; ++seed) {
      test::PlanCaseOptions options;
      options.simple = true;
      options.any = false;
      const test::PlanCase plan_case = test::RandomPlanCase(seed, options);
      const test::PlanInputs inputs = Must(test::BuildPlanCase(plan_case));
      int64_t sent = 0;
      for (int rank = 0; rank < plan_case.world_size; ++rank) {
        sent += Must(PlanForRank(rank, inputs.source, inputs.target,
                                 MatchByName(inputs.source, inputs.target),
                                 inputs.source_binding, inputs.target_binding))
                    .cost.bytes_sent;
      }
      int64_t least = 0;
      for (const test::TensorCase& tensor : plan_case.tensors) {
        for (const auto& element :
             test::MapElements(plan_case, tensor).elements) {
          least += element.wire_bytes;
        }
      }
      pairs += static_cast<int64_t>(plan_case.tensors.size());
      moved += sent;
      bound += least;
      wrong += sent != least;
    }
  });
  absl::PrintF(
      "8. %d random pairs of layouts: %d bytes moved, lower bound %d (%.1f s "
      "with the element maps)\n",
      pairs, moved, bound, seconds.wall);
  Verdict("bytes and lower bound in each case", wrong == 0 && moved == bound);
}

// Row 8, second half: the busiest rank against what some rank must at least
// receive (what it needs and does not have) or send (`least_sent`: what others
// need and only it has, once).
void BusiestRank(const char* name, int ranks, const Layout& source,
                 const Layout& target, int64_t least_sent) {
  Catalog from;
  Catalog to;
  if (!from.Add({"w", DType::kFloat32, source}).ok() ||
      !to.Add({"w", DType::kFloat32, target}).ok()) {
    std::exit(1);
  }
  const Binding binding(ranks);
  int64_t busiest = 0;
  int64_t bound = least_sent;
  for (int rank = 0; rank < ranks; ++rank) {
    const PlanCost cost =
        Must(PlanForRank(rank, from, to, MatchByName(from, to), binding,
                         binding))
            .cost;
    busiest = std::max({busiest, cost.bytes_sent, cost.bytes_received});
    bound = std::max(bound, cost.bytes_received);
  }
  absl::PrintF("   %-36s busiest rank %8.2f MiB, bound %8.2f MiB, ratio %.2f\n",
               name, static_cast<double>(busiest) / (1 << 20),
               static_cast<double>(bound) / (1 << 20),
               static_cast<double>(busiest) / static_cast<double>(bound));
}

void BusiestRanks(int64_t times) {
  const Dims shape = {1024, 4096 * times};
  const int64_t bytes = 4 * shape[0] * shape[1];
  const auto on = [&](int64_t ranks, Placement placement) {
    return OnMesh(shape, {ranks}, {placement});
  };
  BusiestRank("rows on 4 ranks to rows on 2", 4, on(4, Shard(0)),
              on(2, Shard(0)), bytes / 4);
  BusiestRank("rows on 2 ranks to rows on 4", 4, on(2, Shard(0)),
              on(4, Shard(0)), bytes / 2);
  BusiestRank("rows to columns on 4 ranks", 4, on(4, Shard(0)), on(4, Shard(1)),
              bytes / 16 * 3);
  BusiestRank("rows on 8 ranks to all on 8", 8, on(8, Shard(0)),
              on(8, Replicate()), bytes / 8);
  BusiestRank("all on 4 ranks to rows on 8", 8, on(4, Replicate()),
              on(8, Shard(0)), bytes / 8);
  BusiestRank("one source to 64", 65, Layout::Replicated(shape, {64}),
              on(64, Replicate()), bytes);
}

int Run(const std::string& peer, bool quick) {
  const int tensors = quick ? 64 : 1024;
  for (const int times : {1, 4}) PlanOneRank(tensors * times);
  for (const int times : {1, 4}) {
    PlanAndValidate(peer, tensors * times, quick ? 128 : 1024,
                    /*with_peer=*/times == 1 || quick);
  }
  for (const int times : {1, 4}) RandomPairs((quick ? 500 : 10000) * times);
  for (const int times : {1, 4}) BusiestRanks(times);
  return same ? 0 : 1;
}

}  // namespace
}  // namespace dsd

int main(int argc, char** argv) {
  dsd::CommandLine line("Planning beside PyTorch");
  CLI11_PARSE(line.app, argc, argv);
  return dsd::Run(line.peer(), line.quick);
}
