// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/group_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "dsd/core/comm/duration_text.h"
#include "dsd/core/comm/rank_list.h"
#include "dsd/core/comm/world_size.h"

namespace dsd {

std::vector<GroupTable::Event> GroupTable::FailGroup(Group& group,
                                                     const absl::Status& status,
                                                     int except_rank) {
  group.failure = status;
  std::vector<Event> events;
  std::vector<int> gone;
  for (auto& [rank, place] : group.places) {
    switch (place.state) {
      case State::kJoining:
        events.push_back({place.id, EventKind::kJoined, status});
        gone.push_back(rank);
        break;
      case State::kJoined:
        if (rank == except_rank) break;
        events.push_back({place.id, EventKind::kFailed, status});
        break;
      case State::kLeaving:
        events.push_back({place.id, EventKind::kLeft, status});
        gone.push_back(rank);
        break;
    }
  }
  for (int rank : gone) {
    seats_.erase(group.places.at(rank).id);
    group.places.erase(rank);
  }
  return events;
}

std::vector<GroupTable::Event> GroupTable::Join(
    MemberId member, absl::string_view group_name, int rank, int size,
    absl::string_view facts, absl::Duration patience, absl::Time now) {
  const auto refuse = [&](const absl::Status& status) {
    return std::vector<Event>{{member, EventKind::kJoined, status}};
  };
  if (size < 1 || rank < 0 || rank >= size) {
    return refuse(absl::InvalidArgumentError(
        absl::StrCat("rank ", rank, " is not in [0, ", size, ")")));
  }
  if (size > kMaxWorldSize) {
    return refuse(absl::InvalidArgumentError(
        absl::StrCat(size, " ranks, expected at most ", kMaxWorldSize)));
  }
  Group& group = groups_[std::string(group_name)];
  if (!group.failure.ok()) return refuse(group.failure);
  if (group.dissolved) group = Group();
  // A newcomer, perhaps of another job, does not disturb those who are at work.
  if (group.complete) {
    return refuse(absl::FailedPreconditionError(absl::StrCat(
        "all ", group.size,
        " ranks of the group are connected already, and "
        "another process says that it is rank ",
        rank, " of ", size, "; give jobs different values of MASTER_PORT")));
  }

  // A disagreement is an error for those who are waiting, too.
  const auto disagree = [&](const std::string& text) {
    const absl::Status status = absl::FailedPreconditionError(text);
    std::vector<Event> events = FailGroup(group, status, -1);
    events.push_back({member, EventKind::kJoined, status});
    return events;
  };
  if (group.places.empty()) {
    group.size = size;
    group.facts = std::string(facts);
    group.first_rank = rank;
  } else if (group.size != size) {
    return disagree(absl::StrCat("ranks disagree: rank ", rank, " says that ",
                                 size, " ranks take part, rank ",
                                 group.first_rank, " that ", group.size));
  } else if (group.facts != facts) {
    return disagree(absl::StrCat("ranks disagree: rank ", rank, " has ", facts,
                                 ", rank ", group.first_rank, " has ",
                                 group.facts));
  }
  if (group.places.contains(rank)) {
    return disagree(absl::StrCat("two processes say that they are rank ", rank,
                                 " of ", size));
  }
  group.lost.erase(rank);
  group.places[rank] = {member, State::kJoining, now + patience, patience};
  seats_[member] = {std::string(group_name), rank};
  std::vector<Event> events;
  if (static_cast<int>(group.places.size()) == group.size) {
    group.complete = true;
    for (auto& [r, place] : group.places) {
      place.state = State::kJoined;
      events.push_back({place.id, EventKind::kJoined, absl::OkStatus()});
    }
  }
  return events;
}

std::vector<GroupTable::Event> GroupTable::Leave(MemberId member) {
  const auto seat = seats_.find(member);
  if (seat == seats_.end()) {
    return {{member, EventKind::kLeft,
             absl::FailedPreconditionError("not a member of the group")}};
  }
  Group& group = groups_.at(seat->second.group);
  if (!group.failure.ok()) {
    return {{member, EventKind::kLeft, group.failure}};
  }
  group.places.at(seat->second.rank).state = State::kLeaving;
  for (const auto& [rank, place] : group.places) {
    if (place.state != State::kLeaving) return {};
  }
  std::vector<Event> events;
  for (const auto& [rank, place] : group.places) {
    events.push_back({place.id, EventKind::kLeft, absl::OkStatus()});
    seats_.erase(place.id);
  }
  group.places.clear();
  group.dissolved = true;
  return events;
}

std::vector<GroupTable::Event> GroupTable::Fail(MemberId member,
                                                const absl::Status& status) {
  const auto seat = seats_.find(member);
  if (seat == seats_.end()) return {};
  Group& group = groups_.at(seat->second.group);
  if (!group.failure.ok()) return {};
  return FailGroup(group, status, seat->second.rank);
}

std::vector<GroupTable::Event> GroupTable::Remove(MemberId member,
                                                  absl::string_view how,
                                                  absl::Time may_return_until) {
  const auto seat = seats_.find(member);
  if (seat == seats_.end()) return {};
  Group& group = groups_.at(seat->second.group);
  const int rank = seat->second.rank;
  const State state = group.places.at(rank).state;
  group.places.erase(rank);
  seats_.erase(seat);
  if (!group.failure.ok()) return {};
  // One that the others still wait for may come again.
  if (state == State::kJoining) {
    if (may_return_until < absl::InfiniteFuture()) {
      group.lost[rank] = {std::string(how), may_return_until};
    }
    return {};
  }
  return FailGroup(
      group, absl::UnavailableError(absl::StrCat("rank ", rank, " ", how)), -1);
}

std::vector<GroupTable::Event> GroupTable::Break(MemberId member,
                                                 const absl::Status& status) {
  const auto seat = seats_.find(member);
  if (seat == seats_.end()) return {};
  Group& group = groups_.at(seat->second.group);
  if (!group.failure.ok()) return {};
  return FailGroup(group, status, -1);
}

std::vector<GroupTable::Event> GroupTable::Expire(absl::Time now,
                                                  absl::string_view hindrance) {
  std::vector<Event> events;
  for (auto& [name, group] : groups_) {
    if (group.complete) continue;
    const auto lost = std::find_if(
        group.lost.begin(), group.lost.end(), [&](const auto& entry) {
          return entry.second.may_return_until <= now;
        });
    if (lost != group.lost.end()) {
      const absl::Status status = absl::UnavailableError(
          absl::StrCat("rank ", lost->first, " ", lost->second.how,
                       " before all had connected"));
      group.lost.clear();
      // With nobody there who waits, all may come anew.
      if (group.places.empty()) continue;
      const std::vector<Event> failed = FailGroup(group, status, -1);
      events.insert(events.end(), failed.begin(), failed.end());
      continue;
    }
    absl::Duration patience = absl::InfiniteDuration();
    for (const auto& [rank, place] : group.places) {
      if (place.deadline <= now) patience = std::min(patience, place.patience);
    }
    if (patience == absl::InfiniteDuration()) continue;
    std::vector<int> absent;
    for (int rank = 0; rank < group.size; ++rank) {
      if (!group.places.contains(rank)) absent.push_back(rank);
    }
    const std::string text =
        absl::StrCat(RankList(absent), " of ", group.size,
                     " did not connect within ", DurationText(patience));
    const absl::Status status =
        hindrance.empty()
            ? absl::DeadlineExceededError(text)
            : absl::ResourceExhaustedError(absl::StrCat(text, ": ", hindrance));
    std::vector<Event> failed = FailGroup(group, status, -1);
    events.insert(events.end(), failed.begin(), failed.end());
  }
  return events;
}

absl::Time GroupTable::NextExpiry() const {
  absl::Time next = absl::InfiniteFuture();
  for (const auto& [name, group] : groups_) {
    if (group.complete) continue;
    for (const auto& [rank, place] : group.places) {
      next = std::min(next, place.deadline);
    }
    for (const auto& [rank, lost] : group.lost) {
      next = std::min(next, lost.may_return_until);
    }
  }
  return next;
}

std::vector<GroupTable::Member> GroupTable::Peers(MemberId member) const {
  std::vector<Member> peers;
  const auto seat = seats_.find(member);
  if (seat == seats_.end()) return peers;
  for (const auto& [rank, place] : groups_.at(seat->second.group).places) {
    peers.push_back({place.id, rank});
  }
  return peers;
}

bool GroupTable::WasDissolved(absl::string_view group) const {
  const auto it = groups_.find(group);
  return it != groups_.end() && it->second.dissolved;
}

}  // namespace dsd
