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
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/float_cast.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/plan/plan.h"
#include "dsd/core/transfer/agree_on_catalogs.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/checkpoint_endpoint.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/item_reader.h"
#include "dsd/frontends/checkpoint/live_state.h"
#include "dsd/frontends/checkpoint/patient_endpoint.h"
#include "dsd/frontends/checkpoint/record_codec.h"

namespace dsd::checkpoint {
namespace {

// Tensors of a target whose shape or dtype the checkpoint has otherwise.
std::string ListMismatches(const std::vector<std::string>& lines) {
  constexpr size_t kMaxListed = 64;
  const size_t listed = std::min(lines.size(), kMaxListed);
  std::string out = absl::StrJoin(lines.begin(), lines.begin() + listed, "; ");
  if (lines.size() > listed) {
    absl::StrAppend(&out, "; and ", lines.size() - listed, " more");
  }
  return out;
}

class Loader {
 public:
  // From a checkpoint that is open, or that at `path`.
  Loader(std::shared_ptr<const Checkpoint> checkpoint, const std::string& path,
         State& target, Communicator* comm, const LoadOptions& options)
      : path_(path),
        target_(target),
        catalog_(CatalogOf(target)),
        comm_(comm),
        options_(options),
        verify_(checkpoint == nullptr
                    ? options.verify
                    : CheckpointInternals::Get(*checkpoint).verify),
        env_(checkpoint == nullptr
                 ? *ChooseEnv(options.env, comm)
                 : *CheckpointInternals::Get(*checkpoint).env),
        deadline_(&env_, options.call),
        rank_(comm == nullptr ? 0 : comm->rank()),
        size_(comm == nullptr ? 1 : comm->size()),
        what_(absl::StrCat("load from \"", path, "\"")),
        checkpoint_(std::move(checkpoint)) {}

  absl::StatusOr<LoadReport> Run() {
    const absl::Status prepared = Prepare();
    DSD_RETURN_IF_ERROR(AgreeOnCatalogs(
        comm_, what_, {&catalog_}, Fingerprint(), prepared,
        [this] { return Describe(); }, deadline_.Left()));
    absl::StatusOr<std::vector<Object>> objects = LoadObjects();
    DSD_RETURN_IF_ERROR(objects.status()) << what_;

    PatientEndpoint patient(source_.get());
    TransferStats stats;
    if (target_.tensors != nullptr) {
      TransferOptions transfer;
      transfer.call = deadline_.Left();
      transfer.call.progress = options_.call.progress;
      absl::StatusOr<TransferStats> moved =
          Transfer(plan_, patient, *target_.tensors, comm_, transfer);
      DSD_RETURN_IF_ERROR(moved.status()) << Unspecified();
      stats = *moved;
    }
    absl::Status local = patient.status();
    if (local.ok() && rank_ == 0 && verify_) local = CheckEmptyTensors();
    const absl::Status joined = Join(stats, &local);
    DSD_RETURN_IF_ERROR(joined) << Unspecified();
    DSD_RETURN_IF_ERROR(Agree(
        comm_, Unspecified(), Digest(), local, [] { return std::string(); },
        deadline_.Left()));
    for (size_t i = 0; i < wanted_objects_.size(); ++i) {
      target_.objects[wanted_objects_[i].target].value =
          std::move((*objects)[i]);
    }
    report_.save_id = checkpoint_->save_id();
    report_.bytes_sent = stats.bytes_sent;
    report_.payload_bytes = source_->stats().payload_bytes;
    return std::move(report_);
  }

 private:
  struct WantedObject {
    size_t target;  // in target_.objects
    size_t stored;  // in the checkpoint's objects
  };

  // Everything that can be found wrong without touching what is live.
  absl::Status Prepare() {
    DSD_RETURN_IF_ERROR(CheckKeys(target_));
    if (options_.dtype_policy == DTypePolicy::kKeep) {
      return absl::InvalidArgumentError(
          "dtype_policy = kKeep: the tensors of a target keep their dtypes; "
          "expected kCast or kError");
    }
    if (checkpoint_ == nullptr) {
      DSD_ASSIGN_OR_RETURN(checkpoint_,
                           Checkpoint::Open(path_, {verify_, &env_}));
    }
    std::vector<size_t> tensors;
    DSD_RETURN_IF_ERROR(Match(&tensors));
    DSD_ASSIGN_OR_RETURN(source_, MakeCheckpointEndpoint(checkpoint_, tensors));
    const Binding binding = BindRanks(comm_);
    DSD_ASSIGN_OR_RETURN(plan_, PlanForRank(rank_, source_->catalog(), catalog_,
                                            pairs_, binding, binding));
    return absl::OkStatus();
  }

