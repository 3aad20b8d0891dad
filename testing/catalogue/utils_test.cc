// SPDX-License-Identifier: Apache-2.0
//
// PyTorch's test_state_dict_utils.py, by the names of its tests. Its helpers
// take any dict; here a dict is what a source lists.

#include <string>
#include <utility>
#include <vector>

#include "ATen/Functions.h"
#include "absl/status/status.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/state_dict/source_session.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/frontends/module/named_tensors.h"
#include "dsd/testing/catalogue/fixtures.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::catalogue {
namespace {

// Rows of this rank of `whole`, as a shard.
absl::StatusOr<at::Tensor> ShardOf(const at::Tensor& whole,
                                   Communicator& comm) {
  DSD_ASSIGN_OR_RETURN(
      Layout layout,
      Layout::FromPlacements(Dims(whole.sizes().begin(), whole.sizes().end()),
                             DeviceMesh::Iota({comm.size()}), {Shard(0)}));
  const int64_t rows = (whole.size(0) + comm.size() - 1) / comm.size();
  const int64_t begin = std::min(rows * comm.rank(), whole.size(0));
  const at::Tensor part =
      whole.slice(0, begin, std::min(begin + rows, whole.size(0))).clone();
  DSD_RETURN_IF_ERROR(
      ShardingTable::Global().Set(part, std::move(layout), comm.rank()));
  return part;
}

absl::StatusOr<StateDict> Get(const std::vector<NamedTensor>& tensors,
                              Communicator& comm,
                              const StateDictOptions& options) {
  NamedTensorsSource source([&] { return tensors; });
  return SourceSession(&source, {}, &comm, options).GetModel();
}

at::Tensor Whole() {
  return at::arange(81).to(at::kFloat).view({9, 3, 3}).sin();
}

TEST(TestStateDictUtils, test_gather_state_dict_dtensor) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const at::Tensor part, ShardOf(Whole(), comm));
    StateDictOptions options;
    options.full_state_dict = true;
    DSD_ASSIGN_OR_RETURN(const StateDict found,
                         Get({{"dtensor", part}}, comm, options));
    return Expect(TensorAt(found, "dtensor").equal(Whole()), "it is whole");
  });
}

TEST(TestStateDictUtils, test_gather_with_cpu_and_ranks_only) {
  OnRanks(
      [](Communicator& comm) -> absl::Status {
        DSD_ASSIGN_OR_RETURN(const at::Tensor part, ShardOf(Whole(), comm));
        StateDictOptions options;
        options.full_state_dict = true;
        options.cpu_offload = true;
        options.full_state_dict_ranks = {0, 2};
        DSD_ASSIGN_OR_RETURN(const StateDict found,
                             Get({{"dtensor", part}}, comm, options));
        if (comm.rank() % 2 == 1) return Expect(found.empty(), "it is empty");
        return Expect(TensorAt(found, "dtensor").equal(Whole()), "it is whole");
      },
      {4});
}

TEST(TestStateDictUtils, test_cpu_and_ranks_only) {
  OnRanks(
      [](Communicator& comm) -> absl::Status {
        StateDictOptions options;
        options.full_state_dict = true;
        options.cpu_offload = true;
        options.full_state_dict_ranks = {0, 2};
        DSD_ASSIGN_OR_RETURN(
            const StateDict found,
            Get({{"tensor1", at::arange(10)}, {"tensor2", at::ones({10})}},
                comm, options));
        if (comm.rank() % 2 == 1) return Expect(found.empty(), "it is empty");
        return Expect(TensorAt(found, "tensor1").equal(at::arange(10)) &&
                          TensorAt(found, "tensor2").equal(at::ones({10})),
                      "both are there");
      },
      {4});
}

