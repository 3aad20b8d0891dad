// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/checked_int.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/dcp/metadata.h"

namespace dsd::dcp {
namespace {

using Kind = PickleValue::Kind;

constexpr absl::string_view kMetadataModule =
    "torch.distributed.checkpoint.metadata";
constexpr absl::string_view kFilesystemModule =
    "torch.distributed.checkpoint.filesystem";
// Where torch 2.2 had TensorProperties.
constexpr absl::string_view kShardedTensorModule =
    "torch.distributed._shard.sharded_tensor.metadata";

constexpr size_t kMaxDims = 64;
constexpr size_t kMaxPathSegments = 1000;
constexpr int64_t kMaxKeyBytes = 64 << 10;
constexpr int64_t kMaxOverlapTests = int64_t{200} << 20;
constexpr size_t kMaxTransforms = 16;

absl::Status Bad(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("checkpoint index: ", what));
}

absl::Status BadKey(absl::string_view key, absl::string_view what) {
  return absl::DataLossError(absl::StrCat("checkpoint index: key \"",
                                          absl::CHexEscape(key), "\": ", what));
}

absl::string_view KindName(PickleValue value) {
  switch (value.kind()) {
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return "bool";
    case Kind::kInt:
    case Kind::kBigInt:
      return "int";
    case Kind::kFloat:
      return "float";
    case Kind::kString:
      return "str";
    case Kind::kBytes:
      return "bytes";
    case Kind::kTuple:
      return "tuple";
    case Kind::kList:
      return "list";
    case Kind::kDict:
      return "dict";
    case Kind::kSet:
    case Kind::kFrozenSet:
      return "set";
    case Kind::kGlobal:
      return "class";
    default:
      return "object";
  }
}

// "a object of torch.X" for messages.
std::string Describe(PickleValue value) {
  if (value.kind() == Kind::kInstance || value.kind() == Kind::kCall) {
    const PickleValue type = value.callee();
    if (type.kind() == Kind::kGlobal) {
      return absl::CHexEscape(absl::StrCat(type.module(), ".", type.name()));
    }
  }
  return std::string(KindName(value));
}

// More attributes than any class of the format has; what is shared may be long
// and be looked at often.
constexpr int kMaxAttributes = 64;

bool IsShortDict(PickleValue value) {
  if (value.kind() != Kind::kDict) return false;
  int count = 0;
  value.ForEachEntry(
      [&](PickleValue, PickleValue) { return ++count <= kMaxAttributes; });
  return count <= kMaxAttributes;
}

// The state dict of an instance of module.name; nullopt if it is none.
std::optional<PickleValue> StateOf(PickleValue value, absl::string_view module,
                                   absl::string_view name) {
  if (value.kind() != Kind::kInstance ||
      !value.callee().IsGlobal(module, name)) {
    return std::nullopt;
  }
  const std::optional<PickleValue> state = value.state();
  if (!state.has_value() || !IsShortDict(*state)) return std::nullopt;
  return state;
}

// torch.Size, or a plain tuple or list, of numbers >= 0.
bool ReadSize(PickleValue value, Dims* out) {
  if (value.kind() == Kind::kCall) {
    if (!value.callee().IsGlobal("torch", "Size")) return false;
    std::optional<PickleValue> inner;
    size_t count = 0;
    value.args().ForEachItem([&](PickleValue item) {
      inner = item;
      return ++count < 2;
    });
    if (count != 1) return false;
    value = *inner;
  }
  if (value.kind() != Kind::kTuple && value.kind() != Kind::kList) return false;
  out->clear();
  bool good = true;
  value.ForEachItem([&](PickleValue item) {
    const std::optional<int64_t> number = item.AsInt();
    good = number.has_value() && *number >= 0 && out->size() < kMaxDims;
    if (good) out->push_back(*number);
    return good;
  });
  return good;
}

// One path component that is a file in the directory itself.
bool IsPlainFileName(absl::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.size() <= 255 &&
         name.find_first_of(absl::string_view("/\\\0", 3)) ==
             absl::string_view::npos;
}

class Decoder {
 public:
  // Values may be shared, so that few bytes decode to many; what a writer makes
  // stays within these multiples of the bytes.
  explicit Decoder(int64_t size_bytes)
      : chunks_left_(size_bytes / 16 + 16),
        extents_left_(size_bytes * 2 + (1 << 16)),
        path_bytes_left_(size_bytes * 64 + (1 << 20)) {}

