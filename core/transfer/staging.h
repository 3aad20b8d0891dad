// SPDX-License-Identifier: Apache-2.0
//
// The memory of the executor's messages, and what goes in and comes out of
// them: pieces of tensors in host memory and on a device.

#ifndef DSD_CORE_TRANSFER_STAGING_H_
#define DSD_CORE_TRANSFER_STAGING_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/env.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/transfer/device_stream.h"
#include "dsd/core/transfer/endpoint.h"

namespace dsd {

// Elements [begin, end) of a box, at a place of a message.
struct MessagePiece {
  Endpoint* endpoint;
  size_t tensor;
  const Box* box;
  int64_t begin;
  int64_t end;
  DType dtype;
  int64_t offset;  // bytes from the front of the message

  int64_t bytes() const { return (end - begin) * ItemSize(dtype); }
  bool is_on_device() const { return endpoint->IsOnDevice(tensor); }
};

// Where the elements lie as they are in messages: in memory of the device of
// `stream`, of the host if that is null. Null if they lie nowhere so.
std::byte* MemoryOf(const MessagePiece& piece, DeviceStream* stream);

// Buffers of one size, made when first used and kept. A message is in host
// memory or on the device; pieces of the other kind pass through a buffer of
// theirs, neighbours in one copy. Errors are those of endpoints and stream,
// annotated with the FQN and `where` (" on rank 1"). Thread-compatible.
class Staging {
 public:
  static constexpr int kBuffers = 5;

  // `stream`: null if no piece and no message is on a device; otherwise host
  // memory is page-locked.
  Staging(int64_t buffer_bytes, std::unique_ptr<DeviceStream> stream, Env* env,
          absl::Time deadline, std::string where = "")
      : buffer_bytes_(buffer_bytes),
        where_(std::move(where)),
        env_(env),
        deadline_(deadline),
        stream_(std::move(stream)) {}

  // Null without a device.
  DeviceStream* stream() const { return stream_.get(); }

  // Memory of buffer `index` for a message that is received there; blocks while
  // the device still reads what was there before.
  absl::StatusOr<std::byte*> Memory(int index, bool on_device);

  // Puts the pieces into buffer `index`. A message in host memory is complete
  // after WaitPacked; one on the device in the order of the stream.
  absl::Status Pack(int index, bool on_device,
                    absl::Span<const MessagePiece> pieces);
  absl::Status WaitPacked(int index);

  // Takes the pieces out of buffer `index`.
  absl::Status Unpack(int index, bool on_device,
                      absl::Span<const MessagePiece> pieces);

  // Copies the piece, on a device, to or from page-locked memory where it is
  // contiguous, without a message. Memory must stay until Finish.
  absl::Status ReadTo(const MessagePiece& piece, std::byte* host);
  absl::Status WriteFrom(const MessagePiece& piece, const std::byte* host);

  // Blocks until host memory is as the device left it; what was only on the
  // device is in order with what the caller enqueues from now on.
  absl::Status Finish();

  int64_t bytes_allocated() const { return bytes_allocated_; }

 private:
  struct Buffer {
    std::byte* host = nullptr;
    std::byte* device = nullptr;
    std::unique_ptr<std::byte[]> owned;     // host, without a stream
    DeviceStream::Position used_until = 0;  // host memory, by the device
  };

  bool HasPieces(absl::Span<const MessagePiece> pieces, bool on_device) const;
  absl::StatusOr<std::byte*> HostMemory(Buffer& buffer);
  absl::StatusOr<std::byte*> DeviceMemory(Buffer& buffer);
  absl::Status WaitUntil(DeviceStream::Position position);
  absl::Status Annotated(const absl::Status& status,
                         const MessagePiece& piece) const;
  // Remembers that the device uses the buffer's host memory until here.
  absl::Status MarkUse(Buffer& buffer);
  const int64_t buffer_bytes_;
  const std::string where_;
  Env* const env_;
  const absl::Time deadline_;
  Buffer buffers_[kBuffers];
  Buffer pass_;  // device memory through which pieces pass, in stream order
  bool host_is_used_ = false;
  int64_t bytes_allocated_ = 0;
  // Destroyed first: waits for the device.
  std::unique_ptr<DeviceStream> stream_;
};

}  // namespace dsd

#endif  // DSD_CORE_TRANSFER_STAGING_H_
