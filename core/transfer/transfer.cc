// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/transfer/transfer.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "dsd/core/base/call_clock.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/transfer/staging.h"

namespace dsd {
namespace {

constexpr int64_t kOwnPieceBytes = int64_t{256} << 10;
constexpr int64_t kMinDirectBytes = int64_t{32} << 10;

// Reads a stream of moves, box after box, in pieces of any size.
class Stream {
 public:
  Stream(const Plan& plan, const Catalog& source)
      : plan_(plan), source_(source) {}

  void Add(size_t move) {
    const Move& added = plan_.moves[move];
    boxes_.push_back(
        {move, added.box.num_elements(), ItemSize(added.wire_dtype)});
  }

  // Calls touch(move, begin, end, byte offset in the piece) for the elements in
  // the next `bytes` bytes of the stream. A piece may end inside an item: the
  // whole item belongs to the piece in which it starts, so pieces are not all
  // of one length.
  template <class Touch>
  void Next(int64_t bytes, Touch touch) {
    int64_t done = 0;
    while (done < bytes) {
      const BoxOfMove& box = boxes_[at_];
      const int64_t count =
          std::min(box.elements - element_, (bytes - done) / box.item_size);
      touch(plan_.moves[box.move], element_, element_ + count, done);
      done += count * box.item_size;
      element_ += count;
      if (element_ == box.elements) {
        ++at_;
        element_ = 0;
      }
    }
  }

  // Whether the next `bytes` bytes are all of one move.
  bool IsOfOneMove(int64_t bytes) const {
    const BoxOfMove& box = boxes_[at_];
    return (box.elements - element_) * box.item_size >= bytes;
  }

  // Bytes of the next piece: at most `limit`, whole items, and 0 at the end.
  // Much of one box is a piece of its own, which may need no staging.
  int64_t NextPieceBytes(int64_t limit) const {
    int64_t bytes = 0;
    int64_t element = element_;
    for (size_t at = at_; at < boxes_.size(); ++at, element = 0) {
      const BoxOfMove& box = boxes_[at];
      const int64_t box_bytes = (box.elements - element) * box.item_size;
      if (box_bytes >= kOwnPieceBytes) {
        return bytes > 0
                   ? bytes
                   : std::min(box_bytes, limit / box.item_size * box.item_size);
      }
      if (bytes + box_bytes > limit) {
        return bytes + (limit - bytes) / box.item_size * box.item_size;
      }
      bytes += box_bytes;
    }
    return bytes;
  }

  // Name of the tensor that the next piece starts with.
  const std::string& fqn() const {
    return source_[plan_.moves[boxes_[at_].move].source_tensor].fqn;
  }

 private:
  struct BoxOfMove {
    size_t move;
    int64_t elements;
    int64_t item_size;
  };

  const Plan& plan_;
  const Catalog& source_;
  std::vector<BoxOfMove> boxes_;
  size_t at_ = 0;
  int64_t element_ = 0;
};

class Executor {
  static constexpr uint8_t kSends = 1;  // from a device, mostly
  static constexpr uint8_t kReceives = 2;
  // Buffers of staging: two for each direction.
  static constexpr int kSendBuffers = 0;
  static constexpr int kRecvBuffers = 2;
  static constexpr int kLocalBuffer = 4;
  // Chunks that are under way at once.
  static constexpr size_t kMaxInFlight = 4;

 public:
  Executor(const Plan& plan, Endpoint& source, Endpoint& target,
           Communicator* comm, const TransferOptions& options)
      : plan_(plan),
        source_(source),
        target_(target),
        comm_(comm),
        options_(options),
        env_(comm == nullptr ? Env::Real() : comm->env()),
        clock_(env_, options.call) {}

