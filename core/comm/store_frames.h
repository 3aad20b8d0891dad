// SPDX-License-Identifier: Apache-2.0
//
// What tests of the store's protocol say and hear on a socket of their own.

#ifndef DSD_CORE_COMM_STORE_FRAMES_H_
#define DSD_CORE_COMM_STORE_FRAMES_H_

#include <cstdint>
#include <cstring>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/version.h"
#include "dsd/core/comm/job_token.h"
#include "dsd/core/comm/socket.h"
#include "dsd/core/comm/store_protocol.h"
#include "gtest/gtest.h"

namespace dsd::test {

inline absl::Time In(absl::Duration duration) {
  return Env::Real()->Now() + duration;
}
inline absl::Time Soon() { return In(absl::Seconds(30)); }

// Of job "job".
inline std::string HelloFrame(
    int rank = -1, absl::string_view library = kLibraryVersion,
    const std::string& nonce = NewNonce(Env::Real())) {
  return FrameWriter(FrameKind::kHello, 0)
      .Put(kStoreMagic)
      .Put(kStoreVersion)
      .Put(library)
      .Put(absl::string_view(nonce))
      .Put(absl::string_view("job"))
      .Put(uint64_t{0})
      .Put(int32_t{rank})
      .Finish();
}

// The answer to it, from a server that is the test's own.
inline std::string WelcomeFrame(StoreRole role, absl::Duration bound,
                                absl::string_view proof = "") {
  return FrameWriter(FrameKind::kReply, 0)
      .Put(absl::OkStatus())
      .Put(absl::ToInt64Nanoseconds(bound))
      .Put(proof)
      .Put(static_cast<uint8_t>(role))
      .Put(int32_t{0})
      .Put(absl::string_view())
      .Finish();
}

inline std::string JoinFrame(int rank, int size,
                             absl::string_view group = "g") {
  return FrameWriter(FrameKind::kJoin, 1)
      .Put(group)
      .Put(int32_t{rank})
      .Put(int32_t{size})
      .Put(absl::string_view())
      .Put(int64_t{1} << 40)
      .Finish();
}

// To a request of a client.
inline std::string OkReplyTo(uint64_t request) {
  return FrameWriter(FrameKind::kReply, request)
      .Put(absl::OkStatus())
      .Put(absl::string_view())
      .Finish();
}

// What a relay makes of a frame, and what is made for it.
inline std::string PassFrame(uint64_t channel, absl::string_view frame) {
  return FrameWriter(FrameKind::kPass, channel)
      .Put(frame.substr(kFrameHeaderBytes))
      .Finish();
}

// The next frame, without its length; empty after a failure.
inline std::string ReadFrame(Socket& socket) {
  const absl::StatusOr<std::string> head =
      socket.ReadExactly(Env::Real(), kFrameHeaderBytes, Soon());
  EXPECT_TRUE(head.ok()) << head.status();
  if (!head.ok()) return "";
  uint32_t size;
  std::memcpy(&size, head->data(), sizeof(size));
  const absl::StatusOr<std::string> body =
      socket.ReadExactly(Env::Real(), size, Soon());
  EXPECT_TRUE(body.ok()) << body.status();
  return body.value_or("");
}

// All that comes until the other side hangs up.
inline std::string ReadToEnd(Socket& socket) {
  std::string in;
  absl::StatusOr<bool> open = true;
  while (open.ok() && *open) {
    pollfd poll = {socket.fd(), POLLIN, 0};
    const absl::StatusOr<int> ready =
        Env::Real()->Poll(absl::MakeSpan(&poll, 1), Soon());
    EXPECT_TRUE(ready.ok() && *ready == 1) << "nobody hangs up";
    if (::testing::Test::HasFailure()) break;
    open = socket.ReadSome(in, 1 << 20);
  }
  return in;
}

}  // namespace dsd::test

#endif  // DSD_CORE_COMM_STORE_FRAMES_H_
