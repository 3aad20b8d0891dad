// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/text_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace dsd::cli {
namespace {

// Columns that a terminal needs, for text of the usual scripts: code points,
// without what marks colours.
size_t Width(absl::string_view text) {
  size_t width = 0;
  bool is_mark = false;
  for (const char c : text) {
    if (c == '\033') is_mark = true;
    width += !is_mark && (static_cast<unsigned char>(c) & 0xC0) != 0x80;
    if (c == 'm') is_mark = false;
  }
  return width;
}

}  // namespace

std::string FormatBytes(int64_t bytes) {
  if (bytes < 1024) return absl::StrCat(bytes, " B");
  static constexpr const char* kUnits[] = {"KiB", "MiB", "GiB",
                                           "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  while (value >= 999.5 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  const int digits = value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  return absl::StrFormat("%.*f %s", digits, value, kUnits[unit]);
}

std::string FormatCount(int64_t count) {
  std::string digits = absl::StrCat(count);
  const int first = count < 0 ? 1 : 0;
  for (int at = static_cast<int>(digits.size()) - 3; at > first; at -= 3) {
    digits.insert(at, ",");
  }
  return digits;
}

std::string Plural(int64_t count, absl::string_view noun) {
  return absl::StrCat(FormatCount(count), " ", noun, count == 1 ? "" : "s");
}

TextTable::TextTable(std::vector<std::string> headings,
                     std::vector<Align> aligns)
    : aligns_(std::move(aligns)), rows_({std::move(headings)}) {}

void TextTable::AddRow(std::vector<std::string> cells) {
  rows_.push_back(std::move(cells));
}

std::string TextTable::ToString(bool styled) const {
  std::vector<size_t> widths(aligns_.size(), 0);
  for (const auto& row : rows_) {
    for (size_t c = 0; c < row.size(); ++c) {
      widths[c] = std::max(widths[c], Width(row[c]));
    }
  }
  std::string out;
  for (size_t r = 0; r < rows_.size(); ++r) {
    std::string line;
    for (size_t c = 0; c < rows_[r].size(); ++c) {
      const std::string& cell = rows_[r][c];
      const std::string padding(widths[c] - Width(cell), ' ');
      absl::StrAppend(&line, c > 0 ? "  " : "",
                      aligns_[c] == Align::kRight ? padding : "", cell,
                      aligns_[c] == Align::kLeft ? padding : "");
    }
    line.erase(line.find_last_not_of(' ') + 1);
    if (r == 0 && styled) line = absl::StrCat("\033[1m", line, "\033[0m");
    absl::StrAppend(&out, line, "\n");
  }
  return out;
}

}  // namespace dsd::cli
