// SPDX-License-Identifier: Apache-2.0
//
// A program of somebody else's with LibTorch: saves a layer and loads it into
// another.

#include <iostream>
#include <string>

#include "absl/status/status.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "torch/nn/modules/linear.h"

namespace {

absl::Status Run(const std::string& directory) {
  torch::nn::Linear saved(3, 2);
  torch::nn::Linear loaded(3, 2);
  const auto from = dsd::GetModelStateDict(*saved);
  if (!from.ok()) return from.status();
  const auto save = dsd::SaveCheckpoint(directory, *from);
  if (!save.ok()) return save.status();
  auto to = dsd::GetModelStateDict(*loaded);
  if (!to.ok()) return to.status();
  const auto load = dsd::LoadCheckpoint(directory, &*to);
  if (!load.ok()) return load.status();
  return saved->weight.equal(loaded->weight) && saved->bias.equal(loaded->bias)
             ? absl::OkStatus()
             : absl::InternalError("other values than were saved");
}

}  // namespace

int main(int argc, char** argv) {
  const absl::Status status =
      argc == 2 ? Run(argv[1]) : absl::InvalidArgumentError("no directory");
  std::cout << "status: " << status << "\n";
  return status.ok() ? 0 : 1;
}
