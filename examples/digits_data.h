// SPDX-License-Identifier: Apache-2.0
//
// The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels each.

#ifndef DSD_EXAMPLES_DIGITS_DATA_H_
#define DSD_EXAMPLES_DIGITS_DATA_H_

#include <cstdint>
#include <string>
#include <vector>

#include "ATen/core/Tensor.h"
#include "absl/status/statusor.h"

namespace dsd_examples {

inline constexpr int64_t kPixels = 64;
inline constexpr int64_t kClasses = 10;
inline constexpr int64_t kHeldOut = 297;

struct Examples {
  at::Tensor pixels;  // [n, 64], float, in [-1, 1]
  at::Tensor labels;  // [n], int64

  int64_t size() const { return labels.size(0); }
  Examples Select(const std::vector<int64_t>& indices) const;
  // The contiguous part `rank` of `world_size` nearly equal ones.
  Examples Part(int rank, int world_size) const;
};

struct Digits {
  Examples train;
  Examples held_out;
};

// `path`: a line per digit, 64 integers of 0 to 16 and a label, with commas.
// Errors: NotFound; DataLoss naming the line.
absl::StatusOr<Digits> LoadDigits(const std::string& path);

// Which training examples make up the batch of step 1, 2, ...: a new
// permutation per epoch, the same for every number of ranks.
std::vector<int64_t> BatchIndices(int64_t num_examples, int64_t batch_size,
                                  uint64_t seed, int64_t step);

}  // namespace dsd_examples

#endif  // DSD_EXAMPLES_DIGITS_DATA_H_
