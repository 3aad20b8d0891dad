// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/checkpoint_endpoint.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/float_cast.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/item_reader.h"
#include "dsd/frontends/checkpoint/record_codec.h"

namespace dsd::checkpoint {
namespace {

constexpr int64_t kPieceBytes = int64_t{256} << 10;

class EndpointImpl final : public CheckpointEndpoint {
 public:
  EndpointImpl(std::shared_ptr<const Checkpoint> checkpoint)
      : checkpoint_(std::move(checkpoint)),
        impl_(CheckpointInternals::Get(*checkpoint_)),
        reader_(&impl_) {}

  void Reserve(size_t tensors) { tensors_.reserve(tensors); }

  absl::Status Add(size_t tensor) {
    DSD_RETURN_IF_ERROR(catalog_.Add(impl_.catalog[tensor]));
    const TensorSpec& spec = catalog_[catalog_.size() - 1];
    Tensor state(spec.layout.whole().num_elements() * ItemSize(spec.dtype),
                 impl_.digests.version);
    state.entry = impl_.entry_of[tensor];
    const auto stored = impl_.digests.tensors.find(spec.fqn);
    if (stored != impl_.digests.tensors.end()) state.expected = stored->second;
    tensors_.push_back(std::move(state));
    return absl::OkStatus();
  }

  const Catalog& catalog() const override { return catalog_; }

  absl::Status Read(size_t tensor, const Box& box, int64_t begin, int64_t end,
                    DType dtype, absl::Span<std::byte> out) override {
    const TensorSpec& spec = catalog_[tensor];
    const bool is_cast = dtype != spec.dtype;
    if (is_cast && !(IsCastable(spec.dtype) && IsCastable(dtype))) {
      return absl::UnimplementedError(absl::StrCat(
          "stored ", DTypeName(spec.dtype), " cannot be converted to ",
          DTypeName(dtype), " while reading"));
    }
    // In pieces that are still in the cache when they are digested and cast.
    Tensor& state = tensors_[tensor];
    const int64_t stored_size = ItemSize(spec.dtype);
    const int64_t step = kPieceBytes / stored_size;
    if (is_cast) stored_.resize(kPieceBytes);
    for (int64_t at = begin; at < end; at += step) {
      const int64_t until = std::min(end, at + step);
      const auto to = out.subspan((at - begin) * ItemSize(dtype),
                                  (until - at) * ItemSize(dtype));
      const auto piece =
          is_cast ? absl::MakeSpan(stored_).first((until - at) * stored_size)
                  : to;
      DSD_RETURN_IF_ERROR(ReadElements(tensor, box, at, until, piece));
      if (state.expected.has_value()) {
        state.elements_read += until - at;
        state.digest.AddBox(spec.shape(), stored_size, box.lo, box.hi, at,
                            until, piece);
      }
      if (is_cast) CastFloats(spec.dtype, piece, dtype, to);
    }
    return absl::OkStatus();
  }

  absl::Status Write(size_t tensor, const Box&, int64_t, int64_t, DType,
                     absl::Span<const std::byte>) override {
    return absl::UnimplementedError(
        absl::StrCat("\"", absl::CHexEscape(catalog_[tensor].fqn),
                     "\": a stored tensor is not written in place; use Save"));
  }

  ReadStats stats() const override { return reader_.stats(); }

  std::string Partials() const override {
    RecordWriter out;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const Tensor& tensor = tensors_[i];
      if (tensor.elements_read == 0 || IsWhole(i)) continue;
      out.Number(static_cast<int64_t>(i));
      out.Number(tensor.elements_read);
      out.Put(tensor.digest.partial());
    }
    return out.Take();
  }

  absl::Status Merge(absl::string_view partials) override {
    RecordReader in(partials);
    while (!in.done()) {
      const int64_t tensor = in.Number();
      const int64_t elements = in.Number();
      const Digest128 partial = in.GetDigest();
      DSD_RETURN_IF_ERROR(in.status());
      if (tensor < 0 || tensor >= static_cast<int64_t>(tensors_.size())) {
        return absl::InternalError("a rank sent the digest of another tensor");
      }
      tensors_[tensor].elements_read += elements;
      tensors_[tensor].digest.Merge(partial);
    }
    return in.status();
  }

  absl::StatusOr<int64_t> Verify() override {
    int64_t compared = 0;
    std::vector<std::string> damaged;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const Tensor& tensor = tensors_[i];
      if (!tensor.expected.has_value() || !IsWhole(i)) continue;
      ++compared;
      const TensorSpec& spec = catalog_[i];
      const Digest128 found = tensor.digest.Finish(spec.dtype, spec.shape());
      if (found == *tensor.expected) continue;
      damaged.push_back(absl::StrCat("\"", absl::CHexEscape(spec.fqn),
                                     "\" has content digest ", Hex(found),
                                     ", expected ", Hex(*tensor.expected), "; ",
                                     DamagedFiles(tensor.entry)));
    }
    if (damaged.empty()) return compared;
    constexpr size_t kMaxListed = 8;
    const size_t more = damaged.size() - std::min(damaged.size(), kMaxListed);
    damaged.resize(damaged.size() - more);
    return absl::DataLossError(absl::StrCat(
        "stored elements are damaged: ", absl::StrJoin(damaged, "; "),
        more > 0 ? absl::StrCat("; and ", more, " more") : ""));
  }

