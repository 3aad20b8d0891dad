// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "dsd/core/base/checked_int.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/digests_file.h"
#include "dsd/frontends/checkpoint/file_names.h"
#include "dsd/frontends/checkpoint/live_state.h"
#include "dsd/frontends/checkpoint/safetensors/header.h"
#include "dsd/frontends/checkpoint/safetensors/index.h"

namespace dsd::checkpoint {
namespace {

constexpr char kUsualIndex[] = "model.safetensors.index.json";

std::string Quoted(absl::string_view text) {
  return absl::StrCat("\"", absl::CHexEscape(text), "\"");
}

// The number of files that a name of the form `...-00001-of-00003.safetensors`
// speaks of, and which of them it is; nullopt for other names.
std::optional<std::pair<int, int>> PartOf(absl::string_view name) {
  if (!absl::ConsumeSuffix(&name, kSafetensorsSuffix)) return std::nullopt;
  const size_t of = name.rfind("-of-");
  if (of == absl::string_view::npos || of == 0) return std::nullopt;
  const size_t dash = name.rfind('-', of - 1);
  int part, count;
  if (dash == absl::string_view::npos ||
      !absl::SimpleAtoi(name.substr(dash + 1, of - dash - 1), &part) ||
      !absl::SimpleAtoi(name.substr(of + 4), &count)) {
    return std::nullopt;
  }
  return std::make_pair(part, count);
}

// A name of files that belong together, without the number of the part.
std::string SeriesOf(absl::string_view name) {
  const size_t of = name.rfind("-of-");
  return absl::StrCat(name.substr(0, name.rfind('-', of - 1)), name.substr(of));
}

class SafetensorsOpener {
 public:
  explicit SafetensorsOpener(Checkpoint::Impl* impl) : impl_(*impl) {}

  absl::Status Run() {
    std::vector<std::string> names;
    DSD_ASSIGN_OR_RETURN(names, FindFiles());
    for (const std::string& name : names) {
      DSD_RETURN_IF_ERROR(ReadFile(name))
          << Quoted(JoinFile(impl_.directory, name));
    }
    if (!missing_.empty()) {
      return absl::DataLossError(absl::StrCat(
          "the checkpoint at \"", impl_.path,
          "\" is not complete: its index names tensors that their files lack: ",
          ListKeys(std::move(missing_))));
    }
    DSD_RETURN_IF_ERROR(FillIndex())
        << absl::StrCat("the checkpoint at \"", impl_.path, "\"");
    impl_.fingerprint = fingerprint_.Finish();
    impl_.has_digests = !files_.empty() && files_digested_ == files_.size();
    std::sort(impl_.attributes.begin(), impl_.attributes.end());
    return FillCatalog(&impl_);
  }

 private:
  // A tensor of one file.
  struct Part {
    const safetensors::HeaderTensor* tensor;
    uint32_t file;
    int64_t data_at;
    const safetensors::ShardPlace* place;  // null: it is the whole tensor
  };
  struct File {
    safetensors::Header header;
    absl::flat_hash_map<std::string, safetensors::ShardPlace> places;
  };

  // The files of the checkpoint, and directory and index of the Impl.
  absl::StatusOr<std::vector<std::string>> FindFiles() {
    FileSystem& files = impl_.env->files();
    const absl::StatusOr<std::vector<std::string>> listed =
        files.List(impl_.path);
    if (!listed.ok()) {
      impl_.directory = ParentOf(impl_.path);
      const std::string name(LastPart(impl_.path));
      if (absl::EndsWith(name, kSafetensorsIndexSuffix)) {
        return FilesOfIndex(name);
      }
      return std::vector<std::string>{name};
    }
    impl_.directory = impl_.path;
    std::vector<std::string> indexes, data;
    for (const std::string& name : *listed) {
      if (absl::EndsWith(name, kSafetensorsIndexSuffix))
        indexes.push_back(name);
      if (absl::EndsWith(name, kSafetensorsSuffix) && name[0] != '.') {
        data.push_back(name);
      }
    }
    if (std::count(indexes.begin(), indexes.end(), kUsualIndex) > 0) {
      return FilesOfIndex(kUsualIndex);
    }
    if (indexes.size() == 1) return FilesOfIndex(indexes[0]);
    if (indexes.size() > 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", impl_.path,
                       "\" has several checkpoints; give the path of one "
                       "of their indexes: ",
                       ListKeys(std::move(indexes))));
    }
    DSD_RETURN_IF_ERROR(CheckParts(data));
    return data;
  }

  absl::StatusOr<std::vector<std::string>> FilesOfIndex(
      const std::string& name) {
    const std::string path = JoinFile(impl_.directory, name);
    absl::StatusOr<std::string> text =
        ReadWhole(impl_.env->files(), path, safetensors::kMaxIndexBytes);
    DSD_RETURN_IF_ERROR(text.status());
    has_index_ = true;
    fingerprint_.Add(*text);
    absl::StatusOr<safetensors::Index> index = safetensors::ParseIndex(*text);
    DSD_RETURN_IF_ERROR(index.status()) << Quoted(path);
    std::vector<std::string> names;
    for (auto& [key, file] : index->weight_map) {
      if (keys_of_[file].empty()) names.push_back(file);
      keys_of_[file].push_back(std::move(key));
    }
    std::sort(names.begin(), names.end());
    return names;
  }

