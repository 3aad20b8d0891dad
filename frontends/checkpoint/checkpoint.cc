// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/checkpoint.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/crc/crc32c.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/checkpoint_endpoint.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/file_names.h"
#include "dsd/frontends/checkpoint/item_reader.h"

namespace dsd::checkpoint {
namespace {

constexpr int64_t kMaxIndexBytes = int64_t{8} << 30;

// Why there is no index: the directory's state in words.
absl::Status NoIndex(FileSystem& files, const std::string& directory) {
  const absl::StatusOr<FileInfo> info = files.Stat(directory);
  // A link to a directory is none itself.
  const absl::StatusOr<std::vector<std::string>> names = files.List(directory);
  if (!names.ok()) {
    if (info.ok()) {
      return absl::NotFoundError(absl::StrCat("no checkpoint at \"", directory,
                                              "\": it is not a directory"));
    }
    return absl::NotFoundError(absl::StrCat("no checkpoint at \"", directory,
                                            "\": there is no such directory"));
  }
  int64_t data_files = 0;
  for (const std::string& name : *names) {
    data_files += absl::EndsWith(name, ".distcp");
  }
  if (data_files > 0) {
    return absl::NotFoundError(absl::StrCat(
        "the checkpoint at \"", directory, "\" is not complete: ", data_files,
        data_files == 1 ? " data file" : " data files",
        " but no index (.metadata): a save was interrupted, or is still "
        "running"));
  }
  return absl::NotFoundError(absl::StrCat("no checkpoint at \"", directory,
                                          "\": it has no index (.metadata)"));
}

}  // namespace

absl::StatusOr<std::string> ReadWhole(FileSystem& files,
                                      const std::string& path,
                                      int64_t max_bytes) {
  DSD_ASSIGN_OR_RETURN(const std::unique_ptr<ReadableFile> file,
                       files.OpenReadable(path));
  if (file->size_bytes() > max_bytes) {
    return absl::DataLossError(
        absl::StrCat("\"", path, "\" has ", file->size_bytes(),
                     " bytes, expected at most ", max_bytes));
  }
  std::string bytes(file->size_bytes(), '\0');
  DSD_RETURN_IF_ERROR(
      file->ReadAt(0, absl::MakeSpan(reinterpret_cast<std::byte*>(bytes.data()),
                                     bytes.size())));
  return bytes;
}

namespace {

struct IndexBytes {
  int64_t size = 0;
  uint32_t crc = 0;
};

// Reads an index and sums up its bytes on the way, after those before.
absl::StatusOr<dcp::Metadata> ReadIndex(ReadableFile& file,
                                        IndexBytes* summary) {
  absl::crc32c_t crc{summary->crc};
  int64_t done = 0;
  const auto read = [&](int64_t offset,
                        absl::Span<std::byte> out) -> absl::Status {
    DSD_RETURN_IF_ERROR(file.ReadAt(offset, out));
    crc = absl::ExtendCrc32c(
        crc, absl::string_view(reinterpret_cast<const char*>(out.data()),
                               out.size()));
    done = offset + static_cast<int64_t>(out.size());
    return absl::OkStatus();
  };
  DSD_ASSIGN_OR_RETURN(dcp::Metadata index,
                       dcp::DecodeMetadata(file.size_bytes(), read));
  // What follows the pickle counts for the sum only.
  std::vector<std::byte> rest(1 << 16);
  while (done < file.size_bytes()) {
    DSD_RETURN_IF_ERROR(
        read(done, absl::MakeSpan(rest).first(std::min<int64_t>(
                       rest.size(), file.size_bytes() - done))));
  }
  summary->size += file.size_bytes();
  summary->crc = static_cast<uint32_t>(crc);
  return index;
}

absl::StatusOr<dcp::Metadata> OpenIndex(FileSystem& files,
                                        const std::string& path,
                                        IndexBytes* summary) {
  DSD_ASSIGN_OR_RETURN(const std::unique_ptr<ReadableFile> file,
                       files.OpenReadable(path));
  if (file->size_bytes() > kMaxIndexBytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("\"", path, "\" has ", file->size_bytes(),
                     " bytes, the limit is ", kMaxIndexBytes));
  }
  absl::StatusOr<dcp::Metadata> index = ReadIndex(*file, summary);
  DSD_RETURN_IF_ERROR(index.status()) << "\"" << path << "\"";
  return index;
}

// What each rank wrote for itself, as one index.
absl::StatusOr<dcp::Metadata> OpenRankIndexes(Env* env,
                                              const std::string& directory,
                                              std::vector<std::string>* names,
                                              IndexBytes* summary) {
  DSD_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                       env->files().List(directory));
  std::vector<std::pair<int, std::string>> found;
  for (const std::string& name : all) {
    if (const std::optional<int> rank = RankOfIndex(name)) {
      found.emplace_back(*rank, name);
    }
  }
  std::sort(found.begin(), found.end());
  std::vector<Checkpoint::Impl> ranks(found.size());
  std::vector<dcp::Metadata> indexes;
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i].first != static_cast<int>(i)) {
      return absl::NotFoundError(
          absl::StrCat("the checkpoint at \"", directory,
                       "\" has an index per rank, but none of rank ", i));
    }
    DSD_ASSIGN_OR_RETURN(
        dcp::Metadata index,
        OpenIndex(env->files(), JoinFile(directory, found[i].second), summary));
    ranks[i].directory = directory;
    ranks[i].env = env;
    ranks[i].index = index;
    indexes.push_back(std::move(index));
    names->push_back(found[i].second);
  }
  const auto are_equal = [&](absl::Span<const dcp::RankObject> objects) {
    std::optional<std::string> first;
    for (const dcp::RankObject& object : objects) {
      const absl::StatusOr<std::string> pickle =
          ItemReader(&ranks[object.rank]).ReadStoredObject(object.object);
      // What cannot be read cannot be told apart: each is kept.
      if (!pickle.ok()) return false;
      if (!first.has_value()) first = *pickle;
      if (*first != *pickle) return false;
    }
    return true;
  };
  absl::StatusOr<dcp::Metadata> merged = dcp::MergeRankLocal(
      indexes, [&](absl::Span<const dcp::RankObject> objects) {
        return absl::StatusOr<bool>(are_equal(objects));
      });
  DSD_RETURN_IF_ERROR(merged.status())
      << "the indexes of the ranks in \"" << directory << "\"";
  return merged;
}

}  // namespace

