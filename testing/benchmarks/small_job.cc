// SPDX-License-Identifier: Apache-2.0
//
// The whole of a small job, for job_benchmark.py: start, get, save, load, set,
// exit. Prints a digest of what was loaded.
//
// usage: small_job DIRECTORY LAYERS, or small_job --start: which only starts

#include <cstdint>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ATen/Parallel.h"
#include "ATen/ops/arange.h"
#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/torch/checkpoint.h"
#include "dsd/frontends/torch/state_dict.h"
#include "libdeflate.h"
#include "torch/nn/modules/linear.h"
#include "torch/optim/adamw.h"

namespace dsd {
namespace {

at::Tensor Numbers(at::IntArrayRef shape, double start) {
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  return at::arange(start, start + static_cast<double>(count), c10::kFloat)
      .view(shape);
}

// As in small_job_peer.py. `filled`: as after a step; else all zeros.
struct Job {
  Job(int layers, bool filled) {
    for (int i = 0; i < layers; ++i) {
      model.register_module(absl::StrCat("layer", i),
                            torch::nn::Linear(64, 64));
    }
    optimizer = std::make_unique<torch::optim::AdamW>(
        model.parameters(), torch::optim::AdamWOptions(filled ? 0.5 : 0.1));
    double start = 0;
    for (const at::Tensor& param : model.parameters()) {
      param.detach().copy_(Numbers(param.sizes(), start)).mul_(filled ? 1 : 0);
      auto state = std::make_unique<torch::optim::AdamWParamState>();
      state->step(filled ? 1 : 0);
      state->exp_avg(Numbers(param.sizes(), start + 1).mul_(filled ? 1 : 0));
      state->exp_avg_sq(Numbers(param.sizes(), start + 2).mul_(filled ? 1 : 0));
      optimizer->state()[param.unsafeGetTensorImpl()] = std::move(state);
      start += 3;
    }
  }

  absl::StatusOr<StateDict> State() {
    DSD_ASSIGN_OR_RETURN(ModelAndOptimizerStateDict parts,
                         GetStateDict(model, *optimizer));
    StateDict state;
    state.Set("model", Value(std::move(parts.model)));
    state.Set("optim", Value(std::move(parts.optimizer)));
    return state;
  }

  torch::nn::Module model{"job"};
  std::unique_ptr<torch::optim::AdamW> optimizer;
};

absl::Status Run(const std::string& directory, int layers) {
  Job job(layers, /*filled=*/true);
  DSD_ASSIGN_OR_RETURN(const StateDict saved, job.State());
  DSD_RETURN_IF_ERROR(SaveCheckpoint(directory, saved).status());

  Job other(layers, /*filled=*/false);
  DSD_ASSIGN_OR_RETURN(StateDict loaded, other.State());
  DSD_RETURN_IF_ERROR(LoadCheckpoint(directory, &loaded).status());
  DSD_RETURN_IF_ERROR(SetStateDict(other.model, *other.optimizer,
                                   *loaded.Find("model")->get_if<StateDict>(),
                                   *loaded.Find("optim")->get_if<StateDict>())
                          .status());
  uint32_t crc = 0;
  const auto add = [&](const at::Tensor& tensor) {
    crc = libdeflate_crc32(crc, tensor.const_data_ptr(), tensor.nbytes());
  };
  for (const at::Tensor& param : other.model.parameters()) {
    const auto& state = static_cast<torch::optim::AdamWParamState&>(
        *other.optimizer->state()[param.unsafeGetTensorImpl()]);
    add(param);
    add(state.exp_avg());
    add(state.exp_avg_sq());
  }
  const double lr = other.optimizer->param_groups()[0].options().get_lr();
  crc = libdeflate_crc32(crc, &lr, sizeof(lr));
  std::cout << crc << std::endl;
  return absl::OkStatus();
}

}  // namespace
}  // namespace dsd

int main(int argc, char** argv) {
  at::set_num_threads(1);
  if (argc == 2 && std::string(argv[1]) == "--start") return 0;
  int layers = 0;
  if (argc != 3 || !absl::SimpleAtoi(argv[2], &layers)) {
    std::cerr << "usage: small_job DIRECTORY LAYERS | --start" << std::endl;
    return 2;
  }
  const absl::Status status = dsd::Run(argv[1], layers);
  if (!status.ok()) std::cerr << status << std::endl;
  return status.ok() ? 0 : 1;
}
