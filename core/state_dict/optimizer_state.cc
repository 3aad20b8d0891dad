// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/optimizer_state.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/empty_like.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/core/value/flatten.h"

namespace dsd {
namespace {

constexpr char kState[] = "state";
constexpr char kGroups[] = "param_groups";
constexpr char kParams[] = "params";
// Written by Python for optimizers made from named parameters; the FQNs in
// "params" say the same.
constexpr char kParamNames[] = "param_names";

absl::Status NotAnOptimizerDict(absl::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat("this is not an optimizer state dict keyed by FQN: ", what,
                   "; make it with GetOptimizerStateDict, or in Python with "
                   "get_optimizer_state_dict"));
}

// A state tensor of the parameter's shape is sharded as the parameter is,
// unless the table says something else about it.
absl::StatusOr<TensorValue> WithSharding(const TensorValue& param,
                                         const at::Tensor& state) {
  if (std::optional<Sharding> own = ShardingTable::Global().Find(state)) {
    return TensorValue::Sharded(*std::move(own), state);
  }
  if (!param.is_plain() && param.locals().size() == 1 &&
      param.locals()[0].sizes() == state.sizes()) {
    return TensorValue::Sharded(Sharding{param.layout(), param.holder()},
                                state);
  }
  return TensorValue(state);
}

absl::Status AddShardings(const TensorValue& param, StateDict& state) {
  absl::Status status;
  ForEachTensor(state, "", [&](const std::string&, TensorValue& value) {
    if (!value.is_plain() || !value.defined() || !status.ok()) return;
    absl::StatusOr<TensorValue> sharded =
        WithSharding(param, value.locals()[0]);
    status.Update(sharded.status());
    if (sharded.ok()) value = *std::move(sharded);
  });
  return status;
}

// Null if absent or None.
const Value* FindSet(const StateDict& dict, const std::string& key) {
  const Value* value = dict.Find(key);
  return value == nullptr || value->is<None>() ? nullptr : value;
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
  flat.Set(prefix, value);
  return absl::OkStatus();
}

std::string ToText(const Object& value) {
  if (const auto* v = value.get_if<double>()) return absl::StrCat(*v);
  if (const auto* v = value.get_if<int64_t>()) return absl::StrCat(*v);
  if (const auto* v = value.get_if<bool>()) return *v ? "True" : "False";
  if (const auto* v = value.get_if<std::string>()) {
    return absl::StrCat("\"", *v, "\"");
  }
  const auto items_text = [](const std::vector<Object>& items) {
    return absl::StrJoin(items, ", ", [](std::string* out, const Object& item) {
      absl::StrAppend(out, ToText(item));
    });
  };
  if (const auto* v = value.get_if<Object::Tuple>()) {
    return absl::StrCat("(", items_text(v->items), ")");
  }
  if (const auto* v = value.get_if<Object::List>()) {
    return absl::StrCat("[", items_text(*v), "]");
  }
  return std::string(value.kind_name());
}

// A whole number >= 0 that both int64 and float64 have.
std::optional<int64_t> ToCount(const Object& number) {
  constexpr int64_t kMax = int64_t{1} << 53;
  if (const auto* v = number.get_if<int64_t>()) {
    if (*v >= 0 && *v <= kMax) return *v;
  } else if (const auto* v = number.get_if<double>()) {
    if (*v >= 0 && *v <= kMax && *v == std::floor(*v)) {
      return static_cast<int64_t>(*v);
    }
  }
  return std::nullopt;
}

// Python writes 0 and 0.0 for the same.
bool IsSameHyperparameter(const Object& a, const Object& b) {
  const auto number = [](const Object& v) -> std::optional<double> {
    if (const auto* n = v.get_if<int64_t>()) return static_cast<double>(*n);
    if (const auto* n = v.get_if<double>()) return *n;
    return std::nullopt;
  };
  const std::optional<double> x = number(a);
  const std::optional<double> y = number(b);
  return x.has_value() && y.has_value() ? *x == *y : a == b;
}

}  // namespace

