// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/crc/crc32c.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/transfer/agree_on_catalogs.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/data_file_writer.h"
#include "dsd/frontends/checkpoint/dcp/metadata.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/tensor_item.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"
#include "dsd/frontends/checkpoint/digests_file.h"
#include "dsd/frontends/checkpoint/file_names.h"
#include "dsd/frontends/checkpoint/live_state.h"
#include "dsd/frontends/checkpoint/record_codec.h"

namespace dsd::checkpoint {
namespace {

// Payloads at multiples of this can be mapped and read past the page cache.
constexpr int64_t kPageBytes = 4096;
constexpr int64_t kLargePayloadBytes = 1 << 20;

// What a rank wrote, as rank 0 learns of it.
struct ChunkRecord {
  size_t tensor;
  Box box;
  int64_t offset;
  int64_t length;
};
struct ObjectRecord {
  Path path;
  Digest128 digest;
  int64_t offset;
  int64_t length;
};
struct RankRecord {
  bool failed = true;
  int64_t file_bytes = 0;  // 0: no file
  int64_t payload_bytes = 0;
  std::vector<ChunkRecord> chunks;
  std::vector<ObjectRecord> objects;
  std::vector<std::pair<size_t, Digest128>> digests;  // partial, by tensor
};

std::string EncodeRecord(const RankRecord& record) {
  RecordWriter out;
  out.Number(record.failed);
  out.Number(record.file_bytes);
  out.Number(record.payload_bytes);
  out.Number(static_cast<int64_t>(record.chunks.size()));
  for (const ChunkRecord& chunk : record.chunks) {
    out.Number(static_cast<int64_t>(chunk.tensor));
    for (const int64_t lo : chunk.box.lo) out.Number(lo);
    for (const int64_t hi : chunk.box.hi) out.Number(hi);
    out.Number(chunk.offset);
    out.Number(chunk.length);
  }
  out.Number(static_cast<int64_t>(record.objects.size()));
  for (const ObjectRecord& object : record.objects) {
    out.PutPath(object.path);
    out.Put(object.digest);
    out.Number(object.offset);
    out.Number(object.length);
  }
  for (const auto& [tensor, partial] : record.digests) {
    out.Number(static_cast<int64_t>(tensor));
    out.Put(partial);
  }
  return out.Take();
}

absl::StatusOr<RankRecord> DecodeRecord(absl::string_view bytes,
                                        const Catalog& catalog) {
  const absl::Status bad =
      absl::InternalError("a rank sent a malformed record");
  RecordReader in(bytes);
  RankRecord record;
  record.failed = in.Number() != 0;
  record.file_bytes = in.Number();
  record.payload_bytes = in.Number();
  for (int64_t left = in.Number(); left > 0 && in.ok(); --left) {
    ChunkRecord chunk;
    chunk.tensor = static_cast<size_t>(in.Number());
    if (chunk.tensor >= catalog.size()) return bad;
    const size_t ndim = catalog[chunk.tensor].shape().size();
    for (size_t d = 0; d < ndim; ++d) chunk.box.lo.push_back(in.Number());
    for (size_t d = 0; d < ndim; ++d) chunk.box.hi.push_back(in.Number());
    chunk.offset = in.Number();
    chunk.length = in.Number();
    record.chunks.push_back(std::move(chunk));
  }
  for (int64_t left = in.Number(); left > 0 && in.ok(); --left) {
    ObjectRecord object;
    object.path = in.GetPath();
    object.digest = in.GetDigest();
    object.offset = in.Number();
    object.length = in.Number();
    record.objects.push_back(std::move(object));
  }
  while (!in.done()) {
    const size_t tensor = static_cast<size_t>(in.Number());
    const Digest128 partial = in.GetDigest();
    if (tensor >= catalog.size()) return bad;
    record.digests.emplace_back(tensor, partial);
  }
  DSD_RETURN_IF_ERROR(in.status());
  return record;
}

std::string ParentOf(const std::string& directory) {
  size_t end = directory.find_last_not_of('/');
  if (end == std::string::npos) return "/";
  end = directory.rfind('/', end);
  if (end == std::string::npos) return ".";
  end = directory.find_last_not_of('/', end);
  return end == std::string::npos ? "/" : directory.substr(0, end + 1);
}

class Saver {
 public:
  Saver(const std::string& directory, const State& state, Communicator* comm,
        const SaveOptions& options)
      : directory_(directory),
        state_(state),
        catalog_(CatalogOf(state)),
        comm_(comm),
        options_(options),
        env_(*ChooseEnv(options.env, comm)),
        files_(env_.files()),
        deadline_(&env_, options.call),
        rank_(comm == nullptr ? 0 : comm->rank()),
        size_(comm == nullptr ? 1 : comm->size()),
        what_(absl::StrCat("save to \"", directory, "\"")) {}