  absl::StatusOr<Metadata> Run(PickleValue root) {
    const auto state = StateOf(root, kMetadataModule, "Metadata");
    if (!state.has_value()) {
      return Bad(absl::StrCat("expected an object of ", kMetadataModule,
                              ".Metadata, found ", Describe(root)));
    }
    const auto entries = state->Find("state_dict_metadata");
    const auto storage = state->Find("storage_data");
    if (!entries.has_value() || entries->kind() != Kind::kDict) {
      return Bad("no dict state_dict_metadata");
    }
    if (!storage.has_value() || storage->kind() != Kind::kDict) {
      return Bad("no dict storage_data");
    }
    DSD_RETURN_IF_ERROR(ForEach(
        *entries, [&](PickleValue k, PickleValue v) { return Entry(k, v); }));
    DSD_RETURN_IF_ERROR(ForEach(
        *storage, [&](PickleValue k, PickleValue v) { return Storage(k, v); }));
    DSD_RETURN_IF_ERROR(CheckPlaces());
    if (const auto paths = state->Find("planner_data");
        paths.has_value() && paths->kind() == Kind::kDict) {
      DSD_RETURN_IF_ERROR(ForEach(*paths, [&](PickleValue k, PickleValue v) {
        return PlannerPath(k, v);
      }));
    }
    if (const auto version = state->Find("version")) {
      out_.version = std::string(version->AsString().value_or(""));
    }
    if (const auto meta = state->Find("storage_meta")) {
      if (const auto fields = StateOf(*meta, kMetadataModule, "StorageMeta")) {
        if (const auto id = fields->Find("save_id")) {
          out_.save_id = std::string(id->AsString().value_or(""));
        }
      }
    }
    DSD_RETURN_IF_ERROR(CheckOverlap(out_));
    return std::move(out_);
  }

 private:
  static constexpr size_t kObjectBit = size_t{1} << 62;

  static absl::Status ForEach(
      PickleValue dict,
      absl::FunctionRef<absl::Status(PickleValue, PickleValue)> visit) {
    absl::Status status;
    dict.ForEachEntry([&](PickleValue key, PickleValue value) {
      status = visit(key, value);
      return status.ok();
    });
    return status;
  }

