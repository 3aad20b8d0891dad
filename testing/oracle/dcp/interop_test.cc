// SPDX-License-Identifier: Apache-2.0
//
// PyTorch itself on the other side: what Python writes is read here, what is
// written here Python reads, all of it equal.

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/core/value/flatten.h"
#include "dsd/core/value/value.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/testing/harness/rank_threads.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::checkpoint {
namespace {

// The arguments of the test.
std::string python_command;  // NOLINT: set once, by main
std::string oracle_script;   // NOLINT

std::string Folder(const std::string& name) {
  std::string folder =
      absl::StrCat(testing::TempDir(), "/", name, "_", getpid());
  EXPECT_TRUE(Env::Real()->files().CreateDirs(folder).ok());
  return folder;
}

// Runs dcp_oracle.py; its output goes to the test's.
void RunPython(const std::string& verb, const std::string& folder) {
  const std::string command = absl::StrCat(python_command, " ", oracle_script,
                                           " ", verb, " '", folder, "'");
  ASSERT_EQ(std::system(command.c_str()), 0) << command;
}

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

bool Exists(const std::string& path) {
  return ::access(path.c_str(), F_OK) == 0;
}

struct Dumped {
  DType dtype;
  Dims shape;
  std::string bytes;
};

std::map<std::string, Dumped> ReadDump(const std::string& folder) {
  std::map<std::string, Dumped> tensors;
  const std::string index = ReadFile(folder + "/index.txt");
  for (const absl::string_view line :
       absl::StrSplit(index, '\n', absl::SkipEmpty())) {
    const std::vector<std::string> fields = absl::StrSplit(line, '\t');
    Dumped tensor;
    tensor.dtype = *ParseDType(fields[1]);
    for (const absl::string_view extent :
         absl::StrSplit(fields[2], ',', absl::SkipEmpty())) {
      int64_t number;
      EXPECT_TRUE(absl::SimpleAtoi(extent, &number));
      tensor.shape.push_back(number);
    }
    tensor.bytes = ReadFile(absl::StrCat(folder, "/", fields[3]));
    tensors[fields[0]] = std::move(tensor);
  }
  return tensors;
}

void WriteDump(const std::string& folder,
               const std::map<std::string, Dumped>& tensors) {
  ASSERT_TRUE(Env::Real()->files().CreateDirs(folder).ok());
  std::ofstream index(folder + "/index.txt");
  int number = 0;
  for (const auto& [key, tensor] : tensors) {
    index << key << "\t" << DTypeName(tensor.dtype) << "\t"
          << absl::StrJoin(tensor.shape, ",") << "\t" << number << "\n";
    std::ofstream(absl::StrCat(folder, "/", number++), std::ios::binary)
        << tensor.bytes;
  }
}

// Whole tensors of one rank, in memory of their own.
struct WholeState {
  std::vector<std::string> buffers;
  MemoryEndpoint endpoint;
  State state;
};

std::unique_ptr<WholeState> Blank(
    const std::map<std::string, Dumped>& tensors) {
  auto out = std::make_unique<WholeState>();
  out->buffers.reserve(tensors.size());
  for (const auto& [key, tensor] : tensors) {
    out->buffers.emplace_back(tensor.bytes.size(), '\xEE');
    EXPECT_TRUE(
        out->endpoint
            .AddLocal(
                {key, tensor.dtype, Layout::Replicated(tensor.shape, {0})}, 0,
                reinterpret_cast<std::byte*>(out->buffers.back().data()))
            .ok());
  }
  out->state.tensors = &out->endpoint;
  return out;
}

// As objects() in dcp_oracle.py.
Object Objects() {
  using List = Object::List;
  using Tuple = Object::Tuple;
  std::string all;
  for (int c = 0; c < 256; ++c) all.push_back(static_cast<char>(c));
  Tuple range;
  for (int i = 0; i < 300; ++i) range.items.push_back(Object(i));
  Object::Dict dict;
  const auto set = [&dict](const char* key, Object value) {
    dict.Set(PathSegment(std::string(key)), std::move(value));
  };
  set("none", Object());
  set("true", Object(true));
  set("int", Object(17));
  set("big", Object(int64_t{1} << 40));
  set("negative", Object(-(int64_t{1} << 62)));
  set("float", Object(1e-3));
  set("text", Object("h\xc3\xa9llo \xf0\x9f\x98\x80"));
  set("bytes", Object(Bytes{all}));
  set("list", Object(List{Object(1), Object("two"), Object(3.0), Object()}));
  set("empty_list", Object(List{}));
  set("tuple", Object(Tuple{{Object(0.9), Object(0.999)}}));
  set("one", Object(Tuple{{Object(1)}}));
  set("long", Object(std::move(range)));
  set("mixed",
      Object(List{
          Object(Tuple{{Object(1),
                        Object(List{Object(2), Object(Tuple{{Object(3)}})})}}),
          Object("x")}));
  set("complex", Object(Complex(1.5, -2)));
  set("wide", Object(WideInt{std::string(12, '\0') + "\x10"}));
  set("wide_negative", Object(WideInt{std::string(7, '\xff') + "\x7f\xff"}));
  set("set", Object(Object::Set{{Object(2.5), Object(1), Object("a")}}));
  set("frozen", Object(Object::Set{
                    {Object(Tuple{{Object(1), Object(2)}}), Object(3)}, true}));
  Object::Dict inside;
  inside.Set(PathSegment(std::string("x")), Object(1));
  set("keys", Object(Tuple{{Object(Object::Map{
                  {Object(Tuple{{Object(1), Object(2)}}), Object(2.5), Object(),
                   Object(Bytes{"y"}), Object("text")},
                  {Object("a"), Object(List{Object()}),
                   Object(std::move(inside)), Object(3), Object(4)}})}}));
  const std::vector<int16_t> numbers = {0, 1, 2, 3, 4, 5};
  set("pair",
      Object(Tuple{
          {Object(HostTensor(
               DType::kInt16, {2, 3},
               std::string(reinterpret_cast<const char*>(numbers.data()), 12))),
           Object(5)}}));
  Object::Dict deep;
  deep.Set(PathSegment(std::string("t")),
           Object(List{Object(HostTensor(DType::kBFloat16, {}, "\xc0\x3f")),
                       Object(HostTensor(DType::kFloat32, {0, 2}, ""))}));
  set("deep", Object(Tuple{{Object(std::move(deep)), Object("x")}}));
  const auto group = [](double lr, List params) {
    Object::Dict out;
    out.Set(PathSegment(std::string("lr")), Object(lr));
    out.Set(PathSegment(std::string("params")), Object(std::move(params)));
    out.Set(PathSegment(std::string("none")), Object());
    return Object(std::move(out));
  };
  set("groups",
      Object(List{group(0.01, {Object("a"), Object("b")}), group(0.02, {})}));
  return Object(std::move(dict));
}

std::vector<ObjectEntry> FlatObjects() {
  Object::Dict root;
  root.Set(PathSegment(std::string("objects")), Objects());
  const Object tree(std::move(root));
  std::vector<ObjectEntry> out;
  VisitLeaves<HostTensor>(tree, [&](const Path& path, const Object& value) {
    out.push_back({path, value});
  });
  return out;
}

class ReadsPythonTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new std::string(Folder("python"));
    RunPython("write", *folder_);
  }
  static std::string* folder_;
};
std::string* ReadsPythonTest::folder_ = nullptr;

