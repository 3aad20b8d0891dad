// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/model_state.h"

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/core/grad_mode.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/empty_strided.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "c10/core/InferenceMode.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/copy_tensors.h"
#include "dsd/core/state_dict/key_map.h"
#include "dsd/core/tensor/memory_overlap.h"
#include "dsd/core/tensor/tensor_memory.h"
#include "dsd/core/tensor/torch_boundary.h"

namespace dsd {
namespace {

bool IsMeta(const TensorValue& value) {
  return std::any_of(value.locals().begin(), value.locals().end(),
                     [](const at::Tensor& local) { return local.is_meta(); });
}

bool IsDense(const TensorValue& value) {
  return std::all_of(value.locals().begin(), value.locals().end(),
                     [](const at::Tensor& local) {
                       return local.layout() == c10::Layout::Strided;
                     });
}

// Dicts of PyTorch before 0.4 have [1] where there is no dimension now.
bool IsLegacyScalar(const TensorValue& value, const TensorValue& live) {
  return value.is_plain() && live.is_plain() && value.shape() == Dims({1}) &&
         live.shape().empty();
}

// The tensor some entries behind `position`, which is needed soon.
void PrefetchEntry(const StateDict& dict, size_t position) {
  constexpr size_t kAhead = 8;
  if (position + kAhead >= dict.size()) return;
  dict.PrefetchKey(position + kAhead);
  const auto* const tensor =
      dict.value(position + kAhead).get_if<TensorValue>();
  if (tensor != nullptr) PrefetchTensors(tensor->locals());
}

// What a person who has these keys may have overlooked; empty if nothing.
std::string HintFor(const std::vector<std::string>& unexpected,
                    const FqnTable& table) {
  const KeyMap strip = StripWrapperSegments();
  for (const std::string& key : unexpected) {
    if (table.Find(strip(key)).has_value()) {
      return absl::StrCat(
          "\"", key, "\" is \"", strip(key),
          "\" with the segments of wrappers, as state_dict() of a wrapped "
          "model writes it: set key_map = dsd::StripWrapperSegments()");
    }
    if (absl::StrContains(key, "_flat_param")) {
      return absl::StrCat(
          "\"", key,
          "\" is a flat parameter of FSDP, which has no FQN: get the dict from "
          "the root module with get_model_state_dict");
    }
  }
  return "";
}

}  // namespace

absl::StatusOr<KeyScope> KeyScope::Create(const FqnTable& table,
                                          const StateDictOptions& options) {
  KeyScope scope;
  if (options.submodules.empty()) return scope;
  scope.everything_ = false;
  scope.keep_prefixes_ = options.keep_submodule_prefixes;
  absl::flat_hash_set<std::string> known;
  for (const Submodule& submodule : options.submodules) {
    if (submodule.is_null()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "submodules: entry ", &submodule - options.submodules.data(), " of ",
          options.submodules.size(),
          " is a null pointer; give a module of the model, or its FQN (\"\": "
          "the model itself)"));
    }
    bool found = false;
    for (const FqnTable::Module& module : table.modules()) {
      if (submodule.object() != nullptr ? module.object != submodule.object()
                                        : module.fqn != submodule.fqn()) {
        continue;
      }
      found = true;
      std::string prefix =
          module.fqn.empty() ? "" : absl::StrCat(module.fqn, ".");
      if (known.insert(prefix).second) {
        scope.prefixes_.push_back(std::move(prefix));
      }
    }
    if (!found) {
      return absl::InvalidArgumentError(
          submodule.object() != nullptr
              ? "submodules: an object is not a module of this model"
              : absl::StrCat("submodules: the model has no module \"",
                             submodule.fqn(), "\""));
    }
  }
  return scope;
}

void KeyScope::ForEachKey(
    const FqnTable::Entry& entry,
    absl::FunctionRef<void(const std::string&)> visit) const {
  if (entry.kind == EntryKind::kNonPersistentBuffer) return;
  if (everything_) return visit(entry.fqn);
  for (const std::string& prefix : prefixes_) {
    if (!absl::StartsWith(entry.fqn, prefix)) continue;
    if (keep_prefixes_) return visit(entry.fqn);
    visit(entry.fqn.substr(prefix.size()));
  }
}

