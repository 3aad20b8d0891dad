// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/joint.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/layout/placement.h"
#include "dsd/core/state_dict/outline.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/core/transfer/transfer.h"

namespace dsd {
namespace {

constexpr int64_t kMaxBytes = int64_t{1} << 30;
constexpr size_t kShown = 50;

// A tensor on the wire: (marker, element type, kind, shape, numbers). Numbers
// are for kReplicated the ranks, none for those that declare it; for kIntervals
// holder, begin, end of each; for kBoxes per cell its lower and upper corner,
// the number of holders and these.
constexpr char kMarker[] = "dsd.Tensor";
enum Kind : int64_t { kReplicated, kIntervals, kBoxes };

Value ToList(absl::Span<const int64_t> numbers) {
  Value::List list;
  for (const int64_t number : numbers) list.push_back(Value(number));
  return Value(std::move(list));
}

absl::StatusOr<Value> ToDeclaration(const TensorValue& tensor,
                                    const std::vector<int64_t>& replicas) {
  DSD_ASSIGN_OR_RETURN(const DType dtype, ToDType(tensor.scalar_type()));
  Kind kind = kReplicated;
  std::vector<int64_t> numbers = replicas;
  if (!tensor.is_plain()) {
    const Layout& layout = tensor.layout();
    if (layout.HasAnyHolder()) {
      return absl::InvalidArgumentError("the tensor is on no rank");
    }
    numbers.clear();
    if (layout.kind() == Layout::Kind::kFlat) {
      kind = kIntervals;
      layout.ForEachHolder([&](Holder holder) {
        if (const auto interval = layout.IntervalOf(holder)) {
          numbers.insert(numbers.end(),
                         {holder, interval->begin, interval->end});
        }
      });
    } else {
      kind = kBoxes;
      layout.ForEachCell(layout.whole(), [&](const Cell& cell) {
        numbers.insert(numbers.end(), cell.box.lo.begin(), cell.box.lo.end());
        numbers.insert(numbers.end(), cell.box.hi.begin(), cell.box.hi.end());
        numbers.push_back(cell.holders.size());
        for (int64_t i = 0; i < cell.holders.size(); ++i) {
          numbers.push_back(cell.holders.At(i));
        }
      });
    }
  }
  return Value(
      Value::Tuple{{Value(Opaque{kMarker}), Value(static_cast<int64_t>(dtype)),
                    Value(static_cast<int64_t>(kind)), ToList(tensor.shape()),
                    ToList(numbers)}});
}

bool IsDeclaration(const Value& value) {
  const auto* tuple = value.get_if<Value::Tuple>();
  const auto* marker = tuple == nullptr || tuple->items.size() != 5
                           ? nullptr
                           : tuple->items[0].get_if<Opaque>();
  return marker != nullptr && marker->type_name == kMarker;
}

bool IsDeclarationOfShards(const Value& value) {
  if (!IsDeclaration(value)) return false;
  const auto* kind = value.get_if<Value::Tuple>()->items[2].get_if<int64_t>();
  return kind != nullptr && *kind != kReplicated;
}

// Of values without tensors.
bool IsSame(const Value& a, const Value& b) {
  const absl::StatusOr<std::string> bytes_a = EncodeOutline(a);
  const absl::StatusOr<std::string> bytes_b = EncodeOutline(b);
  return bytes_a.ok() && bytes_b.ok() && *bytes_a == *bytes_b;
}

absl::Status Malformed() {
  return absl::DataLossError("a rank sent a malformed declaration of a tensor");
}

absl::StatusOr<std::vector<int64_t>> ToNumbers(const Value& value) {
  const auto* list = value.get_if<Value::List>();
  if (list == nullptr) return Malformed();
  std::vector<int64_t> numbers;
  for (const Value& item : *list) {
    const auto* number = item.get_if<int64_t>();
    if (number == nullptr) return Malformed();
    numbers.push_back(*number);
  }
  return numbers;
}

struct Declared {
  Layout layout;
  c10::ScalarType type;
  std::vector<int64_t> holders;  // with at least one element, or replicas
};

absl::StatusOr<Declared> FromDeclaration(const Value& value,
                                         const std::vector<int>& declared_by) {
  const std::vector<Value>& items = value.get_if<Value::Tuple>()->items;
  const auto* dtype = items[1].get_if<int64_t>();
  const auto* kind = items[2].get_if<int64_t>();
  if (dtype == nullptr || kind == nullptr || *dtype < 0 ||
      *dtype >= kNumDTypes) {
    return Malformed();
  }
  const c10::ScalarType type = ToScalarType(static_cast<DType>(*dtype));
  DSD_ASSIGN_OR_RETURN(const std::vector<int64_t> extents, ToNumbers(items[3]));
  DSD_ASSIGN_OR_RETURN(std::vector<int64_t> numbers, ToNumbers(items[4]));
  const Dims shape(extents.begin(), extents.end());
  absl::flat_hash_set<int64_t> holders;
  absl::StatusOr<Layout> layout = Malformed();
  if (*kind == kReplicated) {
    if (numbers.empty()) {
      numbers.assign(declared_by.begin(), declared_by.end());
    }
    holders.insert(numbers.begin(), numbers.end());
    DSD_ASSIGN_OR_RETURN(
        const DeviceMesh mesh,
        DeviceMesh::Create({static_cast<int64_t>(numbers.size())}, numbers));
    layout = Layout::FromPlacements(shape, mesh, {Replicate()});
  } else if (*kind == kIntervals && numbers.size() % 3 == 0) {
    std::vector<FlatInterval> intervals;
    for (size_t i = 0; i < numbers.size(); i += 3) {
      intervals.push_back({numbers[i], numbers[i + 1], numbers[i + 2]});
      if (numbers[i + 1] < numbers[i + 2]) holders.insert(numbers[i]);
    }
    layout = Layout::FromFlatIntervals(shape, std::move(intervals));
  } else if (*kind == kBoxes) {
    std::vector<HolderBox> boxes;
    const size_t ndim = shape.size();
    size_t at = 0;
    while (at < numbers.size()) {
      if (numbers.size() - at < 2 * ndim + 1) return Malformed();
      Box box;
      box.lo.assign(numbers.begin() + at, numbers.begin() + at + ndim);
      box.hi.assign(numbers.begin() + at + ndim,
                    numbers.begin() + at + 2 * ndim);
      at += 2 * ndim;
      const int64_t count = numbers[at++];
      if (count < 0 || static_cast<size_t>(count) > numbers.size() - at) {
        return Malformed();
      }
      for (int64_t i = 0; i < count; ++i) {
        holders.insert(numbers[at]);
        boxes.push_back({numbers[at++], box});
      }
    }
    layout = Layout::FromBoxes(shape, std::move(boxes));
  }
  DSD_RETURN_IF_ERROR(layout);
  Declared declared{*std::move(layout), type, {holders.begin(), holders.end()}};
  std::sort(declared.holders.begin(), declared.holders.end());
  return declared;
}

// `own` under the layout that all ranks know it by: the same memory.
absl::StatusOr<TensorValue> WithLayout(const TensorValue& own,
                                       const Declared& declared, Holder self) {
  if (declared.layout.kind() != Layout::Kind::kBoxes || own.locals().empty()) {
    if (own.locals().empty()) {
      return TensorValue::Elsewhere(declared.layout, declared.type);
    }
    return TensorValue::Sharded(Sharding{declared.layout, self},
                                own.locals()[0]);
  }
  DSD_ASSIGN_OR_RETURN(const std::vector<TensorValue::Part> parts, own.Parts());
  std::vector<at::Tensor> views;
  for (const LocalBox& wanted : declared.layout.BoxesOf(self)) {
    const auto part = std::find_if(parts.begin(), parts.end(),
                                   [&](const TensorValue::Part& candidate) {
                                     return candidate.box.Contains(wanted.box);
                                   });
    if (part == parts.end()) {
      return absl::InternalError(absl::StrCat(
          "box ", wanted.box.ToString(), " is not in one part of this rank"));
    }
    at::Tensor view = part->view;
    DSD_RETURN_IF_ERROR(TorchToStatus([&] {
      for (int d = 0; d < wanted.box.ndim(); ++d) {
        view = view.slice(d, wanted.box.lo[d] - part->box.lo[d],
                          wanted.box.hi[d] - part->box.lo[d]);
      }
    }));
    views.push_back(std::move(view));
  }
  return TensorValue::FromBoxes(Sharding{declared.layout, self}, declared.type,
                                std::move(views));
}

bool HasOneElement(const TensorValue& tensor) {
  return tensor.is_plain() && Box::Whole(tensor.shape()).num_elements() == 1;
}

class Joiner {
 public:
  Joiner(absl::string_view what, std::vector<int64_t> replicas,
         const Mover& mover, const CallClock& clock)
      : what_(what),
        replicas_(std::move(replicas)),
        mover_(mover),
        clock_(clock) {}

