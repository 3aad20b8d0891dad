// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/dcp/metadata.h"

#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"
#include "dsd/testing/harness/test_seed.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace dsd::dcp {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string ReadTestData(const std::string& name) {
  const std::string path = absl::StrCat(
      std::getenv("TEST_SRCDIR"), "/", std::getenv("TEST_WORKSPACE"),
      "/frontends/checkpoint/dcp/testdata/", name);
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

std::string Encode(const Metadata& metadata) {
  std::string out;
  EXPECT_TRUE(EncodeMetadata(metadata, [&](absl::string_view bytes) {
                out.append(bytes.data(), bytes.size());
                return absl::OkStatus();
              }).ok());
  return out;
}

Metadata Sample() {
  Metadata metadata;
  metadata.save_id = "12345678-1234-4234-8234-123456789abc";
  metadata.files = {"__0_0.distcp", "__1_0.distcp"};
  metadata.AddTensor("model.w", {std::string("model"), std::string("w")},
                     DType::kBFloat16, {4, 6});
  metadata.AddChunk({{0, 0}, {2, 6}}, {0, 0, 1577});
  metadata.AddChunk({{2, 0}, {4, 6}}, {1, int64_t{5} << 32, 1577});
  metadata.AddTensor("s", {std::string("s")}, DType::kFloat32, {});
  metadata.AddChunk({{}, {}}, {1, 2048, 1577});
  metadata.AddTensor("e", {std::string("e")}, DType::kFloat8E4M3FN, {0, 3});
  metadata.AddChunk({{0, 0}, {0, 3}}, {1, 4096, 1513});
  metadata.objects.push_back(
      {"optim.param_groups.0.lr",
       {std::string("optim"), std::string("param_groups"), int64_t{0},
        std::string("lr")},
       {0, 1600, 1261}});
  return metadata;
}

TEST(MetadataTest, TheWorkedExampleOfCPython) {
  const std::string bytes = ReadTestData("worked_example.metadata");
  ASSERT_EQ(bytes.size(), 951u);
  const auto metadata = DecodeMetadata(bytes);
  ASSERT_TRUE(metadata.ok()) << metadata.status();
  ASSERT_EQ(metadata->tensors.size(), 1u);
  const TensorEntry& w = metadata->tensors[0];
  EXPECT_EQ(w.key, "w");
  EXPECT_EQ(w.dtype, DType::kFloat32);
  EXPECT_EQ(w.shape, (Dims{2, 3}));
  ASSERT_EQ(w.num_chunks, 1u);
  EXPECT_EQ(metadata->ChunkBox(w, 0), (Box{{0, 0}, {2, 3}}));
  EXPECT_EQ(metadata->ChunkLocation(w, 0).offset_bytes, 431);
  EXPECT_EQ(metadata->ChunkLocation(w, 0).length_bytes, 747);
  ASSERT_EQ(metadata->objects.size(), 1u);
  EXPECT_EQ(metadata->objects[0].key, "step");
  EXPECT_EQ(metadata->objects[0].location.offset_bytes, 0);
  EXPECT_EQ(metadata->objects[0].location.length_bytes, 431);
  EXPECT_THAT(metadata->files, ElementsAre("__0_0.distcp"));
  EXPECT_EQ(metadata->save_id, "8ad4b3ce-0000-4000-8000-000000000000");
  EXPECT_EQ(metadata->version, "1.0.0");
}

TEST(MetadataTest, EncodesWhatItDecodes) {
  const Metadata sample = Sample();
  const auto decoded = DecodeMetadata(Encode(sample));
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  ASSERT_EQ(decoded->tensors.size(), sample.tensors.size());
  for (size_t i = 0; i < sample.tensors.size(); ++i) {
    const TensorEntry& a = sample.tensors[i];
    const TensorEntry& b = decoded->tensors[i];
    EXPECT_EQ(a.key, b.key);
    EXPECT_EQ(a.path, b.path);
    EXPECT_EQ(a.dtype, b.dtype);
    EXPECT_EQ(a.shape, b.shape);
    ASSERT_EQ(a.num_chunks, b.num_chunks);
    EXPECT_EQ(NumMissingElements(*decoded, b), 0);
    for (size_t c = 0; c < a.num_chunks; ++c) {
      EXPECT_EQ(sample.ChunkBox(a, c), decoded->ChunkBox(b, c));
      const ItemLocation& x = sample.ChunkLocation(a, c);
      const ItemLocation& y = decoded->ChunkLocation(b, c);
      EXPECT_EQ(sample.files[x.file], decoded->files[y.file]);
      EXPECT_EQ(x.offset_bytes, y.offset_bytes);
      EXPECT_EQ(x.length_bytes, y.length_bytes);
    }
  }
  ASSERT_EQ(decoded->objects.size(), 1u);
  EXPECT_EQ(decoded->objects[0].path, sample.objects[0].path);
  EXPECT_EQ(decoded->save_id, sample.save_id);
  EXPECT_EQ(Encode(*decoded).size(), Encode(sample).size());
}

