// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/torch/checkpoint.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/plan/catalog.h"
#include "dsd/core/state_dict/flat_state.h"
#include "dsd/core/tensor/tensor_endpoint.h"
#include "dsd/core/tensor/tensor_memory.h"
#include "dsd/core/tensor/tensor_value.h"
#include "dsd/core/tensor/torch_types.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/live_state.h"

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

// Whether this holder has elements of a tensor.
bool HasPart(const Layout& layout, Holder holder) {
  if (layout.kind() == Layout::Kind::kFlat) {
    return layout.IntervalOf(holder).has_value();
  }
  return !layout.BoxesOf(holder).empty();
}

// State::same_as: tensors of one type and layout that are the same memory on
// every rank that has a part of them.
absl::StatusOr<std::vector<size_t>> FindTies(const TensorEndpoint& tensors,
                                             Communicator* comm,
                                             const CallOptions& call) {
  std::vector<size_t> same_as = tensors.SameMemory();
  if (comm == nullptr || comm->size() == 1) return same_as;
  // Few are tied, so pairs are told: a tensor, and the first that it is.
  constexpr int64_t kMaxBytes = int64_t{1} << 30;
  std::vector<uint64_t> pairs;
  for (size_t i = 0; i < same_as.size(); ++i) {
    if (same_as[i] == i) continue;
    pairs.push_back(i);
    pairs.push_back(same_as[i]);
  }
  DSD_ASSIGN_OR_RETURN(
      const std::vector<std::string> all,
      comm->AllGatherBlobs({reinterpret_cast<const char*>(pairs.data()),
                            pairs.size() * sizeof(uint64_t)},
                           kMaxBytes, call));
  const Catalog& catalog = tensors.catalog();
  absl::btree_map<size_t, std::vector<int64_t>> firsts;  // by tensor; by rank
  for (int rank = 0; rank < comm->size(); ++rank) {
    pairs.resize(all[rank].size() / sizeof(uint64_t));
    std::memcpy(pairs.data(), all[rank].data(),
                pairs.size() * sizeof(uint64_t));
    for (size_t k = 0; k + 1 < pairs.size(); k += 2) {
      // Of another catalog; that is Export's to say.
      if (std::max(pairs[k], pairs[k + 1]) >= catalog.size()) continue;
      for (const size_t i : {pairs[k], pairs[k + 1]}) {
        const auto [it, is_new] = firsts.try_emplace(i, comm->size(), i);
        if (is_new) {
          for (int r = 0; r < comm->size(); ++r) {
            if (!HasPart(catalog[i].layout, r)) it->second[r] = -1;
          }
        }
      }
      firsts[pairs[k]][rank] = static_cast<int64_t>(pairs[k + 1]);
    }
  }
  std::iota(same_as.begin(), same_as.end(), 0);
  absl::flat_hash_map<Digest, size_t> seen;
  for (const auto& [i, first_on] : firsts) {
    const Digest key = DigestBuilder()
                           .Add(static_cast<int64_t>(catalog[i].dtype))
                           .Add(catalog[i].layout.symbols())
                           .Add(absl::MakeConstSpan(first_on))
                           .Finish();
    same_as[i] = seen.try_emplace(key, i).first->second;
  }
  return same_as;
}

// What a checkpoint has of `wanted`, to be filled by Load.
struct Everything {
  std::shared_ptr<const checkpoint::Checkpoint> checkpoint;
  TensorEndpoint endpoint;
  std::vector<TensorValue> tensors;
  checkpoint::State state;  // without `tensors`, which is `endpoint`
};

