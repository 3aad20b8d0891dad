// SPDX-License-Identifier: Apache-2.0
//
// Full gets: which ranks receive, and the stream in bounded memory.

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/empty.h"
#include "ATen/ops/equal.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "c10/core/Allocator.h"
#include "c10/core/CPUAllocator.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/fake_sources.h"
#include "dsd/core/state_dict/source_session.h"
#include "dsd/core/state_dict/test_world.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::dsd::test::FakeModel;
using ::dsd::test::Full;
using ::dsd::test::Numbers;
using ::dsd::test::RunAndLeave;
using ::dsd::test::TensorAt;
using ::dsd::test::World;

class DestinationsTest : public testing::TestWithParam<int> {
 protected:
  int ranks() const { return GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, DestinationsTest, testing::Values(1, 2, 4));

// PR 183037: one rank per pipeline stage wants the dict; and not in host memory
// only.
TEST_P(DestinationsTest, AnySetOfRanksReceives) {
  for (int chosen = 1; chosen < 1 << ranks(); ++chosen) {
    StateDictOptions options = Full();
    options.cpu_offload = chosen % 2 == 0;
    options.full_state_dict_ranks.emplace();
    for (int rank = ranks(); rank-- > 0;) {
      if ((chosen >> rank & 1) != 0) {
        options.full_state_dict_ranks->push_back(rank);
      }
    }
    EXPECT_THAT(
        RunRankThreads(
            ranks(),
            [&](Communicator& comm) -> absl::Status {
              const auto model = World::Make(comm.size(), comm.rank());
              SourceSession session(model.get(), {}, &comm, options);
              DSD_ASSIGN_OR_RETURN(const StateDict dict, session.GetModel());
              if ((chosen >> comm.rank() & 1) == 0) {
                DSD_REQUIRE(dict.empty());
                DSD_REQUIRE(session.stats().last_transfer.bytes_received == 0);
                return absl::OkStatus();
              }
              DSD_REQUIRE(dict.size() == World::Whole().size());
              for (const auto& [name, whole] : World::Whole()) {
                DSD_REQUIRE(at::equal(TensorAt(dict, name), whole));
              }
              return absl::OkStatus();
            }),
        AllOk())
        << "ranks " << chosen;
  }
}

TEST_P(DestinationsTest, RanksThatCannotReceiveAreRefusedOnAll) {
  for (const std::vector<int>& chosen : {std::vector<int>{}, {ranks()}, {-1}}) {
    StateDictOptions options = Full();
    options.full_state_dict_ranks = chosen;
    for (const absl::Status& status :
         RunAndLeave(ranks(), [&](Communicator& comm) {
           const auto model = World::Make(comm.size(), comm.rank());
           return SourceSession(model.get(), {}, &comm, options)
               .GetModel()
               .status();
         })) {
      EXPECT_THAT(status, IsStatus(absl::StatusCode::kInvalidArgument,
                                   "full_state_dict_ranks"));
    }
  }
}

TEST_P(DestinationsTest, RanksWithoutFullAreRefused) {
  StateDictOptions options;
  options.full_state_dict_ranks = {0};
  FakeModel model;
  model.Add("w", Numbers({2}));
  EXPECT_THAT(
      SourceSession(&model, {}, nullptr, options).GetModel().status(),
      IsStatus(absl::StatusCode::kInvalidArgument, "full_state_dict = true"));
}

TEST_P(DestinationsTest, StreamIsTheFullGetInOrderAndInParts) {
  for (const int64_t batch : {1, 16, 100, 1 << 20}) {
    StateDictOptions options = Full();
    options.full_state_dict_ranks = {ranks() - 1};
    EXPECT_THAT(
        RunRankThreads(
            ranks(),
            [&](Communicator& comm) -> absl::Status {
              const auto model = World::Make(comm.size(), comm.rank());
              SourceSession session(model.get(), {}, &comm, options);
              std::vector<std::pair<std::string, at::Tensor>> seen;
              StreamOptions stream;
              stream.batch_bytes = batch;
              DSD_RETURN_IF_ERROR(session.StreamModel(
                  [&](StreamedValue& value) -> absl::Status {
                    DSD_ASSIGN_OR_RETURN(
                        const at::Tensor part,
                        value.value.get_if<TensorValue>()->Local());
                    DSD_REQUIRE(part.numel() == value.end - value.begin);
                    DSD_REQUIRE(part.nbytes() <= std::max<size_t>(batch, 4));
                    if (value.begin == 0) {
                      seen.emplace_back(value.key,
                                        at::empty({0}, part.options()));
                      seen.back().second =
                          at::empty(c10::IntArrayRef(value.shape.data(),
                                                     value.shape.size()),
                                    part.options());
                    }
                    DSD_REQUIRE(value.key == seen.back().first);
                    DSD_REQUIRE(value.is_whole ==
                                (part.numel() == seen.back().second.numel()));
                    seen.back()
                        .second.view(-1)
                        .slice(0, value.begin, value.end)
                        .copy_(part.reshape(-1));
                    return absl::OkStatus();
                  },
                  stream));
              if (comm.rank() != ranks() - 1) {
                DSD_REQUIRE(seen.empty());
                return absl::OkStatus();
              }
              const auto whole = World::Whole();
              DSD_REQUIRE(seen.size() == whole.size());
              for (size_t i = 0; i < whole.size(); ++i) {
                DSD_REQUIRE(seen[i].first == whole[i].first);
                DSD_REQUIRE(at::equal(seen[i].second, whole[i].second));
              }
              return absl::OkStatus();
            }),
        AllOk())
        << "batches of " << batch;
  }
}

TEST_P(DestinationsTest, ErrorOfTheVisitorIsEverybodys) {
  for (const std::string bad : {"columns", "scalar"}) {  // "scalar" is last
    for (const absl::Status& status :
         RunAndLeave(ranks(), [&](Communicator& comm) {
           const auto model = World::Make(comm.size(), comm.rank());
           SourceSession session(model.get(), {}, &comm, Full());
           StreamOptions stream;
           stream.batch_bytes = 1 << 10;
           return session.StreamModel(
               [&](StreamedValue& value) {
                 return value.key == bad && comm.rank() == ranks() - 1
                            ? absl::ResourceExhaustedError("disk full")
                            : absl::OkStatus();
               },
               stream);
         })) {
      EXPECT_THAT(status,
                  IsStatus(absl::StatusCode::kResourceExhausted, "disk full"));
      EXPECT_THAT(std::string(status.message()), testing::HasSubstr(bad));
    }
  }
}

// Counts what LibTorch allocates in host memory.
class CountingAllocator : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    live_ += static_cast<int64_t>(size);
    peak_ = std::max(peak_, live_);
    auto* block = new Block{this, size, {}};
    block->memory.resize(size + 64);
    return {block->memory.data(), block, &Free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }

