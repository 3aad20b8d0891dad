// SPDX-License-Identifier: Apache-2.0
//
// Every call delivers the right bytes.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/half.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/testing/conformance/conformance.h"

namespace dsd {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kSizes[] = {0,     1,     7,     784,  4095,     4097,
                             16383, 16384, 16385, kMiB, kMiB + 1, 5 * kMiB - 3};

template <class T>
absl::Span<std::byte> BytesOf(std::vector<T>& v) {
  return absl::MakeSpan(reinterpret_cast<std::byte*>(v.data()),
                        v.size() * sizeof(T));
}

absl::Status BroadcastOnce(Communicator& comm, int root, size_t size,
                           size_t misalignment) {
  const std::vector<std::byte> expected = Pattern(root * 1000 + size, size);
  std::vector<std::byte> memory(size + misalignment + 1, std::byte{0x5a});
  const absl::Span<std::byte> data =
      absl::MakeSpan(memory).subspan(misalignment, size);
  if (comm.rank() == root) {
    std::copy(expected.begin(), expected.end(), data.begin());
  }
  DSD_RETURN_IF_ERROR(comm.Broadcast(data, root));
  DSD_RETURN_IF_ERROR(Check(
      std::equal(data.begin(), data.end(), expected.begin()),
      absl::StrCat("Broadcast of ", size, " from ", root, ": wrong bytes")));
  return Check(memory.back() == std::byte{0x5a}, "wrote behind the end");
}

DSD_CONFORMANCE_CASE(BroadcastFromEachRoot) {
  for (int root = 0; root < comm.size(); ++root) {
    for (const size_t size : kSizes) {
      DSD_RETURN_IF_ERROR(BroadcastOnce(comm, root, size, size % 4));
    }
  }
  return absl::OkStatus();
}

DSD_CONFORMANCE_CASE_FROM(BroadcastOf64MiB, 2) {
  return BroadcastOnce(comm, comm.size() - 1, 64 * kMiB, 1);
}

// Cut into slices, since there are more ranks than chunks.
DSD_CONFORMANCE_CASE_ON(BroadcastToMany, 8, 8) {
  for (const size_t size : {8 * kMiB, 8 * kMiB + 1, 16 * kMiB + 5}) {
    for (const int root : {0, 3, 7}) {
      DSD_RETURN_IF_ERROR(BroadcastOnce(comm, root, size, 1));
    }
  }
  return absl::OkStatus();
}

absl::Status AllGatherOnce(Communicator& comm, const std::vector<size_t>& sizes,
                           bool in_place) {
  // The parts lie in one piece of memory, in reversed order, at odd places.
  size_t total = 1;
  for (const size_t size : sizes) total += size + 3;
  std::vector<std::byte> memory(total, std::byte{0x5a});
  std::vector<absl::Span<std::byte>> parts(sizes.size());
  size_t at = 1;
  for (size_t r = sizes.size(); r-- > 0;) {
    parts[r] = absl::MakeSpan(memory).subspan(at, sizes[r]);
    at += sizes[r] + 3;
  }
  const std::vector<std::byte> mine =
      Pattern(comm.rank() + 7, sizes[comm.rank()]);
  if (in_place) {
    std::copy(mine.begin(), mine.end(), parts[comm.rank()].begin());
    DSD_RETURN_IF_ERROR(comm.AllGather(parts[comm.rank()], parts));
  } else {
    DSD_RETURN_IF_ERROR(comm.AllGather(mine, parts));
  }
  for (size_t r = 0; r < sizes.size(); ++r) {
    const std::vector<std::byte> expected = Pattern(r + 7, sizes[r]);
    DSD_RETURN_IF_ERROR(
        Check(std::equal(parts[r].begin(), parts[r].end(), expected.begin()),
              absl::StrCat("AllGather: part ", r, " of ", sizes[r],
                           " bytes is wrong")));
  }
  return absl::OkStatus();
}

DSD_CONFORMANCE_CASE(AllGatherOfEqualAndUnequalParts) {
  const int world = comm.size();
  for (const size_t size : kSizes) {
    DSD_RETURN_IF_ERROR(
        AllGatherOnce(comm, std::vector<size_t>(world, size), size % 2 == 0));
    std::vector<size_t> uneven;
    for (int r = 0; r < world; ++r) uneven.push_back(size * r + r);
    DSD_RETURN_IF_ERROR(AllGatherOnce(comm, uneven, size % 2 == 1));
  }
  std::vector<size_t> one(world, 0);
  one[world - 1] = 70000;
  return AllGatherOnce(comm, one, false);
}

DSD_CONFORMANCE_CASE_FROM(AllGatherOf64MiB, 2) {
  return AllGatherOnce(
      comm, std::vector<size_t>(comm.size(), 64 * kMiB / comm.size()), true);
}

DSD_CONFORMANCE_CASE(BlobsOfAnySize) {
  const auto blob = [](int rank, size_t size) {
    const std::vector<std::byte> bytes = Pattern(rank + 99, size);
    return std::string(reinterpret_cast<const char*>(bytes.data()), size);
  };
  const size_t sizes[] = {0, 1, 32, 1015, 1016, 1017, 50000, 8 * kMiB};
  for (const size_t size : sizes) {
    for (const bool uneven : {false, true}) {
      const auto size_of = [&](int r) {
        return uneven ? size * (r + 1) / (comm.size() + 1) : size;
      };
      DSD_ASSIGN_OR_RETURN(
          const std::vector<std::string> all,
          comm.AllGatherBlobs(blob(comm.rank(), size_of(comm.rank())), size));
      DSD_RETURN_IF_ERROR(
          Check(static_cast<int>(all.size()) == comm.size(), "blobs: count"));
      for (int r = 0; r < comm.size(); ++r) {
        DSD_RETURN_IF_ERROR(
            Check(all[r] == blob(r, size_of(r)),
                  absl::StrCat("blob of rank ", r, ", ", size)));
      }
    }
  }
  return absl::OkStatus();
}

DSD_CONFORMANCE_CASE(ABlobThatIsTooLongFailsEverywhere) {
  const std::string mine(comm.rank() == comm.size() - 1 ? 1001 : 1000, 'x');
  return Expect(comm.AllGatherBlobs(mine, 1000).status(),
                absl::StatusCode::kFailedPrecondition,
                {absl::StrCat("rank ", comm.size() - 1), "1001 bytes", "1000"});
}

// --- Scatter ---

absl::Status ScatterOnce(Communicator& comm, int root,
                         const std::vector<size_t>& sizes, bool in_place,
                         const CallOptions& options = {}) {
  std::vector<std::vector<std::byte>> parts;
  std::vector<absl::Span<const std::byte>> spans;
  if (comm.rank() == root) {
    for (size_t r = 0; r < sizes.size(); ++r) {
      parts.push_back(Pattern(root * 100 + r, sizes[r]));
    }
    for (const auto& part : parts) spans.push_back(part);
  }
  std::vector<std::byte> memory(sizes[comm.rank()]);
  const absl::Span<std::byte> mine = in_place && comm.rank() == root
                                         ? absl::MakeSpan(parts[root])
                                         : absl::MakeSpan(memory);
  DSD_RETURN_IF_ERROR(comm.Scatter(spans, mine, root, options));
  const std::vector<std::byte> expected =
      Pattern(root * 100 + comm.rank(), sizes[comm.rank()]);
  return Check(std::equal(mine.begin(), mine.end(), expected.begin()),
               absl::StrCat("Scatter of ", sizes[comm.rank()], " from ", root));
}

DSD_CONFORMANCE_CASE(ScatterOfEqualParts) {
  for (int root = 0; root < comm.size(); ++root) {
    for (const size_t size : kSizes) {
      DSD_RETURN_IF_ERROR(ScatterOnce(
          comm, root, std::vector<size_t>(comm.size(), size), size % 2 == 0));
    }
  }
  return absl::OkStatus();
}

DSD_CONFORMANCE_CASE(ScatterOfUnequalParts) {
  for (int root = 0; root < comm.size(); ++root) {
    std::vector<size_t> sizes;
    for (int r = 0; r < comm.size(); ++r) sizes.push_back(40000 * r + r);
    DSD_RETURN_IF_ERROR(ScatterOnce(comm, root, sizes, false));
    std::reverse(sizes.begin(), sizes.end());
    DSD_RETURN_IF_ERROR(ScatterOnce(comm, root, sizes, true));
  }
  return absl::OkStatus();
}

// Some travel in chunks, others in one piece, one has just begun another chunk.
DSD_CONFORMANCE_CASE_FROM(ScatterOfLongUnequalParts, 2) {
  const int root = comm.size() - 1;
  std::vector<size_t> sizes(comm.size(), 3);
  sizes[root] = 5 * kMiB;
  if (comm.size() > 2) sizes[1] = 4 * kMiB + 1;
  sizes[0] = 11 * kMiB + 7;
  std::vector<int64_t> seen;
  CallOptions options;
  options.progress = [&](const Progress& progress) {
    seen.push_back(progress.bytes_done);
  };
  DSD_RETURN_IF_ERROR(ScatterOnce(comm, root, sizes, false, options));
  if (comm.rank() != 0) return absl::OkStatus();
  const int64_t all = 11 * kMiB + 7;
  return Check(seen == std::vector<int64_t>{4 * kMiB, 8 * kMiB, all},
               absl::StrCat(seen.size(), " reports of progress"));
}

DSD_CONFORMANCE_CASE_FROM(ScatterOf64MiB, 2) {
  return ScatterOnce(comm, 0,
                     std::vector<size_t>(comm.size(), 64 * kMiB / comm.size()),
                     false);
}

// --- Reductions, against the definition ---

template <class T>
struct Element;
template <DType kDType, class T>
struct ElementOf {
  static constexpr DType kType = kDType;
  using Stored = T;
};
struct Float32 : ElementOf<DType::kFloat32, float> {
  using Value = float;
  static float Load(float x) { return x; }
  static float Store(float x) { return x; }
};
struct Float64 : ElementOf<DType::kFloat64, double> {
  using Value = double;
  static double Load(double x) { return x; }
  static double Store(double x) { return x; }
};
struct Float16 : ElementOf<DType::kFloat16, uint16_t> {
  using Value = float;
  static float Load(uint16_t x) { return Float16ToFloat(x); }
  static uint16_t Store(float x) { return FloatToFloat16(x); }
};
struct BFloat16 : ElementOf<DType::kBFloat16, uint16_t> {
  using Value = float;
  static float Load(uint16_t x) { return BFloat16ToFloat(x); }
  static uint16_t Store(float x) { return FloatToBFloat16(x); }
};
template <DType kDType, class T>
struct Integer : ElementOf<kDType, T> {
  using Value = T;
  static T Load(T x) { return x; }
  static T Store(T x) { return x; }
};

template <class E>
std::vector<typename E::Stored> Input(int rank, size_t count) {
  std::vector<typename E::Stored> values(count);
  const std::vector<std::byte> noise = Pattern(rank * 31 + 5, count * 2 + 2);
  for (size_t i = 0; i < count; ++i) {
    int16_t n;
    std::memcpy(&n, noise.data() + 2 * i, sizeof(n));
    // Magnitudes for which the order of a floating sum matters.
    if constexpr (std::is_floating_point_v<typename E::Value>) {
      typename E::Value x =
          static_cast<typename E::Value>(n) * std::ldexp(0.01f, (i + rank) % 9);
      if (i % 101 == 50 && rank == 1) {
        x = std::numeric_limits<typename E::Value>::infinity();
      }
      if (i % 103 == 60) x = -static_cast<typename E::Value>(0);
      values[i] = E::Store(x);
    } else {
      values[i] = static_cast<typename E::Stored>(n);
    }
  }
  return values;
}

template <class E>
std::vector<typename E::Stored> Reference(int world, size_t count,
                                          ReduceOp op) {
  using Value = typename E::Value;
  std::vector<std::vector<typename E::Stored>> inputs;
  for (int r = 0; r < world; ++r) inputs.push_back(Input<E>(r, count));
  std::vector<typename E::Stored> out(count);
  for (size_t i = 0; i < count; ++i) {
    Value sum = E::Load(inputs[0][i]);
    for (int r = 1; r < world; ++r) {
      const Value x = E::Load(inputs[r][i]);
      if (op == ReduceOp::kSum) {
        sum = static_cast<Value>(sum + x);
      } else if (op == ReduceOp::kMin) {
        sum = x < sum ? x : sum;
      } else {
        sum = sum < x ? x : sum;
      }
    }
    out[i] = E::Store(sum);
  }
  return out;
}

template <class E>
absl::Status ReduceOnce(Communicator& comm, size_t count, ReduceOp op) {
  using Stored = typename E::Stored;
  const int world = comm.size();
  const std::vector<Stored> expected = Reference<E>(world, count, op);
  const std::string what =
      absl::StrCat(DTypeName(E::kType), " x ", count, ", op ",
                   static_cast<int>(op), ": wrong value");

  std::vector<Stored> all = Input<E>(comm.rank(), count);
  DSD_RETURN_IF_ERROR(comm.AllReduce(BytesOf(all), E::kType, op));
  DSD_RETURN_IF_ERROR(Check(
      std::memcmp(all.data(), expected.data(), count * sizeof(Stored)) == 0,
      absl::StrCat("AllReduce of ", what)));

  // Uneven parts; the last rank gets the rest, some get nothing.
  std::vector<int64_t> counts(world, 0);
  int64_t begin = 0;
  int64_t given = 0;
  for (int r = 0; r < world; ++r) {
    counts[r] =
        r == world - 1
            ? static_cast<int64_t>(count) - given
            : (r % 2 == 0 ? static_cast<int64_t>(count) / std::max(3, world)
                          : 0);
    if (r < comm.rank()) begin += counts[r];
    given += counts[r];
  }
  std::vector<Stored> input = Input<E>(comm.rank(), count);
  std::vector<Stored> output(counts[comm.rank()]);
  DSD_RETURN_IF_ERROR(comm.ReduceScatter(BytesOf(input), counts,
                                         BytesOf(output), E::kType, op));
  DSD_RETURN_IF_ERROR(Check(
      output.empty() || std::memcmp(output.data(), expected.data() + begin,
                                    output.size() * sizeof(Stored)) == 0,
      absl::StrCat("ReduceScatter of ", what)));
  // In place.
  const absl::Span<std::byte> place = BytesOf(input).subspan(
      begin * sizeof(Stored), output.size() * sizeof(Stored));
  DSD_RETURN_IF_ERROR(
      comm.ReduceScatter(BytesOf(input), counts, place, E::kType, op));
  return Check(std::equal(place.begin(), place.end(), BytesOf(output).begin()),
               absl::StrCat("ReduceScatter in place of ", what));
}

template <class E>
absl::Status ReduceAll(Communicator& comm) {
  for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMin, ReduceOp::kMax}) {
    for (const size_t count : {0, 1, 5, 4099}) {
      DSD_RETURN_IF_ERROR(ReduceOnce<E>(comm, count, op));
    }
  }
  return absl::OkStatus();
}

