// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/plan/plan.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/plan/rank_set.h"

namespace dsd {
namespace {

// Spreads cells over candidates. The same on every rank: no hash of the
// standard library or Abseil is. (The last steps of splitmix64.)
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// How many parts a cell is cut into if each of `candidates` may provide one.
int64_t NumParts(int64_t bytes, int64_t candidates,
                 int64_t part_bytes = kSplitBytes) {
  return std::min(candidates,
                  std::max<int64_t>(1, (bytes + part_bytes - 1) / part_bytes));
}

// Every relay should have a part, also of a cell just over kSplitBytes.
constexpr int64_t kRelayBytes = int64_t{4} << 10;

bool OrderedBefore(const Move& a, const Move& b) {
  if (a.box.lo != b.box.lo) return a.box.lo < b.box.lo;
  if (a.box.hi != b.box.hi) return a.box.hi < b.box.hi;
  if (a.provider != b.provider) return a.provider < b.provider;
  return a.relayed < b.relayed;
}

// Plans one rank. What the two sides of a move derive alone must agree, so both
// start from the same joint cell (a source cell cut by a target cell), and
// every choice below is a function of that cell, its holders and the bindings:
//
//   * `turn` rotates the candidates for a cell.
//   * In one part: the reader at position j among the readers takes it from
//     candidate (turn + j) modulo their number. A candidate finds its readers
//     without looking at the others'.
//   * In several parts: part i comes from candidate turn + i, for all readers.
//   * With relays: part i goes from candidate turn + i to reader turn + i of
//     those on a host that do not have the cell, and from there to the others
//     of them.
//
// Candidates are the ranks on the reader's host that have the cell, or all that
// have it where there is none.
class Planner {
 public:
  Planner(int rank, const Catalog& source, const Catalog& target,
          const Binding& source_binding, const Binding& target_binding)
      : rank_(rank),
        source_catalog_(source),
        target_catalog_(target),
        source_binding_(source_binding),
        target_binding_(target_binding),
        source_holders_(source_binding.HoldersOn(rank)),
        target_holders_(target_binding.HoldersOn(rank)) {
    plan_.rank = rank;
  }

  // For so many pairs: most have a move.
  void Reserve(size_t pairs) { plan_.moves.reserve(pairs); }

  absl::Status PlanPair(size_t source_index, size_t target_index) {
    const TensorSpec& from = source_catalog_[source_index];
    const TensorSpec& to = target_catalog_[target_index];
    if (from.shape() != to.shape()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "plan: source tensor \"", from.fqn, "\" has shape ",
          DimsToString(from.shape()), ", target tensor \"", to.fqn, "\" has ",
          DimsToString(to.shape()), "; they must be equal"));
    }
    source_index_ = source_index;
    target_index_ = target_index;
    source_ = &from.layout;
    target_ = &to.layout;
    first_move_ = plan_.moves.size();
    const PairKind kind{source_->symbols(), target_->symbols(), from.dtype,
                        to.dtype};
    if (const auto known = known_.find(kind); known != known_.end()) {
      RepeatMoves(known->second);
      return absl::OkStatus();
    }
    rotated_ = false;
    DSD_RETURN_IF_ERROR(PlanAsReader());
    DSD_RETURN_IF_ERROR(PlanTargetAnyHolder());
    PlanAsProvider();
    MergeMoves();
    if (!rotated_) {
      known_.emplace(kind, Range{first_move_, plan_.moves.size()});
    }
    return absl::OkStatus();
  }

  Plan Finish() && {
    PlanCost& cost = plan_.cost;
    for (const Move& move : plan_.moves) {
      if (move.provider != rank_) {
        cost.bytes_received += move.wire_bytes();
        continue;
      }
      if (move.provider_keeps) cost.bytes_local += move.wire_bytes();
      cost.bytes_sent += move.wire_bytes() * move.readers.size();
    }
    cost.moves = plan_.moves.size();
    cost.operations = operations_ + cost.moves;
    return std::move(plan_);
  }

 private:
  // All that the moves of a pair depend on where no cell has several candidates
  // to rotate, as is so for most: a model has many tensors of few kinds.
  using PairKind = std::tuple<Digest, Digest, DType, DType>;
  struct Range {  // of moves
    size_t begin;
    size_t end;
  };

