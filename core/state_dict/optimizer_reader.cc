// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/optimizer_reader.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/prefetch.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/optimizer_dict.h"
#include "dsd/core/state_dict/threads.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/tensor_memory.h"
#include "dsd/core/tensor/torch_boundary.h"

namespace dsd {
namespace {

// The group without "params". Python has the names first, if it has them.
absl::StatusOr<StateDict> GroupDict(const OptimizerSource& optimizer,
                                    size_t group, const ObjectDict& values,
                                    size_t num_params) {
  StateDict dict;
  const Object* names = values.Find(kParamNamesKey);
  if (names != nullptr) {
    const auto* list = names->get_if<Object::List>();
    // Of the parameters that the group had when they were loaded.
    if (list != nullptr && list->size() == num_params) {
      dict.Set(kParamNamesKey, FromObject(*names));
    }
  }
  for (size_t i = 0; i < values.size(); ++i) {
    if (values.key_text(i) == kParamNamesKey) continue;
    if (values.key_text(i) == kParamsKey) {
      return absl::InternalError(absl::StrCat(GroupName(optimizer, group),
                                              " has a hyperparameter named \"",
                                              kParamsKey, "\""));
    }
    dict.Set(values.key(i), FromObject(values.value(i)));
  }
  return dict;
}

const StateField* FindField(const std::vector<StateField>& fields,
                            const PathSegment& key) {
  const auto* name = std::get_if<std::string>(&key);
  if (name == nullptr) return nullptr;
  for (const StateField& field : fields) {
    if (field.name == *name) return &field;
  }
  return nullptr;
}

// `entries` with what a state has according to `fields` and they lack.
StateDict Complete(const std::vector<StateField>& fields,
                   const StateDict& entries, const StateDict& inert) {
  StateDict complete;
  for (const StateField& field : fields) {
    const Value* value = entries.Find(field.name);
    if (value == nullptr && field.required) value = inert.Find(field.name);
    if (value != nullptr) complete.Append(field.name, *value);
  }
  for (size_t i = 0; i < entries.size(); ++i) {
    if (FindField(fields, entries.key(i)) == nullptr) {
      complete.Append(entries.key(i), entries.value(i));
    }
  }
  return complete;
}

}  // namespace

void PrefetchParams(const LiveModel& model, absl::Span<const at::Tensor> params,
                    size_t current) {
  constexpr size_t kAhead = 8;
  constexpr size_t kMetaBytes = 128;  // for requires_grad()
  if (current + 2 * kAhead < params.size()) {
    PrefetchTensor(params[current + 2 * kAhead]);
    model.PrefetchGroupOf(params[current + 2 * kAhead]);
  }
  if (current + kAhead < params.size()) {
    PrefetchBytes(
        params[current + kAhead].unsafeGetTensorImpl()->autograd_meta(),
        kMetaBytes);
  }
}

void PrefetchStates(const OptimizerSource& optimizer, size_t group,
                    size_t current) {
  constexpr size_t kBatch = 16;
  if (current % kBatch != 0) return;
  const size_t size = optimizer.params(group).size();
  optimizer.PrefetchStates(group,
                           current == 0 ? 0 : std::min(current + kBatch, size),
                           std::min(current + 2 * kBatch, size));
}

std::string GroupName(const OptimizerSource& optimizer, size_t group) {
  return absl::StrCat(optimizer.type_name(), " group ", group);
}

ParameterOwners::ParameterOwners(const LiveModel& model)
    : model_(model), owners_(model.table().groups().size()) {}

absl::StatusOr<bool> ParameterOwners::Add(const OptimizerSource& optimizer,
                                          size_t group, size_t param) {
  const at::Tensor& tensor = optimizer.params(group)[param];
  const absl::StatusOr<size_t> model_group = model_.GroupOf(tensor);
  if (!model_group.ok()) {
    return Annotate(
        model_group.status(),
        absl::StrCat(GroupName(optimizer, group), " parameter ", param));
  }
  model_group_ = *model_group;
  Owner& owner = owners_[model_group_];
  const Owner self{&optimizer, group, tensor.unsafeGetTensorImpl()};
  if (owner.optimizer == nullptr) {
    owner = self;
    return true;
  }
  if (owner.optimizer == self.optimizer && owner.group == self.group &&
      owner.tensor == self.tensor) {
    return false;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "parameter \"", model_.fqn(model_group_), "\" is in ",
      GroupName(*owner.optimizer, owner.group), " and in ",
      GroupName(optimizer, group),
      owner.tensor == self.tensor ? "" : " (as another tensor of that memory)",
      ", but an optimizer state dict has one state for each parameter; give "
      "each parameter to one group, or use one session per optimizer"));
}

