// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/dcp/metadata.h"

namespace dsd::dcp {
namespace {

struct Part {
  size_t rank;
  const TensorEntry* entry;
};

}  // namespace

absl::StatusOr<Metadata> MergeRankLocal(
    absl::Span<const Metadata> ranks,
    absl::FunctionRef<absl::StatusOr<bool>(absl::Span<const RankObject>)>
        are_equal) {
  Metadata out;
  if (ranks.empty()) return out;
  out.save_id = ranks[0].save_id;
  out.version = ranks[0].version;
  absl::flat_hash_map<std::string, uint32_t> files;
  const auto place = [&](size_t rank, ItemLocation location) {
    const std::string& name = ranks[rank].files[location.file];
    const auto [it, is_new] =
        files.try_emplace(name, static_cast<uint32_t>(out.files.size()));
    if (is_new) out.files.push_back(name);
    location.file = it->second;
    return location;
  };

  // Keys in the order in which ranks first have them.
  std::vector<std::vector<Part>> tensors;
  std::vector<std::vector<RankObject>> objects;
  absl::flat_hash_map<absl::string_view, size_t> tensor_at, object_at;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    for (const TensorEntry& entry : ranks[rank].tensors) {
      const auto [it, is_new] =
          tensor_at.try_emplace(entry.key, tensors.size());
      if (is_new) tensors.emplace_back();
      tensors[it->second].push_back({rank, &entry});
    }
    for (size_t i = 0; i < ranks[rank].objects.size(); ++i) {
      const auto [it, is_new] =
          object_at.try_emplace(ranks[rank].objects[i].key, objects.size());
      if (is_new) objects.emplace_back();
      objects[it->second].push_back({rank, i});
    }
  }

  for (const std::vector<Part>& parts : tensors) {
    const TensorEntry& first = *parts[0].entry;
    if (object_at.contains(first.key)) {
      return absl::DataLossError(absl::StrCat(
          "key \"", absl::CHexEscape(first.key),
          "\" is a tensor for one rank and an object for another"));
    }
    TensorEntry merged = first;
    merged.first_chunk = out.locations.size();
    merged.first_bound = out.bounds.size();
    merged.num_chunks = 0;
    out.tensors.push_back(std::move(merged));
    // Replicas are stored by each rank that has them; one is enough.
    absl::flat_hash_set<std::pair<Dims, Dims>> seen;
    for (const Part& part : parts) {
      const Metadata& rank = ranks[part.rank];
      if (part.entry->shape != first.shape ||
          part.entry->dtype_name != first.dtype_name) {
        return absl::DataLossError(absl::StrCat(
            "key \"", absl::CHexEscape(first.key), "\" is ", first.dtype_name,
            " ", DimsToString(first.shape), " for rank ", parts[0].rank,
            " and ", part.entry->dtype_name, " ",
            DimsToString(part.entry->shape), " for rank ", part.rank));
      }
      for (size_t i = 0; i < part.entry->num_chunks; ++i) {
        const Box box = rank.ChunkBox(*part.entry, i);
        if (!seen.emplace(box.lo, box.hi).second) continue;
        const auto transform =
            rank.chunk_transforms.find(part.entry->first_chunk + i);
        if (transform != rank.chunk_transforms.end()) {
          out.chunk_transforms[out.locations.size()] = transform->second;
        }
        out.AddChunk(box, place(part.rank, rank.ChunkLocation(*part.entry, i)));
      }
    }
  }
  DSD_RETURN_IF_ERROR(CheckOverlap(out));

  for (const std::vector<RankObject>& parts : objects) {
    bool equal = true;
    if (parts.size() > 1) {
      DSD_ASSIGN_OR_RETURN(equal, are_equal(parts));
    }
    for (size_t i = 0; i < (equal ? 1 : parts.size()); ++i) {
      const Metadata& rank = ranks[parts[i].rank];
      ObjectEntryInfo object = rank.objects[parts[i].object];
      object.location = place(parts[i].rank, object.location);
      if (!equal) {
        const std::string suffix = absl::StrCat("@rank", parts[i].rank);
        object.key += suffix;
        object.path = {object.key};
      }
      const auto transform = rank.object_transforms.find(parts[i].object);
      if (transform != rank.object_transforms.end()) {
        out.object_transforms[out.objects.size()] = transform->second;
      }
      out.objects.push_back(std::move(object));
    }
  }
  return out;
}

}  // namespace dsd::dcp