  // Box, holders on the own side, holders on the other side.
  using JointVisitor =
      absl::FunctionRef<void(const Box&, const HolderSet&, const HolderSet&)>;

  using CellFilter = absl::FunctionRef<bool(const HolderSet&)>;
  static bool EveryCell(const HolderSet&) { return true; }

  // Calls `enter` for each cell of `own` that one of `holders` has, and, if
  // that returns true, `visit` for its joint cells with `other`. Each cell
  // comes once. Returns how many elements of the entered cells were in no joint
  // cell.
  int64_t ForEachJointCell(const Layout& own, absl::Span<const Holder> holders,
                           const Layout& other, CellFilter enter,
                           JointVisitor visit) {
    int64_t missing = 0;
    for (size_t k = 0; k < holders.size(); ++k) {
      const auto leave_out = [&](const HolderSet& set) {
        ++operations_;
        const bool is_earlier =
            std::any_of(holders.begin(), holders.begin() + k,
                        [&](Holder h) { return set.Contains(h); });
        return is_earlier || !enter(set);
      };
      if (own.kind() == Layout::Kind::kFlat) {
        const std::optional<FlatInterval> interval = own.IntervalOf(holders[k]);
        if (!interval.has_value()) continue;
        own.ForEachFlatCell(
            interval->begin, interval->end,
            [&](int64_t begin, int64_t end, const HolderSet& set) {
              if (leave_out(set)) return;
              missing += end - begin;
              if (other.kind() == Layout::Kind::kFlat) {
                missing -= JoinFlat(other, begin, end, set, visit);
                return;
              }
              for (const Box& box :
                   LowerFlatInterval(own.shape(), begin, end)) {
                missing -= Join(other, box, set, visit);
              }
            },
            &operations_);
        continue;
      }
      for (const LocalBox& part : own.BoxesOf(holders[k])) {
        own.ForEachCell(
            part.box,
            [&](const Cell& cell) {
              if (leave_out(cell.holders)) return;
              missing += cell.box.num_elements() -
                         Join(other, cell.box, cell.holders, visit);
            },
            &operations_);
      }
    }
    return missing;
  }

  // Returns the number of elements visited; so does JoinFlat.
  int64_t Join(const Layout& other, const Box& box, const HolderSet& own_set,
               JointVisitor visit) {
    int64_t visited = 0;
    other.ForEachCell(
        box,
        [&](const Cell& cell) {
          visited += cell.box.num_elements();
          visit(cell.box, own_set, cell.holders);
        },
        &operations_);
    return visited;
  }

  // Intersects two flat layouts before lowering them, for few boxes.
  int64_t JoinFlat(const Layout& other, int64_t begin, int64_t end,
                   const HolderSet& own_set, JointVisitor visit) {
    int64_t visited = 0;
    other.ForEachFlatCell(
        begin, end,
        [&](int64_t joint_begin, int64_t joint_end, const HolderSet& set) {
          visited += joint_end - joint_begin;
          for (const Box& box :
               LowerFlatInterval(other.shape(), joint_begin, joint_end)) {
            visit(box, own_set, set);
          }
        },
        &operations_);
    return visited;
  }

  absl::Status PlanAsReader() {
    int64_t unserved = 0;
    const int64_t missing = ForEachJointCell(
        *target_, target_holders_, *source_, EveryCell,
        [&](const Box& box, const HolderSet& to, const HolderSet& from) {
          ChooseWireDtype(from);
          const RankSet readers(to, target_binding_);
          if (from.IsAny()) {
            PlanSourceAnyHolder(box, readers);
            return;
          }
          const RankSet providers(from, source_binding_);
          if (providers.empty()) {
            unserved += box.num_elements();
          } else if (providers.Contains(rank_)) {
            AddLocal(box);
          } else {
            Fetch(box, providers, readers);
          }
        });
    if (missing + unserved == 0) return absl::OkStatus();
    return MissingError(target_holders_);
  }

