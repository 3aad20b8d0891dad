// SPDX-License-Identifier: Apache-2.0
//
// Large tensors between ranks, beside PyTorch and the bare transport doing the
// same in the same run: a full gather, a state of rank 0 spread to shards, and
// a push from one layout to another. Prints wall seconds, ratios and how much
// memory grew, and fails if results differ.

#include <stdlib.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/Parallel.h"
#include "ATen/ops/arange.h"
#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/plan/plan.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/tensor_endpoint.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/frontends/torch/state_dict.h"
#include "dsd/testing/benchmarks/measure.h"
#include "dsd/testing/benchmarks/raw_tcp.h"
#include "dsd/testing/harness/rank_processes.h"
#include "libdeflate.h"
#include "nlohmann/json.hpp"
#include "torch/nn/module.h"

namespace dsd {
namespace {

using Json = nlohmann::json;

constexpr int kRuns = 3;
constexpr int64_t kColumns = 2048;  // float32; as in transfer_peer.py

// Blocks that are freed stay with the process: the first use of a page costs
// more than any transport. The peer is started with the same.
constexpr const char* kMallocEnvironment[][2] = {
    {"MALLOC_MMAP_THRESHOLD_", "4294967296"},
    {"MALLOC_TRIM_THRESHOLD_", "68719476736"},
};

struct Node : torch::nn::Module {};

// The values of tensor `index`, rows [begin, end) of it.
at::Tensor Rows(int index, int64_t begin, int64_t end) {
  return at::arange(begin * kColumns, end * kColumns, c10::kFloat)
      .remainder_(1021)
      .add_(index)
      .view({end - begin, kColumns});
}

uint32_t CrcOf(const at::Tensor& tensor, uint32_t crc) {
  const at::Tensor whole = tensor.contiguous();
  return libdeflate_crc32(crc, whole.const_data_ptr(), whole.nbytes());
}

absl::StatusOr<Layout> RowsOver(int64_t rows, int ranks) {
  return Layout::FromPlacements({rows, kColumns}, DeviceMesh::Iota({ranks}),
                                {Shard(0)});
}

// This rank's rows of `count` tensors as a model; zeros unless `filled`.
absl::StatusOr<std::shared_ptr<Node>> ShardedModel(int count, int64_t rows,
                                                   int rank, int ranks,
                                                   bool filled) {
  DSD_ASSIGN_OR_RETURN(const Layout layout, RowsOver(rows, ranks));
  auto model = std::make_shared<Node>();
  const int64_t part = rows / ranks;
  for (int i = 0; i < count; ++i) {
    at::Tensor shard = filled ? Rows(i, rank * part, (rank + 1) * part)
                              : at::zeros({part, kColumns});
    DSD_RETURN_IF_ERROR(ShardingTable::Global().Set(shard, layout, rank));
    model->register_parameter(absl::StrCat("p", i), shard);
  }
  return model;
}

struct Work {
  std::string backend;
  int count;
  int64_t rows;
};

absl::StatusOr<Work> ParseWork(absl::string_view argument) {
  const std::vector<std::string> words = absl::StrSplit(argument, ' ');
  Work work;
  if (words.size() != 3 || !absl::SimpleAtoi(words[1], &work.count) ||
      !absl::SimpleAtoi(words[2], &work.rows)) {
    return absl::InvalidArgumentError(argument);
  }
  work.backend = words[0];
  return work;
}

// The least seconds of some runs of `fn` on all ranks at once, and the most
// that memory grew.
template <class Fn>
absl::Status Time(RankContext& rank, Communicator& comm, const char* name,
                  Fn fn) {
  double least = 0;
  double grown = 0;
  for (int run = 0; run < kRuns; ++run) {
    DSD_RETURN_IF_ERROR(comm.Barrier());
    const double before = ResetPeakMiB();
    absl::Status status;
    const Seconds seconds = Measure([&] { status = fn(); });
    DSD_RETURN_IF_ERROR(status);
    if (run == 0)
      rank.Record(absl::StrCat(name, " first"), absl::StrCat(seconds.wall));
    grown = std::max(grown, PeakMiB() - before);
    least = run == 0 ? seconds.wall : std::min(least, seconds.wall);
  }
  rank.Record(name, absl::StrCat(least));
  rank.Record(absl::StrCat(name, " MiB"), absl::StrCat(grown));
  return absl::OkStatus();
}

using Edges = std::vector<std::pair<int, int>>;  // from, to

// What the host can do in warm memory: `bytes` along each edge, all at the same
// time; and a copy of as much as this rank has got in the end, `parts` times
// `bytes`, what came from itself included.
absl::Status TimeBare(RankContext& rank, Communicator& comm, int64_t bytes,
                      const Edges& edges, int parts) {
  const int self = comm.rank();
  std::map<std::pair<int, int>, RawTcp> connections;
  for (const auto& [from, to] : edges) {
    const std::pair<int, int> ends = std::minmax(from, to);
    if (connections.count(ends) != 0) continue;
    DSD_ASSIGN_OR_RETURN(connections[ends],
                         RawTcp::Connect(comm, ends.first, ends.second));
  }
  const std::vector<std::byte> from(bytes, std::byte{1});
  std::vector<std::vector<std::byte>> got(
      parts, std::vector<std::byte>(bytes, std::byte{2}));
  size_t received = 0;
  std::map<std::pair<int, int>, RawTcp::Stream> streams;
  for (const auto& edge : edges) {
    if (edge.first != self && edge.second != self) continue;
    const std::pair<int, int> ends = std::minmax(edge.first, edge.second);
    RawTcp::Stream& stream = streams[ends];
    stream.connection = &connections[ends];
    if (edge.first == self) {
      stream.send = from;
    } else {
      stream.receive = absl::MakeSpan(got[received++]);
    }
  }
  std::vector<RawTcp::Stream> all;
  for (const auto& [ends, stream] : streams) all.push_back(stream);
  DSD_RETURN_IF_ERROR(
      Time(rank, comm, "tcp", [&] { return RawTcp::Exchange(all); }));
  return Time(rank, comm, "memcpy", [&] {
    for (std::vector<std::byte>& to : got) {
      std::memcpy(to.data(), from.data(), bytes);
    }
    return absl::OkStatus();
  });
}

// Row 5.
DSD_RANK_PROGRAM(Gather) {
  at::set_num_threads(1);
  DSD_ASSIGN_OR_RETURN(const Work work, ParseWork(rank.argument()));
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(work.backend));
  DSD_ASSIGN_OR_RETURN(const auto model,
                       ShardedModel(work.count, work.rows, rank.rank(),
                                    rank.world_size(), /*filled=*/true));
  StateDictOptions options;
  options.full_state_dict = true;
  StateDict dict;
  DSD_RETURN_IF_ERROR(Time(rank, *comm, "gather", [&]() -> absl::Status {
    dict = StateDict();
    DSD_ASSIGN_OR_RETURN(dict, GetModelStateDict(*model, comm.get(), options));
    return absl::OkStatus();
  }));
  uint32_t crc = 0;
  for (size_t i = 0; i < dict.size(); ++i) {
    crc = CrcOf(*dict.value(i).get_if<TensorValue>()->Local(), crc);
  }
  rank.Record("digest", absl::StrCat(crc));
  dict = StateDict();
  DSD_RETURN_IF_ERROR(TimeBare(
      rank, *comm, work.count * work.rows * kColumns * 4 / rank.world_size(),
      {{0, 1}, {1, 0}}, /*parts=*/2));
  return comm->Shutdown();
}

// Row 6.
DSD_RANK_PROGRAM(Spread) {
  at::set_num_threads(1);
  DSD_ASSIGN_OR_RETURN(const Work work, ParseWork(rank.argument()));
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(work.backend));
  DSD_ASSIGN_OR_RETURN(const auto model,
                       ShardedModel(work.count, work.rows, rank.rank(),
                                    rank.world_size(), /*filled=*/false));
  StateDict dict;
  for (int i = 0; rank.rank() == 0 && i < work.count; ++i) {
    dict.Set(absl::StrCat("p", i), Value(TensorValue(Rows(i, 0, work.rows))));
  }
  StateDictOptions options;
  options.full_state_dict = true;
  options.broadcast_from_rank0 = true;
  DSD_RETURN_IF_ERROR(Time(rank, *comm, "spread", [&] {
    return SetModelStateDict(*model, dict, comm.get(), options).status();
  }));
  uint32_t crc = 0;
  for (const at::Tensor& shard : model->parameters()) crc = CrcOf(shard, crc);
  rank.Record("digest", absl::StrCat(crc));
  dict = StateDict();
  DSD_RETURN_IF_ERROR(TimeBare(
      rank, *comm, work.count * work.rows * kColumns * 4 / rank.world_size(),
      {{0, 1}}, /*parts=*/1));
  return comm->Shutdown();
}

