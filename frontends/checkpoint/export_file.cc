// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/export_file.h"

#include <utility>
#include <vector>

#include "absl/crc/crc32c.h"
#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/value/value.h"
#include "dsd/frontends/checkpoint/dcp/zip_writer.h"
#include "dsd/frontends/checkpoint/file_names.h"

namespace dsd::checkpoint {
namespace {

class SafetensorsFrame final : public FileFrame {
 public:
  explicit SafetensorsFrame(safetensors::Header header)
      : header_(std::move(header)) {
    header_.metadata.emplace_back(kDigestsAttribute, "");
  }
  bool needs_crc() const override { return false; }
  absl::StatusOr<int64_t> FrontBytes() override {
    // Digests are of one length.
    StoredDigests digests;
    for (const safetensors::HeaderTensor& tensor : header_.tensors) {
      digests.tensors[tensor.name] = Digest128();
    }
    DSD_ASSIGN_OR_RETURN(const std::string front, Front(digests));
    return static_cast<int64_t>(front.size());
  }
  std::string StartTensor(int64_t) override { return ""; }
  std::string FinishTensor(uint32_t) override { return ""; }
  std::string Finish(const StoredDigests&) override { return ""; }
  absl::StatusOr<std::string> Front(const StoredDigests& digests) override {
    header_.metadata.back().second = EncodeDigests(digests);
    return safetensors::EncodeHeader(header_);
  }

 private:
  safetensors::Header header_;
};

class ArchiveFrame final : public FileFrame {
 public:
  explicit ArchiveFrame(torch_archive::Tree tree)
      : pickle_bytes_(static_cast<int64_t>(tree.pickle.size())),
        pickle_crc_(static_cast<uint32_t>(absl::ComputeCrc32c(tree.pickle))),
        writer_(std::move(tree.pickle)),
        inner_(std::move(tree.inner)) {}
  bool needs_crc() const override { return true; }
  absl::StatusOr<int64_t> FrontBytes() override { return 0; }
  std::string StartTensor(int64_t bytes) override {
    return writer_.StartTensor(bytes);
  }
  std::string FinishTensor(uint32_t crc) override {
    return writer_.FinishTensor(crc);
  }
  std::string Finish(const StoredDigests& digests) override {
    StoredDigests all = digests;
    all.index_bytes = pickle_bytes_;
    all.index_crc = pickle_crc_;
    std::string out;
    for (const auto& [key, tensor] : inner_) {
      const absl::string_view bytes = tensor.bytes();
      out += writer_.StartTensor(static_cast<int64_t>(bytes.size()));
      absl::StrAppend(&out, bytes);
      out += writer_.FinishTensor(dcp::Crc32(0, bytes));
      if (!key.has_value()) continue;
      ContentDigest digest(static_cast<int64_t>(bytes.size()));
      digest.AddRun(0, absl::MakeConstSpan(
                           reinterpret_cast<const std::byte*>(bytes.data()),
                           bytes.size()));
      all.tensors[*key] = digest.Finish(tensor.dtype(), tensor.shape());
    }
    return absl::StrCat(out, writer_.Finish(EncodeDigests(all)));
  }
  absl::StatusOr<std::string> Front(const StoredDigests&) override {
    return "";
  }

 private:
  const int64_t pickle_bytes_;
  const uint32_t pickle_crc_;
  torch_archive::ArchiveWriter writer_;
  const std::vector<std::pair<std::optional<std::string>, HostTensor>> inner_;
};

}  // namespace

std::unique_ptr<FileFrame> MakeSafetensorsFrame(safetensors::Header header) {
  return std::make_unique<SafetensorsFrame>(std::move(header));
}
std::unique_ptr<FileFrame> MakeArchiveFrame(torch_archive::Tree tree) {
  return std::make_unique<ArchiveFrame>(std::move(tree));
}

ExportFile::ExportFile(std::unique_ptr<FileFrame> frame,
                       std::unique_ptr<WritableFile> file, Env* env)
    : frame_(std::move(frame)), out_(std::move(file), env) {}

absl::StatusOr<std::unique_ptr<ExportFile>> ExportFile::Start(
    std::unique_ptr<FileFrame> frame, std::unique_ptr<WritableFile> file,
    int64_t element_bytes, Env* env) {
  DSD_ASSIGN_OR_RETURN(const int64_t front, frame->FrontBytes());
  auto out =
      absl::WrapUnique(new ExportFile(std::move(frame), std::move(file), env));
  DSD_RETURN_IF_ERROR(out->out_.Expect(front + element_bytes));
  DSD_RETURN_IF_ERROR(out->out_.Reserve(front));
  return out;
}

absl::Status ExportFile::StartTensor(int64_t bytes) {
  crc_ = 0;
  digest_ = ContentDigest(bytes);
  digested_bytes_ = 0;
  return out_.Append(frame_->StartTensor(bytes));
}

absl::Status ExportFile::Append(absl::Span<const std::byte> bytes) {
  if (frame_->needs_crc()) {
    crc_ = dcp::Crc32(
        crc_, absl::string_view(reinterpret_cast<const char*>(bytes.data()),
                                bytes.size()));
  }
  digest_.AddRun(digested_bytes_, bytes);
  digested_bytes_ += static_cast<int64_t>(bytes.size());
  return out_.Append(bytes);
}

absl::Status ExportFile::FinishTensor(const TensorSpec& spec) {
  digests_.tensors[spec.fqn] = digest_.Finish(spec.dtype, spec.shape());
  return out_.Append(frame_->FinishTensor(crc_));
}

void ExportFile::AddSame(const std::string& fqn, const std::string& first) {
  const Digest128 digest = digests_.tensors[first];
  digests_.tensors[fqn] = digest;
}

absl::StatusOr<int64_t> ExportFile::Finish() {
  DSD_RETURN_IF_ERROR(out_.Append(frame_->Finish(digests_)));
  DSD_ASSIGN_OR_RETURN(const std::string front, frame_->Front(digests_));
  DSD_RETURN_IF_ERROR(out_.Finish(front));
  return out_.position();
}

}  // namespace dsd::checkpoint