  // A cell that any rank can read: its readers share the reading and send what
  // they read to each other.
  void PlanSourceAnyHolder(const Box& box, const RankSet& readers) {
    const int64_t parts = NumParts(Bytes(box), readers.size());
    const int64_t turn = Turn(box, readers.size());
    for (int64_t i = 0; i < parts; ++i) {
      ++operations_;
      const int provider = readers.At((turn + i) % readers.size());
      Box part = SplitBox(box, i, parts);
      if (part.empty()) continue;
      if (provider != rank_) {
        AddReceive(std::move(part), provider);
        continue;
      }
      Move& move = AddProvide(std::move(part));
      move.provider_keeps = true;
      for (int64_t k = 0; k < readers.size(); ++k) {
        ++operations_;
        if (readers.At(k) != rank_) move.readers.push_back(readers.At(k));
      }
    }
  }

  // A remote cell.
  void Fetch(const Box& box, const RankSet& providers, const RankSet& readers) {
    const std::vector<int> near = ProvidersOnHost(providers);
    const int64_t candidates =
        near.empty() ? providers.size() : static_cast<int64_t>(near.size());
    const auto candidate = [&](int64_t i) {
      return near.empty() ? providers.At(i % candidates) : near[i % candidates];
    };
    if (MayRelay(box, providers, readers)) {
      const std::vector<int>& takers =
          TakersOnHostOf(rank_, providers, readers);
      if (ShouldRelay(takers, candidates, near.empty())) {
        return FetchWithRelays(box, candidates, candidate, takers);
      }
    }
    const int64_t parts = NumParts(Bytes(box), candidates);
    const int64_t turn = Turn(box, candidates);
    if (parts == 1) {
      ++operations_;
      AddReceive(box, candidate(turn + *readers.PositionOf(rank_)));
      return;
    }
    for (int64_t i = 0; i < parts; ++i) {
      ++operations_;
      Box part = SplitBox(box, i, parts);
      if (!part.empty()) AddReceive(std::move(part), candidate(turn + i));
    }
  }

  bool MayRelay(const Box& box, const RankSet& providers,
                const RankSet& readers) const {
    return (!source_binding_.SingleHost() ||
            readers.size() > providers.size()) &&
           Bytes(box) >= kSplitBytes &&
           wire_dtype_ == target_catalog_[target_index_].dtype;
  }
  // The takers of one host; the candidates are all that have the cell
  // (`is_foreign`, where there are hosts), or those on the host.
  bool ShouldRelay(const std::vector<int>& takers, int64_t candidates,
                   bool is_foreign) const {
    return takers.size() > 1 &&
           (static_cast<int64_t>(takers.size()) > candidates ||
            (is_foreign && !source_binding_.SingleHost()));
  }

  // Calls visit(part, provider, relay) for all parts of a cell.
  template <class Candidate, class Visit>
  void ForEachRelay(const Box& box, int64_t candidates, Candidate candidate,
                    const std::vector<int>& takers, Visit visit) {
    const int64_t count = takers.size();
    const int64_t parts = NumParts(Bytes(box), count, kRelayBytes);
    const int64_t provider_turn = Turn(box, candidates);
    const int64_t taker_turn = Turn(box, count);
    for (int64_t i = 0; i < parts; ++i) {
      ++operations_;
      Box part = SplitBox(box, i, parts);
      if (part.empty()) continue;
      visit(std::move(part), candidate(provider_turn + i),
            takers[(taker_turn + i) % count]);
    }
  }

  template <class Candidate>
  void FetchWithRelays(const Box& box, int64_t candidates, Candidate candidate,
                       const std::vector<int>& takers) {
    ForEachRelay(box, candidates, candidate, takers,
                 [&](Box part, int provider, int relay) {
                   if (relay != rank_) {
                     AddReceive(std::move(part), relay).relayed = true;
                     return;
                   }
                   AddReceive(part, provider);
                   Move& move = AddProvide(std::move(part));
                   move.relayed = true;
                   for (int taker : takers) {
                     ++operations_;
                     if (taker != rank_) move.readers.push_back(taker);
                   }
                 });
  }