  int64_t peak() const { return peak_; }
  int64_t live() const { return live_; }
  void ResetPeak() { peak_ = live_; }

 private:
  struct Block {
    CountingAllocator* allocator;
    size_t size;
    std::vector<char> memory;
  };
  static void Free(void* context) {
    auto* block = static_cast<Block*>(context);
    block->allocator->live_ -= static_cast<int64_t>(block->size);
    delete block;
  }

  int64_t live_ = 0;
  int64_t peak_ = 0;
};

// 149640, PR 142845: the peak is a setting, not the size of the model.
TEST(StreamMemoryTest, PeakIsTheBatchWhateverTheModel) {
  static CountingAllocator& allocator = *new CountingAllocator();
  c10::SetCPUAllocator(&allocator, /*priority=*/100);
  constexpr int64_t kBatch = 1 << 16;
  for (const int tensors : {4, 64}) {
    FakeModel model;
    for (int i = 0; i < tensors; ++i) {
      model.Add(absl::StrCat("w", i), Numbers({i % 5 == 0 ? 50'000 : 5'000}));
    }
    SourceSession session(&model, {}, nullptr, Full());
    StreamOptions stream;
    stream.batch_bytes = kBatch;
    int64_t bytes = 0;
    const int64_t before = allocator.live();
    allocator.ResetPeak();
    const absl::Status status = session.StreamModel(
        [&](StreamedValue& value) {
          bytes += static_cast<int64_t>(
              value.value.get_if<TensorValue>()->locals()[0].nbytes());
          return absl::OkStatus();
        },
        stream);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_GT(bytes, tensors * 20'000);
    EXPECT_LE(allocator.peak() - before, kBatch);
    EXPECT_EQ(allocator.live(), before);
  }
}

}  // namespace
}  // namespace dsd
