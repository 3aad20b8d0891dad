// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/fqn/fqn_table.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/status_matchers.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/fqn/module_wrapper.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd {
namespace {

using ::absl_testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Each call gives another tensor.
TensorIdentity NewTensor() {
  static int storages[1000];
  static int next = 0;
  TensorIdentity id;
  id.storage = &storages[next++];
  id.sizes = {2, 3};
  id.strides = {3, 1};
  return id;
}

ModuleNode Leaf(std::string name, std::vector<std::string> tensors) {
  ModuleNode node;
  node.name = std::move(name);
  for (std::string& tensor : tensors) {
    node.tensors.push_back(
        {std::move(tensor), EntryKind::kParameter, NewTensor(), 0});
  }
  return node;
}

ModuleNode Wrap(std::string name, absl::string_view segment, ModuleNode inner) {
  ModuleNode node;
  node.name = std::move(name);
  node.wrapped_child = std::string(segment);
  inner.name = std::string(segment);
  node.children.push_back(std::move(inner));
  return node;
}

std::vector<std::string> Fqns(const FqnTable& table) {
  std::vector<std::string> out;
  for (const FqnTable::Entry& entry : table.entries()) out.push_back(entry.fqn);
  return out;
}

FqnTable BuildOk(const ModuleNode& root) {
  absl::StatusOr<FqnTable> table = FqnTable::Build(root);
  EXPECT_TRUE(table.ok()) << table.status();
  return table.ok() ? *std::move(table) : FqnTable();
}

TEST(FqnTableTest, KeysAreInModuleOrder) {
  ModuleNode root = Leaf("", {"scale"});
  root.tensors.push_back({"running", EntryKind::kBuffer, NewTensor(), 7});
  root.children.push_back(Leaf("b", {"weight", "bias"}));
  root.children.push_back(Leaf("a", {"weight"}));
  root.children[0].children.push_back(Leaf("deep", {"w"}));
  const FqnTable table = BuildOk(root);
  EXPECT_THAT(Fqns(table), ElementsAre("scale", "running", "b.weight", "b.bias",
                                       "b.deep.w", "a.weight"));
  EXPECT_EQ(table.entries()[1].kind, EntryKind::kBuffer);
  EXPECT_EQ(table.entries()[1].slot, 7);
  EXPECT_EQ(table.Find("b.deep.w"), 4);
  EXPECT_EQ(table.Find("b.deep"), std::nullopt);
}

TEST(FqnTableTest, FindsNearWhereItFoundBefore) {
  ModuleNode root = Leaf("", {"a", "b", "c"});
  root.children.push_back(Leaf("d", {"e", "f"}));
  const FqnTable table = BuildOk(root);
  size_t position = 0;
  for (const char* fqn : {"a", "c", "x", "d.e", "d.f", "a", "b", "d.f"}) {
    EXPECT_EQ(table.FindNear(fqn, &position), table.Find(fqn)) << fqn;
  }
  EXPECT_EQ(position, 5u);
  EXPECT_EQ(table.FindNear("y", &position), std::nullopt);
  EXPECT_EQ(table.FindNear("c", &position), 2u);
}

TEST(FqnTableTest, WrapperSegmentsAreLeftOut) {
  ModuleNode net;
  net.children.push_back(
      Wrap("block", kCheckpointSegment,
           Wrap("", kCompileSegment, Leaf("", {"weight", "bias"}))));
  net.children.push_back(Wrap("head", kFsdpSegment, Leaf("", {"weight"})));
  const FqnTable table =
      BuildOk(Wrap("", kDdpSegment, Wrap("", kFsdpSegment, std::move(net))));
  EXPECT_THAT(Fqns(table),
              ElementsAre("block.weight", "block.bias", "head.weight"));
}

TEST(FqnTableTest, ChildThatIsOnlyCalledLikeAWrapperSegmentStays) {
  ModuleNode root;
  root.children.push_back(Leaf("module", {"weight"}));
  root.children.push_back(Leaf("_orig_mod", {"weight"}));
  root.children.push_back(Wrap("inner", kDdpSegment, [] {
    ModuleNode wrapped;
    wrapped.children.push_back(Leaf("module", {"weight"}));
    return wrapped;
  }()));
  EXPECT_THAT(
      Fqns(BuildOk(root)),
      ElementsAre("module.weight", "_orig_mod.weight", "inner.module.weight"));
}

TEST(FqnTableTest, WrapperKeepsItsOtherChildrenAndTensors) {
  ModuleNode root = Wrap("", kFsdpSegment, Leaf("", {"weight"}));
  root.tensors.push_back({"scale", EntryKind::kBuffer, NewTensor(), 0});
  root.children.push_back(Leaf("adapter", {"weight"}));
  EXPECT_THAT(Fqns(BuildOk(root)),
              ElementsAre("scale", "weight", "adapter.weight"));
}

TEST(FqnTableTest, TiedTensorsAreOneGroupNamedByTheFirst) {
  ModuleNode root;
  root.children.push_back(Leaf("embedding", {"weight"}));
  root.children.push_back(Leaf("middle", {"weight"}));
  root.children.push_back(Leaf("head", {"weight"}));
  root.children[2].tensors[0].identity = root.children[0].tensors[0].identity;
  const FqnTable table = BuildOk(root);
  ASSERT_EQ(table.groups().size(), 2);
  EXPECT_THAT(table.groups()[0], ElementsAre(0, 2));
  EXPECT_THAT(table.groups()[1], ElementsAre(1));
  EXPECT_EQ(table.canonical(table.entries()[2].group).fqn, "embedding.weight");
}

TEST(FqnTableTest, OtherViewOfTheStorageIsAnotherTensor) {
  ModuleNode root = Leaf("", {"w", "slice"});
  root.tensors[1].identity = root.tensors[0].identity;
  root.tensors[1].identity.offset = 3;
  EXPECT_EQ(BuildOk(root).groups().size(), 2);
}

TEST(FqnTableTest, EqualFqnsAreAnErrorThatNamesBothPaths) {
  ModuleNode root;
  root.children.push_back(Wrap("block", kFsdpSegment, Leaf("", {"weight"})));
  root.children[0].tensors.push_back(
      {"weight", EntryKind::kParameter, NewTensor(), 0});
  EXPECT_THAT(
      FqnTable::Build(root).status(),
      StatusIs(absl::StatusCode::kAlreadyExists,
               AllOf(HasSubstr("\"block.weight\": registered"),
                     HasSubstr("\"block._fsdp_wrapped_module.weight\""))));
}

TEST(FqnTableTest, WrapperWithoutItsChildIsAnError) {
  ModuleNode root;
  root.children.push_back(Leaf("net", {"weight"}));
  root.children[0].wrapped_child = "module";
  EXPECT_THAT(FqnTable::Build(root).status(),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("\"net\""), HasSubstr("\"module\""))));
}

