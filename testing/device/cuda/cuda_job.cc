// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/device/cuda/cuda_job.h"

#include <cstdlib>
#include <utility>

#include "ATen/core/grad_mode.h"
#include "ATen/ops/arange.h"
#include "ATen/ops/equal.h"
#include "ATen/ops/ones_like.h"
#include "ATen/ops/zeros.h"
#include "absl/log/check.h"
#include "absl/strings/str_cat.h"
#include "c10/core/impl/VirtualGuardImpl.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/frontends/torch/state_dict.h"

// Of libtorch_cuda.so: keeps the current stream busy for so many cycles. Weak,
// so that the test also links without.
namespace at::cuda {
__attribute__((weak)) void sleep(int64_t cycles);
}  // namespace at::cuda

namespace dsd::test {

c10::Device DeviceUnderTest() {
  const char* const name = std::getenv("DSD_TEST_DEVICE");
  return c10::Device(name != nullptr ? name : "cuda:0");
}

bool OnCuda() { return DeviceUnderTest().is_cuda(); }

void KeepBusy(int64_t cycles) {
  if (OnCuda()) at::cuda::sleep(cycles);
}

OtherStream::OtherStream() {
  if (!OnCuda()) return;
  const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
  guard_.emplace(guard.getStreamFromGlobalPool(DeviceUnderTest()));
}

void Synchronize() {
  const c10::Device device = DeviceUnderTest();
  if (device.is_cuda()) {
    c10::impl::VirtualGuardImpl(device.type())
        .synchronizeDevice(device.index());
  }
}

at::Tensor KnownValues(const Dims& shape, double start) {
  int64_t elements = 1;
  for (const int64_t extent : shape) elements *= extent;
  return at::arange(elements, c10::kDouble)
      .mul_(0.37)
      .add_(start)
      .sin_()
      .to(c10::kFloat)
      .view(ToIntArrayRef(shape));
}

NetImpl::NetImpl(int64_t in, int64_t hidden)
    : columns(register_module("columns", torch::nn::Linear(in, hidden))),
      rows(register_module("rows", torch::nn::Linear(hidden, 7))),
      mask(register_buffer("mask", at::zeros({5}, c10::kBool))),
      count(register_buffer("count", at::zeros({}, c10::kLong))) {}

Job::Job(c10::Device where, Communicator* comm, int64_t in, int64_t hidden,
         double start)
    : device(where), net(std::make_shared<NetImpl>(in, hidden)) {
  const int ranks = comm == nullptr ? 1 : comm->size();
  const int rank = comm == nullptr ? 0 : comm->rank();
  const at::NoGradGuard no_grad;
  net->mask.copy_(KnownValues({5}, start).gt(0));
  net->count.fill_(41);
  net->to(device);
  // The values of the shard of a whole tensor of these values.
  const auto shard = [&](const Dims& shape, double from, int dim) {
    at::Tensor whole = KnownValues(shape, from);
    if (ranks == 1 || dim < 0) return whole;
    const Layout layout =
        *Layout::FromPlacements(shape, DeviceMesh::Iota({ranks}), {Shard(dim)});
    const std::vector<LocalBox> boxes = layout.BoxesOf(rank);
    const int64_t size = (*layout.LocalShape(rank))[dim];
    return whole.narrow(dim, boxes.empty() ? 0 : boxes[0].box.lo[dim], size)
        .contiguous();
  };
  std::vector<Dims> shapes;
  std::vector<int> dims;
  for (auto& item : net->named_parameters()) {
    at::Tensor& param = item.value();
    const Dims shape = ToDims(param.sizes());
    const int dim = item.key() == "columns.weight" ? 1
                    : item.key() == "rows.bias"    ? -1
                                                   : 0;
    shapes.push_back(shape);
    dims.push_back(dim);
    start += 1;
    param.set_data(shard(shape, start, dim).to(device));
    if (ranks > 1 && dim >= 0) {
      CHECK_OK(ShardingTable::Global().Set(
          param,
          *Layout::FromPlacements(shape, DeviceMesh::Iota({ranks}),
                                  {Shard(dim)}),
          rank));
    }
  }
  // AdamW's `step` is in host memory, its moments are beside the parameters.
  optimizer = std::make_unique<torch::optim::AdamW>(
      net->parameters(), torch::optim::AdamWOptions(0.01));
  for (at::Tensor& param : net->parameters()) {
    param.mutable_grad() = at::ones_like(param);
  }
  optimizer->step();
  optimizer->step();
  optimizer->zero_grad();
  start = 0;
  size_t i = 0;
  for (at::Tensor& param : net->parameters()) {
    auto& state = static_cast<torch::optim::AdamWParamState&>(
        *optimizer->state().at(param.unsafeGetTensorImpl()));
    start += 1;
    param.copy_(shard(shapes[i], start, dims[i]));
    state.exp_avg().copy_(shard(shapes[i], start + 0.25, dims[i]));
    state.exp_avg_sq().copy_(shard(shapes[i], start + 0.5, dims[i]));
    ++i;
  }
  for (const auto& [name, tensor] : Tensors()) {
    known.push_back({name, tensor.detach().cpu().clone()});
  }
}

std::vector<std::pair<std::string, at::Tensor>> Job::Tensors() const {
  std::vector<std::pair<std::string, at::Tensor>> all;
  for (const auto& item : net->named_parameters()) {
    all.emplace_back(item.key(), item.value());
    const auto& state = static_cast<const torch::optim::AdamWParamState&>(
        *optimizer->state().at(item.value().unsafeGetTensorImpl()));
    all.emplace_back(absl::StrCat(item.key(), ".exp_avg"), state.exp_avg());
    all.emplace_back(absl::StrCat(item.key(), ".exp_avg_sq"),
                     state.exp_avg_sq());
  }
  for (const auto& item : net->named_buffers()) {
    all.emplace_back(item.key(), item.value());
  }
  return all;
}

void Job::Spoil() {
  const at::NoGradGuard no_grad;
  for (auto& [name, tensor] : Tensors()) tensor.detach().zero_();
  for (auto& item : optimizer->state()) {
    static_cast<torch::optim::AdamWParamState&>(*item.second).step(77);
  }
}

absl::Status Job::Check() const {
  const auto tensors = Tensors();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& [name, tensor] = tensors[i];
    if (tensor.device() != device) {
      return absl::InternalError(
          absl::StrCat(name, " is on ", tensor.device().str()));
    }
    if (!at::equal(tensor.detach().cpu(), known[i].values)) {
      return absl::InternalError(absl::StrCat(name, " has other values"));
    }
  }
  for (const auto& item : optimizer->state()) {
    if (static_cast<torch::optim::AdamWParamState&>(*item.second).step() != 2) {
      return absl::InternalError("a step has another value");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<StateDict> Job::State(Communicator* comm,
                                     const StateDictOptions& options) {
  DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict got,
                       GetStateDict(*net, *optimizer, comm, options));
  StateDict state;
  if (got.model.empty() && got.optimizer.empty()) return state;
  state.Set("model", Value(std::move(got.model)));
  state.Set("optim", Value(std::move(got.optimizer)));
  return state;
}

absl::Status Job::Set(const StateDict& state, Communicator* comm,
                      const StateDictOptions& options) {
  const auto part = [&](const char* key) {
    const Value* const value = state.Find(key);
    return value == nullptr ? StateDict() : *value->get_if<StateDict>();
  };
  return SetStateDict(*net, *optimizer, part("model"), part("optim"), comm,
                      options)
      .status();
}

}  // namespace dsd::test
