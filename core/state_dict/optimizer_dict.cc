// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/optimizer_dict.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/optimizer_reader.h"
#include "dsd/core/value/flatten.h"

namespace dsd {
namespace {

absl::Status NotAnOptimizerDict(absl::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat("this is not an optimizer state dict keyed by FQN: ", what,
                   "; make it with GetOptimizerStateDict, or in Python with "
                   "get_optimizer_state_dict"));
}

absl::Status FlattenState(const std::string& prefix, const Value& value,
                          StateDict& flat) {
  if (const auto* dict = value.get_if<StateDict>()) {
    for (size_t i = 0; i < dict->size(); ++i) {
      DSD_RETURN_IF_ERROR(FlattenState(
          absl::StrCat(prefix, ".", dict->key_text(i)), dict->value(i), flat));
    }
    return absl::OkStatus();
  }
  if (!value.is<TensorValue>() && !value.is<int64_t>() && !value.is<double>() &&
      !value.is<bool>()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", prefix,
        "\": the flat form has tensors, numbers and dicts of them, found ",
        value.kind_name(), "; use the nested form"));
  }
  if (flat.contains(prefix)) {
    return absl::InvalidArgumentError(
        absl::StrCat("two values have the key \"", prefix,
                     "\" in the flat form; use the nested form"));
  }
  flat.Append(prefix, value);
  return absl::OkStatus();
}

// The number of a parameter in Python's own form; a text of digits, if that is
// what a file made of it.
bool ToNumber(const PathSegment& key, int64_t& number) {
  if (const auto* v = std::get_if<int64_t>(&key)) {
    number = *v;
    return true;
  }
  return absl::SimpleAtoi(std::get<std::string>(key), &number);
}

// Entries of a nested state have no lists in the flat form: a number is the key
// of a dict.
Value* DictEntry(Value& at, absl::string_view key) {
  if (at.is<None>()) at = Value(StateDict());
  auto* dict = at.get_if<StateDict>();
  if (dict == nullptr) return nullptr;
  Value* found = dict->Find(key);
  return found != nullptr ? found : &dict->Set(std::string(key), Value());
}

}  // namespace

absl::StatusOr<StateDict> FlattenOptimizerState(const StateDict& nested) {
  StateDict flat;
  if (const Value* state = nested.Find(kStateKey)) {
    DSD_RETURN_IF_ERROR(FlattenState(kStateKey, *state, flat));
  }
  const Value* groups = nested.Find(kGroupsKey);
  const auto* list =
      groups == nullptr ? nullptr : groups->get_if<Value::List>();
  for (size_t g = 0; list != nullptr && g < list->size(); ++g) {
    const auto* group = (*list)[g].get_if<StateDict>();
    const Value* params = group == nullptr ? nullptr : group->Find(kParamsKey);
    const auto* names =
        params == nullptr ? nullptr : params->get_if<Value::List>();
    for (size_t n = 0; names != nullptr && n < names->size(); ++n) {
      const auto* fqn = (*names)[n].get_if<std::string>();
      for (size_t i = 0; fqn != nullptr && i < group->size(); ++i) {
        const std::string key = group->key_text(i);
        if (key == kParamsKey) continue;
        flat.Set(absl::StrCat(kGroupsKey, ".", *fqn, ".", key),
                 group->value(i));
      }
    }
  }
  return flat;
}

absl::StatusOr<OptimizerDict> OptimizerDict::Read(
    const StateDict& dict, const LiveModel& model,
    absl::Span<OptimizerSource* const> optimizers) {
  OptimizerDict out;
  if (dict.Find(kStateKey) != nullptr || dict.Find(kGroupsKey) != nullptr) {
    DSD_RETURN_IF_ERROR(out.ReadNested(dict, model, optimizers));
  } else {
    DSD_RETURN_IF_ERROR(out.ReadFlat(dict, model));
  }
  return out;
}

