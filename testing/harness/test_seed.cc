// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/harness/test_seed.h"

#include <cstdlib>
#include <iostream>

#include "absl/strings/numbers.h"
#include "dsd/core/base/env.h"

namespace dsd::test {

uint64_t TestSeed() {
  uint64_t seed = 0;
  const char* text = std::getenv("DSD_TEST_SEED");
  if (text == nullptr || !absl::SimpleAtoi(text, &seed)) {
    seed = Env::Real()->RandomSeed();
  }
  std::cout << "seed " << seed << " (again: --test_env=DSD_TEST_SEED=" << seed
            << ")" << std::endl;
  return seed;
}

}  // namespace dsd::test
