// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/live_state.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "absl/base/no_destructor.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/plan/plan.h"
#include "dsd/core/transfer/device_stream.h"
#include "dsd/core/transfer/staging.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/pickle_writer.h"
#include "dsd/frontends/checkpoint/record_codec.h"

namespace dsd::checkpoint {
namespace {

// Read and digested at once; fits a second-level cache with what is made of it.
constexpr int64_t kPieceBytes = 1 << 20;
constexpr int64_t kMaxTableBytes = int64_t{1} << 30;

std::string Quoted(absl::string_view key) {
  return absl::StrCat("\"", absl::CHexEscape(key), "\"");
}

// Python's keys are text.
absl::Status CheckText(absl::string_view key) {
  if (dcp::IsUtf8(key)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("key ", Quoted(key), " is not valid UTF-8"));
}

}  // namespace

const Catalog& CatalogOf(const State& state) {
  static const absl::NoDestructor<Catalog> empty;
  return state.tensors != nullptr ? state.tensors->catalog() : *empty;
}

Path TensorPath(const State& state, size_t tensor) {
  if (state.tensor_paths.empty()) return {CatalogOf(state)[tensor].fqn};
  return state.tensor_paths[tensor];
}

absl::Status CheckKeys(const State& state) {
  const Catalog& catalog = CatalogOf(state);
  if (!state.tensor_paths.empty() &&
      state.tensor_paths.size() != catalog.size()) {
    return absl::InvalidArgumentError(absl::StrCat(state.tensor_paths.size(),
                                                   " tensor paths for ",
                                                   catalog.size(), " tensors"));
  }
  for (size_t i = 0; i < state.tensor_paths.size(); ++i) {
    const std::string key = JoinPath(state.tensor_paths[i]);
    if (key != catalog[i].fqn) {
      return absl::InvalidArgumentError(
          absl::StrCat("the path of tensor ", Quoted(catalog[i].fqn),
                       " is that of ", Quoted(key)));
    }
  }
  for (const TensorSpec& spec : catalog.tensors()) {
    DSD_RETURN_IF_ERROR(CheckText(spec.fqn));
  }
  if (!state.same_as.empty() && state.same_as.size() != catalog.size()) {
    return absl::InvalidArgumentError(absl::StrCat(state.same_as.size(),
                                                   " entries of same_as for ",
                                                   catalog.size(), " tensors"));
  }
  for (size_t i = 0; i < state.same_as.size(); ++i) {
    const size_t first = state.same_as[i];
    if (first > i || state.same_as[first] != first ||
        catalog[first].dtype != catalog[i].dtype ||
        catalog[first].shape() != catalog[i].shape()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tensor ", Quoted(catalog[i].fqn), " is to be the same as tensor ",
          first,
          "; expected an earlier one of its dtype and shape that is no "
          "other's"));
    }
  }
  absl::flat_hash_set<std::string> keys;
  std::vector<std::string> repeated;
  for (const ObjectEntry& object : state.objects) {
    std::string key = JoinPath(object.path);
    DSD_RETURN_IF_ERROR(CheckText(key));
    if (catalog.Find(key).has_value() || !keys.insert(key).second) {
      repeated.push_back(std::move(key));
    }
  }
  if (!repeated.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("keys occur twice: ", ListKeys(std::move(repeated))));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::string>> EncodeObjects(const State& state) {
  std::vector<std::string> encoded;
  for (const ObjectEntry& object : state.objects) {
    absl::StatusOr<std::string> stored = dcp::EncodeStoredObject(object.value);
    DSD_RETURN_IF_ERROR(stored.status())
        << "object " << Quoted(JoinPath(object.path));
    encoded.push_back(*std::move(stored));
  }
  return encoded;
}

absl::StatusOr<std::vector<Piece>> PlanPieces(const State& state, int rank,
                                              int world_size) {
  const Catalog& source = CatalogOf(state);
  Catalog target;
  TensorPairs pairs;
  std::vector<Piece> pieces;
  for (size_t i = 0; i < source.size(); ++i) {
    const TensorSpec& spec = source[i];
    DSD_RETURN_IF_ERROR(
        target.Add({spec.fqn, spec.dtype, Layout::Anywhere(spec.shape())}));
    if (!spec.layout.whole().empty()) {
      pairs.emplace_back(i, i);
    } else if (rank == 0) {
      pieces.push_back({i, Box::Whole(spec.shape())});
    }
  }
  const Binding binding(world_size);
  DSD_ASSIGN_OR_RETURN(const Plan plan, PlanForRank(rank, source, target, pairs,
                                                    binding, binding));
  for (const Move& move : plan.moves) {
    if (move.provider == rank && move.provider_keeps) {
      pieces.push_back({move.source_tensor, move.box});
    }
  }
  std::stable_sort(
      pieces.begin(), pieces.end(),
      [](const Piece& a, const Piece& b) { return a.tensor < b.tensor; });
  return pieces;
}