  absl::StatusOr<TransferStats> Run() {
    Stream on_device(plan_, source_.catalog());
    Stream to_or_from_device(plan_, source_.catalog());
    Endpoint* with_device = nullptr;
    for (size_t i = 0; i < plan_.moves.size(); ++i) {
      const Move& move = plan_.moves[i];
      const bool reads = move.provider == plan_.rank;
      const bool writes = IsLocal(move) || !reads;
      if (writes && options_.call.progress) bytes_total_ += move.wire_bytes();
      if (reads && source_.IsOnDevice(move.source_tensor)) {
        with_device = &source_;
      }
      if (writes && target_.IsOnDevice(move.target_tensor)) {
        with_device = &target_;
      }
    }
    DSD_RETURN_IF_ERROR(AbortOthers(MakeStaging(with_device)));
    for (size_t i = 0; i < plan_.moves.size(); ++i) {
      const Move& move = plan_.moves[i];
      if (!IsLocal(move)) continue;
      const bool from_device = source_.IsOnDevice(move.source_tensor);
      const bool to_device = target_.IsOnDevice(move.target_tensor);
      if (from_device && to_device) {
        DSD_ASSIGN_OR_RETURN(const bool done, CopyOnDevice(move));
        if (!done) on_device.Add(i);
      } else if (from_device || to_device) {
        to_or_from_device.Add(i);
      } else if (move.readers.empty()) {
        // What nobody waits for is copied while messages travel.
        local_moves_.push_back(i);
      } else {
        DSD_RETURN_IF_ERROR(Fail(CopyLocally(move), move));
      }
    }
    DSD_RETURN_IF_ERROR(AbortOthers(CopyLocally(on_device, true)));
    DSD_RETURN_IF_ERROR(AbortOthers(CopyLocally(to_or_from_device, false)));
    DSD_RETURN_IF_ERROR(ExchangeAll());
    DSD_RETURN_IF_ERROR(CopySomeLocally(std::numeric_limits<int64_t>::max()));
    DSD_RETURN_IF_ERROR(AbortOthers(staging_->Finish()));
    DSD_RETURN_IF_ERROR(AbortOthers(target_.Finish()));
    stats_.bytes_staged_peak = staging_->bytes_allocated();
    return stats_;
  }

 private:
  bool IsLocal(const Move& move) const {
    return move.provider == plan_.rank && move.provider_keeps;
  }

  // Boxes from storage that any rank can read are in the provider's target by
  // the time they are sent on, and storage is read once.
  bool IsRelayed(const Move& move) const {
    return move.relayed ||
           (move.provider_keeps &&
            source_.catalog()[move.source_tensor].layout.HasAnyHolder());
  }

  absl::Status MakeStaging(Endpoint* with_device) {
    std::unique_ptr<DeviceStream> stream;
    if (with_device != nullptr) {
      DSD_ASSIGN_OR_RETURN(stream, with_device->OpenDeviceStream());
    }
    staging_.emplace(options_.chunk_bytes, std::move(stream), env_,
                     clock_.deadline(), absl::StrCat(" on rank ", plan_.rank));
    return absl::OkStatus();
  }

  // Tells the others before this rank unwinds: they may be waiting for it.
  absl::Status AbortOthers(absl::Status status) {
    if (!status.ok() && comm_ != nullptr) comm_->Abort(status);
    return status;
  }
  template <class T>
  absl::StatusOr<T> AbortOthers(absl::StatusOr<T> result) {
    if (!result.ok()) (void)AbortOthers(result.status());
    return result;
  }

  absl::Status Fail(const absl::Status& status, const Move& move) {
    if (status.ok()) return status;
    return AbortOthers(Annotate(status, Where(move)));
  }

  std::string Where(const Move& move) const {
    return absl::StrCat("\"", source_.catalog()[move.source_tensor].fqn,
                        "\" on rank ", plan_.rank);
  }

