// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/plan/plan.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "dsd/core/layout/layout.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

Catalog One(Layout layout, DType dtype = DType::kFloat32,
            const std::string& name = "w") {
  Catalog catalog;
  EXPECT_TRUE(catalog.Add({name, dtype, std::move(layout)}).ok());
  return catalog;
}

Layout OnMesh(Dims shape, Dims mesh, std::vector<Placement> placements) {
  auto layout = Layout::FromPlacements(
      std::move(shape), DeviceMesh::Iota(std::move(mesh)), placements);
  EXPECT_TRUE(layout.ok()) << layout.status();
  return *std::move(layout);
}

std::vector<Plan> PlanAll(const Catalog& source, const Catalog& target,
                          const Binding& binding) {
  std::vector<Plan> plans;
  for (int rank = 0; rank < binding.world_size(); ++rank) {
    auto plan = PlanForRank(rank, source, target, MatchByName(source, target),
                            binding, binding);
    EXPECT_TRUE(plan.ok()) << plan.status();
    plans.push_back(*std::move(plan));
  }
  return plans;
}

std::vector<Plan> PlanAll(const Catalog& source, const Catalog& target,
                          int world_size) {
  return PlanAll(source, target, Binding(world_size));
}

// [from][to], in bytes; within a rank on the diagonal.
std::vector<std::vector<int64_t>> Traffic(const std::vector<Plan>& plans) {
  std::vector<std::vector<int64_t>> bytes(
      plans.size(), std::vector<int64_t>(plans.size(), 0));
  for (const Plan& plan : plans) {
    for (const Move& move : plan.moves) {
      if (move.provider != plan.rank) continue;
      if (move.provider_keeps) bytes[plan.rank][plan.rank] += move.wire_bytes();
      for (int reader : move.readers) {
        bytes[plan.rank][reader] += move.wire_bytes();
      }
    }
  }
  return bytes;
}

TEST(PlanTest, SameLayoutMovesNothing) {
  const Catalog catalog = One(OnMesh({8, 4}, {2, 2}, {Replicate(), Shard(0)}));
  for (const Plan& plan : PlanAll(catalog, catalog, 4)) {
    ASSERT_EQ(plan.moves.size(), 1);
    EXPECT_TRUE(plan.moves[0].provider_keeps);
    EXPECT_TRUE(plan.moves[0].readers.empty());
    EXPECT_EQ(plan.cost.bytes_sent, 0);
    EXPECT_EQ(plan.cost.bytes_received, 0);
    EXPECT_EQ(plan.cost.bytes_local, 4 * 4 * 4);
  }
}

TEST(PlanTest, SmallBroadcastIsOneMove) {
  for (int64_t rows : {4, 8000}) {
    const auto plans =
        PlanAll(One(Layout::Replicated({rows, 2}, {0})),
                One(Layout::Replicated({rows, 2}, {0, 1, 2, 3})), 4);
    ASSERT_EQ(plans[0].moves.size(), 1);
    EXPECT_TRUE(plans[0].moves[0].provider_keeps);
    EXPECT_EQ(plans[0].moves[0].readers,
              (absl::InlinedVector<int, 2>{1, 2, 3}));
    for (int rank = 1; rank < 4; ++rank) {
      ASSERT_EQ(plans[rank].moves.size(), 1);
      EXPECT_EQ(plans[rank].moves[0].provider, 0);
    }
  }
}

// The busiest rank's max(in, out), in bytes.
int64_t Busiest(const std::vector<Plan>& plans) {
  int64_t busiest = 0;
  for (const Plan& plan : plans) {
    busiest =
        std::max({busiest, plan.cost.bytes_sent, plan.cost.bytes_received});
  }
  return busiest;
}

