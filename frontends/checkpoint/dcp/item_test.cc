// SPDX-License-Identifier: Apache-2.0

#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/core/layout/box.h"
#include "dsd/frontends/checkpoint/dcp/memory_file.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"
#include "dsd/frontends/checkpoint/dcp/tensor_item.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"
#include "gtest/gtest.h"

namespace dsd::dcp {
namespace {

std::string Archive(DType dtype, const Dims& shape, absl::string_view payload) {
  const TensorArchive archive(dtype, shape);
  EXPECT_EQ(archive.payload_bytes(), static_cast<int64_t>(payload.size()));
  const std::string tail = archive.Tail(Crc32(0, payload));
  EXPECT_EQ(archive.tail_bytes(), static_cast<int64_t>(tail.size()));
  EXPECT_EQ(archive.CrcOfTail(tail), payload.empty() ? 0 : Crc32(0, payload));
  return absl::StrCat(archive.head(), payload, tail);
}

absl::StatusOr<TensorItem> ReadTensor(const std::string& bytes) {
  MemoryFile file(bytes);
  auto slice = FileSlice::Create(&file, 0, bytes.size());
  return ReadTensorItem(&*slice);
}

TEST(TensorItemTest, EveryDTypeAndShapeReadsBack) {
  const std::vector<Dims> shapes = {
      {}, {0}, {7}, {2, 3}, {3, 0, 2}, {1, 2, 3, 4, 5}, {70000, 1}};
  for (int i = 0; i < kNumDTypes; ++i) {
    const DType dtype = static_cast<DType>(i);
    for (const Dims& shape : shapes) {
      int64_t bytes = ItemSize(dtype);
      for (const int64_t extent : shape) bytes *= extent;
      const std::string archive =
          Archive(dtype, shape, std::string(bytes, '\1'));
      const auto item = ReadTensor(archive);
      ASSERT_TRUE(item.ok()) << item.status() << DTypeName(dtype);
      EXPECT_EQ(item->dtype, dtype);
      EXPECT_EQ(item->shape, shape);
      EXPECT_EQ(item->data_at % 64, 0);
      EXPECT_EQ(archive.substr(item->data_at, bytes), std::string(bytes, '\1'));
      EXPECT_TRUE(item->is_plain());
    }
  }
}

TEST(TensorItemTest, TheElementsLieWherePythonPutsThem) {
  const auto item =
      ReadTensor(Archive(DType::kFloat32, {2, 3}, std::string(24, 'x')));
  EXPECT_EQ(item->data_at, 704);
  EXPECT_EQ(item->strides, (Dims{3, 1}));
}

// A tensor pickle with parts to choose.
struct Parts {
  std::string function = "_rebuild_tensor_v2";
  std::string storage = "FloatStorage";
  int64_t count = 6;
  int64_t offset = 0;
  Dims size = {2, 3};
  Dims stride = {3, 1};
  std::string byteorder = "little";
  bool conj = false;
  std::string payload = std::string(24, 'x');
};

std::string Build(const Parts& parts) {
  std::string pickle;
  PickleWriter p(2, &pickle);
  const auto numbers = [&](const Dims& values) {
    p.Mark();
    for (const int64_t value : values) p.Int(value);
    p.Tuple(4);
  };
  p.Global("torch._utils", parts.function);
  p.Mark();
  p.Mark();
  p.Text("storage");
  p.Global("torch", parts.storage);
  p.Text("0");
  p.Text("cuda:0");
  p.Int(parts.count);
  p.Tuple(5);
  p.PersistentId();
  p.Int(parts.offset);
  numbers(parts.size);
  numbers(parts.stride);
  p.Bool(false);
  p.Global("collections", "OrderedDict");
  p.Tuple(0);
  p.Reduce();
  if (parts.conj) {
    p.EmptyDict();
    p.Mark();
    p.Text("conj");
    p.Bool(true);
    p.SetItems();
  }
  p.Tuple(6);
  p.Reduce();
  p.Stop();
  std::string out;
  ZipWriter zip(&out);
  zip.AddRecord("data.pkl", pickle);
  zip.AddRecord("byteorder", parts.byteorder);
  zip.AddRecord("data/0", parts.payload);
  zip.AddRecord("version", "3\n");
  zip.Finish();
  return out;
}

TEST(TensorItemTest, StridesOffsetsAndByteOrder) {
  Parts parts;
  parts.size = {3, 2};
  parts.stride = {1, 3};
  const auto transposed = ReadTensor(Build(parts));
  ASSERT_TRUE(transposed.ok()) << transposed.status();
  EXPECT_EQ(transposed->strides, (Dims{1, 3}));

  parts = {};
  parts.offset = 2;
  parts.size = {2};
  parts.stride = {2};
  const auto view = ReadTensor(Build(parts));
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->data_at - view->record_at, 8);

