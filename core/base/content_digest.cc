// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/content_digest.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/crc/crc32c.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "xxhash.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dsd {
namespace {

// ---------------------------------------------------------------- version 1

// Abseil's CRC starts from and ends with an inversion. Seen from outside, a
// register r is the value ~r, so both are undone by inverting on the way in and
// out; what remains is linear.
uint32_t LinearCrc(absl::Span<const std::byte> bytes) {
  const absl::string_view text(reinterpret_cast<const char*>(bytes.data()),
                               bytes.size());
  return ~static_cast<uint32_t>(
      absl::ExtendCrc32c(absl::crc32c_t{~uint32_t{0}}, text));
}

uint32_t ShiftCrc(uint32_t value, int64_t distance) {
  return ~static_cast<uint32_t>(absl::ExtendCrc32cByZeroes(
      absl::crc32c_t{~value}, static_cast<size_t>(distance)));
}

// Multiplication by x^(8 * distance), as four tables.
struct CrcShiftTable {
  std::array<std::array<uint32_t, 256>, 4> parts;

  explicit CrcShiftTable(int64_t distance) {
    for (int part = 0; part < 4; ++part) {
      parts[part][0] = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const uint32_t image =
            ShiftCrc(uint32_t{1} << (8 * part + bit), distance);
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

// ---------------------------------------------------------------- version 2
//
// Bit i of a Digest128 is the coefficient of x^i in GF(2)[x] modulo
// x^128 + x^7 + x^2 + x + 1.

constexpr int64_t kBlockBytes = 16;
constexpr uint64_t kReduction = 0x87;
// Digits of the golden ratio. A change makes all stored digests differ.
constexpr Digest128 kPoint = {0x9E3779B97F4A7C15, 0xF39CC0605CEDC834};
constexpr int kGroup = 8;  // blocks that share a reduction

Digest128 Xor(const Digest128& a, const Digest128& b) {
  return {a.high ^ b.high, a.low ^ b.low};
}

Digest128 LoadBlock(const std::byte* bytes) {
  Digest128 block;
  std::memcpy(&block.low, bytes, 8);
  std::memcpy(&block.high, bytes + 8, 8);
  return block;
}

// The product of two polynomials of degree 63.
Digest128 MultiplyHalves(uint64_t a, uint64_t b) {
  Digest128 product;
  for (int i = 0; i < 64; ++i) {
    const uint64_t mask = -((b >> i) & 1);
    product.low ^= (a << i) & mask;
    if (i > 0) product.high ^= (a >> (64 - i)) & mask;
  }
  return product;
}

Digest128 MultiplyPortably(const Digest128& a, const Digest128& b) {
  Digest128 low = MultiplyHalves(a.low, b.low);
  Digest128 high = MultiplyHalves(a.high, b.high);
  const Digest128 middle =
      Xor(MultiplyHalves(a.low, b.high), MultiplyHalves(a.high, b.low));
  low.high ^= middle.low;
  high.low ^= middle.high;
  const Digest128 top = MultiplyHalves(high.high, kReduction);
  low.high ^= top.low;
  high.low ^= top.high;
  return Xor(low, MultiplyHalves(high.low, kReduction));
}

#if defined(__x86_64__)
#define DSD_CLMUL __attribute__((target("pclmul,sse4.1")))

DSD_CLMUL inline __m128i ToVector(const Digest128& value) {
  return _mm_set_epi64x(static_cast<int64_t>(value.high),
                        static_cast<int64_t>(value.low));
}

DSD_CLMUL inline Digest128 FromVector(__m128i value) {
  return {static_cast<uint64_t>(_mm_extract_epi64(value, 1)),
          static_cast<uint64_t>(_mm_cvtsi128_si64(value))};
}

// A product before it is reduced: low + middle x^64 + high x^128.
struct WideProduct {
  __m128i low, middle, high;
};

DSD_CLMUL inline void Accumulate(__m128i a, __m128i b, WideProduct* sum) {
  sum->low = _mm_xor_si128(sum->low, _mm_clmulepi64_si128(a, b, 0x00));
  sum->high = _mm_xor_si128(sum->high, _mm_clmulepi64_si128(a, b, 0x11));
  sum->middle = _mm_xor_si128(sum->middle, _mm_clmulepi64_si128(a, b, 0x01));
  sum->middle = _mm_xor_si128(sum->middle, _mm_clmulepi64_si128(a, b, 0x10));
}

DSD_CLMUL inline __m128i Reduce(const WideProduct& sum) {
  const __m128i reduction = _mm_cvtsi64_si128(kReduction);
  __m128i low = _mm_xor_si128(sum.low, _mm_slli_si128(sum.middle, 8));
  __m128i high = _mm_xor_si128(sum.high, _mm_srli_si128(sum.middle, 8));
  const __m128i top = _mm_clmulepi64_si128(high, reduction, 0x01);
  low = _mm_xor_si128(low, _mm_slli_si128(top, 8));
  high = _mm_xor_si128(high, _mm_srli_si128(top, 8));
  return _mm_xor_si128(low, _mm_clmulepi64_si128(high, reduction, 0x00));
}

DSD_CLMUL inline __m128i Multiply(__m128i a, __m128i b) {
  WideProduct sum = {};
  Accumulate(a, b, &sum);
  return Reduce(sum);
}

bool HasClmul() {
  static const bool has =
      __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  return has;
}

// Four blocks at a time.
#define DSD_WIDE_CLMUL \
  __attribute__((target("pclmul,sse4.1,avx512f,avx512dq,vpclmulqdq")))

bool HasWideClmul() {
  static const bool has = HasClmul() && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("vpclmulqdq");
  return has;
}

DSD_WIDE_CLMUL inline __m128i SumOfLanes(__m512i value) {
  return _mm_xor_si128(_mm_xor_si128(_mm512_extracti64x2_epi64(value, 0),
                                     _mm512_extracti64x2_epi64(value, 1)),
                       _mm_xor_si128(_mm512_extracti64x2_epi64(value, 2),
                                     _mm512_extracti64x2_epi64(value, 3)));
}

DSD_CLMUL Digest128 MultiplyWithClmul(const Digest128& a, const Digest128& b) {
  return FromVector(Multiply(ToVector(a), ToVector(b)));
}
#else
bool HasClmul() { return false; }
Digest128 MultiplyWithClmul(const Digest128& a, const Digest128& b) {
  return MultiplyPortably(a, b);
}
#endif

Digest128 Times(const Digest128& a, const Digest128& b) {
  return HasClmul() ? MultiplyWithClmul(a, b) : MultiplyPortably(a, b);
}

// kPoint^(2^i).
const std::array<Digest128, 64>& Squares() {
  static const std::array<Digest128, 64> squares = [] {
    std::array<Digest128, 64> out;
    out[0] = kPoint;
    for (size_t i = 1; i < out.size(); ++i)
      out[i] = Times(out[i - 1], out[i - 1]);
    return out;
  }();
  return squares;
}

Digest128 Power(int64_t exponent) {
  Digest128 power = {0, 1};
  for (int i = 0; exponent >> i != 0; ++i) {
    if ((exponent >> i & 1) != 0) power = Times(power, Squares()[i]);
  }
  return power;
}

// Sum of block[i] * kPoint^(count - i), begun with `sum` added to the first.
Digest128 HashWholePortably(Digest128 sum, const std::byte* bytes,
                            int64_t count) {
  for (; count > 0; --count, bytes += kBlockBytes) {
    sum = MultiplyPortably(Xor(sum, LoadBlock(bytes)), kPoint);
  }
  return sum;
}

#if defined(__x86_64__)
// kPoint^(count - i) for i = 0, 1, ...: factors of the blocks of a group.
template <int kCount>
const std::array<Digest128, kCount>& Factors() {
  static const std::array<Digest128, kCount> factors = [] {
    std::array<Digest128, kCount> out;
    for (int i = 0; i < kCount; ++i) out[i] = Power(kCount - i);
    return out;
  }();
  return factors;
}

// The same factors, four to a vector, and for each two vectors the sums of the
// halves of theirs.
template <int kVectors>
struct WideFactors {
  WideFactors() {
    for (int i = 0; i < 4 * kVectors; ++i) {
      const Digest128 factor = Power(4 * kVectors - i);
      const int vector = i / 4;
      const int lane = i % 4;
      factors[vector][2 * lane] = factor.low;
      factors[vector][2 * lane + 1] = factor.high;
      halves[vector / 2][2 * lane + vector % 2] = factor.low ^ factor.high;
    }
  }
  static const WideFactors& Get() {
    static const WideFactors factors;
    return factors;
  }

  alignas(64) uint64_t factors[kVectors][8];
  alignas(64) uint64_t halves[kVectors / 2][8];
};

DSD_WIDE_CLMUL inline __m512i Xor3(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

// Whole groups of 4 * kVectors blocks; `*bytes` and `*count` move past them.
// The longer a group, the less the wait for its reduction counts. Three
// multiplications for each block: the middle part of a product is that of the
// sums of the halves, less the other two (Karatsuba).
template <int kVectors>
DSD_WIDE_CLMUL Digest128 HashGroupsWithWideClmul(Digest128 begin,
                                                 const std::byte** bytes,
                                                 int64_t* count) {
  const auto& [factors, halves] = WideFactors<kVectors>::Get();
  __m128i sum = ToVector(begin);
  for (; *count >= 4 * kVectors; *count -= 4 * kVectors) {
    __m512i low = _mm512_setzero_si512();
    __m512i high = low;
    __m512i middle = low;
    for (int i = 0; i < kVectors; i += 2) {
      __m512i first = _mm512_loadu_si512(*bytes + 64 * i);
      const __m512i second = _mm512_loadu_si512(*bytes + 64 * (i + 1));
      if (i == 0) first = _mm512_xor_si512(first, _mm512_zextsi128_si512(sum));
      const __m512i factor = _mm512_load_si512(factors[i]);
      const __m512i next = _mm512_load_si512(factors[i + 1]);
      low = Xor3(low, _mm512_clmulepi64_epi128(first, factor, 0x00),
                 _mm512_clmulepi64_epi128(second, next, 0x00));
      high = Xor3(high, _mm512_clmulepi64_epi128(first, factor, 0x11),
                  _mm512_clmulepi64_epi128(second, next, 0x11));
      const __m512i mixed =
          _mm512_xor_si512(_mm512_unpacklo_epi64(first, second),
                           _mm512_unpackhi_epi64(first, second));
      const __m512i half = _mm512_load_si512(halves[i / 2]);
      middle = Xor3(middle, _mm512_clmulepi64_epi128(mixed, half, 0x00),
                    _mm512_clmulepi64_epi128(mixed, half, 0x11));
    }
    *bytes += 64 * kVectors;
    middle = Xor3(middle, low, high);
    sum = Reduce({SumOfLanes(low), SumOfLanes(middle), SumOfLanes(high)});
  }
  return FromVector(sum);
}

DSD_CLMUL Digest128 HashWholeWithClmul(Digest128 begin, const std::byte* bytes,
                                       int64_t count) {
  if (count >= 16 && HasWideClmul()) {
    if (count >= 256) {
      begin = HashGroupsWithWideClmul<64>(begin, &bytes, &count);
    }
    begin = HashGroupsWithWideClmul<4>(begin, &bytes, &count);
  }
  const __m128i point = ToVector(kPoint);
  __m128i sum = ToVector(begin);
  if (count >= kGroup) {
    const auto& powers = Factors<kGroup>();
    __m128i factors[kGroup];
    for (int i = 0; i < kGroup; ++i) factors[i] = ToVector(powers[i]);
    for (; count >= kGroup; count -= kGroup) {
      WideProduct product = {};
      for (int i = 0; i < kGroup; ++i) {
        __m128i block =
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
        if (i == 0) block = _mm_xor_si128(block, sum);
        Accumulate(block, factors[i], &product);
        bytes += kBlockBytes;
      }
      sum = Reduce(product);
    }
  }
  for (; count > 0; --count, bytes += kBlockBytes) {
    sum = Multiply(
        _mm_xor_si128(sum,
                      _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))),
        point);
  }
  return FromVector(sum);
}
#else
Digest128 HashWholeWithClmul(Digest128 sum, const std::byte* bytes,
                             int64_t count) {
  return HashWholePortably(sum, bytes, count);
}
#endif

// ------------------------------------------------------------ of one version

// A run's contribution, up to the end of the unit that it ends in.
Digest128 HashRun(DigestVersion version, int64_t offset,
                  absl::Span<const std::byte> bytes) {
  if (version == DigestVersion::k1) return {0, LinearCrc(bytes)};
  return internal::HashBlocks(offset, bytes, !HasClmul());
}

Digest128 ShiftSlowly(DigestVersion version, const Digest128& value,
                      int64_t distance) {
  if (value == Digest128() || distance == 0) return value;
  if (version == DigestVersion::k1) {
    return {0, ShiftCrc(static_cast<uint32_t>(value.low), distance)};
  }
  return Times(value, Power(distance));
}

// How many slow shifts a Step costs.
int UsesBeforeStep(DigestVersion version) {
  return version == DigestVersion::k1 ? 32 : 2;
}
// Distances are the jumps between rows: one per dimension and box, so few.
constexpr size_t kMaxDistances = 64;

}  // namespace

namespace internal {

Digest128 HashBlocks(int64_t offset, absl::Span<const std::byte> bytes,
                     bool portable) {
  const auto whole = portable ? HashWholePortably : HashWholeWithClmul;
  Digest128 sum;
  std::byte block[kBlockBytes];
  // Of a block that is not all there the rest counts as zeros.
  const int64_t skip = offset % kBlockBytes;
  if (skip != 0 || bytes.size() < kBlockBytes) {
    const size_t count = std::min<size_t>(bytes.size(), kBlockBytes - skip);
    if (count == 0) return sum;
    std::memset(block, 0, sizeof(block));
    std::memcpy(block + skip, bytes.data(), count);
    sum = whole(sum, block, 1);
    bytes.remove_prefix(count);
  }
  const int64_t blocks = static_cast<int64_t>(bytes.size()) / kBlockBytes;
  sum = whole(sum, bytes.data(), blocks);
  bytes.remove_prefix(blocks * kBlockBytes);
  if (!bytes.empty()) {
    std::memset(block, 0, sizeof(block));
    std::memcpy(block, bytes.data(), bytes.size());
    sum = whole(sum, block, 1);
  }
  return sum;
}

}  // namespace internal

class ContentDigest::Step {
 public:
  Step(DigestVersion version, int64_t distance) {
    if (version == DigestVersion::k1) {
      table_ = std::make_unique<CrcShiftTable>(distance);
    } else {
      power_ = Power(distance);
    }
  }