DSD_CONFORMANCE_CASE(ReductionsOfFloats) {
  DSD_RETURN_IF_ERROR(ReduceAll<Float32>(comm));
  DSD_RETURN_IF_ERROR(ReduceAll<Float64>(comm));
  DSD_RETURN_IF_ERROR(ReduceAll<Float16>(comm));
  return ReduceAll<BFloat16>(comm);
}

DSD_CONFORMANCE_CASE(ReductionsOfIntegers) {
  DSD_RETURN_IF_ERROR((ReduceAll<Integer<DType::kInt8, int8_t>>(comm)));
  DSD_RETURN_IF_ERROR((ReduceAll<Integer<DType::kInt32, int32_t>>(comm)));
  DSD_RETURN_IF_ERROR((ReduceAll<Integer<DType::kInt64, int64_t>>(comm)));
  return ReduceAll<Integer<DType::kUInt8, uint8_t>>(comm);
}

// More than one step of the bounded staging memory.
DSD_CONFORMANCE_CASE(ReductionsOfManyElements) {
  DSD_RETURN_IF_ERROR(ReduceOnce<Float32>(comm, kMiB + 200017, ReduceOp::kSum));
  return ReduceOnce<BFloat16>(comm, 2 * kMiB + 1, ReduceOp::kSum);
}

