// SPDX-License-Identifier: Apache-2.0

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/dcp/memory_file.h"
#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"
#include "dsd/frontends/checkpoint/torch_archive/archive_reader.h"
#include "dsd/frontends/checkpoint/torch_archive/archive_writer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::torch_archive {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

Path P(std::vector<PathSegment> segments) { return segments; }
PathSegment T(const char* text) { return std::string(text); }

std::string Key(const Path& path) { return JoinPath(path); }

absl::StatusOr<Archive> Read(const std::string& bytes) {
  dcp::MemoryFile file(bytes);
  auto slice = dcp::FileSlice::Create(&file, 0, file.size_bytes());
  if (!slice.ok()) return slice.status();
  return ReadArchive(&*slice);
}

// An archive of some tensors whose elements are bytes of 'a', 'b', ...
std::string Write(const std::vector<NewTensor>& tensors,
                  const std::vector<NewObject>& objects) {
  const auto tree = EncodeTree(tensors, objects);
  EXPECT_TRUE(tree.ok()) << tree.status();
  ArchiveWriter writer(tree->pickle);
  std::string out;
  char fill = 'a';
  for (const NewTensor& tensor : tensors) {
    int64_t bytes = ItemSize(tensor.dtype);
    for (const int64_t extent : tensor.shape) bytes *= extent;
    const std::string data(bytes, fill++);
    out += writer.StartTensor(bytes);
    out += data;
    out += writer.FinishTensor(dcp::Crc32(0, data));
  }
  for (const auto& [key, tensor] : tree->inner) {
    const std::string data(tensor.bytes());
    out += writer.StartTensor(static_cast<int64_t>(data.size()));
    out += data;
    out += writer.FinishTensor(dcp::Crc32(0, data));
  }
  return out + writer.Finish("digests");
}

std::string Example() {
  return Write(
      {{P({T("model"), T("w")}), DType::kFloat32, {2, 3}},
       {P({T("model"), T("b")}), DType::kBFloat16, {}},
       {P({T("optim"), T("state"), T("0")}), DType::kUInt16, {5}},
       {P({T("list"), int64_t{1}}), DType::kInt8, {0, 4}}},
      {{P({T("step")}), Object(7)},
       {P({T("optim"), T("groups"), int64_t{0}, T("lr")}), Object(0.1)}});
}

// An archive with this pickle and one storage of 24 bytes.
std::string WithPickle(const std::string& pickle,
                       const std::string& byte_order = "little") {
  std::string out;
  dcp::ZipWriter zip(&out);
  zip.AddRecord("data.pkl", pickle);
  if (!byte_order.empty()) zip.AddRecord("byteorder", byte_order);
  zip.AddRecord("data/0", std::string(24, 'x'));
  zip.AddRecord("version", "3\n");
  zip.Finish();
  return out;
}

// torch._utils._rebuild_tensor_v2 of a FloatStorage "0".
void Rebuild(dcp::PickleWriter& pickle, std::vector<int64_t> shape,
             std::vector<int64_t> strides, int64_t offset = 0,
             int64_t count = 6, const char* storage = "0",
             const char* function = "_rebuild_tensor_v2") {
  pickle.Global("torch._utils", function);
  pickle.Mark();
  pickle.Mark();
  pickle.Text("storage");
  pickle.Global("torch", "FloatStorage");
  pickle.Text(storage);
  pickle.Text("cpu");
  pickle.Int(count);
  pickle.Tuple(5);
  pickle.PersistentId();
  pickle.Int(offset);
  for (const auto& dims : {shape, strides}) {
    if (dims.size() > 3) pickle.Mark();
    for (const int64_t number : dims) pickle.Int(number);
    pickle.Tuple(static_cast<int64_t>(dims.size()));
  }
  pickle.Bool(false);
  pickle.Global("collections", "OrderedDict");
  pickle.Tuple(0);
  pickle.Reduce();
  pickle.Tuple(6);
  pickle.Reduce();
}

template <class Body>
std::string Pickled(Body body) {
  std::string out;
  dcp::PickleWriter pickle(2, &out);
  body(pickle);
  pickle.Stop();
  return out;
}

template <class Body>
absl::StatusOr<Archive> ReadDict(Body body) {
  return Read(WithPickle(Pickled([&](dcp::PickleWriter& pickle) {
    pickle.EmptyDict();
    pickle.Mark();
    body(pickle);
    pickle.SetItems();
  })));
}

