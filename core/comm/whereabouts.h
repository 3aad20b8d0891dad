// SPDX-License-Identifier: Apache-2.0
//
// What ranks do, and for whom they wait: asked when a call's time is over, so
// that the error names the cause. Private to this package.

#ifndef DSD_CORE_COMM_WHEREABOUTS_H_
#define DSD_CORE_COMM_WHEREABOUTS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace dsd {

// What one rank says of itself.
struct Whereabouts {
  int64_t collectives = 0;  // started on the lane
  bool idle = true;         // in no call there
  std::string call;         // the last one there
  std::string collective;   // the last of those
  // For whose messages it has waited longest, on whichever lane; -1: nobody's.
  int waited_for = -1;
  absl::Duration waited;

  std::string Encode() const;
  // Of a group of `size`. What is not understood stays as above.
  static Whereabouts Decode(absl::string_view text, int size);
};

// Where one rank is, on all lanes. Thread-compatible.
class Position {
 public:
  // A call begins. Waits that ended more than `timeout` ago are forgotten: no
  // deadline of now is missed for them.
  void Begin(uint64_t lane, absl::string_view call, bool collective,
             absl::Time now, absl::Duration timeout);
  void End(uint64_t lane);
  // From now on the call waits for a message of `peer`, or for none (-1).
  void WaitFor(uint64_t lane, int peer, absl::Time now);

  Whereabouts On(uint64_t lane, absl::Time now) const;

 private:
  struct Wait {
    int peer = -1;
    absl::Time from;
    absl::Time to;  // InfiniteFuture: under way
    absl::Duration Length(absl::Time now) const {
      return std::min(to, now) - from;
    }
  };
  struct OfLane {
    std::string call;
    std::string collective;
    int64_t collectives = 0;
    int active = 0;
    Wait wait;
    Wait longest;
  };
  absl::flat_hash_map<uint64_t, OfLane> lanes_;
};

// A call whose time is over.
struct LateCall {
  absl::string_view text;
  bool collective = false;
  absl::Duration timeout;
  int rank = 0;              // that says so
  std::string here;          // "on rank 0 of group "world""
  std::vector<int> members;  // whose call it is; empty: everybody's
  // What did not happen, as "no message came from rank 1", and on whose side.
  std::string missing;
  std::vector<int> peers;
};

// The error, DeadlineExceeded or FailedPrecondition, from what all ranks say;
// nullopt for those who do not answer.
absl::Status ExplainLateCall(
    const LateCall& late, absl::Span<const std::optional<Whereabouts>> ranks);

}  // namespace dsd

#endif  // DSD_CORE_COMM_WHEREABOUTS_H_
