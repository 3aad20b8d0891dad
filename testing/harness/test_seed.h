// SPDX-License-Identifier: Apache-2.0
//
// The seed of tests that draw at random.

#ifndef DSD_TESTING_HARNESS_TEST_SEED_H_
#define DSD_TESTING_HARNESS_TEST_SEED_H_

#include <cstdint>

namespace dsd::test {

// The number in the environment variable DSD_TEST_SEED, else a fresh one;
// prints it with the way to set it.
uint64_t TestSeed();

}  // namespace dsd::test

#endif  // DSD_TESTING_HARNESS_TEST_SEED_H_
