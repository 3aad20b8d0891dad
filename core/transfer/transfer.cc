// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/transfer.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/status_macros.h"

namespace dsd {
namespace {

// Reads a stream of moves, box after box, in pieces of any size.
class Stream {
 public:
  Stream(const Plan& plan, const Catalog& source)
      : plan_(plan), source_(source) {}

  void Add(size_t move) {
    moves_.push_back(move);
    total_bytes_ += plan_.moves[move].wire_bytes();
  }

  int64_t total_bytes() const { return total_bytes_; }

  // Calls touch(move, begin, end, byte offset in the piece) for the elements in
  // the next `bytes` bytes of the stream. A piece may end inside an item: the
  // whole item belongs to the piece in which it starts, so pieces are not all
  // of one length.
  template <class Touch>
  absl::Status Next(int64_t bytes, Touch touch) {
    int64_t done = 0;
    while (done < bytes) {
      const Move& move = plan_.moves[moves_[at_]];
      const int64_t item_size = ItemSize(move.wire_dtype);
      const int64_t left = move.box.num_elements() - element_;
      const int64_t count = std::min(left, (bytes - done) / item_size);
      DSD_RETURN_IF_ERROR(touch(move, element_, element_ + count, done));
      done += count * item_size;
      element_ += count;
      if (element_ == move.box.num_elements()) {
        ++at_;
        element_ = 0;
      }
    }
    return absl::OkStatus();
  }

  // Bytes of the next piece: at most `limit`, whole items, and 0 at the end.
  int64_t NextPieceBytes(int64_t limit) const {
    int64_t bytes = 0;
    int64_t element = element_;
    for (size_t at = at_; at < moves_.size(); ++at, element = 0) {
      const Move& move = plan_.moves[moves_[at]];
      const int64_t item_size = ItemSize(move.wire_dtype);
      const int64_t box_bytes = (move.box.num_elements() - element) * item_size;
      if (bytes + box_bytes > limit) {
        return bytes + (limit - bytes) / item_size * item_size;
      }
      bytes += box_bytes;
    }
    return bytes;
  }

  // Name of the tensor that the next piece starts with.
  const std::string& fqn() const {
    return source_[plan_.moves[moves_[at_]].source_tensor].fqn;
  }

 private:
  const Plan& plan_;
  const Catalog& source_;
  std::vector<size_t> moves_;
  int64_t total_bytes_ = 0;
  size_t at_ = 0;
  int64_t element_ = 0;
};

bool IsContiguous(const StridedView& view, absl::Span<const int64_t> extents,
                  int64_t item_size) {
  for (int d = static_cast<int>(extents.size()) - 1; d >= 0; --d) {
    if (extents[d] != 1 && view.strides_bytes[d] != item_size) return false;
    item_size *= extents[d];
  }
  return true;
}

class Executor {
 public:
  Executor(const Plan& plan, Endpoint& source, Endpoint& target,
           Communicator* comm, const TransferOptions& options)
      : plan_(plan),
        source_(source),
        target_(target),
        comm_(comm),
        options_(options) {}

  absl::StatusOr<TransferStats> Run() {
    if (comm_ != nullptr) {
      deadline_ = comm_->env()->Now() + options_.call.timeout;
    }
    for (const Move& move : plan_.moves) {
      if (IsLocal(move) || move.provider != plan_.rank) {
        bytes_total_ += move.wire_bytes();
      }
    }
    for (const Move& move : plan_.moves) {
      if (!IsLocal(move)) continue;
      DSD_RETURN_IF_ERROR(Fail(CopyLocally(move), move));
    }
    // What is relayed has come then.
    DSD_RETURN_IF_ERROR(ExchangeAll(/*relayed=*/false));
    DSD_RETURN_IF_ERROR(ExchangeAll(/*relayed=*/true));
    DSD_RETURN_IF_ERROR(AbortOthers(target_.Finish()));
    return stats_;
  }

 private:
  bool IsLocal(const Move& move) const {
    return move.provider == plan_.rank && move.provider_keeps;
  }

  // Boxes from storage that any rank can read are in the provider's target by
  // the time they are sent on, and storage is read once.
  bool IsRelayed(const Move& move) {
    if (move.relayed) return true;
    if (!move.provider_keeps) return false;
    const auto [it, is_new] = relayed_.try_emplace(move.source_tensor, false);
    if (is_new) {
      it->second = !source_.catalog()[move.source_tensor]
                        .layout.BoxesOf(kAnyHolder)
                        .empty();
    }
    return it->second;
  }

  // Tells the others before this rank unwinds: they may be waiting for it.
  absl::Status AbortOthers(absl::Status status) {
    if (!status.ok() && comm_ != nullptr) comm_->Abort(status);
    return status;
  }

