// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/source_session.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/empty_like.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/deliver.h"
#include "dsd/core/state_dict/joint.h"
#include "dsd/core/state_dict/key_map.h"
#include "dsd/core/state_dict/local_copy.h"
#include "dsd/core/state_dict/mismatch_report.h"
#include "dsd/core/state_dict/model_state.h"
#include "dsd/core/state_dict/optimizer_state.h"
#include "dsd/core/state_dict/outline.h"
#include "dsd/core/state_dict/state_dict_ops.h"
#include "dsd/core/state_dict/threads.h"
#include "dsd/core/state_dict/tied_values.h"
#include "dsd/core/state_dict/verify_replicas.h"
#include "dsd/core/tensor/tensor_endpoint.h"
#include "dsd/core/tensor/torch_boundary.h"

namespace dsd {
namespace {

// The keys of a job's checkpoint, so that names in errors are those in files.
constexpr char kModelKey[] = "model";
constexpr char kOptimizerKey[] = "optim";

StateDict TakePart(StateDict& root, const char* key) {
  Value* part = root.Find(key);
  if (part == nullptr) return StateDict();
  return std::move(*part->get_if<StateDict>());
}

bool SharesMemory(const TensorValue& value,
                  const absl::flat_hash_set<const void*>& storages) {
  for (const at::Tensor& local : value.locals()) {
    if (local.defined() && local.has_storage() &&
        storages.contains(local.storage().unsafeGetStorageImpl())) {
      return true;
    }
  }
  return false;
}

// `source`, or a copy of it if it is not `target` itself: its memory is that of
// a live tensor, which may be filled first.
absl::StatusOr<TensorValue> Detached(const TensorPair& pair) {
  const absl::Span<const at::Tensor> from = pair.source.locals();
  const absl::Span<const at::Tensor> to = pair.target.locals();
  const bool is_itself =
      from.size() == 1 && to.size() == 1 &&
      IdentityOf(from[0]) == IdentityOf(to[0]) &&
      pair.source.is_plain() == pair.target.is_plain() &&
      (pair.source.is_plain() ||
       Layout::SameGeometry(pair.source.layout(), pair.target.layout()));
  if (is_itself) return pair.source;
  return MapLocalTensors(pair.source, [](const at::Tensor& local) {
    return TorchToStatus([&] { return local.detach().clone(); });
  });
}

// Copies what is live itself of the sources. `apart`: whether all targets have
// storages of their own, so that they can be filled in any order.
absl::Status DetachSources(Env* env, int threads,
                           std::vector<TensorPair>& pairs, bool& apart) {
  apart = true;
  absl::flat_hash_set<const void*> targets;
  targets.reserve(pairs.size());
  for (size_t i = 0; i < pairs.size(); ++i) {
    PrefetchPairs(pairs, i, /*with_memory=*/false);
    for (const at::Tensor& local : pairs[i].target.locals()) {
      if (!local.defined() || local.numel() == 0) continue;
      if (!local.has_storage() ||
          !targets.insert(local.storage().unsafeGetStorageImpl()).second) {
        apart = false;
      }
    }
  }
  const auto detach = [&](size_t begin, size_t end) -> absl::Status {
    for (size_t i = begin; i < end; ++i) {
      // Others change theirs.
      PrefetchPairs(absl::MakeConstSpan(pairs).first(end), i,
                    /*with_memory=*/false);
      TensorPair& pair = pairs[i];
      if (!SharesMemory(pair.source, targets)) continue;
      absl::StatusOr<TensorValue> from = Detached(pair);
      DSD_RETURN_IF_ERROR(from) << "\"" << pair.name.Text() << "\"";
      pair.source = *std::move(from);
    }
    return absl::OkStatus();
  };
  return ForRanges(env, threads, pairs.size(), detach);
}

absl::Status AddPairs(const std::vector<TensorPair>& pairs,
                      TensorEndpoint& source, TensorEndpoint& target) {
  source.Reserve(pairs.size());
  target.Reserve(pairs.size());
  for (const TensorPair& pair : pairs) {
    DSD_RETURN_IF_ERROR(source.Add(pair.name.Text(), pair.source));
    DSD_RETURN_IF_ERROR(target.Add(pair.name.Text(), pair.target));
  }
  return absl::OkStatus();
}

// In any order: that of unexpected keys is the dict's.
void AddTo(DigestBuilder& digest, std::vector<std::string> texts) {
  std::sort(texts.begin(), texts.end());
  digest.Add(static_cast<int64_t>(texts.size()));
  for (const std::string& text : texts) digest.Add(absl::string_view(text));
}

// What a rank says about a set before anything else. Bytes of one size.
struct Greeting {
  absl::StatusCode local_code = absl::StatusCode::kOk;    // without the dicts
  absl::StatusCode attempt_code = absl::StatusCode::kOk;  // with them
  bool has_model = false;
  bool has_optimizer = false;
  bool has_extra_states = false;
  Digest call;     // what is set, and how
  Digest attempt;  // from where to where
};

absl::StatusOr<std::vector<Greeting>> Greet(const Greeting& mine,
                                            Communicator& comm,
                                            const CallOptions& call) {
  std::string bytes = {
      static_cast<char>(mine.local_code), static_cast<char>(mine.attempt_code),
      static_cast<char>(mine.has_model), static_cast<char>(mine.has_optimizer),
      static_cast<char>(mine.has_extra_states)};
  for (const Digest* digest : {&mine.call, &mine.attempt}) {
    bytes.append(reinterpret_cast<const char*>(digest->bytes.data()),
                 digest->bytes.size());
  }
  DSD_ASSIGN_OR_RETURN(
      const std::vector<std::string> blobs,
      comm.AllGatherBlobs(bytes, static_cast<int64_t>(bytes.size()), call));
  std::vector<Greeting> all;
  for (const std::string& blob : blobs) {
    if (blob.size() != bytes.size()) {
      return absl::InternalError("set: a rank sent a malformed greeting");
    }
    Greeting other;
    other.local_code = static_cast<absl::StatusCode>(blob[0]);
    other.attempt_code = static_cast<absl::StatusCode>(blob[1]);
    other.has_model = blob[2] != 0;
    other.has_optimizer = blob[3] != 0;
    other.has_extra_states = blob[4] != 0;
    const char* at = blob.data() + 5;
    for (Digest* digest : {&other.call, &other.attempt}) {
      std::memcpy(digest->bytes.data(), at, digest->bytes.size());
      at += digest->bytes.size();
    }
    all.push_back(other);
  }
  return all;
}

std::string DescribeOptions(const StateDictOptions& options) {
  return absl::StrCat(
      "strict = ", options.strict,
      ", broadcast_from_rank0 = ", options.broadcast_from_rank0,
      ", source_rank = ",
      options.source_rank.has_value() ? absl::StrCat(*options.source_rank)
                                      : "none",
      ", replica_ranks ", options.replica_ranks.empty() ? "not set" : "set",
      ", assign = ", options.assign,
      ", dtype_policy = ", static_cast<int>(options.dtype_policy),
      ", verify_replicas = ", options.verify_replicas,
      ", staged = ", options.staged);
}

// The ranks whose dict counts, ascending.
std::vector<int> HoldersOf(const std::vector<Greeting>& all,
                           std::optional<int> chosen, bool Greeting::*has) {
  std::vector<int> holders;
  for (int rank = 0; rank < static_cast<int>(all.size()); ++rank) {
    if (all[rank].*has && chosen.value_or(rank) == rank) {
      holders.push_back(rank);
    }
  }
  return holders;
}

// Makes `part` what all ranks are to set, kept in `shared` if it came from
// others. Collective. An error that only this rank sees goes to `local`.
absl::Status SharePart(const std::vector<int>& holders, const Mover& mover,
                       const CallClock& clock, bool may_be_left_out,
                       Value& shared, const StateDict*& part,
                       absl::Status& local) {
  if (static_cast<int>(holders.size()) == mover.world_size()) {
    return absl::OkStatus();
  }
  shared = StateDict();
  if (!holders.empty()) {
    const bool is_holder =
        std::binary_search(holders.begin(), holders.end(), mover.rank());
    absl::StatusOr<Value> outline =
        ShareOutline(is_holder ? Value(*part) : Value(), holders, *mover.comm(),
                     clock.Left());
    DSD_RETURN_IF_ERROR(mover.comm()->status());
    if (!outline.ok()) {
      local.Update(outline.status());
    } else if (!outline->is<StateDict>()) {
      local.Update(absl::DataLossError("another rank sent no dict"));
    } else {
      shared = *std::move(outline);
    }
  }
  part = shared.get_if<StateDict>();
  if (may_be_left_out && part->empty()) part = nullptr;
  return absl::OkStatus();
}

// What a rank gives to a set, but for keys that are not used. Null: nothing.
StateDict UsedPart(const StateDict* model, const StateDict* optimizer,
                   const KeyMap& key_map,
                   const std::vector<std::string>& unexpected_keys) {
  const absl::flat_hash_set<absl::string_view> unexpected(
      unexpected_keys.begin(), unexpected_keys.end());
  StateDict used;
  for (size_t i = 0; model != nullptr && i < model->size(); ++i) {
    const std::string key = model->key_text(i);
    const std::string name = key_map == nullptr ? key : key_map(key);
    if (name.empty() || unexpected.contains(name)) continue;
    used.Set(model->key(i), model->value(i));
  }
  StateDict root;
  root.Set(kModelKey, Value(std::move(used)));
  if (optimizer != nullptr) root.Set(kOptimizerKey, Value(*optimizer));
  return root;
}

// The verdict of a call that cannot end well.
absl::Status Refusal(absl::Status verdict) {
  return verdict.ok() ? absl::InternalError("ranks first disagree, then agree")
                      : verdict;
}

}  // namespace

absl::Status SourceSession::CheckOptions(Parts parts) const {
  DSD_RETURN_IF_ERROR(usable_);
  if (options_.broadcast_from_rank0 && !options_.full_state_dict) {
    return absl::InvalidArgumentError(
        "broadcast_from_rank0 needs full_state_dict = true: rank 0 must have "
        "whole tensors");
  }
  if (options_.broadcast_from_rank0 && options_.source_rank.value_or(0) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "broadcast_from_rank0 and source_rank = ", *options_.source_rank,
        " exclude each other"));
  }
  if (const std::optional<int> rank = SourceRank();
      rank.has_value() && (*rank < 0 || *rank >= mover_.world_size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("source_rank: there is no rank ", *rank, " in a world of ",
                     mover_.world_size()));
  }
  if (parts.optimizer && !parts.model && optimizers_.empty()) {
    return absl::InvalidArgumentError(
        "no optimizers were given, but their state dict was asked for");
  }
  return absl::OkStatus();
}

