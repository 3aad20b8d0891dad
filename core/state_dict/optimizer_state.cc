// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/optimizer_state.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/empty_like.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/threads.h"
#include "dsd/core/tensor/tensor_memory.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/core/value/flatten.h"
#include "dsd/core/value/value_text.h"

namespace dsd {
namespace {

// Null if absent or None.
const Value* FindSet(const StateDict& dict, const std::string& key) {
  const Value* value = dict.Find(key);
  return value == nullptr || value->is<None>() ? nullptr : value;
}

// Of a tensor of live state, which may not be there.
bool CanBeFilled(const at::Tensor& tensor) {
  return tensor.defined() && !tensor.is_meta();
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
  } else if (const auto* v = number.get_if<bool>()) {
    return *v ? 1 : 0;
  }
  return std::nullopt;
}

// Python writes 0 and 0.0 for the same, and lists for tuples in some formats.
bool IsSameHyperparameter(const Object& a, const Object& b) {
  const auto number = [](const Object& v) -> std::optional<double> {
    if (const auto* n = v.get_if<int64_t>()) return static_cast<double>(*n);
    if (const auto* n = v.get_if<double>()) return *n;
    return std::nullopt;
  };
  const auto items = [](const Object& v) -> const std::vector<Object>* {
    if (const auto* tuple = v.get_if<Object::Tuple>()) return &tuple->items;
    return v.get_if<Object::List>();
  };
  const std::optional<double> x = number(a);
  const std::optional<double> y = number(b);
  if (x.has_value() && y.has_value()) return *x == *y;
  const std::vector<Object>* const p = items(a);
  const std::vector<Object>* const q = items(b);
  if (p == nullptr || q == nullptr) return a == b;
  return std::equal(p->begin(), p->end(), q->begin(), q->end(),
                    IsSameHyperparameter);
}

std::string QuotedNames(const std::vector<std::string>& names) {
  constexpr size_t kShown = 50;
  std::string text = absl::StrCat(
      "\"",
      absl::StrJoin(names.begin(),
                    names.begin() + std::min(names.size(), kShown), "\", \""),
      "\"");
  if (names.size() > kShown) {
    absl::StrAppend(&text, ", and ", names.size() - kShown, " more");
  }
  return text;
}

// Keys of dicts that were numbers are texts after a flat form: they become what
// they are in `like` (null: unknown), else numbers if they can be.
Value WithTypedKeys(const Value& value, const Value* like, bool to_numbers) {
  const auto* dict = value.get_if<StateDict>();
  if (dict == nullptr) return value;
  const auto* like_dict = like == nullptr ? nullptr : like->get_if<StateDict>();
  StateDict out;
  for (size_t i = 0; i < dict->size(); ++i) {
    PathSegment key = dict->key(i);
    const Value* there = like_dict == nullptr ? nullptr : like_dict->Find(key);
    const auto* text = std::get_if<std::string>(&key);
    const std::optional<int64_t> number =
        text == nullptr ? std::nullopt : ToNumberKey(*text);
    if (there == nullptr && number.has_value()) {
      there = like_dict == nullptr ? nullptr
                                   : like_dict->Find(PathSegment(*number));
      if (there != nullptr || to_numbers) key = *number;
    }
    out.Set(std::move(key), WithTypedKeys(dict->value(i), there, to_numbers));
  }
  return Value(std::move(out));
}

// Whether a tensor of type `from` may become state of a parameter of type `to`.
bool AreOfOneKind(c10::ScalarType from, c10::ScalarType to) {
  return c10::isIntegralType(from, /*includeBool=*/true) ==
             c10::isIntegralType(to, /*includeBool=*/true) &&
         c10::isComplexType(from) == c10::isComplexType(to);
}

// The types that tensors of free-form state have here, by their paths: that of
// the live tensor, else that of the parameter, unless values would be lost.
class FreeFormTypes {
 public:
  // `live`: null if there is none.
  FreeFormTypes(const Value* live, c10::ScalarType param) : param_(param) {
    Value copy = live == nullptr ? Value() : *live;
    ForEachTensor(copy, "", [&](const std::string& path, TensorValue& tensor) {
      if (tensor.defined()) live_.emplace(path, tensor.scalar_type());
    });
  }

  // For a tensor that has type `from` in the dict.
  c10::ScalarType At(const std::string& path, c10::ScalarType from) const {
    const auto live = live_.find(path);
    for (const c10::ScalarType to :
         {live == live_.end() ? param_ : live->second, param_}) {
      if (AreOfOneKind(from, to) && c10::canCast(from, to)) return to;
    }
    return from;
  }

