// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/staging.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/prefetch.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {
namespace {

// Calls fn(offset, bytes) for each stretch of a message whose pieces are all on
// the device, or all in host memory.
template <class Fn>
absl::Status ForEachStretch(absl::Span<const MessagePiece> pieces,
                            bool on_device, Fn fn) {
  for (size_t i = 0; i < pieces.size();) {
    if (pieces[i].is_on_device() != on_device) {
      ++i;
      continue;
    }
    const int64_t offset = pieces[i].offset;
    int64_t bytes = 0;
    for (; i < pieces.size() && pieces[i].is_on_device() == on_device &&
           pieces[i].offset == offset + bytes;
         ++i) {
      bytes += pieces[i].bytes();
    }
    DSD_RETURN_IF_ERROR(fn(offset, bytes));
  }
  return absl::OkStatus();
}

// A message may be of thousands of small pieces, and each waits for memory: so
// what is a few pieces ahead of `current` is asked for.
void PrefetchPiece(absl::Span<const MessagePiece> pieces, size_t current) {
  constexpr size_t kAhead = 6;
  if (current + kAhead >= pieces.size()) return;
  const MessagePiece& piece = pieces[current + kAhead];
  piece.endpoint->Prefetch(piece.tensor);
  PrefetchBytes(piece.box, sizeof(Box));
}

}  // namespace

std::byte* MemoryOf(const MessagePiece& piece, DeviceStream* stream) {
  Endpoint& endpoint = *piece.endpoint;
  if (piece.is_on_device() != (stream != nullptr) ||
      endpoint.catalog()[piece.tensor].dtype != piece.dtype) {
    return nullptr;
  }
  const auto view = stream != nullptr ? endpoint.ViewOnDevice(
                                            piece.tensor, *piece.box, *stream)
                                      : endpoint.View(piece.tensor, *piece.box);
  const int64_t item_size = ItemSize(piece.dtype);
  if (!view.has_value() ||
      !IsContiguous(*view, piece.box->extents(), item_size)) {
    return nullptr;
  }
  return view->base + piece.begin * item_size;
}

bool Staging::HasPieces(absl::Span<const MessagePiece> pieces,
                        bool on_device) const {
  if (stream_ == nullptr) return !on_device && !pieces.empty();
  return std::any_of(pieces.begin(), pieces.end(),
                     [&](const MessagePiece& piece) {
                       return piece.is_on_device() == on_device;
                     });
}

absl::Status Staging::Annotated(const absl::Status& status,
                                const MessagePiece& piece) const {
  if (status.ok()) return status;
  return Annotate(
      status, absl::StrCat("\"", piece.endpoint->catalog()[piece.tensor].fqn,
                           "\"", where_));
}

absl::StatusOr<std::byte*> Staging::HostMemory(Buffer& buffer) {
  if (buffer.host != nullptr) {
    DSD_RETURN_IF_ERROR(WaitUntil(buffer.used_until));
    return buffer.host;
  }
  if (stream_ != nullptr) {
    DSD_ASSIGN_OR_RETURN(buffer.host, stream_->AllocateHost(buffer_bytes_));
  } else {
    buffer.owned.reset(new std::byte[buffer_bytes_]);
    buffer.host = buffer.owned.get();
  }
  bytes_allocated_ += buffer_bytes_;
  return buffer.host;
}

absl::StatusOr<std::byte*> Staging::DeviceMemory(Buffer& buffer) {
  if (buffer.device == nullptr) {
    DSD_ASSIGN_OR_RETURN(buffer.device, stream_->AllocateDevice(buffer_bytes_));
    bytes_allocated_ += buffer_bytes_;
  }
  return buffer.device;
}

absl::Status Staging::WaitUntil(DeviceStream::Position position) {
  if (position == 0) return absl::OkStatus();
  DSD_RETURN_IF_ERROR(WaitUntilReached(*stream_, position, env_, deadline_))
      << absl::StrCat("staging", where_);
  return absl::OkStatus();
}

absl::Status Staging::MarkUse(Buffer& buffer) {
  DSD_ASSIGN_OR_RETURN(buffer.used_until, stream_->Mark());
  host_is_used_ = true;
  return absl::OkStatus();
}

absl::StatusOr<std::byte*> Staging::Memory(int index, bool on_device) {
  return on_device ? DeviceMemory(buffers_[index])
                   : HostMemory(buffers_[index]);
}