  absl::Status Entry(PickleValue key_value, PickleValue value) {
    const auto key = key_value.AsString();
    if (!key.has_value() || key->size() > kMaxKeyBytes) {
      return Bad(absl::StrCat("a key is ", KindName(key_value),
                              ", expected a str of at most 64 KiB"));
    }
    if (value.kind() == Kind::kInstance &&
        value.callee().IsGlobal(kMetadataModule, "BytesStorageMetadata")) {
      ObjectEntryInfo object;
      object.key = std::string(*key);
      object.path = {object.key};
      DSD_RETURN_IF_ERROR(NewKey(*key, out_.objects.size() | kObjectBit));
      out_.objects.push_back(std::move(object));
      return absl::OkStatus();
    }
    const auto state = StateOf(value, kMetadataModule, "TensorStorageMetadata");
    if (!state.has_value()) {
      return BadKey(*key, absl::StrCat("expected TensorStorageMetadata or "
                                       "BytesStorageMetadata, found ",
                                       Describe(value)));
    }
    TensorEntry tensor;
    tensor.key = std::string(*key);
    tensor.path = {tensor.key};
    DSD_RETURN_IF_ERROR(NewKey(*key, out_.tensors.size()));
    const auto properties = state->Find("properties");
    const auto size = state->Find("size");
    const auto chunks = state->Find("chunks");
    if (!properties.has_value() || !ReadDType(*properties, &tensor)) {
      return BadKey(*key, "no dtype in its properties");
    }
    if (!size.has_value() || !ReadSize(*size, &tensor.shape)) {
      return BadKey(*key, "its size is not a tuple of numbers >= 0");
    }
    DSD_RETURN_IF_ERROR(SpendExtents(*key, tensor.shape.size()));
    // Bytes, too: 16 is the largest item.
    const auto elements = CheckedProduct(tensor.shape);
    if (!elements.has_value() || !CheckedMul(*elements, 16).has_value()) {
      return BadKey(
          *key, absl::StrCat("impossible shape ", DimsToString(tensor.shape)));
    }
    if (!chunks.has_value() ||
        (chunks->kind() != Kind::kList && chunks->kind() != Kind::kTuple)) {
      return BadKey(*key, "no list of chunks");
    }
    tensor.first_chunk = out_.locations.size();
    tensor.first_bound = out_.bounds.size();
    absl::Status status;
    chunks->ForEachItem([&](PickleValue chunk) {
      status = Chunk(chunk, tensor);
      return status.ok();
    });
    DSD_RETURN_IF_ERROR(status);
    out_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  absl::Status SpendExtents(absl::string_view key, size_t count) {
    extents_left_ -= static_cast<int64_t>(count);
    if (extents_left_ >= 0) return absl::OkStatus();
    return BadKey(key, "more dimensions than the index has room for");
  }

  absl::Status NewKey(absl::string_view key, size_t entry) {
    if (!keys_.try_emplace(std::string(key), entry).second) {
      return BadKey(key, "occurs twice");
    }
    return absl::OkStatus();
  }

  static bool ReadDType(PickleValue properties, TensorEntry* tensor) {
    if (properties.kind() != Kind::kInstance) return false;
    const PickleValue type = properties.callee();
    if (!type.IsGlobal(kMetadataModule, "TensorProperties") &&
        !type.IsGlobal(kShardedTensorModule, "TensorProperties")) {
      return false;
    }
    const auto state = properties.state();
    if (!state.has_value()) return false;
    std::optional<PickleValue> dtype;
    if (state->kind() == Kind::kTuple) {
      state->ForEachItem([&](PickleValue item) {
        dtype = item;
        return false;
      });
    } else if (IsShortDict(*state)) {
      dtype = state->Find("dtype");
    }
    if (!dtype.has_value() || dtype->kind() != Kind::kGlobal ||
        dtype->module() != "torch" || dtype->name().size() > 64) {
      return false;
    }
    tensor->dtype_name = std::string(dtype->name());
    tensor->dtype = ParseDType(tensor->dtype_name);
    return true;
  }

  absl::Status Chunk(PickleValue value, TensorEntry& tensor) {
    if (--chunks_left_ < 0) {
      return BadKey(tensor.key, "more chunks than the index has room for");
    }
    const auto state = StateOf(value, kMetadataModule, "ChunkStorageMetadata");
    if (!state.has_value()) {
      return BadKey(tensor.key,
                    absl::StrCat("expected ChunkStorageMetadata, found ",
                                 Describe(value)));
    }
    const auto offsets = state->Find("offsets");
    const auto sizes = state->Find("sizes");
    if (!offsets.has_value() || !sizes.has_value() ||
        !ReadSize(*offsets, &offsets_) || !ReadSize(*sizes, &sizes_) ||
        offsets_.size() != tensor.shape.size() ||
        sizes_.size() != tensor.shape.size()) {
      return BadKey(tensor.key,
                    absl::StrCat("chunk ", tensor.num_chunks,
                                 " has no offsets and sizes of ",
                                 tensor.shape.size(), " numbers >= 0"));
    }
    DSD_RETURN_IF_ERROR(SpendExtents(tensor.key, 2 * sizes_.size()));
    for (size_t d = 0; d < sizes_.size(); ++d) {
      if (offsets_[d] > tensor.shape[d] ||
          sizes_[d] > tensor.shape[d] - offsets_[d]) {
        return BadKey(
            tensor.key,
            absl::StrCat("chunk ", tensor.num_chunks, " at ",
                         DimsToString(offsets_), " of size ",
                         DimsToString(sizes_), " is outside the tensor of ",
                         DimsToString(tensor.shape)));
      }
    }
    out_.bounds.insert(out_.bounds.end(), offsets_.begin(), offsets_.end());
    out_.bounds.insert(out_.bounds.end(), sizes_.begin(), sizes_.end());
    out_.locations.emplace_back();
    ++tensor.num_chunks;
    return absl::OkStatus();
  }

  absl::Status Storage(PickleValue index_value, PickleValue info_value) {
    const auto index = StateOf(index_value, kMetadataModule, "MetadataIndex");
    const auto info = StateOf(info_value, kFilesystemModule, "_StorageInfo");
    if (!index.has_value() || !info.has_value()) {
      return Bad(absl::StrCat("expected MetadataIndex and _StorageInfo, found ",
                              Describe(index_value), " and ",
                              Describe(info_value)));
    }
    std::optional<absl::string_view> key;
    std::optional<PickleValue> offset_value;
    std::optional<int64_t> hint;
    index->ForEachEntry([&](PickleValue name_value, PickleValue value) {
      const absl::string_view name = name_value.AsString().value_or("");
      if (name == "fqn") {
        key = value.AsString();
      } else if (name == "offset") {
        if (!value.IsNone()) offset_value = value;
      } else if (name == "index") {
        hint = value.AsInt();
      }
      return true;
    });
    if (!key.has_value()) return Bad("a MetadataIndex has no fqn");

    ItemLocation location;
    std::vector<std::string> transforms;
    std::optional<absl::string_view> file;
    std::optional<int64_t> offset, length;
    info->ForEachEntry([&](PickleValue name_value, PickleValue value) {
      const absl::string_view name = name_value.AsString().value_or("");
      if (name == "relative_path") {
        file = value.AsString();
      } else if (name == "offset") {
        offset = value.AsInt();
      } else if (name == "length") {
        length = value.AsInt();
      } else if (name == "transform_descriptors") {
        value.ForEachItem([&](PickleValue item) {
          transforms.emplace_back(item.AsString().value_or("?").substr(0, 64));
          return transforms.size() < kMaxTransforms;
        });
      }
      return true;
    });
    if (!file.has_value() || !IsPlainFileName(*file)) {
      return BadKey(*key,
                    absl::StrCat("file \"", absl::CHexEscape(file.value_or("")),
                                 "\" is not a plain file name"));
    }
    if (!offset.has_value() || !length.has_value() || *offset < 0 ||
        *length < 0 || !CheckedAdd(*offset, *length).has_value()) {
      return BadKey(*key, "offset and length are not numbers >= 0");
    }
    location.file = FileIndex(*file);
    location.offset_bytes = *offset;
    location.length_bytes = *length;

    const auto found = keys_.find(*key);
    if (found == keys_.end()) {
      return BadKey(*key, "is stored but not described");
    }
    if (found->second & kObjectBit) {
      const size_t object = found->second & ~kObjectBit;
      ItemLocation& place = out_.objects[object].location;
      if (place.length_bytes >= 0) return BadKey(*key, "is stored twice");
      place = location;
      if (!transforms.empty()) {
        out_.object_transforms[object] = absl::StrJoin(transforms, ", ");
      }
      return absl::OkStatus();
    }
    const TensorEntry& tensor = out_.tensors[found->second];
    if (!offset_value.has_value() || !ReadSize(*offset_value, &offsets_) ||
        offsets_.size() != tensor.shape.size()) {
      return BadKey(*key, "is a tensor and stored without a chunk offset");
    }
    const std::optional<size_t> chunk =
        FindChunk(found->second, tensor, hint.value_or(-1));
    if (!chunk.has_value()) {
      return BadKey(*key,
                    absl::StrCat("a stored chunk at ", DimsToString(offsets_),
                                 " is not among its chunks"));
    }
    ItemLocation& place = out_.locations[tensor.first_chunk + *chunk];
    if (place.length_bytes >= 0) {
      return BadKey(*key, absl::StrCat("its chunk at ", DimsToString(offsets_),
                                       " is stored twice"));
    }
    place = location;
    if (!transforms.empty()) {
      out_.chunk_transforms[tensor.first_chunk + *chunk] =
          absl::StrJoin(transforms, ", ");
    }
    return absl::OkStatus();
  }

  uint32_t FileIndex(absl::string_view name) {
    if (!out_.files.empty() && out_.files[last_file_] == name) {
      return last_file_;
    }
    const auto [it, is_new] = files_.try_emplace(
        std::string(name), static_cast<uint32_t>(out_.files.size()));
    if (is_new) out_.files.emplace_back(name);
    return last_file_ = it->second;
  }

  // The chunk of the tensor at offsets_.
  std::optional<size_t> FindChunk(size_t tensor_index,
                                  const TensorEntry& tensor, int64_t hint) {
    const int ndim = tensor.ndim();
    const auto at = [&](size_t chunk) {
      return out_.bounds.data() + tensor.first_bound + 2 * ndim * chunk;
    };
    if (hint >= 0 && hint < static_cast<int64_t>(tensor.num_chunks) &&
        std::equal(offsets_.begin(), offsets_.end(), at(hint))) {
      return hint;
    }
    auto& by_offset = chunks_by_offset_[tensor_index];
    if (by_offset.empty()) {
      for (size_t i = 0; i < tensor.num_chunks; ++i) {
        by_offset.try_emplace(Dims(at(i), at(i) + ndim), i);
      }
    }
    const auto it = by_offset.find(offsets_);
    if (it == by_offset.end()) return std::nullopt;
    return it->second;
  }

  // Every item has a place. Repeated chunks are dropped, empty ones need none.
  absl::Status CheckPlaces() {
    for (const ObjectEntryInfo& object : out_.objects) {
      if (object.location.length_bytes < 0) {
        return BadKey(object.key, "is described but not stored");
      }
    }
    bool dropped = false;
    for (const TensorEntry& tensor : out_.tensors) {
      // Made when one is missing.
      std::optional<absl::flat_hash_map<Dims, size_t>> stored;
      for (size_t i = 0; i < tensor.num_chunks; ++i) {
        if (out_.ChunkLocation(tensor, i).length_bytes >= 0) continue;
        if (!stored.has_value()) {
          stored.emplace();
          for (size_t k = 0; k < tensor.num_chunks; ++k) {
            if (out_.ChunkLocation(tensor, k).length_bytes >= 0) {
              stored->emplace(out_.ChunkBox(tensor, k).lo, k);
            }
          }
        }
        const Box box = out_.ChunkBox(tensor, i);
        const auto twin = stored->find(box.lo);
        if (!box.empty() && (twin == stored->end() ||
                             out_.ChunkBox(tensor, twin->second) != box)) {
          return BadKey(tensor.key,
                        absl::StrCat("chunk ", box.ToString(),
                                     " is described but not stored"));
        }
        dropped = true;
      }
    }
    if (dropped) Compact();
    return absl::OkStatus();
  }

  void Compact() {
    Metadata old = std::move(out_);
    out_ = Metadata();
    out_.objects = std::move(old.objects);
    out_.files = old.files;
    out_.object_transforms = std::move(old.object_transforms);
    for (TensorEntry& tensor : old.tensors) {
      TensorEntry entry = tensor;
      entry.first_chunk = out_.locations.size();
      entry.first_bound = out_.bounds.size();
      entry.num_chunks = 0;
      out_.tensors.push_back(std::move(entry));
      for (size_t i = 0; i < tensor.num_chunks; ++i) {
        const ItemLocation& location = old.ChunkLocation(tensor, i);
        if (location.length_bytes < 0) continue;
        const auto transform =
            old.chunk_transforms.find(tensor.first_chunk + i);
        if (transform != old.chunk_transforms.end()) {
          out_.chunk_transforms[out_.locations.size()] = transform->second;
        }
        out_.AddChunk(old.ChunkBox(tensor, i), location);
      }
    }
  }

  absl::Status PlannerPath(PickleValue key_value, PickleValue value) {
    const auto key = key_value.AsString();
    if (!key.has_value()) return Bad("a key of planner_data is not a str");
    const auto found = keys_.find(*key);
    // Paths of keys that were not saved occur.
    if (found == keys_.end()) return absl::OkStatus();
    const auto segments = value.AsTuple(kMaxPathSegments);
    if (!segments.has_value()) {
      return BadKey(*key, absl::StrCat("its path is ", KindName(value),
                                       ", expected a tuple"));
    }
    Path path;
    for (const PickleValue& segment : *segments) {
      path_bytes_left_ -= static_cast<int64_t>(
          sizeof(PathSegment) + segment.AsString().value_or("").size());
      if (path_bytes_left_ < 0) return Bad("planner_data is too large");
      if (const auto text = segment.AsString()) {
        path.emplace_back(std::string(*text));
      } else if (const auto number = segment.AsInt()) {
        path.emplace_back(*number);
      } else {
        return BadKey(*key,
                      absl::StrCat("a part of its path is ", KindName(segment),
                                   ", expected str or int"));
      }
    }
    (found->second & kObjectBit ? out_.objects[found->second & ~kObjectBit].path
                                : out_.tensors[found->second].path) =
        std::move(path);
    return absl::OkStatus();
  }

  int64_t chunks_left_;
  int64_t extents_left_;
  int64_t path_bytes_left_;
  Metadata out_;
  Dims offsets_;
  Dims sizes_;
  absl::flat_hash_map<std::string, size_t> keys_;
  absl::flat_hash_map<std::string, uint32_t> files_;
  uint32_t last_file_ = 0;
  absl::flat_hash_map<size_t, absl::flat_hash_map<Dims, size_t>>
      chunks_by_offset_;
};

// Sweeps along the dimension with most cuts.
absl::Status CheckOverlap(const Metadata& metadata, const TensorEntry& tensor,
                          int64_t* tests) {
  if (tensor.num_chunks < 2) return absl::OkStatus();
  const int ndim = tensor.ndim();
  const auto lo = [&](size_t chunk, int d) {
    return metadata.bounds[tensor.first_bound + 2 * ndim * chunk + d];
  };
  const auto size = [&](size_t chunk, int d) { return lo(chunk, ndim + d); };
  std::vector<uint32_t> order;
  for (size_t i = 0; i < tensor.num_chunks; ++i) {
    bool empty = false;
    for (int d = 0; d < ndim; ++d) empty |= size(i, d) == 0;
    if (!empty) order.push_back(static_cast<uint32_t>(i));
  }
  int sweep = 0;
  size_t most = 0;
  for (int d = 0; d < ndim; ++d) {
    absl::flat_hash_set<int64_t> cuts;
    for (uint32_t chunk : order) cuts.insert(lo(chunk, d));
    if (cuts.size() > most) {
      most = cuts.size();
      sweep = d;
    }
  }
  if (ndim > 0) {
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
      return lo(a, sweep) < lo(b, sweep);
    });
  }
  std::vector<uint32_t> active;
  for (uint32_t chunk : order) {
    if (ndim > 0) {
      active.erase(std::remove_if(active.begin(), active.end(),
                                  [&](uint32_t other) {
                                    return lo(other, sweep) +
                                               size(other, sweep) <=
                                           lo(chunk, sweep);
                                  }),
                   active.end());
    }
    *tests += static_cast<int64_t>(active.size());
    if (*tests > kMaxOverlapTests) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "checkpoint index: key \"", absl::CHexEscape(tensor.key),
          "\": too many chunks beside each other to test for overlap"));
    }
    for (uint32_t other : active) {
      bool apart = false;
      for (int d = 0; d < ndim; ++d) {
        apart |= lo(other, d) >= lo(chunk, d) + size(chunk, d) ||
                 lo(chunk, d) >= lo(other, d) + size(other, d);
      }
      if (!apart) {
        return BadKey(
            tensor.key,
            absl::StrCat("chunks ", metadata.ChunkBox(tensor, other).ToString(),
                         " and ", metadata.ChunkBox(tensor, chunk).ToString(),
                         " overlap"));
      }
    }
    active.push_back(chunk);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckOverlap(const Metadata& metadata) {
  int64_t tests = 0;
  for (const TensorEntry& tensor : metadata.tensors) {
    DSD_RETURN_IF_ERROR(CheckOverlap(metadata, tensor, &tests));
  }
  return absl::OkStatus();
}

absl::StatusOr<Metadata> DecodeMetadata(int64_t size_bytes,
                                        Pickle::ReadFn read) {
  DSD_ASSIGN_OR_RETURN(const Pickle pickle,
                       Pickle::Parse(size_bytes, read, PickleLimits()));
  return Decoder(size_bytes).Run(pickle.root());
}

absl::StatusOr<Metadata> DecodeMetadata(absl::string_view bytes) {
  return DecodeMetadata(static_cast<int64_t>(bytes.size()),
                        [bytes](int64_t offset, absl::Span<std::byte> out) {
                          std::memcpy(out.data(), bytes.data() + offset,
                                      out.size());
                          return absl::OkStatus();
                        });
}

}  // namespace dsd::dcp