 private:
  const c10::ScalarType param_;
  absl::flat_hash_map<std::string, c10::ScalarType> live_;
};

}  // namespace

template <class Find, class Result>
Result OptimizerLoad::FindByName(size_t model_group, Find find,
                                 Result none) const {
  for (const size_t entry : model_.table().groups()[model_group]) {
    Result result = find(model_.table().entries()[entry].fqn);
    if (result != none) return result;
  }
  return none;
}

const StateDict* OptimizerLoad::StateOfTied(size_t model_group) {
  if (model_dict_ == nullptr) return nullptr;
  if (!tied_.has_value()) {
    tied_.emplace();
    for (size_t i = 0; i < model_dict_->size(); ++i) {
      const auto* tensor = model_dict_->value(i).get_if<TensorValue>();
      if (tensor != nullptr && tensor->defined()) {
        (*tied_)[tensor->id()].push_back(model_dict_->key_text(i));
      }
    }
  }
  return FindByName(
      model_group,
      [&](const std::string& fqn) -> const StateDict* {
        const Value* value = model_dict_->Find(fqn);
        const auto* tensor =
            value == nullptr ? nullptr : value->get_if<TensorValue>();
        if (tensor == nullptr || !tensor->defined()) return nullptr;
        for (const std::string& name : (*tied_)[tensor->id()]) {
          const StateDict* state = dict_->FindState(name);
          if (state != nullptr) return state;
        }
        return nullptr;
      },
      static_cast<const StateDict*>(nullptr));
}

void OptimizerLoad::PrefetchLoaded(absl::Span<const ParamLoad> params,
                                   size_t current) {
  constexpr size_t kAhead = 8;
  if (current + 2 * kAhead < params.size() &&
      params[current + 2 * kAhead].loaded != nullptr) {
    params[current + 2 * kAhead].loaded->Prefetch();
  }
  if (current + kAhead >= params.size()) return;
  const StateDict* const loaded = params[current + kAhead].loaded;
  for (size_t i = 0; loaded != nullptr && i < loaded->size(); ++i) {
    const auto* const tensor = loaded->value(i).get_if<TensorValue>();
    if (tensor != nullptr) PrefetchTensors(tensor->locals());
  }
}

absl::Status OptimizerLoad::Parse(Env* env, int threads, const StateDict& dict,
                                  MismatchReport& report,
                                  const StateDict* model_dict) {
  model_dict_ = model_dict;
  DSD_ASSIGN_OR_RETURN(dict_, OptimizerDict::Read(dict, model_, optimizers_));
  ParameterOwners owners(model_);
  for (OptimizerSource* optimizer : optimizers_) {
    for (size_t group = 0; group < optimizer->num_groups(); ++group) {
      DSD_RETURN_IF_ERROR(
          ParseGroup(env, threads, optimizer, group, owners, report));
    }
  }
  return absl::OkStatus();
}

// The union over the saved groups of this group's parameters, which must not
// contradict each other.
void OptimizerLoad::MergeHyperparameters(GroupLoad& load,
                                         MismatchReport& report) const {
  absl::flat_hash_set<int64_t> merged;
  absl::flat_hash_set<std::string> contradictions;
  Object::List names;
  OptimizerDict::Position position;
  for (const ParamLoad& param : load.params) {
    const int64_t saved = FindByName(
        param.model_group,
        [&](const std::string& fqn) { return dict_->FindGroup(fqn, position); },
        int64_t{-1});
    const std::string* name = FindByName(
        param.model_group,
        [&](const std::string& fqn) { return dict_->FindParamName(fqn); },
        static_cast<const std::string*>(nullptr));
    if (name != nullptr) names.push_back(Object(*name));
    if (saved < 0 || !merged.insert(saved).second) continue;
    const ObjectDict& values = dict_->groups()[saved].values;
    for (size_t k = 0; k < values.size(); ++k) {
      const Object* before = std::as_const(load.values).Find(values.key(k));
      if (before == nullptr) {
        load.values.Append(values.key(k), values.value(k));
      } else if (!IsSameHyperparameter(*before, values.value(k)) &&
                 contradictions.insert(values.key_text(k)).second) {
        report.misfits.push_back(ContradictionOf(load, values.key(k)));
      }
    }
  }
  if (!names.empty() && names.size() == load.params.size()) {
    load.values.Set(kParamNamesKey, Object(std::move(names)));
  }
}