TEST_F(ReadsPythonTest, EveryTensorOfEveryCase) {
  for (const char* const name :
       {"everything", "threads", "file_per_item", "zstd", "ranks", "local"}) {
    SCOPED_TRACE(name);
    const std::string dir = absl::StrCat(*folder_, "/", name);
    if (!Exists(dir + ".dump")) continue;  // PyTorch is too old for it
    const std::map<std::string, Dumped> expected = ReadDump(dir + ".dump");
    const auto opened = Checkpoint::Open(dir);
    ASSERT_TRUE(opened.ok()) << opened.status();
    EXPECT_EQ((*opened)->catalog().size(), expected.size());
    EXPECT_FALSE((*opened)->has_digests());
    // Versions before 2.4 write none.
    EXPECT_EQ((*opened)->save_id().size() % 36, 0u);

    const std::unique_ptr<WholeState> target = Blank(expected);
    LoadOptions options;
    options.allow_unexpected = true;  // objects
    const auto report = Load(dir, target->state, nullptr, options);
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_FALSE(report->verified);
    size_t i = 0;
    for (const auto& [key, tensor] : expected) {
      EXPECT_TRUE(target->buffers[i++] == tensor.bytes) << key;
    }
    const VerifyReport verified = Verify(**opened);
    for (const Problem& problem : verified.problems) {
      ADD_FAILURE() << problem.key << ": " << problem.status;
    }
    EXPECT_TRUE(ComputeDigests(**opened).ok());
  }
}

