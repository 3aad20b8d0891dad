// SPDX-License-Identifier: Apache-2.0
//
// For tests of the program: checkpoints of known values, and runs.

#ifndef DSD_FRONTENDS_CLI_TEST_CHECKPOINT_H_
#define DSD_FRONTENDS_CLI_TEST_CHECKPOINT_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/value/value.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/cli/cli.h"

namespace dsd::cli {

struct TestTensor {
  std::string key;
  DType dtype;
  Layout layout;
  std::string bytes;  // of the whole tensor
};

// Raw values as bytes: of float, int64_t, uint16_t bits of a half, ...
template <class T>
std::string BytesOf(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()),
                     values.size() * sizeof(T));
}

// The first `count` values first, first + step, ...
std::string Floats(int64_t count, float first = 0, float step = 1);

// A float32 tensor of Floats(), whole on rank 0 or on `layout`.
TestTensor FloatTensor(std::string key, Dims shape, float first = 0);
TestTensor FloatTensor(std::string key, Layout layout, float first = 0);

// A new directory that nobody uses.
std::string NewPath(absl::string_view name);

// Saves with as many ranks.
absl::Status SaveTo(const std::string& directory,
                    const std::vector<TestTensor>& tensors,
                    const std::vector<checkpoint::ObjectEntry>& objects,
                    int ranks);

// The same into a new directory, which is returned.
std::string SaveCheckpoint(
    const std::vector<TestTensor>& tensors,
    const std::vector<checkpoint::ObjectEntry>& objects = {}, int ranks = 1);

struct RunResult {
  int exit_code;
  std::string out;
  std::string err;
};

// `dsd` with these arguments.
RunResult RunDsd(const std::vector<std::string>& arguments,
                 const Terminal& terminal = {});

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_TEST_CHECKPOINT_H_
