// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/flat_state.h"

#include <string>
#include <utility>
#include <vector>

#include "ATen/ops/zeros.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/state_dict/fake_sources.h"
#include "dsd/core/value/flatten.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::ElementsAre;

StateDict Job() {
  StateDict group;
  group.Set("lr", Value(0.1));
  group.Set("betas", Value(Value::Tuple{{0.9, 0.99}}));
  group.Set("params", Value(Value::List{Value("w")}));
  StateDict moments;
  moments.Set("exp_avg", Value(TensorValue(at::zeros({2}))));
  StateDict state;
  state.Set("w", Value(std::move(moments)));
  StateDict optim;
  optim.Set("state", Value(std::move(state)));
  optim.Set("param_groups", Value(Value::List{Value(std::move(group))}));
  StateDict model;
  model.Set("w", Value(TensorValue(at::zeros({2}))));
  StateDict job;
  job.Set("model", Value(std::move(model)));
  job.Set("optim", Value(std::move(optim)));
  job.Set("step", Value(500));
  return job;
}

TEST(FlatStateTest, KeysAreThoseOfPython) {
  const StateDict job = Job();
  const absl::StatusOr<FlatState> flat = Flatten(job, nullptr);
  ASSERT_TRUE(flat.ok()) << flat.status();
  ASSERT_EQ(flat->tensors.catalog().size(), 2);
  EXPECT_EQ(flat->tensors.catalog()[0].fqn, "model.w");
  EXPECT_EQ(flat->tensors.catalog()[1].fqn, "optim.state.w.exp_avg");
  EXPECT_EQ(JoinPath(flat->tensor_paths[1]), "optim.state.w.exp_avg");
  std::vector<std::string> objects;
  for (const auto& entry : flat->objects)
    objects.push_back(JoinPath(entry.path));
  EXPECT_THAT(objects, ElementsAre("optim.param_groups.0.lr",
                                   "optim.param_groups.0.betas",
                                   "optim.param_groups.0.params", "step"));
}

TEST(FlatStateTest, ObjectsGoBackToTheirPlaces) {
  StateDict job = Job();
  FlatState flat = *Flatten(job, nullptr);
  flat.objects[0].value = Object(0.5);
  flat.objects[3].value = Object(501);
  ASSERT_TRUE(PutObjects(flat.objects, job).ok());
  EXPECT_EQ(*job.Find("step")->get_if<int64_t>(), 501);
  const auto& groups = *job.Find("optim")
                            ->get_if<StateDict>()
                            ->Find("param_groups")
                            ->get_if<Value::List>();
  EXPECT_EQ(*groups[0].get_if<StateDict>()->Find("lr")->get_if<double>(), 0.5);
  // The tensors are still there.
  EXPECT_TRUE(
      job.Find("model")->get_if<StateDict>()->Find("w")->is<TensorValue>());
}

TEST(FlatStateTest, EqualKeysAndTensorsInTuplesAreNamed) {
  StateDict dict;
  StateDict inner;
  inner.Set("b", Value(1));
  dict.Set("a", Value(std::move(inner)));
  dict.Set("a.b", Value(2));
  EXPECT_THAT(Flatten(dict, nullptr).status(),
              IsStatus(absl::StatusCode::kAlreadyExists, "\"a.b\""));
  StateDict tuple;
  tuple.Set("t", Value(Value::Tuple{{Value(TensorValue(at::zeros({1})))}}));
  EXPECT_THAT(Flatten(tuple, nullptr).status(),
              IsStatus(absl::StatusCode::kInvalidArgument, "\"t\""));
}

TEST(FlatStateTest, ShardOfAnotherRankIsNamed) {
  const Layout layout =
      *Layout::FromPlacements({4}, DeviceMesh::Iota({2}), {Shard(0)});
  StateDict dict;
  dict.Set("w", Value(*TensorValue::Sharded({layout, 1}, at::zeros({2}))));
  // Alone, it is this rank's.
  EXPECT_TRUE(Flatten(dict, nullptr).ok());
  const auto results = RunRankThreads(
      2, [&](Communicator& comm) { return Flatten(dict, &comm).status(); },
      {absl::Seconds(60), {}, /*shutdown=*/false});
  EXPECT_THAT(results[0],
              IsStatus(absl::StatusCode::kFailedPrecondition, "\"w\""));
  EXPECT_TRUE(results[1].ok()) << results[1];
}

}  // namespace
}  // namespace dsd