std::string OptimizerLoad::ContradictionOf(const GroupLoad& load,
                                           const PathSegment& key) const {
  struct Variant {
    const Object* value;
    std::vector<std::string> names;
  };
  std::vector<Variant> variants;
  for (const ParamLoad& param : load.params) {
    for (const size_t entry : model_.table().groups()[param.model_group]) {
      const std::string& fqn = model_.table().entries()[entry].fqn;
      const int64_t saved = dict_->FindGroup(fqn);
      if (saved < 0) continue;
      const Object* value = dict_->groups()[saved].values.Find(key);
      if (value == nullptr) break;
      auto variant = std::find_if(
          variants.begin(), variants.end(), [&](const Variant& known) {
            return IsSameHyperparameter(*known.value, *value);
          });
      if (variant == variants.end()) {
        variant = variants.insert(variant, {value, {}});
      }
      variant->names.push_back(fqn);
      break;
    }
  }
  return absl::StrCat(
      GroupName(*load.optimizer, load.group), ": \"", JoinPath({key}), "\" is ",
      absl::StrJoin(variants, " and ",
                    [](std::string* out, const Variant& variant) {
                      absl::StrAppend(out, ValueText(*variant.value), " for ",
                                      QuotedNames(variant.names));
                    }),
      ", but they are in one group here");
}

absl::Status OptimizerLoad::ParseGroup(Env* env, int threads,
                                       OptimizerSource* optimizer, size_t group,
                                       ParameterOwners& owners,
                                       MismatchReport& report) {
  DSD_RETURN_IF_ERROR(CheckGroupState(model_, *optimizer, group));
  GroupLoad load;
  load.optimizer = optimizer;
  load.group = group;
  const absl::Span<const at::Tensor> params = optimizer->params(group);
  load.params.reserve(params.size());
  OptimizerDict::Position position;
  for (size_t i = 0; i < params.size(); ++i) {
    PrefetchParams(model_, params, i);
    dict_->PrefetchNear(position);
    DSD_ASSIGN_OR_RETURN(const bool is_new, owners.Add(*optimizer, group, i));
    if (!is_new) continue;
    const size_t model_group = owners.model_group();
    model_.table().PrefetchNear(model_.table().groups()[model_group][0]);
    load.params.push_back({i,
                           model_group,
                           FindByName(
                               model_group,
                               [&](const std::string& fqn) {
                                 return dict_->FindState(fqn, position);
                               },
                               static_cast<const StateDict*>(nullptr)),
                           {}});
  }

  MergeHyperparameters(load, report);
  DSD_ASSIGN_OR_RETURN(ObjectDict effective, optimizer->Hyperparameters(group));
  const absl::Status accepted =
      optimizer->CheckHyperparameters(group, load.values, strict_);
  if (accepted.ok()) {
    for (size_t i = 0; i < load.values.size(); ++i) {
      effective.Set(load.values.key(i), load.values.value(i));
    }
  } else {
    report.misfits.push_back(
        absl::StrCat(GroupName(*optimizer, group), ": ", accepted.message()));
  }
  DSD_ASSIGN_OR_RETURN(load.fields, optimizer->StateFields(effective));
  const bool needs_state =
      std::any_of(load.fields.begin(), load.fields.end(),
                  [](const StateField& field) { return field.required; });
  if (optimizer->has_group_state()) CheckOrder(load, report);

  for (ParamLoad& param : load.params) {
    if (param.loaded == nullptr && needs_state &&
        params[param.param].requires_grad()) {
      param.loaded = StateOfTied(param.model_group);
    }
  }
  const auto check = [&](ParamLoad& param, MismatchReport& mine) {
    if (param.loaded != nullptr) {
      CheckState(load, effective, param, mine);
      return;
    }
    const bool has_group =
        FindByName(
            param.model_group,
            [&](const std::string& fqn) { return dict_->FindGroup(fqn); },
            int64_t{-1}) >= 0;
    // Of an optimizer without required state: none was saved, there is none.
    param.is_used = !needs_state && has_group;
    if (!param.is_used && params[param.param].requires_grad()) {
      mine.missing_state.push_back(model_.fqn(param.model_group));
    }
  };
  DSD_ASSIGN_OR_RETURN(std::vector<MismatchReport> reports,
                       MapRanges<MismatchReport>(
                           env, threads, load.params.size(),
                           [&](size_t begin, size_t end, MismatchReport& mine) {
                             for (size_t i = begin; i < end; ++i) {
                               PrefetchLoaded(load.params, i);
                               check(load.params[i], mine);
                             }
                             return absl::OkStatus();
                           }));
  for (MismatchReport& part : reports) report.Add(std::move(part));
  load.params.erase(
      std::remove_if(load.params.begin(), load.params.end(),
                     [](const ParamLoad& param) { return !param.is_used; }),
      load.params.end());
  groups_.push_back(std::move(load));
  return absl::OkStatus();
}

