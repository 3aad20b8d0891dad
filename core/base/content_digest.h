// SPDX-License-Identifier: Apache-2.0
//
// A digest of a tensor's elements that does not depend on how the tensor is
// cut: each holder adds the boxes it has, in any order, and the parts are
// merged.
//
//   ContentDigest digest(total_bytes);
//   digest.AddRun(0, first_half);       // here
//   other.AddRun(half, second_half);    // there
//   digest.Merge(other.partial());
//   Digest128 value = digest.Finish(dtype, shape);

#ifndef DSD_CORE_BASE_CONTENT_DIGEST_H_
#define DSD_CORE_BASE_CONTENT_DIGEST_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"

namespace dsd {

struct Digest128 {
  uint64_t high = 0;
  uint64_t low = 0;

  friend bool operator==(const Digest128& a, const Digest128& b) {
    return a.high == b.high && a.low == b.low;
  }
  friend bool operator!=(const Digest128& a, const Digest128& b) {
    return !(a == b);
  }
  friend bool operator<(const Digest128& a, const Digest128& b) {
    return std::tie(a.high, a.low) < std::tie(b.high, b.low);
  }
};

// How a digest is made. The values are stored: append only.
enum class DigestVersion {
  // 64 bits, of which 32 come from the elements: CRC32C. Only for checkpoints
  // that have such digests.
  k1 = 1,
  // 128 bits.
  k2 = 2,
};
inline constexpr DigestVersion kDigestVersion = DigestVersion::k2;

// A linear function of the canonical bytes (row-major, little-endian), so that
// contributions of runs add up by XOR and every partition gives the same sum:
// the bytes, as blocks of 16, are the coefficients of a polynomial over
// GF(2^128), whose value at a fixed point is the sum. (Version 1: a CRC32C
// without initial value and final inversion.) Each byte is to be added once. It
// finds damage, not forgery. Thread-compatible. Movable.
class ContentDigest {
 public:
  // `total_bytes`: of the whole tensor.
  explicit ContentDigest(int64_t total_bytes,
                         DigestVersion version = kDigestVersion);
  ContentDigest(ContentDigest&&) noexcept;
  ContentDigest& operator=(ContentDigest&&) noexcept;
  ~ContentDigest();

  // Bytes [offset, offset + bytes.size()) of the canonical form.
  void AddRun(int64_t offset, absl::Span<const std::byte> bytes);

  // Elements [begin, end) of the box [lo, hi) of a tensor of `shape`, counted
  // row-major over the box; `packed` has them back to back.
  void AddBox(absl::Span<const int64_t> shape, int64_t item_size,
              absl::Span<const int64_t> lo, absl::Span<const int64_t> hi,
              int64_t begin, int64_t end, absl::Span<const std::byte> packed);

  // Adds what another ContentDigest of the same tensor and version has seen.
  void Merge(const Digest128& partial) {
    partial_.high ^= partial.high;
    partial_.low ^= partial.low;
  }

  const Digest128& partial() const { return partial_; }
  int64_t total_bytes() const { return total_bytes_; }

  // The digest of the tensor, once all of its bytes are in. Mixes in dtype,
  // shape and length: equal bytes of another type give another digest.
  Digest128 Finish(DType dtype, absl::Span<const int64_t> shape) const;

 private:
  // Moves a sum to a later end, for the distances that many runs have in
  // common, such as a row.
  class Step;
  Digest128 Shift(const Digest128& value, int64_t distance);
  // Where a run that ends at byte `end` ends, in the unit of distances.
  int64_t EndOf(int64_t end) const;

  int64_t total_bytes_;
  DigestVersion version_;
  Digest128 partial_;
  absl::flat_hash_map<int64_t, std::unique_ptr<Step>> steps_;
  absl::flat_hash_map<int64_t, int> uses_;
};

// The digest of a byte string that is no tensor, such as an encoded object.
Digest128 DigestOfBytes(absl::string_view bytes,
                        DigestVersion version = kDigestVersion);

// 32 hexadecimal digits; 16 of one of version 1, whose high half is 0.
std::string DigestHex(const Digest128& digest,
                      DigestVersion version = kDigestVersion);

// The inverse; false if it is no such text.
bool ParseDigestHex(absl::string_view text, Digest128* digest,
                    DigestVersion version = kDigestVersion);

namespace internal {

// The two ways in which version 2 is computed, for tests: with the processor's
// carry-less multiplication, where it has one, and without.
Digest128 HashBlocks(int64_t offset, absl::Span<const std::byte> bytes,
                     bool portable);

}  // namespace internal
}  // namespace dsd

#endif  // DSD_CORE_BASE_CONTENT_DIGEST_H_