Checkpoint::Checkpoint(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Checkpoint::~Checkpoint() = default;

namespace {

// Digests of the same save, if there are to be any.
absl::Status ReadDigests(const IndexBytes& index_bytes, Checkpoint::Impl* impl);
void FindGaps(Checkpoint::Impl* impl);

}  // namespace

absl::StatusOr<std::shared_ptr<const Checkpoint>> Checkpoint::Open(
    const std::string& path, const OpenOptions& options) {
  if (path.empty()) {
    return absl::InvalidArgumentError("the checkpoint's path is empty");
  }
  auto impl = std::make_unique<Impl>();
  impl->path = path;
  impl->env = options.env;
  impl->verify = options.verify;
  DSD_ASSIGN_OR_RETURN(impl->format, DetectFormat(options.env->files(), path));
  switch (impl->format) {
    case Format::kDcp:
      DSD_RETURN_IF_ERROR(OpenDcp(impl.get()));
      break;
    case Format::kSafetensors:
      DSD_RETURN_IF_ERROR(OpenSafetensors(impl.get()));
      break;
    case Format::kTorchArchive:
      DSD_RETURN_IF_ERROR(OpenTorchArchive(impl.get()));
      break;
  }
  return std::shared_ptr<const Checkpoint>(new Checkpoint(std::move(impl)));
}

absl::Status OpenDcp(Checkpoint::Impl* impl) {
  impl->directory = impl->path;
  const std::string& directory = impl->directory;
  FileSystem& files = impl->env->files();
  const std::string path = JoinFile(directory, kIndexFile);
  IndexBytes bytes;
  absl::StatusOr<dcp::Metadata> index = OpenIndex(files, path, &bytes);
  if (absl::IsNotFound(index.status()) ||
      absl::IsFailedPrecondition(index.status())) {
    if (!files.Stat(JoinFile(directory, kFirstRankIndexFile)).ok()) {
      return NoIndex(files, directory);
    }
    index = OpenRankIndexes(impl->env, directory, &impl->rank_indexes, &bytes);
  }
  DSD_RETURN_IF_ERROR(index.status());
  impl->index = *std::move(index);
  DigestBuilder fingerprint;
  fingerprint.Add(impl->index.save_id).Add(bytes.size).Add(bytes.crc);
  impl->fingerprint = fingerprint.Finish();
  if (impl->verify) {
    DSD_RETURN_IF_ERROR(ReadDigests(bytes, impl));
  }
  if (impl->has_digests) FindGaps(impl);
  DSD_RETURN_IF_ERROR(FillCatalog(impl)) << "\"" << path << "\"";
  return absl::OkStatus();
}

namespace {

absl::Status ReadDigests(const IndexBytes& index_bytes,
                         Checkpoint::Impl* impl) {
  const std::string id = FileId(impl->index.save_id);
  bool written_by_dsd = false;
  for (const std::string& file : impl->index.files) {
    const absl::string_view file_id = IdOfDataFile(file);
    if (file_id.empty()) continue;
    written_by_dsd = true;
    if (file_id != id) {
      return absl::DataLossError(absl::StrCat(
          "the checkpoint at \"", impl->directory, "\": the index of save ",
          absl::CHexEscape(impl->index.save_id), " names the data file \"",
          file, "\" of another save"));
    }
  }
  if (id.empty()) return absl::OkStatus();
  const std::string path = JoinFile(impl->directory, DigestsFile(id));
  // A key is in the index as well, and there it takes more than a fourth.
  const absl::StatusOr<std::string> text =
      ReadWhole(impl->env->files(), path, 4 * index_bytes.size + 4096);
  if (absl::IsNotFound(text.status()) && !written_by_dsd) {
    return absl::OkStatus();  // Python's
  }
  if (absl::IsNotFound(text.status())) {
    return absl::DataLossError(absl::StrCat(
        "\"", path,
        "\" is missing: the checkpoint cannot be verified; copy it "
        "with all files, or read it without verification"));
  }
  DSD_RETURN_IF_ERROR(text.status());
  absl::StatusOr<StoredDigests> digests = DecodeDigests(*text);
  DSD_RETURN_IF_ERROR(digests.status()) << "\"" << path << "\"";
  if (digests->index_bytes != index_bytes.size ||
      digests->index_crc != index_bytes.crc) {
    return absl::DataLossError(absl::StrCat(
        "\"", JoinFile(impl->directory, kIndexFile),
        "\" differs from what was written (checksum): it is damaged"));
  }
  impl->digests = *std::move(digests);
  impl->has_digests = true;
  return absl::OkStatus();
}

void FindGaps(Checkpoint::Impl* impl) {
  const dcp::Metadata& index = impl->index;
  struct Item {
    const dcp::ItemLocation* location;
    int64_t* gap;
  };
  impl->chunk_gap.resize(index.locations.size());
  impl->object_gap.resize(index.objects.size());
  impl->file_bytes.resize(index.files.size());
  std::vector<Item> items;
  items.reserve(index.locations.size() + index.objects.size());
  for (size_t i = 0; i < index.locations.size(); ++i) {
    items.push_back({&index.locations[i], &impl->chunk_gap[i]});
  }
  for (size_t i = 0; i < index.objects.size(); ++i) {
    items.push_back({&index.objects[i].location, &impl->object_gap[i]});
  }
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    return std::tie(a.location->file, a.location->offset_bytes) <
           std::tie(b.location->file, b.location->offset_bytes);
  });
  for (const Item& item : items) {
    int64_t& end = impl->file_bytes[item.location->file];
    *item.gap = end;
    end = std::max(end,
                   item.location->offset_bytes + item.location->length_bytes);
  }
}

