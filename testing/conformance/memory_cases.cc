// SPDX-License-Identifier: Apache-2.0
//
// What calls leave behind, and what they do with much or strange memory.

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/comm/registry.h"
#include "dsd/testing/conformance/conformance.h"
#include "dsd/testing/harness/process_counts.h"

namespace dsd {
namespace {

// Memory that can be taken away.
class Pages {
 public:
  explicit Pages(size_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {}
  Pages(const Pages&) = delete;
  ~Pages() { munmap(data_, bytes_); }

  bool ok() const { return data_ != MAP_FAILED; }
  // Whoever touches it now does not live on.
  void Forbid() { mprotect(data_, bytes_, PROT_NONE); }
  absl::Span<std::byte> span() {
    return {static_cast<std::byte*>(data_), bytes_};
  }

 private:
  const size_t bytes_;
  void* const data_;
};

void Sleep(Communicator& comm, absl::Duration duration) {
  comm.env()->SleepUntil(comm.env()->Now() + duration);
}

// After an error nobody touches the memory of a call, whatever was under way.
DSD_CONFORMANCE_CASE_FROM(MemoryIsFreeAfterAnAbort, 2) {
  constexpr size_t kBytes = size_t{32} << 20;
  Pages out(kBytes);
  Pages in(kBytes);
  DSD_RETURN_IF_ERROR(Check(out.ok() && in.ok(), "mmap"));
  const int next = (comm.rank() + 1) % comm.size();
  const int previous = (comm.rank() + comm.size() - 1) % comm.size();
  absl::Status status;
  {
    absl::StatusOr<PendingExchange> pending = comm.StartExchange(
        {{next, out.span()}}, {{previous, in.span()}}, "ring");
    if (comm.rank() == 0) comm.Abort(absl::DataLossError("enough"));
    status = pending.ok() ? pending->Wait() : pending.status();
  }
  out.Forbid();
  in.Forbid();
  Sleep(comm, absl::Milliseconds(100));
  if (status.ok()) DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  return Expect(comm.status(), absl::StatusCode::kAborted, {"enough"});
}

DSD_CONFORMANCE_CASE_FROM(MemoryIsFreeAfterADeadline, 2) {
  constexpr size_t kBytes = size_t{8} << 20;
  Pages in(kBytes);
  DSD_RETURN_IF_ERROR(Check(in.ok(), "mmap"));
  CallOptions options;
  options.timeout = absl::Milliseconds(200);
  // The message comes when its time is over, if at all.
  if (comm.rank() == 0) {
    const absl::Status status =
        comm.Exchange({}, {{1, in.span()}}, "late", options);
    DSD_RETURN_IF_ERROR(Check(!status.ok(), "the message came"));
    in.Forbid();
    Sleep(comm, absl::Milliseconds(300));
  } else if (comm.rank() == 1) {
    Sleep(comm, absl::Milliseconds(300));
    comm.Exchange({{0, in.span()}}, {}, "late").IgnoreError();
  }
  DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  return Expect(comm.status(), absl::StatusCode::kDeadlineExceeded, {"late"});
}

DSD_CONFORMANCE_CASE_FROM(DescriptorsStayAsMany, 2) {
  const auto use = [&]() -> absl::Status {
    std::vector<std::byte> data(size_t{2} << 20);
    for (int i = 0; i < 5; ++i) {
      DSD_RETURN_IF_ERROR(
          comm.Broadcast(absl::MakeSpan(data), i % comm.size()));
      DSD_RETURN_IF_ERROR(
          comm.AllReduce(absl::MakeSpan(data), DType::kInt32, ReduceOp::kSum));
      DSD_RETURN_IF_ERROR(comm.Split(i, 0).status());
    }
    return comm.Barrier();
  };
  DSD_RETURN_IF_ERROR(use());
  const int before = test::OpenDescriptors();
  for (int i = 0; i < 5; ++i) DSD_RETURN_IF_ERROR(use());
  // Where ranks are threads others are looking, too, each with one open.
  const int after = test::OpenDescriptors();
  return Check(std::abs(after - before) <= comm.size(),
               absl::StrCat(before, " descriptors, later ", after));
}

// What is moved is moved from the caller's memory into the caller's.
DSD_CONFORMANCE_CASE_ON(MuchTakesNoMemory, 2, 3) {
  constexpr size_t kBytes = size_t{64} << 20;
  const size_t world = comm.size();
  std::vector<std::byte> mine(kBytes, std::byte{1});
  std::vector<std::byte> all(kBytes * world, std::byte{2});
  std::vector<absl::Span<std::byte>> parts;
  for (size_t r = 0; r < world; ++r) {
    parts.push_back(absl::MakeSpan(all).subspan(r * kBytes, kBytes));
  }
  std::vector<absl::Span<const std::byte>> given;
  if (comm.rank() == 0) given.assign(parts.begin(), parts.end());
  DSD_RETURN_IF_ERROR(comm.Barrier());
  const double before = test::ResetPeakMiB();
  DSD_RETURN_IF_ERROR(comm.Barrier());
  DSD_RETURN_IF_ERROR(comm.Scatter(given, absl::MakeSpan(mine), 0));
  const double scattered = test::PeakMiB() - before;
  DSD_RETURN_IF_ERROR(comm.AllGather(mine, parts));
  DSD_RETURN_IF_ERROR(comm.Broadcast(absl::MakeSpan(all), 0));
  const double moved = test::PeakMiB() - before;
  // Of all ranks where they are threads. Much less than one part.
  const std::string grown =
      absl::StrCat("memory grew by ", scattered, " and ", moved, " MiB");
  return Check(moved < 40, grown);
}

// Who waits for nothing does nothing; and works afterwards.
DSD_CONFORMANCE_CASE_FROM(AnIdleGroupTakesNoTime, 2) {
  // Time is counted by process: of ranks that could each have one, and are
  // threads of this one, that of all.
  DSD_ASSIGN_OR_RETURN(const BackendDescriptor* const backend,
                       FindBackend(comm.backend()));
  int64_t ranks_here = 1;
  if (!backend->in_process) {
    const std::string process = absl::StrCat(getpid());
    DSD_ASSIGN_OR_RETURN(const std::vector<std::string> processes,
                         comm.AllGatherBlobs(process, 100));
    ranks_here = std::count(processes.begin(), processes.end(), process);
  }
  const auto cpu = [] {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return absl::DurationFromTimeval(usage.ru_utime) +
           absl::DurationFromTimeval(usage.ru_stime);
  };
  DSD_RETURN_IF_ERROR(comm.Barrier());
  const absl::Duration before = cpu();
  Sleep(comm, absl::Milliseconds(1500));
  const absl::Duration used = cpu() - before;
  DSD_RETURN_IF_ERROR(Check(used < ranks_here * absl::Milliseconds(300),
                            absl::StrCat("idle for 1.5 s, but ran for ",
                                         absl::FormatDuration(used))));
  return comm.Barrier();
}

// Nor does one that waits for a rank that is late.
DSD_CONFORMANCE_CASE_FROM(WaitingTakesNoTime, 2) {
  const auto cpu = [] {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return absl::DurationFromTimespec(time);
  };
  if (comm.rank() == 0) {
    Sleep(comm, absl::Milliseconds(1500));
    return comm.Barrier();
  }
  const absl::Duration before = cpu();
  DSD_RETURN_IF_ERROR(comm.Barrier());
  const absl::Duration used = cpu() - before;
  return Check(used < absl::Milliseconds(500),
               absl::StrCat("waited for 1.5 s, and ran for ",
                            absl::FormatDuration(used)));
}

DSD_CONFORMANCE_CASE_FROM(BuffersAtOddPlaces, 2) {
  const int next = (comm.rank() + 1) % comm.size();
  const int previous = (comm.rank() + comm.size() - 1) % comm.size();
  for (const size_t size :
       {size_t{1}, size_t{4095}, size_t{100001}, (size_t{1} << 20) + 3}) {
    for (const size_t shift : {1, 3, 7}) {
      std::vector<std::byte> out(size + 16);
      const std::vector<std::byte> mine = Pattern(comm.rank() + size, size);
      std::copy(mine.begin(), mine.end(), out.begin() + shift);
      std::vector<std::byte> in(size + 16, std::byte{0x5a});
      DSD_RETURN_IF_ERROR(comm.Exchange(
          {{next, absl::MakeConstSpan(out).subspan(shift, size)}},
          {{previous, absl::MakeSpan(in).subspan(shift + 1, size)}}, "odd"));
      const std::vector<std::byte> expected = Pattern(previous + size, size);
      DSD_RETURN_IF_ERROR(Check(std::equal(expected.begin(), expected.end(),
                                           in.begin() + shift + 1) &&
                                    in[shift] == std::byte{0x5a} &&
                                    in[shift + 1 + size] == std::byte{0x5a},
                                absl::StrCat(size, " bytes at ", shift)));
    }
  }
  return absl::OkStatus();
}

DSD_CONFORMANCE_CASE_FROM(MemoryThatOnlyCanBeRead, 2) {
  Pages out(size_t{1} << 20);
  DSD_RETURN_IF_ERROR(Check(out.ok(), "mmap"));
  const std::vector<std::byte> mine = Pattern(comm.rank(), out.span().size());
  std::copy(mine.begin(), mine.end(), out.span().begin());
  mprotect(out.span().data(), out.span().size(), PROT_READ);
  const int next = (comm.rank() + 1) % comm.size();
  const int previous = (comm.rank() + comm.size() - 1) % comm.size();
  std::vector<std::byte> in(mine.size());
  DSD_RETURN_IF_ERROR(comm.Exchange({{next, out.span()}},
                                    {{previous, absl::MakeSpan(in)}}, "ring"));
  return Check(in == Pattern(previous, in.size()), "ring");
}

// Sizes of more than 32 bits, signed or not, end nowhere.
DSD_CONFORMANCE_CASE_ON(AMessageOfOver2GiB, 2, 2) {
  constexpr size_t kBytes = (size_t{2} << 30) + 17;
  constexpr size_t kStep = size_t{4} << 20;
  Pages memory(kBytes);
  DSD_RETURN_IF_ERROR(Check(memory.ok(), "mmap"));
  const absl::Span<std::byte> data = memory.span();
  // Pages that nobody has written are all the same one of zeros.
  const auto mark = [](size_t at) { return std::byte(at / kStep * 7 + 1); };
  if (comm.rank() == 0) {
    for (size_t at = 0; at < kBytes; at += kStep) data[at] = mark(at);
    data.back() = std::byte{0xee};
    return comm.Exchange({{1, data}}, {}, "large");
  }
  DSD_RETURN_IF_ERROR(comm.Exchange({}, {{0, data}}, "large"));
  for (size_t at = 0; at < kBytes; at += kStep) {
    DSD_RETURN_IF_ERROR(
        Check(data[at] == mark(at), absl::StrCat("the byte at ", at)));
  }
  return Check(data.back() == std::byte{0xee}, "the last byte");
}

}  // namespace
}  // namespace dsd