  void PlanAsProvider() {
    const auto target_bounds = target_->HolderBounds();
    const bool same_holders = target_bounds.has_value() &&
                              !target_->HasAnyHolder() &&
                              source_binding_ == target_binding_;
    std::optional<RankSet> providers;  // of the own cell
    int64_t position = 0;              // of this rank among them
    ForEachJointCell(
        *source_, source_holders_, *target_,
        [&](const HolderSet& from) {
          // Where all holders of the target have the cell, nobody asks for it:
          // a whole state dict on every rank is not compared with every shard.
          if (same_holders &&
              from.IsKnownToHave(target_bounds->first, target_bounds->second)) {
            return false;
          }
          ChooseWireDtype(from);
          providers.emplace(from, source_binding_);
          position = *providers->PositionOf(rank_);
          return true;
        },
        [&](const Box& box, const HolderSet&, const HolderSet& to) {
          if (to.IsAny()) {
            Take(box, providers->size(), position);
            return;
          }
          const RankSet readers(to, target_binding_);
          ++operations_;
          if (readers.IsKnownSubsetOf(*providers)) return;
          ServeHost(box, *providers, readers);
          ServeOthers(box, *providers, position, readers);
        });
  }

  // The own part of a cell that one of `candidates` must take.
  void Take(const Box& box, int64_t candidates, int64_t position) {
    ++operations_;
    const int64_t parts = NumParts(Bytes(box), candidates);
    const int64_t index = PartOf(position, Turn(box, candidates), candidates);
    if (index >= parts) return;
    Box part = SplitBox(box, index, parts);
    if (!part.empty()) AddLocal(std::move(part));
  }

  // The inverse of Fetch for readers on this host.
  void ServeHost(const Box& box, const RankSet& providers,
                 const RankSet& readers) {
    if (source_binding_.SingleHost()) return;
    const std::vector<int> near = ProvidersOnHost(providers);
    const int64_t candidates = near.size();
    const int64_t position =
        std::lower_bound(near.begin(), near.end(), rank_) - near.begin();
    if (MayRelay(box, providers, readers)) {
      const std::vector<int>& takers =
          TakersOnHostOf(rank_, providers, readers);
      if (ShouldRelay(takers, candidates, /*is_foreign=*/false)) {
        return ServeWithRelays(
            box, candidates, [&](int64_t i) { return near[i % candidates]; },
            takers);
      }
    }
    const int64_t parts = NumParts(Bytes(box), candidates);
    const int64_t turn = Turn(box, candidates);
    const int64_t index = PartOf(position, turn, candidates);
    if (parts > 1 && index >= parts) return;
    std::vector<int> served;
    for (int mate : source_binding_.RanksOnHostOf(rank_)) {
      ++operations_;
      const std::optional<int64_t> reader = readers.PositionOf(mate);
      if (!reader.has_value() || providers.Contains(mate)) continue;
      if (parts > 1 || (turn + *reader) % candidates == position) {
        served.push_back(mate);
      }
    }
    AddSend(SplitBox(box, parts > 1 ? index : 0, parts), served);
  }

  // The inverse of Fetch for readers on hosts where nobody has the cell; on one
  // host, for all readers.
  void ServeOthers(const Box& box, const RankSet& providers, int64_t position,
                   const RankSet& readers) {
    const int64_t candidates = providers.size();
    std::vector<int> relayed;  // ascending
    if (MayRelay(box, providers, readers)) {
      const auto candidate = [&](int64_t i) {
        return providers.At(i % candidates);
      };
      const std::vector<int>& elsewhere = ReadersElsewhere(providers, readers);
      if (source_binding_.SingleHost()) {
        if (ShouldRelay(elsewhere, candidates, /*is_foreign=*/true)) {
          return ServeWithRelays(box, candidates, candidate, elsewhere);
        }
      } else {
        absl::flat_hash_set<int> hosts;
        for (const int reader : elsewhere) {
          if (!hosts.insert(source_binding_.HostOf(reader)).second) continue;
          const std::vector<int>& takers =
              TakersOnHostOf(reader, providers, readers);
          if (!ShouldRelay(takers, candidates, /*is_foreign=*/true)) continue;
          ServeWithRelays(box, candidates, candidate, takers);
          relayed.insert(relayed.end(), takers.begin(), takers.end());
        }
        std::sort(relayed.begin(), relayed.end());
      }
    }
    const auto is_relayed = [&](int reader) {
      return std::binary_search(relayed.begin(), relayed.end(), reader);
    };
    const int64_t parts = NumParts(Bytes(box), candidates);
    const int64_t index = PartOf(position, Turn(box, candidates), candidates);
    if (parts > 1) {
      if (index >= parts) return;
      Box part = SplitBox(box, index, parts);
      if (!part.empty()) {
        std::vector<int> served = ReadersElsewhere(providers, readers);
        operations_ += served.size();
        served.erase(std::remove_if(served.begin(), served.end(), is_relayed),
                     served.end());
        AddSend(std::move(part), served);
      }
      return;
    }
    std::vector<int> served;
    for (int64_t j = index; j < readers.size(); j += candidates) {
      ++operations_;
      const int reader = readers.At(j);
      if (is_relayed(reader) || IsServedElsewhere(reader, providers)) continue;
      served.push_back(reader);
    }
    AddSend(box, served);
  }

