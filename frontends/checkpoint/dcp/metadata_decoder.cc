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
  return value.kind() == Kind::kDict && value.HasAtMost(kMaxAttributes);
}

// What was found out about a value, by its identity: names and classes are
// written once and referred to a million times. Forgets what collides.
template <class T>
class Remembered {
 public:
  // `find_out` may return a value that is not to be remembered: nullopt.
  template <class Fn>
  std::optional<T> Get(PickleValue value, const Fn& find_out) {
    Slot& slot = slots_[value.id() * 0x9E3779B1u >> 26];
    if (slot.id == value.id() && slot.what.has_value()) return slot.what;
    std::optional<T> what = find_out();
    if (what.has_value()) slot = {value.id(), what};
    return what;
  }

 private:
  struct Slot {
    uint32_t id = 0;
    std::optional<T> what;
  };
  Slot slots_[64];
};

// The state dict of an instance of module.name; nullopt if it is none.
std::optional<PickleValue> StateOf(PickleValue value, absl::string_view module,
                                   absl::string_view name,
                                   Remembered<bool>* remembered = nullptr) {
  if (value.kind() != Kind::kInstance) return std::nullopt;
  const PickleValue type = value.callee();
  const auto is_it = [&]() -> std::optional<bool> {
    if (!type.IsGlobal(module, name)) return std::nullopt;
    return true;
  };
  if (!(remembered != nullptr ? remembered->Get(type, is_it) : is_it())
           .has_value()) {
    return std::nullopt;
  }
  const std::optional<PickleValue> state = value.state();
  if (!state.has_value() || !IsShortDict(*state)) return std::nullopt;
  return state;
}

