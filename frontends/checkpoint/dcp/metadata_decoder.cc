// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
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
constexpr int kMaxTransforms = 16;

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

// A class by its name, which is compared once.
class KnownClass {
 public:
  KnownClass(absl::string_view module, absl::string_view name)
      : module_(module), name_(name) {}

  bool Is(PickleValue value) {
    if (value.id() == id_) return true;
    if (!value.IsGlobal(module_, name_)) return false;
    id_ = value.id();
    return true;
  }

 private:
  const absl::string_view module_;
  const absl::string_view name_;
  uint32_t id_ = kAbsentRef;
};

// Some attributes of the objects of a class: those of all objects mostly have
// the same names, at the same places.
template <size_t kCount>
class Attributes {
 public:
  using Values = std::array<std::optional<PickleValue>, kCount>;

  Attributes(absl::string_view module, absl::string_view name,
             const std::array<absl::string_view, kCount>& wanted)
      : class_(module, name), wanted_(wanted) {}

  // By position in `wanted`; null if the value is not an object of the class,
  // with a dict. Valid until the next call.
  const Values* Of(PickleValue value) {
    if (value.kind() != Kind::kInstance || !class_.Is(value.callee())) {
      return nullptr;
    }
    const std::optional<PickleValue> state = value.state();
    return state.has_value() ? In(*state) : nullptr;
  }

  // The same for the dict of an object of any class.
  const Values* In(PickleValue dict) {
    if (dict.kind() != Kind::kDict) return nullptr;
    values_ = Values();
    size_t place = 0;
    dict.ForEachEntry([&](PickleValue key, PickleValue found) {
      // What is shared may be long and be looked at often.
      if (place == kMaxPlaces) return false;
      Place& known = places_[place++];
      if (known.key != key.id()) known = {key.id(), PositionOf(key)};
      if (known.position < kCount) values_[known.position] = found;
      return true;
    });
    return place == kMaxPlaces ? nullptr : &values_;
  }

 private:
  // More attributes than any class of the format has.
  static constexpr size_t kMaxPlaces = 64;

  struct Place {
    uint32_t key = kAbsentRef;
    size_t position = kCount;
  };

  size_t PositionOf(PickleValue key) const {
    const auto it =
        std::find(wanted_.begin(), wanted_.end(), key.AsString().value_or(""));
    return it - wanted_.begin();
  }

