// SPDX-License-Identifier: Apache-2.0

#ifndef DSD_FRONTENDS_CHECKPOINT_RENAME_RULES_H_
#define DSD_FRONTENDS_CHECKPOINT_RENAME_RULES_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "dsd/core/value/value.h"

namespace dsd::checkpoint {

// New keys for old ones, by rules "OLD=NEW". OLD is a whole key; each `*` in it
// stands for any text, the shortest that fits, also for none. The `*` in NEW
// stand for the same texts, in order; there may be fewer:
//
//   model.*=*                     strips a prefix
//   *=model.*                     adds one
//   *.attn.qkv.*=*.attention.*    replaces a part
//
// The first rule that fits a key gives its new name; a key that none fits keeps
// its own. There is no way to write a `*` or, in OLD, a `=` that stands for
// itself.
class RenameRules {
 public:
  // InvalidArgument for text without "=", an empty OLD or NEW, and more `*` in
  // NEW than in OLD.
  absl::Status Add(absl::string_view rule);

  bool empty() const { return rules_.empty(); }

  // Linear in the length of the key for each rule and `*`.
  std::string Apply(absl::string_view key) const;

 private:
  struct Rule {
    std::vector<std::string> from;  // the texts between the `*`
    std::vector<std::string> to;
  };
  static std::optional<std::string> Apply(const Rule& rule,
                                          absl::string_view key);

  std::vector<Rule> rules_;
};

// The path of a key that was at `path` and is named `key` now: parts at the
// beginning and the end that have not changed stay parts, what is between is
// one.
Path RenamedPath(const Path& path, absl::string_view key);

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_RENAME_RULES_H_
