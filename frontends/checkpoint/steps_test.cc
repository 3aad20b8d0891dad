// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/steps.h"

#include <stdlib.h>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/fake_env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/test_state.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr char kSeries[] = "/runs/7/step-";

std::vector<TestTensor> Tensors() {
  return {
      {{std::string("w")}, DType::kFloat32, Layout::Replicated({64, 8}, {0})}};
}

std::string DirectoryOf(int64_t step) { return absl::StrCat(kSeries, step); }

absl::StatusOr<SaveReport> SaveStep(FakeEnv& env, int64_t step,
                                    std::optional<Retention> retention) {
  TestState state = TestState::Filled(Tensors(), 0, step);
  SaveOptions options;
  options.env = &env;
  options.retention = retention;
  return Save(DirectoryOf(step), state.state(), nullptr, options);
}

std::vector<int64_t> Numbers(FakeEnv& env) {
  std::vector<int64_t> numbers;
  const auto steps = ListSteps(kSeries, &env);
  EXPECT_TRUE(steps.ok()) << steps.status();
  for (const Step& step : *steps) numbers.push_back(step.number);
  return numbers;
}

std::string DataFileIn(FakeEnv& env, const std::string& directory) {
  const std::vector<std::string> names = *env.files().List(directory);
  for (const std::string& name : names) {
    if (absl::EndsWith(name, ".distcp")) {
      return absl::StrCat(directory, "/", name);
    }
  }
  ADD_FAILURE() << "no data file in " << directory;
  return "";
}

TEST(StepsTest, TheNewestWholeOneIsFound) {
  FakeEnv env;
  EXPECT_THAT(Numbers(env), IsEmpty());
  EXPECT_THAT(FindLatest(kSeries, nullptr, {}, &env).status(),
              IsStatus(absl::StatusCode::kNotFound, kSeries));
  for (const int64_t step : {9, 10, 100}) {
    ASSERT_TRUE(SaveStep(env, step, std::nullopt).ok());
  }
  // By number, not by name; other names and files do not matter.
  ASSERT_TRUE(env.files().CreateDirs("/runs/7/step-x").ok());
  ASSERT_TRUE(env.files().CreateDirs("/runs/7/other-200").ok());
  env.fake_files().SetContent("/runs/7/step-300", "a file");
  EXPECT_THAT(Numbers(env), ElementsAre(9, 10, 100));
  auto latest = FindLatest(kSeries, nullptr, {}, &env);
  ASSERT_TRUE(latest.ok()) << latest.status();
  EXPECT_EQ(latest->step.number, 100);
  EXPECT_EQ(latest->step.directory, DirectoryOf(100));
  EXPECT_THAT(latest->skipped, IsEmpty());

  // Without an index it was never committed; with less than it says, damaged.
  ASSERT_TRUE(env.files().CreateDirs(DirectoryOf(200)).ok());
  const std::string file = DataFileIn(env, DirectoryOf(100));
  env.fake_files().SetContent(file,
                              env.fake_files().Content(file)->substr(0, 100));
  ASSERT_TRUE(env.files().Remove(DataFileIn(env, DirectoryOf(10))).ok());
  latest = FindLatest(kSeries, nullptr, {}, &env);
  ASSERT_TRUE(latest.ok()) << latest.status();
  EXPECT_EQ(latest->step.number, 9);
  ASSERT_EQ(latest->skipped.size(), 2u);
  EXPECT_EQ(latest->skipped[0].first.number, 100);
  EXPECT_THAT(latest->skipped[0].second,
              IsStatus(absl::StatusCode::kDataLoss, "100 bytes, expected"));
  EXPECT_THAT(latest->skipped[1].second,
              IsStatus(absl::StatusCode::kNotFound, "step-10/"));

  // All ranks hear what rank 0 finds.
  EXPECT_THAT(StatusOfRanks(3,
                            [&](Communicator& comm) -> absl::Status {
                              DSD_ASSIGN_OR_RETURN(
                                  const LatestStep found,
                                  FindLatest(kSeries, &comm, {}, &env));
                              EXPECT_EQ(found.step.directory, DirectoryOf(9));
                              return absl::OkStatus();
                            }),
              AllOk());
  ASSERT_TRUE(env.files().Remove(DataFileIn(env, DirectoryOf(9))).ok());
  EXPECT_THAT(
      StatusOfRanks(3,
                    [&](Communicator& comm) {
                      return FindLatest(kSeries, &comm, {}, &env).status();
                    }),
      ::testing::Each(IsStatus(absl::StatusCode::kNotFound, "step-100/")));
}