  // Without an index, names that say how many there are must all be there.
  absl::Status CheckParts(const std::vector<std::string>& names) {
    struct Series {
      int count = 0;
      std::vector<int> parts;
    };
    absl::flat_hash_map<std::string, Series> all;
    for (const std::string& name : names) {
      const auto part = PartOf(name);
      if (!part.has_value()) continue;
      Series& series = all[SeriesOf(name)];
      series.count = part->second;
      series.parts.push_back(part->first);
    }
    for (auto& [name, series] : all) {
      std::sort(series.parts.begin(), series.parts.end());
      for (int i = 0; i < static_cast<int>(series.parts.size()); ++i) {
        if (series.parts[i] != i + 1) return MissingPart(i + 1, series.count);
      }
      if (static_cast<int>(series.parts.size()) < series.count) {
        return MissingPart(static_cast<int>(series.parts.size()) + 1,
                           series.count);
      }
    }
    return absl::OkStatus();
  }

  absl::Status MissingPart(int part, int count) const {
    return absl::NotFoundError(absl::StrCat(
        "the checkpoint at \"", impl_.path, "\" is not complete: file ", part,
        " of ", count, " is not there (a copy or a save was interrupted)"));
  }

  absl::Status ReadFile(const std::string& name) {
    const absl::StatusOr<std::unique_ptr<ReadableFile>> opened =
        impl_.env->files().OpenReadable(JoinFile(impl_.directory, name));
    if (absl::IsNotFound(opened.status()) && has_index_) {
      return absl::NotFoundError("the index names it, but it is not there");
    }
    DSD_RETURN_IF_ERROR(opened.status());
    auto file = std::make_unique<File>();
    DSD_ASSIGN_OR_RETURN(file->header, safetensors::ReadHeader(**opened));
    fingerprint_.Add(name).Add((*opened)->size_bytes());
    std::string save_id;
    for (auto& [key, value] : file->header.metadata) {
      fingerprint_.Add(key).Add(value);
      if (key == safetensors::kShardingKey) {
        DSD_ASSIGN_OR_RETURN(file->places, safetensors::ParseSharding(value));
      } else if (key == kSaveIdAttribute) {
        save_id = value;
      } else if (key == kDigestsAttribute) {
        if (impl_.verify) DSD_RETURN_IF_ERROR(NoteDigests(value, file->header));
      } else if (key != safetensors::kShardingVersionKey) {
        NoteAttribute(key, value);
      }
    }
    DSD_RETURN_IF_ERROR(NoteSave(save_id));
    const uint32_t number = static_cast<uint32_t>(impl_.index.files.size());
    impl_.index.files.push_back(name);
    absl::flat_hash_set<absl::string_view> there;
    for (const safetensors::HeaderTensor& tensor : file->header.tensors) {
      fingerprint_.Add(tensor.name)
          .Add(tensor.dtype_name)
          .Add(tensor.end_bytes);
      for (const int64_t extent : tensor.shape) fingerprint_.Add(extent);
      if (has_index_) there.insert(tensor.name);
      const auto place = file->places.find(tensor.name);
      const auto [it, is_new] =
          position_.try_emplace(tensor.name, parts_.size());
      if (is_new) parts_.emplace_back();
      parts_[it->second].push_back(
          {&tensor, number, file->header.data_at,
           place == file->places.end() ? nullptr : &place->second});
    }
    if (has_index_) {
      for (std::string& key : keys_of_[name]) {
        if (!there.contains(key)) missing_.push_back(std::move(key));
      }
    }
    files_.push_back(std::move(file));
    return absl::OkStatus();
  }

  // They are of this file's tensors, or its header is not the one that was
  // written.
  absl::Status NoteDigests(const std::string& text,
                           const safetensors::Header& header) {
    DSD_ASSIGN_OR_RETURN(StoredDigests digests, DecodeDigests(text));
    bool fits = digests.tensors.size() == header.tensors.size() &&
                digests.version == kDigestVersion;
    for (const safetensors::HeaderTensor& tensor : header.tensors) {
      fits = fits && digests.tensors.contains(tensor.name);
    }
    if (!fits) {
      return absl::DataLossError(absl::StrCat(
          "the digests in its header are not those of its tensors: it is "
          "damaged, or was changed by a program that kept \"",
          kDigestsAttribute, "\"; read it without verification"));
    }
    for (auto& [key, digest] : digests.tensors) {
      impl_.digests.tensors[key] = digest;
    }
    ++files_digested_;
    return absl::OkStatus();
  }

