// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/stateful.h"

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/state_dict/outline.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/transfer/transfer.h"

namespace dsd {
namespace {

std::string KeyOf(const StatefulEntry& entry, int rank) {
  return entry.scope == StatefulEntry::kJob
             ? entry.key
             : absl::StrCat(entry.key, "@rank", rank);
}

absl::Status AddNew(const std::string& key, Value value, StateDict& root) {
  if (root.contains(key)) {
    return absl::AlreadyExistsError(
        absl::StrCat("the dict has the key \"", key, "\" already"));
  }
  root.Set(key, std::move(value));
  return absl::OkStatus();
}

// Plain tensors in memory of their own.
absl::Status MakePlain(Value& value) {
  absl::Status status;
  ForEachTensor(value, "", [&](const std::string& path, TensorValue& tensor) {
    if (!status.ok()) return;
    absl::StatusOr<at::Tensor> local = tensor.Local();
    if (local.ok()) {
      local = TorchToStatus([&] { return local->detach().clone(); });
    }
    if (local.ok()) {
      tensor = TensorValue(*std::move(local));
    } else {
      status = Annotate(local.status(), absl::StrCat("\"", path, "\""));
    }
  });
  return status;
}

}  // namespace

absl::Status GetStateful(absl::Span<const StatefulEntry> entries,
                         Communicator* comm, StateDict& root,
                         const CallOptions& call) {
  const int rank = comm == nullptr ? 0 : comm->rank();
  const int size = comm == nullptr ? 1 : comm->size();
  const auto get = [&](const StatefulEntry& entry) -> absl::StatusOr<Value> {
    if (entry.object == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", entry.key, "\": the object is null"));
    }
    absl::StatusOr<StateDict> state =
        TorchToStatus([&] { return entry.object->GetState(); });
    DSD_RETURN_IF_ERROR(state) << "\"" << entry.key << "\"";
    return Value(*std::move(state));
  };
  StateDict mine;
  absl::Status local;
  bool per_rank = false;
  std::vector<Value> of_job;
  for (const StatefulEntry& entry : entries) {
    absl::StatusOr<Value> state = get(entry);
    local.Update(state.status());
    if (!state.ok()) continue;
    if (entry.scope == StatefulEntry::kPerRank) {
      per_rank = true;
      mine.Set(entry.key, *std::move(state));
    } else {
      of_job.push_back(*std::move(state));
    }
  }
  for (const StatefulEntry& entry : entries) {
    per_rank |= entry.scope == StatefulEntry::kPerRank;
  }
  std::vector<Value> all = {Value(mine)};
  if (per_rank && size > 1) {
    DigestBuilder keys;
    for (const StatefulEntry& entry : entries) {
      keys.Add(entry.key).Add(static_cast<int64_t>(entry.scope));
    }
    DSD_RETURN_IF_ERROR(Agree(
        comm, "get stateful objects", keys.Finish(), local,
        [&] {
          return absl::StrCat(
              "keys ",
              absl::StrJoin(entries, ", ",
                            [](std::string* out, const StatefulEntry& entry) {
                              absl::StrAppend(out, "\"", entry.key, "\"");
                            }));
        },
        call));
    all.clear();
    for (int from = 0; from < size; ++from) {
      DSD_ASSIGN_OR_RETURN(Value state,
                           ShareOutline(from == rank ? Value(mine) : Value(),
                                        {from}, *comm, call));
      all.push_back(std::move(state));
    }
  }
  DSD_RETURN_IF_ERROR(local);
  size_t next_of_job = 0;
  for (const StatefulEntry& entry : entries) {
    if (entry.scope == StatefulEntry::kJob) {
      DSD_RETURN_IF_ERROR(
          AddNew(entry.key, std::move(of_job[next_of_job++]), root));
      continue;
    }
    for (int from = 0; from < size; ++from) {
      auto* states = all[from].get_if<StateDict>();
      Value* state = states == nullptr ? nullptr : states->Find(entry.key);
      if (state == nullptr) {
        return absl::DataLossError(
            absl::StrCat("rank ", from, " sent no state \"", entry.key, "\""));
      }
      DSD_RETURN_IF_ERROR(AddNew(KeyOf(entry, from), *state, root));
    }
  }
  return absl::OkStatus();
}

absl::Status SetStateful(absl::Span<const StatefulEntry> entries,
                         const StateDict& root, Communicator* comm, bool strict,
                         const CallOptions& call) {
  const int rank = comm == nullptr ? 0 : comm->rank();
  std::vector<std::string> missing;
  std::vector<std::pair<const StatefulEntry*, StateDict>> states;
  absl::Status local;
  for (const StatefulEntry& entry : entries) {
    const std::string key = KeyOf(entry, rank);
    if (entry.object == nullptr) {
      local.Update(absl::InvalidArgumentError(
          absl::StrCat("\"", key, "\": the object is null")));
      continue;
    }
    const Value* found = root.Find(key);
    if (found == nullptr) {
      missing.push_back(absl::StrCat("\"", key, "\""));
      continue;
    }
    Value state = *found;
    absl::Status status = MakePlain(state);
    if (status.ok() && !state.is<StateDict>()) {
      status = absl::InvalidArgumentError(
          absl::StrCat("expected a dict, found ", state.kind_name()));
    }
    local.Update(Annotate(status, absl::StrCat("\"", key, "\"")));
    if (status.ok()) {
      states.emplace_back(&entry, std::move(*state.get_if<StateDict>()));
    }
  }
  if (local.ok() && strict && !missing.empty()) {
    local = absl::NotFoundError(absl::StrCat(
        "the dict has no ", absl::StrJoin(missing, ", "),
        "; set strict = false to leave these objects as they are"));
  }
  const auto agree = [&](const absl::Status& status) {
    return Agree(
        comm, "set stateful objects", Digest(), status,
        [] { return std::string(); }, call);
  };
  DSD_RETURN_IF_ERROR(agree(local));
  for (const auto& [entry, state] : states) {
    local.Update(
        Annotate(TorchToStatus([&] { return entry->object->SetState(state); }),
                 absl::StrCat("\"", KeyOf(*entry, rank), "\"")));
  }
  return agree(local);
}

}  // namespace dsd