std::optional<int> SourceSession::SourceRank() const {
  return options_.broadcast_from_rank0 ? 0 : options_.source_rank;
}

int SourceSession::WalkThreads() const {
  size_t num_params = 0;
  for (const OptimizerSource* const optimizer : optimizers_) {
    for (size_t group = 0; group < optimizer->num_groups(); ++group) {
      const absl::Span<const at::Tensor> params = optimizer->params(group);
      // The current device and its stream are of the thread.
      if (!params.empty() && !params[0].is_cpu()) return 1;
      num_params += params.size();
    }
  }
  return ThreadsFor(num_params);
}

absl::Status SourceSession::Describe(Parts parts,
                                     ModelAndOptimizerStateDict& out) {
  DSD_RETURN_IF_ERROR(CheckOptions(parts));
  if (!poisoned_.ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat("values are unspecified since a set failed half-way (",
                     poisoned_.message(), "); set a state dict first"));
  }
  const bool has_optimizers = parts.optimizer && !optimizers_.empty();
  const int threads = has_optimizers ? WalkThreads() : 1;
  absl::Status status;
  RunBoth(
      mover_.env(), threads,
      [&] { status = TorchToStatus([&] { return live_.Refresh(mover_); }); },
      [&] {
        if (!has_optimizers) return;
        optimizer_reader_.Look(mover_.env(), threads, optimizers_);
      });
  DSD_RETURN_IF_ERROR(status);
  // Aliases of the same tensors make the same dict. Extra states and whether a
  // parameter is frozen are asked anew.
  const bool is_kept = !options_.ignore_frozen_params &&
                       !live_.has_extra_states() &&
                       model_version_ == live_.version();
  absl::StatusOr<StateDict> model = StateDict();
  absl::StatusOr<StateDict> optimizer = StateDict();
  RunBoth(
      mover_.env(), parts.model && !is_kept ? threads : 1,
      [&] {
        if (parts.model && !is_kept) {
          model = TorchToStatus([&] { return GetModelState(live_, options_); });
        }
      },
      [&] {
        if (has_optimizers) {
          optimizer = TorchToStatus([&] {
            return optimizer_reader_.Read(mover_.env(), threads, live_,
                                          optimizers_);
          });
        }
      });
  DSD_RETURN_IF_ERROR(model.status());
  DSD_RETURN_IF_ERROR(optimizer.status());
  if (parts.model) {
    if (!is_kept) {
      model_dict_ = *std::move(model);
      model_dict_.Share();
      model_version_ = live_.version();
    }
    out.model = model_dict_;
  }
  out.optimizer = *std::move(optimizer);
  return absl::OkStatus();
}