  // All files of a save have its id: an interrupted one mixes with no other.
  absl::Status NoteSave(const std::string& id) {
    if (files_.empty()) impl_.index.save_id = id;
    if (impl_.index.save_id == id) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat("it is of save ", Quoted(id), ", other files are of save ",
                     Quoted(impl_.index.save_id), ": a save was interrupted"));
  }

  void NoteAttribute(const std::string& key, const std::string& value) {
    for (const auto& [known, unused] : impl_.attributes) {
      if (known == key) return;
    }
    impl_.attributes.emplace_back(key, value);
  }

  absl::Status FillIndex() {
    for (std::vector<Part>& parts : parts_) {
      const safetensors::HeaderTensor& first = *parts[0].tensor;
      const std::string& key = first.name;
      if (!first.dtype.has_value()) {
        impl_.unreadable.emplace_back(key, first.dtype_name);
        continue;
      }
      DSD_RETURN_IF_ERROR(FillTensor(parts)) << "tensor " << Quoted(key);
    }
    return absl::OkStatus();
  }

  absl::Status FillTensor(std::vector<Part>& parts) {
    const safetensors::HeaderTensor& first = *parts[0].tensor;
    const size_t ndim = first.shape.size();
    Dims shape(ndim, 0);
    std::vector<Box> boxes;
    for (const Part& part : parts) {
      const safetensors::HeaderTensor& tensor = *part.tensor;
      if (tensor.dtype != first.dtype || tensor.shape.size() != ndim) {
        return absl::DataLossError(absl::StrCat(
            "it is ", first.dtype_name, " ", DimsToString(first.shape), " in ",
            Quoted(impl_.index.files[parts[0].file]), ", but ",
            tensor.dtype_name, " ", DimsToString(tensor.shape), " in ",
            Quoted(impl_.index.files[part.file])));
      }
      if (part.place == nullptr && parts.size() > 1) {
        return absl::DataLossError(
            absl::StrCat("it is in ", Quoted(impl_.index.files[parts[0].file]),
                         " and in ", Quoted(impl_.index.files[parts[1].file]),
                         ", without a word on how they belong together"));
      }
      DSD_ASSIGN_OR_RETURN(Box box, BoxOf(part));
      for (size_t d = 0; d < ndim; ++d) {
        shape[d] = std::max(shape[d], box.hi[d]);
        if (part.place != nullptr && !part.place->global_shape.empty()) {
          shape[d] = std::max(shape[d], part.place->global_shape[d]);
        }
      }
      boxes.push_back(std::move(box));
    }
    if (!CheckedProduct(shape).has_value()) {
      return absl::DataLossError(
          absl::StrCat("its shape ", DimsToString(shape), " overflows"));
    }
    impl_.index.AddTensor(first.name, {first.name}, *first.dtype,
                          std::move(shape));
    absl::flat_hash_set<Box> seen;
    for (size_t i = 0; i < parts.size(); ++i) {
      // A part that several files have counts once.
      if (!seen.insert(boxes[i]).second) continue;
      const safetensors::HeaderTensor& tensor = *parts[i].tensor;
      impl_.index.AddChunk(
          boxes[i], {parts[i].file, parts[i].data_at + tensor.begin_bytes,
                     tensor.end_bytes - tensor.begin_bytes});
    }
    return absl::OkStatus();
  }

  static absl::StatusOr<Box> BoxOf(const Part& part) {
    const safetensors::HeaderTensor& tensor = *part.tensor;
    if (part.place == nullptr) return Box::Whole(tensor.shape);
    const safetensors::ShardPlace& place = *part.place;
    const size_t ndim = tensor.shape.size();
    Box box;
    box.lo = place.offsets;
    bool good =
        place.offsets.size() == ndim &&
        (place.global_shape.empty() || place.global_shape.size() == ndim);
    for (size_t d = 0; d < ndim && good; ++d) {
      const auto end = CheckedAdd(box.lo[d], tensor.shape[d]);
      good = end.has_value() &&
             (place.global_shape.empty() || *end <= place.global_shape[d]);
      if (good) box.hi.push_back(*end);
    }
    if (good) return box;
    return absl::DataLossError(absl::StrCat(
        "saved_offsets ", DimsToString(place.offsets), " do not fit shape ",
        DimsToString(tensor.shape),
        place.global_shape.empty()
            ? ""
            : absl::StrCat(" in ", DimsToString(place.global_shape))));
  }

  Checkpoint::Impl& impl_;
  DigestBuilder fingerprint_;
  size_t files_digested_ = 0;
  bool has_index_ = false;
  // What the index wants of each file.
  absl::flat_hash_map<std::string, std::vector<std::string>> keys_of_;
  std::vector<std::string> missing_;
  std::vector<std::unique_ptr<File>> files_;
  std::vector<std::vector<Part>> parts_;  // by tensor
  absl::flat_hash_map<std::string, size_t> position_;
};

}  // namespace

absl::Status OpenSafetensors(Checkpoint::Impl* impl) {
  return SafetensorsOpener(impl).Run();
}

}  // namespace dsd::checkpoint