// Vectors over all parameters are about nothing but this order.
void OptimizerLoad::CheckOrder(const GroupLoad& group,
                               MismatchReport& report) const {
  const ParamLoad* with_state = nullptr;
  for (const ParamLoad& param : group.params) {
    if (param.loaded != nullptr && !param.loaded->empty()) with_state = &param;
  }
  if (with_state == nullptr) return;
  const int64_t saved = FindByName(
      with_state->model_group,
      [&](const std::string& fqn) { return dict_->FindGroup(fqn); },
      int64_t{-1});
  std::vector<std::string> here;
  for (const ParamLoad& param : group.params) {
    here.push_back(model_.fqn(param.model_group));
  }
  bool same = with_state == &group.params[0];
  if (same && saved >= 0 && !dict_->is_flat()) {
    const std::vector<absl::string_view>& there = dict_->groups()[saved].params;
    same = there.size() == group.params.size();
    for (size_t i = 0; same && i < there.size(); ++i) {
      const auto entry = model_.table().Find(there[i]);
      same = entry.has_value() && model_.table().entries()[*entry].group ==
                                      group.params[i].model_group;
    }
  }
  if (same) return;
  report.misfits.push_back(absl::StrCat(
      GroupName(*group.optimizer, group.group),
      " has one state for all parameters together, so they must be those of "
      "the dict in the same order; here they are ",
      QuotedNames(here), ", and the state is that of \"",
      model_.fqn(with_state->model_group), "\""));
}

void OptimizerLoad::CheckState(const GroupLoad& group,
                               const ObjectDict& hyperparameters,
                               const ParamLoad& param,
                               MismatchReport& report) const {
  const std::string& fqn = model_.fqn(param.model_group);
  const TensorValue& live = model_.value(param.model_group);
  const size_t misfits_before = report.misfits.size();
  const auto misfit = [&](const StateField& field, const auto&... text) {
    report.misfits.push_back(absl::StrCat("optimizer state \"", fqn, ".",
                                          field.name, "\"", text...));
  };
  size_t known = 0;
  for (const StateField& field : group.fields) {
    const Value* value = param.loaded->Find(field.name);
    if (value != nullptr) ++known;
    if (value == nullptr || value->is<None>()) {
      if (field.required) {
        report.missing_state.push_back(absl::StrCat(fqn, ".", field.name));
      }
      continue;
    }
    if (field.shape == StateField::Shape::kLikeParameter) {
      const auto* tensor = value->get_if<TensorValue>();
      if (tensor == nullptr || !tensor->defined()) {
        misfit(field, ": expected a tensor, found ",
               tensor == nullptr ? value->kind_name() : "an undefined one");
      } else if (tensor->shape() != live.shape()) {
        misfit(field, ": shape in the dict is ", DimsToString(tensor->shape()),
               ", of the parameter ", DimsToString(live.shape()));
      } else if (!AreOfOneKind(tensor->scalar_type(), live.scalar_type())) {
        misfit(field, " of type ", c10::toString(tensor->scalar_type()),
               " does not go with a parameter of type ",
               c10::toString(live.scalar_type()));
      } else if (policy_ == DTypePolicy::kError) {
        at::Tensor old;
        const bool is_there = group.optimizer
                                  ->LiveTensors(group.group, param.param,
                                                absl::MakeConstSpan(&field, 1),
                                                absl::MakeSpan(&old, 1))
                                  .ok() &&
                              CanBeFilled(old);
        const c10::ScalarType type =
            is_there ? old.scalar_type() : live.scalar_type();
        if (tensor->scalar_type() != type) {
          misfit(field, ": type in the dict is ",
                 c10::toString(tensor->scalar_type()), ", here ",
                 c10::toString(type), ", and dtype_policy is kError");
        }
      }
    } else if (field.shape == StateField::Shape::kCount) {
      const absl::StatusOr<Object> number = ToObject(*value);
      if (!number.ok() || !ToCount(*number).has_value()) {
        misfit(field, ": expected a count, found ",
               number.ok() ? ValueText(*number) : number.status().message());
      }
    } else if (policy_ == DTypePolicy::kError) {
      const absl::StatusOr<StateDict> state =
          group.optimizer->State(group.group, param.param);
      const FreeFormTypes types(
          state.ok() ? FindSet(*state, field.name) : nullptr,
          live.scalar_type());
      Value copy = *value;
      ForEachTensor(copy, "",
                    [&](const std::string& path, TensorValue& tensor) {
                      if (!tensor.defined()) return;
                      const c10::ScalarType from = tensor.scalar_type();
                      const c10::ScalarType to = types.At(path, from);
                      if (from == to) return;
                      misfit(field, path.empty() ? "" : " at \"", path,
                             path.empty() ? "" : "\"", ": type in the dict is ",
                             c10::toString(from), ", here ", c10::toString(to),
                             ", and dtype_policy is kError");
                    });
    }
  }
  for (size_t i = 0; known < param.loaded->size() && i < param.loaded->size();
       ++i) {
    const std::string key = param.loaded->key_text(i);
    if (!param.loaded->value(i).is<None>() &&
        std::none_of(
            group.fields.begin(), group.fields.end(),
            [&](const StateField& field) { return field.name == key; })) {
      report.unexpected_state.push_back(absl::StrCat(fqn, ".", key));
    }
  }
  if (report.misfits.size() > misfits_before) return;
  const absl::Status accepted =
      group.optimizer->CheckState(group.group, hyperparameters, *param.loaded);
  if (!accepted.ok()) {
    report.misfits.push_back(
        absl::StrCat("optimizer state of \"", fqn, "\": ", accepted.message()));
  }
}

