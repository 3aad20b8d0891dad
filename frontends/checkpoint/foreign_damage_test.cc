// SPDX-License-Identifier: Apache-2.0
//
// Safetensors files and archives of torch.save, cut off at every byte, with
// every bit flipped, and damaged at random: a typed error, or a result. Never a
// crash, never much memory.

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
#include "dsd/frontends/checkpoint/convert.h"
#include "dsd/frontends/checkpoint/export.h"
#include "dsd/frontends/checkpoint/random_damage.h"
#include "dsd/frontends/checkpoint/test_state.h"
#include "dsd/testing/harness/test_seed.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

using ::testing::AnyOf;

constexpr uint64_t kSeed = 7;
int rounds = 1000;  // NOLINT: the test's argument, set once by main
constexpr int64_t kMaxMemoryBytes = int64_t{1} << 30;

PathSegment T(const char* text) { return std::string(text); }

std::vector<TestTensor> Tensors() {
  const auto whole = [](Dims shape) {
    return Layout::Replicated(std::move(shape), {0});
  };
  return {{{T("w")}, DType::kFloat32, whole({3, 5})},
          {{T("b")}, DType::kBFloat16, whole({2, 3})},
          {{T("empty")}, DType::kInt64, whole({0, 2})},
          {{T("scalar")}, DType::kFloat64, whole({})}};
}

std::vector<ObjectEntry> Objects() {
  return {{{T("step")}, Object(1234)},
          {{T("groups"), int64_t{0}, T("betas")},
           Object(Object::Tuple{{Object(0.9), Object("x")}})}};
}

class ForeignDamageTest : public testing::Test {
 protected:
  struct Victim {
    std::string checkpoint;
    std::string file;
    std::string bytes;
  };

  void SetUp() override {
    ExportOptions options;
    options.env = &env_;
    options.max_file_bytes = 70;
    for (const std::string path : {"/a.safetensors", "/dir", "/a.pt"}) {
      const bool is_archive = path == "/a.pt";
      TestState state = TestState::Filled(
          Tensors(), 0, kSeed,
          is_archive ? Objects() : std::vector<ObjectEntry>());
      ASSERT_TRUE(
          Export(path,
                 is_archive ? Format::kTorchArchive : Format::kSafetensors,
                 state.state(), nullptr, options)
              .ok());
      const auto names = env_.files().List(path);
      if (!names.ok()) {
        victims_.push_back({path, path, *env_.fake_files().Content(path)});
        continue;
      }
      for (const std::string& name : *names) {
        const std::string file = absl::StrCat(path, "/", name);
        victims_.push_back({path, file, *env_.fake_files().Content(file)});
      }
    }
    ASSERT_EQ(victims_.size(), 5u);
  }

  static void ExpectTyped(const absl::Status& status) {
    if (status.ok()) return;
    EXPECT_THAT(status.code(),
                AnyOf(absl::StatusCode::kDataLoss, absl::StatusCode::kNotFound,
                      absl::StatusCode::kFailedPrecondition,
                      absl::StatusCode::kResourceExhausted,
                      absl::StatusCode::kUnimplemented))
        << status;
    EXPECT_GT(status.message().size(), 20u) << status;
  }

  // Does all that there is to do; returns whether it could be opened.
  bool Try(const Victim& victim, const std::string& damaged) {
    env_.fake_files().SetContent(victim.file, damaged);
    const auto opened =
        Checkpoint::Open(victim.checkpoint, {/*verify=*/true, &env_});
    ExpectTyped(opened.status());
    if (opened.ok()) {
      for (const Problem& problem : Verify(**opened).problems) {
        ExpectTyped(problem.status);
      }
      ExpectTyped(ComputeDigests(**opened).status());
      TestState target = TestState::Blank(Tensors(), 0, Objects());
      LoadOptions load;
      load.env = &env_;
      load.allow_missing = load.allow_unexpected = true;
      ExpectTyped(
          Load(victim.checkpoint, target.state(), nullptr, load).status());
    }
    env_.fake_files().SetContent(victim.file, victim.bytes);
    return opened.ok();
  }

  FakeEnv env_;
  std::vector<Victim> victims_;
};

TEST_F(ForeignDamageTest, CutOffAnywhere) {
  for (const Victim& victim : victims_) {
    for (size_t size = 0; size < victim.bytes.size(); ++size) {
      // But for the line break after an index.
      EXPECT_EQ(Try(victim, victim.bytes.substr(0, size)),
                victim.bytes[size] == '\n' && size + 1 == victim.bytes.size())
          << victim.file << " " << size;
    }
    EXPECT_TRUE(Try(victim, victim.bytes));
  }
}

TEST_F(ForeignDamageTest, AnyBitFlipped) {
  for (const Victim& victim : victims_) {
    int opened = 0;
    for (size_t bit = 0; bit < victim.bytes.size() * 8; ++bit) {
      std::string damaged = victim.bytes;
      damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
      opened += Try(victim, damaged);
      if (HasFailure()) FAIL() << victim.file << " bit " << bit;
    }
    std::printf("%s: %zu bits, opened with %d of them flipped\n",
                victim.file.c_str(), victim.bytes.size() * 8, opened);
  }
}

TEST_F(ForeignDamageTest, AtRandom) {
  std::mt19937_64 random(test::TestSeed());
  const auto any = [&]() -> const Victim& {
    return victims_[random() % victims_.size()];
  };
  int opened = 0;
  for (int round = 0; round < rounds && !HasFailure(); ++round) {
    const Victim& victim = any();
    SCOPED_TRACE(absl::StrCat("round ", round, ", ", victim.file));
    opened += Try(victim, Damage(victim.bytes, any().bytes, random));
    if (round % 16 == 0) {
      ConvertOptions options;
      options.env = &env_;
      options.overwrite = options.drop_objects = true;
      ExpectTyped(Convert(victim.checkpoint, "/out.pt", options).status());
    }
  }
  std::printf("%d of %d opened; peak %lld MiB\n", opened, rounds,
              static_cast<long long>(PeakMemoryBytes() >> 20));
  EXPECT_LT(PeakMemoryBytes(), kMaxMemoryBytes);
}

}  // namespace
}  // namespace dsd::checkpoint

// Argument: how often to damage them at random.
int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (argc == 2) dsd::checkpoint::rounds = std::atoi(argv[1]);
  return RUN_ALL_TESTS();
}
