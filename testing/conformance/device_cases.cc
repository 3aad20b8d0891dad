// SPDX-License-Identifier: Apache-2.0
//
// Messages in device memory, for backends that move it.

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/testing/conformance/conformance.h"
#include "dsd/testing/conformance/device_memory.h"

namespace dsd {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr absl::StatusCode kMismatch = absl::StatusCode::kFailedPrecondition;
constexpr absl::Duration kTimeout = absl::Seconds(1);
constexpr absl::Duration kSoon = absl::Seconds(20);

int Next(const Communicator& comm) { return (comm.rank() + 1) % comm.size(); }
int Previous(const Communicator& comm) {
  return (comm.rank() + comm.size() - 1) % comm.size();
}

// A buffer with these bytes in it.
absl::StatusOr<DeviceBuffer> Filled(DeviceStream& stream,
                                    const std::vector<std::byte>& bytes) {
  DSD_ASSIGN_OR_RETURN(DeviceBuffer buffer,
                       DeviceBuffer::Create(stream, bytes.size()));
  DSD_RETURN_IF_ERROR(buffer.CopyFrom(bytes));
  DSD_RETURN_IF_ERROR(stream.Synchronize());
  return buffer;
}

absl::Status ExpectBytes(DeviceBuffer& buffer,
                         const std::vector<std::byte>& expected,
                         absl::string_view what) {
  DSD_ASSIGN_OR_RETURN(const std::vector<std::byte> found, buffer.Read());
  return Check(found == expected, absl::StrCat(what, ": wrong bytes"));
}

// To the next rank and from the one before, at odd places of larger memory.
absl::Status Ring(Communicator& comm, DeviceStream& stream, size_t size,
                  uint64_t seed) {
  const size_t before = size % 3;
  DSD_ASSIGN_OR_RETURN(
      DeviceBuffer out,
      Filled(stream, Pattern(seed + comm.rank(), size + before)));
  std::vector<std::byte> expected(size + before + 9, std::byte{0x5a});
  DSD_ASSIGN_OR_RETURN(DeviceBuffer in, Filled(stream, expected));
  const std::vector<std::byte> sent =
      Pattern(seed + Previous(comm), size + before);
  std::copy(sent.begin() + before, sent.end(), expected.begin() + before);
  DSD_RETURN_IF_ERROR(comm.Exchange(
      {{Next(comm), out.bytes().subspan(before), stream.space()}},
      {{Previous(comm), in.bytes().subspan(before, size), stream.space()}},
      "ring"));
  return ExpectBytes(in, expected, absl::StrCat("ring of ", size));
}

DSD_DEVICE_CONFORMANCE_CASE(DeviceMemoryAroundARing) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  for (const size_t size : {size_t{0}, size_t{1}, size_t{7}, size_t{4095},
                            size_t{16385}, kMiB, 5 * kMiB - 3}) {
    DSD_RETURN_IF_ERROR(Ring(comm, *stream, size, size));
  }
  return absl::OkStatus();
}

DSD_DEVICE_CONFORMANCE_CASE(DeviceMemoryOf64MiB) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  return Ring(comm, *stream, 64 * kMiB / comm.size(), 3);
}

DSD_DEVICE_CONFORMANCE_CASE(DeviceMemoryInManySmallMessages) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  for (int i = 0; i < 60; ++i) {
    DSD_RETURN_IF_ERROR(Ring(comm, *stream, 64, i));
  }
  return absl::OkStatus();
}

// Host and device memory in one exchange, all to all, also to itself: each
// goes over what can carry it.
DSD_DEVICE_CONFORMANCE_CASE(Issue138842_DeviceAndHostMemoryAllToAll) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  const int world = comm.size();
  for (const size_t size : {size_t{5}, size_t{40000}, 2 * kMiB}) {
    std::vector<std::vector<std::byte>> host_out;
    std::vector<std::vector<std::byte>> host_in;
    std::vector<DeviceBuffer> out;
    std::vector<DeviceBuffer> in;
    for (int r = 0; r < world; ++r) {
      host_out.push_back(Pattern(comm.rank() * 100 + r, size + r));
      host_in.emplace_back(size + comm.rank());
      DSD_ASSIGN_OR_RETURN(DeviceBuffer one, Filled(*stream, host_out.back()));
      out.push_back(std::move(one));
      DSD_ASSIGN_OR_RETURN(DeviceBuffer other,
                           DeviceBuffer::Create(*stream, size + comm.rank()));
      in.push_back(std::move(other));
    }
    std::vector<SendOp> sends;
    std::vector<RecvOp> recvs;
    for (int step = 0; step < world; ++step) {
      const int r = (comm.rank() + step) % world;
      sends.push_back({r, host_out[r]});
      recvs.push_back({r, absl::MakeSpan(host_in[r])});
      if (r == comm.rank()) continue;
      sends.push_back({r, out[r].bytes(), stream->space()});
      recvs.push_back({r, in[r].bytes(), stream->space()});
    }
    DSD_RETURN_IF_ERROR(comm.Exchange(sends, recvs, "all to all"));
    for (int r = 0; r < world; ++r) {
      const auto expected = Pattern(r * 100 + comm.rank(), size + comm.rank());
      DSD_RETURN_IF_ERROR(Check(host_in[r] == expected, "host memory"));
      if (r == comm.rank()) continue;
      DSD_RETURN_IF_ERROR(
          ExpectBytes(in[r], expected, absl::StrCat("from rank ", r)));
    }
  }
  return absl::OkStatus();
}