absl::StatusOr<StateDict> GetOptimizerState(
    const LiveModel& model, absl::Span<OptimizerSource* const> optimizers) {
  StateDict state;
  Value::List groups;
  for (OptimizerSource* optimizer : optimizers) {
    for (size_t group = 0; group < optimizer->num_groups(); ++group) {
      DSD_ASSIGN_OR_RETURN(const ObjectDict hyperparameters,
                           optimizer->Hyperparameters(group));
      StateDict group_dict;
      for (size_t i = 0; i < hyperparameters.size(); ++i) {
        group_dict.Set(hyperparameters.key(i),
                       FromObject(hyperparameters.value(i)));
      }
      Value::List names;
      const absl::Span<const at::Tensor> params = optimizer->params(group);
      for (size_t i = 0; i < params.size(); ++i) {
        const absl::StatusOr<size_t> model_group = model.GroupOf(params[i]);
        DSD_RETURN_IF_ERROR(model_group) << optimizer->type_name() << " group "
                                         << group << " parameter " << i;
        const std::string& fqn = model.fqn(*model_group);
        names.push_back(Value(fqn));
        DSD_ASSIGN_OR_RETURN(StateDict entries, optimizer->State(group, i));
        if (entries.empty() && params[i].requires_grad()) {
          DSD_ASSIGN_OR_RETURN(entries, optimizer->InertState(group, i));
        }
        if (entries.empty()) continue;
        DSD_RETURN_IF_ERROR(AddShardings(model.value(*model_group), entries))
            << "optimizer state of \"" << fqn << "\"";
        state.Set(fqn, Value(std::move(entries)));
      }
      group_dict.Set(kParams, Value(std::move(names)));
      groups.push_back(Value(std::move(group_dict)));
    }
  }
  StateDict dict;
  dict.Set(kState, Value(std::move(state)));
  dict.Set(kGroups, Value(std::move(groups)));
  return dict;
}

absl::StatusOr<StateDict> FlattenOptimizerState(const StateDict& nested) {
  StateDict flat;
  if (const Value* state = nested.Find(kState)) {
    DSD_RETURN_IF_ERROR(FlattenState(kState, *state, flat));
  }
  const Value* groups = nested.Find(kGroups);
  const auto* list =
      groups == nullptr ? nullptr : groups->get_if<Value::List>();
  for (size_t g = 0; list != nullptr && g < list->size(); ++g) {
    const auto* group = (*list)[g].get_if<StateDict>();
    const Value* params = group == nullptr ? nullptr : group->Find(kParams);
    const auto* names =
        params == nullptr ? nullptr : params->get_if<Value::List>();
    for (size_t n = 0; names != nullptr && n < names->size(); ++n) {
      const auto* fqn = (*names)[n].get_if<std::string>();
      for (size_t i = 0; fqn != nullptr && i < group->size(); ++i) {
        const std::string key = group->key_text(i);
        if (key == kParams) continue;
        flat.Set(absl::StrCat(kGroups, ".", *fqn, ".", key), group->value(i));
      }
    }
  }
  return flat;
}

