// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/named_layout.h"

#include <fnmatch.h>

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/value_text.h"

namespace dsd::cli {
namespace {

// Pairs of ranks are listed, and all of them planned here.
constexpr int64_t kMaxRanks = 1024;

absl::Status Unclear(absl::string_view text, absl::string_view why) {
  return absl::InvalidArgumentError(
      absl::StrCat("\"", Printable(text), "\" is no layout: ", why,
                   "; expected MESH:PLACEMENTS, such as 4, 8:R or 2x4:R,S0"));
}

absl::StatusOr<Placement> ParsePlacement(absl::string_view text) {
  const std::string upper = absl::AsciiStrToUpper(text);
  absl::string_view rest = upper;
  if (rest == "R") return Replicate();
  Placement placement;
  const bool strided = absl::ConsumePrefix(&rest, "SS");
  if (strided || absl::ConsumePrefix(&rest, "S")) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(rest, absl::MaxSplits('/', 1));
    placement.kind =
        strided ? Placement::Kind::kStridedShard : Placement::Kind::kShard;
    if (absl::SimpleAtoi(parts.first, &placement.dim) &&
        (strided ? absl::SimpleAtoi(parts.second, &placement.split_factor)
                 : rest.find('/') == absl::string_view::npos)) {
      return placement;
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("\"", Printable(text),
                   "\" is none of R, S<dimension>, SS<dimension>/<factor>"));
}

}  // namespace

absl::StatusOr<NamedLayouts::Rule> NamedLayouts::ParseRule(
    absl::string_view text) {
  Rule rule;
  rule.pattern = "*";
  absl::string_view layout = text;
  const size_t equals = text.rfind('=');
  if (equals != absl::string_view::npos) {
    rule.pattern = std::string(text.substr(0, equals));
    layout = text.substr(equals + 1);
  }
  rule.text = std::string(layout);
  const std::vector<absl::string_view> halves = absl::StrSplit(layout, ':');
  if (halves.size() > 2) return Unclear(text, "it has more than one colon");
  int64_t ranks = 1;
  for (const absl::string_view extent :
       absl::StrSplit(halves[0], absl::ByAnyChar("xX"))) {
    int64_t value = 0;
    if (!absl::SimpleAtoi(extent, &value) || value < 1 || value > kMaxRanks ||
        (ranks *= value) > kMaxRanks) {
      return Unclear(
          text, absl::StrCat("\"", Printable(halves[0]),
                             "\" is no mesh of 1 to ", kMaxRanks, " ranks"));
    }
    rule.mesh.push_back(value);
  }
  if (halves.size() == 1) {
    if (rule.mesh.size() > 1) {
      return Unclear(text, "a mesh of several dimensions needs placements");
    }
    rule.placements = {Shard(0)};
    return rule;
  }
  for (const absl::string_view part : absl::StrSplit(halves[1], ',')) {
    const absl::StatusOr<Placement> placement = ParsePlacement(part);
    if (!placement.ok()) return Unclear(text, placement.status().message());
    rule.placements.push_back(*placement);
  }
  if (rule.placements.size() != rule.mesh.size()) {
    return Unclear(text, absl::StrCat("it has ", rule.placements.size(),
                                      " placements for a mesh of ",
                                      rule.mesh.size(), " dimensions"));
  }
  return rule;
}

absl::StatusOr<NamedLayouts> NamedLayouts::Parse(
    absl::Span<const std::string> texts) {
  NamedLayouts out;
  bool has_default = false;
  for (const std::string& text : texts) {
    DSD_ASSIGN_OR_RETURN(Rule rule, ParseRule(text));
    has_default |= rule.pattern == "*";
    out.rules_.push_back(std::move(rule));
  }
  if (!has_default) {
    return absl::InvalidArgumentError(
        "a layout for all keys is missing: give one without a pattern");
  }
  return out;
}

absl::StatusOr<Layout> NamedLayouts::For(
    absl::string_view key, absl::Span<const int64_t> shape) const {
  const std::string name(key);
  const Rule* chosen = nullptr;
  for (const Rule& rule : rules_) {
    if (fnmatch(rule.pattern.c_str(), name.c_str(), 0) == 0) chosen = &rule;
  }
  const int ndim = static_cast<int>(shape.size());
  std::vector<Placement> placements = chosen->placements;
  for (Placement& placement : placements) {
    if (placement.dim >= ndim || placement.dim < -ndim) {
      placement = Replicate();
    }
  }
  absl::StatusOr<Layout> layout =
      Layout::FromPlacements(Dims(shape.begin(), shape.end()),
                             DeviceMesh::Iota(chosen->mesh), placements);
  DSD_RETURN_IF_ERROR(layout.status())
      << "\"" << Printable(key) << "\" as " << chosen->text;
  return layout;
}

int NamedLayouts::num_ranks() const {
  int64_t most = 1;
  for (const Rule& rule : rules_) {
    int64_t ranks = 1;
    for (const int64_t extent : rule.mesh) ranks *= extent;
    most = std::max(most, ranks);
  }
  return static_cast<int>(most);
}

std::string NamedLayouts::ToString() const {
  return absl::StrJoin(rules_, " ", [](std::string* out, const Rule& rule) {
    if (rule.pattern != "*") absl::StrAppend(out, Printable(rule.pattern), "=");
    absl::StrAppend(out, Printable(rule.text));
  });
}

}  // namespace dsd::cli
