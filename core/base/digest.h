// SPDX-License-Identifier: Apache-2.0
//
// 32-byte fingerprints for comparing catalogs, options and plans between ranks.
// Not cryptographic: they find mistakes, not attackers.

#ifndef DSD_CORE_BASE_DIGEST_H_
#define DSD_CORE_BASE_DIGEST_H_

#include <array>
#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace dsd {

struct Digest {
  std::array<uint8_t, 32> bytes = {};

  std::string Hex() const;
  friend bool operator==(const Digest& a, const Digest& b) {
    return a.bytes == b.bytes;
  }
  friend bool operator!=(const Digest& a, const Digest& b) { return !(a == b); }
  friend bool operator<(const Digest& a, const Digest& b) {
    return a.bytes < b.bytes;
  }
  template <class H>
  friend H AbslHashValue(H h, const Digest& d) {
    return H::combine(std::move(h), d.bytes);
  }
};

// Builds a Digest from typed fields. Every field is length-prefixed, so that
// ("ab", "c") and ("a", "bc") differ. The same on every machine of one byte
// order; little-endian is the only one supported.
class DigestBuilder {
 public:
  DigestBuilder& Add(absl::string_view text);
  DigestBuilder& Add(int64_t value);
  DigestBuilder& Add(absl::Span<const int64_t> values);
  DigestBuilder& Add(const Digest& digest);
  Digest Finish() const;

 private:
  std::string bytes_;
};

}  // namespace dsd

#endif  // DSD_CORE_BASE_DIGEST_H_