  absl::Status Fail(const absl::Status& status, const Move& move) {
    if (status.ok()) return status;
    return AbortOthers(Annotate(status, Where(move)));
  }

  std::string Where(const Move& move) const {
    return absl::StrCat("\"", source_.catalog()[move.source_tensor].fqn,
                        "\" on rank ", plan_.rank);
  }

  std::byte* Buffer(int index) {
    std::unique_ptr<std::byte[]>& buffer = buffers_[index];
    if (buffer == nullptr) {
      buffer.reset(new std::byte[options_.chunk_bytes]);
      stats_.bytes_staged_peak += options_.chunk_bytes;
    }
    return buffer.get();
  }

  absl::Status CopyLocally(const Move& move) {
    const DType from_type = source_.catalog()[move.source_tensor].dtype;
    const DType to_type = target_.catalog()[move.target_tensor].dtype;
    const int64_t item_size = ItemSize(move.wire_dtype);
    const int64_t elements = move.box.num_elements();
    const Dims extents = move.box.extents();
    stats_.bytes_local += elements * item_size;

    const auto from = source_.View(move.source_tensor, move.box);
    const auto to = target_.View(move.target_tensor, move.box);
    if (from.has_value() && to.has_value() && from_type == to_type) {
      CopyBox(*from, *to, extents, item_size);
      return Report(elements * item_size);
    }
    // Straight from or into memory where one side has the wire's form.
    std::byte* direct_to = nullptr;
    if (to.has_value() && to_type == move.wire_dtype &&
        IsContiguous(*to, extents, item_size)) {
      direct_to = to->base;
    }
    const std::byte* direct_from = nullptr;
    if (from.has_value() && from_type == move.wire_dtype &&
        IsContiguous(*from, extents, item_size)) {
      direct_from = from->base;
    }
    const int64_t step = options_.chunk_bytes / item_size;
    for (int64_t begin = 0; begin < elements; begin += step) {
      const int64_t end = std::min(begin + step, elements);
      const size_t bytes = (end - begin) * item_size;
      std::byte* const buffer =
          direct_to != nullptr ? direct_to + begin * item_size
                               : (direct_from != nullptr ? nullptr : Buffer(0));
      if (direct_from == nullptr || direct_to != nullptr) {
        DSD_RETURN_IF_ERROR(source_.Read(move.source_tensor, move.box, begin,
                                         end, move.wire_dtype,
                                         absl::MakeSpan(buffer, bytes)));
      }
      if (direct_to == nullptr) {
        const std::byte* const in =
            direct_from != nullptr ? direct_from + begin * item_size : buffer;
        DSD_RETURN_IF_ERROR(target_.Write(move.target_tensor, move.box, begin,
                                          end, move.wire_dtype,
                                          absl::MakeConstSpan(in, bytes)));
      }
      DSD_RETURN_IF_ERROR(Report(bytes));
    }
    return absl::OkStatus();
  }

  absl::Status ExchangeAll(bool relayed) {
    // Streams are made per step, so that memory does not grow with the world.
    std::vector<std::vector<size_t>> to(comm_ == nullptr ? 1 : comm_->size());
    std::vector<std::vector<size_t>> from(to.size());
    bool any = false;
    for (size_t i = 0; i < plan_.moves.size(); ++i) {
      const Move& move = plan_.moves[i];
      if (move.relayed != relayed) continue;
      if (move.provider == plan_.rank) {
        for (int reader : move.readers) {
          any = true;
          if (comm_ != nullptr) to[reader].push_back(i);
        }
      } else {
        any = true;
        if (comm_ != nullptr) from[move.provider].push_back(i);
      }
    }
    if (!any) return absl::OkStatus();
    if (comm_ == nullptr) {
      return absl::InvalidArgumentError(
          "the plan has other ranks, but there is no communicator");
    }
    const int size = comm_->size();
    for (int step = 1; step < size; ++step) {
      const int next = (plan_.rank + step) % size;
      const int previous = (plan_.rank + size - step) % size;
      DSD_RETURN_IF_ERROR(
          ExchangeStep(next, to[next], previous, from[previous]));
    }
    return absl::OkStatus();
  }

