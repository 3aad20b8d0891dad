// SPDX-License-Identifier: Apache-2.0
//
// Checkpoints in a store of whole objects: a file system of one's own that
// knows neither directories nor renames nor changes, and is all that saves and
// loads need.

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/own_files_env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/export.h"
#include "dsd/frontends/checkpoint/steps.h"
#include "dsd/frontends/checkpoint/test_state.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

using ::testing::AnyOf;

// Objects in memory, each put whole. Requests that change something are
// counted, and from one of them on all fail.
class ObjectStore final : public FileSystem {
 public:
  using Bytes = std::shared_ptr<const std::string>;

  void FailFrom(int64_t request) {
    absl::MutexLock lock(&mu_);
    fail_from_ = request;
    requests_ = 0;
  }
  int64_t requests() const {
    absl::MutexLock lock(&mu_);
    return requests_;
  }

  absl::StatusOr<std::unique_ptr<ReadableFile>> OpenReadable(
      const std::string& path) override {
    DSD_ASSIGN_OR_RETURN(Bytes bytes, Get(path));
    return std::make_unique<Object>(std::move(bytes));
  }

  absl::StatusOr<std::unique_ptr<WritableFile>> CreateWritable(
      const std::string& path) override {
    absl::MutexLock lock(&mu_);
    if (objects_.count(path) > 0) {
      return absl::AlreadyExistsError(absl::StrCat("\"", path, "\""));
    }
    return std::make_unique<Upload>(this, path);
  }

  // A copy, which replaces `to` at once, and only then a removal: an error says
  // that `to` is as it was.
  absl::Status Rename(const std::string& from, const std::string& to) override {
    DSD_ASSIGN_OR_RETURN(const Bytes bytes, Get(from));
    DSD_RETURN_IF_ERROR(Put(to, bytes));
    Remove(from).IgnoreError();
    return absl::OkStatus();
  }

  absl::Status Remove(const std::string& path) override {
    absl::MutexLock lock(&mu_);
    DSD_RETURN_IF_ERROR(Request());
    objects_.erase(path);
    return absl::OkStatus();
  }

  absl::Status CreateDirs(const std::string&) override {
    return absl::OkStatus();
  }
  absl::Status SyncDir(const std::string&) override { return absl::OkStatus(); }

  absl::StatusOr<std::vector<std::string>> List(
      const std::string& path) override {
    absl::MutexLock lock(&mu_);
    const std::string prefix = absl::StrCat(path, "/");
    std::vector<std::string> names;
    for (const auto& [key, bytes] : objects_) {
      absl::string_view name = key;
      if (!absl::ConsumePrefix(&name, prefix)) continue;
      name = name.substr(0, name.find('/'));
      if (names.empty() || names.back() != name) names.emplace_back(name);
    }
    if (names.empty()) {
      return absl::NotFoundError(absl::StrCat("\"", path, "\""));
    }
    return names;
  }

  absl::StatusOr<FileInfo> Stat(const std::string& path) override {
    const absl::StatusOr<Bytes> bytes = Get(path);
    if (bytes.ok()) {
      return FileInfo{FileKind::kRegular,
                      static_cast<int64_t>((*bytes)->size())};
    }
    DSD_RETURN_IF_ERROR(List(path).status());
    return FileInfo{FileKind::kDirectory, 0};
  }

 private:
  class Object final : public ReadableFile {
   public:
    explicit Object(Bytes bytes) : bytes_(std::move(bytes)) {}
    int64_t size_bytes() const override {
      return static_cast<int64_t>(bytes_->size());
    }
    absl::Status ReadAt(int64_t offset, absl::Span<std::byte> out) override {
      if (offset < 0 || offset + out.size() > bytes_->size()) {
        return absl::OutOfRangeError("the object ends before");
      }
      bytes_->copy(reinterpret_cast<char*>(out.data()), out.size(), offset);
      return absl::OkStatus();
    }

   private:
    const Bytes bytes_;
  };

  // Parts in any order, each byte once; there as a whole after Sync.
  class Upload final : public WritableFile {
   public:
    Upload(ObjectStore* store, std::string path)
        : store_(*store), path_(std::move(path)) {}