  absl::StatusOr<SaveReport> Run() {
    const absl::Status prepared = Prepare();
    DSD_RETURN_IF_ERROR(AgreeOnCatalogs(
        comm_, what_, {&catalog_}, Fingerprint(), prepared,
        [this] { return Describe(); }, deadline_.Left()));
    DSD_RETURN_IF_ERROR(ChooseId()) << what_;
    absl::StatusOr<std::vector<size_t>> objects =
        ShareObjects(state_, pickles_, comm_, deadline_.Left());
    DSD_RETURN_IF_ERROR(objects.status()) << what_;

    const absl::Status written = WriteData(*objects);
    record_.failed = !written.ok();
    absl::Status local = written;
    absl::StatusOr<std::vector<std::string>> records =
        GatherToRank0(comm_, EncodeRecord(record_), deadline_.Left());
    if (!records.ok()) return Undecided(records.status());
    if (rank_ == 0 && local.ok()) local = Commit(*records);

    // Whether the index of this save is in place decides whether its files
    // stay.
    if (comm_ != nullptr && size_ > 1) {
      int64_t outcome[] = {committed_, report_.chunks, report_.objects,
                           report_.payload_bytes_all, report_.file_bytes_all};
      const absl::Status told = Broadcast(absl::MakeSpan(outcome));
      if (!told.ok()) return Undecided(told);
      committed_ = outcome[0] != 0;
      report_.chunks = outcome[1];
      report_.objects = outcome[2];
      report_.payload_bytes_all = outcome[3];
      report_.file_bytes_all = outcome[4];
    }
    const absl::Status verdict = Agree(
        comm_, what_, Digest(), local, [] { return std::string(); },
        deadline_.Left());
    if (!committed_) RemoveOwnFiles();
    if (!verdict.ok()) {
      return committed_
                 ? Annotate(verdict,
                            "the checkpoint is in place, but not all of the "
                            "save succeeded")
                 : verdict;
    }
    report_.save_id = save_id_;
    report_.tensors = static_cast<int64_t>(catalog_.size());
    report_.payload_bytes = record_.payload_bytes;
    return std::move(report_);
  }

 private:
  std::string InDirectory(absl::string_view name) const {
    return JoinFile(directory_, name);
  }

  // Everything that can fail without having written anything.
  absl::Status Prepare() {
    if (directory_.empty()) {
      return absl::InvalidArgumentError("the directory is empty");
    }
    DSD_RETURN_IF_ERROR(CheckKeys(state_));
    DSD_ASSIGN_OR_RETURN(pickles_, EncodeObjects(state_));
    DSD_ASSIGN_OR_RETURN(pieces_, PlanPieces(state_, rank_, size_));
    if (!options_.overwrite && files_.Stat(InDirectory(kIndexFile)).ok()) {
      return absl::AlreadyExistsError(absl::StrCat(
          "a checkpoint is there already (\"", InDirectory(kIndexFile),
          "\"); choose another directory or allow overwriting"));
    }
    // Directories that will be new, innermost first: they are synced, too.
    for (std::string at = directory_;
         rank_ == 0 && absl::IsNotFound(files_.Stat(at).status());
         at = ParentOf(at)) {
      new_directories_.push_back(ParentOf(at));
    }
    return absl::OkStatus();
  }

  Digest Fingerprint() const {
    DigestBuilder digest;
    digest.Add(directory_).Add(options_.overwrite).Add(catalog_.Fingerprint());
    for (const auto& path : state_.tensor_paths) {
      digest.Add(static_cast<int64_t>(path.size()));
      for (const PathSegment& segment : path) {
        std::visit([&digest](const auto& v) { digest.Add(v); }, segment);
      }
    }
    return digest.Finish();
  }

