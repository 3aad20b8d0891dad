// SPDX-License-Identifier: Apache-2.0
//
// Collective calls, written once over exchange.

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/memory/memory.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/checked_int.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/communicator_internal.h"
#include "dsd/core/comm/reduce.h"

namespace dsd {
namespace {

// Up to here latency counts, and a tree is better than a pipeline.
constexpr int64_t kSmallBroadcastBytes = 256 << 10;
constexpr int64_t kChunkBytes = 4 << 20;
// Below, the many small messages of slices cost more than they save.
constexpr int64_t kSlicedBroadcastBytes = 2 * kChunkBytes;
constexpr int kChunksInFlight = 4;
// What every rank sends of its blob, however short it is, with its length.
constexpr int64_t kFirstBlobBytes = (1 << 10) - sizeof(int64_t);
// All parts of an all-reduce that are not worth a second round.
constexpr int64_t kSmallReduceBytes = 64 << 10;
// What a reduction stages per rank that takes part, all together.
constexpr int64_t kReduceStagingBytes = 4 << 20;

absl::string_view OpName(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return "sum";
    case ReduceOp::kMin:
      return "min";
    case ReduceOp::kMax:
      return "max";
  }
  return "?";
}

void Report(const CallOptions& options, int64_t done, int64_t total) {
  if (options.progress) options.progress({done, total});
}

// Elements per rank of one step of a reduction, so that the staging memory of
// `world_size` parts stays within its bound.
int64_t ReduceStep(int world_size, int64_t item_size) {
  return std::max<int64_t>(1, kReduceStagingBytes / world_size / item_size);
}

// Who passes a broadcast on to whom: from the root to one rank of each other
// host, and from these, and the root, to the others of their hosts; in both
// steps along a binomial tree or a chain. So it reaches each host once.
class BroadcastRoute {
 public:
  BroadcastRoute(absl::Span<const int> host_of_rank, int rank, int root) {
    const int world = static_cast<int>(host_of_rank.size());
    const int num_hosts =
        *std::max_element(host_of_rank.begin(), host_of_rank.end()) + 1;
    hosts_.resize(num_hosts);
    for (int i = 0; i < world; ++i) {
      const int r = (root + i) % world;
      const int host =
          (host_of_rank[r] + num_hosts - host_of_rank[root]) % num_hosts;
      if (r == rank) {
        host_ = host;
        place_ = static_cast<int>(hosts_[host].size());
      }
      hosts_[host].push_back(r);
      longest_ = std::max(longest_, static_cast<int>(hosts_[host].size()));
    }
  }

  int num_hosts() const { return static_cast<int>(hosts_.size()); }
  bool has_parent() const { return host_ > 0 || place_ > 0; }

  // In the tree place p hears from p without its lowest bit.
  int tree_parent() const {
    return place_ > 0 ? hosts_[host_][place_ & (place_ - 1)]
                      : hosts_[host_ & (host_ - 1)][0];
  }
  // Those with the most behind them first.
  std::vector<int> TreeChildren() const {
    std::vector<int> children;
    if (place_ == 0) {
      for (const int host : ChildrenOf(host_, num_hosts())) {
        children.push_back(hosts_[host][0]);
      }
    }
    const std::vector<int>& here = hosts_[host_];
    for (const int place : ChildrenOf(place_, static_cast<int>(here.size()))) {
      children.push_back(here[place]);
    }
    return children;
  }

  int chain_previous() const {
    return place_ > 0 ? hosts_[host_][place_ - 1] : hosts_[host_ - 1][0];
  }
  std::vector<int> ChainNext() const {
    std::vector<int> next;
    if (place_ == 0 && host_ + 1 < num_hosts()) {
      next.push_back(hosts_[host_ + 1][0]);
    }
    const std::vector<int>& here = hosts_[host_];
    if (place_ + 1 < static_cast<int>(here.size())) {
      next.push_back(here[place_ + 1]);
    }
    return next;
  }
  // Of all chains the most steps from the root, at most.
  int chain_length() const { return num_hosts() + longest_; }