  absl::StatusOr<StateDict> Join(absl::Status local, const StateDict& mine) {
    Value tree = mine;
    ForEachTensor(tree, "", [&](const std::string& path, TensorValue& tensor) {
      own_.emplace(path, tensor);
    });
    std::string bytes;
    if (local.ok()) {
      absl::StatusOr<Value> declared = Declare(tree, "");
      local.Update(declared.status());
      if (declared.ok()) {
        Value::List both = {ToList(replicas_)};
        both.push_back(*std::move(declared));
        absl::StatusOr<std::string> encoded =
            EncodeOutline(Value(std::move(both)));
        local.Update(encoded.status());
        if (encoded.ok()) bytes = *std::move(encoded);
      }
    }
    DSD_RETURN_IF_ERROR(Agree(
        mover_.comm(), what_, DigestBuilder().Add("join").Finish(), local,
        [] { return "with replica_ranks, for ranks of different keys"; },
        clock_.Left()));
    std::vector<std::string> all = {bytes};
    if (mover_.world_size() > 1) {
      DSD_ASSIGN_OR_RETURN(
          all, mover_.comm()->AllGatherBlobs(bytes, kMaxBytes, clock_.Left()));
    }
    // From here on every rank computes the same.
    Value joint{StateDict()};
    for (size_t rank = 0; rank < all.size(); ++rank) {
      absl::StatusOr<Value> sent =
          DecodeOutline(all[rank], DeviceMesh::Iota({1}));
      DSD_RETURN_IF_ERROR(sent) << what_ << ": rank " << rank;
      auto* const both = sent->get_if<Value::List>();
      if (both == nullptr || both->size() != 2) return Malformed();
      DSD_ASSIGN_OR_RETURN(std::vector<int64_t> replicas,
                           ToNumbers((*both)[0]));
      replicas_of_.push_back(std::move(replicas));
      Merge(std::move((*both)[1]), "", static_cast<int>(rank), joint);
    }
    DSD_RETURN_IF_ERROR(Resolve(joint, ""));
    if (!misfits_.empty()) {
      const size_t shown = std::min(misfits_.size(), kShown);
      return absl::FailedPreconditionError(absl::StrCat(
          what_, ": ",
          absl::StrJoin(misfits_.begin(), misfits_.begin() + shown, "; "),
          shown < misfits_.size()
              ? absl::StrCat("; and ", misfits_.size() - shown, " more")
              : ""));
    }
    return std::move(*joint.get_if<StateDict>());
  }