absl::StatusOr<OptimizerLoad::Loaded> OptimizerLoad::ReadNested(
    const StateDict& dict) {
  Loaded loaded;
  if (const Value* state = dict.Find(kState)) {
    const auto* entries = state->get_if<StateDict>();
    if (entries == nullptr) {
      return NotAnOptimizerDict(absl::StrCat(
          "expected a dict under \"state\", found ", state->kind_name()));
    }
    for (size_t i = 0; i < entries->size(); ++i) {
      const auto* fqn = std::get_if<std::string>(&entries->key(i));
      const auto* values = entries->value(i).get_if<StateDict>();
      if (fqn == nullptr) {
        return NotAnOptimizerDict(absl::StrCat("the state has the integer key ",
                                               entries->key_text(i)));
      }
      if (values == nullptr) {
        return NotAnOptimizerDict(
            absl::StrCat("expected a dict as the state of \"", *fqn,
                         "\", found ", entries->value(i).kind_name()));
      }
      loaded.state.emplace(*fqn, values);
    }
  }
  const Value* groups = dict.Find(kGroups);
  if (groups == nullptr) return loaded;
  const auto* list = groups->get_if<Value::List>();
  if (list == nullptr) {
    return NotAnOptimizerDict(absl::StrCat(
        "expected a list under \"param_groups\", found ", groups->kind_name()));
  }
  for (size_t g = 0; g < list->size(); ++g) {
    const auto* group = (*list)[g].get_if<StateDict>();
    const Value* params = group == nullptr ? nullptr : group->Find(kParams);
    const auto* names =
        params == nullptr ? nullptr : params->get_if<Value::List>();
    if (names == nullptr) {
      return NotAnOptimizerDict(
          absl::StrCat("group ", g, " has no list \"params\""));
    }
    for (const Value& name : *names) {
      const auto* fqn = name.get_if<std::string>();
      if (fqn == nullptr) {
        return NotAnOptimizerDict(
            absl::StrCat("group ", g, " names a parameter by ",
                         name.kind_name(), " instead of its FQN"));
      }
      loaded.group.insert_or_assign(*fqn, loaded.groups.size());
    }
    ObjectDict values;
    for (size_t i = 0; i < group->size(); ++i) {
      const std::string key = group->key_text(i);
      if (key == kParams || key == kParamNames) continue;
      DSD_ASSIGN_OR_RETURN(Object value, ToObject(group->value(i)));
      values.Set(key, std::move(value));
    }
    loaded.groups.push_back(std::move(values));
  }
  return loaded;
}

absl::StatusOr<OptimizerLoad::Loaded> OptimizerLoad::ReadFlat(
    const StateDict& dict) const {
  Loaded loaded;
  absl::flat_hash_map<std::string, StateDict*> states;
  for (size_t i = 0; i < dict.size(); ++i) {
    const std::string key = dict.key_text(i);
    absl::string_view rest = key;
    const bool is_state = absl::ConsumePrefix(&rest, "state.");
    if (!is_state && !absl::ConsumePrefix(&rest, "param_groups.")) {
      return NotAnOptimizerDict(
          absl::StrCat("expected keys \"state.<FQN>.<name>\" and "
                       "\"param_groups.<FQN>.<name>\", found \"",
                       key, "\""));
    }
    // FQNs and names both have dots: the longest FQN of the model that fits.
    // Keys of other parameters are left alone, as Python leaves them.
    size_t dot = rest.rfind('.');
    while (dot != absl::string_view::npos && dot > 0 &&
           !model_.table().Find(rest.substr(0, dot)).has_value()) {
      dot = rest.rfind('.', dot - 1);
    }
    if (dot == absl::string_view::npos || dot == 0) continue;
    const std::string fqn(rest.substr(0, dot));
    const absl::string_view name = rest.substr(dot + 1);
    if (is_state) {
      const auto [state, is_new] = states.try_emplace(fqn, nullptr);
      if (is_new) state->second = &loaded.owned.emplace_back();
      const size_t first_dot = name.find('.');
      if (first_dot == absl::string_view::npos) {
        state->second->Set(std::string(name), dict.value(i));
        continue;
      }
      Path path;
      for (absl::string_view part :
           absl::StrSplit(name.substr(first_dot + 1), '.')) {
        path.push_back(std::string(part));
      }
      const std::string top(name.substr(0, first_dot));
      Value* root = state->second->Find(top);
      if (root == nullptr) root = &state->second->Set(top, Value(StateDict()));
      DSD_RETURN_IF_ERROR(SetAtPath(*root, path, dict.value(i)))
          << "\"" << key << "\"";
    } else if (name != kParamNames) {
      const auto [group, is_new] =
          loaded.group.try_emplace(fqn, loaded.groups.size());
      if (is_new) loaded.groups.emplace_back();
      absl::StatusOr<Object> value = ToObject(dict.value(i));
      DSD_RETURN_IF_ERROR(value) << "\"" << key << "\"";
      loaded.groups[group->second].Set(std::string(name), *std::move(value));
    }
  }
  for (const auto& [fqn, state] : states) loaded.state.emplace(fqn, state);
  return loaded;
}

