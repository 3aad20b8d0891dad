// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/live_model.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/threads.h"
#include "dsd/core/tensor/memory_overlap.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/tensor_memory.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {

namespace {

// Memory that is read as another type, conjugated or negated is another tensor.
uint16_t ReadingOf(const at::Tensor& tensor) {
  return static_cast<uint16_t>(4 * static_cast<int>(tensor.scalar_type()) +
                               2 * tensor.is_conj() + tensor.is_neg());
}

// IdentityOf(tensor) == id, at a fraction of the cost.
bool HasIdentity(const at::Tensor& tensor, const TensorIdentity& id) {
  const at::IntArrayRef sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), id.sizes.begin(),
                  id.sizes.end())) {
    return false;
  }
  if (!tensor.has_storage() || tensor.numel() == 0) {
    return id.storage == tensor.unsafeGetTensorImpl();
  }
  const at::IntArrayRef strides = tensor.strides();
  return id.storage == tensor.storage().unsafeGetStorageImpl() &&
         id.offset == tensor.storage_offset() &&
         id.reading == ReadingOf(tensor) &&
         std::equal(strides.begin(), strides.end(), id.strides.begin(),
                    id.strides.end());
}

// Equal for tensors that have the same elements at the same places, whatever
// they are read as.
TensorIdentity UpToOrder(TensorIdentity id) {
  id.reading = c10::elementSize(static_cast<c10::ScalarType>(id.reading / 4));
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < id.strides.size(); ++d) {
    if (id.sizes[d] != 1) dims.emplace_back(id.strides[d], id.sizes[d]);
  }
  if (id.strides.empty()) return id;
  std::sort(dims.begin(), dims.end());
  id.sizes.clear();
  id.strides.clear();
  for (const auto& [stride, size] : dims) {
    id.strides.push_back(stride);
    id.sizes.push_back(size);
  }
  return id;
}

// Those of a tree's tensors, by slot. Without recursion: trees come from users.
void TakeIdentities(ModuleNode& root, std::vector<TensorIdentity>& identities) {
  std::vector<ModuleNode*> nodes = {&root};
  while (!nodes.empty()) {
    ModuleNode& node = *nodes.back();
    nodes.pop_back();
    for (ModuleNode::Tensor& tensor : node.tensors) {
      if (tensor.kind == EntryKind::kExtraState) continue;
      identities[tensor.slot] = std::move(tensor.identity);
    }
    for (ModuleNode& child : node.children) nodes.push_back(&child);
  }
}

}  // namespace

TensorIdentity IdentityOf(const at::Tensor& tensor) {
  TensorIdentity id;
  id.sizes.assign(tensor.sizes().begin(), tensor.sizes().end());
  // Without a storage (sparse) the tensor is only the same as itself. So it is
  // without elements: empty shards of different parameters lie at one place.
  if (!tensor.has_storage() || tensor.numel() == 0) {
    id.storage = tensor.unsafeGetTensorImpl();
    return id;
  }
  id.storage = tensor.storage().unsafeGetStorageImpl();
  id.offset = tensor.storage_offset();
  id.reading = ReadingOf(tensor);
  id.strides.assign(tensor.strides().begin(), tensor.strides().end());
  return id;
}

absl::StatusOr<bool> LiveModel::HasSameTensors(Env* env) const {
  if (tables_built_ == 0) return false;
  bool same = true;
  size_t slot = 0;
  DSD_RETURN_IF_ERROR(source_->ForEachTensor([&](const at::Tensor& tensor) {
    same = same && slot < tensors_.size() && tensor.is_same(tensors_[slot]);
    ++slot;
  }));
  if (!same || slot != tensors_.size()) return false;
  std::atomic<bool> differs{false};
  DSD_RETURN_IF_ERROR(
      ForRanges(env, ThreadsFor(tensors_.size()), tensors_.size(),
                [&](size_t begin, size_t end) {
                  constexpr size_t kAhead = 8;
                  for (size_t i = begin; i < end && !differs; ++i) {
                    if (i + kAhead < end) PrefetchTensor(tensors_[i + kAhead]);
                    if (!HasIdentity(tensors_[i], identities_[i]))
                      differs = true;
                  }
                  return absl::OkStatus();
                }));
  return !differs;
}

