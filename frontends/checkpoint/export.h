// SPDX-License-Identifier: Apache-2.0
//
// Whole tensors in files that others read: safetensors and archives of
// torch.save.

#ifndef DSD_FRONTENDS_CHECKPOINT_EXPORT_H_
#define DSD_FRONTENDS_CHECKPOINT_EXPORT_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "dsd/core/base/call_options.h"
#include "dsd/core/base/env.h"
#include "dsd/core/comm/communicator.h"
#include "dsd/frontends/checkpoint/checkpoint.h"

namespace dsd::checkpoint {

struct ExportOptions {
  CallOptions call;
  // Whether what is at the path may be replaced, if it is of the same format.
  bool overwrite = true;
  // Elements in one safetensors file of a directory; a larger tensor is alone
  // in its file.
  int64_t max_file_bytes = 5'000'000'000;
  // `__metadata__` of each safetensors file. By custom {"format", "pt"} is in
  // it; readers of Hugging Face ask for it.
  std::vector<std::pair<std::string, std::string>> attributes = {
      {"format", "pt"}};
  Env* env = nullptr;  // as in SaveOptions
};

// Writes the whole tensors of `state`, of whatever layout, and in an archive
// its objects. Collective, as Save. At `path`:
//   kSafetensors   a file, if the name ends in ".safetensors"; else a
//                  directory, made if missing, as Hugging Face has it:
//                  "model.safetensors", or, of more than max_file_bytes,
//                  "model-00001-of-00003.safetensors", ... and
//                  "model.safetensors.index.json". The ranks share the files.
//   kTorchArchive  a file, written by rank 0, which torch.load reads with
//                  weights_only=True: nested dicts and lists by the paths.
// Each rank gathers what it writes in pieces of 32 MiB, and writes it front to
// back, but for the header of safetensors, which comes last: it has the content
// digests. Each element crosses the network at most once.
//
// Absent or complete: everything is written under other names, synced, and
// renamed, the index last. A single file that is replaced changes atomically.
// Where files of a directory are replaced, the new ones have names of their own
// and an index, which changes atomically, and the old ones are removed after
// that: those that the index named, or, without one, those of the names above.
//
// Errors: as Save; also InvalidArgument for objects where safetensors has no
// place for them (all named) and dtypes that the format lacks (complex32,
// complex128); FailedPrecondition for a path of another kind or format, and for
// a directory without an index that has safetensors files of other names. The
// report's `chunks` are the tensors.
absl::StatusOr<SaveReport> Export(const std::string& path, Format format,
                                  const State& state,
                                  Communicator* comm = nullptr,
                                  const ExportOptions& options = {});

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_EXPORT_H_
