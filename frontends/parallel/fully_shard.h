// SPDX-License-Identifier: Apache-2.0
//
// Fully sharded data parallel training, after torch.distributed.fsdp: between
// its calls a unit keeps only this rank's rows of each parameter; forward() and
// backward() gather them, and gradients are averaged and cut again.
//
//   struct NetImpl : torch::nn::Module {
//     explicit NetImpl(std::shared_ptr<dsd::FullyShardContext> context)
//         : fc1(register_module("fc1", dsd::MakeFullyShard(
//                                          torch::nn::Linear(64, 128),
//                                          context))),
//           fc2(register_module("fc2", dsd::MakeFullyShard(
//                                          torch::nn::Linear(128, 10),
//                                          context))) {}
//     at::Tensor forward(at::Tensor x) {
//       return fc2->forward(fc1->forward(x).relu());
//     }
//     std::shared_ptr<dsd::FullyShard<torch::nn::LinearImpl>> fc1, fc2;
//   };
//   auto context = std::make_shared<dsd::FullyShardContext>(comm.get());
//   auto net =
//       dsd::MakeFullyShard(std::make_shared<NetImpl>(context), context);
//   torch::optim::AdamW optimizer(net->parameters());
//
// Modules must be wrapped when they are built: a typed member of a finished
// module cannot be replaced from outside. Wrap inner modules first; a unit has
// the parameters below it that no inner unit has.

#ifndef DSD_FRONTENDS_PARALLEL_FULLY_SHARD_H_
#define DSD_FRONTENDS_PARALLEL_FULLY_SHARD_H_

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/fqn/module_wrapper.h"
#include "dsd/frontends/parallel/fully_shard_context.h"
#include "dsd/frontends/parallel/shard_unit.h"
#include "dsd/frontends/parallel/tensor_visitor.h"
#include "torch/nn/module.h"
#include "torch/nn/pimpl.h"

namespace dsd {

// The part of a unit that does not depend on the type of the wrapped module.
class FullyShardBase : public torch::nn::Module, public ModuleWrapper {
 public:
  absl::string_view wrapped_child_name() const override { return kFsdpSegment; }

 protected:
  // Shards the parameters of `inner`, apart from those of units inside it.
  FullyShardBase(std::shared_ptr<torch::nn::Module> inner,
                 std::shared_ptr<FullyShardContext> context);

  template <class Inner, class... Args>
  auto Call(Inner& inner, Args... args) {
    using Result = decltype(inner.forward(std::move(args)...));
    static_assert(internal::kIsTransparent<Result>,
                  "forward() must return tensors, or optionals, tuples, pairs "
                  "and containers of tensors and numbers: a tensor hidden in "
                  "another type would not be seen by backward()");
    std::vector<at::Tensor*> tensors;
    const auto collect = [&tensors](at::Tensor& t) { tensors.push_back(&t); };
    (internal::VisitTensors(args, collect), ...);
    internal::ShardUnit::Call call(unit_, tensors);
    std::decay_t<Result> result = inner.forward(std::move(args)...);
    tensors.clear();
    internal::VisitTensors(result, collect);
    call.Finish(tensors);
    return result;
  }

 private:
  const std::shared_ptr<internal::ShardUnit> unit_;
};

// A unit around a module of type M.
//
// Outside forward() and backward() each parameter *is* this rank's shard, a
// leaf with the TensorImpl it always had: rows [r * c, (r + 1) * c) of
// dimension 0, c = ceil(rows / world size), cut at the end (torch.chunk's rule;
// trailing shards may be short or empty). It is registered in
// ShardingTable::Global(). Its .grad has the same shape: the sum of all ranks'
// gradients in rank order times 1 / world size, added to what was there. State
// dicts, checkpoints, clip_grad_value_ and optimizers that treat each element
// by itself (all of torch::optim but LBFGS) work on it as it is. What takes
// norms or products of whole tensors does not: it would see this rank's rows
// and give each rank another result. For clip_grad_norm_ there is ClipGradNorm
// (clip_grad_norm.h); LBFGS must not be used.
//
// Collective: all ranks of the context's communicator must build units from
// equal modules (same parameters and values: seed the generator equally) and
// call the same units in the same order, with or without gradients alike.
// Parameters within a unit may go without a gradient on some ranks.
//
// Errors of collectives leave forward() and backward() as StatusError, and
// FullyShardContext::status() keeps the first. After any exception the
// parameters are shards again; gradients are then unspecified: clear them.
// Constructors throw StatusError: InvalidArgument (no module or no context;
// scalar parameter; two parameters on one storage), FailedPrecondition (a
// parameter that another unit has: tied parameters need one unit around all
// their uses), Unimplemented (neither in host memory nor on CUDA; a type that
// has no ReduceScatter).
//
// On CUDA, gathers and sums go from and to the memory of the device over a
// backend that moves it (nccl), else through page-locked memory; gradients have
// the same bits either way.
//
// Limits: parameters may be used in autograd only inside forward(); no
// create_graph, no sparse gradients; dtype and device stay as they are when
// wrapped. One thread uses a unit at a time.
//
// M's forward() may have any arguments that can be copied or moved; its default
// arguments go on working. Inputs that backward() is to reach must not hide in
// types that are opaque (see result types in Call).
//
// M: the impl class ("LinearImpl"). Signature: `auto` forward (void), or a
// fixed one such as at::Tensor(at::Tensor), which Sequential and AnyModule
// need.
template <class M, class Signature = void>
class FullyShard;

template <class M>
class FullyShard<M, void> : public FullyShardBase {
 public:
  FullyShard(std::shared_ptr<M> inner,
             std::shared_ptr<FullyShardContext> context)
      : FullyShardBase(inner, std::move(context)), inner_(std::move(inner)) {}

  template <class... Args>
  auto forward(Args... args) {
    return this->Call(*inner_, std::move(args)...);
  }

  // The wrapped module. Calling its forward() directly bypasses the unit.
  const std::shared_ptr<M>& inner() const { return inner_; }

 private:
  const std::shared_ptr<M> inner_;
};

template <class M, class Result, class... Args>
class FullyShard<M, Result(Args...)> : public FullyShardBase {
 public:
  FullyShard(std::shared_ptr<M> inner,
             std::shared_ptr<FullyShardContext> context)
      : FullyShardBase(inner, std::move(context)), inner_(std::move(inner)) {}

  Result forward(Args... args) {
    return this->Call(*inner_, std::move(args)...);
  }

  const std::shared_ptr<M>& inner() const { return inner_; }

 private:
  const std::shared_ptr<M> inner_;
};

// MakeFullyShard(torch::nn::Linear(64, 10), context), and for Sequential
// MakeFullyShard<at::Tensor(at::Tensor)>(torch::nn::Linear(64, 10), context).
template <class Signature = void, class M>
std::shared_ptr<FullyShard<M, Signature>> MakeFullyShard(
    std::shared_ptr<M> inner, std::shared_ptr<FullyShardContext> context) {
  return std::make_shared<FullyShard<M, Signature>>(std::move(inner),
                                                    std::move(context));
}

template <class Signature = void, class M>
std::shared_ptr<FullyShard<M, Signature>> MakeFullyShard(
    const torch::nn::ModuleHolder<M>& inner,
    std::shared_ptr<FullyShardContext> context) {
  return MakeFullyShard<Signature, M>(
      inner.is_empty() ? std::shared_ptr<M>() : inner.ptr(),
      std::move(context));
}

}  // namespace dsd

#endif  // DSD_FRONTENDS_PARALLEL_FULLY_SHARD_H_
