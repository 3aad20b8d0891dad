// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/parallel/clip_grad_norm.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "ATen/core/grad_mode.h"
#include "ATen/ops/linalg_vector_norm.h"
#include "ATen/ops/stack.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "c10/core/ScalarType.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/tensor/sharding_table.h"
#include "dsd/core/tensor/torch_boundary.h"

namespace dsd {
namespace {

// LibTorch makes a copy in float64.
constexpr int64_t kPartElements = int64_t{1} << 22;

// What a rank tells all others: what must be equal, and its part of the norm.
struct Message {
  double max_norm = 0;
  double norm_type = 0;
  double parameters = 0;
  double failed = 0;
  double norm = 0;
};

// Of the vector whose parts have these norms, without overflow on the way.
double NormOfNorms(absl::Span<const double> norms, double norm_type) {
  double largest = 0;
  for (const double norm : norms) {
    if (std::isnan(norm)) return norm;
    if (norm > largest) largest = norm;
  }
  if (largest == 0 || std::isinf(largest) || std::isinf(norm_type)) {
    return largest;
  }
  double sum = 0;
  for (const double norm : norms) sum += std::pow(norm / largest, norm_type);
  return largest * std::pow(sum, 1 / norm_type);
}

// Of equal parts that of the first holder counts.
bool CountsHere(const at::Tensor& parameter, int rank) {
  const std::optional<Sharding> sharding =
      ShardingTable::Global().Find(parameter);
  if (!sharding.has_value()) return rank == 0;
  bool first = false;
  bool later = false;
  for (const LocalBox& part : sharding->layout.BoxesOf(sharding->holder)) {
    sharding->layout.ForEachCell(part.box, [&](const Cell& cell) {
      (cell.holders.At(0) == sharding->holder ? first : later) = true;
    });
  }
  if (first && later) {
    throw StatusError(absl::UnimplementedError(
        absl::StrCat("parameter of layout ", sharding->layout.ToString(),
                     ": holder ", sharding->holder,
                     " has elements that other holders have, too, and others, "
                     "expected only one of both")));
  }
  return first;
}

// Of the gradients that count on this rank.
double NormHere(const std::vector<at::Tensor>& parameters, double norm_type,
                int rank) {
  std::map<std::string, std::vector<at::Tensor>> norms;  // by device
  for (const at::Tensor& parameter : parameters) {
    const at::Tensor& grad = parameter.grad();
    if (!grad.defined() || grad.numel() == 0) continue;
    if (!CountsHere(parameter, rank)) continue;
    for (const at::Tensor& part : grad.reshape({-1}).split(kPartElements)) {
      norms[grad.device().str()].push_back(at::linalg_vector_norm(
          part, norm_type, /*dim=*/at::OptionalIntArrayRef(),
          /*keepdim=*/false,
          grad.is_complex() ? at::kComplexDouble : at::kDouble));
    }
  }
  std::vector<double> all;
  for (const auto& [device, on_device] : norms) {
    const at::Tensor in_host = at::stack(on_device).cpu();
    all.insert(all.end(), in_host.const_data_ptr<double>(),
               in_host.const_data_ptr<double>() + in_host.numel());
  }
  return NormOfNorms(all, norm_type);
}

std::vector<at::Tensor> WithoutRepetitions(
    const std::vector<at::Tensor>& parameters) {
  std::vector<at::Tensor> distinct;
  absl::flat_hash_set<const c10::TensorImpl*> seen;
  for (const at::Tensor& parameter : parameters) {
    if (parameter.defined() &&
        seen.insert(parameter.unsafeGetTensorImpl()).second) {
      distinct.push_back(parameter);
    }
  }
  return distinct;
}

// What each rank says, by rank.
absl::StatusOr<std::vector<Message>> Exchange(const Message& mine,
                                              Communicator* comm,
                                              const CallOptions& options) {
  if (comm == nullptr) return std::vector<Message>{mine};
  std::vector<Message> all(comm->size());
  all[comm->rank()] = mine;
  std::vector<absl::Span<std::byte>> parts;
  for (Message& message : all) {
    parts.push_back(absl::MakeSpan(reinterpret_cast<std::byte*>(&message),
                                   sizeof(message)));
  }
  DSD_RETURN_IF_ERROR(comm->AllGather(parts[comm->rank()], parts, options))
      << "ClipGradNorm";
  return all;
}

}  // namespace

absl::StatusOr<double> ClipGradNorm(const std::vector<at::Tensor>& parameters,
                                    double max_norm, Communicator* comm,
                                    double norm_type,
                                    const CallOptions& options) {
  const std::vector<at::Tensor> distinct = WithoutRepetitions(parameters);
  const int rank = comm == nullptr ? 0 : comm->rank();
  at::NoGradGuard no_grad;
  const absl::StatusOr<double> here = [&]() -> absl::StatusOr<double> {
    if (!(max_norm >= 0)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "ClipGradNorm: max_norm is ", max_norm, ", expected 0 or more"));
    }
    if (!(norm_type > 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("ClipGradNorm: norm_type is ", norm_type,
                       ", expected a number above 0 or infinity"));
    }
    return TorchToStatus([&] { return NormHere(distinct, norm_type, rank); });
  }();
  // Ranks that cannot go on tell the others, too.
  Message mine;
  mine.max_norm = max_norm;
  mine.norm_type = norm_type;
  mine.parameters = static_cast<double>(distinct.size());
  mine.failed = here.ok() ? 0 : 1;
  mine.norm = here.ok() ? *here : 0;
  const absl::StatusOr<std::vector<Message>> all =
      Exchange(mine, comm, options);
  DSD_RETURN_IF_ERROR(here.status());
  DSD_RETURN_IF_ERROR(all.status());
  std::vector<double> norms;
  for (size_t peer = 0; peer < all->size(); ++peer) {
    const Message& theirs = (*all)[peer];
    if (theirs.failed != 0) {
      return absl::FailedPreconditionError(
          absl::StrCat("ClipGradNorm: rank ", peer,
                       " could not compute its norm and says why"));
    }
    const Message& first = (*all)[0];
    if (theirs.max_norm != first.max_norm ||
        theirs.norm_type != first.norm_type ||
        theirs.parameters != first.parameters) {
      const auto arguments = [](const Message& message) {
        return absl::StrCat(message.parameters, " parameters, max_norm ",
                            message.max_norm, ", norm_type ",
                            message.norm_type);
      };
      return absl::FailedPreconditionError(absl::StrCat(
          "ClipGradNorm: ranks disagree: rank 0 has ", arguments(first),
          "; rank ", peer, " has ", arguments(theirs)));
    }
    norms.push_back(theirs.norm);
  }
  const double norm = NormOfNorms(norms, norm_type);
  const double factor = max_norm / (norm + 1e-6);
  if (factor >= 1) return norm;  // a NaN is not, and goes into the gradients
  DSD_RETURN_IF_ERROR(TorchToStatus([&] {
    for (const at::Tensor& parameter : distinct) {
      if (parameter.grad().defined()) parameter.grad().mul_(factor);
    }
  }));
  return norm;
}

}  // namespace dsd
