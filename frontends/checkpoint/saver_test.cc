// SPDX-License-Identifier: Apache-2.0

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "dsd/core/base/fake_env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/test_state.h"
#include "dsd/testing/harness/no_threads.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

using ::testing::Each;

std::vector<TestTensor> Tensors(int ranks) {
  const DeviceMesh mesh = DeviceMesh::Iota({ranks});
  return {{{std::string("w")},
           DType::kFloat32,
           *Layout::FromPlacements({640, 80}, mesh, {Shard(0)})},
          {{std::string("r")},
           DType::kFloat32,
           *Layout::FromPlacements({64, 1024}, mesh, {Replicate()})},
          {{std::string("b")},
           DType::kBFloat16,
           *Layout::FromPlacements({6}, mesh, {Replicate()})}};
}

std::vector<ObjectEntry> Objects(int64_t step) {
  return {{{std::string("step")}, Object(step)}};
}

absl::Status Holds(FakeEnv& env, const std::string& directory, uint64_t seed) {
  TestState state = TestState::Blank(Tensors(1), 0, Objects(0));
  LoadOptions options;
  options.env = &env;
  DSD_ASSIGN_OR_RETURN(const LoadReport report,
                       Load(directory, state.state(), nullptr, options));
  EXPECT_TRUE(report.verified);
  EXPECT_EQ(state.Difference(seed), "");
  EXPECT_TRUE(state.state().objects[0].value ==
              Object(static_cast<int64_t>(seed)));
  return absl::OkStatus();
}

// Holds back the creation of data files until it is opened.
class Gate {
 public:
  explicit Gate(FakeEnv& env) : env_(env) {
    env.fake_files().SetFault([this](const FileOperation& operation) {
      if (operation.kind == FileOperation::Kind::kCreate) Pass();
      return absl::OkStatus();
    });
  }
  void Open() {
    absl::MutexLock lock(&mu_);
    open_ = true;
  }

 private:
  // The file system is locked meanwhile, so nobody else may need it.
  void Pass() {
    absl::MutexLock lock(&mu_);
    env_.Await(mu_, absl::Condition(&open_), absl::InfiniteFuture());
  }

  FakeEnv& env_;
  absl::Mutex mu_;
  bool open_ = false;
};

// No thread for the save, and none to write what does not fit into a piece.
TEST(SaverTest, WithoutThreadsItIsSavedAtOnce) {
  FakeEnv env;
  const DeviceMesh mesh = DeviceMesh::Iota({1});
  const std::vector<TestTensor> tensors = {
      {{std::string("w")},
       DType::kFloat32,
       *Layout::FromPlacements({3, 1 << 20}, mesh, {Replicate()})}};
  const absl::StatusOr<std::unique_ptr<Saver>> saver =
      Saver::Create(nullptr, "saves", &env);
  ASSERT_TRUE(saver.ok()) << saver.status();
  TestState state = TestState::Filled(tensors, 0, 1, Objects(1));
  {
    const NoThreads none;
    EXPECT_EQ((*saver)->Start("/a", state.state()), absl::OkStatus());
    EXPECT_FALSE((*saver)->running());
  }
  EXPECT_EQ((*saver)->Wait().status(), absl::OkStatus());
  TestState loaded = TestState::Blank(tensors, 0, Objects(0));
  LoadOptions options;
  options.env = &env;
  EXPECT_EQ(Load("/a", loaded.state(), nullptr, options).status(),
            absl::OkStatus());
  EXPECT_EQ(loaded.Difference(1), "");
}

