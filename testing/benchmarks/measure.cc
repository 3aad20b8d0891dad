// SPDX-License-Identifier: Apache-2.0

#include "dsd/testing/benchmarks/measure.h"

#include <time.h>

#include <cstdio>
#include <string>

namespace dsd {
double CpuSeconds() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) +
         1e-9 * static_cast<double>(time.tv_nsec);
}

nlohmann::json RunPeer(const std::string& command) {
  std::cerr << "# " << command << std::endl;
  FILE* const pipe = popen(command.c_str(), "r");
  std::string text;
  char buffer[4096];
  size_t size = 0;
  while (pipe != nullptr &&
         (size = fread(buffer, 1, sizeof(buffer), pipe)) > 0) {
    text.append(buffer, size);
  }
  if (pipe == nullptr || pclose(pipe) != 0) {
    std::cerr << "the peer failed" << std::endl;
    std::exit(1);
  }
  return nlohmann::json::parse(text);
}

}  // namespace dsd