  std::string Describe() const {
    return absl::StrCat("directory \"", directory_, "\", overwrite ",
                        options_.overwrite ? "on" : "off");
  }

  absl::Status Broadcast(absl::Span<int64_t> numbers) {
    return comm_->Broadcast(
        absl::MakeSpan(reinterpret_cast<std::byte*>(numbers.data()),
                       numbers.size() * sizeof(int64_t)),
        0, deadline_.Left());
  }

  absl::Status ChooseId() {
    int64_t random[] = {static_cast<int64_t>(env_.RandomSeed()),
                        static_cast<int64_t>(env_.RandomSeed())};
    if (comm_ != nullptr && size_ > 1) {
      DSD_RETURN_IF_ERROR(Broadcast(absl::MakeSpan(random)));
    }
    save_id_ = MakeSaveId(random[0], random[1]);
    id_ = FileId(save_id_);
    return absl::OkStatus();
  }

  absl::Status WriteData(const std::vector<size_t>& objects) {
    DSD_RETURN_IF_ERROR(files_.CreateDirs(directory_));
    if (objects.empty() && pieces_.empty()) return absl::OkStatus();
    const std::string path = InDirectory(DataFile(rank_, 0, id_));
    DSD_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file,
                         files_.CreateWritable(path));
    own_files_.push_back(path);
    DataFileWriter out(std::move(file));
    for (const size_t index : objects) {
      const std::string archive = dcp::ObjectArchive(pickles_[index]);
      DSD_RETURN_IF_ERROR(out.PadTo(dcp::ZipWriter::kAlignment, 0));
      record_.objects.push_back(
          {state_.objects[index].path, dcp::ObjectDigest(pickles_[index]),
           out.position(), static_cast<int64_t>(archive.size())});
      DSD_RETURN_IF_ERROR(out.Append(archive));
    }
    for (const Piece& piece : pieces_) bytes_total_ += BytesOf(piece);
    for (const Piece& piece : pieces_) {
      DSD_RETURN_IF_ERROR(WritePiece(piece, &out));
    }
    DSD_RETURN_IF_ERROR(out.Finish());
    record_.file_bytes = out.position();
    // The name, for other ranks to see after a crash of this host.
    return files_.SyncDir(directory_);
  }

  int64_t BytesOf(const Piece& piece) const {
    return piece.box.num_elements() * ItemSize(catalog_[piece.tensor].dtype);
  }

  absl::Status WritePiece(const Piece& piece, DataFileWriter* out) {
    const TensorSpec& spec = catalog_[piece.tensor];
    const int64_t item_size = ItemSize(spec.dtype);
    const dcp::TensorArchive archive(spec.dtype, piece.box.extents());
    const int64_t head_bytes = static_cast<int64_t>(archive.head().size());
    if (archive.payload_bytes() >= kLargePayloadBytes) {
      DSD_RETURN_IF_ERROR(
          out->PadTo(kPageBytes, kPageBytes - head_bytes % kPageBytes));
    } else {
      DSD_RETURN_IF_ERROR(out->PadTo(dcp::ZipWriter::kAlignment, 0));
    }
    record_.chunks.push_back(
        {piece.tensor, piece.box, out->position(), archive.total_bytes()});
    DSD_RETURN_IF_ERROR(out->Append(archive.head()));
    ContentDigest digest(spec.layout.whole().num_elements() * item_size);
    uint32_t crc = 0;
    DSD_RETURN_IF_ERROR(ReadPiece(
        *state_.tensors, piece, deadline_,
        [&](int64_t begin, int64_t end,
            absl::Span<const std::byte> bytes) -> absl::Status {
          DSD_RETURN_IF_ERROR(deadline_.Check());
          crc = dcp::Crc32(crc, absl::string_view(
                                    reinterpret_cast<const char*>(bytes.data()),
                                    bytes.size()));
          digest.AddBox(spec.shape(), item_size, piece.box.lo, piece.box.hi,
                        begin, end, bytes);
          DSD_RETURN_IF_ERROR(out->Append(bytes));
          bytes_done_ += static_cast<int64_t>(bytes.size());
          if (options_.call.progress) {
            options_.call.progress({bytes_done_, bytes_total_});
          }
          return absl::OkStatus();
        }));
    DSD_RETURN_IF_ERROR(out->Append(archive.Tail(crc)));
    record_.payload_bytes += archive.payload_bytes();
    record_.digests.emplace_back(piece.tensor, digest.partial());
    return absl::OkStatus();
  }