// One tensor, sharded by columns: nothing of it is contiguous.
DSD_RANK_PROGRAM(SpreadColumns) {
  at::set_num_threads(1);
  DSD_ASSIGN_OR_RETURN(const Work work, ParseWork(rank.argument()));
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(work.backend));
  DSD_ASSIGN_OR_RETURN(const Layout layout,
                       Layout::FromPlacements(
                           {work.rows, kColumns},
                           DeviceMesh::Iota({rank.world_size()}), {Shard(1)}));
  const int64_t part = kColumns / rank.world_size();
  at::Tensor shard = at::zeros({work.rows, part});
  DSD_RETURN_IF_ERROR(ShardingTable::Global().Set(shard, layout, rank.rank()));
  Node model;
  model.register_parameter("p", shard);
  StateDict dict;
  if (rank.rank() == 0) {
    at::Tensor whole = at::zeros({work.rows, kColumns});
    whole.select(1, 0).copy_(at::arange(work.rows));
    whole.select(1, part).copy_(at::arange(work.rows).add_(0.5));
    dict.Set("p", Value(TensorValue(std::move(whole))));
  }
  StateDictOptions options;
  options.full_state_dict = true;
  options.broadcast_from_rank0 = true;
  DSD_RETURN_IF_ERROR(Time(rank, *comm, "spread", [&] {
    return SetModelStateDict(model, dict, comm.get(), options).status();
  }));
  const bool right = shard.select(1, 0).equal(
      at::arange(work.rows).add(rank.rank() == 0 ? 0.0 : 0.5).to(c10::kFloat));
  return right ? comm->Shutdown() : absl::InternalError("wrong values");
}