// 146053: the name a dict shows need not be the path of the tensor.
TEST(FqnTableTest, ModifiersHideAChildWithAllThatIsInIt) {
  ModuleNode root;
  root.children.push_back(Leaf("tok", {"scale"}));
  root.children[0].children.push_back(Leaf("embedding", {"weight", "bias"}));
  root.children[0].children.push_back(Leaf("other", {"weight"}));
  root.children[0].modifiers = {{"weight", "embedding"}};
  const FqnTable table = BuildOk(root);
  EXPECT_THAT(Fqns(table), ElementsAre("tok.scale", "tok.weight", "tok.bias",
                                       "tok.other.weight"));
}

TEST(FqnTableTest, ModifiersThatCollideAreAnError) {
  ModuleNode root;
  root.children.push_back(Leaf("a", {"weight"}));
  root.children.push_back(Leaf("b", {"weight"}));
  root.modifiers = {{"weight", "a"}, {"weight", "b"}};
  EXPECT_THAT(
      FqnTable::Build(root).status(),
      StatusIs(absl::StatusCode::kAlreadyExists,
               AllOf(HasSubstr("\"a.weight\""), HasSubstr("\"b.weight\""))));
}

TEST(FqnTableTest, ModifiersOfWhatIsNotThereAreAnError) {
  ModuleNode root;
  root.children.push_back(Leaf("a", {"weight"}));
  root.modifiers = {{"weight", "b"}};
  EXPECT_THAT(FqnTable::Build(root).status(),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("no child of that name")));
  root.modifiers = {{"bias", "a"}};
  EXPECT_THAT(FqnTable::Build(root).status(),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("nothing has that name there")));
}

TEST(FqnTableTest, TieOfWhatIsSavedAndWhatIsNotIsNamedByTheFirst) {
  ModuleNode root;
  root.children.push_back(Leaf("cache", {"table"}));
  root.children.push_back(Leaf("net", {"table"}));
  root.children[0].tensors[0].kind = EntryKind::kNonPersistentBuffer;
  root.children[1].tensors[0].kind = EntryKind::kBuffer;
  root.children[1].tensors[0].identity = root.children[0].tensors[0].identity;
  const FqnTable table = BuildOk(root);
  EXPECT_EQ(table.canonical(0).fqn, "net.table");
}

TEST(FqnTableTest, ModulesAreKnownByNameAndObject) {
  const int objects[3] = {};
  ModuleNode root = Wrap("", kDdpSegment, Leaf("", {"w"}));
  root.children[0].object = &objects[0];
  root.children[0].children.push_back(Leaf("a", {"w"}));
  root.children[0].children.push_back(Leaf("b", {"w"}));
  root.children[0].children[0].object = &objects[1];
  root.children[0].children[1].object = &objects[1];  // shared
  std::vector<std::string> names;
  const FqnTable table = BuildOk(root);
  for (const FqnTable::Module& module : table.modules()) {
    names.push_back(
        absl::StrCat(module.fqn, "/",
                     module.object == nullptr
                         ? -1
                         : static_cast<const int*>(module.object) - objects));
  }
  EXPECT_THAT(names, ElementsAre("/-1", "/0", "a/1", "b/1"));
}

// Names are opaque apart from the dots between them.
TEST(FqnTableTest, UnusualNames) {
  ModuleNode root = Leaf("", {"", " ", "a/b", "\xc3\xa9", "module", "0"});
  root.children.push_back(Leaf("0", {"\n\"'"}));
  EXPECT_THAT(Fqns(BuildOk(root)), ElementsAre("", " ", "a/b", "\xc3\xa9",
                                               "module", "0", "0.\n\"'"));
}

TEST(FqnTableTest, DeepTreesDoNotExhaustTheStack) {
  ModuleNode root = Leaf("l", {"w"});
  for (int i = 0; i < 2000; ++i) {
    ModuleNode parent;
    parent.name = "l";
    parent.children.push_back(std::move(root));
    root = std::move(parent);
  }
  EXPECT_EQ(BuildOk(root).entries()[0].fqn.size(), 2 * 2000 + 1);
}

TEST(FqnTableTest, EmptyModelIsAnEmptyTable) {
  EXPECT_TRUE(BuildOk(ModuleNode()).entries().empty());
}

}  // namespace
}  // namespace dsd
