// SPDX-License-Identifier: Apache-2.0
//
// Ranks in error texts.

#ifndef DSD_CORE_COMM_RANK_LIST_H_
#define DSD_CORE_COMM_RANK_LIST_H_

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace dsd {

inline constexpr size_t kMaxRanksNamed = 8;

// "rank 3", "ranks 1, 2", "ranks 1, 2, ... and 5 more".
inline std::string RankList(const std::vector<int>& ranks) {
  const size_t named = std::min(ranks.size(), kMaxRanksNamed);
  std::string text =
      absl::StrCat(ranks.size() == 1 ? "rank " : "ranks ",
                   absl::StrJoin(ranks.begin(), ranks.begin() + named, ", "));
  if (named < ranks.size()) {
    absl::StrAppend(&text, " and ", ranks.size() - named, " more");
  }
  return text;
}

}  // namespace dsd

#endif  // DSD_CORE_COMM_RANK_LIST_H_