  parts = {};
  parts.byteorder = "big";
  EXPECT_TRUE(ReadTensor(Build(parts))->big_endian);
  parts.storage = "ByteStorage";
  EXPECT_TRUE(ReadTensor(Build(parts))->is_plain());
}

TEST(TensorItemTest, NormalizeUndoesByteOrderAndSigns) {
  const auto normalized = [](DType dtype, bool big, bool conj, bool neg) {
    TensorItem item;
    item.dtype = dtype;
    item.big_endian = big;
    item.conjugated = conj;
    item.negated = neg;
    std::vector<std::byte> bytes;
    for (int i = 0; i < 16; ++i) bytes.push_back(std::byte(i));
    item.Normalize(absl::MakeSpan(bytes));
    std::string hex;
    for (const std::byte b : bytes) {
      absl::StrAppend(&hex, absl::Hex(static_cast<int>(b), absl::kZeroPad2));
    }
    return hex;
  };
  EXPECT_EQ(normalized(DType::kFloat32, true, false, false),
            "03020100070605040b0a09080f0e0d0c");
  EXPECT_EQ(normalized(DType::kComplex64, true, false, false),
            "03020100070605040b0a09080f0e0d0c");
  EXPECT_EQ(normalized(DType::kInt64, true, false, false),
            "07060504030201000f0e0d0c0b0a0908");
  EXPECT_EQ(normalized(DType::kComplex64, false, true, false),
            "0001020304050687"
            "08090a0b0c0d0e8f");
  EXPECT_EQ(normalized(DType::kComplex64, false, false, true),
            "0001028304050687"
            "08090a8b0c0d0e8f");
  EXPECT_EQ(normalized(DType::kComplex64, false, true, true),
            "0001028304050607"
            "08090a8b0c0d0e0f");
  EXPECT_EQ(normalized(DType::kComplex128, true, true, false),
            "0706050403020100"
            "0f0e0d0c0b0a0988");
  EXPECT_EQ(normalized(DType::kBFloat16, false, false, true),
            "008102830485068708890a8b0c8d0e8f");
}

TEST(TensorItemTest, ConjugatesAreReadWhereTheyCanBe) {
  Parts parts;
  parts.conj = true;
  parts.storage = "ComplexFloatStorage";
  parts.count = 3;
  parts.size = {3};
  parts.stride = {1};
  EXPECT_TRUE(ReadTensor(Build(parts))->conjugated);
}

TEST(TensorItemTest, HostileTensorsAreRefused) {
  const auto code = [](void (*change)(Parts&)) {
    Parts parts;
    change(parts);
    return ReadTensor(Build(parts)).status().code();
  };
  constexpr absl::StatusCode kDataLoss = absl::StatusCode::kDataLoss;
  constexpr absl::StatusCode kUnimplemented = absl::StatusCode::kUnimplemented;
  EXPECT_EQ(code([](Parts&) {}), absl::StatusCode::kOk);
  // A storage larger than its record.
  EXPECT_EQ(code([](Parts& p) { p.count = 7; }), kDataLoss);
  EXPECT_EQ(code([](Parts& p) { p.count = int64_t{1} << 62; }), kDataLoss);
  EXPECT_EQ(code([](Parts& p) { p.count = -1; }), kDataLoss);
  // Elements outside the storage.
  EXPECT_EQ(code([](Parts& p) { p.offset = 1; }), kDataLoss);
  EXPECT_EQ(code([](Parts& p) { p.offset = -1; }), kDataLoss);
  EXPECT_EQ(code([](Parts& p) { p.stride = {4, 1}; }), kDataLoss);
  EXPECT_EQ(code([](Parts& p) { p.stride = {-1, 1}; }), kDataLoss);
  EXPECT_EQ(code([](Parts& p) {
              p.size = {int64_t{1} << 40, int64_t{1} << 40};
            }),
            kDataLoss);
  EXPECT_EQ(code([](Parts& p) {
              p.size = {int64_t{1} << 31, 2};
              p.stride = {int64_t{1} << 33, 1};
            }),
            kDataLoss);
  EXPECT_EQ(code([](Parts& p) { p.stride = {1}; }), kDataLoss);
  EXPECT_EQ(code([](Parts& p) { p.byteorder = "middle"; }), kDataLoss);
  EXPECT_EQ(code([](Parts& p) { p.storage = "QInt8Storage"; }), kUnimplemented);
  EXPECT_EQ(code([](Parts& p) { p.function = "_rebuild_sparse_tensor"; }),
            kUnimplemented);
  EXPECT_EQ(code([](Parts& p) { p.conj = true; }), kDataLoss);
}

TEST(TensorItemTest, EveryTruncationAndFlipIsATypedErrorOrTheSameTensor) {
  const std::string archive =
      Archive(DType::kInt16, {3}, std::string("abcdef"));
  for (size_t size = 0; size < archive.size(); ++size) {
    EXPECT_FALSE(ReadTensor(archive.substr(0, size)).ok()) << size;
  }
  for (size_t bit = 0; bit < archive.size() * 8; ++bit) {
    std::string bad = archive;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
    const auto item = ReadTensor(bad);
    if (item.ok()) {
      EXPECT_EQ(item->dtype, DType::kInt16) << bit;
      EXPECT_EQ(item->shape, Dims{3}) << bit;
    }
  }
}

absl::StatusOr<ObjectItem> ReadObject(const std::string& bytes) {
  MemoryFile file(bytes);
  auto slice = FileSlice::Create(&file, 0, bytes.size());
  const auto pickle = ReadStoredObject(&*slice);
  if (!pickle.ok()) return pickle.status();
  return DecodeStoredObject(*pickle);
}

Object Nested(int depth) {
  Object value(depth);
  for (int i = 0; i < depth; ++i) {
    value = Object(Object::List{std::move(value)});
  }
  return value;
}

std::vector<Object> SomeObjects() {
  std::string all;
  for (int c = 0; c < 256; ++c) all.push_back(static_cast<char>(c));
  Object::Dict dict;
  dict.Set(PathSegment(std::string("k")), Object(true));
  dict.Set(PathSegment(int64_t{-3}), Object());
  dict.Set(PathSegment(std::string("l")),
           Object(Object::List{Object(1), Object("two"), Object(3.0)}));
  const WideInt wide{std::string(8, '\0') + "\x80"};
  const HostTensor tensor(DType::kFloat32, {1, 2}, "abcdefgh");
  return {Object(), Object(true), Object(false), Object(0),
          Object(-(int64_t{1} << 62)), Object(1e-3), Object(""),
          Object("h\xc3\xa9llo"), Object(Bytes{all}), Object(Bytes{}),
          Object(Object::List{}), Object(Object::Tuple{}),
          Object(Object::Tuple{{Object(1)}}),
          Object(Object::Tuple{{Object(1), Object(2), Object(3), Object(4)}}),
          Object(Object::Dict{}), Object(std::move(dict)),
          Nested(kMaxObjectDepth), Object(Complex(0.5, -2)), Object(wide),
          Object(WideInt{std::string(255, '\x7f')}), Object(Object::Set{}),
          Object(Object::Set{{}, true}),
          // In the order of their pickles.
          Object(Object::Set{{Object(3), Object("b"), Object(wide)}}),
          Object(Object::Set{{Object(Object::Set{{Object(1)}, true})}, true}),
          Object(tensor),
          Object(Object::Map{
              {Object(Object::Tuple{{Object(1), Object("a")}}), Object(2.5),
               Object(), Object("text"), Object(Object::Set{{Object(1)}, true}),
               Object(Opaque{"torch.float32"})},
              {Object(tensor), Object(2), Object(Object::List{}),
               Object(Object::Map{{Object(true)}, {Object(1)}}), Object(tensor),
               Object("x")}}),
          Object(Object::Tuple{{Object(tensor), Object(tensor), Object(5)}}),
          Object(Object::List{Object(HostTensor(DType::kInt64, {0, 3}, "")),
                              Object(HostTensor(DType::kUInt16, {}, "xy"))})};
}

TEST(ObjectItemTest, ObjectsReadBack) {
  for (const Object& object : SomeObjects()) {
    const auto stored = EncodeStoredObject(object);
    ASSERT_TRUE(stored.ok()) << stored.status();
    const auto item = ReadObject(ObjectArchive(*stored));
    ASSERT_TRUE(item.ok()) << item.status();
    EXPECT_TRUE(item->value == object) << object.kind_name();
    EXPECT_EQ(item->digest, ObjectDigest(*stored));
  }
  const HostTensor short_one(DType::kFloat32, {3}, "abcdefgh");
  const HostTensor tensor(DType::kInt8, {1}, "x");
  for (const Object& bad :
       {Nested(kMaxObjectDepth + 1), Object(Opaque{"a.B"}), Object(short_one),
        Object(Object::Set{{Object(tensor)}}),
        Object(Object::Map{{Object(tensor)}, {Object(1)}}),
        Object(Object::Map{{Object(Object::List{})}, {Object(1)}}),
        Object(Object::Map{{Object(1), Object(2.5)}, {Object(1)}}),
        Object(WideInt{std::string(256, '\1')})}) {
    EXPECT_EQ(EncodeStoredObject(bad).status().code(),
              absl::StatusCode::kInvalidArgument)
        << bad.kind_name();
  }
}

TEST(ObjectItemTest, UnknownClassesAreInert) {
  const auto decode = [](absl::string_view pickle) {
    return DecodeObjectPickle(pickle)->value;
  };
  using namespace std::string_literals;  // NOLINT: texts with zero bytes
  EXPECT_TRUE(decode("\x80\x02"
                     "cos\nsystem\nX\x04\x00\x00\x00true\x85R."s) ==
              Object(Opaque{"os.system"}));
  EXPECT_TRUE(decode("\x80\x02"
                     "cm\nC\n)\x81}b."s) == Object(Opaque{"m.C"}));
  EXPECT_TRUE(decode("\x80\x02"
                     "ctorch\nfloat32\n."s) == Object(Opaque{"torch.float32"}));
  EXPECT_TRUE(decode("\x80\x02"
                     "ctorch\nSize\n(K\x01K\x02K\x03t\x85R."s) ==
              Object(Object::Tuple{{Object(1), Object(2), Object(3)}}));
  // The rest around one is kept.
  EXPECT_TRUE(decode("\x80\x02](K\x01"
                     "cm\nC\n)\x81"
                     "e."s) ==
              Object(Object::List{Object(1), Object(Opaque{"m.C"})}));
  EXPECT_TRUE(decode("\x80\x02"
                     "ccollections\nOrderedDict\n)RX\x01\x00\x00\x00kK\x01s."s)
                  .is<Object::Dict>());
  // Dicts whose keys are no data, sets with what has no order.
  EXPECT_TRUE(decode("\x80\x02}cm\nC\n)\x81K\x01s."s) ==
              Object(Opaque{"dict"}));
  EXPECT_TRUE(decode("\x80\x02}]K\x01s."s) == Object(Opaque{"dict"}));
  EXPECT_TRUE(decode("\x80\x02"
                     "c__builtin__\nset\n](K\x01"
                     "cm\nC\n)\x81"
                     "e\x85R."s) == Object(Opaque{"set"}));
}

TEST(ObjectItemTest, TheLastValueOfAKeyCounts) {
  const auto decoded =
      DecodeObjectPickle("\x80\x02}(NK\x01K\x05K\x02NK\x03u.");
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_TRUE(decoded->value == Object(Object::Map{{Object(), Object(5)},
                                                   {Object(3), Object(2)}}));
}

// The bytes are those of pickle.dumps in Python 3.11.
TEST(ObjectItemTest, NumbersAndSetsThatAreNoPlainTypesOfJson) {
  const auto decode = [](absl::string_view pickle) {
    const auto item = DecodeObjectPickle(pickle);
    EXPECT_TRUE(item.ok()) << item.status();
    return item.ok() ? item->value : Object();
  };
  using namespace std::string_literals;  // NOLINT: texts with zero bytes
  // complex(1.5, -2), protocols 2 and 4.
  const std::string parts = "G?\xf8\0\0\0\0\0\0G\xc0\0\0\0\0\0\0\0"s;
  EXPECT_TRUE(decode("\x80\x02"
                     "c__builtin__\ncomplex\nq\0"s +
                     parts + "\x86q\x01Rq\x02."s) == Object(Complex(1.5, -2)));
  EXPECT_TRUE(decode("\x80\x04\x95.\0\0\0\0\0\0\0\x8c\x08"
                     "builtins\x94\x8c\x07"
                     "complex\x94\x93\x94"s +
                     parts + "\x86\x94R\x94."s) == Object(Complex(1.5, -2)));
  // 1 << 100, -(1 << 63) - 1, (1 << 64) - 1; and what fits.
  EXPECT_TRUE(decode("\x80\x02\x8a\r"s + std::string(12, '\0') + "\x10."s) ==
              Object(WideInt{std::string(12, '\0') + "\x10"}));
  EXPECT_TRUE(decode("\x80\x02\x8a\t\xff\xff\xff\xff\xff\xff\xff\x7f\xff."s) ==
              Object(WideInt{std::string(7, '\xff') + "\x7f\xff"}));
  EXPECT_TRUE(decode("\x80\x02\x8a\t"s + std::string(8, '\xff') + "\0."s) ==
              Object(WideInt{std::string(8, '\xff') + "\0"s}));
  EXPECT_TRUE(decode("\x80\x02\x8a\x0b\x05"s + std::string(10, '\0') + "."s) ==
              Object(5));
  EXPECT_TRUE(decode("\x80\x02\x8a\x0b\xfe"s + std::string(10, '\xff') +
                     "."s) == Object(-2));
  // {1, "a"} in both orders, and frozenset({2}), of protocols 2 and 4.
  const Object both(Object::Set{{Object(1), Object("a")}});
  const std::string one = "K\x01"s, a = "X\x01\0\0\0a"s;
  for (const std::string& items : {one + a, a + one}) {
    EXPECT_TRUE(decode("\x80\x02"
                       "c__builtin__\nset\nq\0]q\x01("s +
                       items + "e\x85R."s) == both);
    EXPECT_TRUE(decode("\x80\x04\x8f\x94("s + items + "\x90."s) == both);
  }
  const Object frozen(Object::Set{{Object(2)}, true});
  EXPECT_TRUE(decode("\x80\x02"
                     "c__builtin__\nfrozenset\nq\0]q\x01K\x02"
                     "a\x85q\x02Rq\x03."s) == frozen);
  EXPECT_TRUE(decode("\x80\x04(K\x02\x91\x94."s) == frozen);
  EXPECT_TRUE(decode("\x80\x02"
                     "c__builtin__\nset\nq\0]q\x01\x85q\x02Rq\x03."s) ==
              Object(Object::Set{}));
}

// A tuple (tensor, the same tensor's second row, 5), with strides to choose.
std::string ArchiveWithTensors(const Dims& size, const Dims& stride,
                               const std::string& payload) {
  std::string pickle;
  PickleWriter p(2, &pickle);
  const auto tensor = [&](int64_t offset, const Dims& sizes,
                          const Dims& strides) {
    p.Global("torch._utils", "_rebuild_tensor_v2");
    p.Mark();
    p.Mark();
    p.Text("storage");
    p.Global("torch", "ShortStorage");
    p.Text("0");
    p.Text("cpu");
    p.Int(6);
    p.Tuple(5);
    p.PersistentId();
    p.Int(offset);
    for (const Dims& dims : {sizes, strides}) {
      p.Mark();
      for (const int64_t value : dims) p.Int(value);
      p.Tuple(4);
    }
    p.Bool(false);
    p.Global("collections", "OrderedDict");
    p.Tuple(0);
    p.Reduce();
    p.Tuple(6);
    p.Reduce();
  };
  tensor(0, size, stride);
  tensor(3, {3}, {1});
  p.Int(5);
  p.Tuple(3);
  p.Stop();
  std::string out;
  ZipWriter zip(&out);
  zip.AddRecord("data.pkl", pickle);
  zip.AddRecord("data/0", payload);
  zip.AddRecord("version", "3\n");
  zip.Finish();
  return out;
}

TEST(ObjectItemTest, TensorsInsideAreData) {
  const std::string payload("a.b.c.d.e.f.", 12);
  const auto item = ReadObject(ArchiveWithTensors({3, 2}, {1, 3}, payload));
  ASSERT_TRUE(item.ok()) << item.status();
  EXPECT_TRUE(
      item->value ==
      Object(Object::Tuple{
          {Object(HostTensor(DType::kInt16, {3, 2}, "a.d.b.e.c.f.")),
           Object(HostTensor(DType::kInt16, {3}, "d.e.f.")), Object(5)}}));
  // Their elements are in the digest.
  const auto other =
      ReadObject(ArchiveWithTensors({3, 2}, {1, 3}, "a.b.c.d.e.g."));
  EXPECT_TRUE(other->digest != item->digest);
  // Written again it is the same, with a storage for each.
  const auto again = ReadObject(*EncodeStoredObject(item->value));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(again->value == item->value);
  EXPECT_EQ(again->digest, item->digest);

  EXPECT_EQ(
      ReadObject(ArchiveWithTensors({4, 2}, {1, 3}, payload)).status().code(),
      absl::StatusCode::kDataLoss);
  EXPECT_EQ(
      ReadObject(ArchiveWithTensors({3, 2}, {1, 3}, "a.b.c.")).status().code(),
      absl::StatusCode::kDataLoss);
  // A petabyte, of one element.
  EXPECT_EQ(ReadObject(ArchiveWithTensors({1 << 30, 1 << 20}, {0, 0}, payload))
                .status()
                .code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(ObjectItemTest, BombsAreRefused) {
  using namespace std::string_literals;  // NOLINT: texts with zero bytes
  // A list of twice the list before, 40 times.
  std::string shared = "\x80\x02]q\x00"s;
  for (int i = 0; i < 40; ++i) {
    shared += "](h"s + static_cast<char>(i) + "h"s + static_cast<char>(i) +
              "eq"s + static_cast<char>(i + 1);
  }
  // Only the last is to be on the stack.
  std::string chain = "\x80\x02]q\x00"s;
  for (int i = 0; i < 40; ++i) {
    chain += "h"s + static_cast<char>(i) + "\x86q"s + static_cast<char>(i + 1);
  }
  EXPECT_EQ(DecodeObjectPickle(chain + ".").status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(DecodeObjectPickle(shared + ".").ok());
  // A tuple of 50 values, 10,000 times.
  std::string repeated = "\x80\x02](("s + std::string(50, 'N') + "tq\x00"s;
  for (int i = 0; i < 10000; ++i) repeated += "h\x00"s;
  EXPECT_EQ(DecodeObjectPickle(repeated + "e.").status().code(),
            absl::StatusCode::kResourceExhausted);
  // Itself.
  EXPECT_EQ(DecodeObjectPickle("\x80\x02]q\x00h\x00"
                               "a."s)
                .status()
                .code(),
            absl::StatusCode::kDataLoss);
  // Depth.
  std::string deep =
      "\x80\x02"s + std::string(100000, ']') + std::string(99999, 'a') + ".";
  EXPECT_EQ(DecodeObjectPickle(deep).status().code(),
            absl::StatusCode::kDataLoss);
}

TEST(ObjectItemTest, EveryTruncationAndFlipIsATypedErrorOrAValue) {
  const Object object = SomeObjects()[15];
  const std::string archive = ObjectArchive(*EncodeStoredObject(object));
  for (size_t size = 0; size < archive.size(); ++size) {
    EXPECT_FALSE(ReadObject(archive.substr(0, size)).ok()) << size;
  }
  for (size_t bit = 0; bit < archive.size() * 8; ++bit) {
    std::string bad = archive;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
    const auto item = ReadObject(bad);
    if (item.ok()) {
      EXPECT_TRUE(item->value == object) << bit;
    }
  }
}

}  // namespace
}  // namespace dsd::dcp
