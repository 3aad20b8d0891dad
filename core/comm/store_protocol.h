// SPDX-License-Identifier: Apache-2.0
//
// What the TCP store and its clients say to each other: frames of 4 bytes
// length, 1 byte kind, 8 bytes id, then fields; all little-endian. Private to
// this package.
//
// A client says kHello and gets one kReply; then it may ask. Where the job has
// a token, kChallenge and kProof come between, and the reply has the server's
// own proof (job_token.h). Frames that are too long or do not decode end the
// connection.
//
// The reply also says what a client is to be: one that asks here; one that asks
// elsewhere, at a relay; or a relay, which welcomes others in its turn, and
// passes what they and the server say to each other on over its own connection,
// a channel for each of them. It answers beats itself.

#ifndef DSD_CORE_COMM_STORE_PROTOCOL_H_
#define DSD_CORE_COMM_STORE_PROTOCOL_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace dsd {

// "dsds"; the first field of kHello. It and the version come first in every
// version, and a refusal is a kReply in every version.
inline constexpr uint32_t kStoreMagic = 0x73647364;
inline constexpr uint32_t kStoreVersion = 5;

inline constexpr size_t kFrameHeaderBytes = sizeof(uint32_t);
inline constexpr size_t kMaxHelloBytes = 4096;
inline constexpr size_t kMaxFrameBytes = size_t{1} << 20;
// A frame as it is passed on.
inline constexpr size_t kMaxPassedBytes = kMaxFrameBytes + 64;
// Together they leave room in a frame.
inline constexpr size_t kMaxKeyBytes = 8192;
inline constexpr size_t kMaxValueBytes = kMaxFrameBytes / 2;

enum class FrameKind : uint8_t {
  // From a client. The id is its name for the request.
  kHello = 1,     // magic, version, version of dsd, nonce, job, generation,
                  // rank (-1: one that asks here whatever rank it is)
  kSet = 2,       // key, value                              -> kReply
  kGet = 3,       // key                                     -> kReply: value
  kAdd = 4,       // key, delta                              -> kReply: sum
  kForget = 5,    // the id's kGet needs no answer any more
  kJoin = 6,      // group, rank, size, facts, patience (ns) -> kReply
  kLeave = 7,     // member                                  -> kReply
  kFail = 8,      // member, code, text
  kGone = 9,      // member
  kAsk = 10,      // member, question, patience (ns)         -> kReply: answers
  kAnswer = 11,   // text; the id is the question's
  kBeat = 12,     // now and then                            -> kReply
  kProof = 13,    // to kChallenge: that of the client
  kFailAll = 14,  // code, text: kFail of all members here
  // From a relay. The id is the channel's.
  kServe = 15,   // address at which it relays
  kOpen = 16,    // rank: one has been welcomed
  kSilent = 17,  // text: it gives no sign of life
  // From a relay and to it, likewise.
  kPass = 32,   // what is said, a frame without its length
  kClose = 33,  // its connection has ended, or is to end
  // From the server.
  kReply = 64,      // code, text, value; the id is the request's
                    // (to kHello: code, text, heartbeat bound (ns), proof,
                    // role, rank of the relay, its address)
  kFailed = 65,     // member, code, text
  kQuestion = 66,   // member, question; the id is the question's
  kChallenge = 67,  // to kHello: nonce
  kLost = 68,       // code, text: the server is gone (from a relay)
};
// A member is named by the id of its kJoin.

enum class StoreRole : uint8_t {
  kClient = 0,
  kRelay = 1,
  // The connection ends; an empty address: the relay has not come yet.
  kElsewhere = 2,
};

// How many signs of life fit into the bound at which one that gives none is
// given up.
inline constexpr int kBeatsPerBound = 6;

// What one end of a connection thinks of the other. Thread-compatible.
class BeatWatch {
 public:
  // `bound`: zero or infinite if nobody is given up; cut to a sane minimum.
  explicit BeatWatch(absl::Duration bound)
      : bound_(bound <= absl::ZeroDuration()
                   ? absl::InfiniteDuration()
                   : std::max(bound, absl::Milliseconds(200))) {}