TEST(SaverTest, WhatIsSavedIsWhatWasThereWhenStartReturned) {
  for (const int ranks : {1, 2, 3}) {
    FakeEnv env;
    Gate gate(env);
    ASSERT_THAT(
        StatusOfRanks(
            ranks,
            [&](Communicator& comm) -> absl::Status {
              DSD_ASSIGN_OR_RETURN(const std::unique_ptr<Saver> saver,
                                   Saver::Create(&comm, "saves", &env));
              EXPECT_THAT(saver->Wait().status(),
                          IsStatus(absl::StatusCode::kFailedPrecondition,
                                   "no save was started"));
              std::optional<TestState> state =
                  TestState::Filled(Tensors(ranks), comm.rank(), 1, Objects(1));
              DSD_RETURN_IF_ERROR(saver->Start("/a", state->state()));
              EXPECT_TRUE(saver->running());
              // Training goes on: the values are gone, and there are calls on
              // the communicator while the save goes on, on its lane.
              state.reset();
              DSD_RETURN_IF_ERROR(comm.Barrier());
              if (comm.rank() == 0) gate.Open();
              DSD_ASSIGN_OR_RETURN(const SaveReport report, saver->Wait());
              EXPECT_FALSE(saver->running());
              EXPECT_EQ(report.tensors, 3);
              EXPECT_EQ(report.payload_bytes_all,
                        640 * 80 * 4 + 64 * 1024 * 4 + 12);
              // What all have is stored, and so copied, once, by all of them.
              EXPECT_LE(report.payload_bytes,
                        report.payload_bytes_all / ranks +
                            report.payload_bytes_all / 20);
              EXPECT_EQ(saver->progress().bytes_done, report.payload_bytes);
              EXPECT_EQ(saver->progress().bytes_total, report.payload_bytes);
              // Asked again it says the same.
              DSD_ASSIGN_OR_RETURN(const SaveReport again, saver->Wait());
              EXPECT_EQ(again.save_id, report.save_id);
              return absl::OkStatus();
            }),
        AllOk());
    EXPECT_TRUE(Holds(env, "/a", 1).ok()) << Holds(env, "/a", 1);
  }
}

TEST(SaverTest, SavesFollowEachOtherAndShareThePlan) {
  FakeEnv env;
  ASSERT_THAT(
      StatusOfRanks(
          2,
          [&](Communicator& comm) -> absl::Status {
            DSD_ASSIGN_OR_RETURN(const std::unique_ptr<Saver> saver,
                                 Saver::Create(&comm, "saves", &env));
            for (const uint64_t seed : {1, 2, 3, 4}) {
              TestState state = TestState::Filled(Tensors(2), comm.rank(), seed,
                                                  Objects(seed));
              if (seed == 3) {  // in the foreground
                DSD_RETURN_IF_ERROR(
                    saver->Save("/over", state.state()).status());
              } else {
                DSD_RETURN_IF_ERROR(saver->Start("/over", state.state()));
              }
            }
            DSD_RETURN_IF_ERROR(saver->Wait().status());
            // Another catalog takes another plan.
            std::vector<TestTensor> other = Tensors(2);
            other.pop_back();
            TestState state = TestState::Filled(other, comm.rank(), 5);
            return saver->Save("/other", state.state()).status();
          }),
      AllOk());
  EXPECT_TRUE(Holds(env, "/over", 4).ok()) << Holds(env, "/over", 4);
  EXPECT_EQ(env.files().List("/over")->size(), 4u);
  EXPECT_EQ((*Checkpoint::Open("/other", {true, &env}))->catalog().size(), 2u);
}

TEST(SaverTest, AnErrorInTheBackgroundIsToldOnceAndNothingIsLeft) {
  FakeEnv env;
  std::atomic<bool> fail = true;
  env.fake_files().SetFault([&](const FileOperation& operation) {
    return fail && operation.kind == FileOperation::Kind::kSync
               ? absl::UnavailableError("I/O error")
               : absl::OkStatus();
  });
  ASSERT_THAT(
      StatusOfRanks(
          2,
          [&](Communicator& comm) -> absl::Status {
            DSD_ASSIGN_OR_RETURN(const std::unique_ptr<Saver> saver,
                                 Saver::Create(&comm, "saves", &env));
            TestState state =
                TestState::Filled(Tensors(2), comm.rank(), 1, Objects(1));
            // Nobody asks: the next one says it.
            DSD_RETURN_IF_ERROR(saver->Start("/a", state.state()));
            EXPECT_THAT(saver->Start("/b", state.state()),
                        IsStatus(absl::StatusCode::kUnavailable, "I/O error"));
            // Asked: the next one is free.
            DSD_RETURN_IF_ERROR(saver->Start("/a", state.state()));
            EXPECT_THAT(saver->Wait().status(),
                        IsStatus(absl::StatusCode::kUnavailable, "I/O error"));
            DSD_RETURN_IF_ERROR(comm.Barrier());
            fail = false;
            DSD_RETURN_IF_ERROR(saver->Start("/c", state.state()));
            return saver->Wait().status();
          }),
      AllOk());
  EXPECT_TRUE(absl::IsNotFound(env.files().List("/a").status()));
  EXPECT_TRUE(absl::IsNotFound(env.files().List("/b").status()));
  EXPECT_TRUE(Holds(env, "/c", 1).ok());
}