absl::Status NotStorable(absl::string_view key, const absl::Status& why) {
  return absl::DataLossError(
      absl::StrCat("tensor \"", absl::CHexEscape(key), "\": ", why.message()));
}

}  // namespace

absl::Status FillCatalog(Checkpoint::Impl* impl) {
  const dcp::Metadata& index = impl->index;
  // Most tensors of a model share a few shapes, cut in the same way.
  absl::flat_hash_map<std::tuple<Dims, size_t, absl::Span<const int64_t>>,
                      Layout>
      layouts;
  const auto layout_of =
      [&](const dcp::TensorEntry& entry) -> absl::StatusOr<Layout> {
    const auto bounds =
        absl::MakeConstSpan(index.bounds)
            .subspan(entry.first_bound, 2 * entry.ndim() * entry.num_chunks);
    const std::tuple key(entry.shape, entry.num_chunks, bounds);
    const auto known = layouts.find(key);
    if (known != layouts.end()) return known->second;
    absl::StatusOr<Layout> layout = Layout::Anywhere(entry.shape);
    if (entry.num_chunks != 1 ||
        index.ChunkBox(entry, 0) != Box::Whole(entry.shape)) {
      std::vector<HolderBox> boxes;
      for (size_t c = 0; c < entry.num_chunks; ++c) {
        boxes.push_back({kAnyHolder, index.ChunkBox(entry, c)});
      }
      layout = Layout::FromBoxes(entry.shape, std::move(boxes));
    }
    if (layout.ok()) layouts.emplace(key, *layout);
    return layout;
  };
  for (size_t i = 0; i < index.tensors.size(); ++i) {
    const dcp::TensorEntry& entry = index.tensors[i];
    if (!entry.dtype.has_value()) {
      impl->unreadable.emplace_back(entry.key, entry.dtype_name);
      continue;
    }
    absl::StatusOr<Layout> layout = layout_of(entry);
    if (!layout.ok()) return NotStorable(entry.key, layout.status());
    const absl::Status added =
        impl->catalog.Add({entry.key, *entry.dtype, *std::move(layout)});
    if (!added.ok()) return NotStorable(entry.key, added);
    impl->entry_of.push_back(i);
  }
  for (const dcp::ObjectEntryInfo& object : index.objects) {
    impl->objects.push_back(
        {object.key, object.path, index.files[object.location.file],
         object.location.offset_bytes, object.location.length_bytes});
  }
  return absl::OkStatus();
}

