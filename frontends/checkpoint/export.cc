// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/export.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/plan/plan.h"
#include "dsd/core/transfer/agree_on_catalogs.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/data_file_writer.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"
#include "dsd/frontends/checkpoint/export_file.h"
#include "dsd/frontends/checkpoint/file_names.h"
#include "dsd/frontends/checkpoint/live_state.h"
#include "dsd/frontends/checkpoint/output_directory.h"
#include "dsd/frontends/checkpoint/patient_endpoint.h"
#include "dsd/frontends/checkpoint/record_codec.h"
#include "dsd/frontends/checkpoint/safetensors/header.h"
#include "dsd/frontends/checkpoint/safetensors/index.h"
#include "dsd/frontends/checkpoint/torch_archive/archive_writer.h"

namespace dsd::checkpoint {
namespace {

// What a rank gathers before it writes it.
constexpr int64_t kWindowBytes = int64_t{32} << 20;

constexpr char kWholeModel[] = "model.safetensors";
constexpr char kModelIndex[] = "model.safetensors.index.json";

// Whether exports give this name to a file of a directory; `*has_id`: nobody
// else does.
bool IsModelFile(absl::string_view name, bool* has_id) {
  constexpr size_t kIdSize = 16;
  *has_id = false;
  if (!absl::ConsumePrefix(&name, "model") ||
      !absl::ConsumeSuffix(&name, kSafetensorsSuffix)) {
    return false;
  }
  if (name.size() > kIdSize && name[0] == '-' &&
      FileId(name.substr(1, kIdSize)) == name.substr(1, kIdSize)) {
    *has_id = true;
    name.remove_prefix(1 + kIdSize);
  }
  if (name.empty()) return true;
  const auto is_number = [](absl::string_view text) {
    return text.size() >= 5 &&
           text.find_first_not_of("0123456789") == absl::string_view::npos;
  };
  const std::vector<absl::string_view> words = absl::StrSplit(name, '-');
  return words.size() == 4 && words[0].empty() && is_number(words[1]) &&
         words[2] == "of" && is_number(words[3]);
}

// One file of an export.
struct OutputFile {
  std::string name;  // in the directory
  int rank = 0;      // that writes it
  std::vector<size_t> tensors;
  int64_t file_bytes = 0;  // once it is written, on that rank
};

// Elements [begin, end) of a tensor, counted row-major over all of it.
struct Part {
  size_t file;
  size_t tensor;
  int64_t begin;
  int64_t end;
  int64_t num_elements;  // of the tensor
};

// The parts of one rank's files, in the order in which they are written.
class PartStream {
 public:
  PartStream(const std::vector<OutputFile>& files, const Catalog& catalog,
             int rank)
      : files_(files), catalog_(catalog), rank_(rank) {
    SkipFiles();
  }

  // Elements of at most kWindowBytes; none at the end. Of a tensor for which
  // `alone` holds: all of it, and nothing else.
  template <class Alone>
  std::vector<Part> Next(Alone alone) {
    std::vector<Part> parts;
    int64_t left = kWindowBytes;
    while (file_ < files_.size() && left >= kLargestItemBytes) {
      const size_t tensor = files_[file_].tensors[at_];
      const TensorSpec& spec = catalog_[tensor];
      const int64_t item_size = ItemSize(spec.dtype);
      Part part{file_, tensor, element_, 0, spec.layout.whole().num_elements()};
      if (alone(tensor)) {
        if (!parts.empty()) break;
        part.end = part.num_elements;
        left = 0;
      } else {
        part.end = std::min(part.num_elements, part.begin + left / item_size);
        left -= (part.end - part.begin) * item_size;
      }
      element_ = part.end;
      if (element_ == part.num_elements) {
        element_ = 0;
        if (++at_ == files_[file_].tensors.size()) {
          at_ = 0;
          ++file_;
          SkipFiles();
        }
      }
      parts.push_back(part);
    }
    return parts;
  }

 private:
  void SkipFiles() {
    while (file_ < files_.size() &&
           (files_[file_].rank != rank_ || files_[file_].tensors.empty())) {
      ++file_;
    }
  }