TEST(ArchiveTest, ReadsWhatItWrites) {
  const std::string bytes = Example();
  const auto archive = Read(bytes);
  ASSERT_TRUE(archive.ok()) << archive.status();
  ASSERT_EQ(archive->tensors.size(), 4u);
  const Archive::Tensor& w = archive->tensors[0];
  EXPECT_EQ(Key(w.path), "model.w");
  EXPECT_EQ(w.item.dtype, DType::kFloat32);
  EXPECT_EQ(w.item.shape, Dims({2, 3}));
  EXPECT_EQ(w.item.data_at % 64, 0);
  EXPECT_EQ(bytes.substr(w.item.data_at, 24), std::string(24, 'a'));
  EXPECT_EQ(archive->tensors[1].item.shape, Dims());
  EXPECT_EQ(archive->tensors[2].item.dtype, DType::kUInt16);
  EXPECT_EQ(archive->tensors[3].item.shape, Dims({0, 4}));
  EXPECT_EQ(archive->tensors[3].path, P({T("list"), int64_t{1}}));
  // The list's first place is None.
  ASSERT_EQ(archive->objects.size(), 3u);
  EXPECT_EQ(Key(archive->objects[1].path), "list.0");
  EXPECT_TRUE(archive->objects[1].item.value == Object());
  EXPECT_EQ(*archive->digests, "digests");
  EXPECT_GT(archive->pickle_bytes, 0);
}

TEST(ArchiveTest, TensorsThatAreOthersAreEntriesOfOneStorage) {
  const std::vector<NewTensor> tensors = {
      {P({T("a")}), DType::kInt8, {2, 3}},
      {P({T("b")}), DType::kInt8, {4}},
      {P({T("c")}), DType::kInt8, {2, 3}, 0},
      {P({T("d")}), DType::kInt8, {1}}};
  const auto tree = EncodeTree(tensors, {});
  ASSERT_TRUE(tree.ok()) << tree.status();
  ArchiveWriter writer(tree->pickle);
  std::string bytes;
  for (const std::string data : {"aaaaaa", "bbbb", "d"}) {
    bytes += writer.StartTensor(static_cast<int64_t>(data.size()));
    bytes += data;
    bytes += writer.FinishTensor(dcp::Crc32(0, data));
  }
  bytes += writer.Finish("");
  const auto archive = Read(bytes);
  ASSERT_TRUE(archive.ok()) << archive.status();
  std::vector<std::string> found;
  for (const auto& tensor : archive->tensors) {
    found.push_back(absl::StrCat(Key(tensor.path), "=",
                                 bytes.substr(tensor.item.data_at, 1)));
  }
  EXPECT_THAT(found, ::testing::ElementsAre("a=a", "c=a", "b=b", "d=d"));
}

// What is read as tensors with keys of their own is known by these keys.
TEST(ArchiveTest, TensorsInObjects) {
  Object::Dict dict;
  dict.Set(PathSegment(int64_t{3}),
           Object(HostTensor(DType::kInt8, {2}, "xy")));
  const std::vector<NewObject> objects = {
      {P({T("pair")}),
       Object(Object::Tuple{{Object(HostTensor(DType::kInt16, {}, "ab")),
                             Object(5), Object(std::move(dict))}})},
      {P({T("map")}),
       Object(Object::Map{{Object()},
                          {Object(HostTensor(DType::kInt8, {1}, "m"))}})},
      {P({T("lone")}), Object(HostTensor(DType::kUInt8, {1}, "z"))}};
  const auto tree = EncodeTree({}, objects);
  ASSERT_TRUE(tree.ok()) << tree.status();
  std::vector<std::string> inner;
  for (const auto& [key, tensor] : tree->inner) {
    inner.push_back(absl::StrCat(key.value_or("-"), "=", tensor.bytes()));
  }
  EXPECT_THAT(inner, ::testing::ElementsAre("pair.0=ab", "pair.2.3=xy", "-=m",
                                            "lone=z"));

  const std::string bytes =
      Write({{P({T("w")}), DType::kFloat32, {2}}}, objects);
  const auto archive = Read(bytes);
  ASSERT_TRUE(archive.ok()) << archive.status();
  std::vector<std::string> found;
  for (const auto& tensor : archive->tensors) {
    found.push_back(absl::StrCat(Key(tensor.path), "=",
                                 bytes.substr(tensor.item.data_at, 1)));
  }
  EXPECT_THAT(
      found, ::testing::ElementsAre("w=a", "pair.0=a", "pair.2.3=x", "lone=z"));
  ASSERT_EQ(archive->objects.size(), 2u);
  EXPECT_EQ(Key(archive->objects[0].path), "pair.1");
  EXPECT_EQ(Key(archive->objects[1].path), "map");
}

