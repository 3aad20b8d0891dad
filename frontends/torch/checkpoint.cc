// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/torch/checkpoint.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/flat_state.h"
#include "dsd/core/transfer/transfer.h"

namespace dsd {
namespace {

// A dict that cannot be flattened on one rank is an error on all: the others
// would wait for that rank.
absl::StatusOr<FlatState> FlattenTogether(absl::string_view what,
                                          const StateDict& dict,
                                          Communicator* comm,
                                          const CallOptions& call) {
  absl::StatusOr<FlatState> flat = Flatten(dict, comm);
  DSD_RETURN_IF_ERROR(Agree(
      comm, what, Digest(), flat.status(), [] { return std::string(); }, call));
  return flat;
}

checkpoint::State ToState(FlatState& flat) {
  checkpoint::State state;
  state.tensors = &flat.tensors;
  state.tensor_paths = std::move(flat.tensor_paths);
  for (FlatState::ObjectEntry& entry : flat.objects) {
    state.objects.push_back({std::move(entry.path), std::move(entry.value)});
  }
  return state;
}

}  // namespace

absl::StatusOr<checkpoint::SaveReport> SaveCheckpoint(
    const std::string& directory, const StateDict& state, Communicator* comm,
    const checkpoint::SaveOptions& options) {
  DSD_ASSIGN_OR_RETURN(FlatState flat,
                       FlattenTogether(absl::StrCat("save \"", directory, "\""),
                                       state, comm, options.call));
  return checkpoint::Save(directory, ToState(flat), comm, options);
}

absl::Status StartCheckpoint(checkpoint::Saver& saver,
                             const std::string& directory,
                             const StateDict& state,
                             const checkpoint::SaveOptions& options) {
  // The saver's lane is free for this once an earlier save has ended; how that
  // ended is Start's to tell.
  DSD_RETURN_IF_ERROR(saver.AwaitEnd(options.call));
  DSD_ASSIGN_OR_RETURN(FlatState flat,
                       FlattenTogether(absl::StrCat("save \"", directory, "\""),
                                       state, saver.comm(), options.call));
  return saver.Start(directory, ToState(flat), options);
}

absl::StatusOr<checkpoint::LoadReport> LoadCheckpoint(
    const std::string& directory, StateDict* state, Communicator* comm,
    const checkpoint::LoadOptions& options) {
  DSD_ASSIGN_OR_RETURN(FlatState flat,
                       FlattenTogether(absl::StrCat("load \"", directory, "\""),
                                       *state, comm, options.call));
  checkpoint::State target = ToState(flat);
  DSD_ASSIGN_OR_RETURN(checkpoint::LoadReport report,
                       checkpoint::Load(directory, target, comm, options));
  std::vector<FlatState::ObjectEntry> objects;
  for (checkpoint::ObjectEntry& entry : target.objects) {
    objects.push_back({std::move(entry.path), std::move(entry.value)});
  }
  DSD_RETURN_IF_ERROR(PutObjects(objects, *state));
  return report;
}

absl::StatusOr<checkpoint::CheckpointDigests> ComputeDigests(
    const StateDict& state, Communicator* comm, const CallOptions& options) {
  DSD_ASSIGN_OR_RETURN(FlatState flat,
                       FlattenTogether("digest", state, comm, options));
  return checkpoint::ComputeDigests(ToState(flat), comm, options);
}

}  // namespace dsd
