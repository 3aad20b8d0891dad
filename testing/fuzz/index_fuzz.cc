// SPDX-License-Identifier: Apache-2.0
//
// Any bytes as an index, or as a file of digests: what decodes is encoded and
// decodes to the same.

#include <cstddef>
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
      back->locations.size() != index->locations.size() ||
      back->objects.size() != index->objects.size()) {
    std::abort();
  }
  // Files are numbered as they occur first, which may change.
  const auto is_there = [&](const dsd::dcp::ItemLocation& a,
                            const dsd::dcp::ItemLocation& b) {
    return index->files[a.file] == back->files[b.file] &&
           a.offset_bytes == b.offset_bytes && a.length_bytes == b.length_bytes;
  };
  for (size_t i = 0; i < index->locations.size(); ++i) {
    if (!is_there(index->locations[i], back->locations[i])) std::abort();
  }
  for (size_t i = 0; i < index->objects.size(); ++i) {
    if (index->objects[i].key != back->objects[i].key ||
        !is_there(index->objects[i].location, back->objects[i].location)) {
      std::abort();
    }
  }
  return 0;
}