std::vector<absl::string_view> OptimizerLoad::NamesOf(
    size_t model_group) const {
  std::vector<absl::string_view> names;
  for (const size_t entry : model_.table().groups()[model_group]) {
    names.push_back(model_.table().entries()[entry].fqn);
  }
  return names;
}

absl::Status OptimizerLoad::Parse(const StateDict& dict,
                                  MismatchReport& report) {
  const bool nested =
      dict.Find(kState) != nullptr || dict.Find(kGroups) != nullptr;
  if (nested) {
    DSD_ASSIGN_OR_RETURN(loaded_, ReadNested(dict));
  } else {
    DSD_ASSIGN_OR_RETURN(loaded_, ReadFlat(dict));
  }
  for (OptimizerSource* optimizer : optimizers_) {
    for (size_t group = 0; group < optimizer->num_groups(); ++group) {
      DSD_RETURN_IF_ERROR(ParseGroup(optimizer, group, report))
          << optimizer->type_name() << " group " << group;
    }
  }
  return absl::OkStatus();
}

absl::Status OptimizerLoad::ParseGroup(OptimizerSource* optimizer, size_t group,
                                       MismatchReport& report) {
  GroupLoad load;
  load.optimizer = optimizer;
  load.group = group;

  struct Found {
    size_t param;
    size_t model_group;
    const StateDict* state = nullptr;
    bool has_group = false;
  };
  std::vector<Found> all_found;
  // Hyperparameters: the union over the saved groups of this group's
  // parameters, which must not contradict each other.
  absl::flat_hash_map<std::string, absl::string_view> value_of;
  absl::flat_hash_set<size_t> merged;
  const absl::Span<const at::Tensor> params = optimizer->params(group);
  for (size_t i = 0; i < params.size(); ++i) {
    const absl::StatusOr<size_t> model_group = model_.GroupOf(params[i]);
    DSD_RETURN_IF_ERROR(model_group) << "parameter " << i;
    Found found{i, *model_group};
    for (const absl::string_view name : NamesOf(*model_group)) {
      const auto saved_group = loaded_.group.find(name);
      if (!found.has_group && saved_group != loaded_.group.end()) {
        found.has_group = true;
        if (merged.insert(saved_group->second).second) {
          const ObjectDict& values = loaded_.groups[saved_group->second];
          for (size_t k = 0; k < values.size(); ++k) {
            const Object* before = load.values.Find(values.key(k));
            if (before == nullptr) {
              load.values.Set(values.key(k), values.value(k));
              value_of[values.key_text(k)] = name;
            } else if (!IsSameHyperparameter(*before, values.value(k))) {
              report.misfits.push_back(
                  absl::StrCat(optimizer->type_name(), " group ", group, ": \"",
                               values.key_text(k), "\" is ", ToText(*before),
                               " for \"", value_of[values.key_text(k)],
                               "\" and ", ToText(values.value(k)), " for \"",
                               name, "\", but they are in one group here"));
            }
          }
        }
      }
      const auto state = loaded_.state.find(name);
      if (found.state == nullptr && state != loaded_.state.end()) {
        found.state = state->second;
      }
    }
    all_found.push_back(found);
  }

  const absl::Status accepted =
      optimizer->CheckHyperparameters(group, load.values, strict_);
  if (!accepted.ok()) {
    report.misfits.push_back(absl::StrCat(optimizer->type_name(), " group ",
                                          group, ": ", accepted.message()));
    return absl::OkStatus();
  }
  DSD_ASSIGN_OR_RETURN(ObjectDict effective, optimizer->Hyperparameters(group));
  for (size_t i = 0; i < load.values.size(); ++i) {
    effective.Set(load.values.key(i), load.values.value(i));
  }
  DSD_ASSIGN_OR_RETURN(load.fields, optimizer->StateFields(effective));
  const bool needs_state =
      std::any_of(load.fields.begin(), load.fields.end(),
                  [](const StateField& field) { return field.required; });

  for (const Found& found : all_found) {
    if (found.state == nullptr) {
      const bool trainable = params[found.param].requires_grad();
      if (trainable && (needs_state || !found.has_group)) {
        report.missing_state.push_back(model_.fqn(found.model_group));
      } else if (!needs_state && found.has_group) {
        load.params.push_back({found.param, found.model_group, nullptr, {}});
      }
      continue;
    }
    load.params.push_back({found.param, found.model_group, found.state, {}});
    CheckState(load, load.params.back(), report);
  }
  groups_.push_back(std::move(load));
  return absl::OkStatus();
}

