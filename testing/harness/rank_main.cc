// SPDX-License-Identifier: Apache-2.0
//
// The main function of tests that start ranks as processes.

#include <string>

#include "dsd/testing/harness/rank_processes.h"
#include "gmock/gmock.h"

int main(int argc, char** argv) {
  ::testing::InitGoogleMock(&argc, argv);
  const std::string program = dsd::RequestedRankProgram();
  if (!program.empty()) return dsd::RankMain(program);
  dsd::AllowRankProcesses();
  return RUN_ALL_TESTS();
}
