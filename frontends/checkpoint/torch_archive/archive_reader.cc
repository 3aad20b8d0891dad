// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/torch_archive/archive_reader.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/crc/crc32c.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/checked_int.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/dcp/pickle_reader.h"
#include "dsd/frontends/checkpoint/torch_archive/archive_writer.h"

namespace dsd::torch_archive {
namespace {

using dcp::PickleValue;
using Kind = PickleValue::Kind;

constexpr int64_t kMaxRecords = 4'000'000;
constexpr int64_t kMaxPickleBytes = int64_t{1} << 30;
constexpr int kMaxDepth = dcp::kMaxObjectDepth;
// Views may repeat elements: how much more there may be than the file has.
constexpr int64_t kMaxUnfolding = 64;
constexpr int64_t kFreeUnfoldedBytes = int64_t{1} << 30;

bool IsDict(PickleValue value) {
  return value.kind() == Kind::kDict ||
         (value.kind() == Kind::kCall &&
          value.callee().IsGlobal("collections", "OrderedDict"));
}

class Reader {
 public:
  Reader(const dcp::ZipReader& zip, dcp::FileSlice* slice)
      : zip_(zip), unfolded_left_(kFreeUnfoldedBytes) {
    const auto most = CheckedMul(slice->length(), kMaxUnfolding);
    unfolded_left_ += most.value_or(int64_t{1} << 62);
    for (const dcp::ZipReader::Record& record : zip.records()) {
      records_.emplace(record.name, Storage{&record, -1});
    }
  }

  absl::StatusOr<Archive> Run() {
    if (records_.contains("constants.pkl")) {
      return absl::UnimplementedError(
          "it is a TorchScript archive (torch.jit.save), not one of "
          "torch.save");
    }
    const auto data = records_.find("data.pkl");
    if (data == records_.end()) {
      return absl::DataLossError("torch archive: no record data.pkl");
    }
    DSD_ASSIGN_OR_RETURN(pickle_bytes_,
                         zip_.Content(*data->second.record, kMaxPickleBytes));
    DSD_ASSIGN_OR_RETURN(big_endian_, dcp::IsBigEndian(zip_));
    dcp::PickleLimits limits;
    limits.allow_persistent_ids = true;
    limits.max_int_bytes = 255;
    DSD_ASSIGN_OR_RETURN(const dcp::Pickle pickle,
                         dcp::Pickle::Parse(pickle_bytes_, limits));
    budget_.emplace(static_cast<int64_t>(pickle_bytes_.size()));
    fingerprint_.Add(pickle_bytes_);
    archive_.pickle_bytes = static_cast<int64_t>(pickle_bytes_.size());
    archive_.pickle_crc =
        static_cast<uint32_t>(absl::ComputeCrc32c(pickle_bytes_));
    archive_.digests = ReadDigests();

    const PickleValue root = pickle.root();
    if (root.kind() == Kind::kInstance ||
        (root.kind() == Kind::kCall && !IsDict(root) &&
         !dcp::IsTensorCall(root))) {
      return absl::UnimplementedError(
          absl::StrCat("torch archive: it holds an object of class \"",
                       absl::CHexEscape(absl::StrCat(
                           root.callee().module(), ".", root.callee().name())),
                       "\", expected a dict; save its state_dict()"));
    }
    const bool is_tree = IsDict(root) || IsDescended(root, 0);
    if (!is_tree) path_.push_back(std::string(kLoneKey));
    DSD_RETURN_IF_ERROR(Walk(root, 0));
    std::stable_sort(archive_.tensors.begin(), archive_.tensors.end(),
                     [](const Archive::Tensor& a, const Archive::Tensor& b) {
                       return a.item.data_at < b.item.data_at;
                     });
    archive_.fingerprint = fingerprint_.Finish();
    return std::move(archive_);
  }

 private:
  struct Storage {
    const dcp::ZipReader::Record* record;
    int64_t content_at;  // -1: not looked up yet
  };

  absl::StatusOr<std::string> ReadDigests() {
    const auto found = records_.find(kDigestsRecord);
    if (found == records_.end()) {
      return absl::NotFoundError("no record of digests");
    }
    DSD_ASSIGN_OR_RETURN(const absl::string_view digests,
                         zip_.Content(*found->second.record, kMaxPickleBytes));
    return std::string(digests);
  }

  // Whether a tensor is in the value, or for dicts and lists below it.
  bool HasTensor(PickleValue value, int depth) {
    if (dcp::IsTensorCall(value)) return true;
    const Kind kind = value.kind();
    if ((kind != Kind::kTuple && kind != Kind::kList && !IsDict(value)) ||
        depth > kMaxDepth) {
      return false;
    }
    // False while it is looked at, so that a value in itself ends.
    const auto [it, is_new] = has_tensor_.try_emplace(value.id(), false);
    if (!is_new) return it->second;
    bool found = false;
    const auto look = [&](PickleValue item) {
      found = HasTensor(item, depth + 1);
      return !found;
    };
    if (IsDict(value)) {
      value.ForEachEntry(
          [&](PickleValue, PickleValue item) { return look(item); });
    } else {
      value.ForEachItem(look);
    }
    return has_tensor_[value.id()] = found;
  }

  // As IsDescended of core/value/flatten.h.
  bool IsDescended(PickleValue value, int depth) {
    if (IsDict(value)) return true;
    if (value.kind() == Kind::kTuple) return HasTensor(value, depth);
    if (value.kind() != Kind::kList || depth > kMaxDepth) return false;
    const auto [it, is_new] = is_descended_.try_emplace(value.id(), false);
    if (!is_new) return it->second;
    bool found = false;
    value.ForEachItem([&](PickleValue item) {
      found = dcp::IsTensorCall(item) || IsDescended(item, depth + 1);
      return !found;
    });
    return is_descended_[value.id()] = found;
  }

