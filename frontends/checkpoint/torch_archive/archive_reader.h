// SPDX-License-Identifier: Apache-2.0
//
// Reads the archives of torch.save as data, by the rules of
// torch.load(weights_only=True) and stricter: nothing is executed and no class
// is looked up. Dicts and lists of tensors, numbers and texts are flattened
// into paths, as in a state dict.

#ifndef DSD_FRONTENDS_CHECKPOINT_TORCH_ARCHIVE_ARCHIVE_READER_H_
#define DSD_FRONTENDS_CHECKPOINT_TORCH_ARCHIVE_ARCHIVE_READER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "dsd/core/base/digest.h"
#include "dsd/core/value/flatten.h"
#include "dsd/core/value/value.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/tensor_item.h"
#include "dsd/frontends/checkpoint/dcp/zip_reader.h"

namespace dsd::torch_archive {

// Where a value lies that is no dict and no list.
inline constexpr char kLoneKey[] = "value";

struct Archive {
  struct Tensor {
    Path path;
    dcp::TensorItem item;  // places are those in the slice
  };
  struct Value {
    Path path;
    dcp::ObjectItem item;
  };
  // A tensor of a kind that is not known here (sparse, quantized).
  struct Unreadable {
    Path path;
    std::string kind;  // "torch._utils._rebuild_sparse_tensor"
  };

  std::vector<Tensor> tensors;  // in the order of their elements in the file
  std::vector<Value> objects;
  std::vector<Unreadable> unreadable;
  Nesting nesting;
  int64_t pickle_bytes = 0;
  uint32_t pickle_crc = 0;  // CRC32C
  // The record kDigestsRecord; NotFound, or what is wrong with it.
  absl::StatusOr<std::string> digests;
  Digest fingerprint;  // covers the pickle and what the directory says
};

// Paths are made as in core/value/flatten.h, and so are the limits of what is
// one object; but a tuple with a tensor in it counts as a list. Tensors may
// share storages and be views of them; parameters are tensors. A value that is
// no dict and no list is taken for a dict of it under kLoneKey.
//
// Errors: DataLoss (damaged: says where; two values under one key; views that
// reach outside their storage); Unimplemented (compressed; a TorchScript
// archive; an object of a class where a dict is expected); ResourceExhausted
// (limits; tensors that unfold to far more than the file has).
absl::StatusOr<Archive> ReadArchive(dcp::FileSlice* slice);

}  // namespace dsd::torch_archive

#endif  // DSD_FRONTENDS_CHECKPOINT_TORCH_ARCHIVE_ARCHIVE_READER_H_
