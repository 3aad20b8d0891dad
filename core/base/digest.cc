// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/base/digest.h"

#include <cstring>

#include "absl/strings/escaping.h"
#include "xxhash.h"

namespace dsd {
namespace {

template <class T>
void AppendRaw(std::string& out, const T& value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

}  // namespace

std::string Digest::Hex() const {
  return absl::BytesToHexString(absl::string_view(
      reinterpret_cast<const char*>(bytes.data()), bytes.size()));
}

DigestBuilder& DigestBuilder::Add(absl::string_view text) {
  AppendRaw(bytes_, static_cast<uint64_t>(text.size()));
  bytes_.append(text.data(), text.size());
  return *this;
}

DigestBuilder& DigestBuilder::Add(int64_t value) {
  AppendRaw(bytes_, value);
  return *this;
}

DigestBuilder& DigestBuilder::Add(absl::Span<const int64_t> values) {
  AppendRaw(bytes_, static_cast<uint64_t>(values.size()));
  bytes_.append(reinterpret_cast<const char*>(values.data()),
                values.size() * sizeof(int64_t));
  return *this;
}

DigestBuilder& DigestBuilder::Add(const Digest& digest) {
  bytes_.append(reinterpret_cast<const char*>(digest.bytes.data()),
                digest.bytes.size());
  return *this;
}

Digest DigestBuilder::Finish() const {
  Digest out;
  for (int half = 0; half < 2; ++half) {
    const XXH128_hash_t hash =
        XXH3_128bits_withSeed(bytes_.data(), bytes_.size(), half);
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, hash);
    std::memcpy(out.bytes.data() + 16 * half, canonical.digest, 16);
  }
  return out;
}

}  // namespace dsd