  // The inverse of FetchWithRelays.
  template <class Candidate>
  void ServeWithRelays(const Box& box, int64_t candidates, Candidate candidate,
                       const std::vector<int>& takers) {
    ForEachRelay(box, candidates, candidate, takers,
                 [&](Box part, int provider, int relay) {
                   if (provider == rank_) AddSend(std::move(part), {relay});
                 });
  }

  // The readers on the host of `rank` that do not have the cell, ascending
  // where there are hosts. Until the next call at least.
  const std::vector<int>& TakersOnHostOf(int rank, const RankSet& providers,
                                         const RankSet& readers) {
    if (source_binding_.SingleHost()) {
      return ReadersElsewhere(providers, readers);
    }
    last_takers_.clear();
    for (const int mate : source_binding_.RanksOnHostOf(rank)) {
      ++operations_;
      if (readers.Contains(mate) && !providers.Contains(mate)) {
        last_takers_.push_back(mate);
      }
    }
    return last_takers_;
  }

  // Those of `readers` that take from any of `providers`. Kept, since many
  // cells have the same holders; until the next call at least.
  const std::vector<int>& ReadersElsewhere(const RankSet& providers,
                                           const RankSet& readers) {
    const auto compute = [&] {
      std::vector<int> found;
      for (int64_t j = 0; j < readers.size(); ++j) {
        ++operations_;
        const int reader = readers.At(j);
        if (!IsServedElsewhere(reader, providers)) found.push_back(reader);
      }
      return found;
    };
    std::optional<HolderSet::Key> from = providers.key();
    std::optional<HolderSet::Key> to = readers.key();
    if (!from.has_value() || !to.has_value()) {
      return last_readers_elsewhere_ = compute();
    }
    const auto [it, is_new] = readers_elsewhere_.try_emplace(
        std::make_pair(*std::move(from), *std::move(to)));
    if (is_new) it->second = compute();
    return it->second;
  }

  // True if the reader has the cell itself or takes it from its own host.
  bool IsServedElsewhere(int reader, const RankSet& providers) {
    if (providers.Contains(reader)) return true;
    if (source_binding_.SingleHost()) return false;
    const absl::Span<const int> mates = source_binding_.RanksOnHostOf(reader);
    if (providers.size() < static_cast<int64_t>(mates.size())) {
      for (int64_t i = 0; i < providers.size(); ++i) {
        ++operations_;
        if (source_binding_.HostOf(providers.At(i)) ==
            source_binding_.HostOf(reader)) {
          return true;
        }
      }
      return false;
    }
    return std::any_of(mates.begin(), mates.end(), [&](int mate) {
      ++operations_;
      return providers.Contains(mate);
    });
  }

  // Those of `providers` on this host, ascending; none if that is all of them.
  std::vector<int> ProvidersOnHost(const RankSet& providers) {
    std::vector<int> near;
    if (source_binding_.SingleHost()) return near;
    for (int mate : source_binding_.RanksOnHostOf(rank_)) {
      ++operations_;
      if (providers.Contains(mate)) near.push_back(mate);
    }
    return near;
  }

