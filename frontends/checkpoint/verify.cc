// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/checkpoint_impl.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"
#include "dsd/frontends/checkpoint/file_names.h"
#include "dsd/frontends/checkpoint/item_reader.h"

namespace dsd::checkpoint {
namespace {

constexpr int64_t kPieceBytes = int64_t{1} << 20;

class Verifier {
 public:
  Verifier(const Checkpoint& checkpoint,
           const std::function<void(const Progress&)>& progress)
      : impl_(CheckpointInternals::Get(checkpoint)),
        progress_(progress),
        reader_(&impl_) {
    if (progress_) done_.bytes_total = StoredBytes(impl_);
  }

  VerifyReport Run() {
    for (const auto& [key, dtype] : impl_.unreadable) {
      Add(key, "",
          absl::UnimplementedError(
              absl::StrCat("dtype ", dtype, " is not supported: not checked")));
    }
    for (size_t i = 0; i < impl_.entry_of.size(); ++i) CheckTensor(i);
    for (size_t i = 0; i < impl_.index.objects.size(); ++i) CheckObject(i);
    if (impl_.format == Format::kDcp) FindUnreferenced();
    const ReadStats stats = reader_.stats();
    report_.bytes = stats.payload_bytes + stats.overhead_bytes;
    return std::move(report_);
  }

 private:
  void Add(absl::string_view key, absl::string_view file, absl::Status status) {
    report_.problems.push_back(
        {std::string(key), std::string(file), std::move(status)});
  }

  std::string Hex(const Digest128& digest) const {
    return DigestHex(digest, impl_.digests.version);
  }

  void CheckTensor(size_t tensor) {
    const TensorSpec& spec = impl_.catalog[tensor];
    const size_t entry_index = impl_.entry_of[tensor];
    const dcp::TensorEntry& entry = impl_.index.tensors[entry_index];
    ++report_.tensors;
    ContentDigest digest(
        spec.layout.whole().num_elements() * ItemSize(spec.dtype),
        impl_.digests.version);
    bool complete = true;
    const int64_t missing = dcp::NumMissingElements(impl_.index, entry);
    if (missing > 0) {
      complete = false;
      Add(entry.key, "",
          absl::DataLossError(absl::StrCat(missing, " of ",
                                           spec.layout.whole().num_elements(),
                                           " elements are in no chunk")));
    }
    for (size_t i = 0; i < entry.num_chunks; ++i) {
      ++report_.chunks;
      const absl::Status status = CheckChunk(spec, entry_index, i, &digest);
      if (status.ok()) continue;
      complete = false;
      Add(entry.key,
          impl_.index.files[impl_.index.ChunkLocation(entry, i).file], status);
    }
    const auto stored = impl_.digests.tensors.find(spec.fqn);
    const bool is_stored = stored != impl_.digests.tensors.end();
    if (!complete || (!is_stored && !impl_.has_digests)) return;
    ++report_.compared;
    const Digest128 found = digest.Finish(spec.dtype, spec.shape());
    if (!is_stored || stored->second != found) {
      Add(entry.key, "",
          absl::DataLossError(absl::StrCat(
              "content digest ", Hex(found), ", expected ",
              is_stored ? Hex(stored->second) : "one that is missing")));
    }
  }

  absl::Status CheckChunk(const TensorSpec& spec, size_t entry_index,
                          size_t index, ContentDigest* digest) {
    const dcp::TensorEntry& entry = impl_.index.tensors[entry_index];
    const Box box = impl_.index.ChunkBox(entry, index);
    const int64_t item_size = ItemSize(spec.dtype);
    DSD_ASSIGN_OR_RETURN(ItemReader::Chunk * chunk,
                         reader_.OpenChunk(entry_index, index, true));
    const int64_t elements = box.num_elements();
    const bool one_pass = chunk->row_major && chunk->item.is_plain() &&
                          chunk->item.record_bytes == elements * item_size;
    uint32_t crc = 0;
    const int64_t step = kPieceBytes / item_size;
    buffer_.resize(std::min(step, elements) * item_size);
    for (int64_t begin = 0; begin < elements; begin += step) {
      const int64_t end = std::min(begin + step, elements);
      const auto piece =
          absl::MakeSpan(buffer_).first((end - begin) * item_size);
      DSD_RETURN_IF_ERROR(reader_.Read(*chunk, box, box, begin, end, piece));
      digest->AddBox(spec.shape(), item_size, box.lo, box.hi, begin, end,
                     piece);
      done_.bytes_done += static_cast<int64_t>(piece.size());
      if (progress_) progress_(done_);
      if (one_pass) {
        crc = dcp::Crc32(
            crc, absl::string_view(reinterpret_cast<const char*>(piece.data()),
                                   piece.size()));
      }
    }
    if (chunk->item.record_crc == 0) return absl::OkStatus();  // not computed
    if (!one_pass) {
      // Tensors of one storage have its record in common.
      const dcp::ItemLocation& at = impl_.index.ChunkLocation(entry, index);
      if (!checked_.insert({at.file, at.offset_bytes}).second) {
        return absl::OkStatus();
      }
      DSD_ASSIGN_OR_RETURN(crc, reader_.RecordCrc(*chunk));
    }
    if (crc != chunk->item.record_crc) {
      return absl::DataLossError(
          absl::StrCat(reader_.WhereChunk(chunk->entry, chunk->index),
                       ": the CRC of its elements differs: the "
                       "bytes are damaged"));
    }
    return absl::OkStatus();
  }

  void CheckObject(size_t index) {
    ++report_.objects;
    const dcp::ObjectEntryInfo& object = impl_.index.objects[index];
    const absl::Status status = reader_.ReadObject(index).status();
    report_.compared += impl_.digests.objects.contains(object.key);
    if (!status.ok()) {
      Add(object.key, impl_.index.files[object.location.file], status);
    }
  }

  void FindUnreferenced() {
    const absl::StatusOr<std::vector<std::string>> names =
        impl_.env->files().List(impl_.directory);
    if (!names.ok()) {
      Add("", "", names.status());
      return;
    }
    absl::flat_hash_set<std::string> known(impl_.index.files.begin(),
                                           impl_.index.files.end());
    known.insert(impl_.rank_indexes.begin(), impl_.rank_indexes.end());
    known.insert(DigestsFile(FileId(impl_.index.save_id)));
    for (const std::string& name : *names) {
      if (IsCheckpointFile(name) && !known.contains(name)) {
        report_.unreferenced.push_back(name);
      }
    }
  }

  const Checkpoint::Impl& impl_;
  const std::function<void(const Progress&)>& progress_;
  Progress done_;
  ItemReader reader_;
  absl::flat_hash_set<std::pair<uint32_t, int64_t>> checked_;  // file, offset
  std::vector<std::byte> buffer_;
  VerifyReport report_;
};

}  // namespace

VerifyReport Verify(const Checkpoint& checkpoint,
                    const std::function<void(const Progress&)>& progress) {
  return Verifier(checkpoint, progress).Run();
}

}  // namespace dsd::checkpoint