  KnownClass class_;
  const std::array<absl::string_view, kCount> wanted_;
  std::array<Place, kMaxPlaces> places_;
  Values values_;
};

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
      : size_bytes_(size_bytes),
        chunks_left_(size_bytes / 16 + 16),
        extents_left_(size_bytes * 2 + (1 << 16)),
        path_bytes_left_(size_bytes * 64 + (1 << 20)) {}

  absl::StatusOr<Metadata> Run(PickleValue root) {
    Attributes<5> metadata(kMetadataModule, "Metadata",
                           {"state_dict_metadata", "storage_data",
                            "planner_data", "version", "storage_meta"});
    const auto* const found = metadata.Of(root);
    if (found == nullptr) {
      return Bad(absl::StrCat("expected an object of ", kMetadataModule,
                              ".Metadata, found ", Describe(root)));
    }
    const auto& [entries, storage, paths, version, meta] = *found;
    if (!entries.has_value() || entries->kind() != Kind::kDict) {
      return Bad("no dict state_dict_metadata");
    }
    if (!storage.has_value() || storage->kind() != Kind::kDict) {
      return Bad("no dict storage_data");
    }
    Reserve(entries->size(), storage->size());
    DSD_RETURN_IF_ERROR(ForEach(
        *entries, [&](PickleValue k, PickleValue v) { return Entry(k, v); }));
    DSD_RETURN_IF_ERROR(ForEach(
        *storage, [&](PickleValue k, PickleValue v) { return Storage(k, v); }));
    DSD_RETURN_IF_ERROR(CheckPlaces());
    if (paths.has_value() && paths->kind() == Kind::kDict) {
      DSD_RETURN_IF_ERROR(ForEach(*paths, [&](PickleValue k, PickleValue v) {
        return PlannerPath(k, v);
      }));
    }
    FillPaths();
    if (version.has_value()) {
      out_.version = std::string(version->AsString().value_or(""));
    }
    if (meta.has_value()) {
      Attributes<1> storage_meta(kMetadataModule, "StorageMeta", {"save_id"});
      const auto* const fields = storage_meta.Of(*meta);
      if (fields != nullptr && (*fields)[0].has_value()) {
        out_.save_id = std::string((*fields)[0]->AsString().value_or(""));
      }
    }
    DSD_RETURN_IF_ERROR(CheckOverlap(out_));
    return std::move(out_);
  }

 private:
  static constexpr size_t kObjectBit = size_t{1} << 62;

  // Room for what the dicts announce, as far as writers make it of these bytes;
  // most tensors have two dimensions.
  void Reserve(size_t entries, size_t stored) {
    const size_t most = size_bytes_ / 64;
    entries = std::min(entries, most);
    stored = std::min(stored, most);
    keys_.reserve(entries);
    keys_by_id_.reserve(entries);
    out_.tensors.reserve(entries);
    out_.locations.reserve(stored);
    out_.bounds.reserve(4 * stored);
  }

  template <class Visit>
  static absl::Status ForEach(PickleValue dict, Visit visit) {
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
      DSD_RETURN_IF_ERROR(
          NewKey(key_value, *key, out_.objects.size() | kObjectBit));
      out_.objects.push_back(std::move(object));
      return absl::OkStatus();
    }
    const auto* const fields = tensor_.Of(value);
    if (fields == nullptr) {
      return BadKey(*key, absl::StrCat("expected TensorStorageMetadata or "
                                       "BytesStorageMetadata, found ",
                                       Describe(value)));
    }
    TensorEntry tensor;
    tensor.key = std::string(*key);
    DSD_RETURN_IF_ERROR(NewKey(key_value, *key, out_.tensors.size()));
    const auto& [properties, size, chunks] = *fields;
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

  absl::Status NewKey(PickleValue value, absl::string_view key, size_t entry) {
    keys_by_id_.try_emplace(value.id(), entry);
    if (!keys_.try_emplace(key, entry).second) {
      return BadKey(key, "occurs twice");
    }
    return absl::OkStatus();
  }

  bool ReadDType(PickleValue properties, TensorEntry* tensor) {
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
    } else if (const auto* const fields = properties_.In(*state)) {
      dtype = (*fields)[0];
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
    const auto* const fields = chunk_.Of(value);
    if (fields == nullptr) {
      return BadKey(tensor.key,
                    absl::StrCat("expected ChunkStorageMetadata, found ",
                                 Describe(value)));
    }
    const auto& [offsets, sizes] = *fields;
    const size_t ndim = tensor.shape.size();
    const size_t at = out_.bounds.size();
    out_.bounds.resize(at + 2 * ndim);
    const auto bounds = absl::MakeSpan(out_.bounds).subspan(at);
    if (!ReadSize(offsets, bounds.first(ndim)) ||
        !ReadSize(sizes, bounds.subspan(ndim))) {
      return BadKey(tensor.key, absl::StrCat("chunk ", tensor.num_chunks,
                                             " has no offsets and sizes of ",
                                             ndim, " numbers >= 0"));
    }
    DSD_RETURN_IF_ERROR(SpendExtents(tensor.key, 2 * ndim));
    for (size_t d = 0; d < ndim; ++d) {
      if (bounds[d] <= tensor.shape[d] &&
          bounds[ndim + d] <= tensor.shape[d] - bounds[d]) {
        continue;
      }
      return BadKey(tensor.key,
                    absl::StrCat("chunk ", tensor.num_chunks, " at ",
                                 DimsToString(bounds.first(ndim)), " of size ",
                                 DimsToString(bounds.subspan(ndim)),
                                 " is outside the tensor of ",
                                 DimsToString(tensor.shape)));
    }
    out_.locations.emplace_back();
    ++tensor.num_chunks;
    return absl::OkStatus();
  }

  absl::Status Storage(PickleValue index_value, PickleValue info_value) {
    const auto* const index = index_.Of(index_value);
    const auto* const info = info_.Of(info_value);
    if (index == nullptr || info == nullptr) {
      return Bad(absl::StrCat("expected MetadataIndex and _StorageInfo, found ",
                              Describe(index_value), " and ",
                              Describe(info_value)));
    }
    const auto& [key_value, chunk_offset, chunk_index] = *index;
    const auto& [file, offset_value, length_value, transforms_value] = *info;
    const std::optional<absl::string_view> key =
        key_value.has_value() ? key_value->AsString() : std::nullopt;
    if (!key.has_value()) return Bad("a MetadataIndex has no fqn");
    const std::optional<uint32_t> file_index =
        file.has_value() ? FileIndex(*file) : std::nullopt;
    if (!file_index.has_value()) {
      const absl::string_view name =
          file.has_value() ? file->AsString().value_or("") : "";
      return BadKey(*key, absl::StrCat("file \"", absl::CHexEscape(name),
                                       "\" is not a plain file name"));
    }
    const std::optional<int64_t> offset = AsInt(offset_value);
    const std::optional<int64_t> length = AsInt(length_value);
    if (!offset.has_value() || !length.has_value() || *offset < 0 ||
        *length < 0 || !CheckedAdd(*offset, *length).has_value()) {
      return BadKey(*key, "offset and length are not numbers >= 0");
    }
    const ItemLocation location{*file_index, *offset, *length};
    std::string transforms;
    if (transforms_value.has_value()) {
      int count = 0;
      transforms_value->ForEachItem([&](PickleValue item) {
        absl::StrAppend(&transforms, count == 0 ? "" : ", ",
                        item.AsString().value_or("?").substr(0, 64));
        return ++count < kMaxTransforms;
      });
    }

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
        out_.object_transforms[object] = std::move(transforms);
      }
      return absl::OkStatus();
    }
    const TensorEntry& tensor = out_.tensors[*found];
    offsets_.resize(tensor.shape.size());
    if (!ReadSize(chunk_offset, absl::MakeSpan(offsets_))) {
      return BadKey(*key, "is a tensor and stored without a chunk offset");
    }
    const std::optional<size_t> chunk =
        FindChunk(*found, tensor, AsInt(chunk_index).value_or(-1));
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
          std::move(transforms);
    }
    return absl::OkStatus();
  }

  static std::optional<int64_t> AsInt(const std::optional<PickleValue>& value) {
    return value.has_value() ? value->AsInt() : std::nullopt;
  }

  // torch.Size, or a plain tuple or list, of numbers >= 0.
  template <class Visit>
  bool ForEachExtent(PickleValue value, Visit visit) {
    if (value.kind() == Kind::kCall) {
      if (!size_class_.Is(value.callee())) return false;
      std::optional<PickleValue> inner;
      size_t count = 0;
      value.args().ForEachItem([&](PickleValue item) {
        inner = item;
        return ++count < 2;
      });
      if (count != 1) return false;
      value = *inner;
    }
    if (value.kind() != Kind::kTuple && value.kind() != Kind::kList) {
      return false;
    }
    bool good = true;
    value.ForEachItem([&](PickleValue item) {
      const std::optional<int64_t> number = item.AsInt();
      good = number.has_value() && *number >= 0 && visit(*number);
      return good;
    });
    return good;
  }

  bool ReadSize(PickleValue value, Dims* out) {
    return ForEachExtent(value, [out](int64_t extent) {
      out->push_back(extent);
      return out->size() <= kMaxDims;
    });
  }

  // The same if there are so many.
  bool ReadSize(const std::optional<PickleValue>& value,
                absl::Span<int64_t> out) {
    size_t count = 0;
    return value.has_value() &&
           ForEachExtent(*value,
                         [&](int64_t extent) {
                           if (count == out.size()) return false;
                           out[count++] = extent;
                           return true;
                         }) &&
           count == out.size();
  }

  // Keys are mostly the very strings that described them, often the one before.
  std::optional<size_t> FindKey(PickleValue value, absl::string_view key) {
    if (value.id() == last_key_) return last_entry_;
    const auto by_id = keys_by_id_.find(value.id());
    if (by_id != keys_by_id_.end()) {
      last_key_ = value.id();
      return last_entry_ = by_id->second;
    }
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
    const std::optional<size_t> found = FindKey(key_value, *key);
    // Paths of keys that were not saved occur.
    if (!found.has_value()) return absl::OkStatus();
    if (value.kind() != Kind::kTuple || value.size() > kMaxPathSegments) {
      return BadKey(*key, absl::StrCat("its path is ", KindName(value),
                                       ", expected a tuple"));
    }
    Path& path = *found & kObjectBit ? out_.objects[*found & ~kObjectBit].path
                                     : out_.tensors[*found].path;
    path.clear();
    path.reserve(value.size());
    absl::Status status;
    value.ForEachItem([&](PickleValue segment) {
      const auto text = segment.AsString();
      const auto number = segment.AsInt();
      path_bytes_left_ -=
          static_cast<int64_t>(sizeof(PathSegment) + text.value_or("").size());
      if (path_bytes_left_ < 0) {
        status = Bad("planner_data is too large");
      } else if (text.has_value()) {
        path.emplace_back(std::string(*text));
      } else if (number.has_value()) {
        path.emplace_back(*number);
      } else {
        status = BadKey(
            *key, absl::StrCat("a part of its path is ", KindName(segment),
                               ", expected str or int"));
      }
      return status.ok();
    });
    return status;
  }

  // Without planner_data a key is all of its path.
  void FillPaths() {
    for (TensorEntry& tensor : out_.tensors) {
      if (tensor.path.empty()) tensor.path.emplace_back(tensor.key);
    }
    for (ObjectEntryInfo& object : out_.objects) {
      if (object.path.empty()) object.path.emplace_back(object.key);
    }
  }

  const int64_t size_bytes_;
  int64_t chunks_left_;
  int64_t extents_left_;
  int64_t path_bytes_left_;
  Metadata out_;
  Dims offsets_;
  absl::flat_hash_map<absl::string_view, size_t> keys_;  // the pickle has them
  absl::flat_hash_map<std::string, uint32_t> files_;
  absl::flat_hash_map<uint32_t, size_t> keys_by_id_;
  uint32_t last_key_ = kAbsentRef;
  size_t last_entry_ = 0;
  Attributes<3> tensor_{kMetadataModule,
                        "TensorStorageMetadata",
                        {"properties", "size", "chunks"}};
  Attributes<1> properties_{kMetadataModule, "TensorProperties", {"dtype"}};
  Attributes<2> chunk_{
      kMetadataModule, "ChunkStorageMetadata", {"offsets", "sizes"}};
  Attributes<3> index_{
      kMetadataModule, "MetadataIndex", {"fqn", "offset", "index"}};
  Attributes<4> info_{
      kFilesystemModule,
      "_StorageInfo",
      {"relative_path", "offset", "length", "transform_descriptors"}};
  Remembered<uint32_t> file_ids_;
  KnownClass size_class_{"torch", "Size"};
  absl::flat_hash_map<size_t, absl::flat_hash_map<Dims, size_t>>
      chunks_by_offset_;
};

// Whether the chunks follow each other along some dimension, as most do.
bool AreInOrder(const Metadata& metadata, const TensorEntry& tensor) {
  const int ndim = tensor.ndim();
  for (int d = 0; d < ndim; ++d) {
    const int64_t* lo = metadata.bounds.data() + tensor.first_bound + d;
    size_t chunk = 1;
    while (chunk < tensor.num_chunks && lo[0] + lo[ndim] <= lo[2 * ndim]) {
      lo += 2 * ndim;
      ++chunk;
    }
    if (chunk == tensor.num_chunks) return true;
  }
  return false;
}

// Sweeps along the dimension with most cuts.
absl::Status CheckOverlap(const Metadata& metadata, const TensorEntry& tensor,
                          int64_t* tests) {
  if (tensor.num_chunks < 2 || AreInOrder(metadata, tensor)) {
    return absl::OkStatus();
  }
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
