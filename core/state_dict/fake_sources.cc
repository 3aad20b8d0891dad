// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/fake_sources.h"

#include <utility>
#include <vector>

#include "ATen/ops/arange.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/zeros_like.h"
#include "absl/log/check.h"
#include "absl/status/status.h"
#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/tensor_value.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd::test {

at::Tensor Numbers(const Dims& shape, double start, c10::ScalarType type) {
  const int64_t count = Box::Whole(shape).num_elements();
  return at::arange(start, start + static_cast<double>(count), c10::kDouble)
      .view(ToIntArrayRef(shape))
      .to(type);
}

at::Tensor ShardOf(const at::Tensor& whole, const Layout& layout,
                   Holder holder) {
  at::Tensor local = at::empty(ToIntArrayRef(*layout.LocalShape(holder)),
                               whole.options().requires_grad(false));
  const TensorValue value = *TensorValue::Sharded({layout, holder}, local);
  const std::vector<TensorValue::Part> parts = *value.Parts();
  for (const TensorValue::Part& part : parts) {
    at::Tensor piece = whole.detach();
    for (int d = 0; d < part.box.ndim(); ++d) {
      piece = piece.slice(d, part.box.lo[d], part.box.hi[d]);
    }
    part.view.copy_(piece);
  }
  return local;
}

void FakeModel::Add(std::string name, at::Tensor tensor, EntryKind kind) {
  tensors_.emplace_back(std::move(name), std::move(tensor));
  kinds_.push_back(kind);
}

at::Tensor FakeModel::AddShard(std::string name, const at::Tensor& whole,
                               const Layout& layout, Holder holder) {
  at::Tensor shard = ShardOf(whole, layout, holder);
  shard.requires_grad_(whole.requires_grad());
  CHECK_OK(ShardingTable::Global().Set(shard, layout, holder));
  Add(std::move(name), shard);
  return shard;
}

absl::Status FakeModel::ForEachTensor(
    absl::FunctionRef<void(const at::Tensor&)> visit) {
  for (const auto& [name, tensor] : tensors_) visit(tensor);
  return absl::OkStatus();
}

absl::StatusOr<ModuleNode> FakeModel::Describe() {
  ++describe_calls_;
  ModuleNode root;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    root.tensors.push_back(
        {tensors_[i].first, kinds_[i], IdentityOf(tensors_[i].second), i});
  }
  return root;
}

absl::Status FakeOptimizer::CheckHyperparameters(size_t /*group*/,
                                                 const ObjectDict& values,
                                                 bool /*strict*/) const {
  const Object* lr = values.Find("lr");
  if (lr != nullptr && !lr->is<double>()) {
    return absl::InvalidArgumentError("\"lr\": expected a number");
  }
  return absl::OkStatus();
}

absl::Status FakeOptimizer::SetHyperparameters(size_t group,
                                               const ObjectDict& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    groups[group].hyperparameters.Set(values.key(i), values.value(i));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<StateField>> FakeOptimizer::StateFields(
    const ObjectDict& /*hyperparameters*/) const {
  if (stateless) return std::vector<StateField>();
  return std::vector<StateField>{
      {"step", StateField::Shape::kCount, true},
      {"moment", StateField::Shape::kLikeParameter, true},
      {"history", StateField::Shape::kAny, false}};
}

absl::StatusOr<StateDict> FakeOptimizer::State(size_t group,
                                               size_t param) const {
  const auto it = state.find(groups[group].params[param].unsafeGetTensorImpl());
  return it == state.end() ? StateDict() : it->second;
}

absl::StatusOr<StateDict> FakeOptimizer::InertState(size_t group,
                                                    size_t param) const {
  StateDict inert;
  if (stateless) return inert;
  inert.Set("step", Value(0));
  inert.Set(
      "moment",
      Value(TensorValue(at::zeros_like(groups[group].params[param].detach()))));
  return inert;
}

absl::Status FakeOptimizer::SetState(size_t group, size_t param,
                                     StateDict new_state) {
  if (!set_state_error.ok()) return set_state_error;
  const void* key = groups[group].params[param].unsafeGetTensorImpl();
  if (new_state.empty()) {
    state.erase(key);
  } else {
    state[key] = std::move(new_state);
  }
  return absl::OkStatus();
}

}  // namespace dsd::test