absl::Status OptimizerDict::ReadNested(
    const StateDict& dict, const LiveModel& model,
    absl::Span<OptimizerSource* const> optimizers) {
  struct Listed {
    const StateDict* group;
    const std::vector<Value>* params;
  };
  std::vector<Listed> listed;
  bool by_number = false;
  if (const Value* groups = dict.Find(kGroupsKey)) {
    const auto* list = groups->get_if<Value::List>();
    if (list == nullptr) {
      return NotAnOptimizerDict(
          absl::StrCat("expected a list under \"param_groups\", found ",
                       groups->kind_name()));
    }
    for (size_t g = 0; g < list->size(); ++g) {
      const auto* group = (*list)[g].get_if<StateDict>();
      const Value* params =
          group == nullptr ? nullptr : group->Find(kParamsKey);
      const auto* names =
          params == nullptr ? nullptr : params->get_if<Value::List>();
      if (names == nullptr) {
        return NotAnOptimizerDict(
            absl::StrCat("group ", g, " has no list \"params\""));
      }
      by_number |= !names->empty() && (*names)[0].is<int64_t>();
      listed.push_back({group, names});
    }
  }

  // Number of a parameter -> its FQN: by position, as in Python.
  absl::flat_hash_map<int64_t, absl::string_view> fqn_of;
  std::vector<std::vector<absl::string_view>> live_names(listed.size());
  if (by_number) {
    if (optimizers.size() != 1) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the dict names parameters by number, as optimizer.state_dict() in "
          "Python does, which is enough for one optimizer, and here are ",
          optimizers.size(),
          "; set them one by one, or make it with get_optimizer_state_dict in "
          "Python"));
    }
    const OptimizerSource& optimizer = *optimizers[0];
    if (optimizer.num_groups() != listed.size()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the dict names parameters by number, so it must have the groups of ",
          "the optimizer: it has ", listed.size(), ", ", optimizer.type_name(),
          " has ", optimizer.num_groups()));
    }
    ParameterOwners owners(model);
    for (size_t g = 0; g < listed.size(); ++g) {
      for (size_t i = 0; i < optimizer.params(g).size(); ++i) {
        DSD_ASSIGN_OR_RETURN(const bool is_new, owners.Add(optimizer, g, i));
        if (is_new) live_names[g].push_back(model.fqn(owners.model_group()));
      }
      if (live_names[g].size() != listed[g].params->size()) {
        return absl::InvalidArgumentError(absl::StrCat(
            "the dict names parameters by number, so its groups must be those "
            "of the optimizer: group ",
            g, " of the dict has ", listed[g].params->size(), " parameters, ",
            GroupName(optimizer, g), " has ", live_names[g].size()));
      }
      for (size_t i = 0; i < live_names[g].size(); ++i) {
        const auto* number = (*listed[g].params)[i].get_if<int64_t>();
        if (number == nullptr ||
            !fqn_of.try_emplace(*number, live_names[g][i]).second) {
          return NotAnOptimizerDict(absl::StrCat(
              "group ", g, " lists parameter ", i,
              number == nullptr ? " not by number, as it does others"
                                : " under a number that is taken"));
        }
      }
    }
    own_state_ = std::make_unique<StateDict>();
  }

  if (const Value* state = dict.Find(kStateKey)) {
    const auto* entries = state->get_if<StateDict>();
    if (entries == nullptr) {
      return NotAnOptimizerDict(absl::StrCat(
          "expected a dict under \"state\", found ", state->kind_name()));
    }
    for (size_t i = 0; i < entries->size(); ++i) {
      if (!entries->value(i).is<StateDict>()) {
        return NotAnOptimizerDict(absl::StrCat(
            "expected a dict as the state of \"", entries->key_text(i),
            "\", found ", entries->value(i).kind_name()));
      }
      if (by_number) {
        int64_t number = 0;
        const auto fqn = ToNumber(entries->key(i), number) ? fqn_of.find(number)
                                                           : fqn_of.end();
        if (fqn == fqn_of.end()) {
          return NotAnOptimizerDict(absl::StrCat("no group lists parameter ",
                                                 entries->key_text(i),
                                                 ", which has state"));
        }
        own_state_->Set(std::string(fqn->second), entries->value(i));
      } else if (!std::holds_alternative<std::string>(entries->key(i))) {
        return NotAnOptimizerDict(absl::StrCat("the state has the integer key ",
                                               entries->key_text(i)));
      }
    }
    state_ = by_number ? own_state_.get() : entries;
  }
  for (size_t g = 0; g < listed.size(); ++g) {
    DSD_RETURN_IF_ERROR(
        ReadGroup(g, *listed[g].group, *listed[g].params, live_names[g]));
  }
  return absl::OkStatus();
}

// `names`: of the parameters, if they are listed by number.
absl::Status OptimizerDict::ReadGroup(
    size_t index, const StateDict& group, const std::vector<Value>& params,
    absl::Span<const absl::string_view> names) {
  Group out;
  out.params.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    if (!names.empty()) {
      out.params.push_back(names[i]);
    } else if (const auto* fqn = params[i].get_if<std::string>()) {
      out.params.push_back(*fqn);
    } else {
      return NotAnOptimizerDict(
          absl::StrCat("group ", index, " names a parameter by ",
                       params[i].kind_name(), " instead of its FQN"));
    }
  }
  group_of_.reserve(group_of_.size() + params.size());
  for (size_t i = 0; i < out.params.size(); ++i) {
    const absl::string_view fqn = out.params[i];
    const auto [place, is_new] = group_of_.try_emplace(
        fqn, Place{static_cast<uint32_t>(index), static_cast<uint32_t>(i)});
    if (!is_new && place->second.group != index) {
      return absl::InvalidArgumentError(
          absl::StrCat("the dict has \"", fqn, "\" in group ",
                       place->second.group, " and in group ", index,
                       ", and so no single set of hyperparameters for it"));
    }
  }
  for (size_t i = 0; i < group.size(); ++i) {
    const std::string key = group.key_text(i);
    if (key == kParamsKey) continue;
    absl::StatusOr<Object> value = ToObject(group.value(i));
    DSD_RETURN_IF_ERROR(value) << "group " << index << " \"" << key << "\"";
    if (key != kParamNamesKey) {
      out.values.Set(key, *std::move(value));
      continue;
    }
    const auto* given = value->get_if<Object::List>();
    for (size_t p = 0; given != nullptr && given->size() == params.size() &&
                       p < params.size();
         ++p) {
      if (const auto* name = (*given)[p].get_if<std::string>()) {
        param_names_[out.params[p]] = *name;
      }
    }
  }
  groups_.push_back(std::move(out));
  return absl::OkStatus();
}