  // Rank 0, when all ranks' data is on storage.
  absl::Status Commit(const std::vector<std::string>& blobs) {
    std::vector<RankRecord> records;
    for (const std::string& blob : blobs) {
      DSD_ASSIGN_OR_RETURN(RankRecord record, DecodeRecord(blob, catalog_));
      // That rank's error is everybody's.
      if (record.failed) return absl::OkStatus();
      records.push_back(std::move(record));
    }
    dcp::Metadata index;
    index.save_id = save_id_;
    DSD_RETURN_IF_ERROR(CheckFiles(records, &index));
    StoredDigests digests;
    DSD_RETURN_IF_ERROR(FillIndex(records, &index, &digests));

    const std::string temporary = InDirectory(TemporaryIndexFile(id_));
    DSD_RETURN_IF_ERROR(WriteIndex(index, temporary, &digests));
    const std::string digests_path = InDirectory(DigestsFile(id_));
    DSD_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file,
                         files_.CreateWritable(digests_path));
    own_files_.push_back(digests_path);
    DataFileWriter out(std::move(file));
    DSD_RETURN_IF_ERROR(out.Append(EncodeDigests(digests)));
    DSD_RETURN_IF_ERROR(out.Finish());

    // All names are on storage before the one that makes them count.
    DSD_RETURN_IF_ERROR(files_.SyncDir(directory_));
    for (const std::string& parent : new_directories_) {
      DSD_RETURN_IF_ERROR(files_.SyncDir(parent));
    }
    const absl::Status renamed =
        files_.Rename(temporary, InDirectory(kIndexFile));
    // A rename that reports an error may have happened: then the temporary name
    // is gone.
    committed_ =
        renamed.ok() || absl::IsNotFound(files_.Stat(temporary).status());
    DSD_RETURN_IF_ERROR(renamed);
    DSD_RETURN_IF_ERROR(files_.SyncDir(directory_));
    RemoveOldFiles(index);
    return absl::OkStatus();
  }

  // Rank 0 sees every file as its writer does, or they are not in one place.
  absl::Status CheckFiles(const std::vector<RankRecord>& records,
                          dcp::Metadata* index) {
    for (int rank = 0; rank < size_; ++rank) {
      const int64_t expected = records[rank].file_bytes;
      if (expected == 0) continue;
      const std::string name = DataFile(rank, 0, id_);
      const absl::StatusOr<FileInfo> info = files_.Stat(InDirectory(name));
      if (!info.ok() && !absl::IsNotFound(info.status())) return info.status();
      if (!info.ok() || info->size_bytes != expected) {
        return absl::FailedPreconditionError(absl::StrCat(
            "rank 0 ",
            info.ok() ? absl::StrCat("sees ", info->size_bytes, " bytes in \"")
                      : "does not see \"",
            InDirectory(name), "\", where rank ", rank, " wrote ", expected,
            " bytes: \"", directory_,
            "\" must be one directory shared by all ranks"));
      }
      file_of_rank_[rank] = static_cast<uint32_t>(index->files.size());
      index->files.push_back(name);
      report_.file_bytes_all += expected;
    }
    return absl::OkStatus();
  }

