// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/state_dict_ops.h"

#include <cmath>
#include <limits>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ATen/Functions.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/layout/layout.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TensorValue Sharded(at::Tensor local, Dims shape, int64_t ranks) {
  Sharding sharding{
      *Layout::FromPlacements(std::move(shape), DeviceMesh::Iota({ranks}),
                              {Shard(0)}),
      1};
  return *TensorValue::Sharded(std::move(sharding), std::move(local));
}

// A model and its optimizer, rank 1 of 2, with one tensor under two names.
StateDict Example() {
  const at::Tensor tied = at::arange(6).to(at::kFloat).view({2, 3});
  StateDict model;
  model.Set("embedding.weight", Value(tied));
  model.Set("head.weight", Value(tied));
  model.Set("fc.weight", Value(Sharded(at::full({1, 4}, 2.5), {3, 4}, 2)));
  model.Set("count", Value(at::full({}, 7, at::kLong)));
  StateDict entry;
  entry.Set("step", Value(3));
  entry.Set("exp_avg", Value(Sharded(at::full({1, 4}, 0.5), {3, 4}, 2)));
  StateDict state;
  state.Set("fc.weight", Value(std::move(entry)));
  StateDict group;
  group.Set("lr", Value(0.1));
  group.Set("betas", Value(Value::Tuple{{Value(0.9), Value(0.999)}}));
  group.Set("params", Value(Value::List{Value("fc.weight")}));
  StateDict optim;
  optim.Set("state", Value(std::move(state)));
  optim.Set("param_groups", Value(Value::List{Value(std::move(group))}));
  StateDict dict;
  dict.Set("model", Value(std::move(model)));
  dict.Set("optim", Value(std::move(optim)));
  dict.Set("nothing", Value(at::Tensor()));
  return dict;
}

StateDict& Below(StateDict& dict, const char* key) {
  return *dict.Find(key)->get_if<StateDict>();
}

at::Tensor Local(StateDict& dict, const char* key) {
  return *dict.Find(key)->get_if<TensorValue>()->Local();
}

std::vector<std::string> Diff(const StateDict& a, const StateDict& b,
                              const DiffOptions& options = {}) {
  const auto differences = DiffStateDicts(a, b, options);
  EXPECT_TRUE(differences.ok()) << differences.status();
  return *differences;
}

TEST(StateDictOpsTest, ACloneIsEqualAndSharesNothingButTies) {
  StateDict original = Example();
  absl::StatusOr<StateDict> clone = CloneStateDict(original);
  ASSERT_TRUE(clone.ok()) << clone.status();
  EXPECT_THAT(Diff(original, *clone), IsEmpty());
  StateDict& model = Below(*clone, "model");
  EXPECT_TRUE(
      Local(model, "embedding.weight").is_same(Local(model, "head.weight")));
  Local(Below(original, "model"), "fc.weight").fill_(9);
  EXPECT_THAT(Diff(original, *clone),
              ElementsAre("model.fc.weight: 4 of 4 elements, the first at "
                          "[0, 0]: 9.0 and 2.5"));
}

TEST(StateDictOpsTest, ACopyInHostMemoryIsContiguous) {
  StateDict dict;
  dict.Set("t", Value(at::arange(6).view({2, 3}).t().requires_grad_(false)));
  absl::StatusOr<StateDict> copy = CopyToHost(dict);
  ASSERT_TRUE(copy.ok()) << copy.status();
  EXPECT_TRUE(Local(*copy, "t").is_contiguous());
  EXPECT_FALSE(Local(*copy, "t").is_alias_of(Local(dict, "t")));
  EXPECT_THAT(Diff(dict, *copy), IsEmpty());
}