TEST(SaverTest, ErrorsBeforeAnythingIsWrittenAreStarts) {
  FakeEnv env;
  ASSERT_THAT(
      StatusOfRanks(2,
                    [&](Communicator& comm) -> absl::Status {
                      DSD_ASSIGN_OR_RETURN(const std::unique_ptr<Saver> saver,
                                           Saver::Create(&comm, "saves", &env));
                      TestState state = TestState::Filled(
                          Tensors(2), comm.rank(), 1,
                          {{{std::string("x")}, Object(Opaque{"a.Class"})}});
                      EXPECT_THAT(saver->Start("/a", state.state()),
                                  IsStatus(absl::StatusCode::kInvalidArgument,
                                           "a.Class"));
                      EXPECT_FALSE(saver->running());
                      return absl::OkStatus();
                    }),
      AllOk());
}

// On one rank: all end with it, what was there stays, the communicator lives.
TEST(SaverTest, Cancel) {
  FakeEnv env;
  const auto save = [&](uint64_t seed, Gate* gate) {
    return StatusOfRanks(2, [&](Communicator& comm) -> absl::Status {
      DSD_ASSIGN_OR_RETURN(const std::unique_ptr<Saver> saver,
                           Saver::Create(&comm, "saves", &env));
      TestState state = TestState::Filled(Tensors(2), comm.rank(), seed,
                                          Objects(static_cast<int64_t>(seed)));
      DSD_RETURN_IF_ERROR(saver->Start("/a", state.state()));
      if (gate != nullptr) {
        if (comm.rank() == 1) saver->Cancel();
        DSD_RETURN_IF_ERROR(comm.Barrier());
        if (comm.rank() == 0) gate->Open();
      }
      const absl::Status ended = saver->Wait().status();
      DSD_RETURN_IF_ERROR(comm.Barrier());
      return ended;
    });
  };
  ASSERT_THAT(save(1, nullptr), AllOk());
  Gate gate(env);
  EXPECT_THAT(save(2, &gate),
              Each(IsStatus(absl::StatusCode::kCancelled, "rank 1")));
  EXPECT_TRUE(Holds(env, "/a", 1).ok());
  EXPECT_EQ(env.files().List("/a")->size(), 4u);
}

TEST(SaverTest, WaitGivesUpAndTheSaveGoesOn) {
  FakeEnv env;
  Gate gate(env);
  const auto saver = Saver::Create(nullptr, "saves", &env);
  ASSERT_TRUE(saver.ok()) << saver.status();
  TestState state = TestState::Filled(Tensors(1), 0, 1, Objects(1));
  ASSERT_TRUE((*saver)->Start("/a", state.state()).ok());
  CallOptions options;
  options.timeout = absl::ZeroDuration();
  env.Advance(absl::Seconds(1));
  EXPECT_TRUE(absl::IsDeadlineExceeded((*saver)->Wait(options).status()));
  const std::atomic<bool> cancel = true;
  options.timeout = absl::Minutes(1);
  options.cancel = &cancel;
  EXPECT_TRUE(absl::IsCancelled((*saver)->Wait(options).status()));
  gate.Open();
  EXPECT_TRUE((*saver)->Wait().ok());
  EXPECT_TRUE(Holds(env, "/a", 1).ok());
}

}  // namespace
}  // namespace dsd::checkpoint