 private:
  static std::string Under(const std::string& path, absl::string_view key) {
    return path.empty() ? std::string(key) : absl::StrCat(path, ".", key);
  }

  absl::StatusOr<Value> Declare(const Value& value, const std::string& path) {
    if (const auto* tensor = value.get_if<TensorValue>()) {
      if (!tensor->defined()) {
        return absl::InvalidArgumentError(
            absl::StrCat("\"", path, "\": the tensor is undefined"));
      }
      if (HasOneElement(*tensor)) return value;
      DSD_RETURN_IF_ERROR(tensor->CheckIsOf(mover_.rank()))
          << "\"" << path << "\"";
      absl::StatusOr<Value> declared = ToDeclaration(*tensor, replicas_);
      DSD_RETURN_IF_ERROR(declared) << "\"" << path << "\"";
      return declared;
    }
    if (const auto* dict = value.get_if<StateDict>()) {
      StateDict out;
      for (size_t i = 0; i < dict->size(); ++i) {
        DSD_ASSIGN_OR_RETURN(
            Value item,
            Declare(dict->value(i), Under(path, dict->key_text(i))));
        out.Set(dict->key(i), std::move(item));
      }
      return Value(std::move(out));
    }
    const bool is_tuple = value.is<Value::Tuple>();
    const std::vector<Value>* items = is_tuple
                                          ? &value.get_if<Value::Tuple>()->items
                                          : value.get_if<Value::List>();
    if (items == nullptr) return value;
    std::vector<Value> out;
    for (size_t i = 0; i < items->size(); ++i) {
      DSD_ASSIGN_OR_RETURN(Value item,
                           Declare((*items)[i], Under(path, absl::StrCat(i))));
      out.push_back(std::move(item));
    }
    if (is_tuple) return Value(Value::Tuple{std::move(out)});
    return Value(std::move(out));
  }