TEST(StateDictOpsTest, CopyIntoFillsTheSameMemory) {
  StateDict from = Example();
  StateDict to = *CloneStateDict(from);
  const at::Tensor memory = Local(Below(to, "model"), "fc.weight");
  Local(Below(from, "model"), "fc.weight").fill_(-1);
  Below(Below(from, "optim"), "state");
  Below(Below(Below(from, "optim"), "state"), "fc.weight")
      .Set("step", Value(4));
  ASSERT_EQ(CopyStateDictInto(from, to), absl::OkStatus());
  EXPECT_THAT(Diff(from, to), IsEmpty());
  EXPECT_TRUE(Local(Below(to, "model"), "fc.weight").is_same(memory));
  EXPECT_TRUE(memory.eq(-1).all().item<bool>());
  EXPECT_FALSE(memory.is_alias_of(Local(Below(from, "model"), "fc.weight")));
}

TEST(StateDictOpsTest, CopyIntoAnotherStructureChangesNothing) {
  const StateDict before = Example();
  const auto error = [&](absl::FunctionRef<void(StateDict&)> change) {
    StateDict from = *CloneStateDict(before);
    Local(Below(from, "model"), "embedding.weight").fill_(-1);
    change(from);
    StateDict to = *CloneStateDict(before);
    const absl::Status status = CopyStateDictInto(from, to);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(Diff(before, to), IsEmpty());
    return std::string(status.message());
  };
  EXPECT_THAT(error([](StateDict& dict) {
                Below(dict, "model").Set("more", Value(at::ones({1})));
              }),
              HasSubstr("model.more: only in the first"));
  EXPECT_THAT(error([](StateDict& dict) {
                Below(dict, "model").Set("count", Value(at::ones({})));
              }),
              HasSubstr("model.count: type float32 and int64"));
  EXPECT_THAT(error([](StateDict& dict) {
                Below(dict, "model").Set("count", Value(3));
              }),
              HasSubstr("model.count: int and tensor"));
  EXPECT_THAT(error([](StateDict& dict) {
                Below(dict, "model").Set("fc.weight", Value(at::ones({3, 4})));
              }),
              HasSubstr("model.fc.weight: layout whole and "));
}

TEST(StateDictOpsTest, DifferencesAreListedWithTheirPlaces) {
  StateDict a;
  a.Set("x", Value(at::arange(6).to(at::kFloat).view({2, 3})));
  a.Set("i", Value(1));
  a.Set("l", Value(Value::List{Value("p"), Value(2)}));
  a.Set("gone", Value(true));
  StateDict b = *CloneStateDict(a);
  Local(b, "x").select(0, 1).select(0, 2).fill_(7.5);
  b.Set("i", Value(1.0));
  b.Set("l", Value(Value::List{Value("q"), Value(2)}));
  b.Erase(PathSegment("gone"));
  b.Set("new", Value(None()));
  EXPECT_THAT(
      Diff(a, b),
      ElementsAre("x: 1 of 6 elements, the first at [1, 2]: 5.0 and 7.5",
                  "i: int and float", "l.0: 'p' and 'q'",
                  "gone: only in the first", "new: only in the second"));
  DiffOptions two;
  two.max_differences = 2;
  EXPECT_EQ(Diff(a, b, two).size(), 2);
}

TEST(StateDictOpsTest, BytesOrTolerance) {
  StateDict a;
  a.Set("x", Value(at::full({2}, std::numeric_limits<float>::quiet_NaN())));
  a.Set("y", Value(at::full({2}, 1.0)));
  StateDict b = *CloneStateDict(a);
  EXPECT_THAT(Diff(a, b), IsEmpty());
  Local(b, "y").add_(1e-6);
  EXPECT_EQ(Diff(a, b).size(), 1);
  DiffOptions options;
  options.atol = 1e-5;
  EXPECT_THAT(Diff(a, b, options), IsEmpty());
  Local(b, "x").fill_(0);
  EXPECT_THAT(Diff(a, b, options),
              ElementsAre("x: 2 of 2 elements, the first at [0]: nan and 0.0"));
  // 0.0 and -0.0 are different bytes.
  Local(a, "y").fill_(0.0);
  Local(b, "y").fill_(-0.0);
  EXPECT_EQ(Diff(a, b).size(), 2);
}