absl::StatusOr<ModelAndOptimizerStateDict> SourceSession::GetParts(
    Parts parts, const CallOptions& call) {
  const CallClock clock(mover_.env(), call);
  ModelAndOptimizerStateDict out;
  absl::Status local = TorchToStatus([&] { return Describe(parts, out); });
  // What the flat form cannot hold is everybody's error, so before anything is
  // sent.
  if (local.ok() && options_.flatten_optimizer_state_dict) {
    absl::StatusOr<StateDict> flat = FlattenOptimizerState(out.optimizer);
    local.Update(flat.status());
    if (flat.ok()) out.optimizer = *std::move(flat);
  }
  StateDict root;
  root.Set(kModelKey, Value(std::move(out.model)));
  root.Set(kOptimizerKey, Value(std::move(out.optimizer)));
  if (options_.full_state_dict && options_.verify_replicas) {
    DSD_RETURN_IF_ERROR(VerifyReplicas("full get", local, root,
                                       options_.replica_ranks, mover_, clock));
  }
  if (options_.full_state_dict) {
    DSD_RETURN_IF_ERROR(JoinIfRanksDiffer(local, clock, root));
  }
  DSD_RETURN_IF_ERROR(Deliver(local, options_, mover_, clock, root));
  out.model = TakePart(root, kModelKey);
  out.optimizer = TakePart(root, kOptimizerKey);
  return out;
}

