// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/content_digest.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/crc/crc32c.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "xxhash.h"

namespace dsd {
namespace {

// Abseil's CRC starts from and ends with an inversion. Seen from outside, a
// register r is the value ~r, so both are undone by inverting on the way in and
// out; what remains is linear.
uint32_t LinearCrc(absl::Span<const std::byte> bytes) {
  const absl::string_view text(reinterpret_cast<const char*>(bytes.data()),
                               bytes.size());
  return ~static_cast<uint32_t>(
      absl::ExtendCrc32c(absl::crc32c_t{~uint32_t{0}}, text));
}

uint32_t ShiftSlowly(uint32_t value, int64_t distance) {
  if (value == 0 || distance == 0) return value;
  return ~static_cast<uint32_t>(absl::ExtendCrc32cByZeroes(
      absl::crc32c_t{~value}, static_cast<size_t>(distance)));
}

// A table costs about as much as this many slow shifts.
constexpr int kUsesBeforeTable = 32;
// Distances are the jumps between rows: one per dimension and box, so few.
constexpr size_t kMaxDistances = 64;

}  // namespace

struct ContentDigest::ShiftTable {
  std::array<std::array<uint32_t, 256>, 4> parts;

  explicit ShiftTable(int64_t distance) {
    for (int part = 0; part < 4; ++part) {
      parts[part][0] = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const uint32_t image =
            ShiftSlowly(uint32_t{1} << (8 * part + bit), distance);
        for (int low = 0; low < (1 << bit); ++low) {
          parts[part][(1 << bit) + low] = image ^ parts[part][low];
        }
      }
    }
  }

  uint32_t operator()(uint32_t value) const {
    return parts[0][value & 0xFF] ^ parts[1][(value >> 8) & 0xFF] ^
           parts[2][(value >> 16) & 0xFF] ^ parts[3][value >> 24];
  }
};

ContentDigest::ContentDigest(int64_t total_bytes) : total_bytes_(total_bytes) {}
ContentDigest::ContentDigest(ContentDigest&&) noexcept = default;
ContentDigest& ContentDigest::operator=(ContentDigest&&) noexcept = default;
ContentDigest::~ContentDigest() = default;

uint32_t ContentDigest::Shift(uint32_t value, int64_t distance) {
  if (value == 0 || distance == 0) return value;
  const auto it = tables_.find(distance);
  if (it != tables_.end()) return (*it->second)(value);
  if (uses_.size() < kMaxDistances || uses_.contains(distance)) {
    if (++uses_[distance] == kUsesBeforeTable) {
      tables_[distance] = std::make_unique<ShiftTable>(distance);
    }
  }
  return ShiftSlowly(value, distance);
}

void ContentDigest::AddRun(int64_t offset, absl::Span<const std::byte> bytes) {
  const int64_t after =
      total_bytes_ - offset - static_cast<int64_t>(bytes.size());
  partial_ ^= ShiftSlowly(LinearCrc(bytes), after);
}

void ContentDigest::AddBox(absl::Span<const int64_t> shape, int64_t item_size,
                           absl::Span<const int64_t> lo,
                           absl::Span<const int64_t> hi, int64_t begin,
                           int64_t end, absl::Span<const std::byte> packed) {
  if (begin >= end) return;
  // Merge the trailing dimensions that the box fills: what is left of the box
  // is `outer` dimensions of runs of `run_elements`.
  int outer = static_cast<int>(shape.size());
  int64_t run_elements = 1;
  int64_t flat_size = 1;
  while (outer > 0) {
    --outer;
    run_elements *= hi[outer] - lo[outer];
    flat_size *= shape[outer];
    if (run_elements != flat_size) break;
  }
  absl::InlinedVector<int64_t, 6> strides(shape.size());
  int64_t stride = 1;
  for (int d = static_cast<int>(shape.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= shape[d];
  }
  int64_t row = begin / run_elements;
  int64_t in_row = begin % run_elements;
  absl::InlinedVector<int64_t, 6> at(shape.size());
  int64_t flat = 0;  // of the first element of the current row
  for (int d = static_cast<int>(shape.size()) - 1; d >= 0; --d) {
    flat += lo[d] * strides[d];
    if (d >= outer) continue;
    at[d] = row % (hi[d] - lo[d]);
    row /= hi[d] - lo[d];
    flat += at[d] * strides[d];
  }

  // Horner's rule: what is summed so far moves from the end of one run to the
  // end of the next.
  uint32_t sum = 0;
  int64_t sum_end = 0;
  const std::byte* data = packed.data();
  for (int64_t left = end - begin; left > 0;) {
    const int64_t count = std::min(left, run_elements - in_row);
    const int64_t run_end = (flat + in_row + count) * item_size;
    sum = Shift(sum, run_end - sum_end) ^
          LinearCrc(absl::MakeConstSpan(data, count * item_size));
    sum_end = run_end;
    data += count * item_size;
    left -= count;
    in_row = 0;
    for (int d = outer - 1; d >= 0; --d) {
      flat += strides[d];
      if (++at[d] < hi[d] - lo[d]) break;
      flat -= at[d] * strides[d];
      at[d] = 0;
    }
  }
  partial_ ^= ShiftSlowly(sum, total_bytes_ - sum_end);
}

uint64_t ContentDigest::Finish(DType dtype,
                               absl::Span<const int64_t> shape) const {
  std::vector<uint64_t> fields = {partial_, static_cast<uint64_t>(dtype),
                                  static_cast<uint64_t>(total_bytes_),
                                  static_cast<uint64_t>(shape.size())};
  fields.insert(fields.end(), shape.begin(), shape.end());
  return XXH3_64bits(fields.data(), fields.size() * sizeof(uint64_t));
}

uint64_t DigestOfBytes(absl::string_view bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

std::string DigestHex(uint64_t digest) {
  return absl::StrCat(absl::Hex(digest, absl::kZeroPad16));
}

}  // namespace dsd