  // Finds what is wanted, by position in the checkpoint's catalog; lists all
  // that does not fit.
  absl::Status Match(std::vector<size_t>* tensors) {
    const Catalog& stored = checkpoint_->catalog();
    absl::flat_hash_map<std::string, size_t> stored_objects;
    for (size_t i = 0; i < checkpoint_->objects().size(); ++i) {
      stored_objects[checkpoint_->objects()[i].key] = i;
    }
    absl::flat_hash_map<std::string, std::string> unreadable(
        checkpoint_->unreadable().begin(), checkpoint_->unreadable().end());
    std::vector<std::string> wrong;
    absl::flat_hash_set<std::string> wanted;
    // What is stored for a key of the target; nullopt: nothing is wanted.
    const auto stored_key =
        [&](const std::string& key) -> std::optional<std::string> {
      std::optional<std::string> from =
          options_.stored_key ? options_.stored_key(key) : key;
      if (from.has_value() && !wanted.insert(*from).second) {
        wrong.push_back(absl::StrCat("\"", absl::CHexEscape(*from),
                                     "\" is wanted for two keys"));
        from.reset();
      }
      names_.Add(from.value_or(""));
      return from;
    };
    const auto describe = [](const std::string& key, const std::string& from) {
      return absl::StrCat(
          "\"", absl::CHexEscape(key), "\"",
          from == key
              ? ""
              : absl::StrCat(" (stored as \"", absl::CHexEscape(from), "\")"),
          ": ");
    };
    for (size_t i = 0; i < catalog_.size(); ++i) {
      const TensorSpec& spec = catalog_[i];
      const std::optional<std::string> name = stored_key(spec.fqn);
      if (!name.has_value()) continue;
      const std::string key = describe(spec.fqn, *name);
      const std::optional<size_t> found = stored.Find(*name);
      if (!found.has_value()) {
        if (stored_objects.contains(*name)) {
          wrong.push_back(absl::StrCat(
              key, "an object in the checkpoint, a tensor in the target"));
        } else if (const auto it = unreadable.find(*name);
                   it != unreadable.end()) {
          wrong.push_back(absl::StrCat(key, "its dtype in the checkpoint is ",
                                       absl::CHexEscape(it->second),
                                       ", which is not supported"));
        } else {
          report_.missing.push_back(spec.fqn);
        }
        continue;
      }
      const TensorSpec& from = stored[*found];
      if (from.shape() != spec.shape()) {
        wrong.push_back(absl::StrCat(
            key, "shape in the checkpoint is ", DimsToString(from.shape()),
            ", in the target ", DimsToString(spec.shape())));
      } else if (from.dtype != spec.dtype && !IsCast(from.dtype, spec.dtype)) {
        wrong.push_back(absl::StrCat(
            key, "dtype in the checkpoint is ", DTypeName(from.dtype),
            ", in the target ", DTypeName(spec.dtype),
            IsCastable(from.dtype) && IsCastable(spec.dtype)
                ? "; dtype_policy = kCast converts it"
                : ""));
      } else {
        report_.cast += from.dtype != spec.dtype;
        pairs_.emplace_back(tensors->size(), i);
        tensors->push_back(*found);
      }
    }
    for (size_t i = 0; i < target_.objects.size(); ++i) {
      const std::string key = JoinPath(target_.objects[i].path);
      const std::optional<std::string> name = stored_key(key);
      if (!name.has_value()) continue;
      const auto found = stored_objects.find(*name);
      if (found != stored_objects.end()) {
        wanted_objects_.push_back({i, found->second});
      } else if (stored.Find(*name).has_value() || unreadable.contains(*name)) {
        wrong.push_back(absl::StrCat(
            describe(key, *name),
            "a tensor in the checkpoint, an object in the target"));
      } else {
        report_.missing.push_back(key);
      }
    }
    const auto note_unexpected = [&](const std::string& key) {
      if (!wanted.contains(key)) report_.unexpected.push_back(key);
    };
    for (const TensorSpec& spec : stored.tensors()) note_unexpected(spec.fqn);
    for (const StoredObject& object : checkpoint_->objects()) {
      note_unexpected(object.key);
    }
    for (const auto& [key, dtype] : checkpoint_->unreadable()) {
      note_unexpected(key);
    }
    std::sort(report_.missing.begin(), report_.missing.end());
    std::sort(report_.unexpected.begin(), report_.unexpected.end());

    std::vector<std::string> problems;
    if (!options_.allow_missing && !report_.missing.empty()) {
      problems.push_back(absl::StrCat("missing in the checkpoint (",
                                      report_.missing.size(),
                                      "): ", ListKeys(report_.missing)));
    }
    if (!options_.allow_unexpected && !report_.unexpected.empty()) {
      problems.push_back(absl::StrCat("not in the target (",
                                      report_.unexpected.size(),
                                      "): ", ListKeys(report_.unexpected)));
    }
    if (!wrong.empty()) problems.push_back(ListMismatches(wrong));
    if (problems.empty()) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat("the checkpoint does not fit the target: ",
                     absl::StrJoin(problems, "; ")));
  }