DSD_CONFORMANCE_CASE(TheMaximumOfBools) {
  std::vector<std::byte> flags(3, std::byte{comm.rank() == 0});
  DSD_RETURN_IF_ERROR(
      comm.AllReduce(absl::MakeSpan(flags), DType::kBool, ReduceOp::kMax));
  return Check(flags[2] == std::byte{1}, "max of bools");
}

// --- Exchange ---

DSD_CONFORMANCE_CASE(ExchangeAllToAllWithItself) {
  const int world = comm.size();
  for (const size_t size : kSizes) {
    std::vector<std::vector<std::byte>> out;
    std::vector<std::vector<std::byte>> in;
    for (int r = 0; r < world; ++r) {
      out.push_back(Pattern(comm.rank() * 100 + r, size + r));
      in.emplace_back(size + comm.rank());
    }
    std::vector<SendOp> sends;
    std::vector<RecvOp> recvs;
    for (int r = 0; r < world; ++r) {
      sends.push_back({r, out[r]});
      recvs.push_back({r, absl::MakeSpan(in[r])});
    }
    DSD_RETURN_IF_ERROR(comm.Exchange(sends, recvs, "all to all"));
    for (int r = 0; r < world; ++r) {
      DSD_RETURN_IF_ERROR(
          Check(in[r] == Pattern(r * 100 + comm.rank(), size + comm.rank()),
                absl::StrCat("from rank ", r, ", ", size)));
    }
  }
  return comm.Exchange({}, {}, "nothing");
}