  // Remembers that `rank` has what is declared below `value`.
  void Note(const Value& value, const std::string& path, int rank) {
    if (IsDeclaration(value) || value.is<TensorValue>()) {
      ranks_of_[path].push_back(rank);
    } else if (const auto* dict = value.get_if<StateDict>()) {
      for (size_t i = 0; i < dict->size(); ++i) {
        Note(dict->value(i), Under(path, dict->key_text(i)), rank);
      }
    } else if (value.is_container()) {
      const std::vector<Value>& items =
          value.is<Value::Tuple>() ? value.get_if<Value::Tuple>()->items
                                   : *value.get_if<Value::List>();
      for (size_t i = 0; i < items.size(); ++i) {
        Note(items[i], Under(path, absl::StrCat(i)), rank);
      }
    }
  }

  void Merge(Value from, const std::string& path, int rank, Value& into) {
    auto* from_dict = from.get_if<StateDict>();
    auto* into_dict = into.get_if<StateDict>();
    if (from_dict != nullptr && into_dict != nullptr) {
      for (size_t i = 0; i < from_dict->size(); ++i) {
        const std::string below = Under(path, from_dict->key_text(i));
        if (Value* known = into_dict->Find(from_dict->key(i))) {
          Merge(from_dict->value(i), below, rank, *known);
        } else {
          Note(from_dict->value(i), below, rank);
          into_dict->Set(from_dict->key(i), from_dict->value(i));
        }
      }
      return;
    }
    if (IsDeclaration(from) != IsDeclaration(into) ||
        (IsDeclaration(from) && !IsSame(from, into))) {
      misfits_.push_back(absl::StrCat(
          "\"", path, "\" is not the same on rank ", rank,
          " and on lower ranks (type, shape, layout or replica_ranks)"));
    } else if (IsDeclaration(from)) {
      ranks_of_[path].push_back(rank);
    } else if (auto* groups = from.get_if<Value::List>();
               groups != nullptr && into.is<Value::List>() &&
               IsParamGroups(path)) {
      AppendGroups(*groups, path, *into.get_if<Value::List>());
    } else if (!from.is_container() || !into.is_container()) {
      // An object, or one element: that of the first rank.
      if (into.is<TensorValue>()) ranks_of_[path].push_back(rank);
    } else {
      Note(from, path, rank);
    }
  }

  static bool IsParamGroups(const std::string& path) {
    return path == "param_groups" || path == "optim.param_groups";
  }

