// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/source_session.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/broadcast.h"
#include "dsd/core/state_dict/deliver.h"
#include "dsd/core/state_dict/mismatch_report.h"
#include "dsd/core/state_dict/optimizer_state.h"
#include "dsd/core/tensor/tensor_endpoint.h"

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

// What `value` is not, as the new value of a live tensor; empty if it fits.
std::string MisfitOf(const std::string& fqn, const Value& value,
                     const TensorValue& live) {
  const auto* tensor = value.get_if<TensorValue>();
  if (tensor == nullptr || !tensor->defined()) {
    return absl::StrCat(
        "\"", fqn, "\": expected a tensor, found ",
        tensor == nullptr ? value.kind_name() : "an undefined one");
  }
  if (tensor->shape() != live.shape()) {
    return absl::StrCat("\"", fqn, "\": shape in the dict is ",
                        DimsToString(tensor->shape()), ", in the model ",
                        DimsToString(live.shape()));
  }
  if (!c10::canCast(tensor->scalar_type(), live.scalar_type())) {
    return absl::StrCat("\"", fqn, "\": type in the dict is ",
                        c10::toString(tensor->scalar_type()), ", in the model ",
                        c10::toString(live.scalar_type()),
                        ", which would lose values");
  }
  for (const at::Tensor& local : live.locals()) {
    for (int64_t d = 0; d < local.dim(); ++d) {
      if (local.size(d) > 1 && local.stride(d) == 0) {
        return absl::StrCat("\"", fqn,
                            "\": the live tensor is expanded (several elements "
                            "share memory) and cannot be filled; make it "
                            "contiguous");
      }
    }
  }
  return "";
}

void MatchModel(const StateDict& dict, const LiveModel& live,
                MismatchReport& report, std::vector<TensorPair>& pairs) {
  const FqnTable& table = live.table();
  for (size_t group = 0; group < table.groups().size(); ++group) {
    // Tied tensors: one of their names is enough.
    const Value* value = nullptr;
    for (const size_t entry : table.groups()[group]) {
      value = dict.Find(table.entries()[entry].fqn);
      if (value != nullptr) break;
    }
    const std::string& fqn = live.fqn(group);
    if (value == nullptr) {
      report.model.missing_keys.push_back(fqn);
      continue;
    }
    std::string misfit = MisfitOf(fqn, *value, live.value(group));
    if (!misfit.empty()) {
      report.misfits.push_back(std::move(misfit));
      continue;
    }
    pairs.push_back({absl::StrCat(kModelKey, ".", fqn),
                     *value->get_if<TensorValue>(), live.value(group)});
  }
  for (size_t i = 0; i < dict.size(); ++i) {
    if (!table.Find(dict.key_text(i)).has_value()) {
      report.model.unexpected_keys.push_back(dict.key_text(i));
    }
  }
}

absl::Status AddPairs(const std::vector<TensorPair>& pairs,
                      TensorEndpoint& source, TensorEndpoint& target) {
  for (const TensorPair& pair : pairs) {
    DSD_RETURN_IF_ERROR(source.Add(pair.name, pair.source));
    DSD_RETURN_IF_ERROR(target.Add(pair.name, pair.target));
  }
  return absl::OkStatus();
}

void AddTo(DigestBuilder& digest, const std::vector<std::string>& texts) {
  digest.Add(static_cast<int64_t>(texts.size()));
  for (const std::string& text : texts) digest.Add(absl::string_view(text));
}

}  // namespace

absl::Status SourceSession::CheckOptions(Parts parts) const {
  if (options_.broadcast_from_rank0 && !options_.full_state_dict) {
    return absl::InvalidArgumentError(
        "broadcast_from_rank0 needs full_state_dict = true: rank 0 must have "
        "whole tensors");
  }
  if (parts.optimizer && !parts.model && optimizers_.empty()) {
    return absl::InvalidArgumentError(
        "no optimizers were given, but their state dict was asked for");
  }
  return absl::OkStatus();
}