absl::StatusOr<TensorValue> WithShardingOf(const TensorValue& param,
                                           const at::Tensor& tensor) {
  if (std::optional<Sharding> own = ShardingTable::Global().Find(tensor)) {
    return TensorValue::Sharded(*std::move(own), tensor);
  }
  if (!param.is_plain() && param.locals().size() == 1 &&
      param.locals()[0].sizes() == tensor.sizes()) {
    return TensorValue::Sharded(Sharding{param.layout(), param.holder()},
                                tensor);
  }
  return TensorValue(tensor);
}

absl::Status CheckGroupState(const LiveModel& model,
                             const OptimizerSource& optimizer, size_t group) {
  if (!optimizer.has_group_state()) return absl::OkStatus();
  for (const at::Tensor& tensor : optimizer.params(group)) {
    DSD_ASSIGN_OR_RETURN(const size_t model_group, model.GroupOf(tensor));
    if (model.value(model_group).is_plain()) continue;
    return absl::FailedPreconditionError(absl::StrCat(
        optimizer.type_name(),
        " has one state for all parameters, in vectors over all their "
        "elements, and \"",
        model.fqn(model_group),
        "\" is sharded; use an optimizer with a state per parameter, or do not "
        "shard its parameters"));
  }
  return absl::OkStatus();
}

void OptimizerReader::KeepCount(const std::vector<StateField>& fields,
                                const StateDict& entries, Param& param) {
  param.count = nullptr;
  for (const StateField& field : fields) {
    if (field.shape != StateField::Shape::kCount) continue;
    const Value* const value = entries.Find(field.name);
    const auto* tensor =
        value == nullptr ? nullptr : value->get_if<TensorValue>();
    if (tensor == nullptr) continue;
    if (param.count != nullptr || !tensor->is_plain() || !tensor->defined() ||
        !tensor->locals()[0].is_cpu() || tensor->locals()[0].numel() != 1 ||
        tensor->locals()[0].itemsize() > sizeof(param.count_was)) {
      param.live = false;
      continue;
    }
    param.count = tensor->locals()[0].unsafeGetTensorImpl();
    param.count_bytes = static_cast<uint32_t>(param.count->itemsize());
    std::memcpy(&param.count_was, param.count->data(), param.count_bytes);
  }
}

absl::StatusOr<StateDict> OptimizerReader::ReadParam(const LiveModel& model,
                                                     const Group& group,
                                                     size_t index,
                                                     StateDict entries,
                                                     Param& param) {
  const OptimizerSource& optimizer = *group.optimizer;
  param.live = true;
  if (!entries.empty() || param.trainable) {
    const auto is_missing = [&](const StateField& field) {
      return field.required && entries.Find(field.name) == nullptr;
    };
    if (std::any_of(group.fields.begin(), group.fields.end(), is_missing)) {
      DSD_ASSIGN_OR_RETURN(const StateDict inert,
                           optimizer.InertState(group.index, index));
      entries = Complete(group.fields, entries, inert);
      param.live = false;
    }
  }
  KeepCount(group.fields, entries, param);
  const TensorValue& live = model.value(param.model_group);
  const bool has_shards =
      !live.is_plain() || ShardingTable::Global().generation() > 0;
  for (size_t i = 0; has_shards && i < entries.size(); ++i) {
    const auto* tensor = std::as_const(entries).value(i).get_if<TensorValue>();
    if (tensor == nullptr || !tensor->is_plain() || !tensor->defined()) {
      continue;
    }
    const StateField* const field = FindField(group.fields, entries.key(i));
    if (field == nullptr || field->shape != StateField::Shape::kLikeParameter) {
      continue;
    }
    absl::StatusOr<TensorValue> sharded =
        WithShardingOf(live, tensor->locals()[0]);
    DSD_RETURN_IF_ERROR(sharded)
        << "optimizer state \"" << model.fqn(param.model_group) << "."
        << field->name << "\"";
    if (!sharded->is_plain()) entries.value(i) = Value(*std::move(sharded));
  }
  entries.Share();
  return entries;
}