absl::StatusOr<std::vector<size_t>> ShareObjects(
    const State& state, const std::vector<std::string>& encoded,
    Communicator* comm, const CallOptions& options) {
  const size_t count = state.objects.size();
  std::vector<size_t> all(count);
  for (size_t i = 0; i < count; ++i) all[i] = i;
  if (comm == nullptr || comm->size() == 1) return all;

  // Mostly they are all equal.
  std::vector<Digest> digests;
  DigestBuilder whole;
  for (size_t i = 0; i < count; ++i) {
    DigestBuilder one;
    for (const PathSegment& segment : state.objects[i].path) {
      std::visit([&one](const auto& v) { one.Add(v); }, segment);
    }
    digests.push_back(one.Add(encoded[i]).Finish());
    whole.Add(digests.back());
  }
  const Digest mine = whole.Finish();
  const auto view = [](const Digest& digest) {
    return absl::string_view(reinterpret_cast<const char*>(digest.bytes.data()),
                             digest.bytes.size());
  };
  DSD_ASSIGN_OR_RETURN(
      const std::vector<std::string> wholes,
      comm->AllGatherBlobs(view(mine), static_cast<int64_t>(mine.bytes.size()),
                           options));
  if (std::all_of(wholes.begin(), wholes.end(),
                  [&](const std::string& d) { return d == wholes[0]; })) {
    return comm->rank() == 0 ? all : std::vector<size_t>();
  }

  RecordWriter table;
  for (size_t i = 0; i < count; ++i) {
    table.Text(JoinPath(state.objects[i].path));
    table.Text(view(digests[i]));
  }
  DSD_ASSIGN_OR_RETURN(
      const std::vector<std::string> tables,
      comm->AllGatherBlobs(table.Take(), kMaxTableBytes, options));
  struct Owner {
    int rank;
    std::string digest;
  };
  absl::flat_hash_map<std::string, Owner> owners;
  std::vector<std::string> different;
  for (int rank = 0; rank < comm->size(); ++rank) {
    RecordReader in(tables[rank]);
    while (!in.done()) {
      std::string key(in.Text());
      std::string digest(in.Text());
      DSD_RETURN_IF_ERROR(in.status());
      const auto [it, is_new] = owners.try_emplace(key, Owner{rank, digest});
      if (!is_new && it->second.digest != digest) {
        different.push_back(absl::StrCat(key, "@rank", rank));
      }
    }
  }
  if (!different.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "objects differ between ranks: ", ListKeys(std::move(different)),
        " (against the lowest rank that has them); objects that are meant to "
        "differ need keys of their own, such as \"<key>@rank<r>\""));
  }
  std::vector<size_t> owned;
  for (size_t i = 0; i < count; ++i) {
    if (owners[JoinPath(state.objects[i].path)].rank == comm->rank()) {
      owned.push_back(i);
    }
  }
  return owned;
}

namespace {

absl::Status ReadPieceFromDevice(
    Endpoint& tensors, const Piece& piece, const Deadline& deadline,
    absl::FunctionRef<absl::Status(int64_t, int64_t,
                                   absl::Span<const std::byte>)>
        visit) {
  const DType dtype = tensors.catalog()[piece.tensor].dtype;
  const int64_t elements = piece.box.num_elements();
  const int64_t step = kPieceBytes / ItemSize(dtype);
  DSD_ASSIGN_OR_RETURN(std::unique_ptr<DeviceStream> stream,
                       tensors.OpenDeviceStream());
  Staging staging(kPieceBytes, std::move(stream), deadline.env(),
                  deadline.end());
  MessagePiece part = {&tensors, piece.tensor, &piece.box, 0, 0, dtype, 0};
  const auto pack = [&](int64_t begin) {
    part.begin = begin;
    part.end = std::min(begin + step, elements);
    return staging.Pack(static_cast<int>(begin / step % 2),
                        /*on_device=*/false, {part});
  };
  if (elements > 0) DSD_RETURN_IF_ERROR(pack(0));
  for (int64_t begin = 0; begin < elements; begin += step) {
    const int buffer = static_cast<int>(begin / step % 2);
    const int64_t end = part.end;
    DSD_RETURN_IF_ERROR(staging.WaitPacked(buffer));
    if (end < elements) DSD_RETURN_IF_ERROR(pack(end));
    DSD_ASSIGN_OR_RETURN(const std::byte* const memory,
                         staging.Memory(buffer, /*on_device=*/false));
    DSD_RETURN_IF_ERROR(
        visit(begin, end,
              absl::MakeConstSpan(memory, (end - begin) * ItemSize(dtype))));
  }
  return staging.Finish();
}

}  // namespace