// Row 14: from 4 ranks to 2 of them, over and over.
DSD_RANK_PROGRAM(Push) {
  at::set_num_threads(1);
  constexpr int kReceivers = 2;
  DSD_ASSIGN_OR_RETURN(const Work work, ParseWork(rank.argument()));
  DSD_ASSIGN_OR_RETURN(const auto comm, rank.Connect(work.backend));
  const int ranks = rank.world_size();
  const Binding binding(ranks);
  DSD_ASSIGN_OR_RETURN(const Layout from, RowsOver(work.rows, ranks));
  DSD_ASSIGN_OR_RETURN(const Layout to, RowsOver(work.rows, kReceivers));
  TensorEndpoint source(DeviceMesh::Iota({ranks}), rank.rank());
  TensorEndpoint target(DeviceMesh::Iota({kReceivers}), rank.rank());
  const bool receives = rank.rank() < kReceivers;
  std::vector<at::Tensor> received;
  for (int i = 0; i < work.count; ++i) {
    const int64_t part = work.rows / ranks;
    const std::string name = absl::StrCat("p", i);
    DSD_RETURN_IF_ERROR(
        source.Add({name, DType::kFloat32, from}, rank.rank(),
                   {Rows(i, rank.rank() * part, (rank.rank() + 1) * part)}));
    std::vector<at::Tensor> locals;
    if (receives) {
      received.push_back(at::zeros({work.rows / kReceivers, kColumns}));
      locals.push_back(received.back());
    }
    DSD_RETURN_IF_ERROR(target.Add({name, DType::kFloat32, to}, rank.rank(),
                                   std::move(locals)));
  }
  DSD_ASSIGN_OR_RETURN(
      const Plan plan,
      PlanForRank(rank.rank(), source.catalog(), target.catalog(),
                  MatchByName(source.catalog(), target.catalog()), binding,
                  binding));
  const Digest digest = DigestBuilder()
                            .Add(source.catalog().Fingerprint())
                            .Add(target.catalog().Fingerprint())
                            .Finish();
  DSD_RETURN_IF_ERROR(Time(rank, *comm, "push", [&]() -> absl::Status {
    DSD_RETURN_IF_ERROR(Agree(comm.get(), "push", digest, absl::OkStatus(),
                              [] { return std::string(); }));
    return Transfer(plan, source, target, comm.get()).status();
  }));
  for (int i = 0; i < static_cast<int>(received.size()); ++i) {
    const int64_t part = work.rows / kReceivers;
    if (!received[i].equal(
            Rows(i, rank.rank() * part, (rank.rank() + 1) * part))) {
      return absl::InternalError("wrong values");
    }
  }
  rank.Record("sent", absl::StrCat(plan.cost.bytes_sent));
  // As the shards lie, rank 0 keeps its own.
  DSD_RETURN_IF_ERROR(TimeBare(rank, *comm,
                               work.count * work.rows * kColumns * 4 / ranks,
                               {{1, 0}, {2, 1}, {3, 1}},
                               /*parts=*/receives ? 2 : 0));
  return comm->Shutdown();
}

std::vector<RankResult> Run(int ranks, const char* program,
                            const std::string& backend, int count,
                            int64_t rows) {
  RankRunOptions options;
  options.argument = absl::StrCat(backend, " ", count, " ", rows);
  options.timeout = absl::Minutes(8);
  for (const auto& [name, value] : kMallocEnvironment) {
    options.environment.emplace_back(name, value);
  }
  std::vector<RankResult> results = RunRanks(ranks, program, options);
  for (const RankResult& result : results) {
    if (result.end == RankResult::End::kReturned && result.status.ok())
      continue;
    std::cerr << result.status << "\n" << result.output << std::endl;
    std::exit(1);
  }
  return results;
}