DSD_CONFORMANCE_CASE(SeveralMessagesPerPeerMatchInOrder) {
  const int next = (comm.rank() + 1) % comm.size();
  const int previous = (comm.rank() + comm.size() - 1) % comm.size();
  const size_t sizes[] = {100, 0, 200000, 1, 200000, 100};
  std::vector<std::vector<std::byte>> out;
  std::vector<std::vector<std::byte>> in;
  for (const size_t size : sizes) {
    out.push_back(Pattern(comm.rank() * 10 + out.size(), size));
    in.emplace_back(size);
  }
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  for (size_t i = 0; i < out.size(); ++i) {
    sends.push_back({next, out[i]});
    recvs.push_back({previous, absl::MakeSpan(in[i])});
  }
  DSD_RETURN_IF_ERROR(comm.Exchange(sends, recvs, "several"));
  for (size_t i = 0; i < in.size(); ++i) {
    DSD_RETURN_IF_ERROR(Check(in[i] == Pattern(previous * 10 + i, sizes[i]),
                              absl::StrCat("message ", i)));
  }
  return absl::OkStatus();
}

// Sends and receives in calls of their own, finished in another order.
DSD_CONFORMANCE_CASE(PendingExchangesOverlap) {
  const int next = (comm.rank() + 1) % comm.size();
  const int previous = (comm.rank() + comm.size() - 1) % comm.size();
  constexpr int kCount = 12;
  constexpr size_t kSize = 300000;
  std::vector<std::vector<std::byte>> out;
  std::vector<std::vector<std::byte>> in(kCount, std::vector<std::byte>(kSize));
  for (int i = 0; i < kCount; ++i) {
    out.push_back(Pattern(comm.rank() * 50 + i, kSize));
  }
  std::vector<PendingExchange> sends;
  std::vector<PendingExchange> recvs;
  for (int i = 0; i < kCount; ++i) {
    DSD_ASSIGN_OR_RETURN(
        PendingExchange recv,
        comm.StartExchange({}, {{previous, absl::MakeSpan(in[i])}}, "ring"));
    DSD_ASSIGN_OR_RETURN(PendingExchange send,
                         comm.StartExchange({{next, out[i]}}, {}, "ring"));
    recvs.push_back(std::move(recv));
    sends.push_back(std::move(send));
  }
  for (int i = kCount; i-- > 0;) {
    DSD_RETURN_IF_ERROR(recvs[i].Wait());
    DSD_RETURN_IF_ERROR(
        Check(in[i] == Pattern(previous * 50 + i, kSize), "ring"));
  }
  for (PendingExchange& send : sends) DSD_RETURN_IF_ERROR(send.Wait());
  return absl::OkStatus();
}