absl::Status SourceSession::JoinIfRanksDiffer(const absl::Status& local,
                                              const CallClock& clock,
                                              StateDict& root) const {
  if (options_.replica_ranks.empty() || mover_.world_size() == 1) {
    return absl::OkStatus();
  }
  DSD_ASSIGN_OR_RETURN(root, JoinDicts("full get", local, root,
                                       &options_.replica_ranks, mover_, clock));
  return absl::OkStatus();
}

absl::Status SourceSession::StreamParts(Parts parts, StreamVisitor visit,
                                        const StreamOptions& stream,
                                        const CallOptions& call) {
  const CallClock clock(mover_.env(), call);
  ModelAndOptimizerStateDict out;
  absl::Status local = TorchToStatus([&] { return Describe(parts, out); });
  if (local.ok() && options_.flatten_optimizer_state_dict) {
    absl::StatusOr<StateDict> flat = FlattenOptimizerState(out.optimizer);
    local.Update(flat.status());
    if (flat.ok()) out.optimizer = *std::move(flat);
  }
  StateDict root;
  if (parts.optimizer) {
    root.Set(kModelKey, Value(std::move(out.model)));
    root.Set(kOptimizerKey, Value(std::move(out.optimizer)));
  } else {
    root = std::move(out.model);
  }
  if (options_.verify_replicas) {
    DSD_RETURN_IF_ERROR(VerifyReplicas("stream the state", local, root,
                                       options_.replica_ranks, mover_, clock));
  }
  DSD_RETURN_IF_ERROR(JoinIfRanksDiffer(local, clock, root));
  return Stream(local, options_, stream, mover_, clock, root, visit);
}

absl::Status SourceSession::StreamModel(StreamVisitor visit,
                                        const StreamOptions& stream,
                                        const CallOptions& call) {
  return StreamParts({/*model=*/true, /*optimizer=*/false}, visit, stream,
                     call);
}

absl::Status SourceSession::StreamAll(StreamVisitor visit,
                                      const StreamOptions& stream,
                                      const CallOptions& call) {
  return StreamParts({/*model=*/true, /*optimizer=*/true}, visit, stream, call);
}

absl::StatusOr<StateDict> SourceSession::GetModel(const CallOptions& call) {
  DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict both,
                       GetParts({/*model=*/true, /*optimizer=*/false}, call));
  return std::move(both.model);
}

absl::StatusOr<StateDict> SourceSession::GetOptimizer(const CallOptions& call) {
  DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict both,
                       GetParts({/*model=*/false, /*optimizer=*/true}, call));
  return std::move(both.optimizer);
}

absl::StatusOr<ModelAndOptimizerStateDict> SourceSession::Get(
    const CallOptions& call) {
  return GetParts({/*model=*/true, /*optimizer=*/true}, call);
}

absl::StatusOr<IncompatibleKeys> SourceSession::SetModel(
    const StateDict& model, const CallOptions& call) {
  return SetParts("set model state dict", &model, nullptr, call);
}

absl::Status SourceSession::SetOptimizer(const StateDict& optimizer,
                                         const CallOptions& call) {
  return SetParts("set optimizer state dict", nullptr, &optimizer, call)
      .status();
}

absl::StatusOr<IncompatibleKeys> SourceSession::Set(const StateDict& model,
                                                    const StateDict& optimizer,
                                                    const CallOptions& call) {
  return SetParts("set state dict", &model, &optimizer, call);
}

struct SourceSession::Attempt {
  Attempt(LiveModel& live, absl::Span<OptimizerSource* const> optimizers,
          const StateDictOptions& options, const Mover& mover)
      : model_load(live, options),
        optimizer_load(live, optimizers, options.strict, options.dtype_policy),
        source(mover.NewEndpoint()),
        target(mover.NewEndpoint()) {}