  bool on() const { return bound_ != absl::InfiniteDuration(); }
  absl::Duration bound() const { return bound_; }
  absl::Duration period() const { return bound_ / kBeatsPerBound; }

  // To be called once per period at least, after what has arrived was read.
  // Whether this process has run since the last call: one that was stopped
  // itself has no opinion of others.
  bool Ran(absl::Time now) {
    const bool ran = now - looked_ < bound_ / 2;
    looked_ = now;
    return ran;
  }

  // "does not answer for 30s (...)", of one that was last heard of then.
  static std::string HowLong(absl::Duration silence) {
    return absl::StrCat(
        "does not answer for ",
        absl::FormatDuration(absl::Trunc(silence, silence < absl::Seconds(1)
                                                      ? absl::Milliseconds(1)
                                                      : absl::Seconds(1))),
        " (its process is stopped, or its host is out of reach)");
  }

 private:
  const absl::Duration bound_;
  absl::Time looked_ = absl::InfinitePast();
};

class FrameWriter {
 public:
  FrameWriter(FrameKind kind, uint64_t id) {
    Put(uint32_t{0});
    Put(static_cast<uint8_t>(kind));
    Put(id);
  }

  template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
  FrameWriter& Put(T value) {
    frame_.append(reinterpret_cast<const char*>(&value), sizeof(value));
    return *this;
  }
  FrameWriter& Put(absl::string_view text) {
    Put(static_cast<uint32_t>(text.size()));
    frame_.append(text.data(), text.size());
    return *this;
  }
  FrameWriter& Put(const absl::Status& status) {
    Put(static_cast<uint32_t>(status.code()));
    // A text is for people; a frame must fit.
    return Put(status.message().substr(0, kMaxValueBytes / 4));
  }

  std::string Finish() {
    const uint32_t size =
        static_cast<uint32_t>(frame_.size() - kFrameHeaderBytes);
    std::memcpy(frame_.data(), &size, sizeof(size));
    return std::move(frame_);
  }

 private:
  std::string frame_;
};

// Reads fields; after the first that is not there all are empty and ok() is
// false.
class FrameReader {
 public:
  explicit FrameReader(absl::string_view body) : left_(body) {}

  template <class T>
  T Get() {
    static_assert(std::is_integral_v<T>);
    T value = 0;
    if (left_.size() < sizeof(T)) {
      ok_ = false;
      return value;
    }
    std::memcpy(&value, left_.data(), sizeof(T));
    left_.remove_prefix(sizeof(T));
    return value;
  }
  absl::string_view GetText() {
    const uint32_t size = Get<uint32_t>();
    if (!ok_ || left_.size() < size) {
      ok_ = false;
      return "";
    }
    const absl::string_view text = left_.substr(0, size);
    left_.remove_prefix(size);
    return text;
  }
  absl::Status GetStatus() {
    const uint32_t code = Get<uint32_t>();
    const absl::string_view text = GetText();
    return absl::Status(static_cast<absl::StatusCode>(code), text);
  }

  bool ok() const { return ok_; }

 private:
  absl::string_view left_;
  bool ok_ = true;
};

// With its length.
inline std::string FrameOf(absl::string_view body) {
  const uint32_t size = static_cast<uint32_t>(body.size());
  std::string frame(reinterpret_cast<const char*>(&size), sizeof(size));
  frame.append(body.data(), body.size());
  return frame;
}

// Moves the first whole frame from the front of `left` to `body` (without its
// length). Returns nullopt if the frame is longer than `max_bytes`, else
// whether there was one.
inline std::optional<bool> TakeFrame(absl::string_view& left, size_t max_bytes,
                                     absl::string_view& body) {
  if (left.size() < kFrameHeaderBytes) return false;
  uint32_t size;
  std::memcpy(&size, left.data(), sizeof(size));
  if (size > max_bytes) return std::nullopt;
  if (left.size() < kFrameHeaderBytes + size) return false;
  body = left.substr(kFrameHeaderBytes, size);
  left.remove_prefix(kFrameHeaderBytes + size);
  return true;
}

}  // namespace dsd

#endif  // DSD_CORE_COMM_STORE_PROTOCOL_H_
