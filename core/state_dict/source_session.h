// SPDX-License-Identifier: Apache-2.0
//
// Get and set for any model and optimizers that are described by sources. The
// facade for torch::nn and torch::optim is dsd/frontends/torch/state_dict.h.

#ifndef DSD_CORE_STATE_DICT_SOURCE_SESSION_H_
#define DSD_CORE_STATE_DICT_SOURCE_SESSION_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/state_dict/deliver.h"
#include "dsd/core/state_dict/live_model.h"
#include "dsd/core/state_dict/mover.h"
#include "dsd/core/state_dict/optimizer_reader.h"
#include "dsd/core/state_dict/sources.h"
#include "dsd/core/state_dict/state_dict.h"
#include "dsd/core/transfer/transfer.h"

namespace dsd {

// What a session has done so far.
struct SessionStats {
  int64_t tables_built = 0;  // walks over the module tree for names
  int64_t plans_made = 0;    // not counting those that were used again
  TransferStats last_transfer;
};

// A model, its optimizers and the ranks they are sharded over, or no
// communicator: a world of one. Keeps names and plans between calls: a second
// call on an unchanged model makes neither again. Everything is borrowed and
// must outlive the session. Thread-compatible.
//
// Collective calls: a full get, and every set if there is a communicator; all
// ranks must make them in the same order. A get that is not full sends nothing.
//
// Errors of all calls: InvalidArgument for options that exclude each other;
// NotFound for an optimizer that has a tensor outside the model;
// FailedPrecondition if ranks disagree (options, keys, shapes, types), if a
// shard is gathered at the moment, or after a set that failed half-way; those
// of the communicator. Collective calls return the same verdict on every rank.
class SourceSession {
 public:
  // `usable`: what this rank found wrong on the way here, with which every call
  // then ends, on all ranks that it is collective for.
  SourceSession(ModelSource* model, std::vector<OptimizerSource*> optimizers,
                Communicator* comm, StateDictOptions options,
                absl::Status usable = absl::OkStatus())
      : usable_(std::move(usable)),
        optimizers_(std::move(optimizers)),
        options_(std::move(options)),
        mover_(comm),
        live_(model) {}

  // Values are aliases of live memory, except where the options ask for copies.
  // The optimizers are not changed: state that does not exist yet is returned
  // as it would be before the first step, in new tensors.
  absl::StatusOr<StateDict> GetModel(const CallOptions& call = {});
  absl::StatusOr<StateDict> GetOptimizer(const CallOptions& call = {});
  // Without optimizers the optimizer part is empty.
  absl::StatusOr<ModelAndOptimizerStateDict> Get(const CallOptions& call = {});

  // A full get in bounded memory: `visit` sees each value of what GetModel, or
  // Get, would return, in the same order, on the ranks that would receive it.
  // full_state_dict is taken to be set. Paths of StreamAll begin with "model"
  // or "optim". Collective. An error of `visit` is everybody's.
  absl::Status StreamModel(StreamVisitor visit,
                           const StreamOptions& stream = {},
                           const CallOptions& call = {});
  absl::Status StreamAll(StreamVisitor visit, const StreamOptions& stream = {},
                         const CallOptions& call = {});

  // Fills the live tensors, cast to their types, from whole or sharded values
  // of any layout and strides; a dict may alias the live tensors. Who has the
  // data is found out: ranks may give empty dicts, and receive then from the
  // others (which must have whole tensors) what they need. Everything is
  // checked before anything is changed: InvalidArgument lists all that does not
  // fit. The dict is not changed and nothing live aliases it afterwards. If an
  // error comes after the check (a rank died), live values are unspecified and
  // gets fail until a set succeeds; with `assign` and no optimizers nothing has
  // changed.
  absl::StatusOr<IncompatibleKeys> SetModel(const StateDict& model,
                                            const CallOptions& call = {});
  // Nested or flat form. Loaded hyperparameters override, others stay; loaded
  // state keeps its type. Parameters of other optimizers are ignored.
  absl::Status SetOptimizer(const StateDict& optimizer,
                            const CallOptions& call = {});
  // Both, as one: an error in one leaves the other unchanged too. An empty
  // model dict (on all ranks, or on source_rank), or no optimizers: that part
  // is left out.
  absl::StatusOr<IncompatibleKeys> Set(const StateDict& model,
                                       const StateDict& optimizer,
                                       const CallOptions& call = {});

  // Goes on over `comm`, in place of one that has failed. This rank has the
  // same number among as many ranks (InvalidArgument otherwise: a job that goes
  // on with others shards its model anew and makes a new session). Names and
  // plans are kept; after a set that failed half-way gets still wait for one
  // that succeeds. Sends nothing.
  absl::Status Rebind(Communicator* comm);

  SessionStats stats() const;

 private:
  // Which parts a call is about.
  struct Parts {
    bool model = false;
    bool optimizer = false;
  };

  // A set up to the point where all that is left is to move and to commit.
  struct Attempt;

  absl::Status CheckOptions(Parts parts) const;
  std::optional<int> SourceRank() const;
  absl::StatusOr<ModelAndOptimizerStateDict> GetParts(Parts parts,
                                                      const CallOptions& call);
  // For walks over the model beside one over the optimizers.
  int WalkThreads() const;
  absl::Status Describe(Parts parts, ModelAndOptimizerStateDict& out);
  // Null: the part is left out.
  absl::StatusOr<IncompatibleKeys> SetParts(absl::string_view what,
                                            const StateDict* model,
                                            const StateDict* optimizer,
                                            const CallOptions& call);
  std::unique_ptr<Attempt> TrySet(absl::string_view what,
                                  const absl::Status& local,
                                  const StateDict* model,
                                  const StateDict* optimizer,
                                  const StateDict* joint);
  // The same if ranks have different keys; `joint` above are those of all.
  absl::StatusOr<std::unique_ptr<Attempt>> JoinAndTry(
      absl::string_view what, bool contributes, bool may_skip_model,
      const StateDict* model, const StateDict* optimizer, StateDict& dicts,
      const CallClock& clock);
  absl::Status JoinIfRanksDiffer(const absl::Status& local,
                                 const CallClock& clock, StateDict& root) const;
  absl::Status StreamParts(Parts parts, StreamVisitor visit,
                           const StreamOptions& stream,
                           const CallOptions& call);

  absl::Status usable_;
  std::vector<OptimizerSource*> optimizers_;
  StateDictOptions options_;
  Mover mover_;
  LiveModel live_;
  // What the last get of the model gave, and of which version.
  StateDict model_dict_;
  int64_t model_version_ = 0;
  OptimizerReader optimizer_reader_;
  // Not OK: a set failed half-way.
  absl::Status poisoned_;
};

}  // namespace dsd

#endif  // DSD_CORE_STATE_DICT_SOURCE_SESSION_H_
