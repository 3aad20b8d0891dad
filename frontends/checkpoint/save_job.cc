// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/save_job.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/crc/crc32c.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/transfer/agree_on_catalogs.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"
#include "dsd/frontends/checkpoint/file_names.h"
#include "dsd/frontends/checkpoint/record_codec.h"
#include "dsd/frontends/checkpoint/step_files.h"

namespace dsd::checkpoint {
namespace {

// Payloads at multiples of this can be mapped and read past the page cache.
constexpr int64_t kPageBytes = 4096;
constexpr int64_t kLargePayloadBytes = 1 << 20;

// Where an archive begins in a file that has `end` bytes before it.
int64_t PlaceOfObject(int64_t end) {
  constexpr int64_t kAlignment = dcp::ZipWriter::kAlignment;
  return (end + kAlignment - 1) / kAlignment * kAlignment;
}
int64_t PlaceOfTensor(int64_t end, const dcp::TensorArchive& archive) {
  if (archive.payload_bytes() < kLargePayloadBytes) return PlaceOfObject(end);
  const int64_t head_bytes = static_cast<int64_t>(archive.head().size());
  return (end + head_bytes + kPageBytes - 1) / kPageBytes * kPageBytes -
         head_bytes;
}

}  // namespace

std::string SaveJob::Encode(const RankRecord& record) {
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

absl::StatusOr<SaveJob::RankRecord> SaveJob::Decode(absl::string_view bytes,
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

SaveJob::SaveJob(const std::string& directory, Communicator* comm,
                 const SaveOptions& options)
    : directory_(directory),
      comm_(comm),
      options_(options),
      env_(*ChooseEnv(options.env, comm)),
      files_(env_.files()),
      deadline_(&env_, options.call),
      rank_(comm == nullptr ? 0 : comm->rank()),
      size_(comm == nullptr ? 1 : comm->size()),
      what_(absl::StrCat("save to \"", directory, "\"")),
      output_(&files_) {}

SaveJob::~SaveJob() {
  if (!committed_) output_.RemoveMade();
}

std::string SaveJob::InDirectory(absl::string_view name) const {
  return JoinFile(directory_, name);
}

absl::Status SaveJob::Begin(const absl::Status& before, const State& state,
                            std::shared_ptr<const SavePlan>* plan) {
  const Catalog& catalog = CatalogOf(state);
  DigestBuilder digest;
  digest.Add(catalog.Fingerprint());
  for (const auto& path : state.tensor_paths) {
    digest.Add(static_cast<int64_t>(path.size()));
    for (const PathSegment& segment : path) {
      std::visit([&digest](const auto& v) { digest.Add(v); }, segment);
    }
  }
  const Digest fingerprint = digest.Finish();
  std::vector<std::string> encoded;
  const absl::Status prepared =
      before.ok() ? Prepare(state, fingerprint, &encoded, plan) : before;
  DigestBuilder all;
  all.Add(directory_).Add(options_.overwrite).Add(fingerprint);
  if (options_.retention.has_value()) {
    all.Add(options_.retention->keep_last).Add(options_.retention->keep_every);
  }
  DSD_RETURN_IF_ERROR(AgreeOnCatalogs(
      comm_, what_, {&catalog}, all.Finish(), prepared,
      [this] {
        return absl::StrCat("directory \"", directory_, "\", overwrite ",
                            options_.overwrite ? "on" : "off");
      },
      deadline_.Left()));
  plan_ = *plan;
  DSD_RETURN_IF_ERROR(ChooseId()) << what_;
  absl::StatusOr<std::vector<size_t>> mine =
      ShareObjects(state, encoded, comm_, deadline_.Left());
  DSD_RETURN_IF_ERROR(mine.status()) << what_;
  for (const size_t i : *mine) {
    objects_.push_back({state.objects[i].path, std::move(encoded[i])});
  }
  return absl::OkStatus();
}

absl::Status SaveJob::Snapshot(Endpoint* tensors,
                               absl::Span<std::byte> memory) {
  in_background_ = true;
  snapshot_ = memory.data();
  for (const Piece& piece : plan_->pieces) {
    DSD_RETURN_IF_ERROR(ReadPiece(
        *tensors, piece, deadline_,
        [&memory](int64_t, int64_t, absl::Span<const std::byte> bytes) {
          std::memcpy(memory.data(), bytes.data(), bytes.size());
          memory.remove_prefix(bytes.size());
          return absl::OkStatus();
        }));
  }
  return absl::OkStatus();
}

absl::StatusOr<SaveReport> SaveJob::Finish(const absl::Status& begun,
                                           Endpoint* tensors) {
  absl::StatusOr<SaveReport> report = WriteAndCommit(begun, tensors);
  if (!committed_) output_.RemoveMade();
  output_.Release();
  return report;
}

absl::StatusOr<SaveReport> SaveJob::WriteAndCommit(const absl::Status& begun,
                                                   Endpoint* tensors) {
  absl::Status local = begun.ok() ? WriteData(tensors) : begun;
  record_.failed = !local.ok();
  absl::StatusOr<std::vector<std::string>> records =
      GatherToRank0(comm_, Encode(record_), CommOptions());
  if (!records.ok()) return Undecided(records.status());
  if (rank_ == 0 && local.ok()) local = Commit(*records);

  // Whether the index of this save is in place decides whether its files stay.
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
  // Before the ranks hear of each other, so that the directory is empty then.
  if (!committed_) RemoveOwnFiles();
  const absl::Status verdict = Agree(
      comm_, what_, Digest(), local, [] { return std::string(); },
      CommOptions());
  if (!verdict.ok()) {
    return committed_
               ? Annotate(verdict,
                          "the checkpoint is in place, but not all of the "
                          "save succeeded")
               : verdict;
  }
  report_.save_id = save_id_;
  report_.tensors = static_cast<int64_t>(plan_->catalog.size());
  report_.payload_bytes = record_.payload_bytes;
  return std::move(report_);
}

CallOptions SaveJob::CommOptions() const {
  CallOptions options = deadline_.Left();
  // An exchange that is cancelled is the end of the communicator, which others
  // use, too: what is cancelled is the writing, and then all ranks hear of it.
  if (in_background_) options.cancel = nullptr;
  return options;
}

absl::Status SaveJob::Prepare(const State& state, const Digest& fingerprint,
                              std::vector<std::string>* encoded,
                              std::shared_ptr<const SavePlan>* plan) {
  if (directory_.empty()) {
    return absl::InvalidArgumentError("the directory is empty");
  }
  DSD_RETURN_IF_ERROR(CheckKeys(state));
  DSD_ASSIGN_OR_RETURN(*encoded, EncodeObjects(state));
  if (*plan == nullptr || (*plan)->fingerprint != fingerprint) {
    auto made = std::make_shared<SavePlan>();
    made->fingerprint = fingerprint;
    made->catalog = CatalogOf(state);
    made->tensor_paths = state.tensor_paths;
    DSD_ASSIGN_OR_RETURN(made->pieces, PlanPieces(state, rank_, size_));
    for (const Piece& piece : made->pieces) {
      made->payload_bytes += piece.box.num_elements() *
                             ItemSize(made->catalog[piece.tensor].dtype);
    }
    *plan = std::move(made);
  }
  if (options_.retention.has_value()) {
    DSD_RETURN_IF_ERROR(ParseStep(directory_).status());
  }
  if (rank_ == 0) DSD_RETURN_IF_ERROR(ClaimDirectory());
  if (!options_.overwrite && files_.Stat(InDirectory(kIndexFile)).ok()) {
    return absl::AlreadyExistsError(absl::StrCat(
        "a checkpoint is there already (\"", InDirectory(kIndexFile),
        "\"); choose another directory or allow overwriting"));
  }
  return absl::OkStatus();
}

// What is there now is what this save replaces. What comes later is not its to
// remove, nor is it, where the storage has locks, that of another save.
absl::Status SaveJob::ClaimDirectory() {
  DSD_RETURN_IF_ERROR(output_.Claim(directory_));
  const absl::StatusOr<std::vector<std::string>> names =
      files_.List(directory_);
  if (!names.ok()) return absl::OkStatus();
  for (const std::string& name : *names) {
    if (IsCheckpointFile(name)) old_files_.push_back(name);
  }
  return absl::OkStatus();
}

absl::Status SaveJob::Broadcast(absl::Span<int64_t> numbers) {
  return comm_->Broadcast(
      absl::MakeSpan(reinterpret_cast<std::byte*>(numbers.data()),
                     numbers.size() * sizeof(int64_t)),
      0, CommOptions());
}

absl::Status SaveJob::ChooseId() {
  int64_t random[] = {static_cast<int64_t>(env_.RandomSeed()),
                      static_cast<int64_t>(env_.RandomSeed())};
  if (comm_ != nullptr && size_ > 1) {
    DSD_RETURN_IF_ERROR(Broadcast(absl::MakeSpan(random)));
  }
  save_id_ = MakeSaveId(random[0], random[1]);
  id_ = FileId(save_id_);
  return absl::OkStatus();
}

absl::Status SaveJob::WriteData(Endpoint* tensors) {
  DSD_RETURN_IF_ERROR(output_.Make(directory_));
  DSD_RETURN_IF_ERROR(deadline_.Check());
  if (objects_.empty() && plan_->pieces.empty()) return absl::OkStatus();
  const std::string path = InDirectory(DataFile(rank_, 0, id_));
  DSD_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file,
                       files_.CreateWritable(path));
  own_files_.push_back(path);
  DataFileWriter out(std::move(file), &env_);
  std::vector<std::string> archives;  // of the objects
  for (const EncodedObject& object : objects_) {
    archives.push_back(dcp::ObjectArchive(object.stored));
  }
  DSD_RETURN_IF_ERROR(out.Expect(LengthOfData(archives)));
  for (size_t i = 0; i < archives.size(); ++i) {
    DSD_RETURN_IF_ERROR(out.PadTo(PlaceOfObject(out.position())));
    record_.objects.push_back(
        {objects_[i].path, dcp::ObjectDigest(objects_[i].stored),
         out.position(), static_cast<int64_t>(archives[i].size())});
    DSD_RETURN_IF_ERROR(out.Append(archives[i]));
  }
  const std::byte* snapshot = snapshot_;
  for (const Piece& piece : plan_->pieces) {
    DSD_RETURN_IF_ERROR(WritePiece(piece, tensors, snapshot, &out));
    if (snapshot != nullptr) snapshot += BytesOf(piece);
  }
  DSD_RETURN_IF_ERROR(out.Finish());
  record_.file_bytes = out.position();
  // The name, for other ranks to see after a crash of this host.
  return files_.SyncDir(directory_);
}

int64_t SaveJob::LengthOfData(const std::vector<std::string>& objects) {
  int64_t end = 0;
  for (const std::string& archive : objects) {
    end = PlaceOfObject(end) + static_cast<int64_t>(archive.size());
  }
  for (const Piece& piece : plan_->pieces) {
    const dcp::TensorArchive& archive =
        archives_.Get(plan_->catalog[piece.tensor].dtype, piece.box.extents());
    end = PlaceOfTensor(end, archive) + archive.total_bytes();
  }
  return end;
}

int64_t SaveJob::BytesOf(const Piece& piece) const {
  return piece.box.num_elements() *
         ItemSize(plan_->catalog[piece.tensor].dtype);
}

absl::Status SaveJob::WritePiece(const Piece& piece, Endpoint* tensors,
                                 const std::byte* snapshot,
                                 DataFileWriter* out) {
  const TensorSpec& spec = plan_->catalog[piece.tensor];
  const int64_t item_size = ItemSize(spec.dtype);
  const dcp::TensorArchive& archive =
      archives_.Get(spec.dtype, piece.box.extents());
  DSD_RETURN_IF_ERROR(out->PadTo(PlaceOfTensor(out->position(), archive)));
  record_.chunks.push_back(
      {piece.tensor, piece.box, out->position(), archive.total_bytes()});
  DSD_RETURN_IF_ERROR(out->Append(archive.head()));
  ContentDigest digest(spec.layout.whole().num_elements() * item_size);
  uint32_t crc = 0;
  const auto write = [&](int64_t begin, int64_t end,
                         absl::Span<const std::byte> bytes) -> absl::Status {
    DSD_RETURN_IF_ERROR(deadline_.Check());
    crc = dcp::Crc32(
        crc, absl::string_view(reinterpret_cast<const char*>(bytes.data()),
                               bytes.size()));
    digest.AddBox(spec.shape(), item_size, piece.box.lo, piece.box.hi, begin,
                  end, bytes);
    DSD_RETURN_IF_ERROR(out->Append(bytes));
    bytes_done_ += static_cast<int64_t>(bytes.size());
    if (options_.call.progress) {
      options_.call.progress({bytes_done_, plan_->payload_bytes});
    }
    return absl::OkStatus();
  };
  DSD_RETURN_IF_ERROR(
      snapshot == nullptr
          ? ReadPiece(*tensors, piece, deadline_, write)
          : ForEachPart(snapshot, piece.box.num_elements(), item_size, write));
  DSD_RETURN_IF_ERROR(out->Append(archive.Tail(crc)));
  record_.payload_bytes += archive.payload_bytes();
  record_.digests.emplace_back(piece.tensor, digest.partial());
  return absl::OkStatus();
}

absl::Status SaveJob::Commit(const std::vector<std::string>& blobs) {
  std::vector<RankRecord> records;
  for (const std::string& blob : blobs) {
    DSD_ASSIGN_OR_RETURN(RankRecord record, Decode(blob, plan_->catalog));
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
  DataFileWriter out(std::move(file), &env_);
  DSD_RETURN_IF_ERROR(out.Append(EncodeDigests(digests)));
  DSD_RETURN_IF_ERROR(out.Finish());

  // All names are on storage before the one that makes them count.
  DSD_RETURN_IF_ERROR(files_.SyncDir(directory_));
  DSD_RETURN_IF_ERROR(output_.Sync());
  const absl::Status renamed =
      files_.Rename(temporary, InDirectory(kIndexFile));
  committed_ = renamed.ok() || IsInPlace(digests, temporary);
  DSD_RETURN_IF_ERROR(renamed);
  DSD_RETURN_IF_ERROR(files_.SyncDir(directory_));
  RemoveOldFiles();
  if (!options_.retention.has_value()) return absl::OkStatus();
  DSD_ASSIGN_OR_RETURN(const StepName step, ParseStep(directory_));
  DSD_RETURN_IF_ERROR(PointToLatest(step, id_, files_));
  DSD_ASSIGN_OR_RETURN(report_.pruned,
                       PruneOlder(step, *options_.retention, files_));
  return absl::OkStatus();
}

// Rank 0 sees every file as its writer does, or they are not in one place.
absl::Status SaveJob::CheckFiles(const std::vector<RankRecord>& records,
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
          "\" must be one directory shared by all ranks, with one save at a "
          "time"));
    }
    file_of_rank_[rank] = static_cast<uint32_t>(index->files.size());
    index->files.push_back(name);
    report_.file_bytes_all += expected;
  }
  return absl::OkStatus();
}

