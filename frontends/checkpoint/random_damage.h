// SPDX-License-Identifier: Apache-2.0
//
// Damaged files, for tests.

#ifndef DSD_FRONTENDS_CHECKPOINT_RANDOM_DAMAGE_H_
#define DSD_FRONTENDS_CHECKPOINT_RANDOM_DAMAGE_H_

#include <cstdint>
#include <random>
#include <string>

namespace dsd::checkpoint {

// `bytes` with some of: flipped bits, a cut, bytes put in, taken out or
// overwritten, with random bytes, with what integers overflow at, or with a
// part of `other`, which is not empty.
std::string Damage(std::string bytes, const std::string& other,
                   std::mt19937_64& random);

// Of this process so far.
int64_t PeakMemoryBytes();

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_RANDOM_DAMAGE_H_
