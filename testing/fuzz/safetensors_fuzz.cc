// SPDX-License-Identifier: Apache-2.0
//
// Any bytes as a safetensors file, as the index of several, and as what a shard
// says of its place. Tensors must lie in the file, one after another, and a
// header that is written from what was read must read the same.

#include <cstdint>
#include <cstdlib>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/dtype.h"
#include "dsd/frontends/checkpoint/dcp/memory_file.h"
#include "dsd/frontends/checkpoint/safetensors/header.h"
#include "dsd/frontends/checkpoint/safetensors/index.h"

namespace {

using dsd::safetensors::Header;
using dsd::safetensors::HeaderTensor;

void ReadFile(const std::string& bytes) {
  dsd::dcp::MemoryFile file(bytes);
  absl::StatusOr<Header> header = dsd::safetensors::ReadHeader(file);
  if (!header.ok()) return;
  int64_t end = 0;
  bool writable = true;
  for (const HeaderTensor& tensor : header->tensors) {
    if (tensor.begin_bytes != end) std::abort();
    end = tensor.end_bytes;
    writable &= tensor.dtype.has_value();
    if (!tensor.dtype.has_value()) continue;
    int64_t size = dsd::ItemSize(*tensor.dtype);
    for (const int64_t extent : tensor.shape) size *= extent;
    if (size != tensor.end_bytes - tensor.begin_bytes) std::abort();
  }
  if (header->data_at + end != file.size_bytes()) std::abort();
  if (!writable) return;
  const absl::StatusOr<std::string> head =
      dsd::safetensors::EncodeHeader(*header);
  if (!head.ok()) std::abort();
  dsd::dcp::MemoryFile again(*head + bytes.substr(header->data_at));
  const absl::StatusOr<Header> read = dsd::safetensors::ReadHeader(again);
  if (!read.ok() || read->metadata != header->metadata ||
      read->tensors.size() != header->tensors.size()) {
    std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  ReadFile(bytes);
  const auto index = dsd::safetensors::ParseIndex(bytes);
  if (index.ok()) {
    for (const auto& [key, file] : index->weight_map) {
      if (file.empty() || file == ".." || file.find('/') != std::string::npos) {
        std::abort();
      }
    }
  }
  dsd::safetensors::ParseSharding(bytes).status().IgnoreError();
  return 0;
}
