// SPDX-License-Identifier: Apache-2.0
//
// Bytes over one TCP connection of 127.0.0.1, and nothing else: what backends
// are compared with.

#ifndef DSD_TESTING_BENCHMARKS_RAW_TCP_H_
#define DSD_TESTING_BENCHMARKS_RAW_TCP_H_

#include <cstddef>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/comm/socket.h"

namespace dsd {

class RawTcp {
 public:
  // Connects ranks `a` and `b`. Collective; of other ranks nothing can be
  // exchanged.
  static absl::StatusOr<RawTcp> Connect(Communicator& comm, int a, int b);

  // What goes over one connection, in each direction.
  struct Stream {
    const RawTcp* connection;
    absl::Span<const std::byte> send;
    absl::Span<std::byte> receive;
  };

  // Moves all of them at the same time, and returns when they are done.
  static absl::Status Exchange(std::vector<Stream> streams);

 private:
  Socket socket_;
};

}  // namespace dsd

#endif  // DSD_TESTING_BENCHMARKS_RAW_TCP_H_
