// SPDX-License-Identifier: Apache-2.0
//
// Uses LibTorch's Gloo, whose version may be another than that of the headers:
// no object of Gloo's is touched here.

#include "dsd/backends/c10d/own_group.h"

#define USE_C10D_GLOO
#include <chrono>

#include "dsd/core/tensor/torch_boundary.h"
#include "torch/csrc/distributed/c10d/FileStore.hpp"
#include "torch/csrc/distributed/c10d/ProcessGroupGloo.hpp"

namespace dsd {

absl::StatusOr<c10::intrusive_ptr<c10d::Backend>> MakeGlooGroup(
    const std::string& path, int rank, int size) {
  return TorchToStatus([&]() -> c10::intrusive_ptr<c10d::Backend> {
    auto options =
        c10d::ProcessGroupGloo::Options::create(std::chrono::minutes(1));
    options->devices.push_back(
        c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
    return c10::make_intrusive<c10d::ProcessGroupGloo>(
        c10::make_intrusive<c10d::FileStore>(path, size), rank, size,
        std::move(options));
  });
}

}  // namespace dsd
