// SPDX-License-Identifier: Apache-2.0
//
// Items that Python wrote through stream transforms
// (torch.distributed.checkpoint._extension).

#ifndef DSD_FRONTENDS_CHECKPOINT_DCP_STREAM_TRANSFORM_H_
#define DSD_FRONTENDS_CHECKPOINT_DCP_STREAM_TRANSFORM_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dsd::dcp {

// OK if DecodeStream knows every one of `descriptors`, which are joined by ",
// ": "stream.zstd/1". Unimplemented names the one that it does not know.
absl::Status CheckTransforms(absl::string_view descriptors);

// The archive that was stored as `bytes`. Errors: of CheckTransforms; DataLoss
// (does not decode, ends early, or goes on); ResourceExhausted over
// `max_bytes`.
absl::StatusOr<std::string> DecodeStream(absl::string_view descriptors,
                                         absl::string_view bytes,
                                         int64_t max_bytes);

}  // namespace dsd::dcp

#endif  // DSD_FRONTENDS_CHECKPOINT_DCP_STREAM_TRANSFORM_H_