absl::Status OptimizerLoad::Prepare(Env* env, int threads,
                                    std::vector<TensorPair>& pairs) {
  // Of a range of parameters.
  struct Prepared {
    std::vector<TensorPair> pairs;
    std::vector<TensorPair> free_form;
  };
  std::vector<TensorPair> free_form;
  for (GroupLoad& group : groups_) {
    const auto prepare = [&](size_t begin, size_t end,
                             Prepared& mine) -> absl::Status {
      mine.pairs.reserve((end - begin) * group.fields.size());
      for (size_t i = begin; i < end; ++i) {
        ParamLoad& param = group.params[i];
        PrefetchStates(*group.optimizer, group.group, param.param);
        PrefetchLoaded(group.params, i);
        if (param.loaded == nullptr) continue;
        const absl::Status status =
            PrepareParam(group, param, mine.pairs, mine.free_form);
        DSD_RETURN_IF_ERROR(status)
            << "optimizer state of \"" << model_.fqn(param.model_group) << "\"";
      }
      return absl::OkStatus();
    };
    DSD_ASSIGN_OR_RETURN(
        std::vector<Prepared> prepared,
        MapRanges<Prepared>(env, threads, group.params.size(), prepare));
    pairs.reserve(pairs.size() + group.params.size() * group.fields.size());
    for (Prepared& part : prepared) {
      std::move(part.pairs.begin(), part.pairs.end(),
                std::back_inserter(pairs));
      std::move(part.free_form.begin(), part.free_form.end(),
                std::back_inserter(free_form));
    }
  }
  if (free_form.empty()) return absl::OkStatus();
  // Keys below free-form state may have dots, and look like something else.
  absl::flat_hash_set<std::string> names;
  for (const TensorPair& pair : pairs) names.insert(pair.name.Text());
  for (TensorPair& pair : free_form) {
    std::string name = pair.name.Text();
    while (!names.insert(name).second) absl::StrAppend(&name, "'");
    pair.name = std::move(name);
    pairs.push_back(std::move(pair));
  }
  return absl::OkStatus();
}

