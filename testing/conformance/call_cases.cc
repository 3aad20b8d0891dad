// SPDX-License-Identifier: Apache-2.0
//
// What is the same for every call: a rank that is late, one that does not come,
// a deadline that has passed on one rank, an abort, a cancellation.

#include <atomic>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/testing/conformance/conformance.h"

namespace dsd {
namespace {

constexpr size_t kLittle = 100;
constexpr size_t kMuch = size_t{6} << 20;
constexpr absl::Duration kLate = absl::Milliseconds(150);
constexpr absl::Duration kTimeout = absl::Milliseconds(500);

// Each of them needs the last rank: no other can return OK before it calls.
int Last(const Communicator& comm) { return comm.size() - 1; }

absl::Status BroadcastOf(Communicator& comm, size_t bytes,
                         const CallOptions& options) {
  std::vector<std::byte> data(bytes);
  return comm.Broadcast(absl::MakeSpan(data), Last(comm), options);
}

absl::Status AllGatherOf(Communicator& comm, size_t bytes,
                         const CallOptions& options) {
  std::vector<std::byte> all(bytes * comm.size());
  std::vector<absl::Span<std::byte>> parts;
  for (int r = 0; r < comm.size(); ++r) {
    parts.push_back(absl::MakeSpan(all).subspan(r * bytes, bytes));
  }
  return comm.AllGather(parts[comm.rank()], parts, options);
}

absl::Status BlobsOf(Communicator& comm, size_t bytes,
                     const CallOptions& options) {
  return comm.AllGatherBlobs(std::string(bytes, 'x'), bytes, options).status();
}

absl::Status ScatterOf(Communicator& comm, size_t bytes,
                       const CallOptions& options) {
  const std::vector<std::byte> all(bytes);
  std::vector<std::byte> mine(bytes);
  std::vector<absl::Span<const std::byte>> parts;
  if (comm.rank() == Last(comm)) parts.assign(comm.size(), all);
  return comm.Scatter(parts, absl::MakeSpan(mine), Last(comm), options);
}

absl::Status ReduceScatterOf(Communicator& comm, size_t bytes,
                             const CallOptions& options) {
  const std::vector<std::byte> input(bytes * comm.size());
  std::vector<std::byte> output(bytes);
  return comm.ReduceScatter(input, std::vector<int64_t>(comm.size(), bytes),
                            absl::MakeSpan(output), DType::kUInt8,
                            ReduceOp::kMax, options);
}

absl::Status AllReduceOf(Communicator& comm, size_t bytes,
                         const CallOptions& options) {
  std::vector<std::byte> data(bytes);
  return comm.AllReduce(absl::MakeSpan(data), DType::kUInt8, ReduceOp::kSum,
                        options);
}

absl::Status RingOf(Communicator& comm, size_t bytes,
                    const CallOptions& options) {
  const std::vector<std::byte> out(bytes);
  std::vector<std::vector<std::byte>> in(comm.size(),
                                         std::vector<std::byte>(bytes));
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  for (int r = 0; r < comm.size(); ++r) {
    sends.push_back({r, out});
    recvs.push_back({r, absl::MakeSpan(in[r])});
  }
  return comm.Exchange(sends, recvs, "all to all", options);
}

// --- The calls ---

absl::Status BarrierCall(Communicator& comm, const CallOptions& options) {
  return comm.Barrier(options);
}
absl::Status OpenLaneCall(Communicator& comm, const CallOptions& options) {
  // A name that was given away is that on all ranks.
  for (int i = 0;; ++i) {
    const absl::Status status =
        comm.OpenLane(absl::StrCat("lane ", i), options).status();
    if (!absl::IsAlreadyExists(status)) return status;
  }
}
absl::Status SplitCall(Communicator& comm, const CallOptions& options) {
  return comm.Split(comm.rank() % 2, 0, options).status();
}
absl::Status BroadcastOfLittleCall(Communicator& c, const CallOptions& o) {
  return BroadcastOf(c, kLittle, o);
}
absl::Status BroadcastOfMuchCall(Communicator& c, const CallOptions& o) {
  return BroadcastOf(c, kMuch, o);
}
absl::Status AllGatherOfLittleCall(Communicator& c, const CallOptions& o) {
  return AllGatherOf(c, kLittle, o);
}
absl::Status AllGatherOfMuchCall(Communicator& c, const CallOptions& o) {
  return AllGatherOf(c, kMuch, o);
}
absl::Status BlobsOfLittleCall(Communicator& c, const CallOptions& o) {
  return BlobsOf(c, kLittle, o);
}
absl::Status BlobsOfMuchCall(Communicator& c, const CallOptions& o) {
  return BlobsOf(c, kMuch, o);
}
absl::Status ScatterOfLittleCall(Communicator& c, const CallOptions& o) {
  return ScatterOf(c, kLittle, o);
}
absl::Status ScatterOfMuchCall(Communicator& c, const CallOptions& o) {
  return ScatterOf(c, kMuch, o);
}
absl::Status ReduceScatterOfLittleCall(Communicator& c, const CallOptions& o) {
  return ReduceScatterOf(c, kLittle, o);
}
absl::Status ReduceScatterOfMuchCall(Communicator& c, const CallOptions& o) {
  return ReduceScatterOf(c, kMuch, o);
}
absl::Status AllReduceOfLittleCall(Communicator& c, const CallOptions& o) {
  return AllReduceOf(c, kLittle, o);
}
absl::Status AllReduceOfMuchCall(Communicator& c, const CallOptions& o) {
  return AllReduceOf(c, kMuch, o);
}
absl::Status ExchangeOfLittleCall(Communicator& c, const CallOptions& o) {
  return RingOf(c, kLittle, o);
}
absl::Status ExchangeOfMuchCall(Communicator& c, const CallOptions& o) {
  return RingOf(c, kMuch, o);
}

using Call = absl::Status (*)(Communicator& comm, const CallOptions& options);

void Sleep(Communicator& comm, absl::Duration duration) {
  comm.env()->SleepUntil(comm.env()->Now() + duration);
}

// The group's error, which a rank that was through with its part hears later.
absl::Status ErrorOf(Communicator& comm, const absl::Status& returned) {
  if (returned.ok()) {
    const absl::Status status = WaitForFailure(comm);
    if (!status.ok()) return status;
  }
  return comm.status();
}

// --- What happens to them ---

absl::Status Late(Communicator& comm, Call call) {
  for (int late = 0; late < comm.size(); ++late) {
    if (comm.rank() == late) Sleep(comm, kLate);
    DSD_RETURN_IF_ERROR(call(comm, {}));
  }
  return comm.Barrier();
}

absl::Status Missing(Communicator& comm, Call call) {
  CallOptions options;
  options.timeout = kTimeout;
  const absl::Status status = ErrorOf(
      comm, comm.rank() == Last(comm) ? absl::OkStatus() : call(comm, options));
  DSD_RETURN_IF_ERROR(Expect(status, absl::StatusCode::kDeadlineExceeded,
                             {absl::StrCat("rank ", Last(comm)), "500ms"}));
  return Expect(call(comm, {}), absl::StatusCode::kDeadlineExceeded,
                {"was not started"});
}

absl::Status Expired(Communicator& comm, Call call) {
  CallOptions options;
  if (comm.rank() == 1) options.timeout = absl::ZeroDuration();
  return Expect(ErrorOf(comm, call(comm, options)),
                absl::StatusCode::kDeadlineExceeded, {"on rank 1"});
}

absl::Status Aborted(Communicator& comm, Call call) {
  absl::Status returned;
  if (comm.rank() == Last(comm)) {
    Sleep(comm, kLate);
    comm.Abort(absl::DataLossError("a bad block"));
  } else {
    returned = call(comm, {});
    DSD_RETURN_IF_ERROR(Check(!returned.ok(), "it did without the last rank"));
  }
  return Expect(ErrorOf(comm, returned), absl::StatusCode::kAborted,
                {absl::StrCat("rank ", Last(comm), " aborted"), "a bad block"});
}

absl::Status Cancelled(Communicator& comm, Call call) {
  std::atomic<bool> cancel{false};
  CallOptions options;
  std::unique_ptr<EnvThread> other;
  if (comm.rank() == 0) {
    options.cancel = &cancel;
    other = comm.env()->StartThread("cancel", [&] {
      Sleep(comm, kLate);
      cancel = true;
    });
  }
  const absl::Status returned =
      comm.rank() == Last(comm) ? absl::OkStatus() : call(comm, options);
  other.reset();
  return Expect(ErrorOf(comm, returned), absl::StatusCode::kCancelled,
                {"was cancelled on rank 0"});
}

#define DSD_CASES_OF(call)                                \
  DSD_CONFORMANCE_CASE_ON(call##WithALateRank, 3, 3) {    \
    return Late(comm, &call##Call);                       \
  }                                                       \
  DSD_CONFORMANCE_CASE_ON(call##WithoutARank, 3, 3) {     \
    return Missing(comm, &call##Call);                    \
  }                                                       \
  DSD_CONFORMANCE_CASE_ON(call##AfterItsDeadline, 3, 3) { \
    return Expired(comm, &call##Call);                    \
  }                                                       \
  DSD_CONFORMANCE_CASE_ON(call##Aborted, 3, 3) {          \
    return Aborted(comm, &call##Call);                    \
  }                                                       \
  DSD_CONFORMANCE_CASE_ON(call##Cancelled, 3, 3) {        \
    return Cancelled(comm, &call##Call);                  \
  }

DSD_CASES_OF(Barrier)
DSD_CASES_OF(OpenLane)
DSD_CASES_OF(Split)
DSD_CASES_OF(BroadcastOfLittle)
DSD_CASES_OF(BroadcastOfMuch)
DSD_CASES_OF(AllGatherOfLittle)
DSD_CASES_OF(AllGatherOfMuch)
DSD_CASES_OF(BlobsOfLittle)
DSD_CASES_OF(BlobsOfMuch)
DSD_CASES_OF(ScatterOfLittle)
DSD_CASES_OF(ScatterOfMuch)
DSD_CASES_OF(ReduceScatterOfLittle)
DSD_CASES_OF(ReduceScatterOfMuch)
DSD_CASES_OF(AllReduceOfLittle)
DSD_CASES_OF(AllReduceOfMuch)
DSD_CASES_OF(ExchangeOfLittle)
DSD_CASES_OF(ExchangeOfMuch)

}  // namespace
}  // namespace dsd
