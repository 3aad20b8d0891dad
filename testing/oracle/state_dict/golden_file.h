// SPDX-License-Identifier: Apache-2.0
//
// The golden file of state_dict_oracle.py: configurations, how to build their
// models and optimizers, and what Python gave.

#ifndef DSD_TESTING_ORACLE_STATE_DICT_GOLDEN_FILE_H_
#define DSD_TESTING_ORACLE_STATE_DICT_GOLDEN_FILE_H_

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dsd::oracle {

// Lines that describe a result: the first says how the call ended, "ok" or
// "raised ...", the others what there is then.
using Lines = std::vector<std::string>;

// The results of one rank.
struct Outcome {
  Lines model;
  Lines optimizers;
};

struct Configuration {
  int number = 0;
  std::map<std::string, std::string> axes;
  std::vector<Outcome> get;  // by rank
  std::vector<Outcome> set;
  // Where the set fails or goes wrong in Python: the same by a way that works.
  // Empty otherwise.
  std::vector<Outcome> path;

  const std::string& of(const std::string& axis) const { return axes.at(axis); }
  bool Is(const std::string& axis, absl::string_view value) const {
    return of(axis) == value;
  }
  bool Has(const std::string& axis) const { return Is(axis, "yes"); }
  // 0: without a communicator.
  int world() const { return Is("world", "none") ? 0 : of("world")[0] - '0'; }
  int num_ranks() const { return static_cast<int>(get.size()); }
  std::string ToString() const;
};

struct OptimizerSpec {
  std::string kind;                  // Python's class
  std::vector<std::string> entries;  // of a parameter's state, in order
  // Name and value of each hyperparameter, as in configurations.py, by side.
  std::map<std::string, std::vector<std::pair<std::string, std::string>>>
      hyperparameters;
};

struct GoldenFile {
  std::map<std::string, Lines> models;  // lines as in configurations.py
  std::map<std::string, OptimizerSpec> optimizers;
  std::vector<Configuration> configurations;
};

// The contents of a file; unpacked if its name ends in ".gz".
absl::StatusOr<std::string> ReadText(const std::string& path);

absl::StatusOr<GoldenFile> ParseGoldenFile(absl::string_view text);

}  // namespace dsd::oracle

#endif  // DSD_TESTING_ORACLE_STATE_DICT_GOLDEN_FILE_H_
