// SPDX-License-Identifier: Apache-2.0
//
// The `dsd` program: looks into checkpoints. Starts in milliseconds, needs no
// LibTorch, executes nothing that a checkpoint says.

#ifndef DSD_FRONTENDS_CLI_CLI_H_
#define DSD_FRONTENDS_CLI_CLI_H_

#include <iosfwd>

namespace dsd::cli {

enum ExitCode : int {
  kExitOk = 0,
  kExitProblems = 1,  // something is wrong with the checkpoint's content
  kExitUsage = 2,
  kExitUnreadable = 3,  // there is no checkpoint, or it cannot be opened
  kExitOutput = 4,      // the output could not be written
};

// What those who look at the streams can see.
struct Terminal {
  bool styled = false;    // out is a terminal that shows bold text
  bool progress = false;  // err is a terminal
};

// Runs the program with these arguments and returns its exit code.
int Run(int argc, const char* const* argv, std::ostream& out, std::ostream& err,
        const Terminal& terminal = {});

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_CLI_H_