    absl::Status WriteAt(int64_t offset,
                         absl::Span<const std::byte> data) override {
      absl::MutexLock lock(&mu_);
      std::string part(reinterpret_cast<const char*>(data.data()), data.size());
      if (is_done_ || !parts_.emplace(offset, std::move(part)).second) {
        return absl::FailedPreconditionError(
            absl::StrCat("\"", path_, "\": a part is written twice"));
      }
      return absl::OkStatus();
    }

    absl::Status Sync() override {
      absl::MutexLock lock(&mu_);
      auto whole = std::make_shared<std::string>();
      for (const auto& [offset, part] : parts_) {
        if (offset != static_cast<int64_t>(whole->size())) {
          return absl::FailedPreconditionError(absl::StrCat(
              "\"", path_, "\": parts overlap, or one is missing"));
        }
        whole->append(part);
      }
      is_done_ = true;
      return store_.Put(path_, std::move(whole));
    }

    absl::Status Close() override { return absl::OkStatus(); }

   private:
    ObjectStore& store_;
    const std::string path_;
    absl::Mutex mu_;
    std::map<int64_t, std::string> parts_ ABSL_GUARDED_BY(mu_);
    bool is_done_ ABSL_GUARDED_BY(mu_) = false;
  };

  absl::StatusOr<Bytes> Get(const std::string& path) {
    absl::MutexLock lock(&mu_);
    const auto found = objects_.find(path);
    if (found == objects_.end()) {
      return absl::NotFoundError(absl::StrCat("\"", path, "\""));
    }
    return found->second;
  }

  absl::Status Put(const std::string& path, Bytes bytes) {
    absl::MutexLock lock(&mu_);
    DSD_RETURN_IF_ERROR(Request());
    objects_[path] = std::move(bytes);
    return absl::OkStatus();
  }

  absl::Status Request() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (requests_++ < fail_from_) return absl::OkStatus();
    return absl::UnavailableError("the store does not answer");
  }

  mutable absl::Mutex mu_;
  std::map<std::string, Bytes> objects_ ABSL_GUARDED_BY(mu_);
  int64_t fail_from_ ABSL_GUARDED_BY(mu_) = std::numeric_limits<int64_t>::max();
  int64_t requests_ ABSL_GUARDED_BY(mu_) = 0;
};

constexpr char kDir[] = "bucket/job/checkpoint";

std::vector<TestTensor> Tensors(int ranks, int64_t rows_of_w = 64) {
  const auto rows = [&](Dims shape) {
    return *Layout::FromPlacements(std::move(shape), DeviceMesh::Iota({ranks}),
                                   {Shard(0)});
  };
  return {{{std::string("w")}, DType::kFloat32, rows({rows_of_w, 1000})},
          {{std::string("b")}, DType::kBFloat16, rows({7})}};
}

std::vector<absl::Status> SaveOn(int ranks, ObjectStore& store,
                                 const std::string& directory, uint64_t seed,
                                 int64_t rows = 64) {
  OwnFilesEnv env(&store);
  return StatusOfRanks(ranks, [&](Communicator& comm) {
    TestState state = TestState::Filled(
        Tensors(ranks, rows), comm.rank(), seed,
        {{{std::string("step")}, dsd::Object(static_cast<int64_t>(seed))}});
    SaveOptions options;
    options.env = &env;
    return Save(directory, state.state(), &comm, options).status();
  });
}

// The seed of what is there, verified; 0 if nothing is.
uint64_t Holds(ObjectStore& store, const std::string& path, bool objects,
               int64_t rows = 64) {
  OwnFilesEnv env(&store);
  TestState target = TestState::Blank(
      Tensors(1, rows), 0,
      objects ? std::vector<ObjectEntry>{{{std::string("step")}, dsd::Object()}}
              : std::vector<ObjectEntry>());
  LoadOptions options;
  options.env = &env;
  const auto report = Load(path, target.state(), nullptr, options);
  if (absl::IsNotFound(report.status())) return 0;
  EXPECT_TRUE(report.ok()) << report.status();
  if (!report.ok()) return 0;
  EXPECT_TRUE(report->verified);
  for (const uint64_t seed : {1, 2}) {
    if (target.Difference(seed).empty()) return seed;
  }
  ADD_FAILURE() << "neither the old checkpoint nor the new one";
  return 0;
}

