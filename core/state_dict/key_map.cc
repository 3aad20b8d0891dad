// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/key_map.h"

#include <cstddef>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/fqn/module_wrapper.h"

namespace dsd {
namespace {

// Sets `to` in `dict`, unless something else became `to` before.
absl::Status SetRenamed(const std::string& from, const std::string& to,
                        Value value,
                        absl::flat_hash_map<std::string, std::string>& origin,
                        StateDict& dict) {
  const auto [it, is_new] = origin.try_emplace(to, from);
  if (!is_new) {
    return absl::InvalidArgumentError(absl::StrCat("key_map makes \"", to,
                                                   "\" of both \"", it->second,
                                                   "\" and \"", from, "\""));
  }
  dict.Set(to, std::move(value));
  return absl::OkStatus();
}

absl::StatusOr<StateDict> MapFlatOptimizerKeys(const StateDict& dict,
                                               const KeyMap& map,
                                               const FqnTable& table) {
  StateDict out;
  absl::flat_hash_map<std::string, std::string> origin;
  for (size_t i = 0; i < dict.size(); ++i) {
    const std::string key = dict.key_text(i);
    std::string renamed = key;
    bool leave_out = false;
    for (const absl::string_view part : {"state.", "param_groups."}) {
      if (!absl::StartsWith(key, part)) continue;
      const absl::string_view rest = absl::string_view(key).substr(part.size());
      for (size_t dot = rest.rfind('.');
           dot != absl::string_view::npos && dot > 0;
           dot = rest.rfind('.', dot - 1)) {
        const absl::string_view own = rest.substr(0, dot);
        const std::string fqn = map(own);
        // What became a name that the model lacks is not the state of the
        // parameter that has the old name here.
        leave_out |= fqn.empty() || (fqn != own && table.Find(own).has_value());
        if (table.Find(fqn).has_value()) {
          renamed = absl::StrCat(part, fqn, rest.substr(dot));
          leave_out = false;
          break;
        }
      }
      break;
    }
    if (leave_out) continue;
    DSD_RETURN_IF_ERROR(SetRenamed(key, renamed, dict.value(i), origin, out));
  }
  return out;
}

// Whether parameters have numbers, as in Python's optimizer.state_dict().
bool HasNumberedParameters(const StateDict& dict) {
  const Value* const groups = dict.Find("param_groups");
  const auto* const list =
      groups == nullptr ? nullptr : groups->get_if<Value::List>();
  if (list == nullptr) return false;
  for (const Value& group : *list) {
    const auto* const values = group.get_if<StateDict>();
    const Value* const params =
        values == nullptr ? nullptr : values->Find("params");
    const auto* const names =
        params == nullptr ? nullptr : params->get_if<Value::List>();
    if (names != nullptr && !names->empty()) return (*names)[0].is<int64_t>();
  }
  return false;
}

// A group with other names in its list "params".
absl::StatusOr<Value> MapGroup(const Value& group, const KeyMap& map) {
  const auto* dict = group.get_if<StateDict>();
  const Value* params = dict == nullptr ? nullptr : dict->Find("params");
  const auto* names =
      params == nullptr ? nullptr : params->get_if<Value::List>();
  if (names == nullptr) return group;  // for the optimizer's parser to refuse
  Value::List renamed;
  absl::flat_hash_map<std::string, std::string> origin;
  for (const Value& name : *names) {
    const auto* fqn = name.get_if<std::string>();
    if (fqn == nullptr) {
      renamed.push_back(name);
      continue;
    }
    std::string to = map(*fqn);
    if (to.empty()) continue;
    const auto [it, is_new] = origin.try_emplace(to, *fqn);
    if (!is_new) {
      return absl::InvalidArgumentError(
          absl::StrCat("key_map makes \"", to, "\" of both \"", it->second,
                       "\" and \"", *fqn, "\""));
    }
    renamed.push_back(Value(std::move(to)));
  }
  StateDict out = *dict;
  out.Set("params", Value(std::move(renamed)));
  return Value(std::move(out));
}

}  // namespace

KeyMap RenameKeys(std::vector<std::pair<std::string, std::string>> renames) {
  absl::flat_hash_map<std::string, std::string> table;
  for (auto& [from, to] : renames) {
    table.emplace(std::move(from), std::move(to));
  }
  return [table = std::move(table)](absl::string_view fqn) {
    const auto it = table.find(fqn);
    return it == table.end() ? std::string(fqn) : it->second;
  };
}

KeyMap StripWrapperSegments() {
  return [](absl::string_view fqn) {
    return absl::StrJoin(absl::StrSplit(fqn, '.',
                                        [](absl::string_view segment) {
                                          return segment != kDdpSegment &&
                                                 segment != kCompileSegment &&
                                                 segment !=
                                                     kCheckpointSegment &&
                                                 segment != kFsdpSegment;
                                        }),
                         ".");
  };
}

absl::StatusOr<StateDict> MapModelKeys(const StateDict& dict,
                                       const KeyMap& map) {
  StateDict out;
  absl::flat_hash_map<std::string, std::string> origin;
  for (size_t i = 0; i < dict.size(); ++i) {
    const std::string key = dict.key_text(i);
    const std::string to = map(key);
    if (to.empty()) continue;
    DSD_RETURN_IF_ERROR(SetRenamed(key, to, dict.value(i), origin, out));
  }
  return out;
}

absl::StatusOr<StateDict> MapOptimizerKeys(const StateDict& dict,
                                           const KeyMap& map,
                                           const FqnTable& table) {
  if (!dict.contains("state") && !dict.contains("param_groups")) {
    return MapFlatOptimizerKeys(dict, map, table);
  }
  if (HasNumberedParameters(dict)) return dict;  // there are no names in it
  StateDict out = dict;
  if (Value* state = out.Find("state")) {
    if (const auto* entries = state->get_if<StateDict>()) {
      DSD_ASSIGN_OR_RETURN(StateDict renamed, MapModelKeys(*entries, map));
      *state = Value(std::move(renamed));
    }
  }
  if (Value* groups = out.Find("param_groups")) {
    if (auto* list = groups->get_if<Value::List>()) {
      for (Value& group : *list) {
        DSD_ASSIGN_OR_RETURN(group, MapGroup(group, map));
      }
    }
  }
  return out;
}

std::vector<std::string> RenamesOf(
    const StateDict* model, const StateDict* optimizer, const KeyMap& map,
    absl::FunctionRef<bool(const std::string& name, bool of_optimizer)>
        counts) {
  std::set<std::string> renames;
  const auto add = [&](absl::string_view from, bool of_optimizer) {
    const std::string to = map(from);
    if (to.empty() || to == from || !counts(to, of_optimizer)) return;
    renames.insert(absl::StrCat("\"", from, "\" to \"", to, "\""));
  };
  for (size_t i = 0; model != nullptr && i < model->size(); ++i) {
    add(model->key_text(i), /*of_optimizer=*/false);
  }
  if (optimizer == nullptr) return {renames.begin(), renames.end()};
  for (size_t i = 0; i < optimizer->size(); ++i) {
    const std::string key = optimizer->key_text(i);
    const Value& value = optimizer->value(i);
    if (const auto* states = value.get_if<StateDict>(); key == "state") {
      for (size_t k = 0; states != nullptr && k < states->size(); ++k) {
        const auto* const fqn = std::get_if<std::string>(&states->key(k));
        if (fqn != nullptr) add(*fqn, /*of_optimizer=*/true);
      }
    } else if (const auto* groups = value.get_if<Value::List>();
               key == "param_groups" && groups != nullptr) {
      for (const Value& group : *groups) {
        const auto* const dict = group.get_if<StateDict>();
        const Value* const params =
            dict == nullptr ? nullptr : dict->Find("params");
        const auto* const names =
            params == nullptr ? nullptr : params->get_if<Value::List>();
        for (size_t k = 0; names != nullptr && k < names->size(); ++k) {
          const auto* const fqn = (*names)[k].get_if<std::string>();
          if (fqn != nullptr) add(*fqn, /*of_optimizer=*/true);
        }
      }
    } else {
      // Flat: any beginning may be an FQN.
      absl::string_view rest = key;
      if (!absl::ConsumePrefix(&rest, "state.") &&
          !absl::ConsumePrefix(&rest, "param_groups.")) {
        continue;
      }
      for (size_t dot = rest.find('.'); dot != absl::string_view::npos;
           dot = rest.find('.', dot + 1)) {
        add(rest.substr(0, dot), /*of_optimizer=*/true);
      }
    }
  }
  return {renames.begin(), renames.end()};
}

}  // namespace dsd