DSD_CONFORMANCE_CASE(ManySmallCalls) {
  for (int64_t i = 0; i < 300; ++i) {
    std::vector<int64_t> value = {i + comm.rank()};
    DSD_RETURN_IF_ERROR(
        comm.AllReduce(BytesOf(value), DType::kInt64, ReduceOp::kMax));
    DSD_RETURN_IF_ERROR(Check(value[0] == i + comm.size() - 1, "max"));
  }
  for (int i = 0; i < 50; ++i) DSD_RETURN_IF_ERROR(comm.Barrier());
  return absl::OkStatus();
}

// --- A mixed script ---

// Random calls with random sizes, the same on all ranks by the seed, and each
// compared with what it means. All backends give the same as this model, and so
// the same as each other.
absl::Status RandomScript(Communicator& comm, uint64_t seed, int calls) {
  std::mt19937_64 random(seed * 1000 + comm.size());
  const int world = comm.size();
  const auto size = [&] {
    const size_t limits[] = {1, 100, 20000, 300000};
    return static_cast<size_t>(random() % limits[random() % 4]);
  };
  for (int i = 0; i < calls; ++i) {
    const uint64_t kind = random() % 6;
    const int root = static_cast<int>(random() % world);
    absl::Status status;
    if (kind == 0) {
      status = BroadcastOnce(comm, root, size(), random() % 8);
    } else if (kind == 1) {
      std::vector<size_t> sizes;
      for (int r = 0; r < world; ++r) sizes.push_back(size());
      status = AllGatherOnce(comm, sizes, random() % 2 == 0);
    } else if (kind == 2) {
      std::vector<size_t> sizes;
      for (int r = 0; r < world; ++r) sizes.push_back(size());
      status = ScatterOnce(comm, root, sizes, random() % 2 == 0);
    } else if (kind == 3) {
      status = ReduceOnce<BFloat16>(comm, size() / 8, ReduceOp::kSum);
    } else if (kind == 4) {
      status = ReduceOnce<Integer<DType::kInt32, int32_t>>(comm, size() / 8,
                                                           ReduceOp::kMin);
    } else {
      // Each pair exchanges none, one or two messages in each direction.
      std::vector<std::vector<std::byte>> memory;
      std::vector<std::pair<int, bool>> ops;  // peer, is a send
      std::vector<uint64_t> seeds;
      for (int from = 0; from < world; ++from) {
        for (int to = 0; to < world; ++to) {
          for (uint64_t n = random() % 3; n > 0; --n) {
            const size_t bytes = size();
            const uint64_t own = random();
            if (comm.rank() == from) {
              ops.emplace_back(to, true);
              memory.push_back(Pattern(own, bytes));
              seeds.push_back(own);
            }
            if (comm.rank() == to) {
              ops.emplace_back(from, false);
              memory.emplace_back(bytes);
              seeds.push_back(own);
            }
          }
        }
      }
      std::vector<SendOp> sends;
      std::vector<RecvOp> recvs;
      for (size_t o = 0; o < ops.size(); ++o) {
        if (ops[o].second) {
          sends.push_back({ops[o].first, memory[o]});
        } else {
          recvs.push_back({ops[o].first, absl::MakeSpan(memory[o])});
        }
      }
      status = comm.Exchange(sends, recvs, absl::StrCat("script ", i));
      for (size_t o = 0; o < ops.size() && status.ok(); ++o) {
        status =
            Check(memory[o] == Pattern(seeds[o], memory[o].size()), "exchange");
      }
    }
    if (!status.ok()) {
      return Annotate(status,
                      absl::StrCat("call ", i, " of the script ", seed));
    }
  }
  return comm.Barrier();
}