TEST(ObjectStoreTest, SavesLoadsAndOverwrites) {
  ObjectStore store;
  EXPECT_EQ(Holds(store, kDir, true), 0u);
  EXPECT_THAT(SaveOn(3, store, kDir, 1), AllOk());
  EXPECT_EQ(Holds(store, kDir, true), 1u);
  EXPECT_THAT(SaveOn(2, store, kDir, 2), AllOk());
  EXPECT_EQ(Holds(store, kDir, true), 2u);
  // Index, digests and a file of each rank.
  EXPECT_EQ(store.List(kDir)->size(), 4u);
}

TEST(ObjectStoreTest, AFileOfSeveralParts) {
  constexpr int64_t kRows = 2500;  // of 4000 bytes
  ObjectStore store;
  EXPECT_THAT(SaveOn(1, store, kDir, 1, kRows), AllOk());
  EXPECT_EQ(Holds(store, kDir, true, kRows), 1u);
}

TEST(ObjectStoreTest, ASeries) {
  ObjectStore store;
  OwnFilesEnv env(&store);
  TestState state = TestState::Filled(Tensors(1), 0, 1);
  for (const int step : {5, 10, 15}) {
    SaveOptions options;
    options.env = &env;
    options.retention = Retention{/*keep_last=*/2, 0};
    const auto saved = Save(absl::StrCat("/runs/step-", step), state.state(),
                            nullptr, options);
    ASSERT_TRUE(saved.ok()) << saved.status();
  }
  EXPECT_THAT(*store.List("/runs"),
              testing::ElementsAre("step-10", "step-15", "step-latest"));
}

TEST(ObjectStoreTest, ExportsInEveryFormat) {
  ObjectStore store;
  OwnFilesEnv env(&store);
  for (const auto& [path, format] :
       {std::pair("/out/a.safetensors", Format::kSafetensors),
        std::pair("/out/d", Format::kSafetensors),
        std::pair("/out/a.pt", Format::kTorchArchive)}) {
    for (const uint64_t seed : {1, 2}) {
      EXPECT_THAT(
          StatusOfRanks(2,
                        [&, path = path, format = format](Communicator& comm) {
                          TestState state =
                              TestState::Filled(Tensors(2), comm.rank(), seed);
                          ExportOptions options;
                          options.env = &env;
                          options.max_file_bytes = 1000;
                          return Export(path, format, state.state(), &comm,
                                        options)
                              .status();
                        }),
          AllOk());
      EXPECT_EQ(Holds(store, path, false), seed);
    }
  }
}

// The store fails in every request of a save, and stays away.
TEST(ObjectStoreTest, AFailureAtAnyRequestLeavesTheOldOrTheNew) {
  for (const bool overwrite : {false, true}) {
    int64_t total;
    {
      ObjectStore store;
      if (overwrite) {
        ASSERT_THAT(SaveOn(2, store, kDir, 1), AllOk());
      }
      store.FailFrom(std::numeric_limits<int64_t>::max());
      ASSERT_THAT(SaveOn(2, store, kDir, 2), AllOk());
      total = store.requests();
    }
    EXPECT_GT(total, 5);
    int64_t old_ones = 0, new_ones = 0;
    for (int64_t at = 0; at < total; ++at) {
      SCOPED_TRACE(absl::StrCat("request ", at));
      ObjectStore store;
      if (overwrite) {
        ASSERT_THAT(SaveOn(2, store, kDir, 1), AllOk());
      }
      store.FailFrom(at);
      const std::vector<absl::Status> statuses = SaveOn(2, store, kDir, 2);
      store.FailFrom(std::numeric_limits<int64_t>::max());
      const uint64_t found = Holds(store, kDir, true);
      EXPECT_THAT(found, AnyOf(overwrite ? 1u : 0u, 2u));
      EXPECT_EQ(found == 2u, statuses[0].ok());
      (found == 2u ? new_ones : old_ones) += 1;
      // What was left behind is no obstacle.
      EXPECT_THAT(SaveOn(2, store, kDir, 2), AllOk());
      EXPECT_EQ(Holds(store, kDir, true), 2u);
      EXPECT_EQ(store.List(kDir)->size(), 4u);
    }
    EXPECT_GT(old_ones, 0);
    EXPECT_GT(new_ones, 0);
  }
}

}  // namespace
}  // namespace dsd::checkpoint
