// SPDX-License-Identifier: Apache-2.0

#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/digests_file.h"
#include "dsd/frontends/checkpoint/file_names.h"
#include "dsd/frontends/checkpoint/torch_archive/archive_reader.h"

namespace dsd::checkpoint {

namespace {

// What dsd wrote into the archive, if it is dsd's.
absl::Status ReadDigests(const torch_archive::Archive& archive,
                         Checkpoint::Impl* impl) {
  if (absl::IsNotFound(archive.digests.status())) return absl::OkStatus();
  DSD_RETURN_IF_ERROR(archive.digests.status());
  DSD_ASSIGN_OR_RETURN(StoredDigests digests, DecodeDigests(*archive.digests));
  if (digests.index_bytes != archive.pickle_bytes ||
      digests.index_crc != archive.pickle_crc) {
    return absl::DataLossError(
        "its pickle differs from what was written (checksum): it is damaged");
  }
  for (const TensorSpec& spec : impl->catalog.tensors()) {
    if (digests.tensors.contains(spec.fqn)) continue;
    return absl::DataLossError(
        absl::StrCat("its digests lack \"", absl::CHexEscape(spec.fqn), "\""));
  }
  impl->digests = std::move(digests);
  impl->has_digests = true;
  return absl::OkStatus();
}

}  // namespace

absl::Status OpenTorchArchive(Checkpoint::Impl* impl) {
  impl->directory = ParentOf(impl->path);
  impl->index.files.emplace_back(LastPart(impl->path));
  const std::string where =
      absl::StrCat("\"", absl::CHexEscape(impl->path), "\"");
  DSD_ASSIGN_OR_RETURN(const std::unique_ptr<ReadableFile> file,
                       impl->env->files().OpenReadable(impl->path));
  absl::StatusOr<dcp::FileSlice> slice =
      dcp::FileSlice::Create(file.get(), 0, file->size_bytes());
  DSD_RETURN_IF_ERROR(slice.status()) << where;
  absl::StatusOr<torch_archive::Archive> archive =
      torch_archive::ReadArchive(&*slice);
  DSD_RETURN_IF_ERROR(archive.status()) << where;

  impl->fingerprint = archive->fingerprint;
  impl->nesting = std::move(archive->nesting);
  // By what says which elements they are.
  absl::flat_hash_map<std::tuple<int64_t, DType, Dims, Dims, bool, bool>,
                      size_t>
      views;
  for (size_t i = 0; i < archive->tensors.size(); ++i) {
    const dcp::TensorItem& item = archive->tensors[i].item;
    const auto [it, is_new] = views.try_emplace(
        std::make_tuple(item.data_at, item.dtype, item.shape, item.strides,
                        item.conjugated, item.negated),
        i);
    const bool is_empty = Box::Whole(item.shape).empty();
    impl->same_as.push_back(is_empty ? i : it->second);
  }
  for (torch_archive::Archive::Tensor& tensor : archive->tensors) {
    dcp::TensorItem& item = tensor.item;
    const int64_t record_at = item.record_at;
    std::string key = JoinPath(tensor.path);
    impl->index.AddTensor(std::move(key), std::move(tensor.path), item.dtype,
                          item.shape);
    impl->index.AddChunk(Box::Whole(item.shape),
                         {0, record_at, item.record_bytes});
    item.data_at -= record_at;
    item.record_at = 0;
    impl->items.push_back(std::move(item));
  }
  for (const torch_archive::Archive::Unreadable& tensor : archive->unreadable) {
    impl->unreadable.emplace_back(JoinPath(tensor.path), tensor.kind);
  }
  for (torch_archive::Archive::Value& value : archive->objects) {
    std::string key = JoinPath(value.path);
    impl->index.objects.push_back(
        {std::move(key), std::move(value.path), {0, 0, file->size_bytes()}});
    impl->values.push_back(std::move(value.item));
  }
  DSD_RETURN_IF_ERROR(FillCatalog(impl)) << where;
  if (impl->verify) {
    DSD_RETURN_IF_ERROR(ReadDigests(*archive, impl)) << where;
  }
  absl::flat_hash_set<absl::string_view> keys;
  for (const StoredObject& object : impl->objects) {
    if (impl->catalog.Find(object.key).has_value() ||
        !keys.insert(object.key).second) {
      return absl::DataLossError(
          absl::StrCat(where, ": two values have the key \"",
                       absl::CHexEscape(object.key), "\""));
    }
  }
  return absl::OkStatus();
}

}  // namespace dsd::checkpoint
