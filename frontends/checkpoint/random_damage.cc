// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/checkpoint/random_damage.h"

#include <sys/resource.h>

#include <iterator>

namespace dsd::checkpoint {

std::string Damage(std::string bytes, const std::string& other,
                   std::mt19937_64& random) {
  const auto below = [&random](size_t end) {
    return static_cast<size_t>(random() % end);
  };
  for (size_t change = 1 + below(3); change > 0; --change) {
    if (bytes.empty()) return bytes;
    const size_t at = below(bytes.size());
    switch (below(8)) {
      case 0:
      case 1:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 2:
        bytes[at] = static_cast<char>(random());
        break;
      case 3:
        bytes.resize(at);
        break;
      case 4:
        bytes.erase(at, 1 + below(16));
        break;
      case 5:
        bytes.insert(at, other, below(other.size()), below(64));
        break;
      case 6: {
        const std::string part = other.substr(below(other.size()), below(64));
        bytes.replace(at, part.size(), part);
        break;
      }
      default: {
        static constexpr uint64_t kEdges[] = {0,
                                              0x7FFFFFFF,
                                              0xFFFFFFFF,
                                              0x7FFFFFFFFFFFFFFF,
                                              0x8000000000000000,
                                              0xFFFFFFFFFFFFFFFF};
        const uint64_t edge = kEdges[below(std::size(kEdges))];
        const size_t count = size_t{1} << below(4);
        bytes.replace(at, count, reinterpret_cast<const char*>(&edge), count);
      }
    }
  }
  return bytes;
}

int64_t PeakMemoryBytes() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} << 10;
}

}  // namespace dsd::checkpoint