// An index in the form of some writer, piece by piece.
struct Form {
  int protocol = 4;
  std::string properties_module = "torch.distributed.checkpoint.metadata";
  bool enum_by_name = false;
  bool plain_tuples = false;
  bool hints = true;
  bool planner_data = true;
  bool storage_meta = true;
  bool extra_attribute = false;
  bool sizes_first = false;  // in every other chunk
  int chunk_attributes = 2;
  std::string dtype = "float32";
  std::string file = "__0_0.distcp";
  int64_t rows = 4;  // of the tensor [rows, 2]
  std::vector<std::array<int64_t, 2>> chunks = {{0, 2}, {2, 2}};  // row, count
  std::vector<std::array<int64_t, 2>> stored = {{0, 0}, {2, 1600}};
  int64_t length = 1577;
};

std::string Build(const Form& form) {
  constexpr char kModule[] = "torch.distributed.checkpoint.metadata";
  std::string out;
  PickleWriter p(form.protocol, &out);
  const auto begin = [&](absl::string_view module, absl::string_view name) {
    p.Global(module, name);
    p.NewInstance();
    p.EmptyDict();
    p.Mark();
  };
  const auto end = [&] {
    p.SetItems();
    p.Build();
  };
  const auto size = [&](int64_t a, int64_t b) {
    if (!form.plain_tuples) p.Global("torch", "Size");
    p.Int(a);
    p.Int(b);
    p.Tuple(2);
    if (form.plain_tuples) return;
    p.Tuple(1);
    p.Reduce();
  };
  begin(kModule, "Metadata");
  p.Text("state_dict_metadata");
  p.EmptyDict();
  p.Mark();
  p.Text("w");
  begin(kModule, "TensorStorageMetadata");
  p.Text("properties");
  p.Global(form.properties_module, "TensorProperties");
  p.NewInstance();
  p.Mark();
  p.Global("torch", form.dtype);
  p.Global("torch.serialization", "_get_layout");
  p.Text("torch.strided");
  p.Tuple(1);
  p.Reduce();
  p.Bool(false);
  if (form.enum_by_name) {
    p.Global("builtins", "getattr");
    p.Global(form.properties_module, "_MEM_FORMAT_ENCODING");
    p.Text("TORCH_CONTIGUOUS_FORMAT");
    p.Tuple(2);
  } else {
    p.Global(form.properties_module, "MEM_FORMAT_ENCODING");
    p.Int(0);
    p.Tuple(1);
  }
  p.Reduce();
  p.Bool(false);
  p.Tuple(5);
  p.Build();
  p.Text("size");
  size(form.rows, 2);
  p.Text("chunks");
  p.EmptyList();
  bool sizes_first = false;
  for (const auto& [row, count] : form.chunks) {
    begin(kModule, "ChunkStorageMetadata");
    for (const bool sizes : {sizes_first, !sizes_first}) {
      p.SharedText(sizes ? "sizes" : "offsets");
      size(sizes ? count : row, sizes ? 2 : 0);
    }
    sizes_first ^= form.sizes_first;
    for (int i = 2; i < form.chunk_attributes; ++i) {
      p.Text(absl::StrCat("more", i));
      p.None();
    }
    end();
    p.Append();
  }
  end();
  p.Text("o");
  p.Global(kModule, "BytesStorageMetadata");
  p.NewInstance();
  p.SetItems();
  p.Text("planner_data");
  if (form.planner_data) {
    p.EmptyDict();
    p.Mark();
    p.Text("w");
    p.Text("w");
    p.Tuple(1);
    p.Text("elsewhere");
    p.Tuple(0);
    p.SetItems();
  } else {
    p.None();
  }
  p.Text("storage_data");
  p.EmptyDict();
  const auto store = [&](bool object, int64_t row, int64_t offset, int hint) {
    begin(kModule, "MetadataIndex");
    p.Text("fqn");
    p.Text(object ? "o" : "w");
    p.Text("index");
    if (hint >= 0 && form.hints) {
      p.Int(hint);
    } else {
      p.None();
    }
    if (!object) {
      p.Text("offset");
      size(row, 0);
    }
    end();
    begin("torch.distributed.checkpoint.filesystem", "_StorageInfo");
    p.Text("relative_path");
    p.Text(form.file);
    p.Text("offset");
    p.Int(offset);
    p.Text("length");
    p.Int(form.length);
    end();
  };
  p.Mark();
  int hint = 0;
  for (const auto& [row, offset] : form.stored)
    store(false, row, offset, hint++);
  store(true, 0, 8000, -1);
  p.SetItems();
  if (form.storage_meta) {
    p.Text("storage_meta");
    begin(kModule, "StorageMeta");
    p.Text("checkpoint_id");
    p.Global("pathlib._local", "PosixPath");
    p.Text("/a/b");
    p.Tuple(1);
    p.Reduce();
    p.Text("save_id");
    p.Text("id");
    end();
  }
  if (form.extra_attribute) {
    p.Text("all_local_plans");
    p.EmptyList();
    p.Global("torch.distributed.checkpoint.planner", "SavePlan");
    p.NewInstance();
    p.Append();
  }
  end();
  p.Stop();
  return out;
}