absl::StatusOr<StateDict> GetModelState(const LiveModel& model,
                                        const StateDictOptions& options) {
  const FqnTable& table = model.table();
  DSD_ASSIGN_OR_RETURN(const KeyScope scope, KeyScope::Create(table, options));
  StateDict dict;
  if (scope.is_everything()) dict.Reserve(table.entries().size());
  const auto put = [&](const std::string& key, Value value) {
    // FQNs differ.
    if (scope.is_everything()) {
      dict.Append(key, std::move(value));
    } else {
      dict.Set(key, std::move(value));
    }
  };
  absl::flat_hash_map<size_t, Value> extra_states;  // by group: asked once
  absl::flat_hash_map<std::string, size_t> group_of_key;  // if not everything
  const absl::Span<const FqnTable::Entry> entries = table.entries();
  for (size_t i = 0; i < entries.size(); ++i) {
    constexpr size_t kAhead = 8;
    if (i + kAhead < entries.size()) {
      PrefetchTensors(model.value(entries[i + kAhead].group).locals());
    }
    const FqnTable::Entry& entry = entries[i];
    if (options.ignore_frozen_params && entry.kind == EntryKind::kParameter &&
        !model.tensor(entry).requires_grad()) {
      continue;
    }
    absl::Status status;
    scope.ForEachKey(entry, [&](const std::string& key) {
      if (!scope.is_everything()) {
        const auto [it, is_new] = group_of_key.try_emplace(key, entry.group);
        if (!is_new) {
          // A module that is registered twice has the same tensor again.
          if (it->second == entry.group) return;
          status.Update(absl::InvalidArgumentError(
              absl::StrCat("without the prefixes of the submodules \"",
                           entry.fqn, "\" and another tensor have the key \"",
                           key, "\"; set keep_submodule_prefixes = true")));
          return;
        }
      }
      ExtraState* const extra = model.extra_state(entry.group);
      if (extra == nullptr) {
        put(key, Value(model.value(entry.group)));
        return;
      }
      const auto known = extra_states.find(entry.group);
      if (known != extra_states.end()) {
        put(key, known->second);
        return;
      }
      absl::StatusOr<Value> value =
          TorchToStatus([&] { return extra->GetExtraState(); });
      if (!value.ok()) {
        status.Update(
            Annotate(value.status(), absl::StrCat("\"", entry.fqn, "\"")));
        return;
      }
      extra_states.emplace(entry.group, *value);
      put(key, *std::move(value));
    });
    DSD_RETURN_IF_ERROR(status);
  }
  return dict;
}

std::string ModelLoad::MisfitOf(const std::string& key, const Value& value,
                                size_t group) const {
  const TensorValue& live = model_.value(group);
  const auto* tensor = value.get_if<TensorValue>();
  if (tensor == nullptr || !tensor->defined()) {
    return absl::StrCat(
        "\"", key, "\": expected a tensor, found ",
        tensor == nullptr ? value.kind_name() : "an undefined one");
  }
  if (tensor->shape() != live.shape() && !IsLegacyScalar(*tensor, live)) {
    return absl::StrCat("\"", key, "\": shape in the dict is ",
                        DimsToString(tensor->shape()), ", in the model ",
                        DimsToString(live.shape()));
  }
  const c10::ScalarType from = tensor->scalar_type();
  const c10::ScalarType to = live.scalar_type();
  if (from != to) {
    const std::string types =
        absl::StrCat("\"", key, "\": type in the dict is ", c10::toString(from),
                     ", in the model ", c10::toString(to));
    switch (options_.dtype_policy) {
      case DTypePolicy::kDefault:
      case DTypePolicy::kCast:
        if (!c10::canCast(from, to)) {
          return absl::StrCat(types, ", which would lose values");
        }
        break;
      case DTypePolicy::kKeep:
        if (!options_.assign) {
          return absl::StrCat(types,
                              "; to keep that of the dict set assign = true");
        }
        if (model_.tensor(group).requires_grad() &&
            !c10::isFloatingType(from) && !c10::isComplexType(from)) {
          return absl::StrCat(types, ", and only floats can have gradients");
        }
        break;
      case DTypePolicy::kError:
        return absl::StrCat(types, "; dtype_policy = kCast converts it");
    }
  }
  for (const TensorValue* const side : {tensor, &live}) {
    if (IsDense(*side)) continue;
    return absl::StrCat("\"", key, "\": the ",
                        side == tensor ? "tensor in the dict" : "live tensor",
                        " is not dense (sparse layouts are not supported); "
                        "convert it with to_dense()");
  }
  if (IsMeta(*tensor)) {
    return absl::StrCat("\"", key,
                        "\": the tensor in the dict is on the meta device and "
                        "has no values");
  }
  if (options_.assign) {
    if (model_.tensor(group).is_inference()) {
      return absl::StrCat("\"", key,
                          "\": the live tensor was made in inference mode, "
                          "where tensors keep their memory; set "
                          "assign = false, or make the model outside of it");
    }
    return "";
  }
  if (IsMeta(live)) {
    return absl::StrCat("\"", key,
                        "\": the live tensor is on the meta device and has no "
                        "memory; set assign = true");
  }
  for (const at::Tensor& local : live.locals()) {
    if (OverlapsItself(local)) {
      return absl::StrCat("\"", key,
                          "\": the live tensor is expanded (several elements "
                          "share memory) and cannot be filled; make it "
                          "contiguous");
    }
  }
  return "";
}

