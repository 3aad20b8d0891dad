// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/convert.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/float_cast.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/export.h"
#include "dsd/frontends/checkpoint/file_names.h"
#include "dsd/frontends/checkpoint/live_state.h"

namespace dsd::checkpoint {
namespace {

constexpr char kTargetPayload[] = "dsd.convert.target";

absl::Status OfTarget(absl::Status error) {
  if (!error.ok()) error.SetPayload(kTargetPayload, {});
  return error;
}

// The tensors of a checkpoint under other names and of other dtypes.
class ConvertedEndpoint final : public Endpoint {
 public:
  explicit ConvertedEndpoint(std::unique_ptr<CheckpointEndpoint> source)
      : source_(std::move(source)) {}

  // Once for each tensor of the source, in order. `is_read`: it will be.
  absl::Status Add(std::string name, DType dtype, bool is_read) {
    const TensorSpec& from = source_->catalog()[catalog_.size()];
    if (is_read) elements_left_ += from.layout.whole().num_elements();
    return catalog_.Add({std::move(name), dtype, from.layout});
  }

  const Catalog& catalog() const override { return catalog_; }

  // Whether all that was read could be.
  bool ok() const { return ok_; }

  absl::Status Read(size_t tensor, const Box& box, int64_t begin, int64_t end,
                    DType dtype, absl::Span<std::byte> out) override {
    const absl::Status status = ReadSource(tensor, box, begin, end, dtype, out);
    ok_ = ok_ && status.ok();
    return status;
  }

  absl::Status Write(size_t, const Box&, int64_t, int64_t, DType,
                     absl::Span<const std::byte>) override {
    return absl::UnimplementedError("a checkpoint is not written in place");
  }

 private:
  absl::Status ReadSource(size_t tensor, const Box& box, int64_t begin,
                          int64_t end, DType dtype, absl::Span<std::byte> out) {
    DSD_RETURN_IF_ERROR(source_->Read(tensor, box, begin, end, dtype, out));
    // Before what is written can count.
    elements_left_ -= end - begin;
    if (elements_left_ > 0) return absl::OkStatus();
    return source_->Verify().status();
  }

  const std::unique_ptr<CheckpointEndpoint> source_;
  Catalog catalog_;
  int64_t elements_left_ = 0;
  bool ok_ = true;
};

class Converter {
 public:
  Converter(const std::string& source, const std::string& target,
            const ConvertOptions& options)
      : source_(source),
        target_(target),
        options_(options),
        fs_(options.env->files()) {}