  absl::Status Walk(PickleValue value, int depth) {
    if (depth > kMaxDepth) {
      return absl::DataLossError(
          absl::StrCat("torch archive: nested more than ", kMaxDepth, " deep"));
    }
    if (--budget_->values_left < 0) {
      return absl::ResourceExhaustedError(
          "torch archive: it unfolds to more values than its bytes have room "
          "for");
    }
    if (dcp::IsTensorCall(value)) return AddTensor(value);
    if (IsDict(value)) return WalkDict(value, depth);
    if (IsDescended(value, depth)) {
      if (value.kind() == Kind::kTuple) {
        archive_.nesting.tuples.push_back(path_);
      }
      absl::Status status;
      int64_t index = 0;
      value.ForEachItem([&](PickleValue item) {
        path_.push_back(index++);
        status = Walk(item, depth + 1);
        path_.pop_back();
        return status.ok();
      });
      return status;
    }
    return AddObject(value);
  }

  absl::Status WalkDict(PickleValue dict, int depth) {
    // A key that is neither text nor a number has no form: one object then.
    bool plain = true;
    dict.ForEachEntry([&](PickleValue key, PickleValue) {
      plain = key.AsString().has_value() || key.AsInt().has_value();
      return plain;
    });
    if (!plain) {
      if (path_.empty()) path_.push_back(std::string(kLoneKey));
      return AddObject(dict);
    }
    DictKeys keys;
    absl::Status status;
    dict.ForEachEntry([&](PickleValue key, PickleValue item) {
      const auto text = key.AsString();
      keys.Add(text.has_value() ? PathSegment(std::string(*text))
                                : PathSegment(*key.AsInt()));
      path_.push_back(text.has_value() ? std::string(*text)
                                       : absl::StrCat(*key.AsInt()));
      status = Walk(item, depth + 1);
      path_.pop_back();
      return status.ok();
    });
    keys.AddTo(path_, archive_.nesting);
    return status;
  }

  std::string Where() const {
    return absl::StrCat("\"", absl::CHexEscape(JoinPath(path_)), "\"");
  }

  absl::Status AddObject(PickleValue value) {
    DSD_ASSIGN_OR_RETURN(
        dcp::ObjectItem item,
        dcp::DecodeObjectValue(value, pickle_bytes_, &*budget_));
    archive_.objects.push_back({path_, std::move(item)});
    return absl::OkStatus();
  }

  absl::Status AddTensor(PickleValue value) {
    const absl::StatusOr<dcp::TensorView> view = dcp::ReadTensorView(value);
    if (absl::IsUnimplemented(view.status())) {
      archive_.unreadable.push_back({path_, KindOf(value)});
      return absl::OkStatus();
    }
    DSD_RETURN_IF_ERROR(view.status()) << Where();
    const auto found = records_.find(absl::StrCat("data/", view->storage_key));
    if (found == records_.end()) {
      return absl::DataLossError(absl::StrCat(
          Where(), ": no record \"data/", absl::CHexEscape(view->storage_key),
          "\" for its storage"));
    }
    Storage& storage = found->second;
    if (storage.content_at < 0) {
      DSD_ASSIGN_OR_RETURN(storage.content_at,
                           zip_.ContentOffset(*storage.record));
    }
    absl::StatusOr<dcp::TensorItem> item = dcp::PlaceTensor(
        *view, *storage.record, storage.content_at, big_endian_);
    DSD_RETURN_IF_ERROR(item.status()) << Where();
    const auto bytes =
        CheckedMul(*CheckedProduct(item->shape), ItemSize(item->dtype));
    if (!bytes.has_value() || *bytes > unfolded_left_) {
      return absl::ResourceExhaustedError(
          absl::StrCat(Where(), ": with its shape ", DimsToString(item->shape),
                       " the tensors of the archive are over ", kMaxUnfolding,
                       " times as large as its file"));
    }
    unfolded_left_ -= *bytes;
    fingerprint_.Add(item->data_at).Add(item->record_crc);
    archive_.tensors.push_back({path_, *std::move(item)});
    return absl::OkStatus();
  }

  // The name of what rebuilds a tensor, or of its dtype if that is the problem.
  static std::string KindOf(PickleValue call) {
    const PickleValue function = call.callee();
    if (function.name() == "_rebuild_tensor_v3") {
      const auto args = call.args().AsTuple(16);
      if (args.has_value() && args->size() >= 7 &&
          (*args)[6].kind() == Kind::kGlobal) {
        return std::string((*args)[6].name());
      }
    }
    return absl::StrCat(function.module(), ".", function.name());
  }

  const dcp::ZipReader& zip_;
  int64_t unfolded_left_;
  absl::flat_hash_map<std::string, Storage> records_;
  absl::string_view pickle_bytes_;
  bool big_endian_ = false;
  std::optional<dcp::ObjectBudget> budget_;
  absl::flat_hash_map<uint32_t, bool> has_tensor_;
  absl::flat_hash_map<uint32_t, bool> is_descended_;
  Path path_;
  DigestBuilder fingerprint_;
  Archive archive_;
};

}  // namespace

absl::StatusOr<Archive> ReadArchive(dcp::FileSlice* slice) {
  DSD_ASSIGN_OR_RETURN(const dcp::ZipReader zip,
                       dcp::ZipReader::Open(slice, kMaxRecords));
  return Reader(zip, slice).Run();
}

}  // namespace dsd::torch_archive
