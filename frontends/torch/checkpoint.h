// SPDX-License-Identifier: Apache-2.0
//
// State dicts to and from checkpoints that Python's
// torch.distributed.checkpoint opens and writes, and to and from safetensors
// and archives of torch.save.
//
//   dsd::StateDict state;
//   state.Set("model", dsd::Value(got.model));
//   state.Set("optim", dsd::Value(got.optimizer));
//   state.Set("step", dsd::Value(int64_t{500}));
//   auto report = dsd::SaveCheckpoint("/runs/7/step500", state, comm.get());

#ifndef DSD_FRONTENDS_TORCH_CHECKPOINT_H_
#define DSD_FRONTENDS_TORCH_CHECKPOINT_H_

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/state_dict/state_dict.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/export.h"

namespace dsd {

// Writes `state`, sharded as it is: each element once, whatever the number of
// ranks that have it. Collective: all ranks of `comm` (null: a world of one)
// call it with dicts of the same keys and layouts. Absent or complete. Errors:
// of checkpoint::Save, and of Flatten, the same verdict on every rank.
absl::StatusOr<checkpoint::SaveReport> SaveCheckpoint(
    const std::string& directory, const StateDict& state,
    Communicator* comm = nullptr, const checkpoint::SaveOptions& options = {});

// SaveCheckpoint in the background: returns when what this rank stores of
// `state` has been copied; training may go on. `saver.Wait()` says how it
// ended. Collective over the ranks of the saver. Errors: of Saver::Start, and
// of Flatten, the same verdict on every rank.
absl::Status StartCheckpoint(checkpoint::Saver& saver,
                             const std::string& directory,
                             const StateDict& state,
                             const checkpoint::SaveOptions& options = {});

// Writes whole tensors, of shards too, to files that others read: safetensors
// (tensors only), or an archive that torch.load reads, in which tied tensors
// are one. Collective, as SaveCheckpoint. Absent or complete. Errors: of
// checkpoint::Export, and of Flatten, the same verdict on every rank.
absl::StatusOr<checkpoint::SaveReport> ExportCheckpoint(
    const std::string& path, checkpoint::Format format, const StateDict& state,
    Communicator* comm = nullptr,
    const checkpoint::ExportOptions& options = {});

// Fills `*state` in place, as Python's dcp.load: its keys, layouts and types
// say what is wanted, on any number of ranks. Tensors are written where they
// lie (a dict got from a live model is an alias of it: then set it to tell the
// optimizers), objects are replaced. Collective, as SaveCheckpoint.
// Errors: of checkpoint::Load, and of Flatten, the same verdict on every rank.
absl::StatusOr<checkpoint::LoadReport> LoadCheckpoint(
    const std::string& directory, StateDict* state,
    Communicator* comm = nullptr, const checkpoint::LoadOptions& options = {});

struct ReadOptions {
  CallOptions call;
  // Which keys are read, the same on all ranks; empty: all.
  std::function<bool(absl::string_view key)> wanted;
  bool verify = true;  // as in LoadOptions
  Env* env = nullptr;  // as in SaveOptions
};

// What is in a checkpoint of any format, without a target: nested as it was
// saved, in new tensors in host memory, whole ones on every rank. Each stored
// byte is read once. Collective, as SaveCheckpoint. Errors: of
// checkpoint::Load; FailedPrecondition that names the tensors that cannot be
// read (quantized, sparse).
absl::StatusOr<StateDict> ReadCheckpoint(const std::string& path,
                                         Communicator* comm = nullptr,
                                         const ReadOptions& options = {});

// The content digests of a state dict: equal to those of a checkpoint that has
// the same values, whatever the layouts. Collective, as SaveCheckpoint.
absl::StatusOr<checkpoint::CheckpointDigests> ComputeDigests(
    const StateDict& state, Communicator* comm = nullptr,
    const CallOptions& options = {});

}  // namespace dsd

#endif  // DSD_FRONTENDS_TORCH_CHECKPOINT_H_