  // One stream out and one in, each two chunks deep: while one chunk travels
  // the next is packed and the last unpacked.
  absl::Status ExchangeStep(int next, const std::vector<size_t>& out_moves,
                            int previous, const std::vector<size_t>& in_moves) {
    Stream out(plan_, source_.catalog());
    for (size_t move : out_moves) out.Add(move);
    Stream in(plan_, source_.catalog());
    for (size_t move : in_moves) in.Add(move);

    struct Chunk {
      std::optional<PendingExchange> send;
      std::optional<PendingExchange> recv;
      int64_t recv_bytes = 0;
    };
    Chunk chunks[2];
    Stream arriving = in;  // runs one chunk behind `in`
    for (int k = 0;; ++k) {
      Chunk& now = chunks[k % 2];
      const int64_t in_bytes = in.NextPieceBytes(options_.chunk_bytes);
      const int64_t out_bytes = out.NextPieceBytes(options_.chunk_bytes);
      now.recv_bytes = in_bytes;
      if (in_bytes > 0) {
        const RecvOp op{previous, absl::MakeSpan(Buffer(2 + k % 2), in_bytes)};
        DSD_ASSIGN_OR_RETURN(
            now.recv, comm_->StartExchange({}, {op}, Label(in), TimeLeft()));
        DSD_RETURN_IF_ERROR(
            in.Next(in_bytes, [](const Move&, int64_t, int64_t, int64_t) {
              return absl::OkStatus();
            }));
      }
      if (out_bytes > 0) {
        std::byte* const buffer = Buffer(k % 2);
        const std::string label = Label(out);
        DSD_RETURN_IF_ERROR(out.Next(out_bytes, [&](const Move& move,
                                                    int64_t begin, int64_t end,
                                                    int64_t offset) {
          const size_t bytes = (end - begin) * ItemSize(move.wire_dtype);
          const absl::Span<std::byte> piece(buffer + offset, bytes);
          return Fail(IsRelayed(move)
                          ? target_.Read(move.target_tensor, move.box, begin,
                                         end, move.wire_dtype, piece)
                          : source_.Read(move.source_tensor, move.box, begin,
                                         end, move.wire_dtype, piece),
                      move);
        }));
        const SendOp op{next, absl::MakeConstSpan(buffer, out_bytes)};
        DSD_ASSIGN_OR_RETURN(now.send,
                             comm_->StartExchange({op}, {}, label, TimeLeft()));
        stats_.bytes_sent += out_bytes;
        ++stats_.messages_sent;
      }
      Chunk& before = chunks[(k + 1) % 2];
      if (before.send.has_value()) {
        DSD_RETURN_IF_ERROR(before.send->Wait());
        before.send.reset();
      }
      if (before.recv.has_value()) {
        DSD_RETURN_IF_ERROR(before.recv->Wait());
        before.recv.reset();
        DSD_RETURN_IF_ERROR(
            Unpack(arriving, Buffer(2 + (k + 1) % 2), before.recv_bytes));
      }
      if (in_bytes == 0 && out_bytes == 0) return absl::OkStatus();
    }
  }

  absl::Status Unpack(Stream& stream, const std::byte* buffer, int64_t bytes) {
    stats_.bytes_received += bytes;
    DSD_RETURN_IF_ERROR(stream.Next(bytes, [&](const Move& move, int64_t begin,
                                               int64_t end, int64_t offset) {
      const size_t piece = (end - begin) * ItemSize(move.wire_dtype);
      return Fail(target_.Write(move.target_tensor, move.box, begin, end,
                                move.wire_dtype,
                                absl::MakeConstSpan(buffer + offset, piece)),
                  move);
    }));
    return Report(bytes);
  }

  static std::string Label(const Stream& stream) {
    return absl::StrCat("transfer \"", stream.fqn(), "\"");
  }

  CallOptions TimeLeft() const {
    CallOptions left = options_.call;
    left.timeout = deadline_ - comm_->env()->Now();
    left.progress = nullptr;
    return left;
  }

  absl::Status Report(int64_t bytes) {
    bytes_done_ += bytes;
    if (options_.call.progress) {
      options_.call.progress({bytes_done_, bytes_total_});
    }
    if (options_.call.cancel != nullptr && *options_.call.cancel) {
      return AbortOthers(absl::CancelledError(
          absl::StrCat("transfer cancelled on rank ", plan_.rank)));
    }
    return absl::OkStatus();
  }

