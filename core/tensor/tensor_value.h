// SPDX-License-Identifier: Apache-2.0
//
// The tensor leaf of a state dict: a plain tensor, or this rank's part of a
// distributed one (what DTensor is in Python).

#ifndef DSD_CORE_TENSOR_TENSOR_VALUE_H_
#define DSD_CORE_TENSOR_TENSOR_VALUE_H_

#include <memory>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/tensor/sharding_table.h"

namespace dsd {

// Cheap to copy; copies share the memory, as at::Tensor. Thread-compatible.
class TensorValue {
 public:
  // A box of the global tensor and the view of the memory that has it.
  struct Part {
    Box box;
    at::Tensor view;  // of the box's extents
  };

  // The whole tensor, the same on every rank that has it. Implicit, so that
  // plain tensors can be put into a StateDict as they are.
  TensorValue(at::Tensor tensor) : plain_(std::move(tensor)) {}  // NOLINT

  // A distributed tensor of which this rank has one local tensor, of a shape
  // that CheckLocalShape takes. InvalidArgument otherwise, or if undefined.
  static absl::StatusOr<TensorValue> Sharded(Sharding sharding,
                                             at::Tensor local);

  // A distributed tensor whose boxes on this rank are tensors of their own, in
  // the order of layout.BoxesOf(holder), of the boxes' extents and all of one
  // type. For layouts made of boxes.
  static absl::StatusOr<TensorValue> FromBoxes(Sharding sharding,
                                               c10::ScalarType type,
                                               std::vector<at::Tensor> boxes);

  // A distributed tensor of which this rank has nothing.
  static TensorValue Elsewhere(Layout layout, c10::ScalarType type);

  // Whether it is a plain tensor.
  bool is_plain() const { return distributed_ == nullptr; }

  // False only for a plain tensor that is undefined: it has no shape and type.
  bool defined() const { return !is_plain() || plain_.defined(); }

  // The global shape. Precondition: defined().
  Dims shape() const;
  c10::ScalarType scalar_type() const;

  // Precondition of the next two: !is_plain().
  const Layout& layout() const { return distributed_->sharding.layout; }
  // This rank's name in the layout; kAnyHolder if it has no part.
  Holder holder() const { return distributed_->sharding.holder; }

  // FailedPrecondition if the values here are the shard of another holder than
  // `self`, which is this rank.
  absl::Status CheckIsOf(Holder self) const;

  // Equal for copies of one TensorValue, and for plain ones of one at::Tensor.
  const void* id() const {
    return is_plain() ? static_cast<const void*>(plain_.unsafeGetTensorImpl())
                      : distributed_.get();
  }

  // The tensors that hold this rank's part: one for a plain tensor and for mesh
  // and flat layouts, one per box for box layouts, none if it has no part.
  absl::Span<const at::Tensor> locals() const;

  // The local tensor, if there is exactly one; FailedPrecondition otherwise.
  absl::StatusOr<at::Tensor> Local() const;

  // This rank's boxes with views of their memory; a plain tensor is one box.
  absl::StatusOr<std::vector<Part>> Parts() const;

 private:
  struct Distributed {
    Sharding sharding;
    c10::ScalarType type;
    absl::InlinedVector<at::Tensor, 1> locals;
  };

  explicit TensorValue(std::shared_ptr<const Distributed> distributed)
      : distributed_(std::move(distributed)) {}

  at::Tensor plain_;
  std::shared_ptr<const Distributed> distributed_;
};

}  // namespace dsd

#endif  // DSD_CORE_TENSOR_TENSOR_VALUE_H_