// Shards and plain tensors between each other.
TEST(TestStateDictUtils, test_complicated_dict) {
  OnRanks([](Communicator& comm) -> absl::Status {
    std::vector<NamedTensor> tensors;
    StateDict expected;
    for (int i = 0; i < 10; ++i) {
      const std::string shard = "list." + std::to_string(2 * i);
      const std::string plain = "list." + std::to_string(2 * i + 1);
      const at::Tensor whole = Whole() + i;
      DSD_ASSIGN_OR_RETURN(at::Tensor part, ShardOf(whole, comm));
      tensors.push_back({shard, std::move(part)});
      tensors.push_back({plain, at::full({2}, i)});
      expected.Set(shard, Value(whole));
      expected.Set(plain, Value(at::full({2}, i)));
    }
    tensors.push_back({"arange", at::arange(10)});
    expected.Set("arange", Value(at::arange(10)));
    StateDictOptions options;
    options.full_state_dict = true;
    DSD_ASSIGN_OR_RETURN(const StateDict found, Get(tensors, comm, options));
    return ExpectEqual(found, expected, "gathered");
  });
}

TEST(TestStateDictUtils, test_create_cpu_state_dict) {
  StateDict dict;
  dict.Set("tensor1", Value(at::arange(10)));
  dict.Set("bytes", Value(Bytes{"raw"}));
  dict.Set("scalar", Value(at::full({}, 7, at::kLong)));
  dict.Set("lr", Value(0.5));
  dict.Set("nested", Value(Value::List{
                         Value(1), Value(Value::List{Value(at::ones({3}))})}));
  absl::StatusOr<StateDict> staging = CopyToHost(dict);
  ASSERT_TRUE(staging.ok()) << staging.status();
  TensorAt(dict, "tensor1").add_(5);
  ASSERT_EQ(CopyStateDictInto(dict, *staging), absl::OkStatus());
  EXPECT_EQ(ExpectEqual(*staging, dict, "copied again"), absl::OkStatus());
  EXPECT_FALSE(
      TensorAt(*staging, "tensor1").is_alias_of(TensorAt(dict, "tensor1")));
  dict.Set("tensor1", Value(at::arange(11)));
  EXPECT_FALSE(CopyStateDictInto(dict, *staging).ok());
}

TEST(TestStateDictUtils, test_state_dict_util_distribute_tensors) {
  OnRanks([](Communicator& comm) -> absl::Status {
    const at::Tensor even =
        at::arange(2 * comm.size()).to(at::kFloat).view({comm.size(), 2});
    const at::Tensor uneven = at::ones({1, 2});
    DSD_ASSIGN_OR_RETURN(const at::Tensor even_part,
                         ShardOf(at::zeros_like(even), comm));
    DSD_ASSIGN_OR_RETURN(const at::Tensor uneven_part,
                         ShardOf(at::zeros_like(uneven), comm));
    const at::IntArrayRef strides = even_part.strides();
    StateDict whole;
    whole.Set("even", Value(even));
    whole.Set("uneven", Value(uneven));
    const std::vector<NamedTensor> live = {{"even", even_part},
                                           {"uneven", uneven_part}};
    NamedTensorsSource source([&] { return live; });
    DSD_RETURN_IF_ERROR(
        SourceSession(&source, {}, &comm, {}).SetModel(whole).status());
    DSD_RETURN_IF_ERROR(
        Expect(even_part.strides() == strides, "strides are kept"));
    StateDictOptions options;
    options.full_state_dict = true;
    DSD_ASSIGN_OR_RETURN(const StateDict found, Get(live, comm, options));
    return ExpectEqual(found, whole, "distributed");
  });
}

TEST(TestStateDictUtils, test_cpu_offload_for_dtensor) {
  OnRanks([](Communicator& comm) -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const at::Tensor part,
                         ShardOf(at::ones({8 * comm.size(), 8}), comm));
    const std::vector<NamedTensor> live = {{"dtensor", part}};
    DSD_ASSIGN_OR_RETURN(const StateDict state, Get(live, comm, {}));
    DSD_ASSIGN_OR_RETURN(StateDict copy, CopyToHost(state));
    DSD_RETURN_IF_ERROR(
        Expect(!copy.Find("dtensor")->get_if<TensorValue>()->is_plain(),
               "the copy is a shard"));
    part.add_(1);
    DSD_RETURN_IF_ERROR(
        Expect(!ExpectEqual(copy, state, "").ok(), "the copy is its own"));
    DSD_RETURN_IF_ERROR(CopyStateDictInto(state, copy));
    return ExpectEqual(copy, state, "copied again");
  });
}

}  // namespace
}  // namespace dsd::catalogue