absl::Status OptimizerLoad::PrepareParam(const GroupLoad& group,
                                         ParamLoad& param,
                                         std::vector<TensorPair>& pairs,
                                         std::vector<TensorPair>& free_form) {
  const TensorValue& live_param = model_.value(param.model_group);
  absl::InlinedVector<at::Tensor, 4> live_tensors(group.fields.size());
  DSD_RETURN_IF_ERROR(group.optimizer->LiveTensors(
      group.group, param.param, group.fields, absl::MakeSpan(live_tensors)));
  std::optional<StateDict> live;  // where more than these tensors are needed
  std::optional<StateDict> inert;
  for (size_t i = 0; i < group.fields.size(); ++i) {
    const StateField& field = group.fields[i];
    const Value* value = FindSet(*param.loaded, field.name);
    const Value* live_value = nullptr;
    if (value == nullptr || field.shape == StateField::Shape::kAny) {
      if (!live.has_value()) {
        DSD_ASSIGN_OR_RETURN(live,
                             group.optimizer->State(group.group, param.param));
      }
      live_value = FindSet(std::as_const(*live), field.name);
    }
    if (value == nullptr) {
      if (!field.required) continue;
      // Only if not strict: what there is stays.
      value = live_value;
      if (value == nullptr) {
        if (!inert.has_value()) {
          DSD_ASSIGN_OR_RETURN(
              inert, group.optimizer->InertState(group.group, param.param));
        }
        value = FindSet(std::as_const(*inert), field.name);
      }
      if (value == nullptr) continue;
      if (field.shape != StateField::Shape::kCount) {
        param.result.Append(field.name, *value);
        continue;
      }
    }
    const PairName name("optim.state", &model_.fqn(param.model_group),
                        &field.name);
    switch (field.shape) {
      case StateField::Shape::kCount: {
        DSD_ASSIGN_OR_RETURN(const Object number, ToObject(*value));
        param.result.Append(field.name, Value(ToCount(number).value_or(0)));
        break;
      }
      case StateField::Shape::kLikeParameter: {
        const TensorValue& source = *value->get_if<TensorValue>();
        const at::Tensor& like = live_param.locals()[0];
        const at::Tensor& old = live_tensors[i];
        const bool is_there = CanBeFilled(old);
        c10::ScalarType type = source.scalar_type();
        if (policy_ == DTypePolicy::kCast) {
          type = is_there ? old.scalar_type() : live_param.scalar_type();
        }
        // The live tensor is filled in place if it can be.
        at::Tensor target;
        if (is_there && old.scalar_type() == type &&
            old.sizes() == like.sizes()) {
          target = old;
        } else {
          // Assign gives a parameter on the meta device host memory.
          const auto options = like.options().dtype(type).device(
              like.is_meta() ? c10::Device(c10::kCPU) : like.device());
          const Dims sizes = ToDims(like.sizes());
          const bool is_usual =
              like.layout() == c10::Layout::Strided &&
              ToDims(like.strides()) == RowMajorStrides(sizes);
          DSD_ASSIGN_OR_RETURN(
              target, is_usual ? NewTensor(sizes, options) : TorchToStatus([&] {
                return at::empty_like(like, options);
              }));
        }
        DSD_ASSIGN_OR_RETURN(TensorValue to,
                             WithShardingOf(live_param, target));
        pairs.push_back({name, source, to});
        param.result.Append(field.name, Value(std::move(to)));
        break;
      }
      case StateField::Shape::kAny: {
        Value copy = WithTypedKeys(*value, live_value, dict_->is_flat());
        std::optional<FreeFormTypes> types;
        if (policy_ == DTypePolicy::kCast) {
          types.emplace(live_value, live_param.scalar_type());
        }
        absl::Status status;
        ForEachTensor(
            copy, "", [&](const std::string& path, TensorValue& tensor) {
              if (!status.ok()) return;
              c10::ScalarType type = tensor.scalar_type();
              if (types.has_value()) type = types->At(path, type);
              absl::StatusOr<at::Tensor> target = NewTensor(
                  tensor.shape(), c10::TensorOptions(type).device(
                                      live_param.locals()[0].device()));
              status.Update(target.status());
              if (!status.ok()) return;
              TensorValue to(*std::move(target));
              free_form.push_back(
                  {absl::StrCat(name.Text(), path.empty() ? "" : ".", path),
                   tensor, to});
              tensor = std::move(to);
            });
        DSD_RETURN_IF_ERROR(status);
        param.result.Append(field.name, std::move(copy));
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
      PrefetchStates(*group.optimizer, group.group, param.param);
      const absl::Status status = group.optimizer->SetState(
          group.group, param.param, std::move(param.result));
      DSD_RETURN_IF_ERROR(status)
          << "optimizer state of \"" << model_.fqn(param.model_group) << "\"";
    }
  }
  return absl::OkStatus();
}

}  // namespace dsd
