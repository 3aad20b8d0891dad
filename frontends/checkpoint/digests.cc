// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/transfer/transfer.h"
#include "dsd/core/value/flatten.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/item_reader.h"
#include "dsd/frontends/checkpoint/live_state.h"
#include "dsd/frontends/checkpoint/record_codec.h"

namespace dsd::checkpoint {
namespace {

constexpr int64_t kPieceBytes = int64_t{1} << 20;

CheckpointDigests Sorted(std::vector<KeyDigest> keys) {
  std::sort(
      keys.begin(), keys.end(),
      [](const KeyDigest& a, const KeyDigest& b) { return a.key < b.key; });
  std::string all;
  for (const KeyDigest& key : keys) {
    absl::StrAppend(&all, key.key.size(), ":", key.key, DigestHex(key.digest));
  }
  CheckpointDigests out;
  out.keys = std::move(keys);
  out.whole = DigestOfBytes(all);
  return out;
}

}  // namespace

absl::StatusOr<CheckpointDigests> ComputeDigests(
    const Checkpoint& checkpoint,
    const std::function<void(const Progress&)>& progress) {
  if (!checkpoint.unreadable().empty()) {
    const auto& [key, dtype] = checkpoint.unreadable()[0];
    return absl::UnimplementedError(
        absl::StrCat("\"", absl::CHexEscape(key), "\": dtype ",
                     absl::CHexEscape(dtype), " is not supported"));
  }
  std::vector<KeyDigest> keys;
  const Catalog& catalog = checkpoint.catalog();
  DSD_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointEndpoint> endpoint,
                       checkpoint.MakeEndpoint());
  std::vector<std::byte> buffer(kPieceBytes);
  Progress done;
  done.bytes_total = StoredBytes(CheckpointInternals::Get(checkpoint));
  for (size_t i = 0; i < catalog.size(); ++i) {
    const TensorSpec& spec = catalog[i];
    const int64_t item_size = ItemSize(spec.dtype);
    ContentDigest digest(spec.layout.whole().num_elements() * item_size);
    int64_t elements_read = 0;
    for (const StoredChunk& chunk : checkpoint.Chunks(i)) {
      const int64_t elements = chunk.box.num_elements();
      const int64_t step = kPieceBytes / item_size;
      for (int64_t begin = 0; begin < elements; begin += step) {
        const int64_t end = std::min(begin + step, elements);
        const auto piece =
            absl::MakeSpan(buffer).first((end - begin) * item_size);
        DSD_RETURN_IF_ERROR(
            endpoint->Read(i, chunk.box, begin, end, spec.dtype, piece));
        digest.AddBox(spec.shape(), item_size, chunk.box.lo, chunk.box.hi,
                      begin, end, piece);
        done.bytes_done += static_cast<int64_t>(piece.size());
        if (progress) progress(done);
      }
      elements_read += elements;
    }
    if (elements_read != spec.layout.whole().num_elements()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "\"", absl::CHexEscape(spec.fqn), "\": only ", elements_read, " of ",
          spec.layout.whole().num_elements(), " elements are stored"));
    }
    keys.push_back({spec.fqn, digest.Finish(spec.dtype, spec.shape())});
  }
  DSD_RETURN_IF_ERROR(endpoint->Verify().status());
  ItemReader reader(&CheckpointInternals::Get(checkpoint));
  for (size_t i = 0; i < checkpoint.objects().size(); ++i) {
    DSD_ASSIGN_OR_RETURN(const dcp::ObjectItem item, reader.ReadObject(i));
    keys.push_back({checkpoint.objects()[i].key, item.digest});
  }
  return Sorted(std::move(keys));
}

absl::StatusOr<CheckpointDigests> ComputeDigests(const State& state,
                                                 Communicator* comm,
                                                 const CallOptions& options) {
  const Deadline deadline(ChooseEnv(nullptr, comm), options);
  const int rank = comm == nullptr ? 0 : comm->rank();
  const int size = comm == nullptr ? 1 : comm->size();
  const Catalog& catalog = CatalogOf(state);
  std::vector<std::string> encoded;
  std::vector<Piece> pieces;
  const auto prepare = [&]() -> absl::Status {
    DSD_RETURN_IF_ERROR(CheckKeys(state));
    DSD_ASSIGN_OR_RETURN(encoded, EncodeObjects(state));
    DSD_ASSIGN_OR_RETURN(pieces, PlanPieces(state, rank, size));
    return absl::OkStatus();
  };
  DSD_RETURN_IF_ERROR(Agree(
      comm, "content digests", catalog.Fingerprint(), prepare(),
      [&] { return absl::StrCat(catalog.size(), " tensors"); },
      deadline.Left()));
  DSD_ASSIGN_OR_RETURN(const std::vector<size_t> objects,
                       ShareObjects(state, encoded, comm, deadline.Left()));

  RecordWriter out;
  absl::Status local;
  for (const Piece& piece : pieces) {
    const TensorSpec& spec = catalog[piece.tensor];
    const int64_t item_size = ItemSize(spec.dtype);
    ContentDigest digest(spec.layout.whole().num_elements() * item_size);
    local = ReadPiece(
        *state.tensors, piece, deadline,
        [&](int64_t begin, int64_t end, absl::Span<const std::byte> bytes) {
          digest.AddBox(spec.shape(), item_size, piece.box.lo, piece.box.hi,
                        begin, end, bytes);
          return deadline.Check();
        });
    if (!local.ok()) break;
    out.Number(static_cast<int64_t>(piece.tensor));
    out.Put(digest.partial());
  }
  RecordWriter object_table;
  for (const size_t i : objects) {
    object_table.Text(JoinPath(state.objects[i].path));
    object_table.Put(dcp::ObjectDigest(encoded[i]));
  }
  RecordWriter both;
  both.Text(out.Take());
  both.Text(object_table.Take());
  std::vector<std::string> records = {both.Take()};
  if (size > 1) {
    DSD_ASSIGN_OR_RETURN(
        records, comm->AllGatherBlobs(std::string(records[0]), kMaxRecordBytes,
                                      deadline.Left()));
  }
  DSD_RETURN_IF_ERROR(Agree(
      comm, "content digests", Digest(), local, [] { return std::string(); },
      deadline.Left()));

  std::vector<ContentDigest> sums;
  for (const TensorSpec& spec : catalog.tensors()) {
    sums.emplace_back(spec.layout.whole().num_elements() *
                      ItemSize(spec.dtype));
  }
  std::vector<KeyDigest> keys;
  for (const std::string& record : records) {
    RecordReader in(record);
    RecordReader tensors(in.Text());
    RecordReader object_digests(in.Text());
    DSD_RETURN_IF_ERROR(in.status());
    while (!tensors.done()) {
      const size_t tensor = static_cast<size_t>(tensors.Number());
      const Digest128 partial = tensors.GetDigest();
      if (tensor >= sums.size()) {
        return absl::InternalError("a rank sent a malformed record");
      }
      sums[tensor].Merge(partial);
    }
    while (!object_digests.done()) {
      KeyDigest key;
      key.key = std::string(object_digests.Text());
      key.digest = object_digests.GetDigest();
      keys.push_back(std::move(key));
    }
  }
  for (size_t i = 0; i < catalog.size(); ++i) {
    keys.push_back(
        {catalog[i].fqn, sums[i].Finish(catalog[i].dtype, catalog[i].shape())});
  }
  return Sorted(std::move(keys));
}

}  // namespace dsd::checkpoint
