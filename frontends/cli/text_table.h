// SPDX-License-Identifier: Apache-2.0
//
// Text for people: aligned columns and sizes with units.

#ifndef DSD_FRONTENDS_CLI_TEXT_TABLE_H_
#define DSD_FRONTENDS_CLI_TEXT_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace dsd::cli {

// "512 B", "1.50 KiB", "12.3 GiB".
std::string FormatBytes(int64_t bytes);

// "1,797".
std::string FormatCount(int64_t count);

// "1 tensor", "2 tensors".
std::string Plural(int64_t count, absl::string_view noun);

// Columns of text, as wide as their widest cell.
class TextTable {
 public:
  enum class Align { kLeft, kRight };

  // `headings` and `aligns` are of one length.
  TextTable(std::vector<std::string> headings, std::vector<Align> aligns);

  // One cell per column. Text as Printable gives it, or marked by Context.
  void AddRow(std::vector<std::string> cells);

  // With `styled`, the headings are bold.
  std::string ToString(bool styled) const;

 private:
  std::vector<Align> aligns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_TEXT_TABLE_H_
