// SPDX-License-Identifier: Apache-2.0

#include <unistd.h>

#include <cstdlib>
#include <iostream>

#include "dsd/frontends/cli/cli.h"

int main(int argc, char** argv) {
  std::ios::sync_with_stdio(false);
  const bool styled =
      isatty(STDOUT_FILENO) != 0 && std::getenv("NO_COLOR") == nullptr;
  return dsd::cli::Run(argc, argv, std::cout, std::cerr, styled);
}