TEST(PlanTest, LargeBroadcastIsRelayed) {
  // Nobody sends or receives much more than the whole, which each must receive.
  for (const int ranks : {3, 4, 64}) {
    std::vector<Holder> all;
    for (Holder h = 0; h < ranks; ++h) all.push_back(h);
    for (const int64_t elements : {int64_t{1} << 18, int64_t{5} << 20}) {
      const auto plans =
          PlanAll(One(Layout::Replicated({elements}, {0})),
                  One(Layout::Replicated({elements}, all)), ranks);
      const int64_t bytes = elements * 4;
      EXPECT_LE(Busiest(plans), bytes + bytes / 50) << ranks << " " << elements;
      for (int rank = 1; rank < ranks; ++rank) {
        EXPECT_EQ(plans[rank].cost.bytes_received, bytes);
      }
      for (const Move& move : plans[0].moves) EXPECT_FALSE(move.relayed);
    }
  }
  // Two that have it and five that need it.
  const auto two =
      PlanAll(One(Layout::Replicated({1 << 20}, {0, 1})),
              One(Layout::Replicated({1 << 20}, {2, 3, 4, 5, 6})), 7);
  EXPECT_LE(Busiest(two), (4 << 20) + (4 << 20) / 50);
}

TEST(PlanTest, WhatIsConvertedOnArrivalIsNotRelayed) {
  const Catalog source = One(Layout::Replicated({1 << 20}, {0}));
  const Catalog target =
      One(Layout::Replicated({1 << 20}, {1, 2, 3}), DType::kFloat64);
  for (const Plan& plan : PlanAll(source, target, 4)) {
    for (const Move& move : plan.moves) EXPECT_FALSE(move.relayed);
  }
}

TEST(PlanTest, LargeCellsAreDividedAmongReplicas) {
  // 4 replicas of 1 MiB go to 4 new ranks: each provides a quarter, once.
  const auto plans =
      PlanAll(One(Layout::Replicated({256, 1024}, {0, 1, 2, 3})),
              One(Layout::Replicated({256, 1024}, {4, 5, 6, 7})), 8);
  for (int rank = 0; rank < 4; ++rank) {
    ASSERT_EQ(plans[rank].moves.size(), 1);
    EXPECT_EQ(plans[rank].moves[0].wire_bytes(), 256 << 10);
    EXPECT_EQ(plans[rank].moves[0].readers.size(), 4);
  }
  // 160 KiB make three parts, not eight.
  const auto few =
      PlanAll(One(Layout::Replicated({40, 1024}, {0, 1, 2, 3, 4, 5, 6, 7})),
              One(Layout::Replicated({40, 1024}, {8})), 9);
  EXPECT_EQ(few[8].moves.size(), 3);
}

TEST(PlanTest, LargeCellsOfTheSameReplicasHaveTheirOwnReaders) {
  const Box upper{{0, 0}, {128, 1024}};
  const Box lower{{128, 0}, {256, 1024}};
  const auto target =
      Layout::FromBoxes({256, 1024}, {{2, upper}, {3, lower}, {4, lower}});
  ASSERT_TRUE(target.ok()) << target.status();
  const auto bytes = Traffic(
      PlanAll(One(Layout::Replicated({256, 1024}, {0, 1})), One(*target), 5));
  for (int from : {0, 1}) {
    for (int to : {2, 3, 4}) EXPECT_EQ(bytes[from][to], 256 << 10);
  }
}

TEST(PlanTest, SmallCellsRotate) {
  // 256 small tensors on 4 replicas, for 2 new ranks: everybody provides some.
  Catalog source;
  Catalog target;
  for (int i = 0; i < 256; ++i) {
    const std::string name = "t" + std::to_string(i);
    ASSERT_TRUE(source
                    .Add({name, DType::kFloat32,
                          Layout::Replicated({16}, {0, 1, 2, 3})})
                    .ok());
    ASSERT_TRUE(
        target.Add({name, DType::kFloat32, Layout::Replicated({16}, {4, 5})})
            .ok());
  }
  const auto bytes = Traffic(PlanAll(source, target, 6));
  for (int from = 0; from < 4; ++from) {
    for (int to = 4; to < 6; ++to) {
      EXPECT_GT(bytes[from][to], 256 * 64 / 4 / 2);
      EXPECT_LT(bytes[from][to], 256 * 64 / 4 * 2);
    }
  }
  // The two readers of one tensor ask different ranks.
  const auto one = PlanAll(One(Layout::Replicated({16}, {0, 1, 2, 3})),
                           One(Layout::Replicated({16}, {4, 5})), 6);
  EXPECT_NE(one[4].moves[0].provider, one[5].moves[0].provider);
}

