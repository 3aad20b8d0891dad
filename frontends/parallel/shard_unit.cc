// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/parallel/shard_unit.h"

#include <algorithm>
#include <cstddef>
#include <map>
#include <optional>
#include <utility>

#include "ATen/core/grad_mode.h"
#include "ATen/ops/_foreach_copy.h"
#include "ATen/ops/empty.h"
#include "ATen/ops/zeros.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "c10/core/DeviceGuard.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/layout/placement.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"
#include "torch/csrc/autograd/engine.h"
#include "torch/csrc/autograd/function.h"
#include "torch/csrc/autograd/functions/utils.h"
#include "torch/csrc/autograd/variable.h"

namespace dsd {
namespace internal {
namespace {

namespace autograd = torch::autograd;

// Types whose gradients can be summed.
std::optional<DType> GradientType(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

// The bytes of a tensor without gaps, in its memory.
at::Tensor BytesOf(const at::Tensor& tensor) {
  return tensor.view({-1}).view(at::kByte);
}

// Gives a tensor memory of any content, or with 0 frees it; what shares its
// storage follows.
void ResizeStorage(const at::Tensor& tensor, size_t bytes) {
  const c10::DeviceGuard guard(tensor.device());
  c10::StorageImpl& storage = *tensor.storage().unsafeGetStorageImpl();
  storage.set_data_ptr_noswap(storage.allocator()->allocate(bytes));
  storage.set_nbytes(bytes);
}

// Many copies of one device, enqueued as few.
class Copies {
 public:
  void Add(at::Tensor from, at::Tensor to) {
    if (from.numel() == 0) return;
    from_.push_back(std::move(from));
    to_.push_back(std::move(to));
  }
  void Run() {
    if (!from_.empty()) at::_foreach_copy_(to_, from_);
  }

 private:
  std::vector<at::Tensor> from_;
  std::vector<at::Tensor> to_;
};

}  // namespace

// Runs after all nodes that the call added: it was made before them.
class ShardUnit::InputNode : public autograd::Node {
 public:
  InputNode(std::shared_ptr<ShardUnit> unit, int64_t call)
      : unit_(std::move(unit)), call_(call) {}

  autograd::variable_list apply(autograd::variable_list&& gradients) override {
    unit_->InputNodeDone(call_);
    return std::move(gradients);
  }

 private:
  const std::shared_ptr<ShardUnit> unit_;
  const int64_t call_;
};

class ShardUnit::BackwardGuard {
 public:
  explicit BackwardGuard(std::shared_ptr<ShardUnit> unit)
      : unit_(std::move(unit)) {}
  BackwardGuard(const BackwardGuard&) = delete;
  BackwardGuard& operator=(const BackwardGuard&) = delete;
  ~BackwardGuard() {
    if (!finished_) unit_->AbandonBackward();
  }

  void Finish() {
    unit_->FinishBackward();
    finished_ = true;
  }