absl::Status LiveModel::Refresh(Mover& mover) {
  DSD_ASSIGN_OR_RETURN(const bool same_tensors, HasSameTensors(mover.env()));
  DSD_ASSIGN_OR_RETURN(std::vector<ExtraState*> extra_states,
                       source_->ExtraStates());
  const uint64_t shardings = ShardingTable::Global().generation();
  if (same_tensors && extra_states == extra_states_ &&
      source_->revision() == revision_) {
    if (values_are_current_ && shardings == shardings_) return absl::OkStatus();
  } else {
    std::vector<at::Tensor> tensors;
    tensors.reserve(tensors_.size());
    DSD_RETURN_IF_ERROR(source_->ForEachTensor(
        [&](const at::Tensor& tensor) { tensors.push_back(tensor); }));
    DSD_ASSIGN_OR_RETURN(ModuleNode tree, source_->Describe());
    DSD_ASSIGN_OR_RETURN(table_, FqnTable::Build(tree));
    ++tables_built_;
    tensors_ = std::move(tensors);
    extra_states_ = std::move(extra_states);
    revision_ = source_->revision();
    has_overlap_.reset();
    identities_.clear();
    identities_.resize(tensors_.size());
    TakeIdentities(tree, identities_);
    group_of_.clear();
    group_of_.reserve(tensors_.size());
    group_of_identity_.clear();
    for (const FqnTable::Entry& entry : table_.entries()) {
      if (entry.kind == EntryKind::kExtraState) continue;
      group_of_.emplace(tensors_[entry.slot].unsafeGetTensorImpl(),
                        entry.group);
    }
  }

  ++version_;
  values_are_current_ = false;
  shardings_ = shardings;
  const size_t num_groups = table_.groups().size();
  values_.assign(num_groups, TensorValue(at::Tensor()));
  DSD_RETURN_IF_ERROR(ForRanges(
      mover.env(), ThreadsFor(num_groups), num_groups,
      [&](size_t begin, size_t end) {
        constexpr size_t kAhead = 8;
        for (size_t group = begin; group < end; ++group) {
          if (group + kAhead < end && extra_state(group + kAhead) == nullptr) {
            PrefetchTensor(tensor(group + kAhead));
          }
          if (extra_state(group) != nullptr) continue;
          // As detach(), without the dispatcher, most of its time.
          values_[group] = TensorValue(tensor(group).tensor_data());
        }
        return absl::OkStatus();
      }));
  std::optional<Holder> self;
  if (mover.comm() != nullptr) self = mover.rank();
  for (size_t group = 0; shardings_ != 0 && group < num_groups; ++group) {
    if (extra_state(group) != nullptr) continue;
    std::optional<Sharding> sharding =
        ShardingTable::Global().Find(tensor(group));
    if (!sharding.has_value()) continue;
    if (!self.has_value()) self = sharding->holder;
    if (sharding->holder != *self) {
      return absl::FailedPreconditionError(absl::StrCat(
          "\"", fqn(group), "\" is the shard of holder ", sharding->holder,
          ", but this is ",
          mover.comm() != nullptr
              ? absl::StrCat("rank ", *self, " of the communicator")
              : absl::StrCat("holder ", *self, " by the other shards"),
          "; use the communicator whose ranks the model was sharded over"));
    }
    absl::StatusOr<TensorValue> value =
        TensorValue::Sharded(*std::move(sharding), values_[group].locals()[0]);
    if (!value.ok()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "\"", fqn(group), "\" is not a shard at the moment (",
          value.status().message(),
          "); get and set between steps, not between forward and backward"));
    }
    values_[group] = *std::move(value);
  }
  mover.set_self(self.value_or(0));
  values_are_current_ = true;
  return absl::OkStatus();
}

bool LiveModel::has_overlap() {
  if (!has_overlap_.has_value()) {
    std::vector<at::Tensor> distinct;
    for (size_t group = 0; group < table_.groups().size(); ++group) {
      if (extra_state(group) == nullptr) distinct.push_back(tensor(group));
    }
    has_overlap_ = FindOverlap(distinct).has_value();
    leader_of_.clear();
    absl::flat_hash_map<TensorIdentity, size_t> first;
    for (size_t group = 0; *has_overlap_ && group < table_.groups().size();
         ++group) {
      leader_of_.push_back(
          extra_state(group) != nullptr
              ? group
              : first.try_emplace(UpToOrder(IdentityOf(tensor(group))), group)
                    .first->second);
    }
  }
  return *has_overlap_;
}

std::vector<size_t> LiveModel::FollowersOf(size_t group) {
  std::vector<size_t> followers;
  if (!has_overlap()) return followers;
  for (size_t other = 0; other < leader_of_.size(); ++other) {
    if (other != group && leader_of_[other] == leader_of_[group]) {
      followers.push_back(other);
    }
  }
  return followers;
}

absl::StatusOr<size_t> LiveModel::GroupOf(const at::Tensor& tensor) const {
  const auto it = group_of_.find(tensor.unsafeGetTensorImpl());
  if (it != group_of_.end()) return it->second;
  if (tensor.defined()) {
    if (group_of_identity_.empty()) {
      for (const FqnTable::Entry& entry : table_.entries()) {
        if (entry.kind == EntryKind::kExtraState) continue;
        group_of_identity_.emplace(identities_[entry.slot], entry.group);
      }
    }
    const auto same = group_of_identity_.find(IdentityOf(tensor));
    if (same != group_of_identity_.end()) return same->second;
  }
  return absl::NotFoundError(absl::StrCat(
      "a tensor ",
      tensor.defined()
          ? absl::StrCat("of shape ", DimsToString(ToDims(tensor.sizes())))
          : "that is undefined",
      " is not a parameter of the model; give the model that owns it, or make "
      "the optimizer anew after parameters were replaced"));
}

}  // namespace dsd