  absl::Status FillIndex(const std::vector<RankRecord>& records,
                         dcp::Metadata* index, StoredDigests* digests) {
    struct Place {
      const ChunkRecord* chunk;
      uint32_t file;
    };
    std::vector<std::vector<Place>> places(catalog_.size());
    std::vector<ContentDigest> sums;
    for (const TensorSpec& spec : catalog_.tensors()) {
      sums.emplace_back(spec.layout.whole().num_elements() *
                        ItemSize(spec.dtype));
    }
    for (int rank = 0; rank < size_; ++rank) {
      const RankRecord& record = records[rank];
      for (const ChunkRecord& chunk : record.chunks) {
        places[chunk.tensor].push_back({&chunk, file_of_rank_[rank]});
      }
      for (const auto& [tensor, partial] : record.digests) {
        sums[tensor].Merge(partial);
      }
      for (const ObjectRecord& object : record.objects) {
        dcp::ObjectEntryInfo info;
        info.key = JoinPath(object.path);
        info.path = object.path;
        info.location = {file_of_rank_[rank], object.offset, object.length};
        digests->objects[info.key] = object.digest;
        index->objects.push_back(std::move(info));
      }
      report_.payload_bytes_all += record.payload_bytes;
    }
    report_.objects = static_cast<int64_t>(index->objects.size());
    for (size_t i = 0; i < catalog_.size(); ++i) {
      const TensorSpec& spec = catalog_[i];
      index->AddTensor(spec.fqn, TensorPath(state_, i), spec.dtype,
                       spec.shape());
      int64_t elements = 0;
      for (const Place& place : places[i]) {
        index->AddChunk(place.chunk->box,
                        {place.file, place.chunk->offset, place.chunk->length});
        elements += place.chunk->box.num_elements();
      }
      if (elements != spec.layout.whole().num_elements()) {
        return absl::InternalError(absl::StrCat(
            "\"", absl::CHexEscape(spec.fqn), "\": the ranks stored ", elements,
            " elements of ", spec.layout.whole().num_elements()));
      }
      digests->tensors[spec.fqn] = sums[i].Finish(spec.dtype, spec.shape());
      report_.chunks += static_cast<int64_t>(places[i].size());
    }
    return absl::OkStatus();
  }

  absl::Status WriteIndex(const dcp::Metadata& index, const std::string& path,
                          StoredDigests* digests) {
    DSD_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file,
                         files_.CreateWritable(path));
    own_files_.push_back(path);
    DataFileWriter out(std::move(file));
    absl::crc32c_t crc{0};
    DSD_RETURN_IF_ERROR(
        dcp::EncodeMetadata(index, [&](absl::string_view bytes) {
          crc = absl::ExtendCrc32c(crc, bytes);
          return out.Append(bytes);
        }));
    digests->index_bytes = out.position();
    digests->index_crc = static_cast<uint32_t>(crc);
    return out.Finish();
  }

  void RemoveOldFiles(const dcp::Metadata& index) {
    absl::flat_hash_set<std::string> current(index.files.begin(),
                                             index.files.end());
    current.insert(DigestsFile(id_));
    const absl::StatusOr<std::vector<std::string>> names =
        files_.List(directory_);
    if (!names.ok()) return;
    for (const std::string& name : *names) {
      if (!IsCheckpointFile(name) || current.contains(name)) continue;
      if (!files_.Remove(InDirectory(name)).ok())
        report_.leftovers.push_back(name);
    }
  }

  void RemoveOwnFiles() {
    for (const std::string& path : own_files_) {
      files_.Remove(path).IgnoreError();
    }
  }

  // The ranks lost each other. Rank 0 knows whether it has committed; the
  // others know only that it did not if they failed themselves.
  absl::Status Undecided(const absl::Status& status) {
    if ((rank_ == 0 || record_.failed) && !committed_) RemoveOwnFiles();
    return Annotate(
        status,
        absl::StrCat(what_, rank_ == 0
                                ? (committed_ ? " (done, the checkpoint is in "
                                                "place)"
                                              : " (not done)")
                                : " (rank 0 may have finished it or not)"));
  }

  const std::string directory_;
  const State& state_;
  const Catalog& catalog_;
  Communicator* const comm_;
  const SaveOptions& options_;
  Env& env_;
  FileSystem& files_;
  const Deadline deadline_;
  const int rank_;
  const int size_;
  const std::string what_;

  std::vector<std::string> pickles_;
  std::vector<Piece> pieces_;
  std::vector<std::string> new_directories_;
  std::string save_id_;
  std::string id_;
  RankRecord record_;
  std::vector<std::string> own_files_;
  int64_t bytes_done_ = 0;
  int64_t bytes_total_ = 0;
  absl::flat_hash_map<int, uint32_t> file_of_rank_;
  bool committed_ = false;
  SaveReport report_;
};

}  // namespace

absl::StatusOr<SaveReport> Save(const std::string& directory,
                                const State& state, Communicator* comm,
                                const SaveOptions& options) {
  return Saver(directory, state, comm, options).Run();
}

}  // namespace dsd::checkpoint
