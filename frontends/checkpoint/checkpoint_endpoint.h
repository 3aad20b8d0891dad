// SPDX-License-Identifier: Apache-2.0

#ifndef DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_ENDPOINT_H_
#define DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_ENDPOINT_H_

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "dsd/frontends/checkpoint/checkpoint.h"

namespace dsd::checkpoint {

// The endpoint behind Checkpoint::MakeEndpoint. `tensors` are positions in the
// checkpoint's catalog. AlreadyExists if one occurs twice.
absl::StatusOr<std::unique_ptr<CheckpointEndpoint>> MakeCheckpointEndpoint(
    std::shared_ptr<const Checkpoint> checkpoint,
    absl::Span<const size_t> tensors);

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_CHECKPOINT_ENDPOINT_H_