TEST(ArchiveTest, KeepsWhatKeysDoNotSay) {
  const auto read = ReadDict([](dcp::PickleWriter& pickle) {
    pickle.Text("state");
    pickle.EmptyDict();
    pickle.Mark();
    pickle.Int(0);
    pickle.Int(5);
    pickle.Int(-1);
    pickle.EmptyDict();
    pickle.SetItems();
    pickle.Text("pair");
    dcp::WriteTensor(pickle, DType::kUInt8, {1}, "0");
    dcp::WriteTensor(pickle, DType::kUInt8, {1}, "0");
    pickle.Tuple(2);
    pickle.Text("two");
    pickle.EmptyDict();
    pickle.Mark();
    pickle.Int(1);
    pickle.None();
    pickle.Text("1x");
    pickle.None();
    pickle.SetItems();
  });
  ASSERT_TRUE(read.ok()) << read.status();
  const auto texts = [](const std::vector<Path>& paths) {
    std::vector<std::string> out;
    for (const Path& path : paths) out.push_back(JoinPath(path));
    return out;
  };
  const auto check = [&](const Nesting& nesting) {
    EXPECT_THAT(texts(nesting.number_keyed),
                ::testing::UnorderedElementsAre("state", "two"));
    EXPECT_THAT(texts(nesting.empty), ::testing::ElementsAre("state.-1"));
    EXPECT_THAT(texts(nesting.tuples), ::testing::ElementsAre("pair"));
  };
  check(read->nesting);

  std::vector<NewTensor> tensors;
  for (const Archive::Tensor& tensor : read->tensors) {
    tensors.push_back({tensor.path, DType::kUInt8, {1}});
  }
  const std::vector<NewObject> objects = {{P({T("state"), T("0")}), Object(5)},
                                          {P({T("two"), T("1")}), Object()},
                                          {P({T("two"), T("1x")}), Object()}};
  Nesting nesting = read->nesting;
  // What does not fit is passed over.
  nesting.number_keyed.push_back(P({T("state"), T("0")}));
  nesting.number_keyed.push_back(P({T("nowhere")}));
  nesting.empty.push_back(P({T("two")}));
  nesting.tuples.push_back(P({T("two")}));
  const auto tree = EncodeTree(tensors, objects, nesting);
  ASSERT_TRUE(tree.ok()) << tree.status();
  ArchiveWriter writer(tree->pickle);
  std::string bytes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    bytes += writer.StartTensor(1);
    bytes += "x";
    bytes += writer.FinishTensor(dcp::Crc32(0, "x"));
  }
  const auto again = Read(bytes + writer.Finish(""));
  ASSERT_TRUE(again.ok()) << again.status();
  check(again->nesting);
}

TEST(ArchiveTest, PathsThatDoNotFitTogether) {
  const auto encode = [](std::vector<Path> paths) {
    std::vector<NewTensor> tensors;
    for (Path& path : paths) {
      tensors.push_back({std::move(path), DType::kFloat32, {1}});
    }
    return EncodeTree(tensors, {}).status();
  };
  EXPECT_TRUE(encode({P({T("a"), T("b")}), P({T("a"), T("c")})}).ok());
  for (const auto& [paths, text] :
       std::vector<std::pair<std::vector<Path>, std::string>>{
           {{P({T("a")}), P({T("a"), T("b")})}, "lies inside another"},
           {{P({T("a"), T("b")}), P({T("a")})}, "others lie inside"},
           {{P({T("a")}), P({T("a")})}, "is there twice"},
           {{P({T("a"), int64_t{0}}), P({T("a"), T("b")})},
            "a list and a dict"},
           {{P({T("a"), int64_t{-1}})}, "expected 0 to"},
           {{P({T("a"), int64_t{1} << 40})}, "expected 0 to"},
           {{P({})}, "a path of 0 parts"},
           {{P({T("\xff")})}, "not valid UTF-8"}}) {
    const absl::Status status = encode(paths);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }
  EXPECT_THAT(std::string(EncodeTree({}, {{P({T("o")}), Object(Opaque{"x.Y"})}})
                              .status()
                              .message()),
              HasSubstr("\"o\""));
}