  const std::vector<OutputFile>& files_;
  const Catalog& catalog_;
  const int rank_;
  size_t file_ = 0;
  size_t at_ = 0;
  int64_t element_ = 0;
};

class Exporter {
 public:
  Exporter(const std::string& path, Format format, const State& state,
           Communicator* comm, const ExportOptions& options)
      : path_(path),
        format_(format),
        state_(state),
        catalog_(CatalogOf(state)),
        comm_(comm),
        options_(options),
        env_(*ChooseEnv(options.env, comm)),
        fs_(env_.files()),
        deadline_(&env_, options.call),
        rank_(comm == nullptr ? 0 : comm->rank()),
        size_(comm == nullptr ? 1 : comm->size()),
        what_(absl::StrCat("export to \"", path, "\"")),
        output_(&fs_) {}

  absl::StatusOr<SaveReport> Run() {
    absl::StatusOr<SaveReport> report = WriteAndCommit();
    if (!committed_) output_.RemoveMade();
    return report;
  }

 private:
  absl::StatusOr<SaveReport> WriteAndCommit() {
    const absl::Status prepared = Prepare();
    DSD_RETURN_IF_ERROR(AgreeOnCatalogs(
        comm_, what_, {&catalog_}, Fingerprint(), prepared,
        [this] { return Describe(); }, deadline_.Left()));
    DSD_RETURN_IF_ERROR(ChooseId()) << what_;
    DSD_RETURN_IF_ERROR(GatherObjects()) << what_;
    absl::Status local = MakeDirectories();
    WriteTensors(&local);
    if (!lost_.ok()) return Undecided(lost_);

    RecordWriter mine;
    mine.Number(!local.ok());
    mine.Number(payload_bytes_);
    for (const OutputFile& file : files_) {
      if (file.rank == rank_) mine.Number(file.file_bytes);
    }
    const absl::StatusOr<std::vector<std::string>> records =
        GatherToRank0(comm_, mine.Take(), deadline_.Left());
    if (!records.ok()) return Undecided(records.status());
    if (rank_ == 0 && local.ok()) local = Commit(*records);

    int64_t outcome[] = {committed_, report_.payload_bytes_all,
                         report_.file_bytes_all};
    if (size_ > 1) {
      const absl::Status told =
          comm_->Broadcast(absl::MakeSpan(reinterpret_cast<std::byte*>(outcome),
                                          sizeof(outcome)),
                           0, deadline_.Left());
      if (!told.ok()) return Undecided(told);
    }
    committed_ = outcome[0] != 0;
    // Before the ranks hear of each other, so that the directory is empty then.
    if (!committed_) RemoveOwn();
    const absl::Status verdict = Agree(
        comm_, what_, Digest(), local, [] { return std::string(); },
        deadline_.Left());
    if (!verdict.ok()) {
      return committed_ ? Annotate(verdict,
                                   "the export is in place, but not all of it "
                                   "succeeded")
                        : verdict;
    }
    report_.save_id = save_id_;
    report_.tensors = report_.chunks = static_cast<int64_t>(catalog_.size());
    report_.payload_bytes = payload_bytes_;
    report_.payload_bytes_all = outcome[1];
    report_.file_bytes_all = outcome[2];
    return std::move(report_);
  }

  std::string Final(absl::string_view name) const {
    return JoinFile(directory_, name);
  }
  std::string Temporary(absl::string_view name) const {
    return JoinFile(directory_, TemporaryFile(name, id_));
  }

  // Everything that can fail without having written anything but the directory.
  absl::Status Prepare() {
    if (path_.empty()) return absl::InvalidArgumentError("the path is empty");
    DSD_RETURN_IF_ERROR(CheckKeys(state_));
    DSD_ASSIGN_OR_RETURN(encoded_, EncodeObjects(state_));
    single_ = format_ == Format::kTorchArchive ||
              absl::EndsWith(path_, kSafetensorsSuffix);
    directory_ = single_ ? ParentOf(path_) : path_;
    if (single_ && LastPart(path_).empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", path_, "\" has no name of a file at its end"));
    }
    switch (format_) {
      case Format::kDcp:
        return absl::InvalidArgumentError("a DCP checkpoint is made by Save");
      case Format::kSafetensors:
        DSD_RETURN_IF_ERROR(CheckForSafetensors());
        break;
      case Format::kTorchArchive:
        break;
    }
    DSD_RETURN_IF_ERROR(LookAtTarget());
    PlanFiles();
    return absl::OkStatus();
  }