 private:
  static std::vector<int> ChildrenOf(int place, int places) {
    std::vector<int> children;
    int bit = 1;
    while (bit < places) bit *= 2;
    for (bit /= 2; bit > 0; bit /= 2) {
      if (place % (2 * bit) == 0 && place + bit < places) {
        children.push_back(place + bit);
      }
    }
    return children;
  }

  std::vector<std::vector<int>> hosts_;  // ranks, the root's host first
  int host_ = 0;                         // of this rank
  int place_ = 0;                        // on its host
  int longest_ = 0;
};

}  // namespace

absl::Status Communicator::Lane::CheckReduction(absl::string_view call,
                                                DType dtype, ReduceOp op) {
  if (CanReduce(dtype, op)) return absl::OkStatus();
  return core->Refuse(
      call, absl::StrCat("there is no ", OpName(op), " of ", DTypeName(dtype)),
      absl::StatusCode::kUnimplemented);
}

void Communicator::Lane::AddRing(int root, bool root_sends_to_next,
                                 std::vector<SendOp>& sends,
                                 std::vector<RecvOp>& recvs) const {
  if (size == 1) return;
  const int previous = (rank + size - 1) % size;
  if (rank != root || !root_sends_to_next) {
    sends.push_back({(rank + 1) % size, {}});
  }
  if (previous != root || !root_sends_to_next) recvs.push_back({previous, {}});
}

absl::Status Communicator::Lane::RunInChunks(absl::Span<const SendOp> sends,
                                             absl::Span<const RecvOp> recvs,
                                             const ActiveCall& active,
                                             const CallOptions& options) {
  int64_t longest = 0;
  for (const SendOp& op : sends) {
    longest = std::max<int64_t>(longest, op.data.size());
  }
  for (const RecvOp& op : recvs) {
    longest = std::max<int64_t>(longest, op.data.size());
  }
  if (longest <= kChunkBytes) return Run(sends, recvs, active);

  // The chunk of an op that begins at `begin`; all ops have a first one.
  const auto cut = [](const auto& ops, int64_t begin) {
    std::vector<std::decay_t<decltype(ops[0])>> chunks;
    for (const auto& op : ops) {
      if (begin > 0 && begin >= static_cast<int64_t>(op.data.size())) continue;
      chunks.push_back(op);
      chunks.back().data = op.data.subspan(begin, kChunkBytes);
    }
    return chunks;
  };
  std::deque<PendingExchange> pending;
  int64_t done = 0;
  const auto finish_one = [&]() -> absl::Status {
    DSD_RETURN_IF_ERROR(pending.front().Wait());
    pending.pop_front();
    done = std::min(longest, done + kChunkBytes);
    Report(options, done, longest);
    return absl::OkStatus();
  };
  for (int64_t begin = 0; begin < longest; begin += kChunkBytes) {
    if (pending.size() == kChunksInFlight) DSD_RETURN_IF_ERROR(finish_one());
    DSD_ASSIGN_OR_RETURN(PendingExchange one,
                         Post(cut(sends, begin), cut(recvs, begin), active));
    pending.push_back(std::move(one));
  }
  while (!pending.empty()) DSD_RETURN_IF_ERROR(finish_one());
  return absl::OkStatus();
}