TEST(PlanTest, TheOwnHostProvides) {
  // Ranks 0-3 on one host, 4-7 on another; 0, 1 and 5 have it.
  absl::flat_hash_map<Holder, int> rank_of;
  for (int rank = 0; rank < 8; ++rank) rank_of[rank] = rank;
  const auto binding = Binding::Create(8, rank_of, {0, 0, 0, 0, 1, 1, 1, 1});
  ASSERT_TRUE(binding.ok()) << binding.status();
  for (int64_t rows : {4, 100000}) {
    const auto bytes = Traffic(
        PlanAll(One(Layout::Replicated({rows, 2}, {0, 1, 5})),
                One(Layout::Replicated({rows, 2}, {0, 1, 2, 3, 4, 5, 6, 7})),
                *binding));
    for (int to : {2, 3, 4, 6, 7}) {
      int64_t near = 0;
      for (int from = 0; from < 8; ++from) {
        if (from / 4 == to / 4) {
          near += bytes[from][to];
        } else {
          EXPECT_EQ(bytes[from][to], 0);
        }
      }
      EXPECT_EQ(near, rows * 8);
    }
    // Two have it and two need it; one has it and three need it.
    for (int to : {2, 3}) EXPECT_EQ(bytes[5 - to][to], 0);
    EXPECT_EQ(bytes[4][6] + bytes[4][7] > 0, rows > 4);
  }
}

TEST(PlanTest, ALargeCellReachesEachHostOnce) {
  constexpr int kRanks = 12;  // on three hosts
  absl::flat_hash_map<Holder, int> rank_of;
  std::vector<Holder> all;
  std::vector<int> host_of;
  for (int rank = 0; rank < kRanks; ++rank) {
    rank_of[rank] = rank;
    all.push_back(rank);
    host_of.push_back(rank / 4);
  }
  const auto binding = Binding::Create(kRanks, rank_of, host_of);
  ASSERT_TRUE(binding.ok()) << binding.status();
  constexpr int64_t kElements = 1 << 20;
  constexpr int64_t kBytes = 4 * kElements;
  for (const std::vector<Holder>& have :
       std::vector<std::vector<Holder>>{{0}, {0, 5}, {4, 5, 6}}) {
    const auto plans =
        PlanAll(One(Layout::Replicated({kElements}, have)),
                One(Layout::Replicated({kElements}, all)), *binding);
    const auto bytes = Traffic(plans);
    for (int host = 0; host < 3; ++host) {
      int64_t from_others = 0;
      for (int from = 0; from < kRanks; ++from) {
        if (from / 4 == host) continue;
        for (int to = 4 * host; to < 4 * host + 4; ++to) {
          from_others += bytes[from][to];
        }
      }
      const bool has_it = std::any_of(have.begin(), have.end(),
                                      [&](Holder h) { return h / 4 == host; });
      EXPECT_EQ(from_others, has_it ? 0 : kBytes) << "host " << host;
    }
    // Once to each host at most.
    EXPECT_LE(Busiest(plans), 3 * kBytes + kBytes / 50);
    for (int rank = 0; rank < kRanks; ++rank) {
      const bool has_it = std::count(have.begin(), have.end(), rank) > 0;
      EXPECT_EQ(plans[rank].cost.bytes_received, has_it ? 0 : kBytes);
    }
  }
}

TEST(PlanTest, StorageIsReadOnceAndRelayed) {
  // 1 MiB on storage, needed by 4 ranks: each reads a quarter and sends it on.
  const auto plans =
      PlanAll(One(Layout::Anywhere({256, 1024})),
              One(Layout::Replicated({256, 1024}, {0, 1, 2, 3})), 4);
  for (int rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(plans[rank].cost.bytes_local, 256 << 10);
    EXPECT_EQ(plans[rank].cost.bytes_sent, 3 * (256 << 10));
    EXPECT_EQ(plans[rank].cost.bytes_received, 3 * (256 << 10));
  }
}

