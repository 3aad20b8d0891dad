// SPDX-License-Identifier: Apache-2.0

#include "dsd/examples/digits_data.h"

#include <fstream>
#include <numeric>
#include <random>
#include <utility>

#include "ATen/ops/empty.h"
#include "ATen/ops/tensor.h"
#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace dsd_examples {

Examples Examples::Select(const std::vector<int64_t>& indices) const {
  const at::Tensor index = at::tensor(indices, at::kLong);
  return {pixels.index_select(0, index), labels.index_select(0, index)};
}

Examples Examples::Part(int rank, int world_size) const {
  const int64_t begin = size() * rank / world_size;
  const int64_t end = size() * (rank + 1) / world_size;
  return {pixels.slice(0, begin, end), labels.slice(0, begin, end)};
}

absl::StatusOr<Digits> LoadDigits(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    return absl::NotFoundError(
        absl::StrCat("cannot read the digits \"", path,
                     "\"; name the file with --data (bazel run finds it)"));
  }
  std::vector<float> pixels;
  std::vector<int64_t> labels;
  std::string line;
  while (std::getline(file, line)) {
    const std::vector<absl::string_view> fields = absl::StrSplit(line, ',');
    std::vector<int> values(fields.size());
    bool good = fields.size() == kPixels + 1;
    for (size_t i = 0; good && i < fields.size(); ++i) {
      good = absl::SimpleAtoi(fields[i], &values[i]) && values[i] >= 0 &&
             values[i] <= (i < kPixels ? 16 : kClasses - 1);
    }
    if (!good) {
      return absl::DataLossError(absl::StrCat(
          path, ":", labels.size() + 1, ": expected ", kPixels,
          " numbers of 0 to 16 and a label of 0 to ", kClasses - 1));
    }
    for (int64_t i = 0; i < kPixels; ++i) {
      pixels.push_back(static_cast<float>(values[i]) / 8 - 1);
    }
    labels.push_back(values[kPixels]);
  }
  const int64_t count = labels.size();
  if (count <= kHeldOut) {
    return absl::DataLossError(absl::StrCat(
        path, " has ", count, " digits, expected more than ", kHeldOut));
  }
  const Examples all = {at::tensor(pixels).view({count, kPixels}),
                        at::tensor(labels, at::kLong)};
  const int64_t cut = count - kHeldOut;
  return Digits{{all.pixels.slice(0, 0, cut), all.labels.slice(0, 0, cut)},
                {all.pixels.slice(0, cut), all.labels.slice(0, cut)}};
}

std::vector<int64_t> BatchIndices(int64_t num_examples, int64_t batch_size,
                                  uint64_t seed, int64_t step) {
  const int64_t batches_per_epoch = num_examples / batch_size;
  const int64_t epoch = (step - 1) / batches_per_epoch;
  std::vector<int64_t> order(num_examples);
  std::iota(order.begin(), order.end(), 0);
  // Written out, because std::shuffle differs between standard libraries.
  std::mt19937_64 generator(seed * 1000003 + epoch);
  for (int64_t i = num_examples - 1; i > 0; --i) {
    std::swap(order[i], order[generator() % (i + 1)]);
  }
  const int64_t begin = (step - 1) % batches_per_epoch * batch_size;
  return {order.begin() + begin, order.begin() + begin + batch_size};
}

}  // namespace dsd_examples