  // What ranks may differ in, beside the tensors.
  std::string Describe() const {
    std::string text =
        absl::StrCat(sets_model ? "a model dict" : "no model dict",
                     sets_optimizer ? " and an optimizer dict" : "");
    const auto add = [&](const char* title,
                         const std::vector<std::string>& list) {
      constexpr size_t kShown = 20;
      const size_t shown = std::min(list.size(), kShown);
      absl::StrAppend(&text, title, " [",
                      absl::StrJoin(list.begin(), list.begin() + shown, ", "),
                      "]");
      if (shown == list.size()) return;
      DigestBuilder all;
      AddTo(all, list);
      absl::StrAppend(&text, " and ", list.size() - shown, " more (",
                      all.Finish().Hex().substr(0, 8), ")");
    };
    // In a joint set each rank has a report of its own.
    if (!is_joint) {
      add(" with missing keys", report.model.missing_keys);
      add(" and unexpected keys", report.model.unexpected_keys);
      if (sets_optimizer) {
        add(", missing optimizer state", report.missing_state);
        add(" and unexpected optimizer state", report.unexpected_state);
      }
    }
    if (!renames.empty()) add(", renamed by key_map", renames);
    return text;
  }

  // The dicts under the model's names, if there is a key map.
  StateDict mapped_model;
  StateDict mapped_optimizer;
  bool sets_model = false;
  bool sets_optimizer = false;
  bool is_joint = false;
  std::vector<std::string> renames;  // of the key map
  MismatchReport report;
  // Whose values are not those of an earlier name of the same tensor. Ranks see
  // what is in their memory, so they need not agree.
  std::vector<std::string> unused_keys;
  ModelLoad model_load;
  OptimizerLoad optimizer_load;
  std::vector<TensorPair> local_pairs;  // all of them, or none
  std::vector<TensorPair> joint_pairs;  // of this rank, before they are joined
  // From memory of their own to the live tensors, if options.staged.
  std::vector<TensorPair> staged_pairs;
  int threads = 1;       // for walks over pairs
  int copy_threads = 1;  // that fill the targets
  TensorEndpoint source;
  TensorEndpoint target;
  Digest parameters;
  Mover::Prepared prepared;

  // What is done to all pairs before they are moved.
  absl::Status Complete(const StateDictOptions& options, Env* env,
                        std::vector<TensorPair>& pairs) {
    bool apart = false;
    DSD_RETURN_IF_ERROR(DetachSources(env, threads, pairs, apart));
    copy_threads = apart ? threads : 1;
    if (!options.staged) return absl::OkStatus();
    for (TensorPair& pair : pairs) {
      absl::StatusOr<TensorValue> memory =
          MapLocalTensors(pair.target, [](const at::Tensor& local) {
            return TorchToStatus([&] { return at::empty_like(local); });
          });
      DSD_RETURN_IF_ERROR(memory) << "\"" << pair.name.Text() << "\"";
      staged_pairs.push_back({pair.name, *memory, pair.target});
      pair.target = *std::move(memory);
    }
    return absl::OkStatus();
  }
};

