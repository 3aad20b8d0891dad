// SPDX-License-Identifier: Apache-2.0

#include <unistd.h>

#include <cstdlib>
#include <iostream>

#include "absl/strings/string_view.h"
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
  const char* const no_colour = std::getenv("NO_COLOR");
  const char* const name = std::getenv("TERM");
  const bool is_dumb = name != nullptr && absl::string_view(name) == "dumb";
  terminal.styled = isatty(STDOUT_FILENO) != 0 && !is_dumb &&
                    (no_colour == nullptr || *no_colour == '\0');
  terminal.progress = isatty(STDERR_FILENO) != 0 && !is_dumb;
  const int code = dsd::cli::Run(argc, argv, std::cout, std::cerr, terminal);
  if (std::cout.flush()) return code;
  std::cerr << "dsd: the output could not be written\n";
  return dsd::cli::kExitOutput;
}
