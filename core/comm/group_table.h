// SPDX-License-Identifier: Apache-2.0
//
// The state behind Membership: who is in which group, which groups have failed.
// No threads, no clock, no input or output: stores feed it and deliver what it
// answers.

#ifndef DSD_CORE_COMM_GROUP_TABLE_H_
#define DSD_CORE_COMM_GROUP_TABLE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace dsd {

// Thread-compatible.
class GroupTable {
 public:
  using MemberId = uint64_t;  // given by the caller, unique

  enum class EventKind {
    kJoined,  // the answer to Join
    kFailed,  // the group has failed
    kLeft,    // the answer to Leave
  };
  struct Event {
    MemberId member;
    EventKind kind;
    absl::Status status;
  };
  struct Member {
    MemberId id;
    int rank;
  };

  // Answered by one kJoined event, of this call or a later one.
  std::vector<Event> Join(MemberId member, absl::string_view group, int rank,
                          int size, absl::string_view facts,
                          absl::Duration patience, absl::Time now);

  // Answered by one kLeft event, when all members of the group have called it.
  std::vector<Event> Leave(MemberId member);

  std::vector<Event> Fail(MemberId member, const absl::Status& status);

  // The member is gone. If others are at work, the group fails with
  // Unavailable: rank <r> <how>. If they still wait for ranks, that happens at
  // `may_return_until`, unless the rank has joined again.
  std::vector<Event> Remove(
      MemberId member, absl::string_view how,
      absl::Time may_return_until = absl::InfiniteFuture());

  // The group fails, as found by another: the member hears of it, too.
  std::vector<Event> Break(MemberId member, const absl::Status& status);

  // Joins whose time is over, and ranks that have not come back. `hindrance`:
  // why none can come at present, which makes it ResourceExhausted that one has
  // not; empty if none is known.
  std::vector<Event> Expire(absl::Time now, absl::string_view hindrance = "");
  absl::Time NextExpiry() const;

  // All members that have joined the group of `member`, by rank; empty if it is
  // in none.
  std::vector<Member> Peers(MemberId member) const;

  // Whether a group of this name has come together, and all have left it.
  bool WasDissolved(absl::string_view group) const;

 private:
  enum class State { kJoining, kJoined, kLeaving };
  struct Place {
    MemberId id;
    State state;
    absl::Time deadline;
    absl::Duration patience;
  };
  struct Lost {
    std::string how;
    absl::Time may_return_until;
  };
  struct Group {
    int size = 0;
    int first_rank = 0;  // whose `size` and `facts` the others are compared to
    std::string facts;
    bool complete = false;
    bool dissolved = false;
    absl::Status failure;
    absl::btree_map<int, Place> places;  // by rank
    absl::btree_map<int, Lost> lost;     // by rank; until it is complete
  };
  struct Seat {
    std::string group;
    int rank;
  };

  std::vector<Event> FailGroup(Group& group, const absl::Status& status,
                               int except_rank);

  absl::btree_map<std::string, Group> groups_;
  absl::flat_hash_map<MemberId, Seat> seats_;
};

}  // namespace dsd

#endif  // DSD_CORE_COMM_GROUP_TABLE_H_