std::unique_ptr<SourceSession::Attempt> SourceSession::TrySet(
    absl::string_view what, const absl::Status& local, const StateDict* model,
    const StateDict* optimizer, const StateDict* joint) {
  auto attempt =
      std::make_unique<Attempt>(live_, optimizers_, options_, mover_);
  attempt->sets_model = model != nullptr;
  attempt->sets_optimizer = optimizer != nullptr;
  attempt->is_joint = joint != nullptr;
  const StateDict* const unmapped_model = model;
  const StateDict* const unmapped_optimizer = optimizer;
  attempt->threads = WalkThreads();
  const auto prepare = [&]() -> absl::Status {
    DSD_RETURN_IF_ERROR(local);
    if (options_.key_map != nullptr && model != nullptr) {
      DSD_ASSIGN_OR_RETURN(attempt->mapped_model,
                           MapModelKeys(*model, options_.key_map));
      model = &attempt->mapped_model;
    }
    if (options_.key_map != nullptr && optimizer != nullptr) {
      DSD_ASSIGN_OR_RETURN(
          attempt->mapped_optimizer,
          MapOptimizerKeys(*optimizer, options_.key_map, live_.table()));
      optimizer = &attempt->mapped_optimizer;
    }
    MismatchReport of_optimizer;
    absl::Status matched;
    absl::Status parsed;
    RunBoth(
        mover_.env(),
        model != nullptr && optimizer != nullptr ? attempt->threads : 1,
        [&] {
          if (model == nullptr) return;
          matched = attempt->model_load.Match(*model, joint, attempt->report);
        },
        [&] {
          if (optimizer == nullptr) return;
          parsed = TorchToStatus([&] {
            return attempt->optimizer_load.Parse(mover_.env(), attempt->threads,
                                                 *optimizer, of_optimizer,
                                                 model);
          });
        });
    DSD_RETURN_IF_ERROR(matched);
    DSD_RETURN_IF_ERROR(parsed);
    attempt->report.Add(std::move(of_optimizer));
    if (options_.key_map != nullptr) {
      // Ranks may have other keys of what is not used.
      const std::vector<std::string>& unexpected =
          attempt->report.model.unexpected_keys;
      const absl::flat_hash_set<absl::string_view> unused(unexpected.begin(),
                                                          unexpected.end());
      attempt->renames = RenamesOf(
          unmapped_model, unmapped_optimizer, options_.key_map,
          [&](const std::string& name, bool of_optimizer) {
            // Of a joint set all ranks have the same dicts.
            return joint != nullptr ||
                   (of_optimizer ? live_.table().Find(name).has_value()
                                 : !unused.contains(name));
          });
    }
    if (model != nullptr && attempt->report.misfits.empty()) {
      DSD_ASSIGN_OR_RETURN(const KeyScope scope,
                           KeyScope::Create(live_.table(), options_));
      for (TiedDifference& other : FindTiedDifferences(live_, scope, *model)) {
        if (options_.strict) {
          attempt->report.misfits.push_back(absl::StrCat(
              "\"", other.key, "\" and \"", other.first,
              "\" are one tensor in the model and have other values in the "
              "dict; leave one of them out"));
        } else {
          attempt->unused_keys.push_back(std::move(other.key));
        }
      }
    }
    DSD_RETURN_IF_ERROR(attempt->report.ToStatus(options_.strict));
    std::vector<TensorPair> pairs;
    if (model != nullptr) {
      DSD_RETURN_IF_ERROR(attempt->model_load.Prepare(pairs));
    }
    if (optimizer != nullptr) {
      DSD_RETURN_IF_ERROR(attempt->optimizer_load.Prepare(
          mover_.env(), attempt->threads, pairs));
    }
    for (const TensorPair& pair : pairs) {
      if (mover_.comm() == nullptr) break;
      DSD_RETURN_IF_ERROR(pair.source.CheckIsOf(mover_.rank()))
          << "\"" << pair.name.Text() << "\" in the dict";
    }
    if (joint != nullptr) {
      attempt->joint_pairs = std::move(pairs);
      return absl::OkStatus();
    }
    DSD_RETURN_IF_ERROR(attempt->Complete(options_, mover_.env(), pairs));
    if (mover_.world_size() == 1 &&
        AreLocalCopies(mover_.env(), attempt->threads, pairs)) {
      attempt->local_pairs = std::move(pairs);
      return absl::OkStatus();
    }
    return AddPairs(pairs, attempt->source, attempt->target);
  };
  // Functions of the user are called on the way, which may throw.
  const absl::Status status = TorchToStatus(prepare);
  // Other ranks must set the same parts and will report the same keys.
  DigestBuilder parameters;
  parameters.Add(what)
      .Add(static_cast<int64_t>(attempt->sets_model))
      .Add(static_cast<int64_t>(attempt->sets_optimizer));
  if (joint == nullptr) {
    for (const std::vector<std::string>* keys :
         {&attempt->report.model.missing_keys,
          &attempt->report.model.unexpected_keys,
          &attempt->report.missing_state, &attempt->report.unexpected_state}) {
      AddTo(parameters, *keys);
    }
  }
  AddTo(parameters, attempt->renames);
  attempt->parameters = parameters.Finish();
  attempt->prepared = mover_.Prepare(attempt->source, attempt->target, status);
  return attempt;
}

absl::StatusOr<std::unique_ptr<SourceSession::Attempt>>
SourceSession::JoinAndTry(absl::string_view what, bool contributes,
                          bool may_skip_model, const StateDict* model,
                          const StateDict* optimizer, StateDict& dicts,
                          const CallClock& clock) {
  StateDict live;
  for (const FqnTable::Entry& entry : live_.table().entries()) {
    if (entry.kind == EntryKind::kNonPersistentBuffer) continue;
    live.Set(entry.fqn, entry.kind == EntryKind::kExtraState
                            ? Value(true)
                            : Value(live_.value(entry.group)));
  }
  StateDict live_root;
  live_root.Set(kModelKey, Value(std::move(live)));
  DSD_ASSIGN_OR_RETURN(live_root,
                       JoinDicts(what, absl::OkStatus(), live_root,
                                 &options_.replica_ranks, mover_, clock));
  StateDict mine;
  if (contributes && model != nullptr) mine.Set(kModelKey, Value(*model));
  if (contributes && optimizer != nullptr) {
    mine.Set(kOptimizerKey, Value(*optimizer));
  }
  DSD_ASSIGN_OR_RETURN(dicts,
                       JoinDicts(what, absl::OkStatus(), mine,
                                 /*replica_ranks=*/nullptr, mover_, clock));
  for (const char* key : {kModelKey, kOptimizerKey}) {
    if (!dicts.contains(key)) dicts.Set(key, Value(StateDict()));
  }
  model = dicts.Find(kModelKey)->get_if<StateDict>();
  if (may_skip_model && model->empty()) model = nullptr;
  if (optimizer != nullptr) {
    optimizer = dicts.Find(kOptimizerKey)->get_if<StateDict>();
  }
  std::unique_ptr<Attempt> attempt =
      TrySet(what, absl::OkStatus(), model, optimizer,
             live_root.Find(kModelKey)->get_if<StateDict>());
  DSD_ASSIGN_OR_RETURN(
      std::vector<TensorPair> pairs,
      JoinPairs(what, attempt->prepared.status, attempt->joint_pairs, dicts,
                &options_.replica_ranks, mover_, clock));
  absl::Status status = TorchToStatus(
      [&] { return attempt->Complete(options_, mover_.env(), pairs); });
  if (status.ok()) status = AddPairs(pairs, attempt->source, attempt->target);
  attempt->prepared = mover_.Prepare(attempt->source, attempt->target, status);
  return attempt;
}

