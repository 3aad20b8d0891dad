// SPDX-License-Identifier: Apache-2.0
//
// torch::nn::utils::clip_grad_norm_ for parameters of which each rank has a
// part: that one takes the norm of the part, which differs from rank to rank.

#ifndef DSD_FRONTENDS_PARALLEL_CLIP_GRAD_NORM_H_
#define DSD_FRONTENDS_PARALLEL_CLIP_GRAD_NORM_H_

#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/comm/communicator.h"

namespace dsd {

// Scales the gradients of `parameters` by max_norm / (norm + 1e-6) if that is
// below 1, and returns their norm before that, of all gradients of all ranks as
// one vector.
//
//   loss.backward();
//   auto norm = dsd::ClipGradNorm(net->parameters(), 1.0, comm.get());
//   if (!norm.ok()) return norm.status();
//   optimizer.step();
//
// What ShardingTable::Global() knows (FullyShard's parameters, and yours)
// counts once over its holders, which are the ranks of `comm`; any other
// parameter is taken to be equal on all ranks and counts on rank 0. A parameter
// that is there twice counts once; those without a gradient or without elements
// here are fine. Norms are summed up in float64. `norm_type` is above 0, and
// infinity is the largest absolute value.
//
// Collective: one message of 40 bytes between any two ranks; null: a world of
// one. The same factor, and result, to the bit on all ranks. A norm that is
// infinite or no number is returned, and the gradients are scaled by what
// follows from it, as with torch's error_if_nonfinite = false.
//
// Errors, before which no gradient has changed: InvalidArgument (max_norm below
// 0 or no number; norm_type); FailedPrecondition (other numbers of parameters,
// or other arguments, on other ranks; another rank could not compute its norm);
// Unimplemented (this rank has elements that belong to several ranks and some
// that do not, in one parameter); those of LibTorch (sparse gradients) and of
// the communicator.
absl::StatusOr<double> ClipGradNorm(const std::vector<at::Tensor>& parameters,
                                    double max_norm, Communicator* comm,
                                    double norm_type = 2.0,
                                    const CallOptions& options = {});

}  // namespace dsd

#endif  // DSD_FRONTENDS_PARALLEL_CLIP_GRAD_NORM_H_
