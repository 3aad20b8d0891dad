// SPDX-License-Identifier: Apache-2.0
//
// Any bytes as an item of a data file: a tensor's archive, an object's, a
// compressed one. Where the elements are said to be they must be in the bytes.

#include <cstdint>
#include <cstdlib>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/dtype.h"
#include "dsd/frontends/checkpoint/dcp/memory_file.h"
#include "dsd/frontends/checkpoint/dcp/object_item.h"
#include "dsd/frontends/checkpoint/dcp/stream_transform.h"
#include "dsd/frontends/checkpoint/dcp/tensor_item.h"
#include "dsd/frontends/checkpoint/dcp/zip_reader.h"

namespace {

void ReadTensor(const std::string& bytes) {
  dsd::dcp::MemoryFile file(bytes);
  absl::StatusOr<dsd::dcp::FileSlice> slice =
      dsd::dcp::FileSlice::Create(&file, 0, file.size_bytes());
  const absl::StatusOr<dsd::dcp::TensorItem> item =
      dsd::dcp::ReadTensorItem(&*slice);
  if (!item.ok()) return;
  int64_t last = item->data_at;
  int64_t elements = 1;
  for (size_t d = 0; d < item->shape.size(); ++d) {
    elements *= item->shape[d];
    last +=
        (item->shape[d] - 1) * item->strides[d] * dsd::ItemSize(item->dtype);
  }
  if (elements == 0) return;
  if (item->data_at < 0 ||
      last + dsd::ItemSize(item->dtype) > file.size_bytes()) {
    std::abort();
  }
}

void ReadObject(const std::string& bytes) {
  dsd::dcp::MemoryFile file(bytes);
  absl::StatusOr<dsd::dcp::FileSlice> slice =
      dsd::dcp::FileSlice::Create(&file, 0, file.size_bytes());
  const absl::StatusOr<std::string> stored =
      dsd::dcp::ReadStoredObject(&*slice);
  if (!stored.ok()) return;
  const absl::StatusOr<dsd::dcp::ObjectItem> item =
      dsd::dcp::DecodeStoredObject(*stored);
  if (!item.ok()) return;
  const absl::StatusOr<std::string> again =
      dsd::dcp::EncodeStoredObject(item->value);
  if (!again.ok()) return;
  const absl::StatusOr<dsd::dcp::ObjectItem> back =
      dsd::dcp::DecodeStoredObject(*again);
  if (!back.ok() || back->digest != item->digest) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  ReadTensor(bytes);
  ReadObject(bytes);
  const absl::StatusOr<std::string> unpacked =
      dsd::dcp::DecodeStream("stream.zstd/1", bytes, 1 << 20);
  if (unpacked.ok()) ReadTensor(*unpacked);
  return 0;
}
