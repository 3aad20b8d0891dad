// SPDX-License-Identifier: Apache-2.0
//
// What a save does with a live State before anything is written: checks it, and
// finds which rank stores what.

#ifndef DSD_FRONTENDS_CHECKPOINT_LIVE_STATE_H_
#define DSD_FRONTENDS_CHECKPOINT_LIVE_STATE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/content_digest.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/layout/box.h"
#include "dsd/frontends/checkpoint/checkpoint.h"

namespace dsd::checkpoint {

// The catalog of a State; an empty one if it has no tensors.
const Catalog& CatalogOf(const State& state);

// Path of tensor i, see State::tensor_paths.
Path TensorPath(const State& state, size_t tensor);

// Keys unique and paths in keeping with names. InvalidArgument otherwise.
absl::Status CheckKeys(const State& state);

// What the objects are stored as, in order. InvalidArgument naming the key.
absl::StatusOr<std::vector<std::string>> EncodeObjects(const State& state);

// A box that this rank stores.
struct Piece {
  size_t tensor;
  Box box;
};

// The boxes that `rank` stores: over all ranks each element is in one of them.
// A tensor without elements is one empty box of rank 0.
absl::StatusOr<std::vector<Piece>> PlanPieces(const State& state, int rank,
                                              int world_size);

// Which objects (positions in state.objects) this rank stores: over all ranks
// each key once, by the lowest rank that has it. Collective.
// FailedPrecondition on all ranks if a key has different values.
absl::StatusOr<std::vector<size_t>> ShareObjects(
    const State& state, const std::vector<std::string>& encoded,
    Communicator* comm, const CallOptions& options);

// The time that is left of a call, for the calls it makes.
class Deadline {
 public:
  Deadline(Env* env, const CallOptions& options)
      : env_(env), options_(options), end_(env->Now() + options.timeout) {
    options_.progress = nullptr;
  }
  CallOptions Left() const {
    CallOptions left = options_;
    left.timeout = end_ - env_->Now();
    return left;
  }
  Env* env() const { return env_; }
  absl::Time end() const { return end_; }
  // Cancelled or DeadlineExceeded.
  absl::Status Check() const;

 private:
  Env* env_;
  CallOptions options_;
  absl::Time end_;
};

// Reads a piece front to back, straight from memory where it lies so; from a
// device one part ahead. Calls `visit` with elements [begin, end) of the box.
absl::Status ReadPiece(
    Endpoint& tensors, const Piece& piece, const Deadline& deadline,
    absl::FunctionRef<absl::Status(int64_t begin, int64_t end,
                                   absl::Span<const std::byte>)>
        visit);

// The same for elements that lie back to back in memory.
absl::Status ForEachPart(
    const std::byte* packed, int64_t elements, int64_t item_size,
    absl::FunctionRef<absl::Status(int64_t begin, int64_t end,
                                   absl::Span<const std::byte>)>
        visit);

// The Env that a call uses.
inline Env* ChooseEnv(Env* wanted, Communicator* comm) {
  if (wanted != nullptr) return wanted;
  return comm != nullptr ? comm->env() : Env::Real();
}

// Of what a rank tells the others in one message.
inline constexpr int64_t kMaxRecordBytes = int64_t{4} << 30;

// DataLoss unless a length that `rank` sent is one of a record.
absl::Status CheckAnnounced(int rank, int64_t bytes);

// All ranks' byte strings on rank 0, an empty vector elsewhere. Collective.
absl::StatusOr<std::vector<std::string>> GatherToRank0(
    Communicator* comm, absl::string_view mine, const CallOptions& options);

// Keys quoted and joined, cut with a count.
std::string ListKeys(std::vector<std::string> keys);

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_LIVE_STATE_H_
