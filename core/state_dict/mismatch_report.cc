// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/mismatch_report.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace dsd {
namespace {

// Long enough for any report that a person reads.
constexpr size_t kShown = 200;

void AddKeys(const char* title, const std::vector<std::string>& keys,
             std::vector<std::string>& sections) {
  if (keys.empty()) return;
  const size_t shown = std::min(keys.size(), kShown);
  std::string text =
      absl::StrCat(title, " (", keys.size(), "): ",
                   absl::StrJoin(keys.begin(), keys.begin() + shown, ", ",
                                 [](std::string* out, const std::string& key) {
                                   absl::StrAppend(out, "\"", key, "\"");
                                 }));
  if (shown < keys.size()) {
    absl::StrAppend(&text, ", and ", keys.size() - shown, " more");
  }
  sections.push_back(std::move(text));
}

}  // namespace

void MismatchReport::Add(MismatchReport other) {
  const auto move_to = [](std::vector<std::string>& to,
                          std::vector<std::string>& from) {
    std::move(from.begin(), from.end(), std::back_inserter(to));
  };
  move_to(missing_state, other.missing_state);
  move_to(unexpected_state, other.unexpected_state);
  move_to(misfits, other.misfits);
}

absl::Status MismatchReport::ToStatus(bool strict) const {
  std::vector<std::string> sections;
  if (strict) {
    AddKeys("missing keys", model.missing_keys, sections);
    AddKeys("unexpected keys", model.unexpected_keys, sections);
    AddKeys("missing optimizer state", missing_state, sections);
    AddKeys("unexpected optimizer state", unexpected_state, sections);
    if (!sections.empty()) {
      if (!hint.empty()) sections.push_back(hint);
      sections.push_back("set strict = false to use what matches");
    }
  }
  const size_t shown = std::min(misfits.size(), kShown);
  sections.insert(sections.end(), misfits.begin(), misfits.begin() + shown);
  if (shown < misfits.size()) {
    sections.push_back(
        absl::StrCat("and ", misfits.size() - shown, " more misfits"));
  }
  if (sections.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the dict does not fit, nothing was changed: ",
                   absl::StrJoin(sections, "; ")));
}

}  // namespace dsd