 private:
  const std::shared_ptr<ShardUnit> unit_;
  bool finished_ = false;
};

ShardUnit::Call::Call(std::shared_ptr<ShardUnit> unit)
    : unit_(std::move(unit)),
      recorded_(at::GradMode::is_enabled()),
      id_(unit_->next_call_++) {
  unit_->Unshard();
}

// Delegates, so that the destructor runs if the rest throws.
ShardUnit::Call::Call(std::shared_ptr<ShardUnit> unit,
                      absl::Span<at::Tensor* const> inputs)
    : Call(std::move(unit)) {
  if (!recorded_) return;
  std::vector<at::Tensor> reached;
  for (at::Tensor* input : inputs) {
    if (input->defined() && input->requires_grad()) reached.push_back(*input);
  }
  if (!reached.empty()) {
    const auto node = std::make_shared<InputNode>(unit_, id_);
    node->set_next_edges(autograd::collect_next_edges(reached));
    for (at::Tensor* input : inputs) {
      if (!input->defined() || !input->requires_grad()) continue;
      at::Tensor replacement = input->detach();
      autograd::set_history(replacement, node);
      *input = std::move(replacement);
    }
  }
  for (Slot& slot : unit_->slots_) {
    if (!slot.parameter.requires_grad() || slot.accumulator != nullptr) {
      continue;
    }
    slot.accumulator = autograd::impl::grad_accumulator(slot.parameter);
    if (c10::asIntArrayRefUnchecked(
            slot.accumulator->input_metadata(0).shape_as_dim_vector()) !=
        slot.full.sizes()) {
      slot.accumulator.reset();
      unit_->Fail(absl::StatusCode::kFailedPrecondition, slot,
                  "was used in autograd outside of forward(), where it is only "
                  "a shard");
    }
  }
  unit_->pending_calls_.insert(id_);
}

ShardUnit::Call::~Call() { unit_->Reshard(); }

void ShardUnit::Call::Finish(absl::Span<at::Tensor* const> outputs) {
  for (at::Tensor* output : outputs) {
    if (!output->defined()) continue;
    const bool hooked = recorded_ && output->requires_grad();
    const bool is_parameter =
        output->has_storage() &&
        std::any_of(unit_->slots_.begin(), unit_->slots_.end(),
                    [output](const Slot& slot) {
                      return slot.full.storage().is_alias_of(output->storage());
                    });
    // The hook of a view is lost when the view is modified in place.
    if (is_parameter || (hooked && output->is_view())) {
      *output = output->clone();
    }
    if (hooked) {
      output->register_hook([unit = unit_, call = id_](const at::TensorBase&) {
        unit->BeforeBackward(call);
      });
    }
  }
}

ShardUnit::ShardUnit(std::shared_ptr<FullyShardContext> context,
                     std::string type_name)
    : context_(std::move(context)), type_name_(std::move(type_name)) {}

int64_t ShardUnit::RowBegin(const Slot& slot, int rank) const {
  const int64_t world_size = context_->world_size();
  const int64_t chunk = (slot.rows + world_size - 1) / world_size;
  return std::min(rank * chunk, slot.rows);
}

int64_t ShardUnit::ShardElements(const Slot& slot, int rank) const {
  return (RowBegin(slot, rank + 1) - RowBegin(slot, rank)) * slot.row_elements;
}

at::Tensor ShardUnit::PartOf(const at::Tensor& whole, const Slot& slot,
                             int rank) const {
  return whole.view({-1}).narrow(0, RowBegin(slot, rank) * slot.row_elements,
                                 ShardElements(slot, rank));
}

Dims ShardUnit::ShardShape(const Slot& slot) const {
  Dims shape = ToDims(slot.full.sizes());
  shape[0] =
      RowBegin(slot, context_->rank() + 1) - RowBegin(slot, context_->rank());
  return shape;
}

std::string ShardUnit::Describe(const char* what) const {
  return absl::StrCat(what, " of FullyShard unit ", type_name_, " {",
                      absl::StrJoin(slots_, ", ",
                                    [](std::string* out, const Slot& slot) {
                                      out->append(slot.name);
                                    }),
                      "}");
}

void ShardUnit::Fail(absl::StatusCode code, const Slot& slot,
                     const std::string& text) const {
  throw StatusError(absl::Status(
      code,
      absl::StrCat("FullyShard of ", type_name_, ": parameter \"", slot.name,
                   "\" ", text, " (rank ", context_->rank(), ")")));
}

void ShardUnit::Add(const std::string& name, const at::Tensor& parameter) {
  if (!parameter.defined()) return;
  Slot slot;
  slot.name = name;
  slot.parameter = parameter;
  for (const Slot& other : slots_) {
    if (other.parameter.is_same(parameter)) return;
    if (parameter.has_storage() && parameter.numel() > 0 &&
        other.parameter.storage().is_alias_of(parameter.storage())) {
      Fail(absl::StatusCode::kInvalidArgument, slot,
           absl::StrCat("shares its storage with \"", other.name,
                        "\" but is another tensor: register one tensor under "
                        "both names"));
    }
  }
  if (ShardingTable::Global().Find(parameter).has_value()) {
    Fail(absl::StatusCode::kFailedPrecondition, slot,
         "is sharded already, by another unit or by your code: put all modules "
         "that use it into one unit");
  }
  if (parameter.layout() != at::kStrided ||
      !(parameter.is_cpu() || parameter.is_cuda())) {
    Fail(absl::StatusCode::kUnimplemented, slot,
         absl::StrCat("is on ", parameter.device().str(),
                      " or sparse; expected a dense tensor in host memory or "
                      "on CUDA"));
  }
  if (parameter.dim() == 0) {
    Fail(absl::StatusCode::kInvalidArgument, slot,
         "is a scalar and has no dimension to shard; give it the shape [1]");
  }
  if (parameter.is_floating_point() &&
      !GradientType(parameter.scalar_type()).has_value()) {
    Fail(absl::StatusCode::kUnimplemented, slot,
         absl::StrCat("has type ", c10::toString(parameter.scalar_type()),
                      "; expected float, double, half or bfloat16"));
  }
  if (parameter.is_complex()) {
    Fail(absl::StatusCode::kUnimplemented, slot,
         "is complex; register view_as_real of it");
  }
  slot.rows = parameter.size(0);
  slot.row_elements = 1;
  for (int64_t dim = 1; dim < parameter.dim(); ++dim) {
    slot.row_elements *= parameter.size(dim);
  }
  slot.bucketed = static_cast<int64_t>(parameter.nbytes()) <=
                  context_->options().bucket_bytes;
  slots_.push_back(std::move(slot));
}

void ShardUnit::Shard() {
  at::NoGradGuard no_grad;
  const int rank = context_->rank();
  const DeviceMesh mesh = DeviceMesh::Iota({context_->world_size()});
  for (Slot& slot : slots_) {
    const at::Tensor whole = slot.parameter.detach();
    absl::StatusOr<Layout> layout =
        Layout::FromPlacements(ToDims(whole.sizes()), mesh, {dsd::Shard(0)});
    if (!layout.ok()) throw StatusError(layout.status());
    const int64_t begin = RowBegin(slot, rank);
    slot.full = at::empty(whole.sizes(), whole.options());
    ResizeStorage(slot.full, 0);
    slot.parameter.set_data(
        whole.narrow(0, begin, RowBegin(slot, rank + 1) - begin)
            .clone(at::MemoryFormat::Contiguous));
    const absl::Status status =
        ShardingTable::Global().Set(slot.parameter, *std::move(layout), rank);
    if (!status.ok()) throw StatusError(status);
  }
}

void ShardUnit::Unshard() {
  if (unsharded_) return;
  at::NoGradGuard no_grad;
  std::vector<Slot*> bucket;
  for (Slot& slot : slots_) {
    // What the parameter is now, whoever replaced its data meanwhile.
    slot.shard = slot.parameter.variable_data();
    const Dims expected = ShardShape(slot);
    if (ToDims(slot.shard.sizes()) != expected ||
        slot.shard.scalar_type() != slot.full.scalar_type() ||
        slot.shard.device() != slot.full.device()) {
      Fail(absl::StatusCode::kFailedPrecondition, slot,
           absl::StrCat(
               "was replaced: expected this rank's shard of shape ",
               DimsToString(expected), " and type ",
               c10::toString(slot.full.scalar_type()), ", found ",
               DimsToString(ToDims(slot.shard.sizes())), " and ",
               c10::toString(slot.shard.scalar_type()),
               "; convert before wrapping, and set whole tensors through "
               "SetModelStateDict"));
    }
    slot.shard = slot.shard.contiguous();
  }
  // From here on Reshard undoes what was done, however far it came.
  unsharded_ = true;
  try {
    for (Slot& slot : slots_) {
      ResizeStorage(slot.full, slot.full.nbytes());
      if (slot.bucketed) {
        bucket.push_back(&slot);
      } else {
        GatherAlone(slot);
      }
    }
    GatherBucket(bucket);
    for (Slot& slot : slots_) slot.parameter.set_data(slot.full);
  } catch (...) {
    Reshard();
    throw;
  }
}

void ShardUnit::GatherAlone(Slot& slot) {
  std::vector<at::Tensor> parts;
  for (int rank = 0; rank < context_->world_size(); ++rank) {
    parts.push_back(PartOf(slot.full, slot, rank));
  }
  context_->AllGather(slot.shard.view({-1}), parts,
                      [this] { return Describe("gather"); });
}

void ShardUnit::GatherBucket(absl::Span<Slot* const> slots) {
  if (slots.empty()) return;
  const int world_size = context_->world_size();
  std::vector<int64_t> offsets = {0};  // of each rank's part
  for (int rank = 0; rank < world_size; ++rank) {
    int64_t bytes = 0;
    for (const Slot* slot : slots) {
      bytes += ShardElements(*slot, rank) * slot->full.element_size();
    }
    offsets.push_back(offsets.back() + bytes);
  }
  const at::Tensor staging =
      at::empty({offsets.back()}, slots[0]->full.options().dtype(at::kByte));
  std::vector<at::Tensor> parts;
  for (int rank = 0; rank < world_size; ++rank) {
    parts.push_back(
        staging.narrow(0, offsets[rank], offsets[rank + 1] - offsets[rank]));
  }
  // Calls fn(slot, bytes of `rank` in the message) for each slot.
  const auto for_each_part = [&](int rank, const auto& fn) {
    int64_t next = 0;
    for (const Slot* slot : slots) {
      const int64_t bytes =
          ShardElements(*slot, rank) * slot->full.element_size();
      fn(*slot, parts[rank].narrow(0, next, bytes));
      next += bytes;
    }
  };
  Copies in;
  for_each_part(context_->rank(),
                [&](const Slot& slot, const at::Tensor& bytes) {
                  in.Add(BytesOf(slot.shard), bytes);
                });
  in.Run();
  context_->AllGather(parts[context_->rank()], parts,
                      [this] { return Describe("gather"); });
  Copies out;
  for (int rank = 0; rank < world_size; ++rank) {
    for_each_part(rank, [&](const Slot& slot, const at::Tensor& bytes) {
      out.Add(bytes, BytesOf(PartOf(slot.full, slot, rank)));
    });
  }
  out.Run();
}

void ShardUnit::Reshard() noexcept {
  if (!unsharded_) return;
  at::NoGradGuard no_grad;
  for (Slot& slot : slots_) {
    slot.parameter.set_data(slot.shard);
    slot.shard.reset();
    ResizeStorage(slot.full, 0);
  }
  unsharded_ = false;
}

void ShardUnit::BeforeBackward(int64_t call) {
  if (at::GradMode::is_enabled()) {
    throw StatusError(absl::UnimplementedError(
        absl::StrCat(Describe("backward"),
                     ": create_graph is not supported, gradients of sharded "
                     "parameters cannot be differentiated")));
  }
  if (!in_backward_) {
    auto guard = std::make_shared<BackwardGuard>(shared_from_this());
    autograd::Engine::get_default_engine().queue_callback(
        [guard] { guard->Finish(); });
  }
  if (!in_backward_ || reduced_) {
    in_backward_ = true;
    reduced_ = false;
    for (Slot& slot : slots_) {
      slot.earlier_grad = slot.parameter.grad();
      slot.parameter.mutable_grad() = at::Tensor();
    }
  }
  entered_calls_.insert(call);
  Unshard();
}

void ShardUnit::InputNodeDone(int64_t call) {
  pending_calls_.erase(call);
  entered_calls_.erase(call);
  if (!entered_calls_.empty()) return;  // another one still reads parameters
  if (pending_calls_.empty()) ReduceGradients();
  Reshard();
}

void ShardUnit::ReduceGradients() {
  if (!in_backward_ || reduced_) return;
  at::NoGradGuard no_grad;
  // One message per type, in the order of the types' numbers.
  std::map<DType, std::vector<Slot*>> by_type;
  for (Slot& slot : slots_) {
    if (!slot.parameter.requires_grad()) continue;
    by_type[*GradientType(slot.full.scalar_type())].push_back(&slot);
    const at::Tensor& grad = slot.parameter.grad();
    if (grad.defined() &&
        (grad.layout() != at::kStrided || grad.sizes() != slot.full.sizes())) {
      Fail(absl::StatusCode::kUnimplemented, slot,
           absl::StrCat("has a gradient that is sparse or of another shape; "
                        "expected a dense one of shape ",
                        DimsToString(ToDims(slot.full.sizes()))));
    }
  }
  for (const auto& [dtype, slots] : by_type) ReduceBucket(dtype, slots);
  reduced_ = true;
}

// The message to each rank: for each slot whether there is a gradient at all (1
// or 0, so that the sum is 0 only if nobody has one), then the rows of the
// slots that share the message.
void ShardUnit::ReduceBucket(DType dtype, absl::Span<Slot* const> slots) {
  const int world_size = context_->world_size();
  const int64_t num_slots = slots.size();
  std::vector<int64_t> counts;
  int64_t total = 0;
  for (int rank = 0; rank < world_size; ++rank) {
    counts.push_back(num_slots);
    for (const Slot* slot : slots) {
      if (slot->bucketed) counts.back() += ShardElements(*slot, rank);
    }
    total += counts.back();
  }
  const at::TensorOptions options = slots[0]->full.options();
  const at::Tensor staging = at::zeros({total}, options);
  at::Tensor flags =
      at::zeros({num_slots}, options.device(at::kCPU).pinned_memory(false));
  std::vector<at::Tensor> gradients(num_slots);
  for (int64_t i = 0; i < num_slots; ++i) {
    const at::Tensor& grad = slots[i]->parameter.grad();
    if (!grad.defined()) continue;
    flags.select(0, i).fill_(1);
    if (slots[i]->bucketed) gradients[i] = grad.to(options).contiguous();
  }
  flags = flags.to(staging.device());
  Copies in;
  int64_t next = 0;
  for (int rank = 0; rank < world_size; ++rank) {
    in.Add(flags, staging.narrow(0, next, num_slots));
    next += num_slots;
    for (int64_t i = 0; i < num_slots; ++i) {
      if (!slots[i]->bucketed) continue;
      const int64_t elements = ShardElements(*slots[i], rank);
      if (gradients[i].defined()) {
        in.Add(PartOf(gradients[i], *slots[i], rank),
               staging.narrow(0, next, elements));
      }
      next += elements;
    }
  }
  in.Run();
  gradients.clear();
  const at::Tensor mine = at::empty({counts[context_->rank()]}, options);
  context_->ReduceScatterSum(staging, counts, mine, dtype,
                             [this] { return Describe("gradients"); });
  flags = mine.narrow(0, 0, num_slots).cpu();
  next = num_slots;
  for (int64_t i = 0; i < num_slots; ++i) {
    Slot& slot = *slots[i];
    const bool anybody_has_it = flags.select(0, i).item<double>() != 0;
    if (slot.bucketed) {
      const int64_t elements = ShardElements(slot, context_->rank());
      if (anybody_has_it) {
        SetShardGradient(slot, mine.narrow(0, next, elements)
                                   .view(ToIntArrayRef(ShardShape(slot)))
                                   .clone());
      }
      next += elements;
    } else if (anybody_has_it) {
      ReduceAlone(dtype, slot);
    }
    if (!anybody_has_it) {
      slot.parameter.mutable_grad() = std::exchange(slot.earlier_grad, {});
    }
  }
}

void ShardUnit::ReduceAlone(DType dtype, Slot& slot) {
  const at::TensorOptions options = slot.full.options();
  const at::Tensor grad = slot.parameter.grad().defined()
                              ? slot.parameter.grad().to(options).contiguous()
                              : at::zeros(slot.full.sizes(), options);
  slot.parameter.mutable_grad() = at::Tensor();
  std::vector<int64_t> counts;
  for (int rank = 0; rank < context_->world_size(); ++rank) {
    counts.push_back(ShardElements(slot, rank));
  }
  at::Tensor sum = at::empty(ToIntArrayRef(ShardShape(slot)), options);
  context_->ReduceScatterSum(grad.view({-1}), counts, sum.view({-1}), dtype,
                             [this] { return Describe("gradients"); });
  SetShardGradient(slot, std::move(sum));
}

// `sum` is no view: optimizers detach gradients in place.
void ShardUnit::SetShardGradient(Slot& slot, at::Tensor sum) {
  sum.mul_(1.0 / context_->world_size());
  if (slot.earlier_grad.defined()) {
    sum = std::exchange(slot.earlier_grad, {}).add_(sum);
  }
  slot.parameter.mutable_grad() = std::move(sum);
}

void ShardUnit::FinishBackward() {
  ReduceGradients();
  Reshard();
  EndBackward();
}

void ShardUnit::AbandonBackward() noexcept {
  Reshard();
  if (!reduced_) {
    for (Slot& slot : slots_) {
      slot.parameter.mutable_grad() = std::exchange(slot.earlier_grad, {});
    }
  }
  EndBackward();
}

void ShardUnit::EndBackward() noexcept {
  for (Slot& slot : slots_) slot.accumulator.reset();
  in_backward_ = false;
  reduced_ = false;
  pending_calls_.clear();
  entered_calls_.clear();
}

}  // namespace internal
}  // namespace dsd
