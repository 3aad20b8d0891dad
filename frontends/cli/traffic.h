// SPDX-License-Identifier: Apache-2.0
//
// What a redistribution costs between whom, and what it must cost at least.

#ifndef DSD_FRONTENDS_CLI_TRAFFIC_H_
#define DSD_FRONTENDS_CLI_TRAFFIC_H_

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "dsd/core/plan/binding.h"
#include "dsd/core/plan/catalog.h"
#include "dsd/core/plan/plan.h"

namespace dsd::cli {

// Bytes of one rank.
struct RankTraffic {
  int64_t has = 0;    // in its source layout
  int64_t needs = 0;  // in its target layout
  int64_t read = 0;   // from storage
  int64_t kept = 0;   // copied or read where it is needed
  int64_t received = 0;
  int64_t sent = 0;

  int64_t busy() const { return received > sent ? received : sent; }
};

struct Traffic {
  std::vector<RankTraffic> ranks;
  // (from, to), of different ranks.
  std::map<std::pair<int, int>, int64_t> pairs;
  int64_t moves = 0;
  int64_t between = 0;  // bytes between ranks, summed over pairs
  int64_t kept = 0;
  int64_t read = 0;

  // The greatest busy(), and who has it; -1 if nothing moves.
  int busiest = -1;
  // No plan can have a busiest rank below this: a rank receives what it needs
  // and lacks; somebody sends what only some have and others need; all of it is
  // spread over the ranks.
  int64_t bound = 0;
};

// Plans all ranks, one after another. Errors: as PlanForRank.
absl::StatusOr<Traffic> TrafficOf(const Catalog& source, const Catalog& target,
                                  const Binding& binding);

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_TRAFFIC_H_
