// SPDX-License-Identifier: Apache-2.0
//
// How long planning takes for one rank of a large world, and for the chunks of
// a large checkpoint. Items are tensors.

#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "benchmark/benchmark.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/plan/plan.h"

namespace dsd {
namespace {

constexpr int kTensors = 1024;
constexpr int64_t kColumns = 64;

// The same layout for each of kTensors tensors.
Catalog Repeat(const Layout& layout) {
  Catalog catalog;
  for (int i = 0; i < kTensors; ++i) {
    const absl::Status added = catalog.Add(
        {"layers." + std::to_string(i) + ".weight", DType::kFloat32, layout});
    if (!added.ok()) std::abort();
  }
  return catalog;
}

Layout OnMesh(Dims shape, Dims mesh, std::vector<Placement> placements) {
  return Layout::FromPlacements(std::move(shape),
                                DeviceMesh::Iota(std::move(mesh)), placements)
      .value();
}

// Each of `chunks` bands of rows on the holder of its number, or on kAnyHolder.
Layout Bands(int64_t chunks, bool any) {
  std::vector<HolderBox> boxes;
  boxes.reserve(chunks);
  for (int64_t i = 0; i < chunks; ++i) {
    boxes.push_back(
        {any ? kAnyHolder : i, {{4 * i, 0}, {4 * i + 4, kColumns}}});
  }
  return Layout::FromBoxes({4 * chunks, kColumns}, std::move(boxes)).value();
}

void PlanOneRank(benchmark::State& state, const Catalog& source,
                 const Catalog& target, int world_size) {
  const Binding binding(world_size);
  const TensorPairs pairs = MatchByName(source, target);
  PlanCost cost;
  for (auto _ : state) {
    auto plan = PlanForRank(world_size / 2 - 1, source, target, pairs, binding,
                            binding);
    if (!plan.ok() || plan->moves.empty()) {
      state.SkipWithError("no plan");
      return;
    }
    cost = plan->cost;
  }
  state.SetItemsProcessed(state.iterations() * kTensors);
  state.counters["operations"] = cost.operations;
  state.counters["moves"] = cost.moves;
}

void BM_SameShards(benchmark::State& state) {
  const int64_t ranks = state.range(0);
  const Catalog shards =
      Repeat(OnMesh({4 * ranks, kColumns}, {ranks}, {Shard(0)}));
  PlanOneRank(state, shards, shards, ranks);
}
BENCHMARK(BM_SameShards)->Arg(1024)->Arg(16384);

void BM_HalfOfTheRanks(benchmark::State& state) {
  const int64_t ranks = state.range(0);
  PlanOneRank(state, Repeat(OnMesh({4 * ranks, kColumns}, {ranks}, {Shard(0)})),
              Repeat(OnMesh({4 * ranks, kColumns}, {ranks / 2}, {Shard(0)})),
              ranks);
}
BENCHMARK(BM_HalfOfTheRanks)->Arg(1024)->Arg(16384);

void BM_HsdpToFsdpOverTp(benchmark::State& state) {
  const int64_t ranks = state.range(0);
  PlanOneRank(state,
              Repeat(OnMesh({32 * ranks, kColumns}, {ranks / 64, 64},
                            {Replicate(), Shard(0)})),
              Repeat(OnMesh({32 * ranks, kColumns}, {ranks / 8, 8},
                            {StridedShard(0, 8), Shard(0)})),
              ranks);
}
BENCHMARK(BM_HsdpToFsdpOverTp)->Arg(1024)->Arg(16384);

void BM_WholeOnAllRanksToShards(benchmark::State& state) {
  const int64_t ranks = state.range(0);
  PlanOneRank(
      state, Repeat(OnMesh({4 * ranks, kColumns}, {ranks}, {Replicate()})),
      Repeat(OnMesh({4 * ranks, kColumns}, {ranks}, {Shard(0)})), ranks);
}
BENCHMARK(BM_WholeOnAllRanksToShards)->Arg(1024)->Arg(16384);

// The catalogs of a checkpoint of 1,024 x 1,024 chunks, checked for overlaps
// and holes.
void BM_CreateAndValidateChunks(benchmark::State& state) {
  for (auto _ : state) {
    for (int i = 0; i < kTensors; ++i) {
      const Layout layout = Bands(1024, true);
      if (layout.NumUncovered() != 0) state.SkipWithError("holes");
    }
  }
  state.SetItemsProcessed(state.iterations() * kTensors);
}
BENCHMARK(BM_CreateAndValidateChunks)->Unit(benchmark::kMillisecond);

void BM_LoadChunks(benchmark::State& state) {
  const int64_t ranks = state.range(0);
  PlanOneRank(state, Repeat(Bands(1024, true)),
              Repeat(OnMesh({4096, kColumns}, {ranks}, {Shard(0)})), ranks);
}
BENCHMARK(BM_LoadChunks)->Arg(8)->Arg(1024);

// All 1,024 ranks of a reshard of 1,024 tensors, one after the other.
void BM_AllRanks(benchmark::State& state) {
  constexpr int kRanks = 1024;
  const Catalog source = Repeat(Bands(kRanks, false));
  const Catalog target =
      Repeat(OnMesh({4 * kRanks, kColumns}, {kRanks / 2}, {Shard(0)}));
  const TensorPairs pairs = MatchByName(source, target);
  const Binding binding(kRanks);
  for (auto _ : state) {
    for (int rank = 0; rank < kRanks; ++rank) {
      benchmark::DoNotOptimize(
          PlanForRank(rank, source, target, pairs, binding, binding));
    }
  }
  state.SetItemsProcessed(state.iterations() * kTensors * kRanks);
}
BENCHMARK(BM_AllRanks)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace dsd
