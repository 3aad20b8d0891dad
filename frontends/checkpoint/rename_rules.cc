// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/rename_rules.h"

#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "dsd/core/value/flatten.h"

namespace dsd::checkpoint {

absl::Status RenameRules::Add(absl::string_view rule) {
  const std::vector<absl::string_view> sides =
      absl::StrSplit(rule, absl::MaxSplits('=', 1));
  const auto bad = [&](absl::string_view what) {
    return absl::InvalidArgumentError(
        absl::StrCat("renaming rule \"", absl::CHexEscape(rule), "\": ", what));
  };
  if (sides.size() != 2) return bad("expected OLD=NEW");
  if (sides[0].empty() || sides[1].empty()) {
    return bad("neither side may be empty");
  }
  Rule parsed;
  parsed.from = absl::StrSplit(sides[0], '*');
  parsed.to = absl::StrSplit(sides[1], '*');
  if (parsed.to.size() > parsed.from.size()) {
    return bad("more `*` in the new name than in the old one");
  }
  rules_.push_back(std::move(parsed));
  return absl::OkStatus();
}

std::optional<std::string> RenameRules::Apply(const Rule& rule,
                                              absl::string_view key) {
  if (!absl::ConsumePrefix(&key, rule.from[0])) return std::nullopt;
  std::vector<absl::string_view> stars;
  for (size_t i = 1; i < rule.from.size(); ++i) {
    const std::string& text = rule.from[i];
    size_t at;
    if (i + 1 == rule.from.size()) {
      if (!absl::EndsWith(key, text)) return std::nullopt;
      at = key.size() - text.size();
    } else {
      at = key.find(text);
      if (at == absl::string_view::npos) return std::nullopt;
    }
    stars.push_back(key.substr(0, at));
    key.remove_prefix(at + text.size());
  }
  if (!key.empty()) return std::nullopt;
  std::string out = rule.to[0];
  for (size_t i = 1; i < rule.to.size(); ++i) {
    absl::StrAppend(&out, stars[i - 1], rule.to[i]);
  }
  return out;
}

std::string RenameRules::Apply(absl::string_view key) const {
  for (const Rule& rule : rules_) {
    std::optional<std::string> renamed = Apply(rule, key);
    if (renamed.has_value()) return *std::move(renamed);
  }
  return std::string(key);
}

Path RenamedPath(const Path& path, absl::string_view key) {
  if (JoinPath(path) == key) return path;
  size_t begin = 0;
  size_t end = path.size();
  const auto text = [&path](size_t i) { return JoinPath({path[i]}); };
  while (begin < end &&
         absl::ConsumePrefix(&key, absl::StrCat(text(begin), "."))) {
    ++begin;
  }
  while (end > begin) {
    const std::string last = text(end - 1);
    if (key == last) {
      key = "";
    } else if (!absl::ConsumeSuffix(&key, absl::StrCat(".", last))) {
      break;
    }
    --end;
    if (key.empty()) break;
  }
  Path out(path.begin(), path.begin() + static_cast<int64_t>(begin));
  if (!key.empty()) out.push_back(std::string(key));
  out.insert(out.end(), path.begin() + static_cast<int64_t>(end), path.end());
  return out;
}

}  // namespace dsd::checkpoint