// The same bytes, read in another way.
TEST(StateDictOpsTest, ConjugatedAndNegatedValuesDiffer) {
  const at::Tensor z = at::complex(at::ones({2}), at::ones({2}));
  for (const auto& [a, b] :
       {std::pair(z, z.conj()), std::pair(at::imag(z), at::imag(z.conj()))}) {
    StateDict first;
    first.Set("z", Value(TensorValue(a)));
    StateDict second;
    second.Set("z", Value(TensorValue(b)));
    const auto differences = DiffStateDicts(first, second);
    ASSERT_TRUE(differences.ok()) << differences.status();
    EXPECT_EQ(differences->size(), 1);
    second.Set("z", Value(TensorValue(b.clone())));
    const auto of_clones = DiffStateDicts(first, second);
    ASSERT_TRUE(of_clones.ok());
    EXPECT_EQ(of_clones->size(), 1);
  }
}

TEST(StateDictOpsTest, KeyOrderCountsIfAsked) {
  StateDict a;
  a.Set("x", Value(1));
  a.Set("y", Value(2));
  StateDict b;
  b.Set("y", Value(2));
  b.Set("x", Value(1));
  EXPECT_THAT(Diff(a, b), IsEmpty());
  DiffOptions options;
  options.compare_key_order = true;
  EXPECT_THAT(Diff(a, b, options),
              ElementsAre("the dict: key 0 is \"x\" and \"y\""));
}

TEST(StateDictOpsTest, TextThatAPersonCanRead) {
  EXPECT_EQ(StateDictText(Example()), R"(model
  embedding.weight  float32 [2, 3]
  head.weight       float32 [2, 3]
  fc.weight         float32 [3, 4] mesh[2] S(0)
  count             int64 [] = 7
optim
  state
    fc.weight
      step     3
      exp_avg  float32 [3, 4] mesh[2] S(0)
  param_groups
    0
      lr      0.1
      betas   (0.9, 0.999)
      params  ['fc.weight']
nothing  undefined
)");
}

TEST(StateDictOpsTest, DictionariesOfOthersAndBack) {
  StateDict dict;
  dict.Set("b", Value(at::ones({2})));
  StateDict inner;
  inner.Set("c",
            Value(Value::List{Value(at::zeros({1})), Value(at::ones({1}))}));
  dict.Set("a", Value(std::move(inner)));

  const auto map = ToTensorMap(dict);
  ASSERT_TRUE(map.ok()) << map.status();
  EXPECT_EQ(map->size(), 3);
  EXPECT_TRUE(map->at("a.c.1").is_same(
      *(*Below(dict, "a").Find("c")->get_if<Value::List>())[1]
           .get_if<TensorValue>()
           ->Local()));

  const auto ordered = ToOrderedDict(dict);
  ASSERT_TRUE(ordered.ok()) << ordered.status();
  EXPECT_THAT(ordered->keys(), ElementsAre("b", "a.c.0", "a.c.1"));
  const StateDict back = FromOrderedDict(*ordered);
  EXPECT_THAT(Diff(back, FromTensorMap(*map)), IsEmpty());
  DiffOptions in_order;
  in_order.compare_key_order = true;
  EXPECT_EQ(Diff(back, FromTensorMap(*map), in_order).size(), 1);  // sorted

  const auto c10_dict = ToC10Dict(dict);
  ASSERT_TRUE(c10_dict.ok()) << c10_dict.status();
  EXPECT_THAT(Diff(back, FromC10Dict(*c10_dict), in_order), IsEmpty());
}

TEST(StateDictOpsTest, MapsHoldTensorsOnly) {
  StateDict dict;
  dict.Set("a", Value(at::ones({1})));
  dict.Set("n", Value(3));
  EXPECT_THAT(std::string(ToTensorMap(dict).status().message()),
              HasSubstr("\"n\" is of type int"));
  StateDict twice;
  twice.Set("a.b", Value(at::ones({1})));
  StateDict inner;
  inner.Set("b", Value(at::ones({1})));
  twice.Set("a", Value(std::move(inner)));
  EXPECT_THAT(std::string(ToOrderedDict(twice).status().message()),
              HasSubstr("two values have the flat key \"a.b\""));
  EXPECT_TRUE(ToTensorMap(StateDict()).ok());
}

}  // namespace
}  // namespace dsd