// Messages that are given one by one on one side and together on the other, and
// waited for in another order.
DSD_DEVICE_CONFORMANCE_CASE(DeviceMessagesMatchInOrder) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  const size_t sizes[] = {100, 0, 200000, 1, 200000, 3 * kMiB, 100};
  for (const int sender : {0, 1}) {
    std::vector<DeviceBuffer> buffers;
    for (const size_t size : sizes) {
      DSD_ASSIGN_OR_RETURN(
          DeviceBuffer buffer,
          Filled(*stream, Pattern(comm.rank() * 10 + buffers.size(), size)));
      buffers.push_back(std::move(buffer));
    }
    if (comm.rank() == sender) {
      std::vector<PendingExchange> pending;
      for (DeviceBuffer& buffer : buffers) {
        DSD_ASSIGN_OR_RETURN(
            PendingExchange one,
            comm.StartExchange({{1 - sender, buffer.bytes(), stream->space()}},
                               {}, "one"));
        pending.push_back(std::move(one));
      }
      for (size_t i = pending.size(); i-- > 0;) {
        DSD_RETURN_IF_ERROR(pending[i].Wait());
      }
    } else if (comm.rank() == 1 - sender) {
      std::vector<RecvOp> recvs;
      for (DeviceBuffer& buffer : buffers) {
        recvs.push_back({sender, buffer.bytes(), stream->space()});
      }
      DSD_RETURN_IF_ERROR(comm.Exchange({}, recvs, "one"));
      for (size_t i = 0; i < buffers.size(); ++i) {
        DSD_RETURN_IF_ERROR(ExpectBytes(buffers[i],
                                        Pattern(sender * 10 + i, sizes[i]),
                                        absl::StrCat("message ", i)));
      }
    }
  }
  return comm.Barrier();
}

DSD_DEVICE_CONFORMANCE_CASE(DeviceExchangesOverlap) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  constexpr int kCount = 8;
  constexpr size_t kSize = 300000;
  std::vector<DeviceBuffer> out;
  std::vector<DeviceBuffer> in;
  std::vector<PendingExchange> pending;
  for (int i = 0; i < kCount; ++i) {
    DSD_ASSIGN_OR_RETURN(DeviceBuffer one,
                         Filled(*stream, Pattern(comm.rank() * 50 + i, kSize)));
    out.push_back(std::move(one));
    DSD_ASSIGN_OR_RETURN(DeviceBuffer other,
                         DeviceBuffer::Create(*stream, kSize));
    in.push_back(std::move(other));
  }
  for (int i = 0; i < kCount; ++i) {
    DSD_ASSIGN_OR_RETURN(
        PendingExchange one,
        comm.StartExchange({{Next(comm), out[i].bytes(), stream->space()}},
                           {{Previous(comm), in[i].bytes(), stream->space()}},
                           "ring"));
    pending.push_back(std::move(one));
  }
  for (int i = kCount; i-- > 0;) {
    DSD_RETURN_IF_ERROR(pending[i].Wait());
    DSD_RETURN_IF_ERROR(
        ExpectBytes(in[i], Pattern(Previous(comm) * 50 + i, kSize), "ring"));
  }
  return absl::OkStatus();
}

// What the streams still do when the exchange starts comes before it, on both
// sides.
DSD_DEVICE_CONFORMANCE_CASE(DeviceMemoryIsUsedInTheOrderOfItsStream) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  constexpr size_t kSize = 100000;
  const std::vector<std::byte> mine = Pattern(comm.rank(), kSize);
  const std::vector<std::byte> noise = Pattern(77, kSize);
  DSD_ASSIGN_OR_RETURN(DeviceBuffer out, Filled(*stream, noise));
  DSD_ASSIGN_OR_RETURN(DeviceBuffer in, DeviceBuffer::Create(*stream, kSize));
  const auto busy = [&] {
    return stream->Run([&comm] {
      comm.env()->SleepUntil(comm.env()->Now() + absl::Milliseconds(100));
    });
  };
  DSD_RETURN_IF_ERROR(busy());
  DSD_RETURN_IF_ERROR(out.CopyFrom(mine));
  // Must not come after what is received.
  DSD_RETURN_IF_ERROR(in.CopyFrom(noise));
  DSD_RETURN_IF_ERROR(comm.Exchange(
      {{Next(comm), out.bytes(), stream->space()}},
      {{Previous(comm), in.bytes(), stream->space()}}, "after the stream"));
  // Comes after what was sent.
  DSD_RETURN_IF_ERROR(out.CopyFrom(noise));
  DSD_RETURN_IF_ERROR(
      ExpectBytes(in, Pattern(Previous(comm), kSize), "in order"));
  DSD_RETURN_IF_ERROR(stream->Synchronize());
  return comm.Barrier();
}

