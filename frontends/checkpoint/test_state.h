// SPDX-License-Identifier: Apache-2.0
//
// States for tests: tensors of known content in strided memory.

#ifndef DSD_FRONTENDS_CHECKPOINT_TEST_STATE_H_
#define DSD_FRONTENDS_CHECKPOINT_TEST_STATE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/core/value/value.h"
#include "dsd/frontends/checkpoint/checkpoint.h"

namespace dsd::checkpoint {

struct TestTensor {
  Path path;
  DType dtype;
  Layout layout;
};

// One rank's part of some tensors. The memory of a rank is a whole tensor, of
// which the views are its boxes: so views are strided.
class TestState {
 public:
  // Bytes follow from `seed` and the key, for all ranks alike.
  static TestState Filled(const std::vector<TestTensor>& tensors, int rank,
                          uint64_t seed, std::vector<ObjectEntry> objects = {});
  // Other bytes, to be loaded into.
  static TestState Blank(const std::vector<TestTensor>& tensors, int rank,
                         std::vector<ObjectEntry> objects = {});

  TestState(TestState&&) = default;

  State& state() { return state_; }

  // "" if this rank's boxes have the bytes of `seed` and everything else is as
  // Blank left it; else what differs.
  std::string Difference(uint64_t seed) const;

  // Whether nothing was written into a Blank state.
  bool IsBlank() const;

 private:
  struct Buffer {
    TestTensor tensor;
    std::vector<std::byte> bytes;
  };

  TestState(const std::vector<TestTensor>& tensors, int rank,
            const uint64_t* seed, std::vector<ObjectEntry> objects);

  int rank_;
  std::vector<Buffer> buffers_;
  std::unique_ptr<MemoryEndpoint> endpoint_;
  State state_;
};

// What `body` returns on each rank. The ranks stay until all have returned, as
// a job's do that goes on after a verdict.
std::vector<absl::Status> StatusOfRanks(
    int world_size, absl::FunctionRef<absl::Status(Communicator&)> body);

// The whole tensor's bytes.
std::vector<std::byte> TestBytes(uint64_t seed, const std::string& key,
                                 int64_t size);

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_TEST_STATE_H_
