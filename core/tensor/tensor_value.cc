// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/tensor/tensor_value.h"

#include <cstddef>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/local_view.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {

absl::StatusOr<TensorValue> TensorValue::Sharded(Sharding sharding,
                                                 at::Tensor local) {
  if (!local.defined()) {
    return absl::InvalidArgumentError(
        "sharded tensor: the local tensor is undefined");
  }
  DSD_RETURN_IF_ERROR(CheckLocalShape(sharding, ToDims(local.sizes())))
      << "sharded tensor";
  const c10::ScalarType type = local.scalar_type();
  return TensorValue(std::make_shared<const Distributed>(
      Distributed{std::move(sharding), type, {std::move(local)}}));
}

absl::StatusOr<TensorValue> TensorValue::FromBoxes(
    Sharding sharding, c10::ScalarType type, std::vector<at::Tensor> boxes) {
  if (sharding.layout.kind() != Layout::Kind::kBoxes) {
    return absl::InvalidArgumentError(
        absl::StrCat("layout ", sharding.layout.ToString(),
                     " is not made of boxes; use TensorValue::Sharded"));
  }
  const std::vector<LocalBox> expected =
      sharding.layout.BoxesOf(sharding.holder);
  if (expected.size() != boxes.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("holder ", sharding.holder, " has ", expected.size(),
                     " boxes of layout ", sharding.layout.ToString(),
                     ", found ", boxes.size(), " tensors"));
  }
  for (size_t i = 0; i < boxes.size(); ++i) {
    if (!boxes[i].defined() || boxes[i].scalar_type() != type ||
        ToDims(boxes[i].sizes()) != expected[i].box.extents()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "box ", expected[i].box.ToString(), " of holder ", sharding.holder,
          ": expected a ", c10::toString(type), " tensor of shape ",
          DimsToString(expected[i].box.extents()), ", found ",
          boxes[i].defined()
              ? absl::StrCat(c10::toString(boxes[i].scalar_type()), " ",
                             DimsToString(ToDims(boxes[i].sizes())))
              : "an undefined one"));
    }
  }
  return TensorValue(std::make_shared<const Distributed>(
      Distributed{std::move(sharding),
                  type,
                  {std::make_move_iterator(boxes.begin()),
                   std::make_move_iterator(boxes.end())}}));
}

TensorValue TensorValue::Elsewhere(Layout layout, c10::ScalarType type) {
  return TensorValue(std::make_shared<const Distributed>(
      Distributed{Sharding{std::move(layout), kAnyHolder}, type, {}}));
}

Dims TensorValue::shape() const {
  return is_plain() ? ToDims(plain_.sizes()) : layout().shape();
}

c10::ScalarType TensorValue::scalar_type() const {
  return is_plain() ? plain_.scalar_type() : distributed_->type;
}

absl::Span<const at::Tensor> TensorValue::locals() const {
  if (is_plain()) return absl::MakeConstSpan(&plain_, 1);
  return distributed_->locals;
}

absl::Status TensorValue::CheckIsOf(Holder self) const {
  if (is_plain() || locals().empty() || holder() == self) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(
      "the tensor is the shard of holder ", holder(), ", but this is rank ",
      self, "; use the communicator whose ranks it was sharded over"));
}

absl::StatusOr<at::Tensor> TensorValue::Local() const {
  const absl::Span<const at::Tensor> tensors = locals();
  if (tensors.size() != 1) {
    return absl::FailedPreconditionError(
        absl::StrCat("this rank holds ", tensors.size(), " tensors of layout ",
                     layout().ToString(), ", not one; use Parts()"));
  }
  return tensors[0];
}

absl::StatusOr<std::vector<TensorValue::Part>> TensorValue::Parts() const {
  std::vector<Part> parts;
  if (is_plain()) {
    if (!plain_.defined()) {
      return absl::InvalidArgumentError("the tensor is undefined");
    }
    parts.push_back({Box::Whole(shape()), plain_});
    return parts;
  }
  if (locals().empty()) return parts;
  const std::vector<LocalBox> boxes = layout().BoxesOf(holder());
  DSD_RETURN_IF_ERROR(TorchToStatus([&] {
    for (size_t i = 0; i < boxes.size(); ++i) {
      parts.push_back({boxes[i].box,
                       ViewOfBox(layout(), locals(), boxes, i, boxes[i].box)});
    }
  }));
  return parts;
}

}  // namespace dsd
