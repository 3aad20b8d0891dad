// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/comm/whereabouts.h"

#include <algorithm>
#include <cstddef>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "dsd/core/comm/duration_text.h"
#include "dsd/core/comm/rank_list.h"

namespace dsd {

std::string Whereabouts::Encode() const {
  return absl::StrCat(collectives, " ", idle ? 0 : 1, " ", waited_for, " ",
                      absl::ToInt64Milliseconds(waited), " ", call, "\n",
                      collective);
}

Whereabouts Whereabouts::Decode(absl::string_view text, int size) {
  Whereabouts out;
  std::vector<absl::string_view> fields =
      absl::StrSplit(text, absl::MaxSplits(' ', 4));
  fields.resize(5);
  if (!absl::SimpleAtoi(fields[0], &out.collectives)) out.collectives = 0;
  out.idle = fields[1] != "1";
  int peer = -1;
  int64_t milliseconds = 0;
  if (absl::SimpleAtoi(fields[2], &peer) && peer >= 0 && peer < size &&
      absl::SimpleAtoi(fields[3], &milliseconds)) {
    out.waited_for = peer;
    out.waited = absl::Milliseconds(milliseconds);
  }
  const std::pair<absl::string_view, absl::string_view> calls =
      absl::StrSplit(fields[4], absl::MaxSplits('\n', 1));
  out.call = std::string(calls.first);
  out.collective = std::string(calls.second);
  return out;
}

void Position::Begin(uint64_t lane, absl::string_view call, bool collective,
                     absl::Time now, absl::Duration timeout) {
  OfLane& on = lanes_[lane];
  on.call = std::string(call);
  if (collective) {
    on.collective = on.call;
    ++on.collectives;
  }
  ++on.active;
  if (on.longest.to < now - timeout) on.longest = {};
}

void Position::End(uint64_t lane) { --lanes_[lane].active; }

void Position::WaitFor(uint64_t lane, int peer, absl::Time now) {
  OfLane& on = lanes_[lane];
  if (on.wait.peer >= 0) {
    on.wait.to = now;
    if (on.longest.peer < 0 || on.wait.Length(now) >= on.longest.Length(now)) {
      on.longest = on.wait;
    }
  }
  on.wait = {peer, now, absl::InfiniteFuture()};
}

Whereabouts Position::On(uint64_t lane, absl::Time now) const {
  Whereabouts out;
  if (const auto it = lanes_.find(lane); it != lanes_.end()) {
    const OfLane& on = it->second;
    out.collectives = on.collectives;
    out.idle = on.active == 0;
    out.call = on.call;
    out.collective = on.collective;
  }
  for (const auto& [unused, on] : lanes_) {
    for (const Wait& wait : {on.longest, on.wait}) {
      if (wait.peer < 0 || wait.Length(now) < out.waited) continue;
      out.waited_for = wait.peer;
      out.waited = wait.Length(now);
    }
  }
  return out;
}

absl::Status ExplainLateCall(
    const LateCall& late, absl::Span<const std::optional<Whereabouts>> ranks) {
  const auto does = [&](int rank) {
    const std::optional<Whereabouts>& its = ranks[rank];
    if (!its.has_value()) return std::string("does not answer");
    return its->idle ? "is in no call" : absl::StrCat("is in ", its->call);
  };
  // For whom a rank has waited so long that it may be why it is late.
  const auto waited_for = [&](int rank) {
    const std::optional<Whereabouts>& its = ranks[rank];
    return its.has_value() && its->waited * 10 >= late.timeout ? its->waited_for
                                                               : -1;
  };
  // What a rank does and for whom it has waited, who may have waited in turn.
  // Of each rank once, and nothing of this one.
  absl::flat_hash_set<int> told = {late.rank};
  const auto story = [&](int rank) {
    std::string text;
    while (told.insert(rank).second) {
      absl::StrAppend(&text, text.empty() ? "" : ", which ", does(rank));
      const int next = waited_for(rank);
      if (next < 0) break;
      absl::StrAppend(&text, " and has waited ",
                      DurationText(ranks[rank]->waited), " for rank ", next);
      rank = next;
    }
    return text;
  };
  const auto list = [](const std::vector<int>& some, const auto& describe) {
    const size_t named = std::min(some.size(), kMaxRanksNamed);
    std::vector<std::string> entries;
    for (size_t i = 0; i < named; ++i) entries.push_back(describe(some[i]));
    return absl::StrCat(
        absl::StrJoin(entries, ", "),
        named < some.size()
            ? absl::StrCat(" and ", some.size() - named, " more")
            : "");
  };

  const Whereabouts mine = ranks[late.rank].value_or(Whereabouts());
  std::vector<int> absent;     // have not made this call
  std::vector<int> differing;  // have made another one instead
  for (int rank = 0; rank < static_cast<int>(ranks.size()); ++rank) {
    if (rank == late.rank ||
        (!late.members.empty() && !absl::c_linear_search(late.members, rank))) {
      continue;
    }
    // A message concerns its two ends only.
    if (!late.collective && !absl::c_linear_search(late.peers, rank)) continue;
    const std::optional<Whereabouts>& its = ranks[rank];
    if (!its.has_value() || its->collectives < mine.collectives) {
      absent.push_back(rank);
    } else if (late.collective && its->collectives == mine.collectives &&
               its->collective != late.text) {
      differing.push_back(rank);
    }
  }
  std::string why;
  absl::StatusCode code = absl::StatusCode::kDeadlineExceeded;
  if (!absent.empty()) {
    why = absl::StrCat("not called by ", list(absent, [&](int rank) {
                         const std::string tale = story(rank);
                         return absl::StrCat(
                             "rank ", rank,
                             tale.empty() ? "" : absl::StrCat(" (", tale, ")"));
                       }));
  } else if (!differing.empty()) {
    code = absl::StatusCode::kFailedPrecondition;
    why = absl::StrCat("ranks disagree: ", list(differing, [&](int rank) {
                         const Whereabouts& its = *ranks[rank];
                         // Perhaps it has given up already.
                         return absl::StrCat(
                             "rank ", rank, " ",
                             its.idle || its.call != its.collective
                                 ? absl::StrCat("has called ", its.collective)
                                 : does(rank));
                       }));
  } else if (late.collective) {
    why = "all ranks have called it";
  }
  if (!late.missing.empty()) absl::StrAppend(&why, "; ", late.missing);
  for (size_t i = 0; i < std::min(late.peers.size(), kMaxRanksNamed); ++i) {
    const std::string tale = story(late.peers[i]);
    if (!tale.empty()) {
      absl::StrAppend(&why, "; rank ", late.peers[i], " ", tale);
    }
  }
  // It may have waited for another before.
  if (const int before = waited_for(late.rank);
      before >= 0 && !absl::c_linear_search(late.peers, before)) {
    absl::StrAppend(&why, "; rank ", late.rank, " has waited ",
                    DurationText(mine.waited), " for rank ", before);
    const std::string tale = story(before);
    if (!tale.empty()) absl::StrAppend(&why, ", which ", tale);
  }
  return absl::Status(
      code, absl::StrCat(late.text, " ", late.here, " did not finish within ",
                         DurationText(late.timeout), ": ",
                         absl::StripPrefix(why, "; ")));
}

}  // namespace dsd
