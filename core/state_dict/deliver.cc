// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/deliver.h"

#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "ATen/ops/empty.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/mesh.h"
#include "dsd/core/tensor/tensor_endpoint.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/tensor/torch_types.h"

namespace dsd {
namespace {

// A tensor to move and all the leaves that want the result.
struct Item {
  std::vector<TensorValue*> leaves;
  std::optional<TensorValue> result;
};

class Delivery {
 public:
  Delivery(const StateDictOptions& options, const Mover& mover)
      : options_(options),
        mover_(mover),
        source_(mover.NewEndpoint()),
        target_(options.full_state_dict && options.cpu_offload
                    ? DeviceMesh::Iota({1}, RootHolder(mover))
                    : mover.replicas(),
                mover.self()) {}

  bool receives() const {
    return !options_.full_state_dict || !options_.cpu_offload ||
           mover_.rank() == 0;
  }

  absl::Status Collect(StateDict& root) {
    absl::Status status;
    absl::flat_hash_map<const void*, size_t> index;
    ForEachTensor(root, "", [&](const std::string& name, TensorValue& leaf) {
      if (!status.ok() || (!options_.full_state_dict && IsInHostMemory(leaf))) {
        return;
      }
      const auto [it, is_new] = index.try_emplace(leaf.id(), items_.size());
      if (is_new) {
        items_.emplace_back();
        status = Annotate(AddPair(name, leaf, items_.back()),
                          absl::StrCat("get \"", name, "\""));
      }
      items_[it->second].leaves.push_back(&leaf);
    });
    return status;
  }

  void Replace() {
    for (Item& item : items_) {
      if (!item.result.has_value()) continue;
      for (TensorValue* leaf : item.leaves) *leaf = *item.result;
    }
  }

  TensorEndpoint& source() { return source_; }
  TensorEndpoint& target() { return target_; }

 private:
  static bool IsInHostMemory(const TensorValue& value) {
    for (const at::Tensor& local : value.locals()) {
      if (local.defined() && !local.device().is_cpu()) return false;
    }
    return true;
  }

  c10::Device DeviceFor(const TensorValue& value) const {
    if (options_.cpu_offload || value.locals().empty()) return c10::kCPU;
    return value.locals()[0].device();
  }

  absl::Status AddPair(const std::string& name, const TensorValue& from,
                       Item& item) {
    DSD_RETURN_IF_ERROR(source_.Add(name, from));
    const c10::TensorOptions tensor_options =
        c10::TensorOptions(from.scalar_type()).device(DeviceFor(from));
    if (!options_.full_state_dict) {
      DSD_ASSIGN_OR_RETURN(item.result, OffloadTarget(from, tensor_options));
      return target_.Add(name, *item.result);
    }
    DSD_ASSIGN_OR_RETURN(Layout layout, target_.ReplicatedLayout(from.shape()));
    std::vector<at::Tensor> locals;
    if (receives()) {
      DSD_ASSIGN_OR_RETURN(at::Tensor whole, TorchToStatus([&] {
                             return at::empty(ToIntArrayRef(from.shape()),
                                              tensor_options);
                           }));
      item.result = TensorValue(whole);
      locals.push_back(std::move(whole));
    }
    DSD_ASSIGN_OR_RETURN(const DType dtype, ToDType(from.scalar_type()));
    return target_.Add(TensorSpec{name, dtype, std::move(layout)},
                       mover_.self(), std::move(locals));
  }

  static Holder RootHolder(const Mover& mover) {
    return mover.comm() == nullptr ? mover.self() : 0;
  }

  static absl::StatusOr<TensorValue> OffloadTarget(
      const TensorValue& from, const c10::TensorOptions& tensor_options) {
    std::vector<at::Tensor> locals;
    DSD_RETURN_IF_ERROR(TorchToStatus([&] {
      for (const at::Tensor& local : from.locals()) {
        locals.push_back(at::empty(local.sizes(), tensor_options));
      }
    }));
    if (from.is_plain()) return TensorValue(std::move(locals[0]));
    Sharding sharding{from.layout(), from.holder()};
    if (from.layout().kind() == Layout::Kind::kBoxes) {
      return TensorValue::FromBoxes(std::move(sharding), from.scalar_type(),
                                    std::move(locals));
    }
    return TensorValue::Sharded(std::move(sharding), std::move(locals[0]));
  }

  const StateDictOptions& options_;
  const Mover& mover_;
  TensorEndpoint source_;
  TensorEndpoint target_;
  std::vector<Item> items_;
};

}  // namespace

absl::Status Deliver(absl::Status local, const StateDictOptions& options,
                     Mover& mover, const CallClock& clock, StateDict& root) {
  if (!options.full_state_dict && !options.cpu_offload) return local;
  Delivery delivery(options, mover);
  if (local.ok()) local = delivery.Collect(root);
  if (!options.full_state_dict) {
    DSD_RETURN_IF_ERROR(local);
    DSD_RETURN_IF_ERROR(
        mover.MoveLocally(delivery.source(), delivery.target(), clock))
        << "copy the state to host memory";
    delivery.Replace();
    return absl::OkStatus();
  }
  DigestBuilder parameters;
  parameters.Add("get").Add(static_cast<int64_t>(options.cpu_offload));
  bool changed = false;
  DSD_RETURN_IF_ERROR(mover.Move("full get", delivery.source(),
                                 delivery.target(), parameters.Finish(), local,
                                 clock, &changed));
  if (!delivery.receives()) {
    root = StateDict();
    return absl::OkStatus();
  }
  delivery.Replace();
  return absl::OkStatus();
}

}  // namespace dsd
