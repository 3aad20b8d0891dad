// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/module/named_tensors.h"

#include <string>
#include <vector>

#include "ATen/Functions.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/state_dict/source_session.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<std::string> KeysOf(const StateDict& dict) {
  std::vector<std::string> keys;
  for (size_t i = 0; i < dict.size(); ++i) keys.push_back(dict.key_text(i));
  return keys;
}

TEST(NamedTensorsTest, KeysInOrderWithoutUndefinedTensors) {
  NamedTensorsSource source([] {
    return std::vector<NamedTensor>{{"b.w", at::zeros({2})},
                                    {"a", at::Tensor()},
                                    {"b.b", at::zeros({1}), EntryKind::kBuffer},
                                    {"a.w", at::zeros({3})}};
  });
  const absl::StatusOr<StateDict> state =
      SourceSession(&source, {}, nullptr, {}).GetModel();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_THAT(KeysOf(*state), ElementsAre("b.w", "b.b", "a.w"));
}

TEST(NamedTensorsTest, TiedTensorsAreFilledUnderAnyName) {
  const at::Tensor weight = at::zeros({2});
  NamedTensorsSource source([&] {
    return std::vector<NamedTensor>{{"in.w", weight}, {"out.w", weight}};
  });
  StateDict loaded;
  loaded.Set("out.w", Value(at::ones({2})));
  const absl::StatusOr<IncompatibleKeys> keys =
      SourceSession(&source, {}, nullptr, {}).SetModel(loaded);
  ASSERT_TRUE(keys.ok()) << keys.status();
  EXPECT_TRUE(weight.eq(1.0).all().item<bool>());
}

TEST(NamedTensorsTest, SeesWhatTheListSaysNow) {
  std::vector<NamedTensor> list = {{"a", at::zeros({1})}};
  NamedTensorsSource source([&] { return list; });
  SourceSession session(&source, {}, nullptr, {});
  ASSERT_TRUE(session.GetModel().ok());
  list.push_back({"b", at::zeros({1})});
  const absl::StatusOr<StateDict> state = session.GetModel();
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_THAT(KeysOf(*state), ElementsAre("a", "b"));
}

TEST(NamedTensorsTest, NamesMayChange) {
  std::vector<NamedTensor> list = {{"a", at::zeros({1})}, {"b", at::ones({1})}};
  NamedTensorsSource source([&] { return list; });
  SourceSession session(&source, {}, nullptr, {});
  ASSERT_TRUE(session.GetModel().ok());
  ASSERT_TRUE(session.GetModel().ok());
  EXPECT_EQ(session.stats().tables_built, 1);
  list[1].fqn = "c";
  EXPECT_THAT(KeysOf(*session.GetModel()), ElementsAre("a", "c"));
  list[0].kind = EntryKind::kNonPersistentBuffer;
  EXPECT_THAT(KeysOf(*session.GetModel()), ElementsAre("c"));
}

TEST(NamedTensorsTest, NamesMustBeThereAndDiffer) {
  std::string second;
  NamedTensorsSource source([&] {
    return std::vector<NamedTensor>{{"a", at::zeros({1})},
                                    {second, at::ones({1})}};
  });
  const absl::Status empty =
      SourceSession(&source, {}, nullptr, {}).GetModel().status();
  EXPECT_EQ(empty.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(empty.message()), HasSubstr("has no name"));
  second = "a";
  const absl::Status twice =
      SourceSession(&source, {}, nullptr, {}).GetModel().status();
  EXPECT_EQ(twice.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(twice.message()), HasSubstr("\"a\""));
}

}  // namespace
}  // namespace dsd