  bool IsCast(DType from, DType to) const {
    return options_.dtype_policy == DTypePolicy::kCast && IsCastable(from) &&
           IsCastable(to);
  }

  Digest Fingerprint() const {
    DigestBuilder digest;
    digest.Add(catalog_.Fingerprint());
    digest.Add(verify_);
    digest.Add(static_cast<int64_t>(options_.dtype_policy));
    digest.Add(names_.Finish());
    if (checkpoint_ != nullptr) digest.Add(checkpoint_->fingerprint());
    for (const WantedObject& object : wanted_objects_) {
      digest.Add(static_cast<int64_t>(object.stored));
    }
    return digest.Finish();
  }

  std::string Describe() const {
    return absl::StrCat("sees save ", absl::CHexEscape(checkpoint_->save_id()),
                        " (index ",
                        checkpoint_->fingerprint().Hex().substr(0, 8),
                        "), wants ", wanted_objects_.size(), " objects");
  }

  // Rank 0 reads, all decode.
  absl::StatusOr<std::vector<Object>> LoadObjects() {
    std::vector<Object> objects;
    if (wanted_objects_.empty()) return objects;
    ItemReader reader(&CheckpointInternals::Get(*checkpoint_));
    if (checkpoint_->format() != Format::kDcp) {
      // In the index, which all have read.
      for (const WantedObject& object : wanted_objects_) {
        DSD_ASSIGN_OR_RETURN(dcp::ObjectItem item,
                             reader.ReadObject(object.stored));
        objects.push_back(std::move(item.value));
      }
      return objects;
    }
    RecordWriter out;
    absl::Status status;
    if (rank_ == 0) {
      for (const WantedObject& object : wanted_objects_) {
        absl::StatusOr<std::string> stored =
            reader.ReadStoredObject(object.stored);
        status = stored.status();
        if (!status.ok()) break;
        out.Text(*stored);
      }
    }
    std::string bytes = out.Take();
    if (comm_ != nullptr && size_ > 1) {
      int64_t head[2] = {static_cast<int64_t>(status.code()),
                         static_cast<int64_t>(bytes.size())};
      if (!status.ok()) {
        bytes = std::string(status.message());
        head[1] = static_cast<int64_t>(bytes.size());
      }
      DSD_RETURN_IF_ERROR(comm_->Broadcast(
          absl::MakeSpan(reinterpret_cast<std::byte*>(head), sizeof(head)), 0,
          deadline_.Left()));
      DSD_RETURN_IF_ERROR(CheckAnnounced(0, head[1]));
      bytes.resize(head[1]);
      DSD_RETURN_IF_ERROR(comm_->Broadcast(
          absl::MakeSpan(reinterpret_cast<std::byte*>(bytes.data()),
                         bytes.size()),
          0, deadline_.Left()));
      if (head[0] != 0) {
        const absl::Status told(static_cast<absl::StatusCode>(head[0]), bytes);
        return told.ok() ? absl::DataLossError(absl::StrCat(
                               "rank 0 announces the unknown error ", head[0]))
                         : told;
      }
    }
    DSD_RETURN_IF_ERROR(status);
    RecordReader in(bytes);
    for (const WantedObject& object : wanted_objects_) {
      absl::StatusOr<dcp::ObjectItem> item = dcp::DecodeStoredObject(in.Text());
      DSD_RETURN_IF_ERROR(item.status()) << reader.WhereObject(object.stored);
      objects.push_back(std::move(item->value));
    }
    return objects;
  }