TEST(ArchiveTest, ViewsShareStoragesAndKindsAreKnown) {
  const auto archive = ReadDict([](dcp::PickleWriter& pickle) {
    pickle.Text("all");
    Rebuild(pickle, {2, 3}, {3, 1});
    pickle.Text("transposed");
    Rebuild(pickle, {3, 2}, {1, 3});
    pickle.Text("column");
    Rebuild(pickle, {2}, {3}, 2);
    pickle.Text("expanded");
    Rebuild(pickle, {4, 2}, {0, 1}, 1);
    pickle.Text("parameter");
    pickle.Global("torch._utils", "_rebuild_parameter");
    Rebuild(pickle, {6}, {1});
    pickle.Bool(true);
    pickle.EmptyDict();
    pickle.Tuple(3);
    pickle.Reduce();
    pickle.Text("sparse");
    Rebuild(pickle, {6}, {1}, 0, 6, "0", "_rebuild_sparse_tensor");
    pickle.Text("tuple");
    Rebuild(pickle, {1}, {1}, 5);
    pickle.Int(3);
    pickle.Tuple(2);
    pickle.Text("plain");
    pickle.Int(3);
    pickle.Int(4);
    pickle.Tuple(2);
  });
  ASSERT_TRUE(archive.ok()) << archive.status();
  std::vector<std::string> keys;
  for (const auto& tensor : archive->tensors) keys.push_back(Key(tensor.path));
  EXPECT_THAT(keys, ::testing::UnorderedElementsAre("all", "transposed",
                                                    "column", "expanded",
                                                    "parameter", "tuple.0"));
  ASSERT_EQ(archive->unreadable.size(), 1u);
  EXPECT_EQ(archive->unreadable[0].kind, "torch._utils._rebuild_sparse_tensor");
  ASSERT_EQ(archive->objects.size(), 2u);
  EXPECT_EQ(Key(archive->objects[0].path), "tuple.1");
  EXPECT_EQ(Key(archive->objects[1].path), "plain");
}

