// SPDX-License-Identifier: Apache-2.0
//
// A real checkpoint, damaged at random in its index, its data or its digests:
// a typed error, or the right result. Never a crash, never much memory.

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/fake_env.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/random_damage.h"
#include "dsd/frontends/checkpoint/test_state.h"
#include "dsd/testing/harness/rank_threads.h"
#include "dsd/testing/harness/test_seed.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

using ::testing::AnyOf;

constexpr char kDir[] = "/job/checkpoint";
constexpr uint64_t kSeed = 7;
int rounds = 1000;  // NOLINT: the test's argument, set once by main
constexpr int64_t kMaxMemoryBytes = int64_t{1} << 30;

std::vector<TestTensor> Tensors(int ranks) {
  const DeviceMesh mesh = DeviceMesh::Iota({ranks});
  return {{{std::string("model"), std::string("w")},
           DType::kFloat32,
           *Layout::FromPlacements({9, 7}, mesh, {Shard(0)})},
          {{std::string("model"), std::string("b")},
           DType::kBFloat16,
           *Layout::FromPlacements({4, 2, 3}, mesh, {Shard(2)})},
          {{std::string("empty")},
           DType::kInt64,
           *Layout::FromPlacements({0, 2}, mesh, {Replicate()})},
          {{std::string("scalar")},
           DType::kFloat64,
           *Layout::FromPlacements({}, mesh, {Replicate()})}};
}

std::vector<ObjectEntry> Objects() {
  return {{{std::string("step")}, Object(1234)},
          {{std::string("optim"), std::string("param_groups"), int64_t{0},
            std::string("betas")},
           Object(Object::Tuple{{Object(0.9), Object(0.999)}})},
          {{std::string("blob")}, Object(Bytes{std::string(300, '\xfe')})}};
}

class DamageTest : public testing::Test {
 protected:
  void SetUp() override {
    SaveOptions options;
    options.env = &env_;
    ASSERT_THAT(StatusOfRanks(
                    2,
                    [&](Communicator& comm) {
                      TestState state = TestState::Filled(
                          Tensors(2), comm.rank(), kSeed, Objects());
                      return Save(kDir, state.state(), &comm, options).status();
                    }),
                AllOk());
    const auto names = env_.files().List(kDir);
    ASSERT_TRUE(names.ok()) << names.status();
    for (const std::string& name : *names) {
      const std::string path = absl::StrCat(kDir, "/", name);
      files_[path] = *env_.fake_files().Content(path);
    }
    ASSERT_EQ(files_.size(), 4u);
  }

  // Whether the load succeeded. It must be right if it is verified.
  bool TryLoad(bool verify) {
    std::vector<ObjectEntry> blank = Objects();
    for (ObjectEntry& object : blank) object.value = Object();
    TestState target = TestState::Blank(Tensors(1), 0, std::move(blank));
    LoadOptions options;
    options.env = &env_;
    options.verify = verify;
    const auto report = Load(kDir, target.state(), nullptr, options);
    if (!report.ok()) {
      EXPECT_THAT(
          report.status().code(),
          AnyOf(absl::StatusCode::kDataLoss, absl::StatusCode::kNotFound,
                absl::StatusCode::kFailedPrecondition,
                absl::StatusCode::kResourceExhausted,
                absl::StatusCode::kUnimplemented))
          << report.status();
      EXPECT_GT(report.status().message().size(), 20u);
      return false;
    }
    if (verify) {
      EXPECT_TRUE(report->verified);
      EXPECT_EQ(target.Difference(kSeed), "");
      const std::vector<ObjectEntry> expected = Objects();
      for (size_t i = 0; i < expected.size(); ++i) {
        EXPECT_TRUE(target.state().objects[i].value == expected[i].value) << i;
      }
    }
    return true;
  }

  FakeEnv env_;
  std::map<std::string, std::string> files_;
};

TEST_F(DamageTest, ATypedErrorOrTheRightResult) {
  std::mt19937_64 random(test::TestSeed());
  const auto any = [&] {
    return std::next(files_.begin(),
                     static_cast<int64_t>(random() % files_.size()));
  };
  int loaded = 0, loaded_unverified = 0;
  for (int round = 0; round < rounds && !HasFailure(); ++round) {
    const auto victim = any();
    const std::string damaged = Damage(victim->second, any()->second, random);
    SCOPED_TRACE(absl::StrCat("round ", round, ", ", victim->first));
    env_.fake_files().SetContent(victim->first, damaged);
    const bool right = TryLoad(true);
    loaded += right;
    if (damaged == victim->second) {
      EXPECT_TRUE(right);
    }
    loaded_unverified += TryLoad(false);
    for (const bool verify : {true, false}) {
      const auto opened = Checkpoint::Open(kDir, {verify, &env_});
      if (!opened.ok()) continue;
      const bool good = Verify(**opened).problems.empty();
      // What a load does not read, verification does.
      if (verify && good) {
        EXPECT_TRUE(right);
      }
      ComputeDigests(**opened).status().IgnoreError();
    }
    env_.fake_files().SetContent(victim->first, victim->second);
  }
  std::printf("%d of %d loaded, %d without verification; peak %lld MiB\n",
              loaded, rounds, loaded_unverified,
              static_cast<long long>(PeakMemoryBytes() >> 20));
  EXPECT_LT(PeakMemoryBytes(), kMaxMemoryBytes);
  EXPECT_TRUE(TryLoad(true));
}

}  // namespace
}  // namespace dsd::checkpoint

// Argument: how often to damage it.
int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (argc == 2) dsd::checkpoint::rounds = std::atoi(argv[1]);
  return RUN_ALL_TESTS();
}
