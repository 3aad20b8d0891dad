// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/torch/state_dict.h"

#include <memory>
#include <utility>
#include <vector>

#include "absl/memory/memory.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/sources.h"
#include "dsd/frontends/module/module.h"
#include "dsd/frontends/optimizer/optimizer.h"

namespace dsd {
namespace {

// Optimizers that cannot be described are an error of all calls, which the
// other ranks learn of.
struct TorchSession {
  TorchSession(torch::nn::Module* module, const Optimizers& list,
               Communicator* comm, const StateDictOptions& options)
      : model(module, options.dsd_fqn_modifiers),
        status(AddSources(list, optimizers)),
        session(&model, Borrow(optimizers), comm, options, status) {}

  static absl::Status AddSources(
      const Optimizers& list,
      std::vector<std::unique_ptr<TorchOptimizerSource>>& sources) {
    for (torch::optim::Optimizer* optimizer : list.list()) {
      if (optimizer == nullptr) {
        return absl::InvalidArgumentError("one of the optimizers is null");
      }
      DSD_ASSIGN_OR_RETURN(std::unique_ptr<TorchOptimizerSource> source,
                           TorchOptimizerSource::Create(optimizer));
      sources.push_back(std::move(source));
    }
    return absl::OkStatus();
  }

  static std::vector<OptimizerSource*> Borrow(
      const std::vector<std::unique_ptr<TorchOptimizerSource>>& sources) {
    std::vector<OptimizerSource*> borrowed;
    for (const auto& source : sources) borrowed.push_back(source.get());
    return borrowed;
  }

  TorchModuleSource model;
  std::vector<std::unique_ptr<TorchOptimizerSource>> optimizers;
  absl::Status status;  // of the optimizers
  SourceSession session;
};

}  // namespace

struct StateDictSession::Impl : TorchSession {
  using TorchSession::TorchSession;
};

StateDictSession::StateDictSession(std::unique_ptr<Impl> impl)
    : impl_(std::move(impl)) {}

StateDictSession::~StateDictSession() = default;

absl::StatusOr<std::unique_ptr<StateDictSession>> StateDictSession::Create(
    torch::nn::Module& model, const Optimizers& optimizers, Communicator* comm,
    const StateDictOptions& options) {
  auto impl = std::make_unique<Impl>(&model, optimizers, comm, options);
  DSD_RETURN_IF_ERROR(impl->status);
  return absl::WrapUnique(new StateDictSession(std::move(impl)));
}

absl::StatusOr<StateDict> StateDictSession::GetModel(const CallOptions& call) {
  return impl_->session.GetModel(call);
}

absl::StatusOr<StateDict> StateDictSession::GetOptimizer(
    const CallOptions& call) {
  return impl_->session.GetOptimizer(call);
}

absl::StatusOr<ModelAndOptimizerStateDict> StateDictSession::Get(
    const CallOptions& call) {
  return impl_->session.Get(call);
}

absl::Status StateDictSession::StreamModel(StreamVisitor visit,
                                           const StreamOptions& stream,
                                           const CallOptions& call) {
  return impl_->session.StreamModel(visit, stream, call);
}

absl::Status StateDictSession::StreamAll(StreamVisitor visit,
                                         const StreamOptions& stream,
                                         const CallOptions& call) {
  return impl_->session.StreamAll(visit, stream, call);
}

absl::StatusOr<IncompatibleKeys> StateDictSession::SetModel(
    const StateDict& model, const CallOptions& call) {
  return impl_->session.SetModel(model, call);
}

absl::Status StateDictSession::SetOptimizer(const StateDict& optimizer,
                                            const CallOptions& call) {
  return impl_->session.SetOptimizer(optimizer, call);
}

absl::StatusOr<IncompatibleKeys> StateDictSession::Set(
    const StateDict& model, const StateDict& optimizer,
    const CallOptions& call) {
  return impl_->session.Set(model, optimizer, call);
}

absl::Status StateDictSession::Rebind(Communicator* comm) {
  return impl_->session.Rebind(comm);
}

SessionStats StateDictSession::stats() const { return impl_->session.stats(); }

absl::StatusOr<StateDict> GetModelStateDict(torch::nn::Module& model,
                                            Communicator* comm,
                                            const StateDictOptions& options,
                                            const CallOptions& call) {
  return TorchSession(&model, {}, comm, options).session.GetModel(call);
}

absl::StatusOr<StateDict> GetOptimizerStateDict(torch::nn::Module& model,
                                                const Optimizers& optimizers,
                                                Communicator* comm,
                                                const StateDictOptions& options,
                                                const CallOptions& call) {
  return TorchSession(&model, optimizers, comm, options)
      .session.GetOptimizer(call);
}

absl::StatusOr<ModelAndOptimizerStateDict> GetStateDict(
    torch::nn::Module& model, const Optimizers& optimizers, Communicator* comm,
    const StateDictOptions& options, const CallOptions& call) {
  return TorchSession(&model, optimizers, comm, options).session.Get(call);
}

absl::Status StreamModelStateDict(torch::nn::Module& model, StreamVisitor visit,
                                  Communicator* comm,
                                  const StateDictOptions& options,
                                  const StreamOptions& stream,
                                  const CallOptions& call) {
  return TorchSession(&model, {}, comm, options)
      .session.StreamModel(visit, stream, call);
}

absl::Status StreamStateDict(torch::nn::Module& model,
                             const Optimizers& optimizers, StreamVisitor visit,
                             Communicator* comm,
                             const StateDictOptions& options,
                             const StreamOptions& stream,
                             const CallOptions& call) {
  return TorchSession(&model, optimizers, comm, options)
      .session.StreamAll(visit, stream, call);
}

absl::StatusOr<IncompatibleKeys> SetModelStateDict(
    torch::nn::Module& model, const StateDict& model_state_dict,
    Communicator* comm, const StateDictOptions& options,
    const CallOptions& call) {
  return TorchSession(&model, {}, comm, options)
      .session.SetModel(model_state_dict, call);
}

absl::Status SetOptimizerStateDict(torch::nn::Module& model,
                                   const Optimizers& optimizers,
                                   const StateDict& optimizer_state_dict,
                                   Communicator* comm,
                                   const StateDictOptions& options,
                                   const CallOptions& call) {
  return TorchSession(&model, optimizers, comm, options)
      .session.SetOptimizer(optimizer_state_dict, call);
}

absl::StatusOr<IncompatibleKeys> SetStateDict(
    torch::nn::Module& model, const Optimizers& optimizers,
    const StateDict& model_state_dict, const StateDict& optimizer_state_dict,
    Communicator* comm, const StateDictOptions& options,
    const CallOptions& call) {
  return TorchSession(&model, optimizers, comm, options)
      .session.Set(model_state_dict, optimizer_state_dict, call);
}

}  // namespace dsd
