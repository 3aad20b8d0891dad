// SPDX-License-Identifier: Apache-2.0
//
// Rectangles whose areas are in proportion to sizes.

#ifndef DSD_FRONTENDS_CLI_TREEMAP_H_
#define DSD_FRONTENDS_CLI_TREEMAP_H_

#include <vector>

#include "absl/types/span.h"
#include "dsd/frontends/cli/picture.h"

namespace dsd::cli {

// Fills `area` with one rectangle per size, close to squares (the squarified
// treemap of Bruls, Huizing and van Wijk). Sizes are descending and > 0.
std::vector<Area> Squarify(absl::Span<const double> sizes, Area area);

}  // namespace dsd::cli

#endif  // DSD_FRONTENDS_CLI_TREEMAP_H_