  // In either form.
  static bool IsOptimizer(const StateDict& dict) {
    for (size_t i = 0; i < dict.size(); ++i) {
      const std::string key = dict.key_text(i);
      if (key == "param_groups" || absl::StartsWith(key, "param_groups.")) {
        return true;
      }
    }
    return false;
  }

  // A parameter that several ranks have is in the group of the first of them.
  void AppendGroups(std::vector<Value>& groups, const std::string& path,
                    std::vector<Value>& known) {
    const auto [listed, is_new] = listed_.try_emplace(path);
    if (is_new) {
      for (const Value& group : known) AddNames(group, listed->second);
    }
    absl::flat_hash_set<std::string> names;  // of this rank
    for (Value& group : groups) {
      AddNames(group, names);
      if (RemoveListed(listed->second, group)) {
        known.push_back(std::move(group));
      }
    }
    listed->second.merge(names);
  }

  // The list "params" or "param_names" of a group; null if it has none.
  template <class GroupValue>
  static auto* ListOf(GroupValue& group, absl::string_view key) {
    auto* const dict = group.template get_if<StateDict>();
    auto* const value = dict == nullptr ? nullptr : dict->Find(key);
    return value == nullptr ? nullptr : value->template get_if<Value::List>();
  }

  static std::string NameOf(const Value& param) {
    if (const auto* const fqn = param.get_if<std::string>()) return *fqn;
    return EncodeOutline(param).value_or("");
  }

  static void AddNames(const Value& group,
                       absl::flat_hash_set<std::string>& names) {
    const Value::List* const params = ListOf(group, "params");
    if (params == nullptr) return;
    for (const Value& param : *params) names.insert(NameOf(param));
  }

  // False if no parameter is left.
  static bool RemoveListed(const absl::flat_hash_set<std::string>& listed,
                           Value& group) {
    Value::List* const params = ListOf(group, "params");
    if (params == nullptr) return true;  // for the optimizer's parser to refuse
    Value::List* names = ListOf(group, "param_names");
    if (names != nullptr && names->size() != params->size()) names = nullptr;
    size_t kept = 0;
    for (size_t i = 0; i < params->size(); ++i) {
      if (listed.contains(NameOf((*params)[i]))) continue;
      if (kept != i) {
        (*params)[kept] = std::move((*params)[i]);
        if (names != nullptr) (*names)[kept] = std::move((*names)[i]);
      }
      ++kept;
    }
    params->resize(kept);
    if (names != nullptr) names->resize(kept);
    return kept > 0;
  }

  // Whether one of `holders` is not among `ranks` (ascending), which goes into
  // the report then.
  bool IsLacking(const std::string& path, const std::vector<int64_t>& holders,
                 const std::vector<int>& ranks) {
    std::vector<int64_t> lacking;
    for (const int64_t holder : holders) {
      if (!std::binary_search(ranks.begin(), ranks.end(), holder)) {
        lacking.push_back(holder);
      }
    }
    if (lacking.empty()) return false;
    misfits_.push_back(absl::StrCat(
        "\"", path, "\" is missing on rank ", absl::StrJoin(lacking, ", "),
        " and is on rank ", absl::StrJoin(ranks, ", "),
        "; what it is replicated over is in replica_ranks"));
    return true;
  }

  // The key without what comes after its last dot.
  static absl::string_view ParentOf(absl::string_view key) {
    const size_t dot = key.rfind('.');
    return dot == absl::string_view::npos ? "" : key.substr(0, dot);
  }

  // Where a tensor of one element may be.
  enum class Place {
    kOnReplicas,     // on all replicas of a rank that has it
    kInOptimizer,    // the same, unless it is a count of shards
    kWithParameter,  // wherever its parameter, which may be sharded, is
    kInParamGroups,  // in a list, in which other ranks have other groups
  };