  // What a target kAnyHolder needs and only this function can see: that some of
  // it is nowhere, and what comes from a source kAnyHolder, which every rank
  // divides alike.
  absl::Status PlanTargetAnyHolder() {
    if (!target_->HasAnyHolder()) return absl::OkStatus();
    const auto bounds = source_->HolderBounds();
    const bool complete =
        source_->NumUncovered() == 0 &&
        (!bounds.has_value() ||
         source_binding_.PlacesAll(bounds->first, bounds->second));
    if (complete && !source_->HasAnyHolder()) return absl::OkStatus();
    const std::vector<Holder> any = {kAnyHolder};
    int64_t unserved = 0;
    const int64_t missing = ForEachJointCell(
        *target_, any, *source_, EveryCell,
        [&](const Box& box, const HolderSet&, const HolderSet& from) {
          if (from.IsAny()) {
            ChooseWireDtype(from);
            Take(box, source_binding_.world_size(), rank_);
          } else if (RankSet(from, source_binding_).empty()) {
            unserved += box.num_elements();
          }
        });
    if (missing + unserved == 0) return absl::OkStatus();
    return MissingError(any);
  }

  // Names a box that one of `holders` needs and that is on no rank.
  absl::Status MissingError(absl::Span<const Holder> holders) const {
    for (Holder holder : holders) {
      for (const LocalBox& part : target_->BoxesOf(holder)) {
        std::vector<Box> rest = {part.box};
        source_->ForEachCell(part.box, [&](const Cell& cell) {
          if (!cell.holders.IsAny() &&
              RankSet(cell.holders, source_binding_).empty()) {
            return;
          }
          std::vector<Box> left;
          for (const Box& box : rest) {
            for (Box& outside : Subtract(box, cell.box)) {
              left.push_back(std::move(outside));
            }
          }
          rest = std::move(left);
        });
        if (rest.empty()) continue;
        return absl::FailedPreconditionError(absl::StrCat(
            "plan: box ", rest[0].ToString(), " of tensor \"",
            target_catalog_[target_index_].fqn, "\" of shape ",
            DimsToString(target_->shape()), " is needed by ",
            holder == kAnyHolder
                ? "the target"
                : absl::StrCat("holder ", holder, " on rank ", rank_),
            ", but no rank has it in the source"));
      }
    }
    return absl::InternalError("plan: elements are missing from no box");
  }

  // What storage that any rank can read has is sent on from the target.
  void ChooseWireDtype(const HolderSet& from) {
    const DType source_dtype = source_catalog_[source_index_].dtype;
    const DType target_dtype = target_catalog_[target_index_].dtype;
    const bool is_target =
        from.IsAny() || ItemSize(target_dtype) < ItemSize(source_dtype);
    wire_dtype_ = is_target ? target_dtype : source_dtype;
  }

  int64_t Bytes(const Box& box) const {
    return box.num_elements() * ItemSize(wire_dtype_);
  }

  // Where the rotation of `candidates` starts for this cell.
  int64_t Turn(const Box& box, int64_t candidates) {
    if (candidates <= 1) return 0;
    rotated_ = true;
    const uint64_t cell = FlatIndex(target_->shape(), box.lo);
    const uint64_t tensor = target_index_;
    return Mix(Mix(tensor + 1) + cell) % candidates;
  }

  // The part that the candidate at `position` provides if the cell has so many;
  // in one part, the position of its first reader.
  static int64_t PartOf(int64_t position, int64_t turn, int64_t candidates) {
    return (position + candidates - turn) % candidates;
  }

  // The moves of another pair of the same kind, for this one.
  void RepeatMoves(Range range) {
    for (size_t i = range.begin; i < range.end; ++i) {
      Move move = plan_.moves[i];
      move.source_tensor = source_index_;
      move.target_tensor = target_index_;
      plan_.moves.push_back(std::move(move));
    }
  }