// Onto other layouts than it was written from, by several ranks.
TEST_F(ReadsPythonTest, ReshardedOntoThreeRanks) {
  const std::string dir = *folder_ + "/ranks";
  const std::map<std::string, Dumped> expected = ReadDump(dir + ".dump");
  int64_t payload = 0;
  for (const auto& [key, tensor] : expected) payload += tensor.bytes.size();
  const auto ranks = RunRankThreads(3, [&](Communicator& comm) -> absl::Status {
    std::vector<std::string> buffers(expected.size());
    MemoryEndpoint endpoint;
    size_t i = 0;
    for (const auto& [key, tensor] : expected) {
      const Layout layout = *Layout::FromPlacements(
          tensor.shape, DeviceMesh::Iota({3}),
          {tensor.shape.empty()
               ? Replicate()
               : Shard(static_cast<int>(tensor.shape.size()) - 1)});
      int64_t bytes = ItemSize(tensor.dtype);
      const Dims local_shape = *layout.LocalShape(comm.rank());
      for (const int64_t extent : local_shape) bytes *= extent;
      buffers[i].resize(bytes);
      DSD_RETURN_IF_ERROR(
          endpoint.AddLocal({key, tensor.dtype, layout}, comm.rank(),
                            reinterpret_cast<std::byte*>(buffers[i].data())));
      ++i;
    }
    State state;
    state.tensors = &endpoint;
    LoadOptions options;
    options.allow_unexpected = true;
    DSD_ASSIGN_OR_RETURN(const LoadReport report,
                         Load(dir, state, &comm, options));
    EXPECT_EQ(report.payload_bytes_all, payload);
    for (const TensorSpec& spec : endpoint.catalog().tensors()) {
      const Dumped& whole = expected.at(spec.fqn);
      const Dims strides = RowMajorStrides(whole.shape);
      const int64_t item_size = ItemSize(whole.dtype);
      for (const LocalBox& local : spec.layout.BoxesOf(comm.rank())) {
        StridedView view;
        view.base = reinterpret_cast<std::byte*>(
                        const_cast<char*>(whole.bytes.data())) +
                    FlatIndex(whole.shape, local.box.lo) * item_size;
        for (const int64_t stride : strides) {
          view.strides_bytes.push_back(stride * item_size);
        }
        const int64_t elements = local.box.num_elements();
        std::string want(elements * item_size, '\0'), got = want;
        PackRange(view, local.box.extents(), item_size, 0, elements,
                  reinterpret_cast<std::byte*>(want.data()));
        const size_t tensor = *endpoint.catalog().Find(spec.fqn);
        DSD_RETURN_IF_ERROR(endpoint.Read(
            tensor, local.box, 0, elements, whole.dtype,
            absl::MakeSpan(reinterpret_cast<std::byte*>(got.data()),
                           got.size())));
        EXPECT_TRUE(got == want) << spec.fqn << " on rank " << comm.rank();
      }
    }
    return absl::OkStatus();
  });
  EXPECT_THAT(ranks, AllOk());
}

// Each rank has written its own index: equal objects are one, others go by
// rank.
TEST_F(ReadsPythonTest, RankLocalIndexesAreOneCheckpoint) {
  if (!Exists(*folder_ + "/local.dump")) {
    GTEST_SKIP() << "this PyTorch does not write them";
  }
  const auto opened = Checkpoint::Open(*folder_ + "/local");
  ASSERT_TRUE(opened.ok()) << opened.status();
  std::map<std::string, Object> objects;
  for (size_t i = 0; i < (*opened)->objects().size(); ++i) {
    const auto value = (*opened)->ReadObject(i);
    ASSERT_TRUE(value.ok()) << value.status();
    objects[(*opened)->objects()[i].key] = *value;
  }
  EXPECT_TRUE(objects["step"] == Object(5));
  EXPECT_EQ(objects.count("mine"), 0u);
  for (int rank = 0; rank < 4; ++rank) {
    EXPECT_TRUE(objects[absl::StrCat("mine@rank", rank)] ==
                Object(absl::StrCat("of rank ", rank)));
  }
  EXPECT_TRUE(Verify(**opened).unreferenced.empty());
}

TEST_F(ReadsPythonTest, ObjectsAreEqualAndStrangeOnesInert) {
  const auto opened = Checkpoint::Open(*folder_ + "/everything");
  ASSERT_TRUE(opened.ok()) << opened.status();
  std::map<std::string, Object> objects;
  std::map<std::string, Path> paths;
  for (size_t i = 0; i < (*opened)->objects().size(); ++i) {
    const StoredObject& stored = (*opened)->objects()[i];
    const auto value = (*opened)->ReadObject(i);
    ASSERT_TRUE(value.ok()) << value.status();
    objects[stored.key] = *value;
    paths[stored.key] = stored.path;
  }
  if (objects.count("objects") > 0) {
    // Versions before 2.3 keep dicts without tensors whole.
    EXPECT_TRUE(objects["objects"] == Objects());
    return;
  }
  for (const ObjectEntry& expected : FlatObjects()) {
    const std::string key = JoinPath(expected.path);
    ASSERT_EQ(objects.count(key), 1u) << key;
    EXPECT_TRUE(objects[key] == expected.value) << key;
    EXPECT_EQ(paths[key], expected.path) << key;
  }
  EXPECT_TRUE(objects["strange.set"] == Object(Object::Set{{Object(1)}}));
  EXPECT_TRUE(objects["strange.huge"] ==
              Object(WideInt{std::string(12, '\0') + "\x10"}));
  EXPECT_TRUE(objects["strange.dtype"] == Object(Opaque{"torch.float32"}));
  EXPECT_TRUE(objects["strange.size"] ==
              Object(Object::Tuple{{Object(2), Object(3)}}));
  Object::Dict ordered;
  ordered.Set(PathSegment(std::string("a")), Object(1));
  EXPECT_TRUE(objects["strange.ordered"] ==
              Object(Object::Tuple{{Object(ordered)}}));
  const std::vector<float> ones = {1, 1};
  EXPECT_TRUE(
      objects["strange.tensors"] ==
      Object(Object::Tuple{
          {Object(HostTensor(
               DType::kFloat32, {2},
               std::string(reinterpret_cast<const char*>(ones.data()), 8))),
           Object(5)}}));
}

