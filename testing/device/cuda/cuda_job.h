// SPDX-License-Identifier: Apache-2.0
//
// A training job of known values on any device and number of ranks, for tests
// that do the same on CUDA and on the CPU.

#ifndef DSD_TESTING_DEVICE_CUDA_CUDA_JOB_H_
#define DSD_TESTING_DEVICE_CUDA_CUDA_JOB_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/status.h"
#include "c10/core/Device.h"
#include "c10/core/StreamGuard.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/core/layout/box.h"
#include "dsd/core/state_dict/state_dict.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adamw.h"

namespace dsd::test {

// The device under test: cuda:0, or what DSD_TEST_DEVICE names ("cpu": the
// tests compare the CPU with itself, to find errors of their own).
c10::Device DeviceUnderTest();

bool OnCuda();

// Waits until all work on the device is done.
void Synchronize();

constexpr int64_t kHalfASecond = int64_t{1} << 30;  // cycles

// The current stream of the device is busy for about `cycles` from now on.
void KeepBusy(int64_t cycles = kHalfASecond);

// A stream that is not the default one, current while this lives.
class OtherStream {
 public:
  OtherStream();

 private:
  std::optional<c10::StreamGuard> guard_;
};

// Elements of known values, the same wherever they are made.
at::Tensor KnownValues(const Dims& shape, double start);

struct NetImpl : torch::nn::Module {
  NetImpl(int64_t in, int64_t hidden);

  torch::nn::Linear columns;  // sharded by columns
  torch::nn::Linear rows;     // sharded by rows
  at::Tensor mask;            // a buffer, bool
  at::Tensor count;           // a buffer, int64
};

// A model and its optimizer on `device`; with a communicator of several ranks
// this rank's shards of them.
struct Job {
  Job(c10::Device device, Communicator* comm, int64_t in, int64_t hidden,
      double start);

  // Gives everything other values.
  void Spoil();

  // Everything that is known, on this rank. InternalError naming what has other
  // values, or is not on the device.
  absl::Status Check() const;

  absl::StatusOr<StateDict> State(Communicator* comm,
                                  const StateDictOptions& options = {});
  absl::Status Set(const StateDict& state, Communicator* comm,
                   const StateDictOptions& options = {});

  c10::Device device;
  std::shared_ptr<NetImpl> net;
  std::unique_ptr<torch::optim::AdamW> optimizer;
  // All tensors of the model and the optimizer with copies of their values in
  // host memory.
  struct Known {
    std::string name;
    at::Tensor values;
  };
  std::vector<Known> known;

 private:
  std::vector<std::pair<std::string, at::Tensor>> Tensors() const;
};

}  // namespace dsd::test

#endif  // DSD_TESTING_DEVICE_CUDA_CUDA_JOB_H_