// The most of all ranks that say it.
double Most(const std::vector<RankResult>& results, const std::string& name) {
  double most = 0;
  for (const RankResult& result : results) {
    const auto it = result.values.find(name);
    if (it != result.values.end()) most = std::max(most, std::stod(it->second));
  }
  return most;
}

bool same = true;  // whether results are PyTorch's

void Compare(const std::vector<RankResult>& results, const Json& peer) {
  bool equal = true;
  for (size_t i = 0; i < results.size(); ++i) {
    equal &= results[i].values.at("digest") ==
             absl::StrCat(peer["digests"][i].get<uint32_t>());
  }
  same &= equal;
  absl::PrintF("   results: %s\n", equal ? "equal to PyTorch's" : "NOT EQUAL");
}

void PrintBare(const std::vector<RankResult>& results, const char* name) {
  const double seconds = Most(results, name);
  const double tcp = Most(results, "tcp");
  const double memcpy = Most(results, "memcpy");
  absl::PrintF(
      "   what is sent over bare loopback TCP: %.3f s, %.2f of its speed; what "
      "each rank has in the end by memcpy: %.3f s, %.2f of its speed\n",
      tcp, tcp / seconds, memcpy, memcpy / seconds);
  std::fflush(stdout);
}

int Benchmark(const std::string& peer, bool quick, bool large) {
  for (const auto& [name, value] : kMallocEnvironment) {
    setenv(name, value, /*overwrite=*/1);
  }
  const int tensors = quick ? 3 : 24;
  constexpr int64_t kRows = 2048;  // 16 MiB
  {
    const Json other =
        RunPeer(absl::StrCat(peer, " gather ", tensors, " ", kRows));
    for (const char* backend : {"gloo", "ucx"}) {
      const auto results = Run(2, "Gather", backend, tensors, kRows);
      absl::PrintF(
          "5. full gather of %d x 16 MiB, 2 ranks, %s: %.3f s (first %.3f); "
          "PyTorch %.3f s (first %.3f); ratio %.1fx\n",
          tensors, backend, Most(results, "gather"),
          Most(results, "gather first"), other["least"].get<double>(),
          other["first"].get<double>(),
          other["least"].get<double>() / Most(results, "gather"));
      Compare(results, other);
      PrintBare(results, "gather");
    }
  }
  const int spread = quick ? 8 : 64;
  {
    const Json other =
        RunPeer(absl::StrCat(peer, " spread ", spread, " ", kRows));
    for (const char* backend : {"gloo", "ucx"}) {
      const auto results = Run(2, "Spread", backend, spread, kRows);
      absl::PrintF(
          "6. %d x 16 MiB of rank 0 to shards on 2 ranks, %s: %.3f s, memory "
          "grew by %.0f MiB; PyTorch %.3f s, %.0f MiB; ratio %.1fx\n",
          spread, backend, Most(results, "spread"), Most(results, "spread MiB"),
          other["least"].get<double>(), other["grown_mib"].get<double>(),
          other["least"].get<double>() / Most(results, "spread"));
      Compare(results, other);
      PrintBare(results, "spread");
    }
  }
  if (large) {
    for (const int64_t gib : {4, 8}) {
      const auto results =
          Run(2, gib == 4 ? "Spread" : "SpreadColumns", "gloo",
              gib == 4 ? 256 : 1, gib == 4 ? kRows : gib << 17);
      absl::PrintF("6. %d GiB in %s: %.3f s, memory grew by %.0f MiB\n", gib,
                   gib == 4 ? "256 tensors" : "one tensor, sharded by columns",
                   Most(results, "spread"), Most(results, "spread MiB"));
      std::fflush(stdout);
    }
  }
  for (const char* backend : {"gloo", "ucx"}) {
    const int count = quick ? 9 : 72;
    const auto results = Run(4, "Push", backend, count, kRows);
    absl::PrintF(
        "14. push of %d x 16 MiB from 4 ranks to 2 of them, %s: %.3f s, %.0f "
        "MiB sent by the busiest rank\n",
        count, backend, Most(results, "push"),
        Most(results, "sent") / (1 << 20));
    PrintBare(results, "push");
  }
  return same ? 0 : 1;
}

}  // namespace
}  // namespace dsd

int main(int argc, char** argv) {
  const std::string program = dsd::RequestedRankProgram();
  if (!program.empty()) return dsd::RankMain(program);
  dsd::AllowRankProcesses();
  dsd::CommandLine line("Large tensors between ranks beside PyTorch");
  bool large = false;
  line.app.add_flag("--large", large, "4 and 8 GiB too");
  CLI11_PARSE(line.app, argc, argv);
  return dsd::Benchmark(line.peer(), line.quick, large);
}