absl::Status Communicator::Lane::Barrier(const ActiveCall& active) {
  for (int distance = 1; distance < size; distance *= 2) {
    DSD_RETURN_IF_ERROR(Run({{(rank + distance) % size, {}}},
                            {{(rank + size - distance) % size, {}}}, active));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<uint64_t>> Communicator::Lane::BarrierWithWord(
    uint64_t mine, const ActiveCall& active) {
  const auto bytes = [](uint64_t* words, int count) {
    return absl::MakeSpan(reinterpret_cast<std::byte*>(words),
                          count * sizeof(uint64_t));
  };
  // Backwards from this rank: of those that it has heard of.
  std::vector<uint64_t> back(size);
  back[0] = mine;
  for (int distance = 1; distance < size; distance *= 2) {
    const int count = std::min(distance, size - distance);
    DSD_RETURN_IF_ERROR(
        Run({{(rank + distance) % size, bytes(back.data(), count)}},
            {{(rank + size - distance) % size,
              bytes(back.data() + distance, count)}},
            active));
  }
  std::vector<uint64_t> words(size);
  for (int i = 0; i < size; ++i) words[(rank + size - i) % size] = back[i];
  return words;
}

absl::Status Communicator::Lane::AllGather(
    absl::Span<const absl::Span<std::byte>> parts, const ActiveCall& active,
    const CallOptions& options) {
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  // Rotated, so that ranks do not all talk to the same one at a time.
  for (int step = 1; step < size; ++step) {
    const int to = (rank + step) % size;
    const int from = (rank + size - step) % size;
    sends.push_back({to, parts[rank]});
    recvs.push_back({from, parts[from]});
  }
  return RunInChunks(sends, recvs, active, options);
}

absl::Status Communicator::Barrier(const CallOptions& options) {
  DSD_ASSIGN_OR_RETURN(const auto active,
                       lane_->Begin(Call("Barrier"), options, true));
  return lane_->Barrier(*active);
}

absl::Status Communicator::Broadcast(absl::Span<std::byte> data, int root,
                                     const CallOptions& options) {
  if (root < 0 || root >= size()) {
    return lane_->core->Refuse(
        "Broadcast",
        absl::StrCat("root ", root, " is not in [0, ", size(), ")"));
  }
  const int64_t bytes = static_cast<int64_t>(data.size());
  DSD_ASSIGN_OR_RETURN(const auto active,
                       lane_->Begin(Call(absl::StrCat("Broadcast of ", bytes,
                                                      " bytes from rank ",
                                                      lane_->GroupRank(root))),
                                    options, true));
  const int world = size();
  const BroadcastRoute route(lane_->host_of_rank, rank(), root);

  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  if (bytes <= kSmallBroadcastBytes) {
    // On the root's host the next rank is its child in the tree.
    lane_->AddRing(
        root,
        lane_->host_of_rank[root] == lane_->host_of_rank[(root + 1) % world],
        sends, recvs);
    if (route.has_parent()) {
      recvs.push_back({route.tree_parent(), data});
      DSD_RETURN_IF_ERROR(lane_->Run(sends, recvs, *active));
      sends.clear();
      recvs.clear();
    }
    for (const int child : route.TreeChildren()) sends.push_back({child, data});
    return lane_->Run(sends, recvs, *active);
  }

  // Fewer chunks than ranks would leave most of a chain idle: there the root
  // gives each other rank a slice, and these give theirs to each other. Between
  // hosts each slice would go once for each rank.
  if (bytes >= kSlicedBroadcastBytes && bytes < (world - 2) * kChunkBytes &&
      route.num_hosts() == 1) {
    const int place = (rank() + world - root) % world;  // the root is 0
    const auto rank_at = [&](int p) { return (p + root) % world; };
    const int64_t slice_bytes = (bytes + world - 2) / (world - 1);
    const auto slice = [&](int p) {  // of place p > 0
      const int64_t begin = std::min(bytes, (p - 1) * slice_bytes);
      return data.subspan(begin, slice_bytes);
    };
    lane_->AddRing(root, /*root_sends_to_next=*/true, sends, recvs);
    if (place == 0) {
      for (int p = 1; p < world; ++p) sends.push_back({rank_at(p), slice(p)});
      return lane_->RunInChunks(sends, recvs, *active, options);
    }
    recvs.push_back({root, slice(place)});
    DSD_RETURN_IF_ERROR(lane_->RunInChunks(sends, recvs, *active, options));
    sends.clear();
    recvs.clear();
    for (int step = 1; step < world - 1; ++step) {
      const int others = world - 1;
      const int to = (place - 1 + step) % others + 1;
      const int from = (place - 1 + others - step) % others + 1;
      sends.push_back({rank_at(to), slice(place)});
      recvs.push_back({rank_at(from), slice(from)});
    }
    return lane_->RunInChunks(sends, recvs, *active, options);
  }

  // Chains that pass chunks on while the next arrive. Between hosts, which
  // cannot slice, chunks are small enough to fill them.
  const int64_t chunk_bytes =
      route.num_hosts() == 1
          ? kChunkBytes
          : std::clamp(bytes / (kChunksInFlight * route.chain_length()),
                       kSmallBroadcastBytes, kChunkBytes);
  const std::vector<int> next = route.ChainNext();
  const int64_t chunks = (bytes + chunk_bytes - 1) / chunk_bytes;
  const auto chunk = [&](int64_t i) {
    return data.subspan(i * chunk_bytes, chunk_bytes);
  };
  // The root, too, hears of a disagreement before it sends.
  lane_->AddRing(root, /*root_sends_to_next=*/false, sends, recvs);
  DSD_ASSIGN_OR_RETURN(PendingExchange ring,
                       lane_->Post(sends, recvs, *active));
  std::deque<PendingExchange> arriving;
  std::deque<PendingExchange> leaving;
  int64_t posted = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    if (route.has_parent()) {
      for (; posted < std::min(chunks, i + kChunksInFlight); ++posted) {
        DSD_ASSIGN_OR_RETURN(
            PendingExchange pending,
            lane_->Post({}, {{route.chain_previous(), chunk(posted)}},
                        *active));
        arriving.push_back(std::move(pending));
      }
    }
    if (i == 0) DSD_RETURN_IF_ERROR(ring.Wait());
    if (route.has_parent()) {
      DSD_RETURN_IF_ERROR(arriving.front().Wait());
      arriving.pop_front();
    }
    if (!next.empty()) {
      if (leaving.size() == kChunksInFlight) {
        DSD_RETURN_IF_ERROR(leaving.front().Wait());
        leaving.pop_front();
      }
      std::vector<SendOp> chunk_sends;
      for (const int to : next) chunk_sends.push_back({to, chunk(i)});
      DSD_ASSIGN_OR_RETURN(PendingExchange pending,
                           lane_->Post(chunk_sends, {}, *active));
      leaving.push_back(std::move(pending));
    }
    Report(options, std::min(bytes, (i + 1) * chunk_bytes), bytes);
  }
  for (PendingExchange& pending : leaving) {
    DSD_RETURN_IF_ERROR(pending.Wait());
  }
  return absl::OkStatus();
}

absl::Status Communicator::AllGather(
    absl::Span<const std::byte> mine,
    absl::Span<const absl::Span<std::byte>> parts, const CallOptions& options) {
  if (static_cast<int>(parts.size()) != size()) {
    return lane_->core->Refuse(
        "AllGather",
        absl::StrCat(parts.size(), " parts, expected one per rank, ", size()));
  }
  if (parts[rank()].size() != mine.size()) {
    return lane_->core->Refuse(
        "AllGather",
        absl::StrCat("part ", rank(), " has ", parts[rank()].size(),
                     " bytes, expected ", mine.size(), ", as this rank gives"));
  }
  std::vector<int64_t> sizes;
  for (const absl::Span<std::byte> part : parts) sizes.push_back(part.size());
  DSD_ASSIGN_OR_RETURN(const auto active,
                       lane_->Begin(Call("AllGather", sizes), options, true));
  if (!mine.empty() && parts[rank()].data() != mine.data()) {
    std::memcpy(parts[rank()].data(), mine.data(), mine.size());
  }
  return lane_->AllGather(parts, *active, options);
}

absl::Status Communicator::Scatter(
    absl::Span<const absl::Span<const std::byte>> parts,
    absl::Span<std::byte> mine, int root, const CallOptions& options) {
  const auto refuse = [&](const auto&... why) {
    return lane_->core->Refuse("Scatter", absl::StrCat(why...));
  };
  if (root < 0 || root >= size()) {
    return refuse("root ", root, " is not in [0, ", size(), ")");
  }
  if (static_cast<int>(parts.size()) != (rank() == root ? size() : 0)) {
    return refuse(parts.size(), " parts, expected ",
                  rank() == root ? absl::StrCat("one per rank, ", size())
                                 : "none but on the root");
  }
  if (rank() == root && parts[root].size() != mine.size()) {
    return refuse("the part of the root has ", parts[root].size(),
                  " bytes, expected ", mine.size(), ", as it takes");
  }
  DSD_ASSIGN_OR_RETURN(const auto active,
                       lane_->Begin(Call(absl::StrCat("Scatter from rank ",
                                                      lane_->GroupRank(root))),
                                    options, true));
  // Chunks do not tell how long a part is that both sides must cut alike.
  std::deque<std::string> labels;
  const auto label = [&](size_t bytes) -> absl::string_view {
    if (bytes <= kChunkBytes) return {};
    return labels.emplace_back(
        absl::StrCat(active->call.text, ", part of ", bytes, " bytes"));
  };
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  lane_->AddRing(root, /*root_sends_to_next=*/true, sends, recvs);
  if (rank() != root) {
    recvs.push_back({root, mine, {}, label(mine.size())});
    return lane_->RunInChunks(sends, recvs, *active, options);
  }
  if (!mine.empty() && mine.data() != parts[root].data()) {
    std::memcpy(mine.data(), parts[root].data(), mine.size());
  }
  for (int step = 1; step < size(); ++step) {
    const int to = (root + step) % size();
    sends.push_back({to, parts[to], {}, label(parts[to].size())});
  }
  return lane_->RunInChunks(sends, recvs, *active, options);
}

absl::StatusOr<std::vector<std::string>> Communicator::AllGatherBlobs(
    absl::string_view mine, int64_t max_bytes_each,
    const CallOptions& options) {
  const int world = size();
  if (max_bytes_each < 0) {
    return lane_->core->Refuse(
        "AllGatherBlobs", absl::StrCat("max_bytes_each is ", max_bytes_each,
                                       ", expected a number of bytes"));
  }
  DSD_ASSIGN_OR_RETURN(
      const auto active,
      lane_->Begin(Call("AllGatherBlobs", {max_bytes_each}), options, true));

  // First all lengths with the heads, in one message each; then the tails.
  const int64_t head = std::min<int64_t>(kFirstBlobBytes, max_bytes_each);
  const size_t slot_bytes = sizeof(int64_t) + head;
  std::vector<std::byte> slots(slot_bytes * world);
  std::vector<absl::Span<std::byte>> parts;
  for (int r = 0; r < world; ++r) {
    parts.push_back(absl::MakeSpan(slots).subspan(r * slot_bytes, slot_bytes));
  }
  const int64_t mine_bytes = static_cast<int64_t>(mine.size());
  std::memcpy(parts[rank()].data(), &mine_bytes, sizeof(mine_bytes));
  if (!mine.empty()) {
    std::memcpy(parts[rank()].data() + sizeof(mine_bytes), mine.data(),
                std::min(mine_bytes, head));
  }
  DSD_RETURN_IF_ERROR(lane_->AllGather(parts, *active, options));

  std::vector<std::string> blobs(world);
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  for (int r = 0; r < world; ++r) {
    int64_t bytes;
    std::memcpy(&bytes, parts[r].data(), sizeof(bytes));
    if (bytes < 0 || bytes > max_bytes_each) {
      lane_->core->Fail(absl::FailedPreconditionError(absl::StrCat(
                            "AllGatherBlobs in group \"", lane_->core->group,
                            "\": rank ", lane_->GroupRank(r), " gives ", bytes,
                            " bytes, expected at most ", max_bytes_each)),
                        /*tell=*/true);
      return lane_->core->ErrorDuring(active->call.text);
    }
    std::string& blob = blobs[r];
    blob.resize(bytes);
    if (bytes > 0) {
      std::memcpy(blob.data(), parts[r].data() + sizeof(bytes),
                  std::min(bytes, head));
    }
    if (bytes > head && r != rank()) {
      recvs.push_back(
          {r, absl::MakeSpan(reinterpret_cast<std::byte*>(blob.data() + head),
                             bytes - head)});
    }
  }
  if (mine_bytes > head) {
    std::memcpy(blobs[rank()].data(), mine.data(), mine.size());
    for (int step = 1; step < world; ++step) {
      sends.push_back({(rank() + step) % world,
                       absl::MakeConstSpan(reinterpret_cast<const std::byte*>(
                                               mine.data() + head),
                                           mine_bytes - head)});
    }
  }
  if (!sends.empty() || !recvs.empty()) {
    DSD_RETURN_IF_ERROR(lane_->RunInChunks(sends, recvs, *active, options));
  }
  return blobs;
}

absl::Status Communicator::ReduceScatter(absl::Span<const std::byte> input,
                                         absl::Span<const int64_t> counts,
                                         absl::Span<std::byte> output,
                                         DType dtype, ReduceOp op,
                                         const CallOptions& options) {
  const auto refuse = [&](const auto&... why) {
    return lane_->core->Refuse("ReduceScatter", absl::StrCat(why...));
  };
  const int world = size();
  const int64_t item_size = ItemSize(dtype);
  if (static_cast<int>(counts.size()) != world) {
    return refuse(counts.size(), " counts, expected one per rank, ", world);
  }
  std::vector<int64_t> offsets = {0};  // in bytes
  int64_t longest = 0;
  for (const int64_t count : counts) {
    const std::optional<int64_t> bytes =
        count < 0 ? std::nullopt : CheckedMul(count, item_size);
    const std::optional<int64_t> end =
        bytes ? CheckedAdd(offsets.back(), *bytes) : std::nullopt;
    if (!end) return refuse("count ", count, " is out of range");
    offsets.push_back(*end);
    longest = std::max(longest, count);
  }
  if (static_cast<int64_t>(input.size()) != offsets.back()) {
    return refuse("input has ", input.size(), " bytes, expected ",
                  offsets.back(), " by its counts");
  }
  const int64_t mine = counts[rank()];
  if (static_cast<int64_t>(output.size()) != mine * item_size) {
    return refuse("output has ", output.size(), " bytes, expected ",
                  mine * item_size, " (", mine, " ", DTypeName(dtype), ")");
  }
  DSD_RETURN_IF_ERROR(lane_->CheckReduction("ReduceScatter", dtype, op));
  DSD_ASSIGN_OR_RETURN(
      const auto active,
      lane_->Begin(Call(absl::StrCat("ReduceScatter of ", DTypeName(dtype),
                                     " (", OpName(op), ")"),
                        counts),
                   options, true));

  const int64_t step = ReduceStep(world, item_size);
  const int64_t room = std::min(step, mine) * item_size;
  std::vector<std::byte> staging(room * (world - 1));
  std::vector<const std::byte*> parts(world);
  for (int64_t begin = 0; begin < longest; begin += step) {
    const auto elements = [&](int r) {
      return std::clamp<int64_t>(counts[r] - begin, 0, step);
    };
    std::vector<SendOp> sends;
    std::vector<RecvOp> recvs;
    for (int distance = 1; distance < world; ++distance) {
      const int to = (rank() + distance) % world;
      const int from = (rank() + world - distance) % world;
      // Who gives and gets nothing must still not miss a disagreement.
      const bool in_ring = begin == 0 && distance == 1;
      if (elements(to) > 0 || in_ring) {
        sends.push_back({to, input.subspan(offsets[to] + begin * item_size,
                                           elements(to) * item_size)});
      }
      std::byte* const place = staging.data() + (distance - 1) * room;
      if (elements(rank()) > 0 || in_ring) {
        recvs.push_back(
            {from, absl::MakeSpan(place, elements(rank()) * item_size)});
      }
      parts[from] = place;
    }
    parts[rank()] = input.data() + offsets[rank()] + begin * item_size;
    DSD_RETURN_IF_ERROR(lane_->Run(sends, recvs, *active));
    Reduce(parts, elements(rank()), dtype, op,
           output.data() + begin * item_size);
    Report(options, std::min(begin + step, longest) * item_size,
           longest * item_size);
  }
  if (longest == 0) return lane_->Barrier(*active);
  return absl::OkStatus();
}

absl::Status Communicator::AllReduce(absl::Span<std::byte> data, DType dtype,
                                     ReduceOp op, const CallOptions& options) {
  const int world = size();
  const int64_t item_size = ItemSize(dtype);
  const int64_t bytes = static_cast<int64_t>(data.size());
  if (bytes % item_size != 0) {
    return lane_->core->Refuse(
        "AllReduce", absl::StrCat(bytes, " bytes are no whole number of ",
                                  DTypeName(dtype)));
  }
  DSD_RETURN_IF_ERROR(lane_->CheckReduction("AllReduce", dtype, op));
  const int64_t count = bytes / item_size;
  DSD_ASSIGN_OR_RETURN(
      const auto active,
      lane_->Begin(Call(absl::StrCat("AllReduce of ", count, " ",
                                     DTypeName(dtype), " (", OpName(op), ")")),
                   options, true));

  if (bytes * world <= kSmallReduceBytes) {
    std::vector<std::byte> staging(data.size() * world);
    std::vector<absl::Span<std::byte>> parts;
    std::vector<const std::byte*> pointers;
    for (int r = 0; r < world; ++r) {
      parts.push_back(absl::MakeSpan(staging).subspan(r * bytes, bytes));
      pointers.push_back(parts.back().data());
    }
    if (bytes > 0) std::memcpy(parts[rank()].data(), data.data(), bytes);
    DSD_RETURN_IF_ERROR(lane_->AllGather(parts, *active, {}));
    Reduce(pointers, count, dtype, op, data.data());
    return absl::OkStatus();
  }

  // Block after block: each rank reduces a slice, then all gather the slices.
  const int64_t step = ReduceStep(world, item_size);
  std::vector<std::byte> staging(std::min(step, count) * item_size *
                                 (world - 1));
  std::vector<const std::byte*> pointers(world);
  for (int64_t begin = 0; begin < count; begin += step * world) {
    const int64_t block = std::min(step * world, count - begin);
    const int64_t slice = (block + world - 1) / world;
    std::vector<absl::Span<std::byte>> slices;
    for (int r = 0; r < world; ++r) {
      const int64_t first = std::min(r * slice, block);
      const int64_t last = std::min(first + slice, block);
      slices.push_back(data.subspan((begin + first) * item_size,
                                    (last - first) * item_size));
    }
    const absl::Span<std::byte> own = slices[rank()];
    std::vector<SendOp> sends;
    std::vector<RecvOp> recvs;
    for (int distance = 1; distance < world; ++distance) {
      const int to = (rank() + distance) % world;
      const int from = (rank() + world - distance) % world;
      std::byte* const place =
          staging.data() + (distance - 1) * slice * item_size;
      sends.push_back({to, slices[to]});
      recvs.push_back({from, absl::MakeSpan(place, own.size())});
      pointers[from] = place;
    }
    pointers[rank()] = own.data();
    DSD_RETURN_IF_ERROR(lane_->Run(sends, recvs, *active));
    Reduce(pointers, own.size() / item_size, dtype, op, own.data());
    DSD_RETURN_IF_ERROR(lane_->AllGather(slices, *active, {}));
    Report(options, (begin + block) * item_size, bytes);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Communicator>> Communicator::OpenLane(
    absl::string_view name, const CallOptions& options) {
  constexpr int64_t kMaxNameBytes = 256;
  Core& core = *lane_->core;
  if (name.empty() || static_cast<int64_t>(name.size()) > kMaxNameBytes) {
    return core.Refuse("OpenLane",
                       absl::StrCat("the name has ", name.size(),
                                    " bytes, expected 1 to ", kMaxNameBytes));
  }
  bool taken;
  {
    // Reserved at once: another thread may be opening one on another lane.
    absl::MutexLock lock(&core.mu);
    taken = !core.lane_names.insert(std::string(name)).second;
  }
  absl::StatusOr<std::vector<std::string>> names =
      AllGatherBlobs(absl::StrCat(taken ? "taken " : "free ", name),
                     kMaxNameBytes + 8, options);
  DSD_RETURN_IF_ERROR(names) << "OpenLane(\"" << name << "\")";
  bool taken_somewhere = false;
  for (int r = 0; r < size(); ++r) {
    const absl::string_view entry = (*names)[r];
    const absl::string_view other = entry.substr(entry.find(' ') + 1);
    if (other != name) {
      core.Fail(
          absl::FailedPreconditionError(absl::StrCat(
              "ranks disagree: rank ", lane_->GroupRank(r), " opens lane \"",
              other, "\", rank ", core.rank, " lane \"", name, "\"")),
          /*tell=*/true);
      return core.ErrorDuring("OpenLane");
    }
    taken_somewhere |= absl::StartsWith(entry, "taken ");
  }
  if (taken_somewhere) {
    if (!taken) {
      absl::MutexLock lock(&core.mu);
      core.lane_names.erase(name);
    }
    return absl::AlreadyExistsError(
        absl::StrCat("OpenLane ", core.Here(), ": there is a lane \"", name,
                     "\" already; lanes of one group need different names"));
  }
  auto lane = std::make_unique<Lane>(lane_->core, std::string(name),
                                     /*is_main=*/false);
  lane->rank = lane_->rank;
  lane->size = lane_->size;
  lane->members = lane_->members;
  lane->host_of_rank = lane_->host_of_rank;
  if (has_cuda_memory() && core.engine != nullptr) {
    const ActiveCall active(*lane, Call("OpenLane"), options,
                            /*collective=*/true);
    const absl::Status opened =
        core.engine->OpenLane(lane->id, active.deadline);
    if (absl::IsDeadlineExceeded(opened)) return core.TimeIsOver(active);
    if (!opened.ok())
      return core.EngineFailed(opened, active.call.text, active.deadline);
  }
  return absl::WrapUnique(new Communicator(std::move(lane)));
}

absl::StatusOr<std::unique_ptr<Communicator>> Communicator::Split(
    int color, int key, const CallOptions& options) {
  struct Choice {
    int32_t color;
    int32_t key;
  };
  DSD_ASSIGN_OR_RETURN(const auto active,
                       lane_->Begin(Call("Split"), options, true));
  std::vector<Choice> choices(size());
  std::vector<absl::Span<std::byte>> parts;
  for (Choice& choice : choices) {
    parts.push_back(
        absl::MakeSpan(reinterpret_cast<std::byte*>(&choice), sizeof(Choice)));
  }
  choices[rank()] = {color, key};
  DSD_RETURN_IF_ERROR(lane_->AllGather(parts, *active, {}));
  const int64_t number = lane_->splits++;
  if (color < 0) return nullptr;

  std::vector<int> ranks;
  for (int r = 0; r < size(); ++r) {
    if (choices[r].color == color) ranks.push_back(r);
  }
  std::stable_sort(ranks.begin(), ranks.end(), [&](int a, int b) {
    return choices[a].key < choices[b].key;
  });
  const int own = static_cast<int>(
      std::find(ranks.begin(), ranks.end(), rank()) - ranks.begin());
  std::vector<int> hosts;
  for (int& r : ranks) {
    hosts.push_back(lane_->host_of_rank[r]);
    r = lane_->GroupRank(r);
  }
  auto lane = std::make_unique<Lane>(
      lane_->core,
      absl::StrCat(lane_->name, ", split ", number, ", color ", color), own,
      std::move(ranks));
  lane->SetHosts(absl::MakeConstSpan(hosts));
  return absl::WrapUnique(new Communicator(std::move(lane)));
}

absl::Status Communicator::Shutdown(const CallOptions& options) {
  Core& core = *lane_->core;
  DSD_ASSIGN_OR_RETURN(const auto active,
                       lane_->Begin(Call("Shutdown"), options, true));
  DSD_RETURN_IF_ERROR(lane_->Barrier(*active));
  if (!lane_->is_main) return absl::OkStatus();
  if (core.membership != nullptr) {
    const absl::Status left = core.membership->Leave(active->deadline);
    if (absl::IsDeadlineExceeded(left)) {
      return core.TimeIsOver(*active);
    }
    if (!left.ok()) {
      core.Fail(left, /*tell=*/false);
      return core.ErrorDuring(active->call.text);
    }
  }
  absl::MutexLock lock(&core.mu);
  core.shut_down = true;
  return absl::OkStatus();
}

}  // namespace dsd
