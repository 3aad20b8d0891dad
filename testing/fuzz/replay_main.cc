// SPDX-License-Identifier: Apache-2.0
//
// Feeds files to a fuzzer's function, without a fuzzer: each whole, and cut.

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  size_t inputs = 0;
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) {
      std::printf("cannot read %s\n", argv[i]);
      return 1;
    }
    const std::string bytes((std::istreambuf_iterator<char>(file)),
                            std::istreambuf_iterator<char>());
    // A copy of exactly that size, so that a sanitizer sees a read past it.
    for (size_t cut = 0; cut <= bytes.size(); cut += 1 + bytes.size() / 16) {
      const std::string part = bytes.substr(0, bytes.size() - cut);
      LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(part.data()),
                             part.size());
      ++inputs;
    }
  }
  std::printf("%zu inputs from %d files\n", inputs, argc - 1);
  return argc > 1 ? 0 : 1;
}
