// SPDX-License-Identifier: Apache-2.0

#include <string>
#include <utility>
#include <variant>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/dcp/metadata.h"
#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"

namespace dsd::dcp {
namespace {

constexpr absl::string_view kMetadataModule =
    "torch.distributed.checkpoint.metadata";
constexpr absl::string_view kFilesystemModule =
    "torch.distributed.checkpoint.filesystem";

class Encoder {
 public:
  Encoder(const Metadata& metadata,
          absl::FunctionRef<absl::Status(absl::string_view)> sink)
      : metadata_(metadata), sink_(sink), pickle_(4, &buffer_) {}

  absl::Status Run() {
    BeginInstance(kMetadataModule, "Metadata");
    pickle_.SharedText("state_dict_metadata");
    DSD_RETURN_IF_ERROR(Entries());
    pickle_.SharedText("planner_data");
    DSD_RETURN_IF_ERROR(Paths());
    pickle_.SharedText("storage_data");
    DSD_RETURN_IF_ERROR(Locations());
    pickle_.SharedText("storage_meta");
    BeginInstance(kMetadataModule, "StorageMeta");
    pickle_.SharedText("checkpoint_id");
    pickle_.None();
    pickle_.SharedText("save_id");
    pickle_.Text(metadata_.save_id);
    pickle_.SharedText("load_id");
    pickle_.None();
    pickle_.SharedText("modules");
    pickle_.EmptyList();
    EndInstance();
    pickle_.SharedText("version");
    pickle_.Text("1.0.0");
    EndInstance();
    pickle_.Stop();
    return sink_(buffer_);
  }

 private:
  static constexpr size_t kPieceBytes = size_t{1} << 20;

  absl::Status DrainIfFull() {
    if (buffer_.size() < kPieceBytes) return absl::OkStatus();
    DSD_RETURN_IF_ERROR(sink_(buffer_));
    buffer_.clear();
    return absl::OkStatus();
  }

  void BeginInstance(absl::string_view module, absl::string_view name) {
    pickle_.Global(module, name);
    pickle_.NewInstance();
    pickle_.EmptyDict();
    pickle_.Mark();
  }
  void EndInstance() {
    pickle_.SetItems();
    pickle_.Build();
  }

  void Numbers(const int64_t* values, int count) {
    if (count > 3) pickle_.Mark();
    for (int i = 0; i < count; ++i) pickle_.Int(values[i]);
    pickle_.Tuple(count);
  }

  void Size(const int64_t* values, int count) {
    pickle_.Global("torch", "Size");
    Numbers(values, count);
    pickle_.Tuple(1);
    pickle_.Reduce();
  }

  absl::Status Key(absl::string_view key) {
    if (!IsUtf8(key)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "key \"", absl::CHexEscape(key), "\" is not valid UTF-8"));
    }
    pickle_.SharedText(key);
    return absl::OkStatus();
  }

  absl::Status Entries() {
    pickle_.EmptyDict();
    pickle_.Mark();
    for (const TensorEntry& tensor : metadata_.tensors) {
      DSD_RETURN_IF_ERROR(Key(tensor.key));
      BeginInstance(kMetadataModule, "TensorStorageMetadata");
      pickle_.SharedText("properties");
      pickle_.Global(kMetadataModule, "TensorProperties");
      pickle_.NewInstance();
      pickle_.Mark();
      pickle_.Global("torch", tensor.dtype_name);
      pickle_.Global("torch.serialization", "_get_layout");
      pickle_.SharedText("torch.strided");
      pickle_.Tuple(1);
      pickle_.Reduce();
      pickle_.Bool(false);  // requires_grad
      pickle_.Global(kMetadataModule, "_MEM_FORMAT_ENCODING");
      pickle_.Int(0);  // contiguous
      pickle_.Tuple(1);
      pickle_.Reduce();
      pickle_.Bool(false);  // pin_memory
      pickle_.Tuple(5);
      pickle_.Build();
      pickle_.SharedText("size");
      Size(tensor.shape.data(), tensor.ndim());
      pickle_.SharedText("chunks");
      pickle_.EmptyList();
      pickle_.Mark();
      for (size_t i = 0; i < tensor.num_chunks; ++i) {
        const int64_t* bounds = Bounds(tensor, i);
        BeginInstance(kMetadataModule, "ChunkStorageMetadata");
        pickle_.SharedText("offsets");
        Size(bounds, tensor.ndim());
        pickle_.SharedText("sizes");
        Size(bounds + tensor.ndim(), tensor.ndim());
        EndInstance();
        DSD_RETURN_IF_ERROR(DrainIfFull());
      }
      pickle_.Appends();
      EndInstance();
    }
    for (const ObjectEntryInfo& object : metadata_.objects) {
      DSD_RETURN_IF_ERROR(Key(object.key));
      pickle_.Global(kMetadataModule, "BytesStorageMetadata");
      pickle_.NewInstance();
      DSD_RETURN_IF_ERROR(DrainIfFull());
    }
    pickle_.SetItems();
    return absl::OkStatus();
  }