  // Archives without elements are in no plan, and could be damaged all the
  // same.
  absl::Status CheckEmptyTensors() {
    const Checkpoint::Impl& impl = CheckpointInternals::Get(*checkpoint_);
    ItemReader reader(&impl);
    for (const TensorSpec& spec : source_->catalog().tensors()) {
      if (!spec.layout.whole().empty()) continue;
      const size_t entry =
          impl.entry_of[*checkpoint_->catalog().Find(spec.fqn)];
      for (size_t i = 0; i < impl.index.tensors[entry].num_chunks; ++i) {
        DSD_RETURN_IF_ERROR(reader.OpenChunk(entry, i, true).status());
      }
    }
    return absl::OkStatus();
  }

  // Brings together what the ranks read, and compares it with what was stored.
  // Returns errors of the communicator; what is found wrong goes to `local`.
  absl::Status Join(const TransferStats& stats, absl::Status* local) {
    std::vector<std::string> records;
    RecordWriter out;
    out.Number(source_->stats().payload_bytes);
    out.Number(stats.bytes_sent);
    out.Number(!local->ok());
    out.Text(verify_ && local->ok() ? source_->Partials() : "");
    std::string mine = out.Take();
    if (comm_ != nullptr && size_ > 1) {
      DSD_ASSIGN_OR_RETURN(records, comm_->AllGatherBlobs(mine, kMaxRecordBytes,
                                                          deadline_.Left()));
    } else {
      records.push_back(std::move(mine));
    }
    bool failed = false;
    for (int rank = 0; rank < size_; ++rank) {
      RecordReader in(records[rank]);
      report_.payload_bytes_all += in.Number();
      report_.bytes_sent_all += in.Number();
      failed |= in.Number() != 0;
      const absl::string_view partials = in.Text();
      DSD_RETURN_IF_ERROR(in.status());
      if (rank != rank_) {
        DSD_RETURN_IF_ERROR(source_->Merge(partials));
      }
    }
    // With a part unread there is nothing to compare.
    if (failed || !verify_) return absl::OkStatus();
    const absl::StatusOr<int64_t> verified = source_->Verify();
    *local = verified.status();
    // Each tensor was compared by a rank that knows all of it, if some rank
    // does.
    report_.verified = local->ok() && checkpoint_->has_digests();
    for (const auto& [source, target] : pairs_) {
      report_.verified &= catalog_[target].layout.NumUncovered() == 0;
    }
    return absl::OkStatus();
  }

  std::string Unspecified() const {
    return absl::StrCat(what_, " (tensors of the target are unspecified now)");
  }

  const std::string path_;
  State& target_;
  const Catalog& catalog_;
  Communicator* const comm_;
  const LoadOptions& options_;
  const bool verify_;
  Env& env_;
  const Deadline deadline_;
  const int rank_;
  const int size_;
  const std::string what_;

  std::shared_ptr<const Checkpoint> checkpoint_;
  std::unique_ptr<CheckpointEndpoint> source_;
  TensorPairs pairs_;
  DigestBuilder names_;  // the stored keys
  Plan plan_;
  std::vector<WantedObject> wanted_objects_;
  LoadReport report_;
};

}  // namespace

absl::StatusOr<LoadReport> Load(const std::string& path, State& target,
                                Communicator* comm,
                                const LoadOptions& options) {
  return Loader(nullptr, path, target, comm, options).Run();
}

absl::StatusOr<LoadReport> Load(std::shared_ptr<const Checkpoint> checkpoint,
                                State& target, Communicator* comm,
                                const LoadOptions& options) {
  const std::string path = checkpoint->path();
  return Loader(std::move(checkpoint), path, target, comm, options).Run();
}

}  // namespace dsd::checkpoint