DSD_DEVICE_CONFORMANCE_CASE(DeviceMemoryOnLanesOfTwoThreads) {
  DSD_ASSIGN_OR_RETURN(const auto a, comm.OpenLane("a"));
  DSD_ASSIGN_OR_RETURN(const auto b, a->OpenLane("b"));
  absl::Status statuses[2];
  const auto work = [&](Communicator& lane, int which) {
    statuses[which] = [&]() -> absl::Status {
      DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
      for (int i = 0; i < 10; ++i) {
        DSD_RETURN_IF_ERROR(Ring(lane, *stream, which == 0 ? 30000 : 70001, i));
        if (which == 1) DSD_RETURN_IF_ERROR(lane.Barrier());
      }
      return absl::OkStatus();
    }();
  };
  std::thread other([&] { work(*b, 1); });
  work(*a, 0);
  other.join();
  DSD_RETURN_IF_ERROR(statuses[0]);
  DSD_RETURN_IF_ERROR(statuses[1]);
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  DSD_RETURN_IF_ERROR(Ring(comm, *stream, 1000, 5));
  return comm.Barrier();
}

// --- Errors ---

// Rank 0 sends `sent` bytes to rank 1, which expects `expected`; each in memory
// of a device or of the host.
absl::Status SizesAndPlaces(Communicator& comm, size_t sent, bool from_device,
                            size_t expected, bool to_device) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  const size_t size = comm.rank() == 0 ? sent : expected;
  std::vector<std::byte> host(size);
  DSD_ASSIGN_OR_RETURN(DeviceBuffer device, Filled(*stream, host));
  absl::Status status;
  if (comm.rank() == 0) {
    const SendOp send = from_device ? SendOp{1, device.bytes(), stream->space()}
                                    : SendOp{1, host};
    // Another message, which would fit what the receiver expects next.
    status = comm.Exchange({send, send}, {}, "sizes");
  } else if (comm.rank() == 1) {
    const RecvOp recv = to_device ? RecvOp{0, device.bytes(), stream->space()}
                                  : RecvOp{0, absl::MakeSpan(host)};
    status = comm.Exchange({}, {recv, recv}, "sizes");
  } else {
    status = comm.Barrier();
  }
  if (status.ok()) {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  }
  return Expect(comm.status(), kMismatch,
                {absl::StrCat("rank 0 sends ", sent, " bytes"),
                 absl::StrCat("rank 1 expects ", expected, " bytes"),
                 "exchange \"sizes\""});
}
DSD_DEVICE_CONFORMANCE_CASE(ALongerDeviceMessage) {
  return SizesAndPlaces(comm, 3 * kMiB, true, 2 * kMiB, true);
}
DSD_DEVICE_CONFORMANCE_CASE(AShorterDeviceMessage) {
  return SizesAndPlaces(comm, 10, true, 2 * kMiB, true);
}
DSD_DEVICE_CONFORMANCE_CASE(DeviceMemoryForAMessageOfTheHost) {
  return SizesAndPlaces(comm, 2 * kMiB, false, 2 * kMiB, true);
}
DSD_DEVICE_CONFORMANCE_CASE(HostMemoryForAMessageOfADevice) {
  return SizesAndPlaces(comm, 2 * kMiB, true, 2 * kMiB, false);
}

// The first message goes nowhere; the second would fit, but comes too early.
DSD_DEVICE_CONFORMANCE_CASE(ADeviceMessageIsNotTakenForAnother) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  constexpr size_t kLarge = 2 * kMiB;
  constexpr size_t kSmall = 1000;
  std::vector<std::byte> host(kLarge);
  DSD_ASSIGN_OR_RETURN(DeviceBuffer large, Filled(*stream, host));
  DSD_ASSIGN_OR_RETURN(
      DeviceBuffer small,
      Filled(*stream, std::vector<std::byte>(kSmall, std::byte{7})));
  absl::Status status;
  if (comm.rank() == 0) {
    status = comm.Exchange({{1, large.bytes(), stream->space()},
                            {1, small.bytes(), stream->space()}},
                           {}, "two");
  } else if (comm.rank() == 1) {
    status = comm.Exchange(
        {}, {{0, absl::MakeSpan(host)}, {0, small.bytes(), stream->space()}},
        "two");
  } else {
    status = comm.Barrier();
  }
  if (status.ok()) {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  }
  DSD_RETURN_IF_ERROR(
      Expect(comm.status(), kMismatch, {"of device memory", "of host memory"}));
  return ExpectBytes(small, std::vector<std::byte>(kSmall, std::byte{7}),
                     "memory of a message that never came");
}