DSD_CONFORMANCE_CASE(AMixedScript) { return RandomScript(comm, 1, 60); }
DSD_CONFORMANCE_CASE(AnotherMixedScript) { return RandomScript(comm, 2, 60); }
// More than the machine has cores.
DSD_CONFORMANCE_CASE_ON(AMixedScriptOfMany, 8, 8) {
  return RandomScript(comm, 5, 30);
}
DSD_CONFORMANCE_CASE_FROM(AMixedScriptOnALane, 2) {
  DSD_ASSIGN_OR_RETURN(const auto lane, comm.OpenLane("script"));
  return RandomScript(*lane, 3, 30);
}
DSD_CONFORMANCE_CASE_FROM(AMixedScriptOnAPart, 2) {
  DSD_ASSIGN_OR_RETURN(const auto part,
                       comm.Split(comm.rank() == 0 ? 1 : 0, -comm.rank()));
  return RandomScript(*part, 4, 30);
}

// --- Lanes ---

DSD_CONFORMANCE_CASE(LanesOfTwoThreadsDoNotMix) {
  DSD_ASSIGN_OR_RETURN(const auto a, comm.OpenLane("a"));
  DSD_ASSIGN_OR_RETURN(const auto b, a->OpenLane("b"));
  absl::Status statuses[2];
  const auto work = [&](Communicator& lane, int which) {
    statuses[which] = [&]() -> absl::Status {
      for (int i = 0; i < 40; ++i) {
        std::vector<int32_t> values(20000, which * 1000 + i);
        DSD_RETURN_IF_ERROR(
            lane.AllReduce(BytesOf(values), DType::kInt32, ReduceOp::kMax));
        DSD_RETURN_IF_ERROR(Check(values[777] == which * 1000 + i, "lane"));
        // The lanes make different calls.
        if (which == 1) {
          DSD_RETURN_IF_ERROR(BroadcastOnce(lane, i % lane.size(), 3000, 1));
        }
      }
      return absl::OkStatus();
    }();
  };
  {
    const auto other = comm.env()->StartThread("lane", [&] { work(*b, 1); });
    work(*a, 0);
  }
  DSD_RETURN_IF_ERROR(statuses[0]);
  DSD_RETURN_IF_ERROR(statuses[1]);
  DSD_RETURN_IF_ERROR(Expect(comm.OpenLane("a").status(),
                             absl::StatusCode::kAlreadyExists, {"\"a\""}));
  DSD_RETURN_IF_ERROR(b->Shutdown());
  return comm.Barrier();
}

}  // namespace
}  // namespace dsd