absl::Status Staging::Pack(int index, bool on_device,
                           absl::Span<const MessagePiece> pieces) {
  Buffer& buffer = buffers_[index];
  std::byte* host = nullptr;
  std::byte* device = nullptr;
  const bool has_host = HasPieces(pieces, false);
  const bool has_device = HasPieces(pieces, true);
  if (!on_device || has_host) {
    DSD_ASSIGN_OR_RETURN(host, HostMemory(buffer));
  }
  if (on_device || has_device) {
    DSD_ASSIGN_OR_RETURN(device, DeviceMemory(on_device ? buffer : pass_));
  }
  for (size_t i = 0; i < pieces.size(); ++i) {
    PrefetchPiece(pieces, i);
    const MessagePiece& p = pieces[i];
    const size_t bytes = p.bytes();
    DSD_RETURN_IF_ERROR(Annotated(
        p.is_on_device()
            ? p.endpoint->ReadOnDevice(p.tensor, *p.box, p.begin, p.end,
                                       p.dtype, *stream_,
                                       absl::MakeSpan(device + p.offset, bytes))
            : p.endpoint->Read(p.tensor, *p.box, p.begin, p.end, p.dtype,
                               absl::MakeSpan(host + p.offset, bytes)),
        p));
  }
  if (on_device) DSD_RETURN_IF_ERROR(stream_->Submit());
  if (on_device ? !has_host : !has_device) return absl::OkStatus();
  DSD_RETURN_IF_ERROR(
      ForEachStretch(pieces, !on_device, [&](int64_t offset, int64_t bytes) {
        return on_device
                   ? stream_->CopyToDevice(host + offset, device + offset,
                                           bytes)
                   : stream_->CopyToHost(device + offset, host + offset, bytes);
      }));
  return MarkUse(buffer);
}

absl::Status Staging::WaitPacked(int index) {
  return WaitUntil(buffers_[index].used_until);
}

absl::Status Staging::Unpack(int index, bool on_device,
                             absl::Span<const MessagePiece> pieces) {
  Buffer& buffer = buffers_[index];
  std::byte* host = buffer.host;
  std::byte* device = buffer.device;
  const bool has_host = HasPieces(pieces, false);
  const bool has_device = HasPieces(pieces, true);
  if (on_device && has_host) {
    DSD_ASSIGN_OR_RETURN(host, HostMemory(buffer));
  }
  if (!on_device && has_device) {
    DSD_ASSIGN_OR_RETURN(device, DeviceMemory(pass_));
  }
  if (on_device ? has_host : has_device) {
    DSD_RETURN_IF_ERROR(
        ForEachStretch(pieces, !on_device, [&](int64_t offset, int64_t bytes) {
          return on_device ? stream_->CopyToHost(device + offset, host + offset,
                                                 bytes)
                           : stream_->CopyToDevice(host + offset,
                                                   device + offset, bytes);
        }));
    DSD_RETURN_IF_ERROR(MarkUse(buffer));
  }
  for (const MessagePiece& p : pieces) {
    if (!p.is_on_device()) continue;
    DSD_RETURN_IF_ERROR(
        Annotated(p.endpoint->WriteOnDevice(
                      p.tensor, *p.box, p.begin, p.end, p.dtype, *stream_,
                      absl::MakeConstSpan(device + p.offset, p.bytes())),
                  p));
  }
  if (has_device) DSD_RETURN_IF_ERROR(stream_->Submit());
  if (!has_host) return absl::OkStatus();
  if (on_device) DSD_RETURN_IF_ERROR(WaitUntil(buffer.used_until));
  for (size_t i = 0; i < pieces.size(); ++i) {
    PrefetchPiece(pieces, i);
    const MessagePiece& p = pieces[i];
    if (p.is_on_device()) continue;
    DSD_RETURN_IF_ERROR(Annotated(
        p.endpoint->Write(p.tensor, *p.box, p.begin, p.end, p.dtype,
                          absl::MakeConstSpan(host + p.offset, p.bytes())),
        p));
  }
  return absl::OkStatus();
}

absl::Status Staging::ReadTo(const MessagePiece& piece, std::byte* host) {
  host_is_used_ = true;
  if (const std::byte* const memory = MemoryOf(piece, stream_.get())) {
    return stream_->CopyToHost(memory, host, piece.bytes());
  }
  DSD_ASSIGN_OR_RETURN(std::byte* const device, DeviceMemory(pass_));
  DSD_RETURN_IF_ERROR(Annotated(
      piece.endpoint->ReadOnDevice(piece.tensor, *piece.box, piece.begin,
                                   piece.end, piece.dtype, *stream_,
                                   absl::MakeSpan(device, piece.bytes())),
      piece));
  return stream_->CopyToHost(device, host, piece.bytes());
}

absl::Status Staging::WriteFrom(const MessagePiece& piece,
                                const std::byte* host) {
  host_is_used_ = true;
  if (std::byte* const memory = MemoryOf(piece, stream_.get())) {
    return stream_->CopyToDevice(host, memory, piece.bytes());
  }
  DSD_ASSIGN_OR_RETURN(std::byte* const device, DeviceMemory(pass_));
  DSD_RETURN_IF_ERROR(stream_->CopyToDevice(host, device, piece.bytes()));
  return Annotated(
      piece.endpoint->WriteOnDevice(piece.tensor, *piece.box, piece.begin,
                                    piece.end, piece.dtype, *stream_,
                                    absl::MakeConstSpan(device, piece.bytes())),
      piece);
}

absl::Status Staging::Finish() {
  if (stream_ == nullptr) return absl::OkStatus();
  DSD_RETURN_IF_ERROR(stream_->Join());
  if (!host_is_used_) return absl::OkStatus();
  host_is_used_ = false;
  DSD_ASSIGN_OR_RETURN(const DeviceStream::Position end, stream_->Mark());
  return WaitUntil(end);
}

}  // namespace dsd