absl::StatusOr<IncompatibleKeys> SourceSession::SetParts(
    absl::string_view what, const StateDict* model, const StateDict* optimizer,
    const CallOptions& call) {
  const CallClock clock(mover_.env(), call);
  // An error found here is brought to the agreement, not returned: the other
  // ranks must learn of it.
  absl::Status local = CheckOptions({model != nullptr, optimizer != nullptr});
  if (local.ok()) {
    local = TorchToStatus([&] { return live_.Refresh(mover_); });
  }
  const bool may_skip_model = optimizer != nullptr;
  if (optimizers_.empty() && usable_.ok()) optimizer = nullptr;
  const std::optional<int> chosen = SourceRank();
  const int world_size = mover_.world_size();
  const bool joint = !options_.replica_ranks.empty() && world_size > 1;

  Greeting mine;
  mine.has_model = model != nullptr && !model->empty();
  mine.has_optimizer = optimizer != nullptr && !optimizer->empty();
  mine.call = DigestBuilder()
                  .Add(what)
                  .Add(static_cast<int64_t>(optimizer != nullptr))
                  .Add(static_cast<int64_t>(joint))
                  .Add(static_cast<int64_t>(options_.strict))
                  .Add(static_cast<int64_t>(options_.assign))
                  .Add(static_cast<int64_t>(options_.dtype_policy))
                  .Add(static_cast<int64_t>(options_.verify_replicas))
                  .Add(static_cast<int64_t>(options_.staged))
                  .Add(static_cast<int64_t>(chosen.value_or(-1)))
                  .Finish();
  mine.local_code = local.code();
  mine.has_extra_states = model != nullptr && live_.has_extra_states();
  if (may_skip_model && !mine.has_model) model = nullptr;
  const StateDict* const own_model = model;
  const StateDict* const own_optimizer = optimizer;

  // Ranks that all have what they need say so, and what they found, in one
  // message.
  std::unique_ptr<Attempt> attempt;
  if ((!chosen.has_value() && !joint) || world_size == 1) {
    attempt = TrySet(what, local, model, optimizer, /*joint=*/nullptr);
    mine.attempt = attempt->prepared.Fingerprint(attempt->parameters);
    mine.attempt_code = attempt->prepared.status.code();
  }
  // Whether code of the user sets something on any rank, which may fail there
  // only.
  bool agrees_at_the_end = false;
  Value shared_model;
  Value shared_optimizer;
  StateDict joint_dicts;
  if (world_size == 1) {
    DSD_RETURN_IF_ERROR(attempt->prepared.status) << what;
  } else {
    DSD_ASSIGN_OR_RETURN(const std::vector<Greeting> all,
                         Greet(mine, *mover_.comm(), clock.Left()));
    const auto all_have = [&](const auto& has) {
      return std::all_of(all.begin(), all.end(), has);
    };
    if (!all_have([&](const Greeting& other) {
          return other.local_code == absl::StatusCode::kOk &&
                 other.call == mine.call;
        })) {
      // That something is wrong all ranks know; now they learn what.
      return Refusal(Agree(
          mover_.comm(), what, mine.call, local,
          [&] { return DescribeOptions(options_); }, clock.Left()));
    }
    agrees_at_the_end =
        optimizer != nullptr || !all_have([](const Greeting& other) {
          return !other.has_extra_states;
        });
    const bool all_have_the_same =
        !chosen.has_value() && !joint && all_have([&](const Greeting& other) {
          return other.has_model == mine.has_model &&
                 other.has_optimizer == mine.has_optimizer;
        });
    if (joint) {
      DSD_ASSIGN_OR_RETURN(
          attempt,
          JoinAndTry(what, chosen.value_or(mover_.rank()) == mover_.rank(),
                     may_skip_model, model, optimizer, joint_dicts, clock));
    } else if (!all_have_the_same) {
      attempt.reset();
      DSD_RETURN_IF_ERROR(
          SharePart(HoldersOf(all, chosen, &Greeting::has_model), mover_, clock,
                    may_skip_model, shared_model, model, local));
      if (optimizer != nullptr) {
        DSD_RETURN_IF_ERROR(SharePart(
            HoldersOf(all, chosen, &Greeting::has_optimizer), mover_, clock,
            /*may_be_left_out=*/false, shared_optimizer, optimizer, local));
      }
      attempt = TrySet(what, local, model, optimizer, /*joint=*/nullptr);
    }
    // Agreed already if the greetings say the same.
    if (!all_have_the_same || !all_have([&](const Greeting& other) {
          return other.attempt_code == absl::StatusCode::kOk &&
                 other.attempt == mine.attempt;
        })) {
      const absl::Status agreed = mover_.AgreeOn(
          what, attempt->prepared, attempt->parameters,
          [&] { return attempt->Describe(); }, clock);
      if (absl::StrContains(agreed.message(), "ranks disagree")) {
        return absl::Status(
            agreed.code(),
            absl::StrCat(agreed.message(),
                         "; to use the dicts of one rank set source_rank"));
      }
      DSD_RETURN_IF_ERROR(agreed);
    }
  }

  // Of one rank there is nothing to compare.
  if (options_.verify_replicas && world_size > 1 && !chosen.has_value()) {
    const absl::StatusOr<StateDict> used = TorchToStatus([&] {
      return UsedPart(own_model, own_optimizer, options_.key_map,
                      attempt->report.model.unexpected_keys);
    });
    DSD_RETURN_IF_ERROR(VerifyReplicas(what, used.status(),
                                       used.value_or(StateDict()),
                                       options_.replica_ranks, mover_, clock));
  }

  // With new memory for all tensors nothing live is written before the commit.
  bool changed =
      !options_.staged && (!options_.assign || attempt->sets_optimizer);
  bool is_agreed = world_size == 1;  // that it failed
  absl::Status status = mover_.MoveAgreed(attempt->prepared, clock);
  if (status.ok() && !attempt->local_pairs.empty()) {
    absl::StatusOr<TransferStats> copied =
        CopyLocally(mover_.env(), attempt->copy_threads,
                    absl::MakeSpan(attempt->local_pairs), clock.Left());
    if (copied.ok()) mover_.set_last_transfer(*copied);
    status = copied.status();
  }
  if (options_.staged) {
    if (world_size > 1) {
      const absl::Status agreed = Agree(
          mover_.comm(), what, Digest(), status, [] { return std::string(); },
          clock.Left());
      status.Update(agreed);
      is_agreed = !status.ok();
    }
    if (status.ok()) {
      changed = true;
      // All or nothing: not to be cancelled any more.
      status = CopyLocally(mover_.env(), attempt->copy_threads,
                           absl::MakeSpan(attempt->staged_pairs), CallOptions())
                   .status();
    }
  }
  if (status.ok()) {
    changed = true;
    status = TorchToStatus([&] { return attempt->model_load.Commit(); });
  }
  if (status.ok() && attempt->sets_optimizer) {
    // Codecs are the user's.
    status = TorchToStatus([&] { return attempt->optimizer_load.Commit(); });
  }
  if (agrees_at_the_end && !is_agreed && mover_.comm()->status().ok()) {
    CallOptions left = clock.Left();
    left.cancel = nullptr;  // what is done is done
    const absl::Status agreed = Agree(
        mover_.comm(), what, Digest(), status, [] { return std::string(); },
        left);
    // Without a verdict what this rank knows counts.
    if (status.ok() || absl::StrContains(agreed.message(), status.message())) {
      status = agreed;
    }
  }
  if (!status.ok()) {
    if (!changed) return status;
    poisoned_ = status;
    return Annotate(status, "the live values are unspecified now, set again");
  }
  poisoned_ = absl::OkStatus();
  IncompatibleKeys keys = std::move(attempt->report.model);
  keys.unexpected_keys.insert(keys.unexpected_keys.end(),
                              attempt->unused_keys.begin(),
                              attempt->unused_keys.end());
  keys.missing_optimizer_state = std::move(attempt->report.missing_state);
  keys.unexpected_optimizer_state = std::move(attempt->report.unexpected_state);
  for (const FqnTable::Entry& entry : live_.table().entries()) {
    if (entry.kind != EntryKind::kExtraState && live_.tensor(entry).is_meta()) {
      keys.unmaterialized_keys.push_back(entry.fqn);
    }
  }
  return keys;
}

absl::Status SourceSession::Rebind(Communicator* comm) {
  const auto place = [](const Communicator* c) {
    return c == nullptr ? std::string("no communicator")
                        : absl::StrCat("rank ", c->rank(), " of ", c->size());
  };
  if (place(comm) != place(mover_.comm())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "Rebind: this session is of ", place(mover_.comm()),
        ", the other communicator of ", place(comm),
        "; make a new session for the model as it is sharded now"));
  }
  mover_.set_comm(comm);
  return absl::OkStatus();
}

SessionStats SourceSession::stats() const {
  return {live_.tables_built(), mover_.plans_made(), mover_.last_transfer()};
}

}  // namespace dsd