TEST(ArchiveTest, ByteOrder) {
  const std::string pickle =
      Pickled([](dcp::PickleWriter& pickle) { Rebuild(pickle, {6}, {1}); });
  const auto big = Read(WithPickle(pickle, "big"));
  ASSERT_TRUE(big.ok()) << big.status();
  EXPECT_TRUE(big->tensors[0].item.big_endian);
  EXPECT_EQ(Key(big->tensors[0].path), "value");  // no dict around it
  EXPECT_EQ(big->digests.status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(Read(WithPickle(pickle, ""))->tensors[0].item.big_endian);
  EXPECT_EQ(Read(WithPickle(pickle, "middle")).status().code(),
            absl::StatusCode::kDataLoss);
}

TEST(ArchiveTest, ViewsStayInTheirStorage) {
  struct Case {
    std::vector<int64_t> shape, strides;
    int64_t offset, count;
    const char* storage;
    const char* text;
  };
  const int64_t huge = int64_t{1} << 62;
  for (const Case& c :
       std::vector<Case>{{{2, 4}, {3, 1}, 0, 6, "0", "reach outside"},
                         {{6}, {1}, 1, 6, "0", "reach outside"},
                         {{7}, {1}, 0, 7, "0", "less than the storage"},
                         {{2}, {huge}, 0, 6, "0", "reach outside"},
                         {{huge, huge}, {0, 0}, 0, 6, "0", "overflows"},
                         {{6}, {1}, huge, 6, "0", "reach outside"},
                         {{6}, {-1}, 5, 6, "0", "no tuple of numbers >= 0"},
                         {{6}, {1}, -1, 6, "0", "do not fit together"},
                         {{6}, {1, 1}, 0, 6, "0", "do not fit together"},
                         {{6}, {1}, 0, 6, "1", "no record \"data/1\""},
                         {{6}, {1}, 0, 6, "../data/0", "no record"},
                         {{6}, {1}, 0, huge, "0", "storage overflows"}}) {
    const auto archive = ReadDict([&](dcp::PickleWriter& pickle) {
      pickle.Text("k");
      Rebuild(pickle, c.shape, c.strides, c.offset, c.count, c.storage);
    });
    EXPECT_EQ(archive.status().code(), absl::StatusCode::kDataLoss) << c.text;
    EXPECT_THAT(std::string(archive.status().message()), HasSubstr(c.text));
    EXPECT_THAT(std::string(archive.status().message()), HasSubstr("\"k\""));
  }
  // Legal, and far too much.
  const auto bomb = ReadDict([&](dcp::PickleWriter& pickle) {
    pickle.Text("k");
    Rebuild(pickle, {int64_t{1} << 40}, {0});
  });
  EXPECT_EQ(bomb.status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(ArchiveTest, NothingIsExecutedAndModulesAreRefused) {
  const auto evil = ReadDict([](dcp::PickleWriter& pickle) {
    pickle.Text("k");
    pickle.Global("os", "system");
    pickle.Text("false");
    pickle.Tuple(1);
    pickle.Reduce();
  });
  ASSERT_TRUE(evil.ok()) << evil.status();
  EXPECT_TRUE(evil->objects[0].item.value == Object(Opaque{"os.system"}));
  const auto module = Read(WithPickle(Pickled([](dcp::PickleWriter& pickle) {
    pickle.Global("torch.nn.modules.linear", "Linear");
    pickle.NewInstance();
  })));
  EXPECT_EQ(module.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(module.status().message()),
              HasSubstr("torch.nn.modules.linear.Linear"));
  std::string script;
  dcp::ZipWriter zip(&script);
  zip.AddRecord("data.pkl", "x");
  zip.AddRecord("constants.pkl", "x");
  zip.Finish();
  EXPECT_THAT(std::string(Read(script).status().message()),
              HasSubstr("TorchScript"));
}

TEST(ArchiveTest, SharingAndCyclesEnd) {
  // Lists in lists, each twice in the next one, all in a tuple.
  std::string bomb = "\x80\x02}U\x01k(]q";
  bomb.push_back('\0');
  for (char i = 1; i < 100; ++i) {
    const char before = static_cast<char>(i - 1);
    for (const char byte : {']', '(', 'h', before, 'h', before, 'e', 'q', i}) {
      bomb.push_back(byte);
    }
  }
  EXPECT_EQ(Read(WithPickle(bomb + "ts.")).status().code(),
            absl::StatusCode::kResourceExhausted);
  // A list that has itself.
  const auto cycle =
      Read(WithPickle(std::string("\x80\x02}U\x01k]q\0h\0as.", 14)));
  EXPECT_EQ(cycle.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(cycle.status().message()), HasSubstr("deep"));
}

TEST(ArchiveTest, EveryTruncationAndEveryFlippedBit) {
  const std::string bytes = Example();
  for (size_t size = 0; size < bytes.size(); ++size) {
    const absl::Status status = Read(bytes.substr(0, size)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << size << status;
  }
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string damaged = bytes;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
    const auto archive = Read(damaged);
    if (archive.ok()) continue;
    EXPECT_THAT(
        archive.status().code(),
        AnyOf(absl::StatusCode::kDataLoss, absl::StatusCode::kUnimplemented,
              absl::StatusCode::kResourceExhausted))
        << bit << archive.status();
  }
}

// Sizes that need 64 bits, without their elements.
TEST(ArchiveTest, LargeStoragesHaveZip64Fields) {
  const int64_t bytes = int64_t{5} << 30;
  const std::vector<NewTensor> tensors = {{P({T("a")}), DType::kInt8, {bytes}},
                                          {P({T("b")}), DType::kInt8, {7}}};
  const auto tree = EncodeTree(tensors, {});
  ASSERT_TRUE(tree.ok());
  ArchiveWriter writer(tree->pickle);
  const std::string head = writer.StartTensor(bytes);
  std::string tail = writer.FinishTensor(1);
  tail += writer.StartTensor(7);
  const int64_t b_at = static_cast<int64_t>(tail.size());
  tail += std::string(7, 'b');
  tail += writer.FinishTensor(dcp::Crc32(0, "bbbbbbb"));
  tail += writer.Finish("");

  // A file with a hole.
  class Holey final : public ReadableFile {
   public:
    Holey(std::string head, int64_t hole, std::string tail)
        : head_(std::move(head)), hole_(hole), tail_(std::move(tail)) {}
    int64_t size_bytes() const override {
      return static_cast<int64_t>(head_.size() + tail_.size()) + hole_;
    }
    absl::Status ReadAt(int64_t offset, absl::Span<std::byte> out) override {
      const int64_t head = static_cast<int64_t>(head_.size());
      for (std::byte& byte : out) {
        byte = offset < head ? std::byte(head_[offset])
               : offset < head + hole_
                   ? std::byte{0}
                   : std::byte(tail_[offset - head - hole_]);
        ++offset;
      }
      return absl::OkStatus();
    }

   private:
    std::string head_;
    int64_t hole_;
    std::string tail_;
  };
  Holey file(head, bytes, tail);
  auto slice = dcp::FileSlice::Create(&file, 0, file.size_bytes());
  ASSERT_TRUE(slice.ok());
  const auto archive = ReadArchive(&*slice);
  ASSERT_TRUE(archive.ok()) << archive.status();
  EXPECT_EQ(archive->tensors[0].item.record_bytes, bytes);
  EXPECT_EQ(archive->tensors[1].item.data_at,
            static_cast<int64_t>(head.size()) + bytes + b_at);
}

}  // namespace
}  // namespace dsd::torch_archive