  // The next of local_moves_, until this many bytes are copied.
  absl::Status CopySomeLocally(int64_t bytes) {
    for (; bytes > 0 && next_local_ < local_moves_.size(); ++next_local_) {
      const Move& move = plan_.moves[local_moves_[next_local_]];
      DSD_RETURN_IF_ERROR(Fail(CopyLocally(move), move));
      bytes -= move.wire_bytes();
    }
    return absl::OkStatus();
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
      std::byte* buffer = nullptr;
      if (direct_to != nullptr) {
        buffer = direct_to + begin * item_size;
      } else if (direct_from == nullptr) {
        DSD_ASSIGN_OR_RETURN(
            buffer, staging_->Memory(kLocalBuffer, /*on_device=*/false));
      }
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

  // Local copies with a device on one side or both, as messages from this rank
  // to itself: while the device works on one, the host does on the other.
  absl::Status CopyLocally(Stream& stream, bool on_device) {
    int64_t unpacked = 0;  // bytes
    std::vector<MessagePiece> packed;
    for (int k = 0;; ++k) {
      const int64_t bytes = stream.NextPieceBytes(options_.chunk_bytes);
      std::vector<std::pair<MessagePiece, MessagePiece>> pairs;
      stream.Next(bytes, [&](const Move& move, int64_t begin, int64_t end,
                             int64_t offset) {
        pairs.push_back({{&source_, move.source_tensor, &move.box, begin, end,
                          move.wire_dtype, offset},
                         {&target_, move.target_tensor, &move.box, begin, end,
                          move.wire_dtype, offset}});
      });
      std::vector<MessagePiece> targets;
      std::vector<MessagePiece> sources;
      for (const auto& [from, to] : pairs) {
        stats_.bytes_local += from.bytes();
        DSD_ASSIGN_OR_RETURN(const bool done, CopyDirectly(from, to));
        if (done) {
          DSD_RETURN_IF_ERROR(Report(from.bytes()));
          continue;
        }
        sources.push_back(from);
        targets.push_back(to);
      }
      if (!sources.empty()) {
        DSD_RETURN_IF_ERROR(staging_->Pack(k % 2, on_device, sources));
      }
      if (!packed.empty()) {
        const int before = (k + 1) % 2;
        if (!on_device) DSD_RETURN_IF_ERROR(staging_->WaitPacked(before));
        DSD_RETURN_IF_ERROR(staging_->Unpack(before, on_device, packed));
        DSD_RETURN_IF_ERROR(Report(unpacked));
      }
      if (bytes == 0) return absl::OkStatus();
      packed = std::move(targets);
      unpacked = 0;
      for (const MessagePiece& piece : packed) unpacked += piece.bytes();
    }
  }

  // A whole move in one copy, where the device holds its elements as they are
  // on the wire on both sides. Whether that was so.
  absl::StatusOr<bool> CopyOnDevice(const Move& move) {
    const DType dtype = source_.catalog()[move.source_tensor].dtype;
    if (dtype != target_.catalog()[move.target_tensor].dtype) return false;
    DeviceStream& stream = *staging_->stream();
    const auto from =
        source_.ViewOnDevice(move.source_tensor, move.box, stream);
    const auto to = target_.ViewOnDevice(move.target_tensor, move.box, stream);
    if (!from.has_value() || !to.has_value()) return false;
    DSD_RETURN_IF_ERROR(Fail(
        stream.CopyOnDevice(*from, *to, move.box.extents(), ItemSize(dtype)),
        move));
    stats_.bytes_local += move.wire_bytes();
    DSD_RETURN_IF_ERROR(Report(move.wire_bytes()));
    return true;
  }

  // Page-locked memory needs no staging, unless many small pieces travel faster
  // together. Whether the piece was copied so.
  absl::StatusOr<bool> CopyDirectly(const MessagePiece& from,
                                    const MessagePiece& to) {
    if (from.bytes() < std::min(kMinDirectBytes, options_.chunk_bytes / 2)) {
      return false;
    }
    const MessagePiece& in_host = from.is_on_device() ? to : from;
    std::byte* const memory = MemoryOf(in_host, nullptr);
    if (memory == nullptr || !staging_->stream()->IsPageLocked(memory)) {
      return false;
    }
    DSD_RETURN_IF_ERROR(from.is_on_device() ? staging_->ReadTo(from, memory)
                                            : staging_->WriteFrom(to, memory));
    return true;
  }

  // The moves between ranks; those that are relayed when the others are done.
  absl::Status ExchangeAll() {
    const bool with_devices =
        comm_ != nullptr && comm_->has_cuda_memory() && comm_->size() > 1;
    bool any = false;
    bool any_relayed = false;
    int64_t sent_from_device = 0;  // bytes; less those from elsewhere
    int64_t received_to_device = 0;
    for (const Move& move : plan_.moves) {
      const bool sends = move.provider == plan_.rank;
      const int64_t messages = sends ? move.readers.size() : 1;
      if (messages == 0) continue;
      any = true;
      any_relayed |= move.relayed;
      if (!with_devices) continue;
      const int64_t bytes = messages * move.wire_bytes();
      if (sends) {
        sent_from_device += ReadsFromDevice(move) ? bytes : -bytes;
      } else {
        received_to_device +=
            target_.IsOnDevice(move.target_tensor) ? bytes : -bytes;
      }
    }
    if (comm_ == nullptr) {
      if (!any) return absl::OkStatus();
      return absl::InvalidArgumentError(
          "the plan has other ranks, but there is no communicator");
    }
    if (with_devices) {
      DSD_RETURN_IF_ERROR(
          ShareDevices(sent_from_device > 0, received_to_device > 0));
    }
    if (!any) return absl::OkStatus();
    DSD_RETURN_IF_ERROR(ExchangeMoves(/*relayed=*/false));
    if (!any_relayed) return absl::OkStatus();
    DSD_RETURN_IF_ERROR(AbortOthers(staging_->Finish()));
    return ExchangeMoves(/*relayed=*/true);
  }

  absl::Status ExchangeMoves(bool relayed) {
    const int size = comm_->size();
    // Streams are made per step, so that memory does not grow with the world.
    std::vector<std::vector<size_t>> to(size);
    std::vector<std::vector<size_t>> from(size);
    for (size_t i = 0; i < plan_.moves.size(); ++i) {
      const Move& move = plan_.moves[i];
      if (move.relayed != relayed) continue;
      if (move.provider == plan_.rank) {
        for (int reader : move.readers) to[reader].push_back(i);
      } else {
        from[move.provider].push_back(i);
      }
    }
    for (int step = 1; step < size; ++step) {
      const int next = (plan_.rank + step) % size;
      const int previous = (plan_.rank + size - step) % size;
      DSD_RETURN_IF_ERROR(
          ExchangeStep(next, to[next], previous, from[previous]));
    }
    return LandUntil(0);
  }

  bool ReadsFromDevice(const Move& move) const {
    return IsRelayed(move) ? target_.IsOnDevice(move.target_tensor)
                           : source_.IsOnDevice(move.source_tensor);
  }

  // Which memory the messages between two ranks are in must be the same on both
  // sides: that of the device if most of what the one sends and most of what
  // the other receives, over all ranks, is there. Collective.
  absl::Status ShareDevices(bool sends, bool receives) {
    const std::byte mine{static_cast<uint8_t>((sends ? kSends : 0) |
                                              (receives ? kReceives : 0))};
    devices_.resize(comm_->size());
    std::vector<absl::Span<std::byte>> parts;
    for (std::byte& part : devices_) parts.push_back(absl::MakeSpan(&part, 1));
    return comm_->AllGather(absl::MakeConstSpan(&mine, 1), parts, TimeLeft());
  }

  bool IsOnDevice(int sender, int receiver) const {
    return !devices_.empty() &&
           (static_cast<uint8_t>(devices_[sender]) & kSends) != 0 &&
           (static_cast<uint8_t>(devices_[receiver]) & kReceives) != 0;
  }

  // One stream out and one in. A message that needs staging waits for one of
  // two buffers of its direction; of others kMaxInFlight are under way, also
  // those of the next step, since they cost no memory. Ranks start messages in
  // one order (step, chunk) and end them so, so none waits in a circle. On a
  // device both directions are one exchange.
  absl::Status ExchangeStep(int next, const std::vector<size_t>& out_moves,
                            int previous, const std::vector<size_t>& in_moves) {
    Stream out(plan_, source_.catalog());
    for (size_t move : out_moves) out.Add(move);
    Stream in(plan_, source_.catalog());
    for (size_t move : in_moves) in.Add(move);
    const bool out_on_device = IsOnDevice(plan_.rank, next);
    const bool in_on_device = IsOnDevice(previous, plan_.rank);
    const bool together = out_on_device || in_on_device;
    const auto space = [&](bool on_device) {
      return on_device ? staging_->stream()->space() : MemorySpace{};
    };

    const auto arriving = std::make_shared<Stream>(in);
    while (true) {
      const int64_t in_bytes = in.NextPieceBytes(options_.chunk_bytes);
      const int64_t out_bytes = out.NextPieceBytes(options_.chunk_bytes);
      if (in_bytes == 0 && out_bytes == 0) break;
      DSD_RETURN_IF_ERROR(LandUntil(kMaxInFlight - 1));
      Flight flight;
      std::optional<RecvOp> recv;
      std::string recv_label;
      if (in_bytes > 0) {
        flight.recv_bytes = in_bytes;
        flight.arriving = arriving;
        flight.recv_is_on_device = in_on_device;
        recv_label = Label(in);
        std::byte* memory = nullptr;
        if (in.IsOfOneMove(in_bytes)) {
          TakePieces(in, in_bytes, /*incoming=*/true, pieces_);
          memory = MemoryOfOne(in_on_device);
        } else {
          in.Next(in_bytes, [](const Move&, int64_t, int64_t, int64_t) {});
        }
        if (memory == nullptr) {
          DSD_ASSIGN_OR_RETURN(flight.recv_buffer,
                               FreeBuffer(kRecvBuffers, &Flight::recv_buffer));
          DSD_ASSIGN_OR_RETURN(memory, AbortOthers(staging_->Memory(
                                           flight.recv_buffer, in_on_device)));
        }
        recv = RecvOp{previous, absl::MakeSpan(memory, in_bytes),
                      space(in_on_device), recv_label};
        if (!together) {
          DSD_ASSIGN_OR_RETURN(
              flight.recv,
              comm_->StartExchange({}, {*recv}, recv_label, TimeLeft()));
        }
      }
      std::optional<SendOp> send;
      std::string send_label;
      if (out_bytes > 0) {
        send_label = Label(out);
        TakePieces(out, out_bytes, /*incoming=*/false, pieces_);
        const std::byte* memory = MemoryOfOne(out_on_device);
        if (memory == nullptr) {
          DSD_ASSIGN_OR_RETURN(flight.send_buffer,
                               FreeBuffer(kSendBuffers, &Flight::send_buffer));
          DSD_ASSIGN_OR_RETURN(
              memory, AbortOthers(Pack(flight.send_buffer, out_on_device)));
        }
        send = SendOp{next, absl::MakeConstSpan(memory, out_bytes),
                      space(out_on_device), send_label};
        if (!together) {
          DSD_ASSIGN_OR_RETURN(
              flight.send,
              comm_->StartExchange({*send}, {}, send_label, TimeLeft()));
        }
        stats_.bytes_sent += out_bytes;
        ++stats_.messages_sent;
      }
      if (together) {
        DSD_ASSIGN_OR_RETURN(
            flight.recv,
            comm_->StartExchange(
                absl::MakeConstSpan(send ? &*send : nullptr, send ? 1 : 0),
                absl::MakeConstSpan(recv ? &*recv : nullptr, recv ? 1 : 0),
                send ? send_label : recv_label, TimeLeft()));
      }
      flights_.push_back(std::move(flight));
      DSD_RETURN_IF_ERROR(CopySomeLocally(options_.chunk_bytes));
    }
    return together ? LandUntil(0) : absl::OkStatus();
  }

  // Messages of one chunk of a step, under way.
  struct Flight {
    std::optional<PendingExchange> recv;  // or both directions
    std::optional<PendingExchange> send;
    int64_t recv_bytes = 0;
    std::shared_ptr<Stream> arriving;  // that they are the next of
    bool recv_is_on_device = false;
    int recv_buffer = -1;  // of staging; -1: where it belongs
    int send_buffer = -1;
  };

  // Ends the oldest of them until so many are left.
  absl::Status LandUntil(size_t left) {
    while (flights_.size() > left) {
      Flight flight = std::move(flights_.front());
      flights_.pop_front();
      if (flight.send.has_value()) DSD_RETURN_IF_ERROR(flight.send->Wait());
      if (flight.recv.has_value()) DSD_RETURN_IF_ERROR(flight.recv->Wait());
      if (flight.recv_bytes == 0) continue;
      stats_.bytes_received += flight.recv_bytes;
      TakePieces(*flight.arriving, flight.recv_bytes, /*incoming=*/true,
                 landed_pieces_);
      if (flight.recv_buffer >= 0) {
        DSD_RETURN_IF_ERROR(AbortOthers(staging_->Unpack(
            flight.recv_buffer, flight.recv_is_on_device, landed_pieces_)));
      }
      DSD_RETURN_IF_ERROR(Report(flight.recv_bytes));
    }
    return absl::OkStatus();
  }

  // The one of two buffers of staging, from `first` on, that is free, or free
  // first.
  absl::StatusOr<int> FreeBuffer(int first, int Flight::*buffer) {
    while (true) {
      for (const int candidate : {first, first + 1}) {
        if (std::none_of(flights_.begin(), flights_.end(),
                         [&](const Flight& flight) {
                           return flight.*buffer == candidate;
                         })) {
          return candidate;
        }
      }
      DSD_RETURN_IF_ERROR(LandUntil(flights_.size() - 1));
    }
  }

  // pieces_ in a buffer.
  absl::StatusOr<const std::byte*> Pack(int buffer, bool on_device) {
    DSD_RETURN_IF_ERROR(staging_->Pack(buffer, on_device, pieces_));
    if (!on_device) DSD_RETURN_IF_ERROR(staging_->WaitPacked(buffer));
    return staging_->Memory(buffer, on_device);
  }

  // The next bytes of a stream.
  void TakePieces(Stream& stream, int64_t bytes, bool incoming,
                  std::vector<MessagePiece>& pieces) {
    pieces.clear();
    stream.Next(bytes, [&](const Move& move, int64_t begin, int64_t end,
                           int64_t offset) {
      const bool in_target = incoming || IsRelayed(move);
      pieces.push_back({in_target ? &target_ : &source_,
                        in_target ? move.target_tensor : move.source_tensor,
                        &move.box, begin, end, move.wire_dtype, offset});
    });
  }

  // Where a message of pieces_ lies already; null if it needs staging.
  std::byte* MemoryOfOne(bool on_device) const {
    if (pieces_.size() != 1) return nullptr;
    return MemoryOf(pieces_[0], on_device ? staging_->stream() : nullptr);
  }

  static std::string Label(const Stream& stream) {
    return absl::StrCat("transfer \"", stream.fqn(), "\"");
  }

  CallOptions TimeLeft() const {
    CallOptions left = clock_.Left();
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
  Env* const env_;
  const CallClock clock_;
  std::optional<Staging> staging_;
  std::deque<Flight> flights_;  // oldest first; they use staging_
  std::vector<MessagePiece> pieces_;
  std::vector<MessagePiece> landed_pieces_;
  std::vector<size_t> local_moves_;  // to be copied at any time
  size_t next_local_ = 0;
  std::vector<std::byte> devices_;  // of each rank, if that matters
  TransferStats stats_;
  int64_t bytes_done_ = 0;
  int64_t bytes_total_ = 0;
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
    const absl::Status status = absl::InvalidArgumentError(
        absl::StrCat("chunk_bytes is ", options.chunk_bytes,
                     ", expected at least ", kMinChunkBytes));
    // The others' may be right, and they wait for this one.
    if (comm != nullptr) comm->Abort(status);
    return status;
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
  const CallClock clock(comm->env(), options);
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
  DSD_ASSIGN_OR_RETURN(
      std::vector<std::string> texts,
      comm->AllGatherBlobs(text, kMaxVerdictBytes, clock.Left()));
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

Binding BindRanks(const Communicator* comm) {
  return comm == nullptr ? Binding(1) : Binding(comm->host_of_rank());
}

absl::StatusOr<TransferStats> Redistribute(Endpoint& source, Endpoint& target,
                                           Communicator* comm,
                                           const TransferOptions& options) {
  Env* const env = comm == nullptr ? Env::Real() : comm->env();
  const CallClock clock(env, options.call);
  const Catalog& from = source.catalog();
  const Catalog& to = target.catalog();
  const int rank = comm == nullptr ? 0 : comm->rank();
  const Binding binding = BindRanks(comm);
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
  TransferOptions rest = options;
  rest.call = clock.Left();
  return Transfer(*plan, source, target, comm, rest);
}

}  // namespace dsd