  Move& AddMove(Box box, int provider) {
    plan_.moves.push_back({source_index_,
                           target_index_,
                           std::move(box),
                           wire_dtype_,
                           provider,
                           /*provider_keeps=*/false,
                           /*relayed=*/false,
                           {}});
    return plan_.moves.back();
  }
  Move& AddProvide(Box box) { return AddMove(std::move(box), rank_); }
  void AddLocal(Box box) { AddProvide(std::move(box)).provider_keeps = true; }
  Move& AddReceive(Box box, int provider) {
    Move& move = AddMove(std::move(box), provider);
    move.readers.push_back(rank_);
    return move;
  }
  void AddSend(Box box, const std::vector<int>& readers) {
    if (readers.empty() || box.empty()) return;
    AddProvide(std::move(box)).readers.assign(readers.begin(), readers.end());
  }

  // Orders the moves of the pair and makes one of those that provide the same
  // box.
  void MergeMoves() {
    std::vector<Move>& moves = plan_.moves;
    const auto first = moves.begin() + first_move_;
    if (!std::is_sorted(first, moves.end(), OrderedBefore)) {
      std::sort(first, moves.end(), OrderedBefore);
    }
    auto last = first;  // of those kept
    for (auto next = first; next != moves.end(); ++next) {
      if (next == first) continue;
      if (OrderedBefore(*last, *next)) {
        if (++last != next) *last = std::move(*next);
        continue;
      }
      last->provider_keeps |= next->provider_keeps;
      last->readers.insert(last->readers.end(), next->readers.begin(),
                           next->readers.end());
    }
    if (last != moves.end()) moves.erase(last + 1, moves.end());
    for (auto move = first; move != moves.end(); ++move) {
      std::sort(move->readers.begin(), move->readers.end());
    }
  }

  const int rank_;
  const Catalog& source_catalog_;
  const Catalog& target_catalog_;
  const Binding& source_binding_;
  const Binding& target_binding_;
  const std::vector<Holder> source_holders_;
  const std::vector<Holder> target_holders_;

  // Of the pair at hand.
  size_t source_index_ = 0;
  size_t target_index_ = 0;
  const Layout* source_ = nullptr;
  const Layout* target_ = nullptr;
  size_t first_move_ = 0;
  DType wire_dtype_ = DType::kFloat32;  // of the cell at hand
  bool rotated_ = false;
  absl::flat_hash_map<PairKind, Range> known_;

  absl::flat_hash_map<std::pair<HolderSet::Key, HolderSet::Key>,
                      std::vector<int>>
      readers_elsewhere_;
  std::vector<int> last_readers_elsewhere_;
  std::vector<int> last_takers_;
  int64_t operations_ = 0;
  Plan plan_;
};

}  // namespace

TensorPairs MatchByName(const Catalog& source, const Catalog& target) {
  TensorPairs pairs;
  pairs.reserve(target.size());
  for (size_t i = 0; i < target.size(); ++i) {
    if (i < source.size() && source[i].fqn == target[i].fqn) {
      pairs.emplace_back(i, i);
    } else if (const std::optional<size_t> from = source.Find(target[i].fqn)) {
      pairs.emplace_back(*from, i);
    }
  }
  return pairs;
}

absl::StatusOr<Plan> PlanForRank(int rank, const Catalog& source,
                                 const Catalog& target,
                                 const TensorPairs& pairs,
                                 const Binding& source_binding,
                                 const Binding& target_binding) {
  if (!source_binding.SameHosts(target_binding)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "plan: source and target are bound to different worlds or hosts (",
        source_binding.world_size(), " and ", target_binding.world_size(),
        " ranks); expected one communicator"));
  }
  if (rank < 0 || rank >= source_binding.world_size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("plan: rank ", rank, " is not in [0, ",
                     source_binding.world_size(), ")"));
  }
  const auto by_target = [](const auto& a, const auto& b) {
    return a.second < b.second;
  };
  TensorPairs ordered = pairs;
  std::stable_sort(ordered.begin(), ordered.end(), by_target);

  Planner planner(rank, source, target, source_binding, target_binding);
  planner.Reserve(ordered.size());
  for (const auto& [from, to] : ordered) {
    if (from >= source.size() || to >= target.size()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "plan: there is no pair (", from, ", ", to, ") in catalogs of ",
          source.size(), " and ", target.size(), " tensors"));
    }
    DSD_RETURN_IF_ERROR(planner.PlanPair(from, to));
  }
  return std::move(planner).Finish();
}

}  // namespace dsd