absl::Status OptimizerReader::LookAtAll(
    Env* env, int threads, absl::Span<OptimizerSource* const> optimizers) {
  groups_.clear();
  for (OptimizerSource* const optimizer : optimizers) {
    for (size_t index = 0; index < optimizer->num_groups(); ++index) {
      Group& group = groups_.emplace_back();
      group.optimizer = optimizer;
      group.index = index;
      DSD_ASSIGN_OR_RETURN(group.hyperparameters,
                           optimizer->Hyperparameters(index));
      DSD_ASSIGN_OR_RETURN(group.fields,
                           optimizer->StateFields(group.hyperparameters));
      optimizer->FindChangedStates(index, group.marks, group.changed);
      const size_t size = optimizer->params(index).size();
      group.states.resize(size);
      DSD_RETURN_IF_ERROR(ForRanges(
          env, threads, size, [&](size_t begin, size_t end) -> absl::Status {
            for (size_t i = begin; i < end; ++i) {
              PrefetchStates(*optimizer, index, i);
              DSD_ASSIGN_OR_RETURN(group.states[i], optimizer->State(index, i));
            }
            return absl::OkStatus();
          }));
    }
  }
  return absl::OkStatus();
}

absl::Status OptimizerReader::ReadAll(Env* env, int threads,
                                      const LiveModel& model) {
  ParameterOwners owners(model);
  StateDict state;
  Value::List group_dicts;
  for (Group& group : groups_) {
    const OptimizerSource& optimizer = *group.optimizer;
    DSD_RETURN_IF_ERROR(CheckGroupState(model, optimizer, group.index));
    const absl::Span<const at::Tensor> params = optimizer.params(group.index);
    group.params.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      PrefetchParams(model, params, i);
      DSD_ASSIGN_OR_RETURN(const bool is_new,
                           owners.Add(optimizer, group.index, i));
      group.params.push_back({params[i].unsafeGetTensorImpl(),
                              static_cast<uint32_t>(owners.model_group()),
                              kNoEntry, !is_new, params[i].requires_grad(),
                              true, 0, nullptr, 0});
    }
    DSD_RETURN_IF_ERROR(
        ForRanges(env, threads, params.size(),
                  [&](size_t begin, size_t end) -> absl::Status {
                    for (size_t i = begin; i < end; ++i) {
                      if (group.params[i].duplicate) continue;
                      DSD_ASSIGN_OR_RETURN(
                          group.states[i],
                          ReadParam(model, group, i, std::move(group.states[i]),
                                    group.params[i]));
                    }
                    return absl::OkStatus();
                  }));
    state.Reserve(state.size() + params.size());
    Value::List names;
    names.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      Param& param = group.params[i];
      if (param.duplicate) continue;
      const std::string& fqn = model.fqn(param.model_group);
      names.push_back(Value(fqn));
      if (group.states[i].empty()) continue;
      param.entry = static_cast<uint32_t>(state.size());
      state.Append(fqn, Value(std::move(group.states[i])));
    }
    group.states = {};
    DSD_ASSIGN_OR_RETURN(
        StateDict group_dict,
        GroupDict(optimizer, group.index, group.hyperparameters, names.size()));
    group_dict.Append(kParamsKey, Value(std::move(names)));
    group_dict.Share();
    group_dicts.push_back(Value(std::move(group_dict)));
  }
  dict_ = StateDict();
  dict_.Append(kStateKey, Value(std::move(state)));
  dict_.Append(kGroupsKey, Value(std::move(group_dicts)));
  dict_.Share();
  return absl::OkStatus();
}

bool OptimizerReader::HasSameParameters(
    absl::Span<OptimizerSource* const> optimizers) const {
  size_t at = 0;
  for (OptimizerSource* const optimizer : optimizers) {
    for (size_t index = 0; index < optimizer->num_groups(); ++index, ++at) {
      if (at == groups_.size()) return false;
      const Group& group = groups_[at];
      const absl::Span<const at::Tensor> params = optimizer->params(index);
      if (group.optimizer != optimizer || group.index != index ||
          group.params.size() != params.size()) {
        return false;
      }
      for (size_t i = 0; i < params.size(); ++i) {
        if (params[i].unsafeGetTensorImpl() != group.params[i].tensor) {
          return false;
        }
      }
    }
  }
  return at == groups_.size();
}