absl::Status OptimizerDict::ReadFlat(const StateDict& dict,
                                     const LiveModel& model) {
  is_flat_ = true;
  own_state_ = std::make_unique<StateDict>();
  state_ = own_state_.get();
  for (size_t i = 0; i < dict.size(); ++i) {
    const auto* key = std::get_if<std::string>(&dict.key(i));
    absl::string_view rest = key == nullptr ? absl::string_view() : *key;
    const bool is_state = absl::ConsumePrefix(&rest, "state.");
    if (!is_state && !absl::ConsumePrefix(&rest, "param_groups.")) {
      return NotAnOptimizerDict(
          absl::StrCat("expected keys \"state.<FQN>.<name>\" and "
                       "\"param_groups.<FQN>.<name>\", found \"",
                       dict.key_text(i), "\""));
    }
    // FQNs and names both have dots: the longest FQN of the model that fits.
    // Keys of other parameters are left alone, as Python leaves them.
    size_t dot = rest.rfind('.');
    while (dot != absl::string_view::npos && dot > 0 &&
           !model.table().Find(rest.substr(0, dot)).has_value()) {
      dot = rest.rfind('.', dot - 1);
    }
    if (dot == absl::string_view::npos || dot == 0) continue;
    const absl::string_view fqn = rest.substr(0, dot);
    const absl::string_view name = rest.substr(dot + 1);
    if (is_state) {
      Value* at = own_state_->Find(fqn);
      if (at == nullptr) at = &own_state_->Set(std::string(fqn), Value());
      for (const absl::string_view part : absl::StrSplit(name, '.')) {
        at = DictEntry(*at, part);
        if (at == nullptr) break;
      }
      if (at == nullptr || !at->is<None>()) {
        return NotAnOptimizerDict(absl::StrCat(
            "\"", *key, "\" is ", at == nullptr ? "below" : "above",
            " the key of another value"));
      }
      *at = dict.value(i);
      continue;
    }
    const auto [place, is_new] = group_of_.try_emplace(
        fqn, Place{static_cast<uint32_t>(groups_.size()), 0});
    if (is_new) groups_.emplace_back().params.push_back(fqn);
    absl::StatusOr<Object> value = ToObject(dict.value(i));
    DSD_RETURN_IF_ERROR(value) << "\"" << *key << "\"";
    if (name != kParamNamesKey) {
      groups_[place->second.group].values.Set(std::string(name),
                                              *std::move(value));
      continue;
    }
    // Each parameter has the names of its whole group: its own is one of them
    // if it is the FQN, as it nearly always is.
    const auto* given = value->get_if<Object::List>();
    if (given != nullptr &&
        std::find(given->begin(), given->end(), Object(fqn)) != given->end()) {
      param_names_[fqn] = std::string(fqn);
    }
  }
  return absl::OkStatus();
}

const StateDict* OptimizerDict::FindState(absl::string_view fqn,
                                          Position& position) const {
  const Value* state =
      state_ == nullptr ? nullptr : state_->FindNear(fqn, &position.state);
  return state == nullptr ? nullptr : state->get_if<StateDict>();
}

int64_t OptimizerDict::FindGroup(absl::string_view fqn,
                                 Position& position) const {
  if (position.group < groups_.size()) {
    const std::vector<absl::string_view>& params =
        groups_[position.group].params;
    if (position.param < params.size() && params[position.param] == fqn) {
      ++position.param;
      return static_cast<int64_t>(position.group);
    }
  }
  const auto it = group_of_.find(fqn);
  if (it == group_of_.end()) return -1;
  position.group = it->second.group;
  position.param = it->second.param + 1;
  return static_cast<int64_t>(position.group);
}

const std::string* OptimizerDict::FindParamName(absl::string_view fqn) const {
  if (param_names_.empty()) return nullptr;
  const auto it = param_names_.find(fqn);
  return it == param_names_.end() ? nullptr : &it->second;
}

}  // namespace dsd