  absl::Status OnePath(absl::string_view key, const Path& path) {
    DSD_RETURN_IF_ERROR(Key(key));
    if (path.size() > 3) pickle_.Mark();
    for (const PathSegment& segment : path) {
      if (const auto* text = std::get_if<std::string>(&segment)) {
        DSD_RETURN_IF_ERROR(Key(*text));
      } else {
        pickle_.Int(std::get<int64_t>(segment));
      }
    }
    pickle_.Tuple(static_cast<int64_t>(path.size()));
    return DrainIfFull();
  }

  absl::Status Paths() {
    pickle_.EmptyDict();
    pickle_.Mark();
    for (const TensorEntry& tensor : metadata_.tensors) {
      DSD_RETURN_IF_ERROR(OnePath(tensor.key, tensor.path));
    }
    for (const ObjectEntryInfo& object : metadata_.objects) {
      DSD_RETURN_IF_ERROR(OnePath(object.key, object.path));
    }
    pickle_.SetItems();
    return absl::OkStatus();
  }

  absl::Status Location(const ItemLocation& location) {
    BeginInstance(kFilesystemModule, "_StorageInfo");
    pickle_.SharedText("relative_path");
    pickle_.SharedText(metadata_.files[location.file]);
    pickle_.SharedText("offset");
    pickle_.Int(location.offset_bytes);
    pickle_.SharedText("length");
    pickle_.Int(location.length_bytes);
    EndInstance();
    return DrainIfFull();
  }

  absl::Status Locations() {
    pickle_.EmptyDict();
    pickle_.Mark();
    for (const TensorEntry& tensor : metadata_.tensors) {
      for (size_t i = 0; i < tensor.num_chunks; ++i) {
        BeginInstance(kMetadataModule, "MetadataIndex");
        pickle_.SharedText("fqn");
        pickle_.SharedText(tensor.key);
        pickle_.SharedText("index");
        pickle_.Int(static_cast<int64_t>(i));
        pickle_.SharedText("offset");
        Size(Bounds(tensor, i), tensor.ndim());
        EndInstance();
        DSD_RETURN_IF_ERROR(Location(metadata_.ChunkLocation(tensor, i)));
      }
    }
    for (const ObjectEntryInfo& object : metadata_.objects) {
      BeginInstance(kMetadataModule, "MetadataIndex");
      pickle_.SharedText("fqn");
      pickle_.SharedText(object.key);
      pickle_.SharedText("index");
      pickle_.None();
      EndInstance();
      DSD_RETURN_IF_ERROR(Location(object.location));
    }
    pickle_.SetItems();
    return absl::OkStatus();
  }

  const int64_t* Bounds(const TensorEntry& tensor, size_t chunk) const {
    return metadata_.bounds.data() + tensor.first_bound +
           2 * tensor.ndim() * chunk;
  }

  const Metadata& metadata_;
  absl::FunctionRef<absl::Status(absl::string_view)> sink_;
  std::string buffer_;
  PickleWriter pickle_;
};

}  // namespace

absl::Status EncodeMetadata(
    const Metadata& metadata,
    absl::FunctionRef<absl::Status(absl::string_view)> sink) {
  return Encoder(metadata, sink).Run();
}

}  // namespace dsd::dcp
