// SPDX-License-Identifier: Apache-2.0
//
// Any bytes as an index, or as a file of digests: what decodes is encoded and
// decodes to the same.

#include <cstdint>
#include <cstdlib>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/frontends/checkpoint/dcp/metadata.h"
#include "dsd/frontends/checkpoint/digests_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view bytes(reinterpret_cast<const char*>(data), size);
  const absl::StatusOr<dsd::checkpoint::StoredDigests> digests =
      dsd::checkpoint::DecodeDigests(bytes);
  if (digests.ok() && dsd::checkpoint::EncodeDigests(*digests) != bytes) {
    std::abort();
  }
  const absl::StatusOr<dsd::dcp::Metadata> index =
      dsd::dcp::DecodeMetadata(bytes);
  if (!index.ok()) return 0;
  for (const dsd::dcp::TensorEntry& tensor : index->tensors) {
    if (dsd::dcp::NumMissingElements(*index, tensor) < 0) std::abort();
  }
  std::string again;
  const absl::Status encoded =
      dsd::dcp::EncodeMetadata(*index, [&again](absl::string_view piece) {
        again.append(piece.data(), piece.size());
        return absl::OkStatus();
      });
  if (!encoded.ok()) return 0;  // keys that are not text
  const absl::StatusOr<dsd::dcp::Metadata> back =
      dsd::dcp::DecodeMetadata(again);
  if (!back.ok() || back->bounds != index->bounds ||
      back->files != index->files ||
      back->objects.size() != index->objects.size()) {
    std::abort();
  }
  return 0;
}