  // Puts tensors in the place of declarations.
  absl::Status Resolve(Value& value, const std::string& path,
                       Place place = Place::kOnReplicas) {
    if (IsDeclaration(value)) {
      const std::vector<int>& ranks = ranks_of_[path];
      absl::StatusOr<Declared> declared = FromDeclaration(value, ranks);
      DSD_RETURN_IF_ERROR(declared) << what_ << ": \"" << path << "\"";
      if (IsLacking(path, declared->holders, ranks)) return absl::OkStatus();
      const auto own = own_.find(path);
      absl::StatusOr<TensorValue> tensor =
          own == own_.end()
              ? TensorValue::Elsewhere(declared->layout, declared->type)
              : WithLayout(own->second, *declared, mover_.rank());
      DSD_RETURN_IF_ERROR(tensor) << what_ << ": \"" << path << "\"";
      value = Value(*std::move(tensor));
      return absl::OkStatus();
    }
    if (value.is<TensorValue>()) {
      // Of one element: this rank's own, if it has it.
      if (place == Place::kInParamGroups) return absl::OkStatus();
      const auto own = own_.find(path);
      if (own != own_.end()) value = Value(own->second);
      if (place == Place::kWithParameter) return absl::OkStatus();
      const std::vector<int>& ranks = ranks_of_[path];
      const auto [holders, is_new] = holders_by_ranks_.try_emplace(ranks);
      if (is_new) {
        std::set<int64_t> replicas;
        for (const int rank : ranks) {
          replicas.insert(replicas_of_[rank].begin(), replicas_of_[rank].end());
        }
        holders->second.assign(replicas.begin(), replicas.end());
      }
      IsLacking(path, holders->second, ranks);
      return absl::OkStatus();
    }
    if (auto* dict = value.get_if<StateDict>()) {
      if (place == Place::kOnReplicas && IsOptimizer(*dict)) {
        place = Place::kInOptimizer;
      }
      // Parameters whose state is sharded: in the flat form beginnings of keys,
      // in the nested one what has all of this dict.
      absl::flat_hash_set<std::string> sharded;
      for (size_t i = 0; i < dict->size(); ++i) {
        if (IsDeclarationOfShards(dict->value(i))) {
          sharded.emplace(ParentOf(dict->key_text(i)));
        }
      }
      for (size_t i = 0; i < dict->size(); ++i) {
        const std::string key = dict->key_text(i);
        const std::string below = Under(path, key);
        Place place_below = place;
        if (place == Place::kInOptimizer &&
            (absl::StartsWith(key, "param_groups.") ||
             sharded.contains(ParentOf(key)))) {
          place_below = Place::kWithParameter;
        }
        DSD_RETURN_IF_ERROR(Resolve(dict->value(i), below, place_below));
      }
      return absl::OkStatus();
    }
    if (IsParamGroups(path)) place = Place::kInParamGroups;
    std::vector<Value>* items = value.get_if<Value::List>();
    if (auto* tuple = value.get_if<Value::Tuple>()) items = &tuple->items;
    for (size_t i = 0; items != nullptr && i < items->size(); ++i) {
      DSD_RETURN_IF_ERROR(
          Resolve((*items)[i], Under(path, absl::StrCat(i)), place));
    }
    return absl::OkStatus();
  }