// torch.Size, or a plain tuple or list, of numbers >= 0.
bool ReadSize(PickleValue value, Remembered<bool>* is_size, Dims* out) {
  if (value.kind() == Kind::kCall) {
    const PickleValue type = value.callee();
    const auto found = is_size->Get(type, [&]() -> std::optional<bool> {
      if (!type.IsGlobal("torch", "Size")) return std::nullopt;
      return true;
    });
    if (!found.has_value()) return false;
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
      DSD_RETURN_IF_ERROR(
          NewKey(key_value, *key, out_.objects.size() | kObjectBit));
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
    DSD_RETURN_IF_ERROR(NewKey(key_value, *key, out_.tensors.size()));
    const auto properties = state->Find("properties");
    const auto size = state->Find("size");
    const auto chunks = state->Find("chunks");
    if (!properties.has_value() || !ReadDType(*properties, &tensor)) {
      return BadKey(*key, "no dtype in its properties");
    }
    if (!size.has_value() || !ReadSize(*size, &is_size_, &tensor.shape)) {
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

  absl::Status NewKey(PickleValue value, absl::string_view key, size_t entry) {
    keys_by_id_.try_emplace(value.id(), entry);
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
    const auto state =
        StateOf(value, kMetadataModule, "ChunkStorageMetadata", &is_chunk_);
    if (!state.has_value()) {
      return BadKey(tensor.key,
                    absl::StrCat("expected ChunkStorageMetadata, found ",
                                 Describe(value)));
    }
    std::optional<PickleValue> offsets, sizes;
    state->ForEachEntry([&](PickleValue name, PickleValue field) {
      switch (FieldOf(name)) {
        case Field::kOffsets:
          offsets = field;
          break;
        case Field::kSizes:
          sizes = field;
          break;
        default:
          break;
      }
      return true;
    });
    if (!offsets.has_value() || !sizes.has_value() ||
        !ReadSize(*offsets, &is_size_, &offsets_) ||
        !ReadSize(*sizes, &is_size_, &sizes_) ||
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
    const auto index =
        StateOf(index_value, kMetadataModule, "MetadataIndex", &is_index_);
    const auto info =
        StateOf(info_value, kFilesystemModule, "_StorageInfo", &is_info_);
    if (!index.has_value() || !info.has_value()) {
      return Bad(absl::StrCat("expected MetadataIndex and _StorageInfo, found ",
                              Describe(index_value), " and ",
                              Describe(info_value)));
    }
    std::optional<absl::string_view> key;
    std::optional<PickleValue> key_value, offset_value;
    std::optional<int64_t> hint;
    index->ForEachEntry([&](PickleValue name_value, PickleValue value) {
      switch (FieldOf(name_value)) {
        case Field::kFqn:
          key_value = value;
          key = value.AsString();
          break;
        case Field::kOffset:
          if (!value.IsNone()) offset_value = value;
          break;
        case Field::kIndex:
          hint = value.AsInt();
          break;
        default:
          break;
      }
      return true;
    });
    if (!key.has_value()) return Bad("a MetadataIndex has no fqn");

    ItemLocation location;
    std::vector<std::string> transforms;
    std::optional<PickleValue> file;
    std::optional<int64_t> offset, length;
    info->ForEachEntry([&](PickleValue name_value, PickleValue value) {
      switch (FieldOf(name_value)) {
        case Field::kRelativePath:
          file = value;
          break;
        case Field::kOffset:
          offset = value.AsInt();
          break;
        case Field::kLength:
          length = value.AsInt();
          break;
        case Field::kTransforms:
          value.ForEachItem([&](PickleValue item) {
            transforms.emplace_back(
                item.AsString().value_or("?").substr(0, 64));
            return transforms.size() < kMaxTransforms;
          });
          break;
        default:
          break;
      }
      return true;
    });
    const std::optional<uint32_t> file_index =
        file.has_value() ? FileIndex(*file) : std::nullopt;
    if (!file_index.has_value()) {
      const absl::string_view name =
          file.has_value() ? file->AsString().value_or("") : "";
      return BadKey(*key, absl::StrCat("file \"", absl::CHexEscape(name),
                                       "\" is not a plain file name"));
    }
    if (!offset.has_value() || !length.has_value() || *offset < 0 ||
        *length < 0 || !CheckedAdd(*offset, *length).has_value()) {
      return BadKey(*key, "offset and length are not numbers >= 0");
    }
    location.file = *file_index;
    location.offset_bytes = *offset;
    location.length_bytes = *length;

    const std::optional<size_t> found = FindKey(*key_value, *key);
    if (!found.has_value()) {
      return BadKey(*key, "is stored but not described");
    }
    if (*found & kObjectBit) {
      const size_t object = *found & ~kObjectBit;
      ItemLocation& place = out_.objects[object].location;
      if (place.length_bytes >= 0) return BadKey(*key, "is stored twice");
      place = location;
      if (!transforms.empty()) {
        out_.object_transforms[object] = absl::StrJoin(transforms, ", ");
      }
      return absl::OkStatus();
    }
    const TensorEntry& tensor = out_.tensors[*found];
    if (!offset_value.has_value() ||
        !ReadSize(*offset_value, &is_size_, &offsets_) ||
        offsets_.size() != tensor.shape.size()) {
      return BadKey(*key, "is a tensor and stored without a chunk offset");
    }
    const std::optional<size_t> chunk =
        FindChunk(*found, tensor, hint.value_or(-1));
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

  // Attributes of what there is much of.
  enum class Field {
    kOther,
    kOffsets,
    kSizes,
    kFqn,
    kOffset,
    kIndex,
    kRelativePath,
    kLength,
    kTransforms
  };
  Field FieldOf(PickleValue name) {
    return *fields_.Get(name, [&]() -> std::optional<Field> {
      static constexpr std::pair<absl::string_view, Field> kFields[] = {
          {"offsets", Field::kOffsets},
          {"sizes", Field::kSizes},
          {"fqn", Field::kFqn},
          {"offset", Field::kOffset},
          {"index", Field::kIndex},
          {"relative_path", Field::kRelativePath},
          {"length", Field::kLength},
          {"transform_descriptors", Field::kTransforms}};
      const absl::string_view text = name.AsString().value_or("");
      for (const auto& [known, field] : kFields) {
        if (text == known) return field;
      }
      return Field::kOther;
    });
  }

  // Keys are mostly the very strings that described them.
  std::optional<size_t> FindKey(PickleValue value, absl::string_view key) {
    const auto by_id = keys_by_id_.find(value.id());
    if (by_id != keys_by_id_.end()) return by_id->second;
    const auto found = keys_.find(key);
    if (found == keys_.end()) return std::nullopt;
    return found->second;
  }

  std::optional<uint32_t> FileIndex(PickleValue value) {
    return file_ids_.Get(value, [&]() -> std::optional<uint32_t> {
      const auto name = value.AsString();
      if (!name.has_value() || !IsPlainFileName(*name)) return std::nullopt;
      const auto [it, is_new] = files_.try_emplace(
          std::string(*name), static_cast<uint32_t>(out_.files.size()));
      if (is_new) out_.files.emplace_back(*name);
      return it->second;
    });
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
  absl::flat_hash_map<uint32_t, size_t> keys_by_id_;
  Remembered<Field> fields_;
  Remembered<uint32_t> file_ids_;
  Remembered<bool> is_chunk_, is_index_, is_info_, is_size_;
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
