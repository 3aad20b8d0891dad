// SPDX-License-Identifier: Apache-2.0
//
// A model of known values on any number of ranks, sharded in uneven ways, and
// what tests over rank threads need around it.

#ifndef DSD_CORE_STATE_DICT_TEST_WORLD_H_
#define DSD_CORE_STATE_DICT_TEST_WORLD_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/equal.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/fake_sources.h"
#include "dsd/core/state_dict/state_dict.h"
#include "dsd/testing/harness/rank_threads.h"

namespace dsd::test {

inline absl::Status Fail(std::string text) { return absl::InternalError(text); }

// The result of a rank that goes orderly although it has an error to show.
inline absl::Status Leave(Communicator& comm, absl::Status status) {
  DSD_RETURN_IF_ERROR(comm.Shutdown());
  return status;
}

// In a body that returns absl::Status.
#define DSD_REQUIRE(condition)                                      \
  do {                                                              \
    if (!(condition)) {                                             \
      return ::dsd::test::Fail(                                     \
          absl::StrCat(__FILE__, ":", __LINE__, ": ", #condition)); \
    }                                                               \
  } while (false)

inline at::Tensor TensorAt(const StateDict& dict, const std::string& key) {
  const Value* value = dict.Find(key);
  const auto* tensor =
      value == nullptr ? nullptr : value->get_if<TensorValue>();
  return tensor == nullptr || tensor->locals().size() != 1
             ? at::Tensor()
             : tensor->locals()[0];
}

inline std::vector<std::string> KeysOf(const StateDict& dict) {
  std::vector<std::string> keys;
  for (size_t i = 0; i < dict.size(); ++i) keys.push_back(dict.key_text(i));
  return keys;
}

// Each element known; sharded in ways that are uneven or leave ranks empty.
struct World {
  static std::vector<std::pair<std::string, at::Tensor>> Whole(
      double start = 0) {
    return {{"rows", Numbers({5, 3}, start + 1000)},
            {"columns", Numbers({3, 5}, start + 2000)},
            {"few", Numbers({2}, start + 3000)},
            {"plain", Numbers({2, 2}, start + 4000)},
            {"both", Numbers({7, 4}, start + 5000)},
            {"none", Numbers({0, 3}, start)},
            {"scalar", Numbers({}, start + 6000)}};
  }

  static Layout LayoutOf(const std::string& name, const Dims& shape,
                         int64_t ranks) {
    const DeviceMesh flat = DeviceMesh::Iota({ranks});
    const Placement one = name == "columns" ? Shard(1) : Shard(0);
    if (name == "both") {
      const int64_t rows = ranks >= 4 ? 2 : 1;
      return *Layout::FromPlacements(shape,
                                     DeviceMesh::Iota({rows, ranks / rows}),
                                     {StridedShard(0, ranks / rows), Shard(0)});
    }
    return *Layout::FromPlacements(shape, flat, {one});
  }

  static std::unique_ptr<FakeModel> Make(int64_t ranks, Holder holder,
                                         double start = 0) {
    auto model = std::make_unique<FakeModel>();
    for (auto& [name, whole] : Whole(start)) {
      if (name == "plain" || name == "scalar") {
        model->Add(name, whole.clone().requires_grad_());
      } else {
        whole.requires_grad_();
        model->AddShard(name, whole, LayoutOf(name, ToDimsOf(whole), ranks),
                        holder);
      }
    }
    return model;
  }

  static Dims ToDimsOf(const at::Tensor& tensor) {
    return Dims(tensor.sizes().begin(), tensor.sizes().end());
  }

  static StateDict WholeDict(double start) {
    StateDict dict;
    for (const auto& [name, whole] : Whole(start)) {
      dict.Set(name, Value(TensorValue(whole)));
    }
    return dict;
  }

  // Whether the live tensors of `model` have the values of Make(.., start).
  static absl::Status Check(FakeModel& model, int64_t ranks, Holder holder,
                            double start) {
    const std::unique_ptr<FakeModel> expected = Make(ranks, holder, start);
    for (size_t i = 0; i < model.size(); ++i) {
      if (!at::equal(model.tensor(i).detach(), expected->tensor(i).detach())) {
        return Fail(absl::StrCat("tensor ", i, " has other values"));
      }
    }
    return absl::OkStatus();
  }
};

inline StateDictOptions Full() {
  StateDictOptions options;
  options.full_state_dict = true;
  return options;
}

// Runs `body` on all ranks and returns what each returned; a body that ends
// with an error has said goodbye.
inline std::vector<absl::Status> RunAndLeave(
    int ranks, absl::FunctionRef<absl::Status(Communicator&)> body) {
  return RunRankThreads(
      ranks, [&](Communicator& comm) { return Leave(comm, body(comm)); },
      {absl::Seconds(60), {}, /*shutdown=*/false});
}

}  // namespace dsd::test

#endif  // DSD_CORE_STATE_DICT_TEST_WORLD_H_
