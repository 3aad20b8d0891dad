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
//   uint64_t value = digest.Finish(dtype, shape);

#ifndef DSD_CORE_BASE_CONTENT_DIGEST_H_
#define DSD_CORE_BASE_CONTENT_DIGEST_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "dsd/core/base/dtype.h"

namespace dsd {

// The CRC32C, without initial value and final inversion, of the canonical bytes
// (row-major, little-endian): a linear function of them. A run contributes its
// own CRC times x^(8 * bytes after it), so contributions add up by XOR and
// every partition gives the same sum. Each byte is to be added once. It finds
// damage, not forgery. Thread-compatible. Movable.
class ContentDigest {
 public:
  // `total_bytes`: of the whole tensor.
  explicit ContentDigest(int64_t total_bytes);
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

  // Adds what another ContentDigest of the same tensor has seen.
  void Merge(uint32_t partial) { partial_ ^= partial; }

  uint32_t partial() const { return partial_; }
  int64_t total_bytes() const { return total_bytes_; }

  // The digest of the tensor, once all of its bytes are in. Mixes in dtype,
  // shape and length: equal bytes of another type give another digest.
  uint64_t Finish(DType dtype, absl::Span<const int64_t> shape) const;

 private:
  // Multiplication by x^(8 * distance), as four tables.
  struct ShiftTable;
  uint32_t Shift(uint32_t value, int64_t distance);

  int64_t total_bytes_;
  uint32_t partial_ = 0;
  // For the distances that many runs have in common, such as a row.
  absl::flat_hash_map<int64_t, std::unique_ptr<ShiftTable>> tables_;
  absl::flat_hash_map<int64_t, int> uses_;
};

// The digest of a byte string that is no tensor, such as an encoded object.
uint64_t DigestOfBytes(absl::string_view bytes);

// 16 hexadecimal digits.
std::string DigestHex(uint64_t digest);

}  // namespace dsd

#endif  // DSD_CORE_BASE_CONTENT_DIGEST_H_
