// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/near_keys.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <tuple>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/frontends/cli/value_text.h"

namespace dsd::cli {
namespace {

constexpr size_t kMaxShown = 3;
// The distance of longer names is not looked at.
constexpr size_t kMaxLength = 300;

// Characters to insert, delete or replace; more than `limit` if that many do
// not do.
int64_t Distance(absl::string_view a, absl::string_view b, int64_t limit,
                 std::vector<int64_t>* row) {
  const int64_t n = static_cast<int64_t>(b.size());
  if (std::abs(static_cast<int64_t>(a.size()) - n) > limit) return limit + 1;
  row->resize(n + 1);
  std::iota(row->begin(), row->end(), int64_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    int64_t diagonal = (*row)[0];
    int64_t least = (*row)[0] = static_cast<int64_t>(i) + 1;
    for (int64_t j = 1; j <= n; ++j) {
      const int64_t replaced = diagonal + (a[i] != b[j - 1]);
      diagonal = (*row)[j];
      (*row)[j] = std::min({diagonal + 1, (*row)[j - 1] + 1, replaced});
      least = std::min(least, (*row)[j]);
    }
    if (least > limit) return limit + 1;
  }
  return (*row)[n];
}

}  // namespace

std::vector<std::string> NearKeys(absl::Span<const absl::string_view> keys,
                                  absl::string_view wanted) {
  if (wanted.empty() || wanted.size() > kMaxLength) return {};
  const int64_t limit = 1 + static_cast<int64_t>(wanted.size()) / 4;
  using Candidate = std::tuple<bool, int64_t, absl::string_view>;
  std::vector<Candidate> found;
  std::vector<int64_t> row;
  for (const absl::string_view key : keys) {
    if (absl::StrContains(key, wanted)) {
      found.emplace_back(false, key.size(), key);
      continue;
    }
    const int64_t distance = Distance(wanted, key, limit, &row);
    if (distance <= limit) found.emplace_back(true, distance, key);
  }
  const size_t shown = std::min(found.size(), kMaxShown);
  std::partial_sort(found.begin(), found.begin() + shown, found.end());
  std::vector<std::string> out;
  for (size_t i = 0; i < shown; ++i) {
    const auto& [is_changed, distance, key] = found[i];
    // Not what is much farther away than the best.
    if (is_changed && distance > std::get<1>(found[0]) + 2) break;
    out.emplace_back(key);
  }
  return out;
}

std::string DidYouMean(absl::Span<const absl::string_view> keys,
                       absl::string_view wanted) {
  const std::vector<std::string> near = NearKeys(keys, wanted);
  std::string out;
  for (size_t i = 0; i < near.size(); ++i) {
    absl::StrAppend(&out,
                    i == 0                ? "; did you mean "
                    : i + 1 < near.size() ? ", "
                                          : " or ",
                    "\"", Printable(near[i]), "\"");
  }
  if (!out.empty()) out += "?";
  return out;
}

}  // namespace dsd::cli
