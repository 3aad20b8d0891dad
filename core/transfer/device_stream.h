// SPDX-License-Identifier: Apache-2.0
//
// Memory that the host cannot touch, and the order of work on it.

#ifndef DSD_CORE_TRANSFER_DEVICE_STREAM_H_
#define DSD_CORE_TRANSFER_DEVICE_STREAM_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/engine.h"
#include "dsd/core/transfer/strided_view.h"

namespace dsd {

// A queue of work on a device, for one transfer: what is enqueued is done in
// order, later, after all that its maker had enqueued on the device before, and
// before all that it enqueues there after Join. Thread-compatible.
class DeviceStream {
 public:
  // A place in the queue, see Mark. Positive.
  using Position = int64_t;

  // Joins; the memory stays until the device is done with it. Blocks while a
  // copy from or to host memory that is not of AllocateHost is under way.
  virtual ~DeviceStream() = default;

  // Memory that lives as long as this. That of the host can be copied without
  // another copy in between (page-locked). ResourceExhausted.
  virtual absl::StatusOr<std::byte*> AllocateHost(int64_t bytes) = 0;
  virtual absl::StatusOr<std::byte*> AllocateDevice(int64_t bytes) = 0;

  // Whether copies need no staging in memory of AllocateHost.
  virtual bool IsPageLocked(const std::byte* host) const = 0;

  // Enqueues a copy of a box between two places on the device, or holds it
  // back.
  virtual absl::Status CopyOnDevice(const StridedView& from,
                                    const StridedView& to,
                                    absl::Span<const int64_t> extents,
                                    int64_t item_size) = 0;

  // Enqueues what was held back so that many small copies become one; so do all
  // functions below.
  virtual absl::Status Submit() = 0;

  // Enqueues a copy. Host memory must stay, and is not written (for CopyToHost
  // also not read), until a later position is reached.
  virtual absl::Status CopyToHost(const std::byte* device, std::byte* host,
                                  int64_t bytes) = 0;
  virtual absl::Status CopyToDevice(const std::byte* host, std::byte* device,
                                    int64_t bytes) = 0;

  // The place after all work enqueued so far; positions grow.
  virtual absl::StatusOr<Position> Mark() = 0;

  // Whether all work before a position is done. Errors: of the device, also
  // of work enqueued by others.
  virtual absl::StatusOr<bool> IsReached(Position position) = 0;

  // What the maker enqueues on the device from now on waits for all work here.
  // Does not block.
  virtual absl::Status Join() = 0;

  // Where messages in memory of AllocateDevice are.
  virtual MemorySpace space() const = 0;
};

// Blocks until `position` is reached. Errors: of IsReached; DeadlineExceeded.
absl::Status WaitUntilReached(DeviceStream& stream,
                              DeviceStream::Position position, Env* env,
                              absl::Time deadline);

}  // namespace dsd

#endif  // DSD_CORE_TRANSFER_DEVICE_STREAM_H_
