// SPDX-License-Identifier: Apache-2.0
//
// State dicts of torch::nn modules and torch::optim optimizers, sharded or not,
// after torch.distributed.checkpoint.state_dict. The header most users include.
//
//   torch::optim::AdamW optimizer(model->parameters(), ...);
//   absl::StatusOr<dsd::ModelAndOptimizerStateDict> state =
//       dsd::GetStateDict(*model, optimizer, comm.get());
//   ...
//   absl::StatusOr<dsd::IncompatibleKeys> keys = dsd::SetStateDict(
//       *model, optimizer, state->model, state->optimizer, comm.get());
//
// A parameter is a shard if ShardingTable says so (FullyShard does it); all
// others are taken to be equal on all ranks. `comm` has the ranks that the
// model is sharded over; null: a world of one. What is collective and which
// errors there are: dsd/core/state_dict/source_session.h.

#ifndef DSD_FRONTENDS_TORCH_STATE_DICT_H_
#define DSD_FRONTENDS_TORCH_STATE_DICT_H_

#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/state_dict/deliver.h"
#include "dsd/core/state_dict/key_map.h"
#include "dsd/core/state_dict/source_session.h"
#include "dsd/core/state_dict/state_dict.h"

namespace torch::nn {
class Module;
}  // namespace torch::nn
namespace torch::optim {
class Optimizer;
}  // namespace torch::optim

namespace dsd {

// One optimizer or several, borrowed. Implicit, so that either can be passed.
class Optimizers {
 public:
  Optimizers() = default;
  Optimizers(torch::optim::Optimizer& one) : list_({&one}) {}  // NOLINT
  Optimizers(std::vector<torch::optim::Optimizer*> list)       // NOLINT
      : list_(std::move(list)) {}
  Optimizers(std::initializer_list<torch::optim::Optimizer*> list)  // NOLINT
      : list_(list) {}

  absl::Span<torch::optim::Optimizer* const> list() const { return list_; }

 private:
  std::vector<torch::optim::Optimizer*> list_;
};

// Get and set with names and plans kept between calls, for loops that save
// often. A model whose parameters were re-assigned, resized or sharded anew is
// noticed. Thread-compatible. Sessions that communicate from different threads
// at once, for instance one that saves in the background, need lanes of their
// own: give comm->OpenLane(name) as `comm`.
class StateDictSession {
 public:
  // Everything is borrowed and must outlive the session. NotFound if an
  // optimizer is of a class without a codec (see
  // dsd/frontends/optimizer/codec.h).
  static absl::StatusOr<std::unique_ptr<StateDictSession>> Create(
      torch::nn::Module& model, const Optimizers& optimizers = {},
      Communicator* comm = nullptr, const StateDictOptions& options = {});
  ~StateDictSession();

  absl::StatusOr<StateDict> GetModel(const CallOptions& call = {});
  absl::StatusOr<StateDict> GetOptimizer(const CallOptions& call = {});
  absl::StatusOr<ModelAndOptimizerStateDict> Get(const CallOptions& call = {});
  absl::Status StreamModel(StreamVisitor visit,
                           const StreamOptions& stream = {},
                           const CallOptions& call = {});
  absl::Status StreamAll(StreamVisitor visit, const StreamOptions& stream = {},
                         const CallOptions& call = {});
  absl::StatusOr<IncompatibleKeys> SetModel(const StateDict& model,
                                            const CallOptions& call = {});
  absl::Status SetOptimizer(const StateDict& optimizer,
                            const CallOptions& call = {});
  absl::StatusOr<IncompatibleKeys> Set(const StateDict& model,
                                       const StateDict& optimizer,
                                       const CallOptions& call = {});
  // Goes on over a communicator that takes the place of a failed one, with the
  // same rank and number of ranks, see SourceSession::Rebind. It is borrowed.
  absl::Status Rebind(Communicator* comm);
  SessionStats stats() const;

 private:
  struct Impl;
  explicit StateDictSession(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// The model's tensors by FQN.
absl::StatusOr<StateDict> GetModelStateDict(
    torch::nn::Module& model, Communicator* comm = nullptr,
    const StateDictOptions& options = {}, const CallOptions& call = {});

// The optimizers' state and groups by FQN, nested or flat. The optimizers are
// not changed; state that does not exist yet appears as before the first step.
absl::StatusOr<StateDict> GetOptimizerStateDict(
    torch::nn::Module& model, const Optimizers& optimizers,
    Communicator* comm = nullptr, const StateDictOptions& options = {},
    const CallOptions& call = {});

absl::StatusOr<ModelAndOptimizerStateDict> GetStateDict(
    torch::nn::Module& model, const Optimizers& optimizers,
    Communicator* comm = nullptr, const StateDictOptions& options = {},
    const CallOptions& call = {});

// A full get in bounded memory: `visit` sees one value after the other, in the
// order of GetModelStateDict, on the ranks that would receive it. See
// dsd/core/state_dict/deliver.h.
absl::Status StreamModelStateDict(torch::nn::Module& model, StreamVisitor visit,
                                  Communicator* comm = nullptr,
                                  const StateDictOptions& options = {},
                                  const StreamOptions& stream = {},
                                  const CallOptions& call = {});

// The same for both dicts; paths begin with "model" and "optim".
absl::Status StreamStateDict(torch::nn::Module& model,
                             const Optimizers& optimizers, StreamVisitor visit,
                             Communicator* comm = nullptr,
                             const StateDictOptions& options = {},
                             const StreamOptions& stream = {},
                             const CallOptions& call = {});

// Fills the model in place. Checked before anything changes.
absl::StatusOr<IncompatibleKeys> SetModelStateDict(
    torch::nn::Module& model, const StateDict& model_state_dict,
    Communicator* comm = nullptr, const StateDictOptions& options = {},
    const CallOptions& call = {});

absl::Status SetOptimizerStateDict(torch::nn::Module& model,
                                   const Optimizers& optimizers,
                                   const StateDict& optimizer_state_dict,
                                   Communicator* comm = nullptr,
                                   const StateDictOptions& options = {},
                                   const CallOptions& call = {});

// Both or neither. An empty model dict, or no optimizers: that part is left
// out.
absl::StatusOr<IncompatibleKeys> SetStateDict(
    torch::nn::Module& model, const Optimizers& optimizers,
    const StateDict& model_state_dict, const StateDict& optimizer_state_dict,
    Communicator* comm = nullptr, const StateDictOptions& options = {},
    const CallOptions& call = {});

}  // namespace dsd

#endif  // DSD_FRONTENDS_TORCH_STATE_DICT_H_