TEST(MetadataTest, FormsThatOtherWritersUse) {
  const std::vector<std::pair<std::string, std::function<void(Form&)>>> forms =
      {
          {"plain", [](Form&) {}},
          {"protocol 2", [](Form& f) { f.protocol = 2; }},
          {"torch 2.2",
           [](Form& f) {
             f.properties_module =
                 "torch.distributed._shard.sharded_tensor.metadata";
             f.storage_meta = false;
           }},
          {"enum by name", [](Form& f) { f.enum_by_name = true; }},
          {"tuples", [](Form& f) { f.plain_tuples = true; }},
          {"no hints", [](Form& f) { f.hints = false; }},
          {"no paths", [](Form& f) { f.planner_data = false; }},
          {"extra attribute", [](Form& f) { f.extra_attribute = true; }},
          {"attributes in another order",
           [](Form& f) { f.sizes_first = true; }},
          {"more attributes", [](Form& f) { f.chunk_attributes = 60; }},
          {"chunks in another order",
           [](Form& f) {
             f.chunks = {{2, 2}, {0, 2}};
             f.hints = false;
           }},
          {"stored in another order",
           [](Form& f) {
             f.stored = {{2, 1600}, {0, 0}};
           }},
          {"a chunk twice",
           [](Form& f) {
             f.chunks = {{0, 2}, {0, 2}, {2, 2}};
           }},
          {"an empty chunk that is not stored",
           [](Form& f) {
             f.chunks = {{0, 2}, {2, 2}, {4, 0}};
           }},
      };
  for (const auto& [name, change] : forms) {
    Form form;
    change(form);
    const auto metadata = DecodeMetadata(Build(form));
    ASSERT_TRUE(metadata.ok()) << name << ": " << metadata.status();
    ASSERT_EQ(metadata->tensors.size(), 1u) << name;
    const TensorEntry& w = metadata->tensors[0];
    EXPECT_THAT(w.path, ElementsAre(PathSegment(std::string("w")))) << name;
    ASSERT_EQ(w.num_chunks, 2u) << name;
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_EQ(metadata->ChunkLocation(w, i).offset_bytes,
                metadata->ChunkBox(w, i).lo[0] == 0 ? 0 : 1600)
          << name;
    }
    EXPECT_EQ(metadata->objects[0].location.offset_bytes, 8000) << name;
  }
}

TEST(MetadataTest, UnknownDTypesAreKeptByName) {
  Form form;
  form.dtype = "quint4x2";
  const auto metadata = DecodeMetadata(Build(form));
  ASSERT_TRUE(metadata.ok()) << metadata.status();
  EXPECT_FALSE(metadata->tensors[0].dtype.has_value());
  EXPECT_EQ(metadata->tensors[0].dtype_name, "quint4x2");
}