absl::Status SourceSession::Describe(Parts parts,
                                     ModelAndOptimizerStateDict& out) {
  DSD_RETURN_IF_ERROR(CheckOptions(parts));
  if (!poisoned_.ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat("values are unspecified since a set failed half-way (",
                     poisoned_.message(), "); set a state dict first"));
  }
  DSD_RETURN_IF_ERROR(live_.Refresh(mover_));
  if (parts.model) {
    for (const FqnTable::Entry& entry : live_.table().entries()) {
      if (options_.ignore_frozen_params &&
          entry.kind == TensorKind::kParameter &&
          !live_.tensor(entry.group).requires_grad()) {
        continue;
      }
      out.model.Set(entry.fqn, Value(live_.value(entry.group)));
    }
  }
  if (parts.optimizer && !optimizers_.empty()) {
    DSD_ASSIGN_OR_RETURN(out.optimizer, GetOptimizerState(live_, optimizers_));
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelAndOptimizerStateDict> SourceSession::GetParts(
    Parts parts, const CallOptions& call) {
  const CallClock clock(mover_.env(), call);
  ModelAndOptimizerStateDict out;
  const absl::Status local = Describe(parts, out);
  StateDict root;
  root.Set(kModelKey, Value(std::move(out.model)));
  root.Set(kOptimizerKey, Value(std::move(out.optimizer)));
  DSD_RETURN_IF_ERROR(Deliver(local, options_, mover_, clock, root));
  out.model = TakePart(root, kModelKey);
  out.optimizer = TakePart(root, kOptimizerKey);
  if (options_.flatten_optimizer_state_dict) {
    DSD_ASSIGN_OR_RETURN(out.optimizer, FlattenOptimizerState(out.optimizer));
  }
  return out;
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

absl::StatusOr<IncompatibleKeys> SourceSession::SetParts(
    absl::string_view what, const StateDict* model, const StateDict* optimizer,
    const CallOptions& call) {
  const CallClock clock(mover_.env(), call);
  // An error found here is brought to the agreement, not returned: the other
  // ranks must learn of it.
  absl::Status local = CheckOptions({model != nullptr, optimizer != nullptr});
  const bool may_skip_model = optimizer != nullptr;

  Value shared;  // keeps what rank 0 sent
  if (options_.broadcast_from_rank0 && mover_.world_size() > 1) {
    StateDict root;
    if (mover_.rank() == 0) {
      if (model != nullptr) root.Set(kModelKey, Value(*model));
      if (optimizer != nullptr) root.Set(kOptimizerKey, Value(*optimizer));
    }
    absl::StatusOr<Value> from_rank0 =
        ShareOutline(Value(std::move(root)), *mover_.comm(), clock.Left());
    DSD_RETURN_IF_ERROR(from_rank0) << what;
    shared = *std::move(from_rank0);
    const auto part = [&](const char* key) -> const StateDict* {
      const auto* dict = shared.get_if<StateDict>();
      const Value* value = dict == nullptr ? nullptr : dict->Find(key);
      return value == nullptr ? nullptr : value->get_if<StateDict>();
    };
    model = part(kModelKey);
    optimizer = part(kOptimizerKey);
  }
  if (may_skip_model && model != nullptr && model->empty()) model = nullptr;
  if (optimizers_.empty()) optimizer = nullptr;

  if (local.ok()) local = live_.Refresh(mover_);
  MismatchReport report;
  std::vector<TensorPair> pairs;
  OptimizerLoad optimizer_load(live_, optimizers_, options_.strict);
  if (local.ok() && model != nullptr) MatchModel(*model, live_, report, pairs);
  if (local.ok() && optimizer != nullptr) {
    local = optimizer_load.Parse(*optimizer, report);
  }
  if (local.ok()) local = report.ToStatus(options_.strict);
  if (local.ok() && optimizer != nullptr) local = optimizer_load.Prepare(pairs);
  TensorEndpoint source = mover_.NewEndpoint();
  TensorEndpoint target = mover_.NewEndpoint();
  if (local.ok()) local = AddPairs(pairs, source, target);

  // Other ranks must set the same parts and will report the same keys.
  DigestBuilder parameters;
  parameters.Add(what)
      .Add(static_cast<int64_t>(model != nullptr))
      .Add(static_cast<int64_t>(optimizer != nullptr))
      .Add(static_cast<int64_t>(options_.strict))
      .Add(static_cast<int64_t>(options_.broadcast_from_rank0));
  AddTo(parameters, report.model.missing_keys);
  AddTo(parameters, report.model.unexpected_keys);
  bool changed = false;
  absl::Status status = mover_.Move(what, source, target, parameters.Finish(),
                                    local, clock, &changed);
  if (status.ok() && optimizer != nullptr) status = optimizer_load.Commit();
  if (!status.ok()) {
    if (!changed) return status;
    poisoned_ = status;
    return Annotate(status, "the live values are unspecified now, set again");
  }
  poisoned_ = absl::OkStatus();
  return std::move(report.model);
}

SessionStats SourceSession::stats() const {
  return {live_.tables_built(), mover_.plans_made(), mover_.last_transfer()};
}

}  // namespace dsd
