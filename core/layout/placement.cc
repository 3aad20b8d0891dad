// SPDX-License-Identifier: Apache-2.0

#include "dsd/core/layout/placement.h"

#include "absl/strings/str_cat.h"

namespace dsd {

std::string Placement::ToString() const {
  switch (kind) {
    case Kind::kReplicate:
      return "R";
    case Kind::kShard:
      return absl::StrCat("S(", dim, ")");
    case Kind::kStridedShard:
      return absl::StrCat("SS(", dim, ", ", split_factor, ")");
    case Kind::kPartial:
      return "P";
  }
  return absl::StrCat("Placement(", static_cast<int>(kind), ")");
}

}  // namespace dsd