void OptimizerLoad::CheckState(const GroupLoad& group, const ParamLoad& param,
                               MismatchReport& report) const {
  const std::string& fqn = model_.fqn(param.model_group);
  const TensorValue& live = model_.value(param.model_group);
  absl::flat_hash_set<absl::string_view> known;
  for (const StateField& field : group.fields) {
    known.insert(field.name);
    const std::string name = absl::StrCat(fqn, ".", field.name);
    const Value* value = FindSet(*param.loaded, field.name);
    if (value == nullptr) {
      if (field.required) report.missing_state.push_back(name);
      continue;
    }
    if (field.shape == StateField::Shape::kLikeParameter) {
      const auto* tensor = value->get_if<TensorValue>();
      if (tensor == nullptr || !tensor->defined()) {
        report.misfits.push_back(absl::StrCat(
            "optimizer state \"", name, "\": expected a tensor, found ",
            tensor == nullptr ? value->kind_name() : "an undefined one"));
      } else if (tensor->shape() != live.shape()) {
        report.misfits.push_back(absl::StrCat(
            "optimizer state \"", name, "\": shape in the dict is ",
            DimsToString(tensor->shape()), ", of the parameter ",
            DimsToString(live.shape())));
      } else if (c10::isIntegralType(tensor->scalar_type(), true) !=
                     c10::isIntegralType(live.scalar_type(), true) ||
                 c10::isComplexType(tensor->scalar_type()) !=
                     c10::isComplexType(live.scalar_type())) {
        report.misfits.push_back(
            absl::StrCat("optimizer state \"", name, "\" of type ",
                         c10::toString(tensor->scalar_type()),
                         " does not go with a parameter of type ",
                         c10::toString(live.scalar_type())));
      }
    } else if (field.shape == StateField::Shape::kCount) {
      const absl::StatusOr<Object> number = ToObject(*value);
      if (!number.ok() || !ToCount(*number).has_value()) {
        report.misfits.push_back(absl::StrCat(
            "optimizer state \"", name, "\": expected a count, found ",
            number.ok() ? ToText(*number) : number.status().message()));
      }
    }
  }
  for (size_t i = 0; i < param.loaded->size(); ++i) {
    if (!known.contains(param.loaded->key_text(i)) &&
        !param.loaded->value(i).is<None>()) {
      report.unexpected_state.push_back(
          absl::StrCat(fqn, ".", param.loaded->key_text(i)));
    }
  }
}

std::string OptimizerLoad::UniqueName(std::string name) {
  // A parameter may belong to two optimizers; each has its own state of it.
  while (!names_.insert(name).second) absl::StrAppend(&name, "'");
  return name;
}

absl::Status OptimizerLoad::Prepare(std::vector<TensorPair>& pairs) {
  for (GroupLoad& group : groups_) {
    for (ParamLoad& param : group.params) {
      if (param.loaded == nullptr) continue;
      DSD_RETURN_IF_ERROR(PrepareParam(group, param, pairs))
          << "optimizer state of \"" << model_.fqn(param.model_group) << "\"";
    }
  }
  return absl::OkStatus();
}