  Digest128 operator()(const Digest128& value) const {
    if (table_ == nullptr) return Times(value, power_);
    return {0, (*table_)(static_cast<uint32_t>(value.low))};
  }

 private:
  std::unique_ptr<CrcShiftTable> table_;
  Digest128 power_;
};

ContentDigest::ContentDigest(int64_t total_bytes, DigestVersion version)
    : total_bytes_(total_bytes), version_(version) {}
ContentDigest::ContentDigest(ContentDigest&&) noexcept = default;
ContentDigest& ContentDigest::operator=(ContentDigest&&) noexcept = default;
ContentDigest::~ContentDigest() = default;

int64_t ContentDigest::EndOf(int64_t end) const {
  if (version_ == DigestVersion::k1) return end;
  return (end + kBlockBytes - 1) / kBlockBytes;
}

Digest128 ContentDigest::Shift(const Digest128& value, int64_t distance) {
  if (value == Digest128() || distance == 0) return value;
  const auto it = steps_.find(distance);
  if (it != steps_.end()) return (*it->second)(value);
  if (uses_.size() < kMaxDistances || uses_.contains(distance)) {
    if (++uses_[distance] == UsesBeforeStep(version_)) {
      steps_[distance] = std::make_unique<Step>(version_, distance);
    }
  }
  return ShiftSlowly(version_, value, distance);
}

void ContentDigest::AddRun(int64_t offset, absl::Span<const std::byte> bytes) {
  const int64_t end = offset + static_cast<int64_t>(bytes.size());
  Merge(ShiftSlowly(version_, HashRun(version_, offset, bytes),
                    EndOf(total_bytes_) - EndOf(end)));
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
  Digest128 sum;
  int64_t sum_end = 0;
  const std::byte* data = packed.data();
  for (int64_t left = end - begin; left > 0;) {
    const int64_t count = std::min(left, run_elements - in_row);
    const int64_t run_begin = (flat + in_row) * item_size;
    const int64_t run_end = EndOf(run_begin + count * item_size);
    sum = Xor(Shift(sum, run_end - sum_end),
              HashRun(version_, run_begin,
                      absl::MakeConstSpan(data, count * item_size)));
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
  Merge(ShiftSlowly(version_, sum, EndOf(total_bytes_) - sum_end));
}

Digest128 ContentDigest::Finish(DType dtype,
                                absl::Span<const int64_t> shape) const {
  std::vector<uint64_t> fields = {partial_.low};
  if (version_ != DigestVersion::k1) fields.push_back(partial_.high);
  fields.insert(fields.end(), {static_cast<uint64_t>(dtype),
                               static_cast<uint64_t>(total_bytes_),
                               static_cast<uint64_t>(shape.size())});
  fields.insert(fields.end(), shape.begin(), shape.end());
  return DigestOfBytes(
      absl::string_view(reinterpret_cast<const char*>(fields.data()),
                        fields.size() * sizeof(uint64_t)),
      version_);
}

Digest128 DigestOfBytes(absl::string_view bytes, DigestVersion version) {
  if (version == DigestVersion::k1) {
    return {0, XXH3_64bits(bytes.data(), bytes.size())};
  }
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  return {hash.high64, hash.low64};
}

std::string DigestHex(const Digest128& digest, DigestVersion version) {
  return absl::StrCat(
      version == DigestVersion::k1
          ? ""
          : absl::StrCat(absl::Hex(digest.high, absl::kZeroPad16)),
      absl::Hex(digest.low, absl::kZeroPad16));
}

bool ParseDigestHex(absl::string_view text, Digest128* digest,
                    DigestVersion version) {
  *digest = Digest128();
  if (version != DigestVersion::k1) {
    if (text.size() != 32 ||
        !absl::SimpleHexAtoi(text.substr(0, 16), &digest->high)) {
      return false;
    }
    text.remove_prefix(16);
  }
  return text.size() == 16 && absl::SimpleHexAtoi(text, &digest->low);
}

}  // namespace dsd
