// SPDX-License-Identifier: Apache-2.0
//
// A model's tensors under their names, as they are at the moment of a call.

#ifndef DSD_CORE_STATE_DICT_LIVE_MODEL_H_
#define DSD_CORE_STATE_DICT_LIVE_MODEL_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/env.h"
#include "dsd/core/fqn/fqn_table.h"
#include "dsd/core/fqn/module_tree.h"
#include "dsd/core/state_dict/mover.h"
#include "dsd/core/state_dict/sources.h"
#include "dsd/core/tensor/tensor_value.h"

namespace dsd {

// Precondition: defined.
TensorIdentity IdentityOf(const at::Tensor& tensor);

// Thread-compatible.
class LiveModel {
 public:
  explicit LiveModel(ModelSource* source) : source_(source) {}

  // Looks at the model again. The names are computed anew only if a tensor was
  // added, removed, re-assigned, resized or re-tied. Tells `mover` this rank's
  // holder.
  // Errors: of the source and FqnTable::Build; FailedPrecondition if a tensor
  // is not of the shape that its sharding says (gathered for the moment), or is
  // another rank's shard.
  absl::Status Refresh(Mover& mover);

  const FqnTable& table() const { return table_; }

  // Per group of the table: an alias without autograd history. Undefined for an
  // extra state.
  const TensorValue& value(size_t group) const { return values_[group]; }
  // Per group: the tensor that the model has. Not for extra states.
  const at::Tensor& tensor(size_t group) const {
    return tensors_[table_.canonical(group).slot];
  }
  // Of an entry of the table that is a tensor.
  const at::Tensor& tensor(const FqnTable::Entry& entry) const {
    return tensors_[entry.slot];
  }
  // Null for a tensor.
  ExtraState* extra_state(size_t group) const {
    const FqnTable::Entry& entry = table_.canonical(group);
    return entry.kind == EntryKind::kExtraState ? extra_states_[entry.slot]
                                                : nullptr;
  }
  bool has_extra_states() const { return !extra_states_.empty(); }
  const std::string& fqn(size_t group) const {
    return table_.canonical(group).fqn;
  }

  // Says that GroupOf(tensor) is asked for soon.
  void PrefetchGroupOf(const at::Tensor& tensor) const {
    group_of_.prefetch(tensor.unsafeGetTensorImpl());
  }

  // The group of a tensor of the model. NotFound otherwise.
  absl::StatusOr<size_t> GroupOf(const at::Tensor& tensor) const;

  // Whether two tensors that are not aliases have elements in common. Found out
  // once for a table.
  bool has_overlap();

  // The first group whose tensor is the same memory with its dimensions in
  // another order (w and w.t()); `group` itself if there is none.
  size_t LeaderOf(size_t group) {
    return has_overlap() ? leader_of_[group] : group;
  }
  // All groups of which that is true for the leader of `group`, but `group`.
  std::vector<size_t> FollowersOf(size_t group);

  int64_t tables_built() const { return tables_built_; }

  // Grows when table() or a value() becomes another one.
  int64_t version() const { return version_; }

 private:
  // Whether the source's are tensors_, at the same memory in the same shape.
  absl::StatusOr<bool> HasSameTensors(Env* env) const;

  ModelSource* source_;
  FqnTable table_;
  std::vector<at::Tensor> tensors_;         // by slot
  std::vector<TensorIdentity> identities_;  // by slot
  std::vector<ExtraState*> extra_states_;   // by slot
  int64_t revision_ = 0;
  std::vector<TensorValue> values_;  // by group
  std::optional<bool> has_overlap_;
  std::vector<size_t> leader_of_;  // by group, if has_overlap_
  absl::flat_hash_map<const c10::TensorImpl*, size_t> group_of_;
  // Filled when first asked for.
  mutable absl::flat_hash_map<TensorIdentity, size_t> group_of_identity_;
  int64_t tables_built_ = 0;
  int64_t version_ = 0;
  // Whether values_ is complete, and as of which generation of ShardingTable.
  bool values_are_current_ = false;
  uint64_t shardings_ = 0;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_LIVE_MODEL_H_
