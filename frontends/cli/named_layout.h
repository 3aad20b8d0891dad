// SPDX-License-Identifier: Apache-2.0
//
// Layouts as a person names them on the command line.

#ifndef DSD_FRONTENDS_CLI_NAMED_LAYOUT_H_
#define DSD_FRONTENDS_CLI_NAMED_LAYOUT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "dsd/core/layout/layout.h"
#include "dsd/frontends/checkpoint/checkpoint.h"

namespace dsd::cli {

// For --help.
inline constexpr char kLayoutHelp[] =
    "A LAYOUT is MESH:PLACEMENTS, one placement per dimension of the mesh of "
    "ranks:\n"
    "  8         8 ranks, dimension 0 of each tensor cut over them: as 8:S0\n"
    "  8:R       each of 8 ranks has all\n"
    "  2x4:R,S0  2 replicas, each cut over 4 ranks (HSDP)\n"
    "  2x4:S0,S1 rows over 2, columns over 4 (FSDP and TP)\n"
    "S0 is Shard(0), S-1 the last dimension, R Replicate, SS0/4 _StridedShard "
    "with\nsplit_factor 4. A tensor without the dimension is replicated there. "
    "PATTERN=LAYOUT is\nfor the keys that the pattern matches ('*' is "
    "anything); the last that fits counts.";

// What --from and --to say: a layout for all tensors, and others by key.
class NamedLayouts {
 public:
  // `texts`: LAYOUT or PATTERN=LAYOUT. InvalidArgument for one that is neither,
  // or if none is for all keys.
  static absl::StatusOr<NamedLayouts> Parse(
      absl::Span<const std::string> texts);

  // Of a tensor. InvalidArgument if the layout does not fit the tensor.
  absl::StatusOr<Layout> For(absl::string_view key,
                             absl::Span<const int64_t> shape) const;

  // Ranks of the largest mesh.
  int num_ranks() const;

  std::string ToString() const;

 private:
  struct Rule {
    std::string pattern;
    std::string text;  // of the layout
    Dims mesh;
    std::vector<Placement> placements;
  };
  static absl::StatusOr<Rule> ParseRule(absl::string_view text);

  std::vector<Rule> rules_;
};

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_NAMED_LAYOUT_H_