absl::Status ReadPiece(Endpoint& tensors, const Piece& piece,
                       const Deadline& deadline,
                       absl::FunctionRef<absl::Status(
                           int64_t, int64_t, absl::Span<const std::byte>)>
                           visit) {
  if (tensors.IsOnDevice(piece.tensor)) {
    return ReadPieceFromDevice(tensors, piece, deadline, visit);
  }
  const TensorSpec& spec = tensors.catalog()[piece.tensor];
  const int64_t item_size = ItemSize(spec.dtype);
  const int64_t elements = piece.box.num_elements();
  const int64_t step = kPieceBytes / item_size;
  const std::optional<StridedView> view = tensors.View(piece.tensor, piece.box);
  if (view.has_value() && IsContiguous(*view, piece.box.extents(), item_size)) {
    return ForEachPart(view->base, elements, item_size, visit);
  }
  std::vector<std::byte> buffer(std::min(step, elements) * item_size);
  for (int64_t begin = 0; begin < elements; begin += step) {
    const int64_t end = std::min(begin + step, elements);
    const size_t bytes = (end - begin) * item_size;
    DSD_RETURN_IF_ERROR(tensors.Read(piece.tensor, piece.box, begin, end,
                                     spec.dtype,
                                     absl::MakeSpan(buffer.data(), bytes)))
        << Quoted(spec.fqn);
    DSD_RETURN_IF_ERROR(
        visit(begin, end, absl::MakeConstSpan(buffer.data(), bytes)));
  }
  return absl::OkStatus();
}

absl::Status ForEachPart(const std::byte* packed, int64_t elements,
                         int64_t item_size,
                         absl::FunctionRef<absl::Status(
                             int64_t, int64_t, absl::Span<const std::byte>)>
                             visit) {
  const int64_t step = kPieceBytes / item_size;
  for (int64_t begin = 0; begin < elements; begin += step) {
    const int64_t end = std::min(begin + step, elements);
    DSD_RETURN_IF_ERROR(visit(begin, end,
                              absl::MakeConstSpan(packed + begin * item_size,
                                                  (end - begin) * item_size)));
  }
  return absl::OkStatus();
}

absl::Status Deadline::Check() const {
  if (options_.cancel != nullptr && *options_.cancel) {
    return absl::CancelledError("cancelled by the caller");
  }
  if (env_->Now() >= end_) {
    return absl::DeadlineExceededError(absl::StrCat(
        "not done within ", absl::FormatDuration(options_.timeout)));
  }
  return absl::OkStatus();
}

absl::Status CheckAnnounced(int rank, int64_t bytes) {
  if (bytes >= 0 && bytes <= kMaxRecordBytes) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("rank ", rank, " announces ", bytes,
                                          " bytes, expected at most ",
                                          kMaxRecordBytes));
}

absl::StatusOr<std::vector<std::string>> GatherToRank0(
    Communicator* comm, absl::string_view mine, const CallOptions& options) {
  if (comm == nullptr || comm->size() == 1) {
    return std::vector<std::string>{std::string(mine)};
  }
  const int size = comm->size();
  const int64_t my_bytes = static_cast<int64_t>(mine.size());
  std::vector<int64_t> bytes(size);
  std::vector<absl::Span<std::byte>> parts;
  for (int64_t& count : bytes) {
    parts.push_back(
        absl::MakeSpan(reinterpret_cast<std::byte*>(&count), sizeof(count)));
  }
  DSD_RETURN_IF_ERROR(comm->AllGather(
      absl::MakeConstSpan(reinterpret_cast<const std::byte*>(&my_bytes),
                          sizeof(my_bytes)),
      parts, options));
  for (int rank = 0; rank < size; ++rank) {
    DSD_RETURN_IF_ERROR(CheckAnnounced(rank, bytes[rank]));
  }
  std::vector<std::string> all;
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  if (comm->rank() == 0) {
    all.resize(size);
    all[0] = std::string(mine);
    for (int rank = 1; rank < size; ++rank) {
      if (bytes[rank] == 0) continue;
      all[rank].resize(bytes[rank]);
      recvs.push_back(
          {rank, absl::MakeSpan(reinterpret_cast<std::byte*>(all[rank].data()),
                                all[rank].size())});
    }
  } else if (my_bytes > 0) {
    sends.push_back(
        {0, absl::MakeConstSpan(reinterpret_cast<const std::byte*>(mine.data()),
                                mine.size())});
  }
  DSD_RETURN_IF_ERROR(comm->Exchange(sends, recvs, "gather", options));
  return all;
}

std::string ListKeys(std::vector<std::string> keys) {
  constexpr size_t kMaxListed = 64;
  std::sort(keys.begin(), keys.end());
  const size_t more = keys.size() - std::min(keys.size(), kMaxListed);
  keys.resize(keys.size() - more);
  std::string out =
      absl::StrJoin(keys, ", ", [](std::string* text, const std::string& key) {
        absl::StrAppend(text, Quoted(key));
      });
  if (more > 0) absl::StrAppend(&out, " and ", more, " more");
  return out;
}

}  // namespace dsd::checkpoint