absl::Status ModelLoad::Match(const StateDict& dict, const StateDict* elsewhere,
                              MismatchReport& report) {
  const FqnTable& table = model_.table();
  DSD_ASSIGN_OR_RETURN(const KeyScope scope, KeyScope::Create(table, options_));
  absl::flat_hash_map<std::string, size_t> group_of_key;  // if not everything
  for (const FqnTable::Entry& entry : table.entries()) {
    if (scope.is_everything()) break;
    absl::Status status;
    scope.ForEachKey(entry, [&](const std::string& key) {
      const auto [it, is_new] = group_of_key.try_emplace(key, entry.group);
      if (!is_new && it->second != entry.group) {
        status = absl::InvalidArgumentError(
            absl::StrCat("without the prefixes of the submodules \"", entry.fqn,
                         "\" and another tensor have the key \"", key,
                         "\"; set keep_submodule_prefixes = true"));
      }
    });
    DSD_RETURN_IF_ERROR(status);
  }
  const auto first_key = [&](size_t group) {
    std::optional<std::string> first;
    for (const size_t index : table.groups()[group]) {
      scope.ForEachKey(table.entries()[index], [&](const std::string& name) {
        if (!first.has_value()) first = name;
      });
    }
    return first.value_or("");
  };
  const bool has_followers = model_.has_overlap();
  absl::flat_hash_set<size_t> filled;  // by leader, if it has_followers
  std::vector<std::pair<size_t, std::string>> missing;
  size_t num_found = 0;
  size_t position = 0;  // in `dict`, which is mostly in the model's order
  for (size_t group = 0; group < table.groups().size(); ++group) {
    PrefetchEntry(dict, position);
    table.PrefetchNear(table.groups()[group][0]);
    // Tied tensors: one of their names is enough. Others must fit too.
    bool is_inside = false;
    const Value* value = nullptr;
    bool fits = true;
    for (const size_t index : table.groups()[group]) {
      scope.ForEachKey(table.entries()[index], [&](const std::string& name) {
        is_inside = true;
        const Value* const found = dict.FindNear(name, &position);
        if (found == nullptr) return;
        ++num_found;
        if (value == nullptr) value = found;
        if (model_.extra_state(group) != nullptr) return;
        std::string misfit = MisfitOf(name, *found, group);
        if (misfit.empty()) return;
        fits = false;
        report.misfits.push_back(std::move(misfit));
      });
    }
    if (!is_inside) continue;
    // The same memory with its dimensions in another order (w and w.t()): what
    // fills one fills the other.
    const size_t leader = model_.LeaderOf(group);
    if (leader != group && filled.contains(leader)) continue;
    if (value == nullptr) {
      missing.emplace_back(group, first_key(group));
      continue;
    }
    if (has_followers) filled.insert(leader);
    if (model_.extra_state(group) != nullptr) {
      extras_.push_back({group, first_key(group), *value});
    } else if (fits) {
      tensors_.push_back(
          {group, value->get_if<TensorValue>(), TensorValue(at::Tensor())});
    }
  }
  for (auto& [group, key] : missing) {
    if (filled.contains(model_.LeaderOf(group))) continue;
    report.model.missing_keys.push_back(std::move(key));
  }
  // Names differ, so each has found a key of its own.
  const bool all_are_known = scope.is_everything() && num_found == dict.size();
  position = 0;  // in the table
  for (size_t i = 0; !all_are_known && i < dict.size(); ++i) {
    dict.PrefetchKey(i + 8);
    table.PrefetchNear(position);
    const auto* const text = std::get_if<std::string>(&dict.key(i));
    const std::string number = text == nullptr ? dict.key_text(i) : "";
    const std::string& key = text == nullptr ? number : *text;
    if (elsewhere != nullptr && elsewhere->contains(key)) continue;
    if (scope.is_everything()) {
      const std::optional<size_t> index = table.FindNear(key, &position);
      if (index.has_value() &&
          table.entries()[*index].kind != EntryKind::kNonPersistentBuffer) {
        continue;
      }
    } else if (group_of_key.contains(key)) {
      continue;
    }
    report.model.unexpected_keys.push_back(key);
  }
  report.hint = HintFor(report.model.unexpected_keys, table);
  CheckOverlap(report);
  return absl::OkStatus();
}

