// SPDX-License-Identifier: Apache-2.0
//
// The file of content digests that lies beside the data. Text, one key a line:
//
//   dsd digests 1
//   index 951 89abcdef
//   tensor 0123456789abcdef model.weight
//   object fedcba9876543210 step
//   end 2 01234567
//
// `index`: length and CRC32C of .metadata. `end`: number of keys and CRC32C of
// the lines above. Keys are C-escaped.

#ifndef DSD_FRONTENDS_CHECKPOINT_DIGESTS_FILE_H_
#define DSD_FRONTENDS_CHECKPOINT_DIGESTS_FILE_H_

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace dsd::checkpoint {

struct StoredDigests {
  int64_t index_bytes = 0;
  uint32_t index_crc = 0;
  absl::flat_hash_map<std::string, uint64_t> tensors;
  absl::flat_hash_map<std::string, uint64_t> objects;
};

std::string EncodeDigests(const StoredDigests& digests);

// DataLoss for anything else than what EncodeDigests makes.
absl::StatusOr<StoredDigests> DecodeDigests(absl::string_view text);

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_DIGESTS_FILE_H_
