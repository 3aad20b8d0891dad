// SPDX-License-Identifier: Apache-2.0
//
// Any bytes as an archive of torch.save. The elements of each tensor must be in
// it, and its nesting can be written again.

#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "dsd/core/base/dtype.h"
#include "dsd/frontends/checkpoint/dcp/memory_file.h"
#include "dsd/frontends/checkpoint/dcp/zip_reader.h"
#include "dsd/frontends/checkpoint/torch_archive/archive_reader.h"
#include "dsd/frontends/checkpoint/torch_archive/archive_writer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  dsd::dcp::MemoryFile file(
      std::string(reinterpret_cast<const char*>(data), size));
  absl::StatusOr<dsd::dcp::FileSlice> slice =
      dsd::dcp::FileSlice::Create(&file, 0, file.size_bytes());
  const absl::StatusOr<dsd::torch_archive::Archive> archive =
      dsd::torch_archive::ReadArchive(&*slice);
  if (!archive.ok()) return 0;
  std::vector<dsd::torch_archive::NewTensor> tensors;
  for (const auto& tensor : archive->tensors) {
    const dsd::dcp::TensorItem& item = tensor.item;
    const int64_t item_size = dsd::ItemSize(item.dtype);
    int64_t last = item.data_at;
    int64_t elements = 1;
    for (size_t d = 0; d < item.shape.size(); ++d) {
      elements *= item.shape[d];
      last += (item.shape[d] - 1) * item.strides[d] * item_size;
    }
    if (elements > 0 &&
        (item.data_at < 0 || last + item_size > file.size_bytes())) {
      std::abort();
    }
    tensors.push_back({tensor.path, item.dtype, item.shape});
  }
  // What was read is written, if it fits together without the objects.
  dsd::torch_archive::EncodeTree(tensors, {}, archive->nesting)
      .status()
      .IgnoreError();
  return 0;
}