DSD_DEVICE_CONFORMANCE_CASE(ADeviceMessageThatDoesNotCome) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  DSD_ASSIGN_OR_RETURN(DeviceBuffer in, DeviceBuffer::Create(*stream, kMiB));
  if (comm.rank() == 0) {
    CallOptions options;
    options.timeout = kTimeout;
    DSD_RETURN_IF_ERROR(Check(
        !comm.Exchange({}, {{1, in.bytes(), stream->space()}}, "w", options)
             .ok(),
        "the message came"));
  } else {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  }
  return Expect(comm.status(), absl::StatusCode::kDeadlineExceeded,
                {"exchange \"w\"", "no message came from rank 1"});
}

// The stream of the sender does not get there.
DSD_DEVICE_CONFORMANCE_CASE(ADeviceMessageWhoseStreamIsLate) {
  std::atomic<bool> go{false};  // outlives the stream
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  DSD_ASSIGN_OR_RETURN(DeviceBuffer memory,
                       DeviceBuffer::Create(*stream, kMiB));
  CallOptions options;
  options.timeout = kTimeout;
  absl::Status status;
  if (comm.rank() == 0) {
    DSD_RETURN_IF_ERROR(stream->Run([&] {
      while (!go) {
        comm.env()->SleepUntil(comm.env()->Now() + absl::Milliseconds(1));
      }
    }));
    status = comm.Exchange({{1, memory.bytes(), stream->space()}}, {}, "late",
                           options);
    go = true;
  } else if (comm.rank() == 1) {
    status = comm.Exchange({}, {{0, memory.bytes(), stream->space()}}, "late",
                           options);
  } else {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  }
  return Expect(comm.status(), absl::StatusCode::kDeadlineExceeded,
                {"exchange \"late\""});
}

DSD_DEVICE_CONFORMANCE_CASE(AbortOfDeviceMessages) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  DSD_ASSIGN_OR_RETURN(DeviceBuffer in, DeviceBuffer::Create(*stream, kMiB));
  absl::Time aborted = absl::InfiniteFuture();
  std::thread other;
  if (comm.rank() == 0) {
    other = std::thread([&] {
      comm.env()->SleepUntil(comm.env()->Now() + absl::Milliseconds(100));
      aborted = comm.env()->Now();
      comm.Abort(absl::ResourceExhaustedError("the disk is full"));
    });
  }
  const int from = comm.rank() == 0 ? 1 : 0;
  const absl::Status status =
      comm.Exchange({}, {{from, in.bytes(), stream->space()}}, "never");
  if (other.joinable()) {
    other.join();
    DSD_RETURN_IF_ERROR(
        Check(comm.env()->Now() - aborted < kSoon, "the abort took long"));
  }
  return Expect(status, absl::StatusCode::kAborted,
                {"rank 0 aborted", "the disk is full", "\"never\""});
}

// Aborted while messages of all kinds are under way; the memory is written to
// and freed at once.
DSD_DEVICE_CONFORMANCE_CASE(AbortInTheMiddleOfDeviceMessages) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  std::thread other;
  if (comm.rank() == 1) {
    other = std::thread([&] {
      comm.env()->SleepUntil(comm.env()->Now() + absl::Milliseconds(30));
      comm.Abort(absl::UnknownError("on purpose"));
    });
  }
  absl::Status status;
  for (int i = 0; status.ok(); ++i) {
    status = Ring(comm, *stream, 4 * kMiB, i);
  }
  if (other.joinable()) other.join();
  return Expect(status, absl::StatusCode::kAborted,
                {"rank 1 aborted", "on purpose"});
}

DSD_DEVICE_CONFORMANCE_CASE(ADeviceExchangeThatIsGivenUp) {
  DSD_ASSIGN_OR_RETURN(const auto stream, DeviceStream::Create());
  DSD_ASSIGN_OR_RETURN(DeviceBuffer in, DeviceBuffer::Create(*stream, kMiB));
  if (comm.rank() == 0) {
    DSD_RETURN_IF_ERROR(
        comm.StartExchange({}, {{1, in.bytes(), stream->space()}}, "given up")
            .status());
  } else {
    DSD_RETURN_IF_ERROR(Check(!comm.Barrier().ok(), "barrier passed"));
  }
  return Expect(comm.status(), absl::StatusCode::kAborted,
                {"\"given up\" on rank 0", "before Wait"});
}

}  // namespace
}  // namespace dsd