TEST(PlanTest, ReplicasShareTheWriting) {
  const auto plans =
      PlanAll(One(OnMesh({256, 1024}, {2, 2}, {Replicate(), Shard(0)})),
              One(Layout::Anywhere({256, 1024})), 4);
  for (int rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(plans[rank].cost.bytes_local, 256 << 10);
    EXPECT_EQ(plans[rank].cost.bytes_sent, 0);
  }
}

TEST(PlanTest, StorageToStorageIsSharedByAll) {
  const auto plans = PlanAll(One(Layout::Anywhere({256, 1024})),
                             One(Layout::Anywhere({256, 1024})), 4);
  for (int rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(plans[rank].cost.bytes_local, 256 << 10);
    EXPECT_EQ(plans[rank].cost.bytes_sent, 0);
  }
}

TEST(PlanTest, FlatIntervalsMeetInFewBoxes) {
  // Two flat layouts over a tall tensor: one lowered piece per joint interval.
  const auto from =
      Layout::FromFlatIntervals({1000, 10}, {{0, 0, 5000}, {1, 5000, 10000}});
  const auto to =
      Layout::FromFlatIntervals({1000, 10}, {{0, 0, 2500}, {1, 2500, 10000}});
  ASSERT_TRUE(from.ok() && to.ok());
  const auto plans = PlanAll(One(*from), One(*to), 2);
  ASSERT_EQ(plans[0].moves.size(), 2);
  EXPECT_EQ(plans[0].moves[1].box, (Box{{250, 0}, {500, 10}}));
  EXPECT_EQ(plans[1].moves.size(), 2);
}

TEST(PlanTest, WireHasTheSmallerItem) {
  const Layout left = Layout::Replicated({4}, {0});
  const Layout right = Layout::Replicated({4}, {1});
  const auto wire = [&](Layout from, DType source, DType target) {
    return PlanAll(One(std::move(from), source), One(right, target), 2)[1]
        .moves[0]
        .wire_dtype;
  };
  EXPECT_EQ(wire(left, DType::kFloat32, DType::kBFloat16), DType::kBFloat16);
  EXPECT_EQ(wire(left, DType::kBFloat16, DType::kFloat32), DType::kBFloat16);
  EXPECT_EQ(wire(left, DType::kFloat16, DType::kBFloat16), DType::kFloat16);
  EXPECT_EQ(wire(Layout::Anywhere({4}), DType::kBFloat16, DType::kFloat32),
            DType::kFloat32);
}

TEST(PlanTest, MatchesNamesInTargetOrder) {
  Catalog source;
  Catalog target;
  const Layout layout = Layout::Replicated({4}, {0});
  for (const char* name : {"a", "b", "c"}) {
    ASSERT_TRUE(source.Add({name, DType::kFloat32, layout}).ok());
  }
  for (const char* name : {"c", "x", "a"}) {
    ASSERT_TRUE(target.Add({name, DType::kFloat32, layout}).ok());
  }
  EXPECT_EQ(MatchByName(source, target), (TensorPairs{{2, 0}, {0, 2}}));

  // Moves follow the target's order, whatever the pairs'.
  const auto plan = PlanForRank(0, source, target, {{0, 2}, {1, 1}, {2, 0}},
                                Binding(1), Binding(1));
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->moves.size(), 3);
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(plan->moves[i].target_tensor, i);
}

