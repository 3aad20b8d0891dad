// SPDX-License-Identifier: Apache-2.0
//
// A model's tensors under their names, as they are at the moment of a call.

#ifndef DSD_CORE_STATE_DICT_LIVE_MODEL_H_
#define DSD_CORE_STATE_DICT_LIVE_MODEL_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
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

  // Per group of the table: an alias without autograd history.
  const TensorValue& value(size_t group) const { return values_[group]; }
  // Per group: the tensor that the model has.
  const at::Tensor& tensor(size_t group) const {
    return tensors_[table_.canonical(group).slot];
  }
  const std::string& fqn(size_t group) const {
    return table_.canonical(group).fqn;
  }

  // The group of a tensor of the model. NotFound otherwise.
  absl::StatusOr<size_t> GroupOf(const at::Tensor& tensor) const;

  int64_t tables_built() const { return tables_built_; }

 private:
  // Whether table_ and group_of_ still hold for `tensors`.
  bool IsUnchanged(const std::vector<at::Tensor>& tensors) const;

  ModelSource* source_;
  FqnTable table_;
  std::vector<at::Tensor> tensors_;         // by slot
  std::vector<TensorIdentity> identities_;  // by slot
  std::vector<TensorValue> values_;         // by group
  absl::flat_hash_map<const c10::TensorImpl*, size_t> group_of_;
  absl::flat_hash_map<TensorIdentity, size_t> group_of_identity_;
  int64_t tables_built_ = 0;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_LIVE_MODEL_H_