  absl::Status CheckForSafetensors() {
    std::vector<std::string> objects, tensors;
    for (const ObjectEntry& object : state_.objects) {
      objects.push_back(JoinPath(object.path));
    }
    for (const TensorSpec& spec : catalog_.tensors()) {
      const bool no_pair =
          spec.dtype == DType::kFloat4E2M1FNX2 && spec.shape().empty();
      if (safetensors::NameOfDType(spec.dtype).empty() || no_pair) {
        tensors.push_back(absl::StrCat(spec.fqn, ": ", DTypeName(spec.dtype)));
      }
    }
    if (!objects.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("safetensors files have no place for objects: ",
                       ListKeys(std::move(objects))));
    }
    if (!tensors.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("safetensors files have no form for these dtypes: ",
                       ListKeys(std::move(tensors))));
    }
    for (const auto& [key, value] : options_.attributes) {
      if (!dcp::IsUtf8(key) || !dcp::IsUtf8(value)) {
        return absl::InvalidArgumentError(absl::StrCat(
            "attribute \"", absl::CHexEscape(key), "\" is not UTF-8"));
      }
      if (key == kSaveIdAttribute || key == kDigestsAttribute) {
        return absl::InvalidArgumentError(absl::StrCat(
            "attribute \"", key, "\" is written by dsd itself; leave it out"));
      }
    }
    return absl::OkStatus();
  }

  // What is at the path already.
  absl::Status LookAtTarget() {
    const absl::StatusOr<FileInfo> info = fs_.Stat(path_);
    if (!info.ok() && !absl::IsNotFound(info.status())) return info.status();
    const auto taken = [&](absl::string_view what) {
      return absl::AlreadyExistsError(
          absl::StrCat(what, " is there already (\"", path_,
                       "\"); choose another path or allow overwriting"));
    };
    if (single_) {
      if (info.ok() && info->kind == FileKind::kDirectory) {
        return absl::FailedPreconditionError(absl::StrCat(
            "\"", path_, "\" is a directory, expected the name of a file"));
      }
      if (info.ok() && !options_.overwrite) return taken("a file");
      if (rank_ == 0) DSD_RETURN_IF_ERROR(output_.Make(directory_));
    } else {
      if (info.ok() && info->kind == FileKind::kRegular) {
        return absl::FailedPreconditionError(
            absl::StrCat("\"", path_,
                         "\" is a file, expected a directory, or a name that "
                         "ends in ",
                         kSafetensorsSuffix));
      }
      if (rank_ == 0) DSD_RETURN_IF_ERROR(output_.Claim(directory_));
    }
    if (single_ && rank_ != 0) return absl::OkStatus();
    const absl::StatusOr<std::vector<std::string>> names = fs_.List(directory_);
    if (!names.ok()) return absl::OkStatus();
    // Those that come later are of exports under way.
    for (const std::string& name : *names) {
      if (!NameOfTemporary(name).empty()) old_temporaries_.push_back(name);
    }
    if (single_) return absl::OkStatus();
    for (const std::string& name : *names) {
      if (name == kIndexFile) {
        return absl::FailedPreconditionError(absl::StrCat(
            "\"", path_, "\" has a DCP checkpoint; choose another directory"));
      }
      has_old_index_ |= name == kModelIndex;
      if (name[0] != '.' && name != kModelIndex &&
          (absl::EndsWith(name, kSafetensorsSuffix) ||
           absl::EndsWith(name, kSafetensorsIndexSuffix))) {
        taken_.insert(name);
      }
    }
    if ((has_old_index_ || !taken_.empty()) && !options_.overwrite) {
      return taken("a checkpoint");
    }
    return has_old_index_ ? FindOldOfIndex() : FindOldWithoutIndex();
  }

  // A directory is what its index names: other files are not of this model.
  absl::Status FindOldOfIndex() {
    const auto read = [this]() -> absl::StatusOr<safetensors::Index> {
      DSD_ASSIGN_OR_RETURN(
          const std::string text,
          ReadWhole(fs_, Final(kModelIndex), safetensors::kMaxIndexBytes));
      return safetensors::ParseIndex(text);
    };
    const absl::StatusOr<safetensors::Index> index = read();
    if (!index.ok()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "which files \"", Final(kModelIndex),
          "\" names, to be replaced, is not known (", index.status().message(),
          "); remove it or choose another directory"));
    }
    absl::flat_hash_set<absl::string_view> named;
    for (const auto& [key, file] : index->weight_map) named.insert(file);
    for (const std::string& name : taken_) {
      // With an id it was left by an export that was interrupted.
      bool has_id;
      if (named.contains(name) || (IsModelFile(name, &has_id) && has_id)) {
        old_files_.push_back(name);
      }
    }
    return absl::OkStatus();
  }

  absl::Status FindOldWithoutIndex() {
    std::vector<std::string> others;
    for (const std::string& name : taken_) {
      bool has_id;
      (IsModelFile(name, &has_id) ? old_files_ : others).push_back(name);
    }
    if (others.empty()) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat(
        "\"", path_, "\" has no ", kModelIndex,
        ", which would say what to replace, and files of other names: ",
        ListKeys(std::move(others)), "; choose another directory"));
  }

  int64_t BytesOf(size_t tensor) const {
    const TensorSpec& spec = catalog_[tensor];
    return spec.layout.whole().num_elements() * ItemSize(spec.dtype);
  }

  // The tensor whose elements are written for tensor i.
  size_t FirstOf(size_t i) const {
    const bool once =
        format_ == Format::kTorchArchive && !state_.same_as.empty();
    return once ? state_.same_as[i] : i;
  }

  // The same on all ranks, but for names.
  void PlanFiles() {
    files_.emplace_back();
    int64_t bytes = 0;
    for (size_t i = 0; i < catalog_.size(); ++i) {
      if (FirstOf(i) != i) continue;
      if (!single_ && bytes > 0 &&
          bytes + BytesOf(i) > options_.max_file_bytes) {
        files_.emplace_back();
        bytes = 0;
      }
      files_.back().tensors.push_back(i);
      bytes += BytesOf(i);
    }
    for (size_t i = 0; i < files_.size(); ++i) {
      files_[i].rank = static_cast<int>(i % static_cast<size_t>(size_));
      for (const size_t tensor : files_[i].tensors) {
        if (files_[i].rank == rank_) bytes_total_ += BytesOf(tensor);
      }
      if (format_ != Format::kSafetensors) continue;
      // So that elements are aligned.
      std::stable_sort(files_[i].tensors.begin(), files_[i].tensors.end(),
                       [this](size_t a, size_t b) {
                         return ItemSize(catalog_[a].dtype) >
                                ItemSize(catalog_[b].dtype);
                       });
    }
  }

  // New names beside old ones, so that the old files stay until the index
  // changes.
  void NameFiles() {
    with_index_ = !single_ && (files_.size() > 1 || has_old_index_);
    for (const std::string& name : old_files_) {
      with_index_ |= name != kWholeModel;
    }
    for (const bool with_id : {false, true}) {
      bool clash = false;
      for (size_t i = 0; i < files_.size(); ++i) {
        std::string& name = files_[i].name;
        const std::string id = with_id ? absl::StrCat("-", id_) : "";
        if (single_) {
          name = std::string(LastPart(path_));
        } else if (files_.size() == 1) {
          name = absl::StrCat("model", id, kSafetensorsSuffix);
        } else {
          name = absl::StrFormat("model%s-%05d-of-%05d%s", id, i + 1,
                                 files_.size(), kSafetensorsSuffix);
        }
        clash |= with_index_ && taken_.count(name) > 0;
      }
      if (!clash) return;
    }
  }

  Digest Fingerprint() const {
    DigestBuilder digest;
    digest.Add(path_)
        .Add(FormatName(format_))
        .Add(options_.overwrite)
        .Add(options_.max_file_bytes)
        .Add(catalog_.Fingerprint());
    for (const auto& [key, value] : options_.attributes) {
      digest.Add(key).Add(value);
    }
    for (const size_t first : state_.same_as) {
      digest.Add(static_cast<int64_t>(first));
    }
    return digest.Finish();
  }

  std::string Describe() const {
    return absl::StrCat("path \"", path_, "\", format ", FormatName(format_),
                        ", overwrite ", options_.overwrite ? "on" : "off",
                        ", files of ", options_.max_file_bytes, " bytes");
  }

  absl::Status ChooseId() {
    int64_t random[] = {static_cast<int64_t>(env_.RandomSeed()),
                        static_cast<int64_t>(env_.RandomSeed())};
    if (size_ > 1) {
      DSD_RETURN_IF_ERROR(comm_->Broadcast(
          absl::MakeSpan(reinterpret_cast<std::byte*>(random), sizeof(random)),
          0, deadline_.Left()));
    }
    save_id_ = MakeSaveId(random[0], random[1]);
    id_ = FileId(save_id_);
    return absl::OkStatus();
  }

  // For an archive, in which rank 0 writes all of them. All ranks get an error.
  absl::Status GatherObjects() {
    DSD_ASSIGN_OR_RETURN(
        const std::vector<size_t> mine,
        ShareObjects(state_, encoded_, comm_, deadline_.Left()));
    RecordWriter out;
    for (const size_t i : mine) {
      out.PutPath(state_.objects[i].path);
      out.Text(encoded_[i]);
    }
    DSD_ASSIGN_OR_RETURN(const std::vector<std::string> records,
                         GatherToRank0(comm_, out.Take(), deadline_.Left()));
    for (const std::string& record : records) {
      RecordReader in(record);
      while (!in.done()) {
        Path path = in.GetPath();
        const absl::string_view stored = in.Text();
        DSD_RETURN_IF_ERROR(in.status());
        DSD_ASSIGN_OR_RETURN(dcp::ObjectItem item,
                             dcp::DecodeStoredObject(stored));
        objects_.push_back({std::move(path), std::move(item.value)});
      }
    }
    report_.objects = static_cast<int64_t>(objects_.size());
    return absl::OkStatus();
  }

  absl::Status MakeDirectories() {
    NameFiles();
    return output_.Make(directory_);
  }

  absl::StatusOr<std::unique_ptr<FileFrame>> MakeFrame(const OutputFile& file) {
    if (format_ == Format::kSafetensors) {
      safetensors::Header header;
      header.metadata = options_.attributes;
      if (with_index_) {
        header.metadata.emplace_back(kSaveIdAttribute, save_id_);
      }
      int64_t end = 0;
      for (const size_t i : file.tensors) {
        const TensorSpec& spec = catalog_[i];
        safetensors::HeaderTensor tensor;
        tensor.name = spec.fqn;
        tensor.dtype = spec.dtype;
        tensor.shape = spec.shape();
        tensor.begin_bytes = end;
        end += BytesOf(i);
        tensor.end_bytes = end;
        header.tensors.push_back(std::move(tensor));
      }
      return MakeSafetensorsFrame(std::move(header));
    }
    std::vector<torch_archive::NewTensor> tensors;
    for (size_t i = 0; i < catalog_.size(); ++i) {
      const int64_t first = static_cast<int64_t>(FirstOf(i));
      tensors.push_back({TensorPath(state_, i), catalog_[i].dtype,
                         catalog_[i].shape(),
                         first == static_cast<int64_t>(i) ? -1 : first});
    }
    DSD_ASSIGN_OR_RETURN(
        torch_archive::Tree tree,
        torch_archive::EncodeTree(tensors, objects_, state_.nesting));
    return MakeArchiveFrame(std::move(tree));
  }

  // Whether this rank, alone, reads the tensor front to back.
  bool IsDirect(size_t tensor) const {
    if (size_ > 1) return false;
    const Layout& layout = catalog_[tensor].layout;
    for (const Holder holder : {Holder{0}, Holder{kAnyHolder}}) {
      const std::vector<LocalBox> boxes = layout.BoxesOf(holder);
      if (boxes.size() == 1 && boxes[0].box == layout.whole()) return true;
    }
    return false;
  }

  // All of this rank's files, and its part in those of others. Goes on with
  // what others wait for after an error.
  void WriteTensors(absl::Status* local) {
    std::vector<PartStream> streams;
    for (int rank = 0; rank < size_; ++rank) {
      streams.emplace_back(files_, catalog_, rank);
    }
    const auto alone = [this](size_t tensor) { return IsDirect(tensor); };
    std::unique_ptr<PatientEndpoint> source;
    if (state_.tensors != nullptr) {
      source = std::make_unique<PatientEndpoint>(state_.tensors);
    }
    while (true) {
      std::vector<std::vector<Part>> windows;
      bool any = false;
      for (PartStream& stream : streams) {
        windows.push_back(stream.Next(alone));
        any |= !windows.back().empty();
      }
      if (!any) break;
      const std::vector<Part>& mine = windows[rank_];
      if (mine.size() == 1 && alone(mine[0].tensor)) {
        KeepFirst(WriteDirectly(mine[0]), local);
      } else {
        lost_ = GatherWindow(windows, *source);
        if (!lost_.ok()) return;
        KeepFirst(source->status(), local);
        if (local->ok()) *local = WriteWindow(mine);
      }
      // Alone, nobody waits.
      if (size_ == 1 && !local->ok()) break;
    }
    for (size_t i = 0; i < files_.size() && local->ok(); ++i) {
      const bool empty = files_[i].rank == rank_ && files_[i].tensors.empty();
      if (!empty) continue;
      *local = OpenFile(i);
      if (local->ok()) *local = CloseFile();
    }
    out_.reset();
  }

  static void KeepFirst(const absl::Status& status, absl::Status* first) {
    if (first->ok()) *first = status;
  }

  // Elements of all ranks' windows to where they are written.
  absl::Status GatherWindow(const std::vector<std::vector<Part>>& windows,
                            Endpoint& source) {
    MemoryEndpoint target;
    TensorPairs pairs;
    int64_t at = 0;
    for (const Part& part : windows[rank_]) {
      at += (part.end - part.begin) * ItemSize(catalog_[part.tensor].dtype);
    }
    if (static_cast<int64_t>(window_.size()) < at) window_.resize(at);
    at = 0;
    for (int rank = 0; rank < size_; ++rank) {
      for (const Part& part : windows[rank]) {
        if (part.begin == part.end) continue;
        const TensorSpec& spec = catalog_[part.tensor];
        DSD_ASSIGN_OR_RETURN(Layout layout,
                             Layout::FromFlatIntervals(
                                 spec.shape(), {{rank, part.begin, part.end}}));
        TensorSpec wanted{spec.fqn, spec.dtype, std::move(layout)};
        pairs.emplace_back(part.tensor, target.catalog().size());
        if (rank == rank_) {
          DSD_RETURN_IF_ERROR(
              target.AddLocal(std::move(wanted), rank, window_.data() + at));
          at += (part.end - part.begin) * ItemSize(spec.dtype);
        } else {
          DSD_RETURN_IF_ERROR(target.Add(std::move(wanted), {}));
        }
      }
    }
    const Binding binding = BindRanks(comm_);
    DSD_ASSIGN_OR_RETURN(const Plan plan,
                         PlanForRank(rank_, catalog_, target.catalog(), pairs,
                                     binding, binding));
    TransferOptions transfer;
    transfer.call = deadline_.Left();
    return Transfer(plan, source, target, comm_, transfer).status();
  }

  absl::Status WriteWindow(const std::vector<Part>& parts) {
    int64_t at = 0;
    for (const Part& part : parts) {
      const int64_t bytes =
          (part.end - part.begin) * ItemSize(catalog_[part.tensor].dtype);
      if (part.begin == 0) DSD_RETURN_IF_ERROR(StartTensor(part));
      DSD_RETURN_IF_ERROR(
          Append(absl::MakeConstSpan(window_).subspan(at, bytes)));
      at += bytes;
      if (part.end == part.num_elements) {
        DSD_RETURN_IF_ERROR(FinishTensor(part));
      }
    }
    return absl::OkStatus();
  }

  absl::Status WriteDirectly(const Part& part) {
    DSD_RETURN_IF_ERROR(StartTensor(part));
    const Piece piece{part.tensor, Box::Whole(catalog_[part.tensor].shape())};
    DSD_RETURN_IF_ERROR(
        ReadPiece(*state_.tensors, piece, deadline_,
                  [this](int64_t, int64_t, absl::Span<const std::byte> bytes) {
                    return Append(bytes);
                  }));
    return FinishTensor(part);
  }

  absl::Status OpenFile(size_t file) {
    DSD_ASSIGN_OR_RETURN(std::unique_ptr<FileFrame> frame,
                         MakeFrame(files_[file]));
    const std::string path = Temporary(files_[file].name);
    DSD_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> writable,
                         fs_.CreateWritable(path));
    own_files_.push_back(path);
    int64_t bytes = 0;
    for (const size_t i : files_[file].tensors) bytes += BytesOf(i);
    DSD_ASSIGN_OR_RETURN(
        out_,
        ExportFile::Start(std::move(frame), std::move(writable), bytes, &env_));
    open_file_ = file;
    return absl::OkStatus();
  }

  absl::Status CloseFile() {
    for (size_t i = 0; i < catalog_.size(); ++i) {
      if (FirstOf(i) != i) {
        out_->AddSame(catalog_[i].fqn, catalog_[FirstOf(i)].fqn);
      }
    }
    DSD_ASSIGN_OR_RETURN(files_[open_file_].file_bytes, out_->Finish());
    out_.reset();
    return absl::OkStatus();
  }

  absl::Status StartTensor(const Part& part) {
    if (out_ == nullptr) DSD_RETURN_IF_ERROR(OpenFile(part.file));
    return out_->StartTensor(BytesOf(part.tensor));
  }

  absl::Status Append(absl::Span<const std::byte> bytes) {
    DSD_RETURN_IF_ERROR(deadline_.Check());
    DSD_RETURN_IF_ERROR(out_->Append(bytes));
    payload_bytes_ += static_cast<int64_t>(bytes.size());
    if (options_.call.progress) {
      options_.call.progress({payload_bytes_, bytes_total_});
    }
    return absl::OkStatus();
  }

  absl::Status FinishTensor(const Part& part) {
    DSD_RETURN_IF_ERROR(out_->FinishTensor(catalog_[part.tensor]));
    return part.tensor == files_[part.file].tensors.back() ? CloseFile()
                                                           : absl::OkStatus();
  }

  // Rank 0, when all files are on storage under their temporary names.
  absl::Status Commit(const std::vector<std::string>& records) {
    for (int rank = 0; rank < size_; ++rank) {
      RecordReader in(records[rank]);
      // That rank's error is everybody's.
      if (in.Number() != 0) return absl::OkStatus();
      report_.payload_bytes_all += in.Number();
      for (OutputFile& file : files_) {
        if (file.rank == rank) file.file_bytes = in.Number();
      }
      DSD_RETURN_IF_ERROR(in.status());
    }
    for (const OutputFile& file : files_) {
      const absl::StatusOr<FileInfo> info = fs_.Stat(Temporary(file.name));
      if (!info.ok() || info->size_bytes != file.file_bytes) {
        return absl::FailedPreconditionError(absl::StrCat(
            "rank 0 does not see the ", file.file_bytes, " bytes of \"",
            Final(file.name), "\" that rank ", file.rank, " wrote: \"",
            directory_,
            "\" must be one directory shared by all ranks, with one save at a "
            "time"));
      }
      report_.file_bytes_all += file.file_bytes;
    }
    if (with_index_) {
      DSD_RETURN_IF_ERROR(KeepOld());
      DSD_RETURN_IF_ERROR(WriteIndex(MakeIndex()));
    }
    DSD_RETURN_IF_ERROR(fs_.SyncDir(directory_));
    DSD_RETURN_IF_ERROR(output_.Sync());
    for (const OutputFile& file : files_) {
      DSD_RETURN_IF_ERROR(Rename(file.name, !with_index_));
    }
    if (with_index_) {
      // The files' names are on storage before what makes them count.
      DSD_RETURN_IF_ERROR(fs_.SyncDir(directory_));
      DSD_RETURN_IF_ERROR(Rename(kModelIndex, true));
    }
    DSD_RETURN_IF_ERROR(fs_.SyncDir(directory_));
    RemoveOld();
    return absl::OkStatus();
  }

  // Old files without an index get one, or new files would count with them
  // before they are complete.
  absl::Status KeepOld() {
    if (has_old_index_ || old_files_.empty()) return absl::OkStatus();
    OpenOptions open;
    open.env = &env_;
    const auto old = Checkpoint::Open(path_, open);
    // What cannot be read need not stay readable.
    if (!old.ok()) return absl::OkStatus();
    safetensors::Index index;
    for (size_t i = 0; i < (*old)->catalog().size(); ++i) {
      const std::vector<StoredChunk> chunks = (*old)->Chunks(i);
      // An index has no form for a tensor in several files.
      if (chunks.size() != 1) return absl::OkStatus();
      index.weight_map.emplace_back((*old)->catalog()[i].fqn, chunks[0].file);
    }
    DSD_RETURN_IF_ERROR(WriteIndex(index));
    DSD_RETURN_IF_ERROR(fs_.Rename(Temporary(kModelIndex), Final(kModelIndex)));
    return fs_.SyncDir(directory_);
  }

  // Whether a rename that reported an error has changed names all the same.
  bool HasHappened(const std::string& name, const absl::Status& error) {
    if (!absl::IsNotFound(fs_.Stat(Temporary(name)).status())) return false;
    // Another export may have removed the temporary name.
    if (name != kModelIndex) return !absl::IsNotFound(error);
    const absl::StatusOr<std::string> there =
        ReadWhole(fs_, Final(name), safetensors::kMaxIndexBytes);
    if (there.ok()) return *there == index_text_;
    return !absl::IsNotFound(there.status());
  }

  // `commits`: what is renamed counts from then on.
  absl::Status Rename(const std::string& name, bool commits) {
    const absl::Status renamed = fs_.Rename(Temporary(name), Final(name));
    const bool happened = renamed.ok() || HasHappened(name, renamed);
    if (happened && !commits) own_files_.push_back(Final(name));
    committed_ |= happened && commits;
    return renamed;
  }

  safetensors::Index MakeIndex() const {
    safetensors::Index index;
    for (const OutputFile& file : files_) {
      for (const size_t i : file.tensors) {
        index.weight_map.emplace_back(catalog_[i].fqn, file.name);
      }
    }
    return index;
  }

  absl::Status WriteIndex(const safetensors::Index& index) {
    const std::string path = Temporary(kModelIndex);
    DSD_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file,
                         fs_.CreateWritable(path));
    own_files_.push_back(path);
    DataFileWriter out(std::move(file), &env_);
    index_text_ = safetensors::EncodeIndex(index, report_.payload_bytes_all);
    DSD_RETURN_IF_ERROR(out.Append(index_text_));
    return out.Finish();
  }

  // Files that were replaced, and what interrupted exports left.
  void RemoveOld() {
    absl::flat_hash_set<std::string> current;
    for (const OutputFile& file : files_) current.insert(file.name);
    if (with_index_) current.insert(kModelIndex);
    const auto remove = [this](const std::string& name) {
      if (!fs_.Remove(Final(name)).ok()) report_.leftovers.push_back(name);
    };
    for (const std::string& name : old_files_) {
      if (!current.contains(name)) remove(name);
    }
    for (const std::string& name : old_temporaries_) {
      const absl::string_view of = NameOfTemporary(name);
      if (current.contains(of) || (!single_ && absl::StartsWith(of, "model-") &&
                                   absl::EndsWith(of, kSafetensorsSuffix))) {
        remove(name);
      }
    }
  }

  void RemoveOwn() {
    for (const std::string& path : own_files_) fs_.Remove(path).IgnoreError();
  }

  // The ranks lost each other. Rank 0 knows whether it has committed.
  absl::Status Undecided(const absl::Status& status) {
    if (rank_ == 0 && !committed_) RemoveOwn();
    return Annotate(
        status,
        absl::StrCat(what_, rank_ == 0
                                ? (committed_ ? " (done, it is in place)"
                                              : " (not done)")
                                : " (rank 0 may have finished it or not)"));
  }

  const std::string path_;
  const Format format_;
  const State& state_;
  const Catalog& catalog_;
  Communicator* const comm_;
  const ExportOptions& options_;
  Env& env_;
  FileSystem& fs_;
  const Deadline deadline_;
  const int rank_;
  const int size_;
  const std::string what_;

  std::vector<std::string> encoded_;
  bool single_ = false;  // a file, not a directory
  std::string directory_;
  OutputDirectory output_;
  std::set<std::string> taken_;               // names of files that are there
  std::vector<std::string> old_files_;        // ... which are replaced
  std::vector<std::string> old_temporaries_;  // on rank 0
  std::string index_text_;                    // the one written last
  bool has_old_index_ = false;
  bool with_index_ = false;
  std::vector<OutputFile> files_;
  std::string save_id_;
  std::string id_;
  std::vector<torch_archive::NewObject> objects_;  // rank 0
  absl::Status lost_;                              // of the communicator

  std::vector<std::byte> window_;
  size_t open_file_ = 0;
  std::unique_ptr<ExportFile> out_;  // that file, while it is written
  std::vector<std::string> own_files_;
  int64_t payload_bytes_ = 0;
  int64_t bytes_total_ = 0;  // that this rank writes
  bool committed_ = false;
  SaveReport report_;
};

}  // namespace

absl::StatusOr<SaveReport> Export(const std::string& path, Format format,
                                  const State& state, Communicator* comm,
                                  const ExportOptions& options) {
  return Exporter(path, format, state, comm, options).Run();
}

}  // namespace dsd::checkpoint
