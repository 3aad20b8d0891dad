// SPDX-License-Identifier: Apache-2.0
//
// The planner: from two catalogs to the moves of one rank. A pure function;
// every rank computes its own part alone and all parts fit together.

#ifndef DSD_CORE_PLAN_PLAN_H_
#define DSD_CORE_PLAN_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/plan/binding.h"
#include "dsd/core/plan/catalog.h"

namespace dsd {

// One box of one tensor goes from one rank to others. The provider reads the
// box from its source (its own part, or storage that any rank can read) once,
// or, if it is relayed, from its target, into which it has received it.
struct Move {
  size_t source_tensor;  // index in the source catalog
  size_t target_tensor;  // index in the target catalog
  Box box;
  DType wire_dtype;  // of the bytes on the wire, see PlanForRank
  int provider;      // rank
  // The provider is itself a reader: a local copy. False in the plans of the
  // other ranks.
  bool provider_keeps;
  // The provider passes on what a move that is not relayed brings it. All of
  // those come before all of these.
  bool relayed;
  // Other ranks that receive the box, ascending, without the provider. In the
  // plan of a rank that is not the provider: only that rank.
  absl::InlinedVector<int, 2> readers;

  int64_t wire_bytes() const {  // per reader
    return box.num_elements() * ItemSize(wire_dtype);
  }
};

struct PlanCost {
  int64_t bytes_local = 0;  // copied without the network
  int64_t bytes_sent = 0;   // summed over readers
  int64_t bytes_received = 0;
  int64_t moves = 0;
  int64_t operations = 0;  // elementary planning steps
};

// The part of one rank: moves in which it is provider or reader, in an order
// that is the same on all ranks (target tensor, lower corner of the box, upper
// corner, provider). Two ranks list the moves between them in the same order:
// the stream of bytes from one to the other is defined by it.
struct Plan {
  int rank = 0;
  std::vector<Move> moves;
  PlanCost cost;
};

// Pairs of tensors to redistribute: (source index, target index).
using TensorPairs = std::vector<std::pair<size_t, size_t>>;

// The pairs with equal names, in target order. Tensors on one side only are
// left out: deciding whether that is an error is the caller's.
TensorPairs MatchByName(const Catalog& source, const Catalog& target);

// Joint cells of more bytes than this are divided among their replicas.
inline constexpr int64_t kSplitBytes = int64_t{64} << 10;

// Plans what `rank` does. For each element that a target holder needs: a rank
// that has a source replica copies locally; otherwise the element comes from
// exactly one provider, on the reader's host if one is there, else by rotation;
// joint cells over kSplitBytes are cut evenly over their providers, into no
// more parts than there are kSplitBytes in them. A source kAnyHolder is
// provided by one of the ranks that need the cell (by all of them in turn for a
// large cell), which sends it on to the others; a target kAnyHolder is taken by
// one of the ranks that have it, or, where the source is kAnyHolder too, by any
// rank. All are the lowest byte count for the network and are spread over the
// candidates. Where more ranks of a host need a cell of kSplitBytes or more
// than have it there, or several and it comes from other hosts, its parts go to
// one of these readers each, which relays it to the others: it reaches a host
// once, and nobody sends much more than it needs to any (scatter and
// all-gather). That is not done if the target's type differs from the wire's.
//
// Costs O(what the rank owns and copies), whatever the world size, where
// bindings are one-to-one; cells from kAnyHolder to kAnyHolder are looked at by
// every rank. wire_dtype is the target's if its items are smaller than the
// source's or if the source is kAnyHolder, else the source's. Errors:
// InvalidArgument if shapes of a pair differ (both named), for a pair or a rank
// that does not exist, and for bindings of different worlds or hosts;
// FailedPrecondition if a needed element has no source holder on any rank (key,
// box and shape named).
absl::StatusOr<Plan> PlanForRank(int rank, const Catalog& source,
                                 const Catalog& target,
                                 const TensorPairs& pairs,
                                 const Binding& source_binding,
                                 const Binding& target_binding);

// The plan in words: bytes and moves per pair of ranks, the busiest rank, and
// the moves themselves; at most `max_moves` pairs and moves. Given the plans of
// several ranks, what is between two of them counts once.
std::string Explain(const Catalog& source, const Catalog& target,
                    const std::vector<Plan>& plans, int max_moves = 32);

}  // namespace dsd

#endif  // DSD_CORE_PLAN_PLAN_H_
