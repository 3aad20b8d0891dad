// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/stateful.h"

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
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

// Adds to what is wrong already; the first error's code counts.
void AddError(const absl::Status& error, absl::Status& all) {
  if (all.ok()) {
    all = error;
  } else if (!error.ok()) {
    all = absl::Status(all.code(),
                       absl::StrCat(all.message(), "; ", error.message()));
  }
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
  absl::Status local;
  DigestBuilder keys;
  absl::flat_hash_set<std::string> taken;
  for (const StatefulEntry& entry : entries) {
    keys.Add(entry.key).Add(static_cast<int64_t>(entry.scope));
    if (entry.object == nullptr) {
      AddError(absl::InvalidArgumentError(
                   absl::StrCat("\"", entry.key, "\": the object is null")),
               local);
    }
    const bool per_rank = entry.scope == StatefulEntry::kPerRank;
    for (int from = 0; from < (per_rank ? size : 1); ++from) {
      const std::string key = KeyOf(entry, from);
      if (root.contains(key) || !taken.insert(key).second) {
        AddError(absl::AlreadyExistsError(absl::StrCat(
                     "the dict has the key \"", key, "\" already")),
                 local);
      }
    }
  }
  // Before any object is asked, which may communicate itself.
  constexpr char kWhat[] = "get stateful objects";
  DSD_RETURN_IF_ERROR(Agree(
      comm, kWhat, keys.Finish(), local,
      [&] {
        return absl::StrCat(
            "keys ",
            absl::StrJoin(entries, ", ",
                          [](std::string* out, const StatefulEntry& entry) {
                            absl::StrAppend(out, "\"", entry.key, "\"",
                                            entry.scope == StatefulEntry::kJob
                                                ? " (of the job)"
                                                : "");
                          }));
      },
      call));
  StateDict mine;    // of this rank
  StateDict of_job;  // by key
  for (const StatefulEntry& entry : entries) {
    absl::StatusOr<StateDict> state =
        TorchToStatus([&] { return entry.object->GetState(); });
    AddError(Annotate(state.status(), absl::StrCat("\"", entry.key, "\"")),
             local);
    if (!state.ok()) continue;
    (entry.scope == StatefulEntry::kPerRank ? mine : of_job)
        .Set(entry.key, Value(*std::move(state)));
  }
  DSD_RETURN_IF_ERROR(Agree(
      comm, kWhat, Digest(), local, [] { return std::string(); }, call));
  std::vector<Value> all;
  for (int from = 0; from < size; ++from) {
    if (mine.empty() || size == 1) {
      all.push_back(Value(mine));
      continue;
    }
    DSD_ASSIGN_OR_RETURN(
        Value state, ShareOutline(from == rank ? Value(mine) : Value(), {from},
                                  *comm, call));
    // The same keys, by agreement.
    if (!state.is<StateDict>() ||
        state.get_if<StateDict>()->size() != mine.size()) {
      return absl::DataLossError(
          absl::StrCat("rank ", from, " sent other states than it said"));
    }
    all.push_back(std::move(state));
  }
  for (const StatefulEntry& entry : entries) {
    if (entry.scope == StatefulEntry::kJob) {
      root.Set(entry.key, std::move(*of_job.Find(entry.key)));
      continue;
    }
    for (int from = 0; from < size; ++from) {
      root.Set(KeyOf(entry, from),
               std::move(*all[from].get_if<StateDict>()->Find(entry.key)));
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
      AddError(absl::InvalidArgumentError(
                   absl::StrCat("\"", key, "\": the object is null")),
               local);
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
    AddError(Annotate(status, absl::StrCat("\"", key, "\"")), local);
    if (status.ok()) {
      states.emplace_back(&entry, std::move(*state.get_if<StateDict>()));
    }
  }
  if (strict && !missing.empty()) {
    AddError(absl::NotFoundError(absl::StrCat(
                 "the dict has no ", absl::StrJoin(missing, ", "),
                 "; set strict = false to leave these objects as they are")),
             local);
  }
  const auto agree = [&](const absl::Status& status) {
    return Agree(
        comm, "set stateful objects", Digest(), status,
        [] { return std::string(); }, call);
  };
  DSD_RETURN_IF_ERROR(agree(local));
  for (const auto& [entry, state] : states) {
    AddError(
        Annotate(TorchToStatus([&] { return entry->object->SetState(state); }),
                 absl::StrCat("\"", KeyOf(*entry, rank), "\"")),
        local);
  }
  return agree(local);
}

}  // namespace dsd