  const Plan& plan_;
  Endpoint& source_;
  Endpoint& target_;
  Communicator* const comm_;
  const TransferOptions& options_;
  absl::Time deadline_;
  std::unique_ptr<std::byte[]> buffers_[4];
  TransferStats stats_;
  int64_t bytes_done_ = 0;
  int64_t bytes_total_ = 0;
  absl::flat_hash_map<size_t, bool> relayed_;  // by source tensor
};

// "rank 1: text", once for all ranks with the same text; without ranks if all
// say the same.
std::string PerRank(const std::vector<std::string>& texts) {
  std::vector<std::pair<std::string, std::vector<int>>> groups;
  for (int rank = 0; rank < static_cast<int>(texts.size()); ++rank) {
    if (texts[rank].empty()) continue;
    auto it = std::find_if(
        groups.begin(), groups.end(),
        [&](const auto& group) { return group.first == texts[rank]; });
    if (it == groups.end()) it = groups.insert(it, {texts[rank], {}});
    it->second.push_back(rank);
  }
  if (groups.size() == 1 && groups[0].second.size() == texts.size()) {
    return groups[0].first;
  }
  return absl::StrJoin(groups, "; ", [](std::string* out, const auto& group) {
    absl::StrAppend(out, group.second.size() == 1 ? "rank " : "ranks ",
                    absl::StrJoin(group.second, ", "), ": ", group.first);
  });
}

constexpr int64_t kMaxVerdictBytes = int64_t{64} << 10;

// Before the text of a rank that will say more if all others do.
constexpr char kGoesOn = '\x01';

}  // namespace

absl::StatusOr<TransferStats> Transfer(const Plan& plan, Endpoint& source,
                                       Endpoint& target, Communicator* comm,
                                       const TransferOptions& options) {
  constexpr int64_t kMinChunkBytes = 16;  // one item of the largest type
  if (options.chunk_bytes < kMinChunkBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("chunk_bytes is ", options.chunk_bytes,
                     ", expected at least ", kMinChunkBytes));
  }
  return Executor(plan, source, target, comm, options).Run();
}

absl::Status Agree(Communicator* comm, absl::string_view what,
                   const Digest& fingerprint, const absl::Status& local,
                   absl::FunctionRef<std::string()> describe,
                   const CallOptions& options, bool* disagree) {
  if (disagree != nullptr) *disagree = false;
  if (comm == nullptr || comm->size() == 1) {
    return local.ok() ? local : Annotate(local, what);
  }
  std::string mine(1, static_cast<char>(local.code()));
  mine.append(reinterpret_cast<const char*>(fingerprint.bytes.data()),
              fingerprint.bytes.size());
  DSD_ASSIGN_OR_RETURN(
      const std::vector<std::string> all,
      comm->AllGatherBlobs(mine, static_cast<int64_t>(mine.size()), options));

  // The verdict is a function of what everybody has, so it is everybody's.
  absl::StatusCode code = absl::StatusCode::kOk;
  bool equal = true;
  for (const std::string& blob : all) {
    if (blob.size() != mine.size()) {
      return absl::InternalError("agreement: a rank sent a malformed digest");
    }
    equal &= blob.substr(1) == all[0].substr(1);
    if (code == absl::StatusCode::kOk) {
      code = static_cast<absl::StatusCode>(blob[0]);
    }
  }
  const bool failed = code != absl::StatusCode::kOk;
  if (!failed && equal) return absl::OkStatus();

  std::string text;
  if (failed) {
    text = std::string(local.message());
  } else if (disagree != nullptr) {
    text = absl::StrCat(std::string(1, kGoesOn), describe());
  } else if (mine != all[0] || comm->rank() == 0) {
    text = describe();
  }
  if (text.size() > kMaxVerdictBytes) text.resize(kMaxVerdictBytes);
  DSD_ASSIGN_OR_RETURN(std::vector<std::string> texts,
                       comm->AllGatherBlobs(text, kMaxVerdictBytes, options));
  bool all_go_on = true;
  for (std::string& other : texts) {
    const bool goes_on = !other.empty() && other[0] == kGoesOn;
    all_go_on &= goes_on;
    if (goes_on) other.erase(0, 1);
  }
  if (disagree != nullptr) *disagree = !failed && all_go_on;
  if (failed) {
    return absl::Status(code, absl::StrCat(what, ": ", PerRank(texts)));
  }
  return absl::FailedPreconditionError(
      absl::StrCat(what, ": ranks disagree: ", PerRank(texts)));
}

absl::StatusOr<TransferStats> Redistribute(Endpoint& source, Endpoint& target,
                                           Communicator* comm,
                                           const TransferOptions& options) {
  const Catalog& from = source.catalog();
  const Catalog& to = target.catalog();
  const int rank = comm == nullptr ? 0 : comm->rank();
  const Binding binding(comm == nullptr ? 1 : comm->size());
  const absl::StatusOr<Plan> plan =
      PlanForRank(rank, from, to, MatchByName(from, to), binding, binding);
  DigestBuilder fingerprint;
  fingerprint.Add(from.Fingerprint()).Add(to.Fingerprint());
  DSD_RETURN_IF_ERROR(Agree(
      comm, "redistribute", fingerprint.Finish(), plan.status(),
      [&] {
        return absl::StrCat("source of ", from.size(), " tensors (",
                            from.Fingerprint().Hex().substr(0, 8),
                            "), target of ", to.size(), " tensors (",
                            to.Fingerprint().Hex().substr(0, 8), ")");
      },
      options.call));
  return Transfer(*plan, source, target, comm, options);
}

}  // namespace dsd