// As in the cache of a hub: what counts is the file that a link points to.
TEST(StepsTest, FilesMayBeLinks) {
  std::string root = absl::StrCat(testing::TempDir(), "/steps_test_XXXXXX");
  ASSERT_NE(mkdtemp(root.data()), nullptr);
  TestState state = TestState::Filled(Tensors(), 0, 1);
  ASSERT_TRUE(Save(root + "/stored", state.state()).ok());
  std::filesystem::create_directory(root + "/step-1");
  for (const auto& entry :
       std::filesystem::directory_iterator(root + "/stored")) {
    const std::string name = entry.path().filename();
    std::filesystem::create_symlink("../stored/" + name,
                                    root + "/step-1/" + name);
  }
  const auto latest = FindLatest(root + "/step-");
  ASSERT_TRUE(latest.ok()) << latest.status();
  EXPECT_EQ(latest->step.number, 1);
  // A link to nothing is a file that is not there.
  std::filesystem::remove_all(root + "/stored");
  EXPECT_THAT(FindLatest(root + "/step-").status(),
              IsStatus(absl::StatusCode::kNotFound, "step-"));
  std::filesystem::remove_all(root);
}

TEST(StepsTest, SavesKeepTheNewestAndEveryNth) {
  FakeEnv env;
  for (int64_t step = 10; step <= 100; step += 10) {
    const auto report = SaveStep(env, step, Retention{2, 40});
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(*env.fake_files().Content("/runs/7/step-latest"),
              absl::StrCat("step-", step, "\n"));
    if (step == 100) {
      EXPECT_THAT(report->pruned, IsEmpty());  // 80 is kept
    } else if (step == 90) {
      EXPECT_THAT(report->pruned, ElementsAre(DirectoryOf(70)));
    }
  }
  EXPECT_THAT(Numbers(env), ElementsAre(40, 80, 90, 100));
  EXPECT_THAT(
      *env.files().List("/runs/7"),
      ElementsAre("step-100", "step-40", "step-80", "step-90", "step-latest"));
  // Nothing of it without a wish for it.
  ASSERT_TRUE(SaveStep(env, 110, Retention{}).ok());
  EXPECT_THAT(Numbers(env), ElementsAre(40, 80, 90, 100, 110));

  TestState state = TestState::Filled(Tensors(), 0, 1);
  SaveOptions options;
  options.env = &env;
  options.retention = Retention{1, 0};
  EXPECT_THAT(Save("/runs/7/last", state.state(), nullptr, options).status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "number"));
}

TEST(StepsTest, PruneLeavesWhatIsNotItsOwn) {
  FakeEnv env;
  for (const int64_t step : {1, 2, 3, 5}) {
    ASSERT_TRUE(SaveStep(env, step, std::nullopt).ok());
  }
  // What an interrupted save left, before and after the newest.
  for (const int64_t step : {4, 6}) {
    ASSERT_TRUE(env.files().CreateDirs(DirectoryOf(step)).ok());
    env.fake_files().SetContent(
        absl::StrCat(DirectoryOf(step), "/__0_0.distcp"), "x");
  }
  env.fake_files().SetContent(DirectoryOf(2) + "/notes.txt", "mine");
  const auto gone = Prune(kSeries, {2, 0}, &env);
  ASSERT_TRUE(gone.ok()) << gone.status();
  EXPECT_THAT(*gone,
              ElementsAre(DirectoryOf(4), DirectoryOf(2), DirectoryOf(1)));
  EXPECT_THAT(Numbers(env), ElementsAre(3, 5));
  EXPECT_THAT(*env.files().List("/runs/7"),
              ElementsAre("step-2", "step-3", "step-5", "step-6"));
  EXPECT_THAT(*env.files().List(DirectoryOf(2)), ElementsAre("notes.txt"));

  // Nothing goes while the newest cannot be loaded.
  ASSERT_TRUE(env.files().Remove(DataFileIn(env, DirectoryOf(5))).ok());
  EXPECT_THAT(Prune(kSeries, {1, 0}, &env).status(),
              IsStatus(absl::StatusCode::kFailedPrecondition, "step-5"));
  EXPECT_THAT(Numbers(env), ElementsAre(3, 5));
}

}  // namespace
}  // namespace dsd::checkpoint
