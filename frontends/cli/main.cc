// SPDX-License-Identifier: Apache-2.0

#include <unistd.h>

#include <cstdlib>
#include <iostream>

#include "dsd/frontends/cli/cli.h"

int main(int argc, char** argv) {
  std::ios::sync_with_stdio(false);
  // Under `bazel run` the user's directory is another one than ours.
  const char* const directory = std::getenv("BUILD_WORKING_DIRECTORY");
  if (directory != nullptr && chdir(directory) != 0) {
    std::cerr << "dsd: cannot go to \"" << directory << "\"\n";
    return dsd::cli::kExitUsage;
  }
  dsd::cli::Terminal terminal;
  terminal.styled =
      isatty(STDOUT_FILENO) != 0 && std::getenv("NO_COLOR") == nullptr;
  const int code = dsd::cli::Run(argc, argv, std::cout, std::cerr, terminal);
  if (std::cout.flush()) return code;
  std::cerr << "dsd: the output could not be written\n";
  return dsd::cli::kExitOutput;
}