absl::StatusOr<Everything> MakeRoomFor(const std::string& path,
                                       Communicator* comm,
                                       const ReadOptions& options) {
  const auto wanted = [&](absl::string_view key) {
    return !options.wanted || options.wanted(key);
  };
  checkpoint::OpenOptions open;
  open.verify = options.verify;
  open.env = checkpoint::ChooseEnv(options.env, comm);
  const int size = comm == nullptr ? 1 : comm->size();
  Everything all{nullptr,
                 TensorEndpoint(DeviceMesh::Iota({size}),
                                comm == nullptr ? 0 : comm->rank()),
                 {},
                 {}};
  DSD_ASSIGN_OR_RETURN(all.checkpoint,
                       checkpoint::Checkpoint::Open(path, open));
  std::vector<std::string> unreadable;
  for (const auto& [key, kind] : all.checkpoint->unreadable()) {
    if (wanted(key)) unreadable.push_back(absl::StrCat(key, ": ", kind));
  }
  if (!unreadable.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "tensors cannot be read: ", absl::StrJoin(unreadable, ", "),
        "; do not want them"));
  }
  const Catalog& stored = all.checkpoint->catalog();
  for (size_t i = 0; i < stored.size(); ++i) {
    if (!wanted(stored[i].fqn)) continue;
    absl::StatusOr<at::Tensor> tensor =
        NewTensor(stored[i].shape(), ToScalarType(stored[i].dtype));
    DSD_RETURN_IF_ERROR(tensor) << "\"" << stored[i].fqn << "\"";
    all.tensors.emplace_back(*std::move(tensor));
    DSD_RETURN_IF_ERROR(all.endpoint.Add(stored[i].fqn, all.tensors.back()));
    all.state.tensor_paths.push_back(all.checkpoint->tensor_path(i));
  }
  for (const checkpoint::StoredObject& object : all.checkpoint->objects()) {
    if (wanted(object.key)) all.state.objects.push_back({object.path, {}});
  }
  for (const Path& empty : all.checkpoint->nesting().empty) {
    if (wanted(JoinPath(empty))) all.state.nesting.empty.push_back(empty);
  }
  all.state.nesting.number_keyed = all.checkpoint->nesting().number_keyed;
  all.state.nesting.tuples = all.checkpoint->nesting().tuples;
  return all;
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

absl::StatusOr<checkpoint::SaveReport> ExportCheckpoint(
    const std::string& path, checkpoint::Format format, const StateDict& state,
    Communicator* comm, const checkpoint::ExportOptions& options) {
  DSD_ASSIGN_OR_RETURN(FlatState flat,
                       FlattenTogether(absl::StrCat("export to \"", path, "\""),
                                       state, comm, options.call));
  checkpoint::State whole = ToState(flat);
  if (format == checkpoint::Format::kTorchArchive) {
    DSD_ASSIGN_OR_RETURN(whole.same_as,
                         FindTies(flat.tensors, comm, options.call));
    whole.nesting = NestingOf(Value(StateDict(state)));
  }
  return checkpoint::Export(path, format, whole, comm, options);
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

absl::StatusOr<StateDict> ReadCheckpoint(const std::string& path,
                                         Communicator* comm,
                                         const ReadOptions& options) {
  const std::string what = absl::StrCat("read \"", path, "\"");
  absl::StatusOr<Everything> all = MakeRoomFor(path, comm, options);
  DSD_RETURN_IF_ERROR(Agree(
      comm, what, Digest(), all.status(), [] { return std::string(); },
      options.call));
  checkpoint::LoadOptions load;
  load.call = options.call;
  load.allow_unexpected = static_cast<bool>(options.wanted);
  all->state.tensors = &all->endpoint;
  DSD_RETURN_IF_ERROR(
      checkpoint::Load(all->checkpoint, all->state, comm, load).status());

  Value root{StateDict()};
  for (size_t i = 0; i < all->tensors.size(); ++i) {
    DSD_RETURN_IF_ERROR(SetAtPath(root, all->state.tensor_paths[i],
                                  Value(std::move(all->tensors[i]))))
        << what;
  }
  for (const checkpoint::ObjectEntry& object : all->state.objects) {
    DSD_RETURN_IF_ERROR(SetAtPath(root, object.path, FromObject(object.value)))
        << what;
  }
  RestoreNesting(all->state.nesting, root);
  return std::move(*root.get_if<StateDict>());
}

absl::StatusOr<checkpoint::CheckpointDigests> ComputeDigests(
    const StateDict& state, Communicator* comm, const CallOptions& options) {
  DSD_ASSIGN_OR_RETURN(FlatState flat,
                       FlattenTogether("digest", state, comm, options));
  return checkpoint::ComputeDigests(ToState(flat), comm, options);
}

}  // namespace dsd