TEST(PlanTest, RefusesBadInput) {
  const Catalog rows = One(Layout::Replicated({4, 2}, {0}));
  const Catalog columns = One(Layout::Replicated({2, 4}, {0}));
  const auto plan = [](int rank, const Catalog& source, const Catalog& target,
                       const TensorPairs& pairs, const Binding& from,
                       const Binding& to) {
    return PlanForRank(rank, source, target, pairs, from, to).status();
  };
  const absl::Status shapes =
      plan(0, rows, columns, {{0, 0}}, Binding(1), Binding(1));
  EXPECT_EQ(shapes.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(shapes.message(),
            "plan: source tensor \"w\" has shape [4, 2], target tensor \"w\" "
            "has [2, 4]; they must be equal");
  for (const absl::Status& bad :
       {plan(1, rows, rows, {{0, 0}}, Binding(1), Binding(1)),
        plan(-1, rows, rows, {{0, 0}}, Binding(1), Binding(1)),
        plan(0, rows, rows, {{0, 1}}, Binding(1), Binding(1)),
        plan(0, rows, rows, {{1, 0}}, Binding(1), Binding(1)),
        plan(0, rows, rows, {{0, 0}}, Binding(1), Binding(2)),
        plan(0, rows, rows, {{0, 0}}, Binding(2),
             *Binding::Create(2, {{0, 0}, {1, 1}}, {0, 1}))}) {
    EXPECT_EQ(bad.code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(PlanTest, NamesWhatIsMissing) {
  const auto half = Layout::FromBoxes({4, 6}, {{0, {{0, 0}, {4, 3}}}});
  ASSERT_TRUE(half.ok());
  const Catalog source = One(*half);
  const auto status = [&](int rank, const Layout& target) {
    return PlanForRank(rank, source, One(target), {{0, 0}}, Binding(3),
                       Binding(3))
        .status();
  };
  const Layout on_two = Layout::Replicated({4, 6}, {2});
  const absl::Status missing = status(2, on_two);
  EXPECT_EQ(missing.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(missing.message(),
            "plan: box [0:4, 3:6] of tensor \"w\" of shape [4, 6] is needed by "
            "holder 2 on rank 2, but no rank has it in the source");
  // Ranks that need nothing of it plan on; the executor's agreement tells them.
  EXPECT_TRUE(status(0, on_two).ok());
  // What somebody must take, nobody can see alone: everybody reports it.
  EXPECT_EQ(status(1, Layout::Anywhere({4, 6})).code(),
            absl::StatusCode::kFailedPrecondition);
  // A holder that is on no rank is none.
  const Catalog elsewhere = One(Layout::Replicated({4, 6}, {7}));
  for (const Layout& target : {on_two, Layout::Anywhere({4, 6})}) {
    EXPECT_EQ(
        PlanForRank(2, elsewhere, One(target), {{0, 0}}, Binding(3), Binding(3))
            .status()
            .code(),
        absl::StatusCode::kFailedPrecondition);
  }
}

TEST(PlanTest, EmptyAndScalarTensors) {
  const auto empty = PlanAll(One(OnMesh({0, 3}, {2}, {Shard(0)})),
                             One(Layout::Replicated({0, 3}, {1})), 2);
  EXPECT_TRUE(empty[0].moves.empty());
  EXPECT_TRUE(empty[1].moves.empty());
  const auto scalar = PlanAll(One(Layout::Replicated({}, {0})),
                              One(Layout::Replicated({}, {1})), 2);
  ASSERT_EQ(scalar[1].moves.size(), 1);
  EXPECT_EQ(scalar[1].cost.bytes_received, 4);
}

// The busiest rank's bytes in or out, over those of an even spread.
double Imbalance(const std::vector<Plan>& plans, int64_t even) {
  int64_t busiest = 0;
  for (const Plan& plan : plans) {
    busiest =
        std::max({busiest, plan.cost.bytes_sent, plan.cost.bytes_received});
  }
  return static_cast<double>(busiest) / even;
}

TEST(PlanTest, LargeMovesLoadAllRanksAlike) {
  // Sizes that do not divide evenly. 5 replicas to one new rank: it is the
  // bottleneck, and each provider sends a fifth.
  const Layout five = Layout::Replicated({7, 1 << 20}, {0, 1, 2, 3, 4});
  const auto to_one =
      PlanAll(One(five), One(Layout::Replicated({7, 1 << 20}, {5})), 6);
  const int64_t bytes = int64_t{7} * 4 << 20;
  EXPECT_LE(Imbalance({to_one.begin(), to_one.begin() + 5}, bytes / 5), 1.01);
  EXPECT_EQ(to_one[5].cost.bytes_received, bytes);
  // 5 replicas to 5 others: everybody sends and receives the same.
  const auto to_five = PlanAll(
      One(five), One(Layout::Replicated({7, 1 << 20}, {5, 6, 7, 8, 9})), 10);
  EXPECT_LE(Imbalance(to_five, bytes), 1.01);
  // Rows to columns.
  const auto transposed =
      PlanAll(One(OnMesh({4096, 4096}, {8}, {Shard(0)})),
              One(OnMesh({4096, 4096}, {8}, {Shard(1)})), 8);
  EXPECT_LE(Imbalance(transposed, (int64_t{64} << 20) / 8 * 7 / 8), 1.0001);
}

// Counts of planning `rank` with `scale` times the ranks, and so many more rows
// that what each rank owns stays the same.
using Scaled = std::function<std::pair<Layout, Layout>(int64_t ranks)>;

void ExpectNoGrowth(const std::string& what, const Scaled& layouts,
                    int hosts_of = 0) {
  SCOPED_TRACE(what);
  constexpr int kRanks = 64;
  int64_t first = 0;
  for (int scale : {1, 16}) {
    const int ranks = scale * kRanks;
    absl::flat_hash_map<Holder, int> rank_of;
    std::vector<int> host_of;
    for (int rank = 0; rank < ranks; ++rank) {
      rank_of[rank] = rank;
      if (hosts_of > 0) host_of.push_back(rank / hosts_of);
    }
    const auto binding = Binding::Create(ranks, rank_of, host_of);
    ASSERT_TRUE(binding.ok()) << binding.status();
    const auto [from, to] = layouts(ranks);
    const auto plan = PlanForRank(ranks / 2 - 4, One(from), One(to), {{0, 0}},
                                  *binding, *binding);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_FALSE(plan->moves.empty());
    EXPECT_LT(plan->cost.operations, 1000);
    if (scale == 1) {
      first = plan->cost.operations;
    } else {
      EXPECT_EQ(plan->cost.operations, first);
    }
  }
}

TEST(PlanOperationsTest, DoNotGrowWithTheWorldAtEqualOverlap) {
  ExpectNoGrowth("fsdp, same", [](int64_t n) {
    const Layout shards = OnMesh({8 * n, 4}, {n}, {Shard(0)});
    return std::make_pair(shards, shards);
  });
  ExpectNoGrowth("elastic restart on half of the ranks", [](int64_t n) {
    return std::make_pair(OnMesh({8 * n, 4}, {n}, {Shard(0)}),
                          OnMesh({8 * n, 4}, {n / 2}, {Shard(0)}));
  });
  ExpectNoGrowth("replicated everywhere", [](int64_t n) {
    return std::make_pair(
        OnMesh({1024, 64}, {n}, {Replicate()}),
        OnMesh({1024, 64}, {n / 4, 4}, {Replicate(), Replicate()}));
  });
  ExpectNoGrowth("full dict everywhere to shards", [](int64_t n) {
    return std::make_pair(OnMesh({8 * n, 1024}, {n}, {Replicate()}),
                          OnMesh({8 * n, 1024}, {n}, {Shard(0)}));
  });
  ExpectNoGrowth("hsdp, same", [](int64_t n) {
    const Layout shards =
        OnMesh({4096, 64}, {n / 8, 8}, {Replicate(), Shard(0)});
    return std::make_pair(shards, shards);
  });
  ExpectNoGrowth(
      "hsdp, same, hosts of 8",
      [](int64_t n) {
        const Layout shards =
            OnMesh({4096, 64}, {n / 8, 8}, {Replicate(), Shard(0)});
        return std::make_pair(shards, shards);
      },
      8);
  ExpectNoGrowth("fsdp over tp to tp over fsdp", [](int64_t n) {
    return std::make_pair(
        OnMesh({8 * n, 16}, {n / 4, 4}, {StridedShard(0, 4), Shard(0)}),
        OnMesh({8 * n, 16}, {n / 4, 4}, {Shard(0), Shard(1)}));
  });
  ExpectNoGrowth("flat to flat", [](int64_t n) {
    std::vector<FlatInterval> even;
    std::vector<FlatInterval> shifted;
    for (int64_t i = 0; i < n; ++i) {
      even.push_back({i, 100 * i, 100 * i + 100});
      shifted.push_back({i, std::max<int64_t>(0, 100 * i - 37),
                         i + 1 == n ? 100 * n : 100 * i + 63});
    }
    return std::make_pair(*Layout::FromFlatIntervals({10 * n, 10}, even),
                          *Layout::FromFlatIntervals({10 * n, 10}, shifted));
  });
  ExpectNoGrowth("flat to rows", [](int64_t n) {
    std::vector<FlatInterval> shifted;
    for (int64_t i = 0; i < n; ++i) {
      shifted.push_back({i, std::max<int64_t>(0, 100 * i - 37),
                         i + 1 == n ? 100 * n : 100 * i + 63});
    }
    return std::make_pair(*Layout::FromFlatIntervals({10 * n, 10}, shifted),
                          OnMesh({10 * n, 10}, {n}, {Shard(0)}));
  });
  ExpectNoGrowth("ragged boxes to rows", [](int64_t n) {
    std::vector<HolderBox> boxes;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t cut = 3 + i % 4;  // each band of 10 rows in two
      boxes.push_back({i, {{10 * i, 0}, {10 * i + 10, cut}}});
      boxes.push_back({(i + 1) % n, {{10 * i, cut}, {10 * i + 10, 8}}});
    }
    return std::make_pair(*Layout::FromBoxes({10 * n, 8}, boxes),
                          OnMesh({10 * n, 8}, {n}, {Shard(0)}));
  });
  ExpectNoGrowth("save of shards", [](int64_t n) {
    return std::make_pair(OnMesh({8 * n, 4}, {n}, {Shard(0)}),
                          Layout::Anywhere({8 * n, 4}));
  });
  ExpectNoGrowth("load of shards", [](int64_t n) {
    return std::make_pair(Layout::Anywhere({8 * n, 4}),
                          OnMesh({8 * n, 4}, {n}, {Shard(0)}));
  });
}

TEST(ExplainTest, IsATableAndAList) {
  const Catalog source = One(OnMesh({4, 8}, {2}, {Shard(0)}));
  const Catalog target = One(OnMesh({4, 8}, {2}, {Shard(1)}));
  EXPECT_EQ(
      Explain(source, target, PlanAll(source, target, 2)),
      R"(plan of 2 ranks for 1 tensor: 4 moves, 64 B between ranks, 64 B within ranks

   from      to  copies       bytes
      0   local       1        32 B
      0       1       1        32 B
      1       0       1        32 B
      1   local       1        32 B

busiest: rank 0, 32 B in, 32 B out

moves:
  w[0:2, 0:4] rank 0 local (32 B)
  w[0:2, 4:8] rank 0 -> 1 (32 B)
  w[2:4, 0:4] rank 1 -> 0 (32 B)
  w[2:4, 4:8] rank 1 local (32 B)
)");
}

TEST(ExplainTest, OnePlanTellsItsPart) {
  const Catalog source = One(OnMesh({4, 8}, {2}, {Shard(0)}));
  const Catalog target = One(OnMesh({4, 8}, {2}, {Shard(1)}));
  const std::string text =
      Explain(source, target, {PlanAll(source, target, 2)[1]});
  EXPECT_NE(text.find("3 moves, 64 B between ranks, 32 B within"),
            std::string::npos)
      << text;
}

TEST(ExplainTest, LongListsAreCut) {
  const Catalog source = One(Layout::Replicated({1 << 12}, {0}));
  std::vector<Holder> all;
  for (Holder h = 0; h < 20; ++h) all.push_back(h);
  const Catalog target = One(Layout::Replicated({1 << 12}, all));
  const std::string text =
      Explain(source, target, PlanAll(source, target, 20), 2);
  EXPECT_NE(text.find("the 2 largest of 20 pairs of ranks"), std::string::npos)
      << text;
  EXPECT_NE(text.find("rank 0 -> itself, 1, 2, 3, 4, 5, 6, 7, 8 and 11 more "
                      "(16.0 KiB each)"),
            std::string::npos)
      << text;
  EXPECT_EQ(Explain({}, {}, {}),
            "plan of 0 ranks for 0 tensors: 0 moves, 0 B between ranks, 0 B "
            "within ranks\n");
}

}  // namespace
}  // namespace dsd
