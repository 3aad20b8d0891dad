// SPDX-License-Identifier: Apache-2.0
//
// Every error reaches all ranks, with the right code and a text that tells.

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/testing/conformance/conformance.h"

namespace dsd {
namespace {

constexpr absl::StatusCode kMismatch = absl::StatusCode::kFailedPrecondition;

// Far below the ten minutes of calls that nobody ends, far above what a busy
// machine adds.
constexpr absl::Duration kSoon = absl::Seconds(20);
// Of calls that are to end at their deadline, after all ranks have made them.
constexpr absl::Duration kTimeout = absl::Seconds(1);

// After an error every call fails at once with its code.
absl::Status ExpectDead(Communicator& comm, absl::StatusCode code) {
  const absl::Time start = comm.env()->Now();
  std::vector<std::byte> data(100);
  DSD_RETURN_IF_ERROR(Expect(comm.status(), code, {}));
  DSD_RETURN_IF_ERROR(Expect(comm.Barrier(), code, {"was not started"}));
  DSD_RETURN_IF_ERROR(
      Expect(comm.Broadcast(absl::MakeSpan(data), 0), code, {}));
  DSD_RETURN_IF_ERROR(
      Expect(comm.Exchange({{0, data}}, {}, "later"), code, {"\"later\""}));
  DSD_RETURN_IF_ERROR(Expect(comm.OpenLane("later").status(), code, {}));
  DSD_RETURN_IF_ERROR(Expect(comm.Shutdown(), code, {}));
  return Check(comm.env()->Now() - start < kSoon,
               "calls after an error take long");
}

DSD_CONFORMANCE_CASE_FROM(AnotherCall, 2) {
  std::vector<std::byte> data(100);
  const absl::Status status = comm.rank() == 1
                                  ? comm.Broadcast(absl::MakeSpan(data), 1)
                                  : comm.Barrier();
  // A rank may be through with its part before the others notice.
  if (status.ok()) {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  }
  DSD_RETURN_IF_ERROR(Expect(
      comm.status(), kMismatch,
      {"ranks disagree", "Barrier", "Broadcast of 100 bytes from rank 1"}));
  return ExpectDead(comm, kMismatch);
}

DSD_CONFORMANCE_CASE_FROM(AnotherSize, 2) {
  std::vector<std::byte> data(comm.rank() == 0 ? 2 << 20 : 1 << 20);
  const absl::Status status = comm.Broadcast(absl::MakeSpan(data), 0);
  if (status.ok()) {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  }
  DSD_RETURN_IF_ERROR(
      Expect(comm.status(), kMismatch,
             {"ranks disagree", "of 2097152 bytes", "of 1048576 bytes"}));
  return ExpectDead(comm, kMismatch);
}

// A message that is longer, or shorter, than the other side expects: it must
// not land, and must not end the process.
absl::Status SizesOfMessages(Communicator& comm, size_t sent, size_t expected) {
  std::vector<std::byte> data(comm.rank() == 0 ? sent : expected);
  absl::Status status;
  if (comm.rank() == 0) {
    status = comm.Exchange({{1, data}}, {}, "sizes");
  } else if (comm.rank() == 1) {
    status = comm.Exchange({}, {{0, absl::MakeSpan(data)}}, "sizes");
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
DSD_CONFORMANCE_CASE_FROM(ALongerMessage, 2) {
  return SizesOfMessages(comm, 3 << 20, 2 << 20);
}
DSD_CONFORMANCE_CASE_FROM(AShorterMessage, 2) {
  return SizesOfMessages(comm, 1 << 20, 2 << 20);
}
DSD_CONFORMANCE_CASE_FROM(AShortMessageForALongOne, 2) {
  return SizesOfMessages(comm, 10, 2 << 20);
}
DSD_CONFORMANCE_CASE_FROM(ALongMessageForAShortOne, 2) {
  return SizesOfMessages(comm, 2 << 20, 0);
}

DSD_CONFORMANCE_CASE_FROM(AnotherLabel, 2) {
  std::vector<std::byte> data(100);
  absl::Status status;
  if (comm.rank() == 0) {
    status = comm.Exchange({{1, data}}, {}, "layer.0");
  } else if (comm.rank() == 1) {
    status = comm.Exchange({}, {{0, absl::MakeSpan(data)}}, "layer.1");
  } else {
    status = comm.Barrier();
  }
  if (status.ok()) {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  }
  DSD_RETURN_IF_ERROR(Expect(
      comm.status(), kMismatch,
      {"exchange \"layer.0\"", "exchange \"layer.1\"", "rank 0", "rank 1"}));
  return ExpectDead(comm, kMismatch);
}

DSD_CONFORMANCE_CASE_FROM(AnotherType, 2) {
  std::vector<std::byte> data(4096);
  const absl::Status status = comm.AllReduce(
      absl::MakeSpan(data), comm.rank() == 0 ? DType::kFloat32 : DType::kInt32,
      ReduceOp::kSum);
  return Expect(status, kMismatch, {"1024 float32 (sum)", "1024 int32 (sum)"});
}

// --- Other pairs of calls that do not fit ---

// All ranks end with a disagreement that names what `parts` are of.
absl::Status Disagreement(Communicator& comm, const absl::Status& returned,
                          absl::Span<const absl::string_view> parts) {
  if (returned.ok()) DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  DSD_RETURN_IF_ERROR(Expect(comm.status(), kMismatch, {"ranks disagree"}));
  return Expect(comm.status(), kMismatch, parts);
}

DSD_CONFORMANCE_CASE_FROM(AnotherReduction, 2) {
  std::vector<std::byte> data(4096);
  return Disagreement(
      comm,
      comm.AllReduce(absl::MakeSpan(data), DType::kInt32,
                     comm.rank() == 0 ? ReduceOp::kSum : ReduceOp::kMax),
      {"(sum)", "(max)"});
}

DSD_CONFORMANCE_CASE_FROM(AnotherCountOfAReduction, 2) {
  std::vector<std::byte> data(comm.rank() == 0 ? 4096 : 4100);
  return Disagreement(
      comm, comm.AllReduce(absl::MakeSpan(data), DType::kInt32, ReduceOp::kSum),
      {"of 1024 int32", "of 1025 int32"});
}

// The sums of the counts are equal, and so are the sizes of some parts.
DSD_CONFORMANCE_CASE_FROM(OtherCountsOfAReduceScatter, 2) {
  std::vector<int64_t> counts(comm.size(), 100);
  if (comm.rank() == 0) {
    counts[0] = 50;
    counts[1] = 150;
  }
  std::vector<std::byte> input(100 * comm.size());
  std::vector<std::byte> output(counts[comm.rank()]);
  return Disagreement(comm,
                      comm.ReduceScatter(input, counts, absl::MakeSpan(output),
                                         DType::kUInt8, ReduceOp::kMax),
                      {"ReduceScatter of uint8 (max)"});
}

DSD_CONFORMANCE_CASE_FROM(OtherPartsOfAnAllGather, 2) {
  std::vector<std::byte> memory(1000 * comm.size());
  std::vector<absl::Span<std::byte>> parts;
  for (int r = 0; r < comm.size(); ++r) {
    parts.push_back(absl::MakeSpan(memory).subspan(1000 * r, 1000));
  }
  // Rank 1 is wrong about the part of another, not about its own.
  if (comm.rank() == 1) parts[0] = parts[0].subspan(1);
  return Disagreement(comm, comm.AllGather(parts[comm.rank()], parts),
                      {"AllGather"});
}

DSD_CONFORMANCE_CASE_FROM(AnotherLimitOfBlobs, 2) {
  return Disagreement(
      comm, comm.AllGatherBlobs("x", comm.rank() == 0 ? 100 : 200).status(),
      {"AllGatherBlobs"});
}

DSD_CONFORMANCE_CASE_FROM(AnotherPartOfAScatter, 2) {
  std::vector<std::byte> data(100);
  std::vector<absl::Span<const std::byte>> parts;
  if (comm.rank() == 0) parts.assign(comm.size(), data);
  const absl::Span<std::byte> mine =
      absl::MakeSpan(data).subspan(comm.rank() == 1 ? 1 : 0);
  return Disagreement(
      comm, comm.Scatter(parts, mine, 0),
      {"rank 0 sends 100 bytes", "rank 1 expects 99 bytes", "Scatter"});
}

// All chunks that the shorter one has are alike.
DSD_CONFORMANCE_CASE_FROM(AnotherPartOfALongScatter, 2) {
  constexpr size_t kMiB = size_t{1} << 20;
  std::vector<std::byte> data(12 * kMiB);
  std::vector<absl::Span<const std::byte>> parts;
  if (comm.rank() == 0) {
    parts.assign(comm.size(), absl::MakeConstSpan(data).first(1));
    parts[1] = data;
  }
  const absl::Span<std::byte> mine =
      absl::MakeSpan(data).first(comm.rank() == 1 ? 8 * kMiB : 1);
  return Disagreement(comm, comm.Scatter(parts, mine, 0),
                      {"Scatter from rank 0, part of 12582912 bytes",
                       "Scatter from rank 0, part of 8388608 bytes"});
}

DSD_CONFORMANCE_CASE_FROM(AScatterAgainstABroadcast, 2) {
  std::vector<std::byte> data(100);
  std::vector<absl::Span<const std::byte>> parts;
  if (comm.rank() == 0) parts.assign(comm.size(), data);
  return Disagreement(comm,
                      comm.rank() == 0
                          ? comm.Scatter(parts, absl::MakeSpan(data), 0)
                          : comm.Broadcast(absl::MakeSpan(data), 0),
                      {"Scatter from rank 0", "Broadcast of 100 bytes"});
}

DSD_CONFORMANCE_CASE_FROM(AnotherOrderOfCalls, 2) {
  std::vector<std::byte> data(1000);
  absl::Status status;
  for (int i = 0; i < 2 && status.ok(); ++i) {
    status = (comm.rank() == 0) == (i == 0)
                 ? comm.AllReduce(absl::MakeSpan(data), DType::kUInt8,
                                  ReduceOp::kSum)
                 : comm.AllGatherBlobs("x", 10).status();
  }
  return Disagreement(comm, status, {"AllReduce", "AllGatherBlobs"});
}

DSD_CONFORMANCE_CASE_FROM(AMessageAgainstABarrier, 2) {
  std::vector<std::byte> data(100);
  absl::Status status;
  if (comm.rank() == 1) {
    status = comm.Exchange({}, {{0, absl::MakeSpan(data)}}, "w");
  } else {
    status = comm.Barrier();
  }
  return Disagreement(comm, status, {"exchange \"w\"", "Barrier"});
}

DSD_CONFORMANCE_CASE_FROM(AnotherCallOnALane, 2) {
  DSD_ASSIGN_OR_RETURN(const auto lane, comm.OpenLane("weights"));
  // All have it; who is ahead may fail the others' barrier already.
  comm.Barrier().IgnoreError();
  std::vector<std::byte> data(8);
  const absl::Status status =
      comm.rank() == 1
          ? lane->AllReduce(absl::MakeSpan(data), DType::kInt64, ReduceOp::kSum)
          : lane->AllGatherBlobs("x", 10).status();
  return Disagreement(comm, status,
                      {"lane \"weights\"", "AllReduce", "AllGatherBlobs"});
}

// --- Ranks that name different roots ---

using RootedCall = absl::Status (*)(Communicator& comm, int root);

template <size_t kBytes>
absl::Status BroadcastFrom(Communicator& comm, int root) {
  std::vector<std::byte> data(kBytes);
  return comm.Broadcast(absl::MakeSpan(data), root);
}
template <size_t kBytes>
absl::Status ScatterFrom(Communicator& comm, int root) {
  std::vector<std::byte> data(kBytes);
  std::vector<absl::Span<const std::byte>> parts;
  if (comm.rank() == root) parts.assign(comm.size(), data);
  return comm.Scatter(parts, absl::MakeSpan(data), root);
}

// Noticed in this call, by one rank at least, and long before its deadline: no
// other call comes.
absl::Status DifferentRoots(Communicator& comm, RootedCall call, int root) {
  const absl::Time start = comm.env()->Now();
  DSD_RETURN_IF_ERROR(
      Disagreement(comm, call(comm, root), {"from rank 0", "from rank 1"}));
  return Check(comm.env()->Now() - start < kSoon, "it took long");
}

// For groups of up to `most` ranks.
#define DSD_CASES_OF_ROOTS(name, call, most)                             \
  /* Each of the first two sends to the other, and waits for nothing. */ \
  DSD_CONFORMANCE_CASE_ON(name##FromTwoRoots, 2, most) {                 \
    return DifferentRoots(comm, &call, comm.rank() == 0 ? 0 : 1);        \
  }                                                                      \
  /* Each of them waits for the other. */                                \
  DSD_CONFORMANCE_CASE_ON(name##FromNoRoot, 2, most) {                   \
    return DifferentRoots(comm, &call, comm.rank() == 0 ? 1 : 0);        \
  }                                                                      \
  /* The one that errs has no part in what the others do. */             \
  DSD_CONFORMANCE_CASE_ON(name##FromAnotherRootForTheLast, 3, most) {    \
    return DifferentRoots(comm, &call, comm.rank() == comm.size() - 1);  \
  }

DSD_CASES_OF_ROOTS(BroadcastOfLittle, BroadcastFrom<100>, 64)
DSD_CASES_OF_ROOTS(BroadcastOfMuch, BroadcastFrom<(9 << 20)>, 4)
DSD_CASES_OF_ROOTS(ScatterOfLittle, ScatterFrom<100>, 64)
DSD_CASES_OF_ROOTS(ScatterOfMuch, ScatterFrom<(5 << 20)>, 4)

// Of the five ranks the root gives each other a slice.
DSD_CONFORMANCE_CASE_ON(SlicedBroadcastFromTwoRoots, 5, 5) {
  return DifferentRoots(comm, &BroadcastFrom<(9 << 20)>,
                        comm.rank() == 0 ? 0 : 1);
}

// Who gives or gets nothing must not miss it.
DSD_CONFORMANCE_CASE_FROM(OtherRanksInAReduceScatter, 3) {
  std::vector<int64_t> counts(comm.size(), 0);
  counts[comm.rank() == 0 ? 0 : comm.size() - 1] = 100;
  std::vector<std::byte> input(100);
  std::vector<std::byte> output(counts[comm.rank()]);
  const absl::Time start = comm.env()->Now();
  DSD_RETURN_IF_ERROR(
      Disagreement(comm,
                   comm.ReduceScatter(input, counts, absl::MakeSpan(output),
                                      DType::kUInt8, ReduceOp::kMax),
                   {"ReduceScatter of uint8 (max)"}));
  return Check(comm.env()->Now() - start < kSoon, "it took long");
}

// --- Arguments that are wrong on one rank ---

using ArgumentCall = absl::Status (*)(Communicator& comm, bool wrong);

absl::Status BroadcastRoot(Communicator& comm, bool wrong) {
  std::vector<std::byte> data(100);
  return comm.Broadcast(absl::MakeSpan(data), wrong ? comm.size() : 0);
}
absl::Status ScatterRoot(Communicator& comm, bool wrong) {
  std::vector<std::byte> data(100);
  std::vector<absl::Span<const std::byte>> parts;
  if (comm.rank() == 0) parts.assign(comm.size(), data);
  return comm.Scatter(parts, absl::MakeSpan(data), wrong ? -1 : 0);
}
absl::Status ScatterParts(Communicator& comm, bool wrong) {
  std::vector<std::byte> data(100);
  std::vector<absl::Span<const std::byte>> parts;
  if (comm.rank() == 0 || wrong) parts.assign(comm.size() + wrong, data);
  return comm.Scatter(parts, absl::MakeSpan(data), 0);
}
// The last rank is the root.
absl::Status ScatterPartOfTheRoot(Communicator& comm, bool wrong) {
  std::vector<std::byte> data(100);
  std::vector<absl::Span<const std::byte>> parts;
  if (comm.rank() == comm.size() - 1) parts.assign(comm.size(), data);
  return comm.Scatter(parts, absl::MakeSpan(data).subspan(wrong ? 1 : 0),
                      comm.size() - 1);
}
absl::Status AllGatherParts(Communicator& comm, bool wrong) {
  std::vector<std::byte> data(100 * comm.size());
  std::vector<absl::Span<std::byte>> parts;
  for (int r = wrong ? 1 : 0; r < comm.size(); ++r) {
    parts.push_back(absl::MakeSpan(data).subspan(100 * r, 100));
  }
  return comm.AllGather(std::vector<std::byte>(100), parts);
}
absl::Status AllGatherOwnPart(Communicator& comm, bool wrong) {
  std::vector<std::byte> data(100 * comm.size());
  std::vector<absl::Span<std::byte>> parts;
  for (int r = 0; r < comm.size(); ++r) {
    parts.push_back(absl::MakeSpan(data).subspan(100 * r, 100));
  }
  return comm.AllGather(std::vector<std::byte>(wrong ? 99 : 100), parts);
}
absl::Status BlobsLimit(Communicator& comm, bool wrong) {
  return comm.AllGatherBlobs("x", wrong ? -5 : 5).status();
}
absl::Status ReduceScatterCount(Communicator& comm, bool wrong) {
  std::vector<int64_t> counts(comm.size(), 100);
  if (wrong) counts[0] = -3;
  const std::vector<std::byte> input(100 * comm.size());
  std::vector<std::byte> output(100);
  return comm.ReduceScatter(input, counts, absl::MakeSpan(output),
                            DType::kUInt8, ReduceOp::kMax);
}
absl::Status ReduceScatterCounts(Communicator& comm, bool wrong) {
  const std::vector<std::byte> input(100 * comm.size());
  std::vector<std::byte> output(100);
  return comm.ReduceScatter(
      input, std::vector<int64_t>(comm.size() + wrong, 100),
      absl::MakeSpan(output), DType::kUInt8, ReduceOp::kMax);
}
absl::Status ReduceScatterInput(Communicator& comm, bool wrong) {
  const std::vector<std::byte> input(100 * comm.size() + wrong);
  std::vector<std::byte> output(100);
  return comm.ReduceScatter(input, std::vector<int64_t>(comm.size(), 100),
                            absl::MakeSpan(output), DType::kUInt8,
                            ReduceOp::kMax);
}
absl::Status ReduceScatterOutput(Communicator& comm, bool wrong) {
  const std::vector<std::byte> input(100 * comm.size());
  std::vector<std::byte> output(wrong ? 99 : 100);
  return comm.ReduceScatter(input, std::vector<int64_t>(comm.size(), 100),
                            absl::MakeSpan(output), DType::kUInt8,
                            ReduceOp::kMax);
}
absl::Status ReduceScatterType(Communicator& comm, bool wrong) {
  const std::vector<std::byte> input(100 * comm.size());
  std::vector<std::byte> output(100);
  return comm.ReduceScatter(
      input, std::vector<int64_t>(comm.size(), 100), absl::MakeSpan(output),
      wrong ? DType::kFloat8E4M3FN : DType::kUInt8, ReduceOp::kMax);
}
absl::Status AllReduceBytes(Communicator& comm, bool wrong) {
  std::vector<std::byte> data(wrong ? 10 : 12);
  return comm.AllReduce(absl::MakeSpan(data), DType::kInt32, ReduceOp::kSum);
}
absl::Status AllReduceType(Communicator& comm, bool wrong) {
  std::vector<std::byte> data(8);
  return comm.AllReduce(absl::MakeSpan(data),
                        wrong ? DType::kComplex64 : DType::kInt32,
                        ReduceOp::kSum);
}
absl::Status AllReduceOfBools(Communicator& comm, bool wrong) {
  std::vector<std::byte> data(8);
  return comm.AllReduce(absl::MakeSpan(data), DType::kBool,
                        wrong ? ReduceOp::kSum : ReduceOp::kMax);
}
absl::Status OpenLaneName(Communicator& comm, bool wrong) {
  return comm.OpenLane(wrong ? "" : "lane").status();
}
// Each rank hears from the one before, and the first from nobody that is there.
absl::Status ExchangePeer(Communicator& comm, bool wrong) {
  const int next = (comm.rank() + 1) % comm.size();
  const int previous = (comm.rank() + comm.size() - 1) % comm.size();
  const std::vector<std::byte> out(100);
  std::vector<std::byte> in(100);
  return comm.Exchange({{wrong ? -1 : next, out}},
                       {{previous, absl::MakeSpan(in)}}, "ring");
}
absl::Status ExchangeMemory(Communicator& comm, bool wrong) {
  const std::vector<std::byte> out(100);
  std::vector<std::byte> in(100);
  MemorySpace space;
  // No backend moves it within a rank.
  if (wrong) space.type = DeviceType::kCuda;
  return comm.Exchange({{comm.rank(), out, space}},
                       {{comm.rank(), absl::MakeSpan(in)}}, "itself");
}
// One fate with the group, and the names of the group.
absl::Status BroadcastRootOnAPart(Communicator& comm, bool wrong) {
  DSD_ASSIGN_OR_RETURN(const auto part,
                       comm.Split(comm.rank() == 0 ? -1 : 0, 0));
  // All have it; who is ahead may fail the others' barrier already.
  comm.Barrier().IgnoreError();
  return part == nullptr ? absl::OkStatus() : BroadcastRoot(*part, wrong);
}

// It is the error of all, at once, and names rank and argument.
absl::Status WrongOnOneRank(Communicator& comm, ArgumentCall call,
                            absl::StatusCode code, absl::string_view what) {
  const int wrong = comm.size() - 1;
  const absl::Time start = comm.env()->Now();
  const absl::Status returned = call(comm, comm.rank() == wrong);
  if (comm.rank() == wrong) {
    DSD_RETURN_IF_ERROR(Expect(returned, code, {what}));
  } else if (returned.ok()) {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  }
  DSD_RETURN_IF_ERROR(Expect(comm.status(), code,
                             {absl::StrCat("on rank ", wrong, " of"), what}));
  DSD_RETURN_IF_ERROR(Check(comm.env()->Now() - start < kSoon, "it took long"));
  return ExpectDead(comm, code);
}

#define DSD_CASE_OF_ARGUMENT(call, code, what)                        \
  DSD_CONFORMANCE_CASE_ON(AWrong##call##OnOneRank, 3, 3) {            \
    return WrongOnOneRank(comm, &call, absl::StatusCode::code, what); \
  }

DSD_CASE_OF_ARGUMENT(BroadcastRoot, kInvalidArgument, "root 3 is not in [0, 3)")
DSD_CASE_OF_ARGUMENT(ScatterRoot, kInvalidArgument, "root -1 is not in [0, 3)")
DSD_CASE_OF_ARGUMENT(ScatterParts, kInvalidArgument,
                     "4 parts, expected none but on the root")
DSD_CASE_OF_ARGUMENT(ScatterPartOfTheRoot, kInvalidArgument,
                     "has 100 bytes, expected 99")
DSD_CASE_OF_ARGUMENT(AllGatherParts, kInvalidArgument, "2 parts")
DSD_CASE_OF_ARGUMENT(AllGatherOwnPart, kInvalidArgument,
                     "100 bytes, expected 99")
DSD_CASE_OF_ARGUMENT(BlobsLimit, kInvalidArgument, "max_bytes_each is -5")
DSD_CASE_OF_ARGUMENT(ReduceScatterCount, kInvalidArgument,
                     "count -3 is out of range")
DSD_CASE_OF_ARGUMENT(ReduceScatterCounts, kInvalidArgument, "4 counts")
DSD_CASE_OF_ARGUMENT(ReduceScatterInput, kInvalidArgument,
                     "input has 301 bytes, expected 300")
DSD_CASE_OF_ARGUMENT(ReduceScatterOutput, kInvalidArgument,
                     "output has 99 bytes, expected 100")
DSD_CASE_OF_ARGUMENT(ReduceScatterType, kUnimplemented, "no max of float8")
DSD_CASE_OF_ARGUMENT(AllReduceBytes, kInvalidArgument, "10 bytes")
DSD_CASE_OF_ARGUMENT(AllReduceType, kUnimplemented, "no sum of complex64")
DSD_CASE_OF_ARGUMENT(AllReduceOfBools, kUnimplemented, "no sum of bool")
DSD_CASE_OF_ARGUMENT(OpenLaneName, kInvalidArgument, "the name has 0 bytes")
DSD_CASE_OF_ARGUMENT(ExchangePeer, kInvalidArgument, "peer -1 is not in [0, 3)")
DSD_CASE_OF_ARGUMENT(ExchangeMemory, kInvalidArgument, "must be in host memory")
DSD_CASE_OF_ARGUMENT(BroadcastRootOnAPart, kInvalidArgument,
                     "root 2 is not in [0, 2)")

// That all make the same mistake makes no difference.
DSD_CONFORMANCE_CASE(AWrongArgumentOnAllRanks) {
  const absl::Status status = BroadcastRoot(comm, true);
  DSD_RETURN_IF_ERROR(
      Expect(status, absl::StatusCode::kInvalidArgument,
             {absl::StrCat("root ", comm.size(), " is not in")}));
  return ExpectDead(comm, absl::StatusCode::kInvalidArgument);
}

// A group that has failed says so first.
DSD_CONFORMANCE_CASE(AWrongArgumentAfterAnError) {
  comm.Abort(absl::DataLossError("a bad block"));
  return Expect(BroadcastRoot(comm, true), absl::StatusCode::kAborted,
                {"a bad block"});
}

DSD_CONFORMANCE_CASE_FROM(LanesOfDifferentNames, 2) {
  return Expect(comm.OpenLane(comm.rank() == 0 ? "left" : "right").status(),
                kMismatch, {"\"left\"", "\"right\""});
}

DSD_CONFORMANCE_CASE_FROM(ARankThatDoesNotCall, 2) {
  const int absent = comm.size() - 1;
  if (comm.rank() == absent) {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  } else {
    CallOptions options;
    options.timeout = kTimeout;
    const absl::Time start = comm.env()->Now();
    DSD_RETURN_IF_ERROR(Check(!comm.Barrier(options).ok(), "barrier passed"));
    DSD_RETURN_IF_ERROR(
        Check(comm.env()->Now() - start < kSoon, "the deadline is late"));
  }
  DSD_RETURN_IF_ERROR(Expect(
      comm.status(), absl::StatusCode::kDeadlineExceeded,
      {"Barrier", "within 1s",
       absl::StrCat("not called by rank ", absent, " (is in no call)")}));
  return ExpectDead(comm, absl::StatusCode::kDeadlineExceeded);
}

DSD_CONFORMANCE_CASE_FROM(AMessageThatDoesNotCome, 2) {
  std::vector<std::byte> data(100);
  if (comm.rank() == 0) {
    CallOptions options;
    options.timeout = kTimeout;
    DSD_RETURN_IF_ERROR(Check(
        !comm.Exchange({}, {{1, absl::MakeSpan(data)}}, "w", options).ok(),
        "the message came"));
  } else {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  }
  return Expect(comm.status(), absl::StatusCode::kDeadlineExceeded,
                {"exchange \"w\"", "no message came from rank 1"});
}

DSD_CONFORMANCE_CASE(ATimeoutOfZeroHasPassed) {
  CallOptions options;
  options.timeout = absl::ZeroDuration();
  if (comm.rank() == 0) {
    DSD_RETURN_IF_ERROR(Expect(comm.Barrier(options),
                               absl::StatusCode::kDeadlineExceeded,
                               {"Barrier"}));
  } else {
    DSD_RETURN_IF_ERROR(Expect(
        comm.Barrier(), absl::StatusCode::kDeadlineExceeded, {"rank 0"}));
  }
  return ExpectDead(comm, absl::StatusCode::kDeadlineExceeded);
}

// Abort from another thread, while all ranks wait for a message of rank 0 that
// does not come.
DSD_CONFORMANCE_CASE_FROM(AbortFromAnotherThread, 2) {
  std::vector<std::byte> data(10 << 20);
  absl::Time aborted = absl::InfiniteFuture();
  std::unique_ptr<EnvThread> other;
  if (comm.rank() == 0) {
    // The last rank is waiting by then, or starts to after the abort.
    other = comm.env()->StartThread("abort", [&] {
      comm.env()->SleepUntil(comm.env()->Now() + absl::Milliseconds(100));
      aborted = comm.env()->Now();
      comm.Abort(absl::ResourceExhaustedError("the disk is full"));
      comm.Abort(absl::InternalError("the second reason"));
    });
  }
  const int from = comm.rank() == 0 ? 1 : 0;
  const absl::Status status =
      comm.Exchange({}, {{from, absl::MakeSpan(data)}}, "never");
  if (other != nullptr) {
    other.reset();
    DSD_RETURN_IF_ERROR(
        Check(comm.env()->Now() - aborted < kSoon, "the abort took long"));
  }
  DSD_RETURN_IF_ERROR(
      Expect(status, absl::StatusCode::kAborted,
             {"rank 0 aborted", "RESOURCE_EXHAUSTED: the disk is full",
              "\"never\"", absl::StrCat("on rank ", comm.rank())}));
  return ExpectDead(comm, absl::StatusCode::kAborted);
}

DSD_CONFORMANCE_CASE_FROM(CancelOnOneRank, 2) {
  std::atomic<bool> cancel{false};
  CallOptions options;
  std::vector<std::byte> data(10);
  std::unique_ptr<EnvThread> other;
  if (comm.rank() == 1) {
    options.cancel = &cancel;
    other = comm.env()->StartThread("cancel", [&] {
      comm.env()->SleepUntil(comm.env()->Now() + absl::Milliseconds(50));
      cancel = true;
    });
  }
  const int from = comm.rank() == 0 ? 1 : 0;
  const absl::Status status =
      comm.Exchange({}, {{from, absl::MakeSpan(data)}}, "never", options);
  other.reset();
  DSD_RETURN_IF_ERROR(Expect(status, absl::StatusCode::kCancelled,
                             {"was cancelled on rank 1"}));
  return ExpectDead(comm, absl::StatusCode::kCancelled);
}

// The cause is the first error, and it is everybody's.
DSD_CONFORMANCE_CASE_FROM(ARankThatLeaves, 2) {
  if (comm.rank() == 0) {
    comm.Abort(absl::NotFoundError("no such file"));
    return Expect(comm.status(), absl::StatusCode::kAborted, {"no such file"});
  }
  return Expect(comm.Barrier(), absl::StatusCode::kAborted,
                {"rank 0 aborted", "NOT_FOUND: no such file"});
}

DSD_CONFORMANCE_CASE_FROM(AnExchangeThatIsGivenUp, 2) {
  std::vector<std::byte> data(10 << 20);
  if (comm.rank() == 0) {
    DSD_RETURN_IF_ERROR(
        comm.StartExchange({}, {{1, absl::MakeSpan(data)}}, "given up")
            .status());
  } else {
    DSD_RETURN_IF_ERROR(Check(!comm.Barrier().ok(), "barrier passed"));
  }
  return Expect(comm.status(), absl::StatusCode::kAborted,
                {"\"given up\" on rank 0", "before Wait"});
}

}  // namespace
}  // namespace dsd
