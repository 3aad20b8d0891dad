// SPDX-License-Identifier: Apache-2.0
//
// The checked header of each message between two ranks.

#ifndef DSD_CORE_COMM_ENVELOPE_H_
#define DSD_CORE_COMM_ENVELOPE_H_

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "absl/strings/string_view.h"

namespace dsd {

// Travels as a message of its own, of fixed size, so that the receiver knows
// what the sender means before it must trust a size. A payload that fits rides
// along; a larger one is the next message, straight from and to the caller's
// memory. The size is part of that message's tag: a payload of another size
// than expected matches no receive, whatever the backend would do with it.
struct Envelope {
  static constexpr uint32_t kMagic = 0x6d647364;  // "dsdm"
  static constexpr uint16_t kVersion = 1;
  static constexpr size_t kSize = 1024;
  static constexpr size_t kMaxCall = 192;
  static constexpr size_t kMaxInline = kSize - 48 - kMaxCall;

  uint32_t magic;
  uint16_t version;
  uint16_t call_size;
  uint64_t generation;
  uint64_t lane;
  uint64_t sequence;
  uint64_t payload_size;
  uint64_t call_digest;  // of the call with all that ranks must agree on
  char call[kMaxCall];   // for people; may be cut
  std::byte payload[kMaxInline];
};
static_assert(sizeof(Envelope) == Envelope::kSize);
static_assert(std::is_trivially_copyable_v<Envelope>);

enum class MessagePart : uint64_t { kEnvelope = 0, kPayload = 1 };

// The engine's name for one message. Different for different arguments, up to
// collisions of a 64-bit hash between lanes.
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