absl::StatusOr<bool> OptimizerReader::LookForChanges(
    absl::Span<OptimizerSource* const> optimizers) {
  if (!HasSameParameters(optimizers)) return false;
  std::vector<size_t> changed_states;
  for (Group& group : groups_) {
    DSD_ASSIGN_OR_RETURN(const ObjectDict hyperparameters,
                         group.optimizer->Hyperparameters(group.index));
    if (!(hyperparameters == group.hyperparameters)) return false;
    const absl::Span<const at::Tensor> params =
        group.optimizer->params(group.index);
    changed_states.clear();
    group.optimizer->FindChangedStates(group.index, group.marks,
                                       changed_states);
    auto next_changed = changed_states.begin();
    group.changed.clear();
    constexpr size_t kAhead = 16;
    for (size_t i = 0; i < params.size(); ++i) {
      if (i + kAhead < params.size()) {
        PrefetchBytes(group.params[i + kAhead].count, sizeof(c10::TensorImpl));
      }
      const bool changed =
          next_changed != changed_states.end() && *next_changed == i;
      if (changed) ++next_changed;
      const Param& param = group.params[i];
      if (param.duplicate) continue;
      if (param.entry == kNoEntry) {
        if (!changed && params[i].requires_grad() == param.trainable) continue;
        return false;
      }
      if (!param.live || changed || !param.IsCountAsItWas()) {
        group.changed.push_back(i);
      }
    }
  }
  return true;
}

absl::Status OptimizerReader::ReadChanges(Env* env, int threads,
                                          const LiveModel& model, bool* all) {
  struct Change {
    uint32_t entry;
    StateDict state;
  };
  using Changes = std::vector<Change>;
  std::vector<Changes> changes;
  for (Group& group : groups_) {
    const absl::Span<const at::Tensor> params =
        group.optimizer->params(group.index);
    const bool most_changed = 2 * group.changed.size() > params.size();
    const auto read = [&](size_t begin, size_t end,
                          Changes& mine) -> absl::Status {
      mine.reserve(end - begin);
      for (size_t k = begin; k < end; ++k) {
        const size_t i = group.changed[k];
        if (most_changed) {
          PrefetchParams(model, params, i);
          PrefetchStates(*group.optimizer, group.index, i);
        }
        Param& param = group.params[i];
        param.trainable = params[i].requires_grad();
        DSD_ASSIGN_OR_RETURN(StateDict entries,
                             group.optimizer->State(group.index, i));
        DSD_ASSIGN_OR_RETURN(
            entries, ReadParam(model, group, i, std::move(entries), param));
        mine.push_back({param.entry, std::move(entries)});
      }
      return absl::OkStatus();
    };
    DSD_ASSIGN_OR_RETURN(
        std::vector<Changes> of_group,
        MapRanges<Changes>(env, threads, group.changed.size(), read));
    std::move(of_group.begin(), of_group.end(), std::back_inserter(changes));
  }
  for (const Changes& part : changes) {
    for (const Change& change : part) {
      if (!change.state.empty()) continue;
      *all = true;
      return absl::OkStatus();
    }
  }
  if (changes.empty()) return absl::OkStatus();
  StateDict& own = *dict_.value(0).get_if<StateDict>();
  for (Changes& part : changes) {
    for (Change& change : part) {
      own.value(change.entry) = Value(std::move(change.state));
    }
  }
  dict_.Share();
  return absl::OkStatus();
}

void OptimizerReader::Look(Env* env, int threads,
                           absl::Span<OptimizerSource* const> optimizers) {
  const bool may_be_changes = std::exchange(is_current_, false);
  looked_ = Looked::kNot;
  look_status_ = TorchToStatus([&]() -> absl::Status {
    if (may_be_changes) {
      DSD_ASSIGN_OR_RETURN(const bool enough, LookForChanges(optimizers));
      if (enough) {
        looked_ = Looked::kForChanges;
        return absl::OkStatus();
      }
    }
    DSD_RETURN_IF_ERROR(LookAtAll(env, threads, optimizers));
    looked_ = Looked::kAtAll;
    return absl::OkStatus();
  });
}

absl::StatusOr<StateDict> OptimizerReader::Read(
    Env* env, int threads, const LiveModel& model,
    absl::Span<OptimizerSource* const> optimizers) {
  if (looked_ == Looked::kNot && look_status_.ok()) {
    Look(env, threads, optimizers);
  }
  DSD_RETURN_IF_ERROR(std::exchange(look_status_, absl::OkStatus()));
  const Looked looked = std::exchange(looked_, Looked::kNot);
  const uint64_t shardings = ShardingTable::Global().generation();
  bool all = looked == Looked::kAtAll ||
             model.tables_built() != tables_built_ || shardings != shardings_;
  if (!all) DSD_RETURN_IF_ERROR(ReadChanges(env, threads, model, &all));
  if (all) {
    if (looked != Looked::kAtAll) {
      DSD_RETURN_IF_ERROR(LookAtAll(env, threads, optimizers));
    }
    DSD_RETURN_IF_ERROR(ReadAll(env, threads, model));
  }
  tables_built_ = model.tables_built();
  shardings_ = shardings;
  is_current_ = true;
  return dict_;
}

}  // namespace dsd
