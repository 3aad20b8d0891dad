// SPDX-License-Identifier: Apache-2.0
//
// The program //examples:train_digits as a function, so that a test can look
// into its training.

#ifndef DSD_EXAMPLES_TRAIN_DIGITS_H_
#define DSD_EXAMPLES_TRAIN_DIGITS_H_

#include <cstdint>
#include <functional>

#include "absl/status/status.h"

namespace torch::nn {
class Module;
}  // namespace torch::nn
namespace torch::optim {
class AdamW;
}  // namespace torch::optim

namespace dsd_examples {

// Called on each rank after each step, when gradients are still there and, in
// the step of a save, before it. An error ends the training.
using StepObserver =
    std::function<absl::Status(int64_t step, int rank, torch::nn::Module& model,
                               torch::optim::AdamW& optimizer)>;

// Returns the exit code.
int TrainDigitsMain(int argc, char** argv, const StepObserver& observer = {});

}  // namespace dsd_examples

#endif  // DSD_EXAMPLES_TRAIN_DIGITS_H_