int64_t StoredBytes(const Checkpoint::Impl& impl) {
  int64_t bytes = 0;
  for (size_t i = 0; i < impl.catalog.size(); ++i) {
    const dcp::TensorEntry& entry = impl.index.tensors[impl.entry_of[i]];
    for (size_t c = 0; c < entry.num_chunks; ++c) {
      bytes += impl.index.ChunkBox(entry, c).num_elements() *
               ItemSize(impl.catalog[i].dtype);
    }
  }
  return bytes;
}

Format Checkpoint::format() const { return impl_->format; }
const std::string& Checkpoint::path() const { return impl_->path; }
const std::string& Checkpoint::directory() const { return impl_->directory; }
const std::string& Checkpoint::save_id() const { return impl_->index.save_id; }
const Digest& Checkpoint::fingerprint() const { return impl_->fingerprint; }
const Catalog& Checkpoint::catalog() const { return impl_->catalog; }

const Path& Checkpoint::tensor_path(size_t tensor) const {
  return impl_->index.tensors[impl_->entry_of[tensor]].path;
}

std::vector<StoredChunk> Checkpoint::Chunks(size_t tensor) const {
  const dcp::TensorEntry& entry = impl_->index.tensors[impl_->entry_of[tensor]];
  std::vector<StoredChunk> chunks;
  for (size_t i = 0; i < entry.num_chunks; ++i) {
    const dcp::ItemLocation& at = impl_->index.ChunkLocation(entry, i);
    chunks.push_back({impl_->index.ChunkBox(entry, i),
                      impl_->index.files[at.file], at.offset_bytes,
                      at.length_bytes});
  }
  return chunks;
}

const std::vector<size_t>& Checkpoint::same_as() const {
  return impl_->same_as;
}

const Nesting& Checkpoint::nesting() const { return impl_->nesting; }

const std::vector<std::pair<std::string, std::string>>& Checkpoint::unreadable()
    const {
  return impl_->unreadable;
}

const std::vector<StoredObject>& Checkpoint::objects() const {
  return impl_->objects;
}

const std::vector<std::pair<std::string, std::string>>& Checkpoint::attributes()
    const {
  return impl_->attributes;
}

absl::StatusOr<Object> Checkpoint::ReadObject(size_t object) const {
  DSD_ASSIGN_OR_RETURN(dcp::ObjectItem item,
                       ItemReader(impl_.get()).ReadObject(object));
  return std::move(item.value);
}

bool Checkpoint::has_digests() const { return impl_->has_digests; }

DigestVersion Checkpoint::digest_version() const {
  return impl_->digests.version;
}

std::optional<Digest128> Checkpoint::StoredDigest(absl::string_view key) const {
  for (const auto* digests :
       {&impl_->digests.tensors, &impl_->digests.objects}) {
    const auto it = digests->find(key);
    if (it != digests->end()) return it->second;
  }
  return std::nullopt;
}

absl::StatusOr<std::unique_ptr<CheckpointEndpoint>> Checkpoint::MakeEndpoint()
    const {
  std::vector<size_t> tensors(impl_->catalog.size());
  std::iota(tensors.begin(), tensors.end(), size_t{0});
  return MakeCheckpointEndpoint(shared_from_this(), tensors);
}

absl::StatusOr<std::unique_ptr<CheckpointEndpoint>> Checkpoint::MakeEndpoint(
    absl::Span<const std::string> keys) const {
  std::vector<size_t> tensors;
  for (const std::string& key : keys) {
    const std::optional<size_t> tensor = impl_->catalog.Find(key);
    if (!tensor.has_value()) {
      return absl::NotFoundError(
          absl::StrCat("the checkpoint at \"", impl_->path,
                       "\" has no tensor \"", absl::CHexEscape(key), "\""));
    }
    tensors.push_back(*tensor);
  }
  return MakeCheckpointEndpoint(shared_from_this(), tensors);
}

}  // namespace dsd::checkpoint
