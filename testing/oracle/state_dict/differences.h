// SPDX-License-Identifier: Apache-2.0
//
// Where dsd means to differ from Python: each row of the table changes what
// Python gave into what is meant, so that all the rest is still compared with
// Python bit for bit. Each row has one in docs/semantics.md.

#ifndef DSD_TESTING_ORACLE_STATE_DICT_DIFFERENCES_H_
#define DSD_TESTING_ORACLE_STATE_DICT_DIFFERENCES_H_

#include <map>
#include <set>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/testing/oracle/state_dict/golden_file.h"

namespace dsd::oracle {

struct Difference {
  absl::string_view name;
  absl::string_view issue;  // of pytorch/pytorch; empty: none was found
  absl::string_view what;
};

absl::Span<const Difference> AllDifferences();

// Difference -> the configurations in which it made a change.
using Occurrences = std::map<std::string, std::set<int>>;

// What dsd means to give on this rank. A call that is meant to fail is the one
// line "raised".
Outcome IntendedGet(const GoldenFile& file, const Configuration& c, int rank,
                    Occurrences& occurrences);
Outcome IntendedSet(const GoldenFile& file, const Configuration& c, int rank,
                    Occurrences& occurrences);

}  // namespace dsd::oracle

#endif  // DSD_TESTING_ORACLE_STATE_DICT_DIFFERENCES_H_
