// SPDX-License-Identifier: Apache-2.0
//
// From one format to another.

#ifndef DSD_FRONTENDS_CHECKPOINT_CONVERT_H_
#define DSD_FRONTENDS_CHECKPOINT_CONVERT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/dtype.h"
#include "dsd/core/base/env.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/rename_rules.h"

namespace dsd::checkpoint {

struct ConvertOptions {
  CallOptions call;
  // What to make; nullopt: what GuessFormat says of the path.
  std::optional<Format> format;
  RenameRules rename;
  // For tensors of a dtype that CastFloats has; others keep theirs. One of
  // these.
  std::optional<DType> dtype;
  // Objects that the target has no place for are left out.
  bool drop_objects = false;
  bool overwrite = false;
  int64_t max_file_bytes = 5'000'000'000;  // as in ExportOptions
  bool verify = true;                      // as in OpenOptions
  Env* env = Env::Real();
};

struct ConvertReport {
  Format from = Format::kDcp;
  Format to = Format::kDcp;
  int64_t tensors = 0;
  int64_t objects = 0;
  int64_t payload_bytes = 0;  // written
  int64_t file_bytes = 0;
  int64_t renamed = 0;                          // keys
  int64_t cast = 0;                             // tensors
  std::vector<std::string> dropped_objects;     // keys
  std::vector<std::string> dropped_attributes;  // keys, "format" not counted
  std::vector<std::string> leftovers;           // as in SaveReport
};

// The format that the name of a path speaks of: ".safetensors"; ".pt", ".pth",
// ".bin", ".ckpt" (archives of torch.save). nullopt for others.
std::optional<Format> GuessFormat(absl::string_view path);

// Whether an error of Convert is one of writing the target, or of what is there
// already.
bool IsOfTarget(const absl::Status& error);

// Writes what is at `source` to `target`, of any two formats, by this process
// alone: whole tensors (DCP: the stored boxes), one after another, in some 50
// MiB of memory whatever their size, but for tensors stored with permuted
// strides. Elements are compared with stored digests, where the source has
// them, before the target counts as written. Absent or complete, as Save and
// Export.
//
// Keys of what safetensors have stay flat in the others; nested keys are joined
// by dots there. Where dicts had integers as keys, DCP and archives have texts.
//
// Errors: of Checkpoint::Open, Save and Export; InvalidArgument without a
// format and for a dtype that is none to cast to; AlreadyExists (something is
// at the target and overwrite is off); FailedPrecondition for objects without a
// place in the target, for tensors that cannot be read, for keys that become
// one by renaming, all named, and for a target of another format.
absl::StatusOr<ConvertReport> Convert(const std::string& source,
                                      const std::string& target,
                                      const ConvertOptions& options = {});

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_CONVERT_H_
