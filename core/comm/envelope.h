// SPDX-License-Identifier: Apache-2.0
//
// The checked header of each message between two ranks.

#ifndef DSD_CORE_COMM_ENVELOPE_H_
#define DSD_CORE_COMM_ENVELOPE_H_

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "dsd/core/base/dtype.h"

namespace dsd {

// An envelope is this head, the text of the call (for people; may be cut), and
// the payload if it is small and in host memory: one message, so that small
// ones cost one. It says what the sender means before the receiver must trust a
// size. A larger payload is the next message, straight from and to the caller's
// memory; the size is part of that message's tag, so one of another size than
// expected matches no receive, whatever the backend would do with it.
struct EnvelopeHead {
  static constexpr uint32_t kMagic = 0x6d647364;  // "dsdm"
  static constexpr uint16_t kVersion = 4;

  uint32_t magic = kMagic;
  uint16_t version = kVersion;
  uint8_t call_size = 0;
  DeviceType memory = DeviceType::kCpu;  // of the payload
  uint64_t generation = 0;
  uint64_t lane = 0;
  uint64_t sequence = 0;
  uint64_t payload_size = 0;
  uint64_t call_digest = 0;  // of the call with all that ranks must agree on
};
static_assert(sizeof(EnvelopeHead) == 48);
static_assert(std::is_trivially_copyable_v<EnvelopeHead>);

inline constexpr size_t kMaxEnvelopeCall = 192;
static_assert(kMaxEnvelopeCall <= 0xff);
// Up to here a copy costs less than a message.
inline constexpr size_t kMaxInlinePayload = size_t{16} << 10;
inline constexpr size_t kMaxEnvelopeBytes =
    sizeof(EnvelopeHead) + kMaxEnvelopeCall + kMaxInlinePayload;

enum class MessagePart : uint64_t { kEnvelope = 0, kPayload = 1 };

// The engine's name for one message. Different for different arguments, up to
// collisions of a 64-bit hash between lanes. `size`: of a payload; 0 for an
// envelope.
inline uint64_t MessageTag(uint64_t lane, uint64_t sequence, MessagePart part,
                           uint64_t size) {
  const auto mix =
      [](uint64_t x) {  // a bijection (the finalizer of SplitMix64)
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
      };
  const uint64_t message =
      mix(lane) + 2 * sequence + static_cast<uint64_t>(part);
  return mix(mix(message) + size);
}

}  // namespace dsd

#endif  // DSD_CORE_COMM_ENVELOPE_H_