void ModelLoad::CheckOverlap(MismatchReport& report) {
  if (!model_.has_overlap()) return;
  std::vector<at::Tensor> targets;
  for (const TensorLoad& load : tensors_) {
    // One per memory: Match takes one of those that differ only in the order
    // of their dimensions.
    targets.push_back(model_.tensor(load.group));
  }
  if (const auto overlap = FindOverlap(targets)) {
    report.misfits.push_back(absl::StrCat(
        "the live tensors \"", model_.fqn(tensors_[overlap->first].group),
        "\" and \"", model_.fqn(tensors_[overlap->second].group),
        "\" share some of their memory without being the same tensor: filling "
        "one would change the other"));
  }
}

c10::ScalarType ModelLoad::TargetType(const TensorLoad& load) const {
  return options_.dtype_policy == DTypePolicy::kKeep
             ? load.source->scalar_type()
             : model_.value(load.group).scalar_type();
}

absl::StatusOr<TensorValue> ModelLoad::NewTarget(const TensorLoad& load) const {
  const TensorValue& live = model_.value(load.group);
  const at::Tensor& local = live.locals()[0];
  DSD_ASSIGN_OR_RETURN(
      at::Tensor target, TorchToStatus([&] {
        // The live tensor goes on to be trained.
        const c10::InferenceMode off(false);
        const auto options =
            c10::TensorOptions(TargetType(load))
                .device(local.is_meta() ? c10::kCPU : local.device());
        // Views of it will be given to those that share its memory.
        return model_.FollowersOf(load.group).empty()
                   ? at::empty(local.sizes(), options)
                   : at::empty_strided(local.sizes(), local.strides(), options);
      }));
  if (live.is_plain()) return TensorValue(std::move(target));
  return TensorValue::Sharded(Sharding{live.layout(), live.holder()},
                              std::move(target));
}

absl::Status ModelLoad::Prepare(std::vector<TensorPair>& pairs) {
  pairs.reserve(pairs.size() + tensors_.size());
  for (TensorLoad& load : tensors_) {
    const std::string& fqn = model_.fqn(load.group);
    const TensorValue* target = &model_.value(load.group);
    if (options_.assign) {
      absl::StatusOr<TensorValue> memory = NewTarget(load);
      DSD_RETURN_IF_ERROR(memory) << "\"" << fqn << "\"";
      load.new_memory = *std::move(memory);
      target = &load.new_memory;
    }
    pairs.push_back({{"model", &fqn}, *load.source, *target});
    if (load.source->shape() != target->shape()) {  // IsLegacyScalar
      DSD_ASSIGN_OR_RETURN(
          at::Tensor scalar, TorchToStatus([&] {
            return load.source->locals()[0].detach().reshape({});
          }));
      pairs.back().source = TensorValue(std::move(scalar));
    }
  }
  for (ExtraLoad& load : extras_) {
    DSD_RETURN_IF_ERROR(
        CopyTensors(absl::StrCat("model.", load.key), load.value, pairs));
  }
  return absl::OkStatus();
}

absl::Status ModelLoad::Commit() {
  for (const TensorLoad& load : tensors_) {
    if (!options_.assign) break;
    FqnTable::Aliases indices = model_.table().groups()[load.group];
    for (const size_t follower : model_.FollowersOf(load.group)) {
      const FqnTable::Aliases& more = model_.table().groups()[follower];
      indices.insert(indices.end(), more.begin(), more.end());
    }
    // New memory is neither conjugated nor negated.
    const bool is_conj = model_.tensor(load.group).is_conj();
    const bool is_neg = model_.tensor(load.group).is_neg();
    for (const size_t index : indices) {
      const FqnTable::Entry& entry = model_.table().entries()[index];
      DSD_RETURN_IF_ERROR(TorchToStatus([&] {
        const at::NoGradGuard no_grad;
        const at::Tensor& live = model_.tensor(entry);
        at::Tensor target = load.new_memory.locals()[0];
        if (entry.group != load.group) {
          if (live.scalar_type() != model_.value(load.group).scalar_type()) {
            target = target.view(live.scalar_type());
          }
          target = target.as_strided(live.sizes(), live.strides());
          if (live.is_conj() != is_conj) target = target.conj();
          if (live.is_neg() != is_neg) target = target._neg_view();
        }
        // set_data refuses to leave the meta device.
        if (live.is_meta()) {
          live.unsafeGetTensorImpl()->_change_backend_component_keys(
              target.device());
        }
        live.set_data(target);
      })) << "assign \""
          << entry.fqn << "\"";
    }
  }
  for (const ExtraLoad& load : extras_) {
    DSD_RETURN_IF_ERROR(TorchToStatus([&] {
      return model_.extra_state(load.group)->SetExtraState(load.value);
    })) << "\""
        << load.key << "\"";
  }
  return absl::OkStatus();
}

}  // namespace dsd
