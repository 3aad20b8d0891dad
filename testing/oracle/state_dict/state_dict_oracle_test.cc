// SPDX-License-Identifier: Apache-2.0
//
// Get and set of models and optimizers against what Python gives, in all
// configurations of the golden file: every key, order, type, shape,
// distribution and element, apart from the differences of differences.cc.
//
// Arguments: the golden file; docs/semantics.md; and in live mode the command
// that runs Python and state_dict_oracle.py: then Python is asked again and
// must give what the golden file has.

#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/log/check.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/testing/harness/rank_threads.h"
#include "dsd/testing/oracle/state_dict/differences.h"
#include "dsd/testing/oracle/state_dict/golden_file.h"
#include "dsd/testing/oracle/state_dict/job.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::oracle {
namespace {

std::string golden_path;     // NOLINT: set once, by main
std::string semantics_path;  // NOLINT
std::string python_command;  // NOLINT: empty: no live mode
std::string oracle_script;   // NOLINT

// What dsd gives, by rank.
struct Results {
  std::vector<Outcome> get;
  std::vector<Outcome> set;
};

absl::StatusOr<Results> RunConfiguration(const GoldenFile& file,
                                         const Configuration& c) {
  Results results;
  results.get.resize(c.num_ranks());
  results.set.resize(c.num_ranks());
  const auto run = [&](int rank, Communicator* comm) {
    return TorchToStatus([&] {
      results.get[rank] = Get(file, c, comm);
      results.set[rank] = Set(file, c, comm);
    });
  };
  std::vector<absl::Status> statuses;
  if (c.world() == 0) {
    statuses.push_back(run(0, nullptr));
  } else {
    statuses = RunRankThreads(
        c.world(), [&](Communicator& comm) { return run(comm.rank(), &comm); });
  }
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return results;
}

// Empty if equal. A call that is meant to fail does so in any words, and leaves
// all as it was.
std::string Compare(const Lines& meant, const Lines& found,
                    const Lines& python) {
  if (absl::StartsWith(meant[0], "raised") && found.size() == 1 &&
      absl::StartsWith(found[0], "raised")) {
    return "";
  }
  if (meant == found) return "";
  size_t i = 0;
  while (i < meant.size() && i < found.size() && meant[i] == found[i]) ++i;
  const auto line = [](const Lines& lines, size_t at) {
    return at < lines.size() ? lines[at] : "(nothing)";
  };
  return absl::StrCat("\n  line ", i, "\n  meant  ", line(meant, i),
                      "\n  dsd    ", line(found, i), "\n  Python ",
                      python[0] == "ok" ? line(python, i) : python[0]);
}

bool IsUneven(const Configuration& c) {
  // Each rank's part of some tensor has another shape than rank 0's.
  const auto shapes = [](const Lines& lines) {
    std::string all;
    for (const std::string& line : lines) {
      const size_t local = line.find(" local ");
      if (local == std::string::npos) continue;
      const size_t end = line.find(']', local);
      absl::StrAppend(&all, line.substr(local, end - local));
    }
    return all;
  };
  const auto differ = [&](const std::vector<Outcome>& outcomes) {
    return absl::c_any_of(outcomes, [&](const Outcome& outcome) {
      return shapes(outcome.model) != shapes(outcomes[0].model) ||
             shapes(outcome.optimizers) != shapes(outcomes[0].optimizers);
    });
  };
  return differ(c.get) || differ(c.set) || differ(c.path);
}

GoldenFile ReadGolden() {
  const auto text = ReadText(golden_path);
  CHECK_OK(text);
  const auto file = ParseGoldenFile(*text);
  CHECK_OK(file);
  return *file;
}

TEST(StateDictOracleTest, EveryConfigurationEqualsPython) {
  const GoldenFile file = ReadGolden();
  Occurrences occurrences;
  int wrong = 0;
  for (const Configuration& c : file.configurations) {
    const auto results = RunConfiguration(file, c);
    std::vector<std::string> errors;
    if (!results.ok()) {
      errors.push_back(results.status().ToString());
    }
    for (int rank = 0; results.ok() && rank < c.num_ranks(); ++rank) {
      const auto compare = [&](const char* what, const Lines& meant,
                               const Lines& found, const Lines& python) {
        const std::string error = Compare(meant, found, python);
        if (error.empty()) return;
        errors.push_back(absl::StrCat(what, ", rank ", rank, error));
      };
      const Outcome get = IntendedGet(file, c, rank, occurrences);
      compare("get, model", get.model, results->get[rank].model,
              c.get[rank].model);
      compare("get, optimizers", get.optimizers, results->get[rank].optimizers,
              c.get[rank].optimizers);
      const Outcome set = IntendedSet(file, c, rank, occurrences);
      compare("set, model", set.model, results->set[rank].model,
              c.set[rank].model);
      compare("set, optimizers", set.optimizers, results->set[rank].optimizers,
              c.set[rank].optimizers);
    }
    if (errors.empty()) continue;
    ++wrong;
    ADD_FAILURE() << c.ToString() << "\n" << absl::StrJoin(errors, "\n");
  }
  std::cout << file.configurations.size() << " configurations, " << wrong
            << " of them wrong\n";
  // A row that nothing needs any more is to be removed.
  for (const Difference& difference : AllDifferences()) {
    const auto it = occurrences.find(std::string(difference.name));
    const size_t count = it == occurrences.end() ? 0 : it->second.size();
    std::cout << absl::StrCat(count, " x ", difference.name, "\n");
    EXPECT_GT(count, 0) << difference.name << " occurs nowhere";
  }
}

TEST(StateDictOracleTest, SelectionIsLargeEnough) {
  const GoldenFile file = ReadGolden();
  const auto count = [&](auto is) {
    return absl::c_count_if(file.configurations, is);
  };
  EXPECT_GE(file.configurations.size(), 500);
  EXPECT_GE(count([](const Configuration& c) { return c.world() == 4; }), 100);
  EXPECT_GE(count(IsUneven), 100);
  std::cout << count(IsUneven) << " with uneven shards\n";
  // Python gives values, not only refusals.
  EXPECT_GE(count([](const Configuration& c) {
              return c.set[0].model[0] == "ok" &&
                     c.set[0].optimizers[0] == "ok";
            }),
            150);
}

TEST(StateDictOracleTest, EveryDifferenceIsInTheDocumentation) {
  const auto text = ReadText(semantics_path);
  ASSERT_TRUE(text.ok()) << text.status();
  for (const Difference& difference : AllDifferences()) {
    bool found = false;
    for (const absl::string_view line : absl::StrSplit(*text, '\n')) {
      found = found || (absl::StrContains(
                            line, absl::StrCat("`", difference.name, "`")) &&
                        absl::StrContains(line, difference.issue));
    }
    EXPECT_TRUE(found) << "`" << difference.name << "` (" << difference.issue
                       << ") is not in docs/semantics.md";
  }
}

TEST(StateDictOracleTest, PythonStillGivesTheGoldenFile) {
  if (python_command.empty()) GTEST_SKIP() << "not in live mode";
  if (std::system(absl::StrCat(python_command, " -c 'import torch'").c_str()) !=
      0) {
    GTEST_SKIP() << python_command << " has no PyTorch";
  }
  const std::string again =
      absl::StrCat(testing::TempDir(), "/again_", getpid(), ".txt");
  const auto expected = ReadText(golden_path);
  ASSERT_TRUE(expected.ok()) << expected.status();
  const std::string command = absl::StrCat(python_command, " ", oracle_script,
                                           " again ", golden_path, " ", again);
  ASSERT_EQ(std::system(command.c_str()), 0) << command;
  const auto found = ReadText(again);
  ASSERT_TRUE(found.ok()) << found.status();
  const Lines meant = absl::StrSplit(*expected, '\n');
  const Lines lines = absl::StrSplit(*found, '\n');
  for (size_t i = 0; i < meant.size() && i < lines.size(); ++i) {
    ASSERT_EQ(lines[i], meant[i]) << "line " << i;
  }
  EXPECT_EQ(lines.size(), meant.size());
}

}  // namespace
}  // namespace dsd::oracle

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  CHECK(argc == 3 || argc == 5)
      << "arguments: GOLDEN_FILE SEMANTICS [PYTHON SCRIPT]";
  dsd::oracle::golden_path = argv[1];
  dsd::oracle::semantics_path = argv[2];
  if (argc == 5) {
    dsd::oracle::python_command = argv[3];
    dsd::oracle::oracle_script = argv[4];
  }
  return RUN_ALL_TESTS();
}
