// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/state_dict/verify_replicas.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/state_dict/outline.h"
#include "dsd/core/tensor/torch_boundary.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/core/value/tree.h"

namespace dsd {
namespace {

constexpr size_t kDigestBytes = 16;
constexpr size_t kShown = 50;
constexpr int64_t kMaxBytes = int64_t{1} << 30;

std::string Short(const Digest& digest) {
  return std::string(reinterpret_cast<const char*>(digest.bytes.data()),
                     kDigestBytes);
}

Digest ContentOf(const at::Tensor& view) {
  constexpr size_t kPieceBytes = size_t{1} << 20;
  const at::Tensor host =
      view.detach().cpu().resolve_conj().resolve_neg().contiguous();
  const absl::string_view bytes(static_cast<const char*>(host.const_data_ptr()),
                                host.nbytes());
  DigestBuilder digest;
  digest.Add(static_cast<int64_t>(view.scalar_type()));
  for (size_t at = 0; at < bytes.size(); at += kPieceBytes) {
    digest.Add(DigestBuilder().Add(bytes.substr(at, kPieceBytes)).Finish());
  }
  return digest.Finish();
}

// What this rank has of what others may have too.
struct Piece {
  std::string name;     // for messages
  std::string key;      // the same on all ranks that have it
  std::string content;  // meant to be
};

class Collector {
 public:
  // `group`: of ranks that have the same numbers under one path.
  explicit Collector(std::string group) : group_(std::move(group)) {}

  absl::Status Add(const std::string& path, const Value& value) {
    const auto* tensor = value.get_if<TensorValue>();
    if (tensor == nullptr) {
      DSD_ASSIGN_OR_RETURN(const std::string bytes, EncodeOutline(value));
      Put(absl::StrCat("\"", path, "\""), absl::StrCat(path, "\n", group_),
          DigestBuilder().Add(bytes).Finish());
      return absl::OkStatus();
    }
    if (!tensor->defined()) return absl::OkStatus();
    DSD_ASSIGN_OR_RETURN(const std::vector<TensorValue::Part> parts,
                         tensor->Parts());
    for (const TensorValue::Part& part : parts) {
      DSD_RETURN_IF_ERROR(TorchToStatus([&] {
        if (tensor->is_plain()) {
          const bool is_one = Box::Whole(tensor->shape()).num_elements() == 1;
          Put(absl::StrCat("\"", path, "\""),
              absl::StrCat(path, "\n", is_one ? group_ : ""),
              ContentOf(part.view));
          return;
        }
        tensor->layout().ForEachCell(part.box, [&](const Cell& cell) {
          if (cell.holders.IsAny() || cell.holders.size() < 2) return;
          at::Tensor view = part.view;
          for (int d = 0; d < cell.box.ndim(); ++d) {
            view = view.slice(d, cell.box.lo[d] - part.box.lo[d],
                              cell.box.hi[d] - part.box.lo[d]);
          }
          const std::string box = cell.box.ToString();
          Put(absl::StrCat("\"", path, "\" in ", box),
              absl::StrCat(path, "\n", box), ContentOf(view));
        });
      })) << "\""
          << path << "\"";
    }
    return absl::OkStatus();
  }

  const std::vector<Piece>& pieces() const { return pieces_; }

 private:
  void Put(std::string name, const std::string& key, const Digest& content) {
    pieces_.push_back({std::move(name),
                       Short(DigestBuilder().Add(key).Finish()),
                       Short(content)});
  }

  const std::string group_;
  std::vector<Piece> pieces_;
};

std::string WhoHasWhat(const std::map<std::string, std::vector<int>>& ranks) {
  std::vector<std::string> groups;
  for (const auto& [content, list] : ranks) {
    groups.push_back(absl::StrJoin(list, ", "));
  }
  std::sort(groups.begin(), groups.end());
  return absl::StrJoin(groups, " | ");
}

}  // namespace

absl::Status VerifyReplicas(absl::string_view what, absl::Status local,
                            const StateDict& root,
                            std::vector<int> replica_ranks, const Mover& mover,
                            const CallClock& clock) {
  if (mover.world_size() == 1) return local;
  // Other ranks may not have come for this.
  DSD_RETURN_IF_ERROR(Agree(
      mover.comm(), what, DigestBuilder().Add("verify replicas").Finish(),
      local, [] { return "with verify_replicas"; }, clock.Left()));
  std::sort(replica_ranks.begin(), replica_ranks.end());
  Collector collector(absl::StrJoin(replica_ranks, ","));
  VisitTree<TensorValue>(Value(root),
                         [&](const TreePath& path, const Value& value) {
                           if (!local.ok()) return;
                           local = collector.Add(TreePathText(path), value);
                         });
  std::string mine;
  for (const Piece& piece : collector.pieces()) {
    absl::StrAppend(&mine, piece.key, piece.content);
  }
  if (!local.ok()) mine.clear();
  DSD_ASSIGN_OR_RETURN(
      const std::vector<std::string> all,
      mover.comm()->AllGatherBlobs(mine, kMaxBytes, clock.Left()));
  // By key, for the keys of this rank: content and who has it.
  absl::flat_hash_map<std::string, std::map<std::string, std::vector<int>>>
      found;
  for (const Piece& piece : collector.pieces()) found[piece.key];
  for (size_t rank = 0; rank < all.size(); ++rank) {
    for (size_t at = 0; at + 2 * kDigestBytes <= all[rank].size();
         at += 2 * kDigestBytes) {
      const auto it = found.find(all[rank].substr(at, kDigestBytes));
      if (it == found.end()) continue;
      it->second[all[rank].substr(at + kDigestBytes, kDigestBytes)].push_back(
          static_cast<int>(rank));
    }
  }
  std::vector<std::string> different;
  for (const Piece& piece : collector.pieces()) {
    const auto& ranks = found[piece.key];
    if (ranks.size() < 2) continue;
    different.push_back(
        absl::StrCat(piece.name, " (equal on ranks ", WhoHasWhat(ranks), ")"));
  }
  if (local.ok() && !different.empty()) {
    const size_t shown = std::min(different.size(), kShown);
    local = absl::FailedPreconditionError(absl::StrCat(
        "ranks that should hold the same values differ in ",
        absl::StrJoin(different.begin(), different.begin() + shown, ", "),
        shown < different.size()
            ? absl::StrCat(", and ", different.size() - shown, " more")
            : ""));
  }
  return Agree(
      mover.comm(), what, Digest(), local, [] { return std::string(); },
      clock.Left());
}

}  // namespace dsd