absl::Status OptimizerLoad::PrepareParam(const GroupLoad& group,
                                         ParamLoad& param,
                                         std::vector<TensorPair>& pairs) {
  const TensorValue& live_param = model_.value(param.model_group);
  DSD_ASSIGN_OR_RETURN(StateDict live,
                       group.optimizer->State(group.group, param.param));
  std::optional<StateDict> inert;
  for (const StateField& field : group.fields) {
    const Value* value = FindSet(*param.loaded, field.name);
    if (value == nullptr) {
      if (!field.required) continue;
      // Only if not strict: what there is stays.
      value = FindSet(live, field.name);
      if (value == nullptr) {
        if (!inert.has_value()) {
          DSD_ASSIGN_OR_RETURN(
              inert, group.optimizer->InertState(group.group, param.param));
        }
        value = FindSet(*inert, field.name);
      }
      if (value == nullptr) continue;
      if (field.shape != StateField::Shape::kCount) {
        param.result.Set(field.name, *value);
        continue;
      }
    }
    const std::string name = absl::StrCat(
        "optim.state.", model_.fqn(param.model_group), ".", field.name);
    switch (field.shape) {
      case StateField::Shape::kCount: {
        DSD_ASSIGN_OR_RETURN(const Object number, ToObject(*value));
        param.result.Set(field.name, Value(ToCount(number).value_or(0)));
        break;
      }
      case StateField::Shape::kLikeParameter: {
        const TensorValue& source = *value->get_if<TensorValue>();
        const at::Tensor& like = live_param.locals()[0];
        // The live tensor is filled in place unless the dict has another type.
        const Value* old_value = FindSet(live, field.name);
        const auto* old =
            old_value == nullptr ? nullptr : old_value->get_if<TensorValue>();
        at::Tensor target;
        if (old != nullptr && old->is_plain() && old->defined() &&
            old->scalar_type() == source.scalar_type() &&
            old->locals()[0].sizes() == like.sizes()) {
          target = old->locals()[0];
        } else {
          DSD_ASSIGN_OR_RETURN(
              target, TorchToStatus([&] {
                return at::empty_like(
                    like, like.options().dtype(source.scalar_type()));
              }));
        }
        DSD_ASSIGN_OR_RETURN(TensorValue to, WithSharding(live_param, target));
        pairs.push_back({UniqueName(name), source, to});
        param.result.Set(field.name, Value(std::move(to)));
        break;
      }
      case StateField::Shape::kAny: {
        Value copy = *value;
        absl::Status status;
        ForEachTensor(copy, name,
                      [&](const std::string& path, TensorValue& tensor) {
                        if (!status.ok()) return;
                        absl::StatusOr<at::Tensor> target = TorchToStatus([&] {
                          return at::empty(ToIntArrayRef(tensor.shape()),
                                           tensor.scalar_type());
                        });
                        status.Update(target.status());
                        if (!status.ok()) return;
                        TensorValue to(*std::move(target));
                        pairs.push_back({UniqueName(path), tensor, to});
                        tensor = std::move(to);
                      });
        DSD_RETURN_IF_ERROR(status);
        param.result.Set(field.name, std::move(copy));
        break;
      }
    }
  }
  return absl::OkStatus();
}

absl::Status OptimizerLoad::Commit() {
  for (GroupLoad& group : groups_) {
    DSD_RETURN_IF_ERROR(
        group.optimizer->SetHyperparameters(group.group, group.values));
    for (ParamLoad& param : group.params) {
      DSD_RETURN_IF_ERROR(group.optimizer->SetState(group.group, param.param,
                                                    std::move(param.result)))
          << "optimizer state of \"" << model_.fqn(param.model_group) << "\"";
    }
  }
  return absl::OkStatus();
}

}  // namespace dsd
