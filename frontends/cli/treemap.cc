// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/treemap.h"

#include <algorithm>
#include <numeric>

namespace dsd::cli {
namespace {

// The worst ratio of sides if sizes that sum up to `sum`, the largest and the
// smallest of which are given, share a strip along a side of length `side`. In
// units in which sizes are areas.
double WorstRatio(double sum, double largest, double smallest, double side) {
  return std::max(side * side * largest / (sum * sum),
                  sum * sum / (side * side * smallest));
}

}  // namespace

std::vector<Area> Squarify(absl::Span<const double> sizes, Area area) {
  std::vector<Area> out;
  out.reserve(sizes.size());
  double rest = std::accumulate(sizes.begin(), sizes.end(), 0.0);
  for (size_t begin = 0; begin < sizes.size();) {
    const double scale = area.width * area.height / rest;
    const bool upright = area.width >= area.height;  // the strip
    const double side = upright ? area.height : area.width;
    // As many as make the strip's rectangles squarer.
    size_t end = begin;
    double sum = 0;
    double worst = 0;
    while (end < sizes.size()) {
      const double more = sum + sizes[end] * scale;
      const double ratio =
          WorstRatio(more, sizes[begin] * scale, sizes[end] * scale, side);
      if (end > begin && ratio > worst) break;
      worst = ratio;
      sum = more;
      ++end;
    }
    const double thickness =
        end == sizes.size() ? (upright ? area.width : area.height) : sum / side;
    double at = 0;
    for (; begin < end; ++begin) {
      const double length = sizes[begin] * scale / sum * side;
      out.push_back(upright ? Area{area.x, area.y + at, thickness, length}
                            : Area{area.x + at, area.y, length, thickness});
      at += length;
      rest -= sizes[begin];
    }
    if (upright) {
      area.x += thickness;
      area.width -= thickness;
    } else {
      area.y += thickness;
      area.height -= thickness;
    }
  }
  return out;
}

}  // namespace dsd::cli
