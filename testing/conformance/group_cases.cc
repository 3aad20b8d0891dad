// SPDX-License-Identifier: Apache-2.0
//
// Lanes and parts of a group: who is in them, and whose bytes go where.

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/testing/conformance/conformance.h"

namespace dsd {
namespace {

absl::Status Meet(Communicator& comm, absl::string_view who, int rank,
                  int size) {
  DSD_RETURN_IF_ERROR(
      Check(comm.rank() == rank && comm.size() == size,
            absl::StrCat(who, ": rank ", comm.rank(), " of ", comm.size(),
                         ", expected ", rank, " of ", size)));
  return comm.Barrier();
}

// Which ranks of the group are in it, in its order.
absl::StatusOr<std::string> Members(Communicator& part, int own) {
  DSD_ASSIGN_OR_RETURN(const std::vector<std::string> names,
                       part.AllGatherBlobs(absl::StrCat(own), 20));
  std::string all;
  for (const std::string& name : names) absl::StrAppend(&all, name, " ");
  return all;
}

// Every call there is, on a part of the group.
absl::Status UseAll(Communicator& part, uint64_t seed) {
  const int rank = part.rank();
  const int size = part.size();
  DSD_RETURN_IF_ERROR(part.Barrier());
  for (int root = 0; root < size; ++root) {
    for (const size_t bytes : {size_t{100}, size_t{3} << 20}) {
      const std::vector<std::byte> expected = Pattern(seed + root, bytes);
      std::vector<std::byte> data =
          rank == root ? expected : std::vector<std::byte>(bytes);
      DSD_RETURN_IF_ERROR(part.Broadcast(absl::MakeSpan(data), root));
      DSD_RETURN_IF_ERROR(Check(data == expected, "broadcast in a part"));
    }
    std::vector<std::vector<std::byte>> parts;
    std::vector<absl::Span<const std::byte>> spans;
    for (int r = 0; r < size && rank == root; ++r) {
      parts.push_back(Pattern(seed + 10 * root + r, 1000 * r));
    }
    for (const auto& one : parts) spans.push_back(one);
    std::vector<std::byte> mine(1000 * rank);
    DSD_RETURN_IF_ERROR(part.Scatter(spans, absl::MakeSpan(mine), root));
    DSD_RETURN_IF_ERROR(
        Check(mine == Pattern(seed + 10 * root + rank, 1000 * rank),
              "scatter in a part"));
  }
  std::vector<std::vector<std::byte>> gathered(size,
                                               std::vector<std::byte>(20000));
  std::vector<absl::Span<std::byte>> spans;
  for (auto& one : gathered) spans.push_back(absl::MakeSpan(one));
  DSD_RETURN_IF_ERROR(part.AllGather(Pattern(seed + rank, 20000), spans));
  for (int r = 0; r < size; ++r) {
    DSD_RETURN_IF_ERROR(
        Check(gathered[r] == Pattern(seed + r, 20000), "gather in a part"));
  }
  for (const size_t count : {size_t{3}, size_t{300000}}) {
    std::vector<int64_t> values(count, rank + 1);
    DSD_RETURN_IF_ERROR(part.AllReduce(
        absl::MakeSpan(reinterpret_cast<std::byte*>(values.data()), 8 * count),
        DType::kInt64, ReduceOp::kSum));
    DSD_RETURN_IF_ERROR(
        Check(values.back() == size * (size + 1) / 2, "sum in a part"));
  }
  const int next = (rank + 1) % size;
  const int previous = (rank + size - 1) % size;
  std::vector<std::byte> in(50000);
  DSD_RETURN_IF_ERROR(part.Exchange({{next, Pattern(seed + rank, 50000)}},
                                    {{previous, absl::MakeSpan(in)}}, "ring"));
  return Check(in == Pattern(seed + previous, 50000), "ring in a part");
}

DSD_CONFORMANCE_CASE(SplitIntoOne) {
  DSD_ASSIGN_OR_RETURN(const auto same, comm.Split(0, 0));
  DSD_RETURN_IF_ERROR(Meet(*same, "same", comm.rank(), comm.size()));
  DSD_ASSIGN_OR_RETURN(const auto reversed, comm.Split(7, -comm.rank()));
  return Meet(*reversed, "reversed", comm.size() - 1 - comm.rank(),
              comm.size());
}

DSD_CONFORMANCE_CASE(SplitIntoSingles) {
  DSD_ASSIGN_OR_RETURN(const auto single, comm.Split(comm.rank(), 0));
  DSD_RETURN_IF_ERROR(Meet(*single, "single", 0, 1));
  return UseAll(*single, 1);
}

DSD_CONFORMANCE_CASE(SplitOfNone) {
  DSD_ASSIGN_OR_RETURN(const auto none, comm.Split(-1, 0));
  DSD_RETURN_IF_ERROR(Check(none == nullptr, "a color below 0"));
  return comm.Barrier();
}

DSD_CONFORMANCE_CASE_FROM(SplitLeavesSomeOut, 2) {
  const bool out = comm.rank() == 0;
  DSD_ASSIGN_OR_RETURN(const auto part, comm.Split(out ? -5 : 1, comm.rank()));
  DSD_RETURN_IF_ERROR(Check((part == nullptr) == out, "who is left out"));
  if (!out) {
    DSD_RETURN_IF_ERROR(Meet(*part, "part", comm.rank() - 1, comm.size() - 1));
    DSD_RETURN_IF_ERROR(UseAll(*part, 5));
  }
  return comm.Barrier();
}

DSD_CONFORMANCE_CASE_FROM(SplitByParityWithReversedKeys, 2) {
  const int color = comm.rank() % 2;
  DSD_ASSIGN_OR_RETURN(const auto part, comm.Split(color, -comm.rank()));
  std::string expected;
  for (int r = comm.size(); r-- > 0;) {
    if (r % 2 == color) absl::StrAppend(&expected, r, " ");
  }
  DSD_ASSIGN_OR_RETURN(const std::string members, Members(*part, comm.rank()));
  DSD_RETURN_IF_ERROR(
      Check(members == expected,
            absl::StrCat("members ", members, ", expected ", expected)));
  DSD_RETURN_IF_ERROR(UseAll(*part, 100 * color));
  return part->Shutdown();
}

DSD_CONFORMANCE_CASE_FROM(SplitOfASplit, 3) {
  // Without the last; then that without its first.
  DSD_ASSIGN_OR_RETURN(const auto first,
                       comm.Split(comm.rank() == comm.size() - 1 ? -1 : 0, 0));
  if (first != nullptr) {
    DSD_ASSIGN_OR_RETURN(const auto second,
                         first->Split(first->rank() == 0 ? -1 : 0, 0));
    if (second != nullptr) {
      DSD_RETURN_IF_ERROR(
          Meet(*second, "second", comm.rank() - 1, comm.size() - 2));
      DSD_RETURN_IF_ERROR(UseAll(*second, 9));
      DSD_ASSIGN_OR_RETURN(const auto lane, second->OpenLane("lane of it"));
      DSD_RETURN_IF_ERROR(
          Meet(*lane, "lane of the second", comm.rank() - 1, comm.size() - 2));
    }
  }
  return comm.Barrier();
}

DSD_CONFORMANCE_CASE_FROM(ParentAndChildInterleave, 2) {
  DSD_ASSIGN_OR_RETURN(const auto part, comm.Split(comm.rank() % 2, 0));
  for (int i = 0; i < 10; ++i) {
    DSD_RETURN_IF_ERROR(part->Barrier());
    std::vector<std::byte> data(1000, std::byte(i));
    DSD_RETURN_IF_ERROR(comm.Broadcast(absl::MakeSpan(data), i % comm.size()));
    DSD_RETURN_IF_ERROR(
        part->Broadcast(absl::MakeSpan(data), i % part->size()));
  }
  return comm.Barrier();
}

DSD_CONFORMANCE_CASE_FROM(ChildrenInTwoThreads, 2) {
  DSD_ASSIGN_OR_RETURN(const auto all, comm.Split(0, comm.rank()));
  DSD_ASSIGN_OR_RETURN(const auto part, comm.Split(comm.rank() % 2, 0));
  absl::Status other;
  auto thread =
      comm.env()->StartThread("part", [&] { other = UseAll(*part, 3); });
  const absl::Status mine = UseAll(*all, 4);
  thread.reset();
  DSD_RETURN_IF_ERROR(mine);
  return other;
}

// One fate, and the names of the group: what a child says is found elsewhere.
DSD_CONFORMANCE_CASE_FROM(AnErrorOfAChildIsEverybodys, 3) {
  const int last = comm.size() - 1;
  DSD_ASSIGN_OR_RETURN(const auto part,
                       comm.Split(comm.rank() == 0 ? -1 : 0, 0));
  // All have it; who is ahead may fail the others' barrier already.
  comm.Barrier().IgnoreError();
  if (comm.rank() == last) {
    part->Abort(absl::DataLossError("a bad block"));
  } else {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  }
  if (part != nullptr) {
    DSD_RETURN_IF_ERROR(Expect(part->Barrier(), absl::StatusCode::kAborted,
                               {absl::StrCat("rank ", last), "a bad block"}));
  }
  return Expect(comm.Barrier(), absl::StatusCode::kAborted,
                {absl::StrCat("rank ", last, " aborted"), "a bad block"});
}

DSD_CONFORMANCE_CASE_FROM(AMismatchInAChild, 3) {
  DSD_ASSIGN_OR_RETURN(const auto part,
                       comm.Split(comm.rank() == 0 ? -1 : 0, 0));
  // All have it; who is ahead may fail the others' barrier already.
  comm.Barrier().IgnoreError();
  if (part == nullptr) {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  } else {
    // Rank 1 of it hears a barrier where it expects the bytes.
    std::vector<std::byte> data(8);
    const absl::Status status = part->rank() == 0
                                    ? part->Barrier()
                                    : part->Broadcast(absl::MakeSpan(data), 0);
    if (status.ok()) DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  }
  return Expect(comm.status(), absl::StatusCode::kFailedPrecondition,
                {"ranks disagree", "split 0, color 0", "Barrier",
                 "Broadcast of 8 bytes"});
}

// Who is not in the child is not late for it.
DSD_CONFORMANCE_CASE_FROM(ADeadlineInAChild, 3) {
  DSD_ASSIGN_OR_RETURN(const auto part,
                       comm.Split(comm.rank() == 0 ? -1 : 0, 0));
  const int last = comm.size() - 1;
  if (part == nullptr || comm.rank() == last) {
    DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  } else {
    CallOptions options;
    options.timeout = absl::Seconds(1);
    DSD_RETURN_IF_ERROR(
        Check(!part->Barrier(options).ok(), "the barrier passed"));
  }
  DSD_RETURN_IF_ERROR(
      Expect(comm.status(), absl::StatusCode::kDeadlineExceeded,
             {absl::StrCat("not called by rank ", last, " (")}));
  return Check(comm.status().message().find("rank 0 (") == std::string::npos,
               "rank 0 is blamed");
}

DSD_CONFORMANCE_CASE_FROM(SplitAgainstAnotherCall, 2) {
  const absl::Status status =
      comm.rank() == 0 ? comm.Split(0, 0).status() : comm.Barrier();
  if (status.ok()) DSD_RETURN_IF_ERROR(WaitForFailure(comm));
  return Expect(comm.status(), absl::StatusCode::kFailedPrecondition,
                {"ranks disagree", "Split", "Barrier"});
}

// --- Point to point ---

// Messages of a lane of their own, while the main one is in collectives.
DSD_CONFORMANCE_CASE_FROM(MessagesBesideCollectives, 2) {
  DSD_ASSIGN_OR_RETURN(const auto lane, comm.OpenLane("messages"));
  constexpr int kCount = 30;
  absl::Status sent;
  auto thread = comm.env()->StartThread("messages", [&] {
    sent = [&]() -> absl::Status {
      for (int i = 0; i < kCount; ++i) {
        std::vector<std::byte> data = Pattern(i, 5000 * (i % 7));
        if (comm.rank() == 0) {
          DSD_RETURN_IF_ERROR(lane->Exchange({{1, data}}, {}, "p2p"));
        } else if (comm.rank() == 1) {
          std::vector<std::byte> in(data.size());
          DSD_RETURN_IF_ERROR(
              lane->Exchange({}, {{0, absl::MakeSpan(in)}}, "p2p"));
          DSD_RETURN_IF_ERROR(Check(in == data, "p2p"));
        }
      }
      return absl::OkStatus();
    }();
  });
  absl::Status collective;
  for (int i = 0; i < kCount && collective.ok(); ++i) {
    collective = comm.Barrier();
  }
  thread.reset();
  DSD_RETURN_IF_ERROR(collective);
  return sent;
}

// On one lane, too, a pair may talk while others do not.
DSD_CONFORMANCE_CASE_FROM(APairTalksAlone, 3) {
  if (comm.rank() < 2) {
    const int other = 1 - comm.rank();
    for (int i = 0; i < 20; ++i) {
      const std::vector<std::byte> out = Pattern(comm.rank(), 700 * i);
      std::vector<std::byte> in(out.size());
      DSD_RETURN_IF_ERROR(
          comm.Exchange({{other, out}}, {{other, absl::MakeSpan(in)}}, "pair"));
      DSD_RETURN_IF_ERROR(Check(in == Pattern(other, 700 * i), "pair"));
    }
  }
  return comm.Barrier();
}

// Named in another order than waited for, and in lists that are cut elsewhere.
DSD_CONFORMANCE_CASE_FROM(ListsAreCutDifferentlyOnTheTwoSides, 2) {
  constexpr int kCount = 9;
  std::vector<std::vector<std::byte>> data;
  for (int i = 0; i < kCount; ++i) data.push_back(Pattern(i, 3000 * i));
  if (comm.rank() == 0) {
    std::vector<SendOp> sends;
    for (const auto& one : data) sends.push_back({1, one});
    DSD_RETURN_IF_ERROR(comm.Exchange(sends, {}, "list"));
  } else if (comm.rank() == 1) {
    std::vector<std::vector<std::byte>> in;
    for (const auto& one : data) in.emplace_back(one.size());
    for (int i = 0; i < kCount; i += 3) {
      DSD_RETURN_IF_ERROR(comm.Exchange({},
                                        {{0, absl::MakeSpan(in[i])},
                                         {0, absl::MakeSpan(in[i + 1])},
                                         {0, absl::MakeSpan(in[i + 2])}},
                                        "list"));
    }
    DSD_RETURN_IF_ERROR(Check(in == data, "list"));
  }
  return comm.Barrier();
}

}  // namespace
}  // namespace dsd