  const absl::string_view what_;
  const std::vector<int64_t> replicas_;
  const Mover& mover_;
  const CallClock& clock_;
  absl::flat_hash_map<std::string, TensorValue> own_;
  absl::flat_hash_map<std::string, std::vector<int>> ranks_of_;
  std::vector<std::vector<int64_t>> replicas_of_;  // by rank
  // Of ranks that have something: all that are replicas of one of them.
  absl::flat_hash_map<std::vector<int>, std::vector<int64_t>> holders_by_ranks_;
  // Parameters in groups of an optimizer dict, by its path.
  absl::flat_hash_map<std::string, absl::flat_hash_set<std::string>> listed_;
  std::vector<std::string> misfits_;
};

absl::StatusOr<std::vector<int64_t>> CheckReplicas(
    const std::vector<int>* replica_ranks, const Mover& mover) {
  if (replica_ranks == nullptr) return std::vector<int64_t>();
  std::vector<int64_t> replicas(replica_ranks->begin(), replica_ranks->end());
  std::sort(replicas.begin(), replicas.end());
  replicas.erase(std::unique(replicas.begin(), replicas.end()), replicas.end());
  if (replicas.empty() || replicas.front() < 0 ||
      replicas.back() >= mover.world_size() ||
      !std::binary_search(replicas.begin(), replicas.end(), mover.rank())) {
    return absl::InvalidArgumentError(
        absl::StrCat("replica_ranks: expected ranks of a world of ",
                     mover.world_size(), ", rank ", mover.rank(),
                     " among them, found ", absl::StrJoin(replicas, ", ")));
  }
  return replicas;
}

}  // namespace

absl::StatusOr<StateDict> JoinDicts(absl::string_view what,
                                    const absl::Status& local,
                                    const StateDict& mine,
                                    const std::vector<int>* replica_ranks,
                                    const Mover& mover,
                                    const CallClock& clock) {
  absl::StatusOr<std::vector<int64_t>> replicas =
      CheckReplicas(replica_ranks, mover);
  absl::Status status = local;
  status.Update(replicas.status());
  return Joiner(what, replicas.value_or(std::vector<int64_t>()), mover, clock)
      .Join(status, mine);
}

absl::StatusOr<StateDict> JoinStateDicts(const StateDict& mine,
                                         Communicator* comm,
                                         const std::vector<int>& replica_ranks,
                                         const CallOptions& call) {
  if (comm == nullptr) return mine;
  const Mover mover(comm);
  const CallClock clock(mover.env(), call);
  return JoinDicts("join state dicts", absl::OkStatus(), mine,
                   replica_ranks.empty() ? nullptr : &replica_ranks, mover,
                   clock);
}

absl::StatusOr<std::vector<TensorPair>> JoinPairs(
    absl::string_view what, const absl::Status& local,
    const std::vector<TensorPair>& mine, StateDict& sources,
    const std::vector<int>* replica_ranks, const Mover& mover,
    const CallClock& clock) {
  // Sources are known to all ranks by their paths.
  absl::flat_hash_map<const void*, std::string> path_of;
  absl::flat_hash_map<std::string, TensorValue> at_path;
  ForEachTensor(sources, "", [&](const std::string& path, TensorValue& tensor) {
    path_of.emplace(tensor.id(), path);
    at_path.emplace(path, tensor);
  });
  StateDict pairs;
  absl::Status status = local;
  for (const TensorPair& pair : mine) {
    const auto path = path_of.find(pair.source.id());
    StateDict entry;
    if (path != path_of.end()) {
      entry.Set("source", Value(path->second));
    } else if (HasOneElement(pair.source)) {
      // [1] of the dict for what has no dimension here.
      entry.Set("source", Value(pair.source));
    } else {
      status.Update(absl::InternalError(
          absl::StrCat("\"", pair.name.Text(), "\" is not from the dict")));
      continue;
    }
    entry.Set("target", Value(pair.target));
    pairs.Set(pair.name.Text(), Value(std::move(entry)));
  }
  DSD_ASSIGN_OR_RETURN(StateDict joint, JoinDicts(what, status, pairs,
                                                  replica_ranks, mover, clock));
  std::vector<TensorPair> out;
  for (size_t i = 0; i < joint.size(); ++i) {
    const auto* entry = joint.value(i).get_if<StateDict>();
    const Value* source = entry == nullptr ? nullptr : entry->Find("source");
    const Value* target = entry == nullptr ? nullptr : entry->Find("target");
    const auto* path =
        source == nullptr ? nullptr : source->get_if<std::string>();
    const auto* from =
        source == nullptr ? nullptr : source->get_if<TensorValue>();
    const auto* to =
        target == nullptr ? nullptr : target->get_if<TensorValue>();
    if (path != nullptr) {
      const auto found = at_path.find(*path);
      from = found == at_path.end() ? nullptr : &found->second;
    }
    if (from == nullptr || to == nullptr) return Malformed();
    out.push_back({joint.key_text(i), *from, *to});
  }
  return out;
}

}  // namespace dsd
