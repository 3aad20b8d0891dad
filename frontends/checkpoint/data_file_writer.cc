// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/data_file_writer.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "dsd/core/base/status_macros.h"

namespace dsd::checkpoint {

DataFileWriter::DataFileWriter(std::unique_ptr<WritableFile> file, Env* env)
    : file_(std::move(file)),
      env_(*env),
      memory_(kBuffers * kPieceBytes),
      current_(memory_.data()) {
  if (current_ == nullptr) {
    status_ = absl::ResourceExhaustedError("no memory to write a file with");
    return;
  }
  for (int i = 1; i < kBuffers; ++i) {
    free_.push_back(memory_.data() + i * kPieceBytes);
  }
}

DataFileWriter::~DataFileWriter() { Stop(); }

absl::Status DataFileWriter::Append(absl::string_view bytes) {
  return Append(absl::MakeConstSpan(
      reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()));
}

absl::Status DataFileWriter::Append(absl::Span<const std::byte> bytes) {
  if (current_ == nullptr) {
    absl::MutexLock lock(&mu_);
    return status_;
  }
  while (!bytes.empty()) {
    if (used_ == kPieceBytes) DSD_RETURN_IF_ERROR(Submit());
    const size_t count = std::min<size_t>(
        bytes.size(), static_cast<size_t>(kPieceBytes - used_));
    std::memcpy(current_ + used_, bytes.data(), count);
    used_ += static_cast<int64_t>(count);
    position_ += static_cast<int64_t>(count);
    bytes.remove_prefix(count);
  }
  return absl::OkStatus();
}

absl::Status DataFileWriter::Reserve(int64_t bytes) {
  reserved_ = bytes;
  return Append(std::string(bytes, '\0'));
}

absl::Status DataFileWriter::PadTo(int64_t position) {
  return Append(std::string(position - position_, '\0'));
}

absl::Status DataFileWriter::Submit() {
  if (position_ - used_ < reserved_) {
    auto held = std::make_unique<AlignedBuffer>(kPieceBytes);
    if (held->data() == nullptr) {
      return absl::ResourceExhaustedError("no memory to write a file with");
    }
    std::memcpy(held->data(), current_, kPieceBytes);
    held_.push_back(std::move(held));
    used_ = 0;
    return absl::OkStatus();
  }
  if (writers_.empty()) {
    for (int i = 0; i < kWriters; ++i) {
      std::unique_ptr<EnvThread> writer =
          env_.StartThread("dsd_write", [this] { RunWriter(); });
      if (writer != nullptr) writers_.push_back(std::move(writer));
    }
  }
  if (writers_.empty()) {  // the system has no thread for it
    DSD_RETURN_IF_ERROR(file_->WriteAt(
        position_ - used_, absl::MakeConstSpan(current_, kPieceBytes)));
    used_ = 0;
    return absl::OkStatus();
  }
  absl::MutexLock lock(&mu_);
  env_.Await(mu_, absl::Condition(this, &DataFileWriter::HasFree),
             absl::InfiniteFuture());
  DSD_RETURN_IF_ERROR(status_);
  queued_ = current_;
  queued_at_ = position_ - used_;
  current_ = free_.back();
  free_.pop_back();
  used_ = 0;
  return absl::OkStatus();
}

void DataFileWriter::RunWriter() {
  absl::MutexLock lock(&mu_);
  while (true) {
    env_.Await(mu_, absl::Condition(this, &DataFileWriter::HasWorkOrStops),
               absl::InfiniteFuture());
    if (queued_ == nullptr) return;
    std::byte* const piece = std::exchange(queued_, nullptr);
    const int64_t at = queued_at_;
    mu_.Unlock();
    const absl::Status status =
        file_->WriteAt(at, absl::MakeConstSpan(piece, kPieceBytes));
    mu_.Lock();
    status_.Update(status);
    free_.push_back(piece);
  }
}

void DataFileWriter::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  }
  writers_.clear();
}

absl::Status DataFileWriter::WriteOut(int64_t at,
                                      absl::Span<const std::byte> bytes) {
  // The whole pages may go past the page cache, the rest cannot.
  const size_t pages =
      bytes.size() / AlignedBuffer::kAlignment * AlignedBuffer::kAlignment;
  for (const auto& [from, to] :
       {std::pair(size_t{0}, pages), std::pair(pages, bytes.size())}) {
    if (from == to) continue;
    DSD_RETURN_IF_ERROR(file_->WriteAt(at + static_cast<int64_t>(from),
                                       bytes.subspan(from, to - from)));
  }
  return absl::OkStatus();
}

absl::Status DataFileWriter::Finish(absl::string_view front) {
  Stop();
  {
    absl::MutexLock lock(&mu_);
    DSD_RETURN_IF_ERROR(status_);
  }
  if (static_cast<int64_t>(front.size()) != reserved_) {
    return absl::InternalError(absl::StrCat("a front of ", front.size(),
                                            " bytes, expected ", reserved_));
  }
  for (size_t i = 0; i < held_.size(); ++i) {
    const absl::string_view part = front.substr(0, kPieceBytes);
    std::memcpy(held_[i]->data(), part.data(), part.size());
    front.remove_prefix(part.size());
    DSD_RETURN_IF_ERROR(
        WriteOut(static_cast<int64_t>(i) * kPieceBytes,
                 absl::MakeConstSpan(held_[i]->data(), kPieceBytes)));
  }
  // In what is left of it nothing has been written yet.
  if (!front.empty()) std::memcpy(current_, front.data(), front.size());
  DSD_RETURN_IF_ERROR(
      WriteOut(position_ - used_, absl::MakeConstSpan(current_, used_)));
  DSD_RETURN_IF_ERROR(file_->Sync());
  return file_->Close();
}

}  // namespace dsd::checkpoint