TEST(MetadataTest, HolesAreCounted) {
  Form form;
  form.rows = 7;
  const auto metadata = DecodeMetadata(Build(form));
  ASSERT_TRUE(metadata.ok()) << metadata.status();
  EXPECT_EQ(NumMissingElements(*metadata, metadata->tensors[0]), 6);
}

TEST(MetadataTest, WhatIsWrongIsNamed) {
  const auto error = [](std::function<void(Form&)> change) {
    Form form;
    change(form);
    const absl::Status status = DecodeMetadata(Build(form)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(error([](Form& f) { f.chunks[0][1] = 3; }),
              HasSubstr("key \"w\": chunks [0:3, 0:2] and [2:4, 0:2] overlap"));
  EXPECT_THAT(error([](Form& f) { f.chunks[1][1] = 9; }),
              HasSubstr("outside the tensor of [4, 2]"));
  EXPECT_THAT(error([](Form& f) { f.chunks[1][0] = -1; }),
              HasSubstr("chunk 1 has no offsets and sizes"));
  EXPECT_THAT(error([](Form& f) { f.chunk_attributes = 100; }),
              HasSubstr("expected ChunkStorageMetadata"));
  EXPECT_THAT(error([](Form& f) { f.rows = int64_t{1} << 62; }),
              HasSubstr("impossible shape"));
  EXPECT_THAT(error([](Form& f) { f.stored.pop_back(); }),
              HasSubstr("chunk [2:4, 0:2] is described but not stored"));
  EXPECT_THAT(error([](Form& f) { f.stored[1][0] = 1; }),
              HasSubstr("a stored chunk at [1, 0] is not among its chunks"));
  EXPECT_THAT(error([](Form& f) {
                f.stored.push_back({0, 3200});
              }),
              HasSubstr("key \"w\": its chunk at [0, 0] is stored twice"));
  EXPECT_THAT(error([](Form& f) { f.length = -1; }),
              HasSubstr("offset and length"));
  for (const std::string& file :
       {std::string("../x"), std::string("/etc/passwd"), std::string(".."),
        std::string("a/b"), std::string(""), std::string("a\0b", 3),
        std::string("a\\b"), std::string(300, 'x')}) {
    EXPECT_THAT(error([&](Form& f) { f.file = file; }),
                HasSubstr("is not a plain file name"));
  }
  EXPECT_EQ(DecodeMetadata("\x80\x04N.").status().code(),
            absl::StatusCode::kDataLoss);
  EXPECT_THAT(
      std::string(
          DecodeMetadata("\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.")
              .status()
              .message()),
      HasSubstr("found os.system"));
}

// Work in proportion to the bytes, whatever they say.
TEST(MetadataTest, ManyChunksWithoutElements) {
  Form form;
  form.chunks.insert(form.chunks.end(), 100000, {4, 0});
  const auto metadata = DecodeMetadata(Build(form));
  ASSERT_TRUE(metadata.ok()) << metadata.status();
  EXPECT_EQ(metadata->tensors[0].num_chunks, 2u);
}

// Few bytes that stand for many values through sharing.
TEST(MetadataTest, BombsAreRefused) {
  // A list of 10,000 chunks that 20,000 tensors share.
  std::string out;
  PickleWriter p(4, &out);
  constexpr char kModule[] = "torch.distributed.checkpoint.metadata";
  p.Global(kModule, "Metadata");
  p.NewInstance();
  p.EmptyDict();
  p.Mark();
  p.Text("storage_data");
  p.EmptyDict();
  p.Text("state_dict_metadata");
  p.EmptyDict();
  p.Mark();
  // The first builds what is shared: memo indices follow from the order.
  p.Text("shared");
  p.Global(kModule, "TensorStorageMetadata");
  p.NewInstance();
  p.EmptyDict();
  p.Mark();
  p.Text("properties");
  p.Global(kModule, "TensorProperties");
  p.NewInstance();
  p.Global("torch", "int8");
  p.Tuple(1);
  p.Build();
  p.Text("size");
  p.Int(1 << 20);
  p.Tuple(1);
  p.Text("chunks");
  p.EmptyList();
  p.Mark();
  for (int i = 0; i < 10000; ++i) {
    p.Global(kModule, "ChunkStorageMetadata");
    p.NewInstance();
    p.EmptyDict();
    p.Mark();
    p.SharedText("offsets");
    p.Int(i);
    p.Tuple(1);
    p.SharedText("sizes");
    p.Int(1);
    p.Tuple(1);
    p.SetItems();
    p.Build();
  }
  p.Appends();
  p.SetItems();
  p.Build();
  // It is memoized by hand; its index follows what the writer memoized.
  bool refused = false;
  for (int memo = 0; memo < 20; ++memo) {
    std::string bomb = out + '\x94';
    for (int i = 0; i < 20000; ++i) {
      absl::StrAppend(&bomb, "\x8c\x06", 100000 + i);
      bomb += 'h';
      bomb += static_cast<char>(memo);
    }
    bomb += "uub.";
    const absl::Status status = DecodeMetadata(bomb).status();
    EXPECT_FALSE(status.ok());
    refused |= std::string(status.message())
                   .find("more chunks than the index has room for") !=
               std::string::npos;
  }
  EXPECT_TRUE(refused);
}

// Any damage gives a typed error or an index that holds together.
TEST(MetadataTest, EveryTruncationAndFlip) {
  const std::string encoded = Encode(Sample());
  for (const std::string& good :
       {ReadTestData("worked_example.metadata"), encoded}) {
    for (size_t size = 0; size < good.size(); ++size) {
      EXPECT_EQ(DecodeMetadata(good.substr(0, size)).status().code(),
                absl::StatusCode::kDataLoss)
          << size;
    }
    for (size_t bit = 0; bit < good.size() * 8; ++bit) {
      std::string bad = good;
      bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
      const auto metadata = DecodeMetadata(bad);
      if (!metadata.ok()) continue;
      for (const TensorEntry& tensor : metadata->tensors) {
        for (size_t i = 0; i < tensor.num_chunks; ++i) {
          EXPECT_TRUE(
              Box::Whole(tensor.shape).Contains(metadata->ChunkBox(tensor, i)));
          EXPECT_LT(metadata->ChunkLocation(tensor, i).file,
                    metadata->files.size());
        }
      }
    }
  }
}

TEST(MetadataTest, RandomDamage) {
  std::mt19937_64 random(test::TestSeed());
  const std::string good = Encode(Sample());
  for (int round = 0; round < 50000; ++round) {
    std::string bad = good;
    for (int change = 1 + static_cast<int>(random() % 6); change > 0;
         --change) {
      const size_t at = random() % bad.size();
      switch (random() % 4) {
        case 0:
          bad[at] = static_cast<char>(random());
          break;
        case 1:
          bad.erase(at, 1 + random() % 8);
          break;
        case 2:
          bad.insert(at, 1, static_cast<char>(random()));
          break;
        default:
          bad.insert(at, good, random() % good.size(), random() % 40);
      }
      if (bad.empty()) bad = "x";
    }
    DecodeMetadata(bad).status().IgnoreError();
  }
}

TEST(MetadataTest, ALargeIndex) {
  Metadata metadata;
  metadata.save_id = "id";
  for (int f = 0; f < 8; ++f) {
    metadata.files.push_back(absl::StrCat("__", f, "_0.distcp"));
  }
  constexpr int kTensors = 2000;
  constexpr int kChunks = 8;
  for (int t = 0; t < kTensors; ++t) {
    const std::string key = absl::StrCat("model.layers.", t, ".weight");
    metadata.AddTensor(key, {std::string("model"), key.substr(6)},
                       DType::kBFloat16, {kChunks * 16, 1024});
    for (int c = 0; c < kChunks; ++c) {
      metadata.AddChunk({{c * 16, 0}, {c * 16 + 16, 1024}},
                        {static_cast<uint32_t>(c), int64_t{t} << 24, 40000});
    }
  }
  const std::string bytes = Encode(metadata);
  EXPECT_LT(bytes.size(), kTensors * kChunks * 160u);
  const auto decoded = DecodeMetadata(bytes);
  ASSERT_TRUE(decoded.ok()) << decoded.status();
  EXPECT_EQ(decoded->locations.size(), size_t{kTensors} * kChunks);
  EXPECT_EQ(decoded->bounds, metadata.bounds);
}

}  // namespace
}  // namespace dsd::dcp