absl::Status SaveJob::FillIndex(const std::vector<RankRecord>& records,
                                dcp::Metadata* index, StoredDigests* digests) {
  struct Place {
    const ChunkRecord* chunk;
    uint32_t file;
  };
  std::vector<std::vector<Place>> places(plan_->catalog.size());
  std::vector<ContentDigest> sums;
  for (const TensorSpec& spec : plan_->catalog.tensors()) {
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
  for (size_t i = 0; i < plan_->catalog.size(); ++i) {
    const TensorSpec& spec = plan_->catalog[i];
    index->AddTensor(
        spec.fqn,
        plan_->tensor_paths.empty() ? Path{spec.fqn} : plan_->tensor_paths[i],
        spec.dtype, spec.shape());
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

absl::Status SaveJob::WriteIndex(const dcp::Metadata& index,
                                 const std::string& path,
                                 StoredDigests* digests) {
  DSD_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file,
                       files_.CreateWritable(path));
  own_files_.push_back(path);
  DataFileWriter out(std::move(file), &env_);
  absl::crc32c_t crc{0};
  DSD_RETURN_IF_ERROR(dcp::EncodeMetadata(index, [&](absl::string_view bytes) {
    crc = absl::ExtendCrc32c(crc, bytes);
    return out.Append(bytes);
  }));
  digests->index_bytes = out.position();
  digests->index_crc = static_cast<uint32_t>(crc);
  return out.Finish();
}

bool SaveJob::IsInPlace(const StoredDigests& digests,
                        const std::string& temporary) {
  const auto read = [&]() -> absl::StatusOr<uint32_t> {
    DSD_ASSIGN_OR_RETURN(const std::unique_ptr<ReadableFile> file,
                         files_.OpenReadable(InDirectory(kIndexFile)));
    if (file->size_bytes() != digests.index_bytes) return ~digests.index_crc;
    std::string bytes(digests.index_bytes, '\0');
    DSD_RETURN_IF_ERROR(file->ReadAt(
        0, absl::MakeSpan(reinterpret_cast<std::byte*>(bytes.data()),
                          bytes.size())));
    return static_cast<uint32_t>(absl::ComputeCrc32c(bytes));
  };
  const absl::StatusOr<uint32_t> crc = read();
  if (crc.ok()) return *crc == digests.index_crc;
  if (absl::IsNotFound(crc.status())) return false;
  // It does not say. If the temporary name is gone, files may be in use.
  return absl::IsNotFound(files_.Stat(temporary).status());
}

void SaveJob::RemoveOldFiles() {
  for (const std::string& name : old_files_) {
    const absl::Status removed = files_.Remove(InDirectory(name));
    if (!removed.ok() && !absl::IsNotFound(removed)) {
      report_.leftovers.push_back(name);
    }
  }
}

void SaveJob::RemoveOwnFiles() {
  for (const std::string& path : own_files_) {
    files_.Remove(path).IgnoreError();
  }
}

// The ranks lost each other. Rank 0 knows whether it has committed; the
// others know only that it did not if they failed themselves.
absl::Status SaveJob::Undecided(const absl::Status& status) {
  if ((rank_ == 0 || record_.failed) && !committed_) RemoveOwnFiles();
  return Annotate(
      status,
      absl::StrCat(what_, rank_ == 0
                              ? (committed_ ? " (done, the checkpoint is in "
                                              "place)"
                                            : " (not done)")
                              : " (rank 0 may have finished it or not)"));
}

absl::StatusOr<SaveReport> Save(const std::string& directory,
                                const State& state, Communicator* comm,
                                const SaveOptions& options) {
  SaveJob job(directory, comm, options);
  std::shared_ptr<const SavePlan> plan;
  DSD_RETURN_IF_ERROR(job.Begin(absl::OkStatus(), state, &plan));
  return job.Finish(absl::OkStatus(), state.tensors);
}

}  // namespace dsd::checkpoint