// Four ranks write, each a part; Python loads, in all its ways.
TEST(PythonReadsTest, WhatFourRanksWrote) {
  const std::string folder = Folder("dsd");
  std::map<std::string, Dumped> whole;
  std::map<std::string, Path> paths;
  std::map<std::string, Layout> layouts;
  const DeviceMesh line = DeviceMesh::Iota({4});
  const DeviceMesh grid = DeviceMesh::Iota({2, 2});
  const auto add = [&](const Path& path, DType dtype, Dims shape,
                       const DeviceMesh& mesh,
                       const std::vector<Placement>& placements) {
    const std::string key = JoinPath(path);
    Dumped tensor{dtype, shape, ""};
    int64_t bytes = ItemSize(dtype);
    for (const int64_t extent : shape) bytes *= extent;
    for (int64_t i = 0; i < bytes; ++i) {
      tensor.bytes.push_back(
          static_cast<char>((i * 7 + i / 3 + key.size()) & 1));
    }
    layouts.emplace(key, *Layout::FromPlacements(shape, mesh, placements));
    paths[key] = path;
    whole[key] = std::move(tensor);
  };
  const std::string model = "model";
  RunPython("dtypes", folder);
  const std::string dtypes = ReadFile(folder + "/dtypes.txt");
  for (const absl::string_view name : absl::StrSplit(dtypes, '\n')) {
    const DType dtype = *ParseDType(name);
    add({model, absl::StrCat("layer.", DTypeName(dtype))}, dtype, {5, 3}, line,
        {Shard(0)});
  }
  add({model, std::string("grid")}, DType::kFloat32, {7, 9}, grid,
      {Shard(0), Shard(1)});
  add({model, std::string("strided")}, DType::kFloat32, {8, 2}, grid,
      {StridedShard(0, 2), Shard(0)});
  add({model, std::string("replicated")}, DType::kBFloat16, {300, 200}, line,
      {Replicate()});
  add({std::string("scalar")}, DType::kFloat32, {}, line, {Replicate()});
  add({std::string("empty")}, DType::kFloat32, {0, 4}, line, {Shard(0)});
  add({std::string("large")}, DType::kFloat32, {640, 1000}, line, {Shard(0)});

  ASSERT_THAT(
      RunRankThreads(
          4,
          [&](Communicator& comm) -> absl::Status {
            MemoryEndpoint endpoint;
            State state;
            for (const auto& [key, tensor] : whole) {
              const int64_t item_size = ItemSize(tensor.dtype);
              std::vector<MemoryEndpoint::Part> parts;
              const Layout& layout = layouts.at(key);
              for (const LocalBox& local : layout.BoxesOf(comm.rank())) {
                MemoryEndpoint::Part part;
                part.box = local.box;
                part.view.base =
                    reinterpret_cast<std::byte*>(
                        const_cast<char*>(tensor.bytes.data())) +
                    FlatIndex(tensor.shape, local.box.lo) * item_size;
                const Dims strides = RowMajorStrides(tensor.shape);
                for (const int64_t stride : strides) {
                  part.view.strides_bytes.push_back(stride * item_size);
                }
                parts.push_back(std::move(part));
              }
              DSD_RETURN_IF_ERROR(
                  endpoint.Add({key, tensor.dtype, layout}, std::move(parts)));
              state.tensor_paths.push_back(paths[key]);
            }
            state.tensors = &endpoint;
            state.objects = FlatObjects();
            return Save(folder + "/ckpt", state, &comm).status();
          }),
      AllOk());
  WriteDump(folder + "/ckpt.dump", whole);
  RunPython("check", folder);
}

}  // namespace
}  // namespace dsd::checkpoint

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (argc != 3) return 2;
  dsd::checkpoint::python_command = argv[1];
  dsd::checkpoint::oracle_script = argv[2];
  return RUN_ALL_TESTS();
}
