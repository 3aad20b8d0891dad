// SPDX-License-Identifier: Apache-2.0
//
// Content digests, as text with a key a line: a file that lies beside the data
// of a DCP checkpoint, `dsd_digests` in `__metadata__` of a safetensors file,
// a record of an archive of torch.save.
//
//   dsd digests 2
//   index 951 89abcdef
//   tensor 0123456789abcdef0123456789abcdef model.weight
//   object fedcba9876543210fedcba9876543210 step
//   end 2 01234567
//
// The number in the first line is the DigestVersion; 1, with digests of 16
// digits, is read and no longer written. `index`: length and CRC32C of
// .metadata or of the archive's data.pkl; safetensors have none. `end`: number
// of keys and CRC32C of the lines above. Keys are C-escaped.

#ifndef DSD_FRONTENDS_CHECKPOINT_DIGESTS_FILE_H_
#define DSD_FRONTENDS_CHECKPOINT_DIGESTS_FILE_H_

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/base/content_digest.h"

namespace dsd::checkpoint {

struct StoredDigests {
  DigestVersion version = kDigestVersion;
  int64_t index_bytes = 0;  // 0: no index
  uint32_t index_crc = 0;
  absl::flat_hash_map<std::string, Digest128> tensors;
  absl::flat_hash_map<std::string, Digest128> objects;
};

std::string EncodeDigests(const StoredDigests& digests);

// DataLoss for anything else than what EncodeDigests makes; Unimplemented for a
// version that is not known yet.
absl::StatusOr<StoredDigests> DecodeDigests(absl::string_view text);

}  // namespace dsd::checkpoint

#endif  // DSD_FRONTENDS_CHECKPOINT_DIGESTS_FILE_H_