  absl::StatusOr<ConvertReport> Run() {
    const std::optional<Format> format =
        options_.format.has_value() ? options_.format : GuessFormat(target_);
    if (!format.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("what to make of \"", target_,
                       "\"? Its name does not say: give a format"));
    }
    report_.to = *format;
    if (options_.dtype.has_value() && !IsCastable(*options_.dtype)) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensors cannot be cast to ", DTypeName(*options_.dtype),
                       ", only to ",
                       absl::StrJoin(CastableDTypes(), ", ",
                                     [](std::string* out, DType dtype) {
                                       absl::StrAppend(out, DTypeName(dtype));
                                     })));
    }
    const absl::Status target = CheckTarget();
    DSD_RETURN_IF_ERROR(absl::IsInvalidArgument(target) ? target
                                                        : OfTarget(target));
    OpenOptions open;
    open.verify = options_.verify;
    open.env = options_.env;
    DSD_ASSIGN_OR_RETURN(checkpoint_, Checkpoint::Open(source_, open));
    report_.from = checkpoint_->format();
    if (!checkpoint_->unreadable().empty()) {
      std::vector<std::string> keys;
      for (const auto& [key, dtype] : checkpoint_->unreadable()) {
        keys.push_back(absl::StrCat(key, ": ", dtype));
      }
      return absl::FailedPreconditionError(
          absl::StrCat("tensors of \"", source_,
                       "\" cannot be read: ", ListKeys(std::move(keys))));
    }
    DSD_RETURN_IF_ERROR(MakeState());
    const absl::Status written = Write();
    // What a format has no place for is no matter of where it is written.
    DSD_RETURN_IF_ERROR(tensors_->ok() && !absl::IsInvalidArgument(written)
                            ? OfTarget(written)
                            : written);
    return std::move(report_);
  }

 private:
  absl::Status CheckTarget() {
    if (target_.empty()) {
      return absl::InvalidArgumentError("the target's path is empty");
    }
    const absl::StatusOr<FileInfo> info = fs_.Stat(target_);
    if (absl::IsNotFound(info.status())) return absl::OkStatus();
    const auto names = fs_.List(target_);
    if (names.ok() && names->empty()) return absl::OkStatus();
    if (!options_.overwrite) {
      return absl::AlreadyExistsError(
          absl::StrCat("\"", target_,
                       "\" is there already; choose another path or allow "
                       "overwriting"));
    }
    if (report_.to != Format::kDcp) return absl::OkStatus();
    // A DCP checkpoint replaces only its own kind.
    const absl::StatusOr<Format> there = DetectFormat(fs_, target_);
    if (!names.ok() || (there.ok() && *there != Format::kDcp)) {
      return absl::FailedPreconditionError(
          absl::StrCat("\"", target_,
                       "\" is no directory of a DCP checkpoint; choose "
                       "another path"));
    }
    return absl::OkStatus();
  }

  absl::Status MakeState() {
    const Nesting& nesting = checkpoint_->nesting();
    number_keyed_.insert(nesting.number_keyed.begin(),
                         nesting.number_keyed.end());
    tuples_.insert(nesting.tuples.begin(), nesting.tuples.end());
    absl::flat_hash_map<std::string, std::vector<std::string>> sources;
    const auto new_path = [&](const std::string& key, const Path& path) {
      const std::string renamed = options_.rename.Apply(key);
      sources[renamed].push_back(key);
      report_.renamed += renamed != key;
      Path out = RenamedPath(path, renamed);
      AddNesting(path, out);
      return out;
    };
    DSD_ASSIGN_OR_RETURN(std::unique_ptr<CheckpointEndpoint> endpoint,
                         checkpoint_->MakeEndpoint());
    const Catalog& catalog = checkpoint_->catalog();
    std::vector<DType> dtypes;
    for (size_t i = 0; i < catalog.size(); ++i) {
      const DType from = catalog[i].dtype;
      const DType to = IsCastable(from) ? options_.dtype.value_or(from) : from;
      report_.cast += from != to;
      dtypes.push_back(to);
      state_.tensor_paths.push_back(
          new_path(catalog[i].fqn, checkpoint_->tensor_path(i)));
    }
    state_.same_as = checkpoint_->same_as();
    DSD_RETURN_IF_ERROR(MakeObjects(new_path));
    for (const Path& path : nesting.empty) {
      state_.nesting.empty.push_back(
          RenamedPath(path, options_.rename.Apply(JoinPath(path))));
    }
    std::vector<std::string> merged;
    for (auto& [key, from] : sources) {
      if (from.size() < 2) continue;
      merged.push_back(absl::StrCat(absl::StrJoin(from, ", "), " -> ", key));
    }
    if (!merged.empty()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "keys become one by renaming: ", ListKeys(std::move(merged))));
    }
    tensors_ = std::make_unique<ConvertedEndpoint>(std::move(endpoint));
    for (size_t i = 0; i < catalog.size(); ++i) {
      const bool is_read = report_.to != Format::kTorchArchive ||
                           state_.same_as.empty() || state_.same_as[i] == i;
      DSD_RETURN_IF_ERROR(
          tensors_->Add(JoinPath(state_.tensor_paths[i]), dtypes[i], is_read));
    }
    state_.tensors = tensors_.get();
    return absl::OkStatus();
  }

  // Adds what is to be said of the dicts and lists above a key that has got
  // another path, where what is below them is called as before.
  void AddNesting(const Path& from, const Path& to) {
    if (number_keyed_.empty() && tuples_.empty()) return;
    for (size_t above = 0; above < from.size(); ++above) {
      const Path old(from.begin(), from.begin() + above);
      const auto below = static_cast<int64_t>(from.size() - above);
      if (static_cast<int64_t>(to.size()) < below ||
          !std::equal(from.end() - below, from.end(), to.end() - below)) {
        continue;
      }
      const Path renamed(to.begin(), to.end() - below);
      const auto add = [&](const absl::flat_hash_set<Path>& is,
                           std::vector<Path>& becomes) {
        // Keys of one dict mostly follow each other.
        if (is.contains(old) &&
            (becomes.empty() || becomes.back() != renamed)) {
          becomes.push_back(renamed);
        }
      };
      add(number_keyed_, state_.nesting.number_keyed);
      add(tuples_, state_.nesting.tuples);
    }
  }

  template <class NewPath>
  absl::Status MakeObjects(NewPath new_path) {
    std::vector<std::string> homeless;
    for (size_t i = 0; i < checkpoint_->objects().size(); ++i) {
      const StoredObject& stored = checkpoint_->objects()[i];
      absl::StatusOr<Object> value = checkpoint_->ReadObject(i);
      DSD_RETURN_IF_ERROR(value.status());
      if (report_.to == Format::kSafetensors ||
          !dcp::EncodeStoredObject(*value).ok()) {
        homeless.push_back(stored.key);
        continue;
      }
      state_.objects.push_back(
          {new_path(stored.key, stored.path), *std::move(value)});
    }
    std::sort(homeless.begin(), homeless.end());
    if (!homeless.empty() && !options_.drop_objects) {
      return absl::FailedPreconditionError(
          absl::StrCat(homeless.size(),
                       report_.to == Format::kSafetensors
                           ? " objects, for which safetensors has no place: "
                           : " objects of classes that cannot be written: ",
                       absl::StrJoin(homeless, ", "), "; allow dropping them"));
    }
    report_.dropped_objects = std::move(homeless);
    return absl::OkStatus();
  }

  absl::Status Write() {
    SaveReport saved;
    if (report_.to == Format::kDcp) {
      SaveOptions save;
      save.call = options_.call;
      save.overwrite = options_.overwrite;
      save.env = options_.env;
      DSD_ASSIGN_OR_RETURN(saved, Save(target_, state_, nullptr, save));
    } else {
      ExportOptions save;
      save.call = options_.call;
      save.overwrite = options_.overwrite;
      save.max_file_bytes = options_.max_file_bytes;
      save.env = options_.env;
      if (!checkpoint_->attributes().empty()) {
        save.attributes = checkpoint_->attributes();
      }
      DSD_ASSIGN_OR_RETURN(saved,
                           Export(target_, report_.to, state_, nullptr, save));
    }
    if (report_.to != Format::kSafetensors) {
      for (const auto& [key, value] : checkpoint_->attributes()) {
        if (key != "format") report_.dropped_attributes.push_back(key);
      }
    }
    report_.tensors = saved.tensors;
    report_.objects = saved.objects;
    report_.payload_bytes = saved.payload_bytes;
    report_.file_bytes = saved.file_bytes_all;
    report_.leftovers = std::move(saved.leftovers);
    return absl::OkStatus();
  }

  const std::string source_;
  const std::string target_;
  const ConvertOptions& options_;
  FileSystem& fs_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  std::unique_ptr<ConvertedEndpoint> tensors_;
  State state_;
  // Those of the source's nesting.
  absl::flat_hash_set<Path> number_keyed_;
  absl::flat_hash_set<Path> tuples_;
  ConvertReport report_;
};

}  // namespace

std::optional<Format> GuessFormat(absl::string_view path) {
  if (absl::EndsWith(path, kSafetensorsSuffix)) return Format::kSafetensors;
  for (const absl::string_view suffix : {".pt", ".pth", ".bin", ".ckpt"}) {
    if (absl::EndsWith(path, suffix)) return Format::kTorchArchive;
  }
  return std::nullopt;
}

bool IsOfTarget(const absl::Status& error) {
  return error.GetPayload(kTargetPayload).has_value();
}

absl::StatusOr<ConvertReport> Convert(const std::string& source,
                                      const std::string& target,
                                      const ConvertOptions& options) {
  return Converter(source, target, options).Run();
}

}  // namespace dsd::checkpoint
