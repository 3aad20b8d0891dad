// SPDX-License-Identifier: Apache-2.0
//
// What joins several safetensors files: the index of Hugging Face's layout, and
// what torch.distributed.checkpoint says in the header of its shards.

#ifndef DSD_FRONTENDS_CHECKPOINT_SAFETENSORS_INDEX_H_
#define DSD_FRONTENDS_CHECKPOINT_SAFETENSORS_INDEX_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "dsd/core/layout/box.h"

namespace dsd::safetensors {

inline constexpr int64_t kMaxIndexBytes = int64_t{1} << 30;

// `{"metadata": {...}, "weight_map": {name: file}}`.
struct Index {
  std::vector<std::pair<std::string, std::string>> weight_map;
};

// DataLoss for what is no index, for a name twice, and for a file that is not a
// single path component: nothing outside the directory is ever named.
absl::StatusOr<Index> ParseIndex(absl::string_view json);

// As Hugging Face writes it. `total_bytes`: of all elements.
std::string EncodeIndex(const Index& index, int64_t total_bytes);

// Keys of `__metadata__` in shards of torch.distributed.checkpoint.
inline constexpr char kShardingKey[] = "DCP_SHARDING_INFO";
inline constexpr char kShardingVersionKey[] = "DCP_VERSION";

// Where a tensor of a file lies in the tensor of all files.
struct ShardPlace {
  Dims offsets;
  Dims global_shape;  // empty: not recorded
};

// The text under kShardingKey: `{name: {"saved_offsets": [...]}}`, with
// "global_shape" in it or not. DataLoss for anything else.
absl::StatusOr<absl::flat_hash_map<std::string, ShardPlace>> ParseSharding(
    absl::string_view json);

}  // namespace dsd::safetensors

#endif  // DSD_FRONTENDS_CHECKPOINT_SAFETENSORS_INDEX_H_