 private:
  struct Tensor {
    Tensor(int64_t bytes, DigestVersion version) : digest(bytes, version) {}
    size_t entry = 0;
    ContentDigest digest;
    int64_t elements_read = 0;
    std::optional<Digest128> expected;
    size_t last_chunk = 0;
  };

  std::string Hex(const Digest128& digest) const {
    return DigestHex(digest, impl_.digests.version);
  }

  bool IsWhole(size_t tensor) const {
    return tensors_[tensor].elements_read ==
           catalog_[tensor].layout.whole().num_elements();
  }

  absl::Status ReadElements(size_t tensor, const Box& box, int64_t begin,
                            int64_t end, absl::Span<std::byte> out) {
    Tensor& state = tensors_[tensor];
    const dcp::TensorEntry& entry = impl_.index.tensors[state.entry];
    // Mostly one chunk has it all, the same as before or the next one.
    for (size_t i = 0; i < entry.num_chunks; ++i) {
      const size_t chunk = (state.last_chunk + i) % entry.num_chunks;
      const Box chunk_box = impl_.index.ChunkBox(entry, chunk);
      if (!chunk_box.Contains(box)) continue;
      state.last_chunk = chunk;
      return ReadFrom(state, chunk, chunk_box, box, begin, end, out);
    }
    return ReadAcross(tensor, box, begin, end, out);
  }

  absl::Status ReadFrom(Tensor& state, size_t chunk, const Box& chunk_box,
                        const Box& box, int64_t begin, int64_t end,
                        absl::Span<std::byte> out) {
    const bool all =
        box == chunk_box && begin == 0 && end == box.num_elements();
    DSD_ASSIGN_OR_RETURN(ItemReader::Chunk * open,
                         reader_.OpenChunk(state.entry, chunk, all));
    return reader_.Read(*open, chunk_box, box, begin, end, out);
  }

  // A box over several chunks, row by row.
  absl::Status ReadAcross(size_t tensor, const Box& box, int64_t begin,
                          int64_t end, absl::Span<std::byte> out) {
    Tensor& state = tensors_[tensor];
    const dcp::TensorEntry& entry = impl_.index.tensors[state.entry];
    const int64_t item_size = ItemSize(catalog_[tensor].dtype);
    const int last = box.ndim() - 1;
    const Dims strides = RowMajorStrides(box.extents());
    for (int64_t at = begin; at < end;) {
      Box piece = box;
      for (int d = 0; d <= last; ++d) {
        piece.lo[d] = box.lo[d] + at / strides[d] % box.extent(d);
        piece.hi[d] = piece.lo[d] + 1;
      }
      piece.hi[last] = std::min(box.hi[last], piece.lo[last] + end - at);
      bool found = false;
      for (size_t i = 0; i < entry.num_chunks && !found; ++i) {
        const size_t chunk = (state.last_chunk + i) % entry.num_chunks;
        const Box chunk_box = impl_.index.ChunkBox(entry, chunk);
        if (!chunk_box.ContainsPoint(piece.lo)) continue;
        found = true;
        state.last_chunk = chunk;
        piece.hi[last] = std::min(piece.hi[last], chunk_box.hi[last]);
        const int64_t count = piece.extent(last);
        DSD_RETURN_IF_ERROR(
            ReadFrom(state, chunk, chunk_box, piece, 0, count,
                     out.subspan((at - begin) * item_size, count * item_size)));
        at += count;
      }
      if (!found) {
        return absl::FailedPreconditionError(absl::StrCat(
            "element ", DimsToString(piece.lo), " of \"",
            absl::CHexEscape(entry.key), "\" is in no stored chunk"));
      }
    }
    return absl::OkStatus();
  }

  // Which files of the tensor are damaged, by the CRC of each archive.
  std::string DamagedFiles(size_t entry_index) {
    const dcp::TensorEntry& entry = impl_.index.tensors[entry_index];
    std::set<std::string> damaged, all;
    for (size_t i = 0; i < entry.num_chunks; ++i) {
      const std::string file =
          reader_.QuotedFile(impl_.index.ChunkLocation(entry, i).file);
      all.insert(file);
      const absl::StatusOr<ItemReader::Chunk*> chunk =
          reader_.OpenChunk(entry_index, i, false);
      if (chunk.ok() && (*chunk)->item.record_crc == 0) continue;
      if (!chunk.ok()) {
        damaged.insert(file);
        continue;
      }
      const absl::StatusOr<uint32_t> crc = reader_.RecordCrc(**chunk);
      if (!crc.ok() || *crc != (*chunk)->item.record_crc) damaged.insert(file);
    }
    if (damaged.empty()) {
      return absl::StrCat("files ", absl::StrJoin(all, ", "));
    }
    return absl::StrCat("damaged: ", absl::StrJoin(damaged, ", "));
  }

  const std::shared_ptr<const Checkpoint> checkpoint_;
  const Checkpoint::Impl& impl_;
  ItemReader reader_;
  Catalog catalog_;
  std::vector<Tensor> tensors_;
  std::vector<std::byte> stored_;  // before it is cast
};

}  // namespace

absl::StatusOr<std::unique_ptr<CheckpointEndpoint>> MakeCheckpointEndpoint(
    std::shared_ptr<const Checkpoint> checkpoint,
    absl::Span<const size_t> tensors) {
  auto endpoint = std::make_unique<EndpointImpl>(std::move(checkpoint));
  endpoint->Reserve(tensors.size());
  for (const size_t tensor : tensors) {
    DSD_RETURN_IF_ERROR(endpoint->Add(tensor));
  }
  return endpoint;
}

}  // namespace dsd::checkpoint
